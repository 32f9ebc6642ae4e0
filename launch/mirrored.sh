#!/usr/bin/env bash
# Start a command that uses MirroredStrategy: one process, a replica on each GPU.
#
# usage: syncbn launch mirrored [--gpus N] [--xla] [--] COMMAND...
#
# In a checkout also launch/mirrored.sh instead of `syncbn launch mirrored`.
#
#   --gpus N   let the command see N GPUs only   (default: all that this machine has, or those
#              that CUDA_VISIBLE_DEVICES names)
#   --xla      let XLA compile what lies between collectives: puts its flags before yours in
#              TF_XLA_FLAGS
#
# MirroredStrategy() takes the GPUs that it sees, so the command needs no flag for their number.
# Without GPUs it takes the one CPU; several replicas on CPUs are up to the command (in
# launch/train_digits.py: --replicas).
#
# The exit code is the command's.
set -euo pipefail

die() { echo "mirrored.sh: $*" >&2; exit 1; }
refuse() { echo "mirrored.sh: $*" >&2; exit 2; }  # wrong arguments

gpus=
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --gpus) [ $# -ge 2 ] || refuse "--gpus needs a value"; gpus=$2
      [[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "--gpus must be a positive number. Received: '$gpus'"
      shift 2 ;;
    --xla) export TF_XLA_FLAGS="--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit ${TF_XLA_FLAGS:-}"; shift ;;
    --) shift; break ;;
    -*) refuse "unknown argument: $1 (see --help)" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || refuse "a command is required, such as: python train.py"
type -P -- "$1" >/dev/null || refuse "no such command: $1"
[ -z "${TF_CONFIG:-}" ] \
  || die "MirroredStrategy() would take the devices of all workers in TF_CONFIG. Unset TF_CONFIG"

if [ -n "$gpus" ]; then
  if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    type -P nvidia-smi >/dev/null || die "--gpus needs GPUs. nvidia-smi is not installed here"
    # By their UUIDs, as CUDA does not number GPUs in the order of nvidia-smi.
    CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=uuid --format=csv,noheader | paste -sd, -) \
      || die "nvidia-smi failed (its message is above)"
  fi
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  [ "${#visible[@]}" -ge "$gpus" ] && [ "${visible[0]}" != -1 ] \
    || die "--gpus $gpus is more than there are. Received: '$CUDA_VISIBLE_DEVICES'"
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${visible[*]:0:gpus}")
  export CUDA_VISIBLE_DEVICES
fi
exec "$@"
