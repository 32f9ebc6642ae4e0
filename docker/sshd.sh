#!/bin/sh
# Make this container a host of a job: an ssh server on port 2222, with a host key of its own.
set -eu
[ -e ~/.host_key ] || ssh-keygen -q -t ed25519 -N '' -f ~/.host_key
exec /usr/sbin/sshd -D -e -h ~/.host_key
