#!/usr/bin/env bash
# Run a rank's command with a thread for each core of its share, unless the environment sets a number.
#
# usage: launch/share_cores.sh COMMAND...
#
# mpi.sh and horovod.sh start every rank through this. TensorFlow gives each rank a thread for every
# core of the machine, and several ranks on one machine then wait for one another. The launcher tells
# each rank how many are on its machine, also where a scheduler has spread them over several.
set -euo pipefail

case "${1:-}" in
  ''|-h|--help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
# Of Horovod over Gloo, Open MPI, MPICH.
ranks=${HOROVOD_LOCAL_SIZE:-${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-1}}}
# nproc would obey these two; and not every system has it.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
share=$((cores / ranks))
[ "$share" -gt 0 ] || share=1
export TF_NUM_INTRAOP_THREADS="${TF_NUM_INTRAOP_THREADS:-$share}"
export TF_NUM_INTEROP_THREADS="${TF_NUM_INTEROP_THREADS:-$share}"
exec "$@"
