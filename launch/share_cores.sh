# shellcheck shell=bash
# Give each rank of this machine its share of the cores, unless the environment says otherwise.
#
# usage: . launch/share_cores.sh RANKS
#
# Under a scheduler mpirun spreads the ranks over the machines of the job: nobody knows how many are
# here, and nothing is set.
if [ -z "${SLURM_JOB_ID-}${PBS_NODEFILE-}${LSB_HOSTS-}${LSB_DJOB_HOSTFILE-}" ]; then
  # nproc would obey those two; and not every system has it.
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  share=$((cores / $1))
  [ "$share" -gt 0 ] || share=1
  export TF_NUM_INTRAOP_THREADS="${TF_NUM_INTRAOP_THREADS:-$share}"
  export TF_NUM_INTEROP_THREADS="${TF_NUM_INTEROP_THREADS:-$share}"
  unset cores share
fi
