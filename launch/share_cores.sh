# shellcheck shell=bash
# Give each rank of this machine its share of the cores, unless the environment says otherwise.
#
# usage: . launch/share_cores.sh RANKS
share=$(($(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) / $1))  # nproc would obey them
[ "$share" -gt 0 ] || share=1
export TF_NUM_INTRAOP_THREADS="${TF_NUM_INTRAOP_THREADS:-$share}"
export TF_NUM_INTEROP_THREADS="${TF_NUM_INTEROP_THREADS:-$share}"
unset share
