#!/usr/bin/env bash
# Build the CPU image, and train across two containers of it: under mpirun, under horovodrun over
# Gloo and over MPI, and under the first two with a host that is lost during the job.
#
# usage: docker/test.sh [--help]
#
# Needs docker or podman; the first that answers is used. Containers, network and key are removed at the
# end, the image (syncbn:cpu) stays.
#
#   SYNCBN_BUILD_OPTIONS   more options for the build, separated by spaces: --network=host
set -euo pipefail

image=syncbn:cpu
build_limit=3600
job_limit=300
lost_limit=60
root=$(cd "$(dirname "$0")/.." && pwd)
name=syncbn-test-$$

die() { echo "test.sh: $*" >&2; exit 1; }

case "${1:-}" in
  -h|--help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  "") ;;
  *) die "unknown argument: $1 (see --help)" ;;
esac

for tool in docker podman ""; do
  [ -n "$tool" ] || die "docker or podman is required, and neither answers: try 'docker info'"
  if timeout 60 "$tool" info >/dev/null 2>&1; then break; fi
done

log=$(mktemp)
clean_up() {
  {
    timeout 60 "$tool" rm --force --volumes "$name-one" "$name-two"
    timeout 60 "$tool" network rm "$name"
    timeout 60 "$tool" volume rm "$name"
  } >/dev/null 2>&1 || true
  rm -f "$log"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

read -ra build_options <<<"${SYNCBN_BUILD_OPTIONS:-}"
timeout --foreground "$build_limit" "$tool" build "${build_options[@]}" \
  --file "$root/docker/cpu.Dockerfile" --tag "$image" "$root"

"$tool" network create --internal "$name" >/dev/null
"$tool" volume create "$name" >/dev/null
"$tool" run --rm --network none --volume "$name:/home/syncbn/.ssh" "$image" \
  ssh-keygen -q -t ed25519 -N '' -f /home/syncbn/.ssh/id_ed25519

start_hosts() {
  local host
  hosts=()
  for host in one two; do
    "$tool" rm --force "$name-$host" >/dev/null 2>&1 || true
    "$tool" run --detach --name "$name-$host" --hostname "$host" --network "$name" \
      --volume "$name:/home/syncbn/.ssh:ro" "$image" >/dev/null
    # By address, since not every network has a name server.
    hosts+=("$("$tool" inspect --format \
      "{{(index .NetworkSettings.Networks \"$name\").IPAddress}}" "$name-$host"):1")
  done
}

# run_job ARGUMENT... -- LAUNCHER...: from host one; every rank says where it is, and then becomes
# the training script with these arguments.
run_job() {
  local arguments=(--batch-per-replica 16)
  while [ "$1" != -- ]; do arguments+=("$1"); shift; done
  # (The dollars are the hosts', not this shell's.)
  # shellcheck disable=SC2016
  timeout --foreground "$job_limit" "$tool" exec "$name-one" "${@:2}" -H "${hosts[0]},${hosts[1]}" \
    bash -c 'echo "a rank on $(hostname)" && exec python launch/train_digits.py "$@"' \
    job "${arguments[@]}" 2>&1
}

# trains ARGUMENT... -- LAUNCHER...: the job succeeds, with two ranks on two hosts.
trains() {
  echo "== $*"
  run_job "$@" | tee "$log" || die "the job ended with code $?"
  for line in "a rank on one" "a rank on two" "2 replicas in 2 processes"; do
    grep -q "$line" "$log" || die "nothing says '$line'"
  done
}

# loses_a_host ARGUMENT... -- LAUNCHER...: the job ends soon, by itself, with an error.
loses_a_host() {
  echo "== $*, and host two is lost"
  run_job --epochs 10000 "$@" >"$log" &
  local job=$! code=0
  until grep -q "val_loss" "$log"; do
    kill -0 "$job" 2>/dev/null || die "the job ended too early: $(cat "$log")"
    sleep 0.2
  done
  "$tool" network disconnect --force "$name" "$name-two"
  SECONDS=0
  wait "$job" || code=$?
  echo "ended with code $code after $SECONDS s"
  grep "not responding" "$log" || die "nothing says that a host does not respond"
  [ "$code" != 0 ] && [ "$SECONDS" -le "$lost_limit" ] ||
    die "a job that loses a host must end within $lost_limit s, with another code than 0"
  ! "$tool" exec "$name-one" pgrep -af train_digits || die "host one still has a rank"
}

start_hosts
trains --epochs 2 -- mpirun
trains --epochs 2 -- horovodrun --gloo -np 2
trains --epochs 2 --engine horovod -- horovodrun --mpi -np 2
loses_a_host -- mpirun
start_hosts
loses_a_host -- horovodrun --gloo -np 2
echo "All of it passed."
