#!/usr/bin/env bash
# Build Horovod for the TensorFlow that is installed, and install it.
#
# usage: syncbn install-horovod [--python PYTHON] [--cache DIR] [--nccl] [--rebuild]
#
# In a checkout also launch/install_horovod.sh instead of `syncbn install-horovod`.
#
#   --python PYTHON   the interpreter to install into   (default: that of syncbn, or python3)
#   --cache DIR       where the built wheel is kept
#                     (default: $SYNCBN_CACHE, else $XDG_CACHE_HOME/syncbn, else ~/.cache/syncbn)
#   --nccl            build the GPU operations over NCCL (needs CUDA and NCCL)
#   --rebuild         build even where the cache holds a wheel
#
# Horovod's last release, 0.28.1, is a source release that predates TensorFlow 2.16. It builds
# against later TensorFlows once its XLA operation is left out: that one file needs headers which
# TensorFlow no longer ships whole, and nothing else depends on it. Gloo is always built, MPI where
# `mpicxx` is found beside PYTHON or on the PATH. The first build takes two to five minutes; the
# wheel is cached, so that later calls take seconds.
set -euo pipefail

version=0.28.1
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# Gloo's CMakeLists asks for a policy level that CMake 4 has dropped.
cmake_version=3.31.10
# What Horovod's setup.py requires, to build and to run. Installed by pip beforehand, or setuptools
# would fetch them itself, past any constraints.
requirements=(cloudpickle psutil pyyaml packaging cffi)

die() { echo "install_horovod.sh: $*" >&2; exit 1; }
refuse() { echo "install_horovod.sh: $*" >&2; exit 2; }  # wrong arguments

python=python3
cache=${SYNCBN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/syncbn}
nccl=0
rebuild=0
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --python) [ $# -ge 2 ] || refuse "--python needs a value"; python=$2; shift 2 ;;
    --cache) [ $# -ge 2 ] || refuse "--cache needs a value"; cache=$2; shift 2 ;;
    --nccl) nccl=1; shift ;;
    --rebuild) rebuild=1; shift ;;
    *) refuse "unknown argument: $1 (see --help)" ;;
  esac
done

# The build runs in another folder, so paths have to be absolute.
if [ -f "${PIP_CONSTRAINT:-}" ]; then
  PIP_CONSTRAINT=$(realpath "$PIP_CONSTRAINT")
  export PIP_CONSTRAINT
fi

python=$(command -v "$python") || refuse "no such interpreter: give one with --python"
python=$(realpath -s "$python")  # not through links: an environment's python is one
PATH=$(dirname "$python"):$PATH
command -v g++ >/dev/null || die "a C++ compiler is required: apt-get install g++"
command -v make >/dev/null || die "make is required: apt-get install make"

# One wheel serves one Python, one TensorFlow and one MPI: their versions name its folder.
target=$("$python" - <<'PYTHON'
import importlib.metadata as metadata
import sys

try:
    tensorflow = metadata.version("tensorflow")
except metadata.PackageNotFoundError:
    sys.exit("TensorFlow is required, to build against: pip install tensorflow")
print(f"{sys.implementation.cache_tag}-tf{tensorflow}")
PYTHON
) || die "cannot tell which TensorFlow to build for"
mpi=none
if command -v mpicxx >/dev/null; then
  mpi=$(mpirun --version 2>/dev/null | sed -n '1s/[^A-Za-z0-9.]\{1,\}/-/gp' || true)
  mpi=${mpi:-unknown}
fi
[ "$nccl" = 0 ] || target+=-nccl
wheels=$cache/horovod-$version-$target-${mpi%-}

if [ "$rebuild" = 1 ] || ! compgen -G "$wheels/horovod-*.whl" >/dev/null; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "Building Horovod $version for $target (MPI: ${mpi%-}). This takes a few minutes, once."
  echo "horovod==$version --hash=sha256:$sha256" >"$work/horovod.txt"
  "$python" -m pip install -q "setuptools<81" wheel "${requirements[@]}"
  "$python" -m pip download -q --no-deps --no-binary=:all: --no-build-isolation \
    --require-hashes -r "$work/horovod.txt" -d "$work"
  tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
  "$python" -m pip install -q --target "$work/cmake" "cmake==$cmake_version"
  printf '#!/bin/sh\nPYTHONPATH=%q exec %q "$@"\n' "$work/cmake" "$work/cmake/bin/cmake" >"$work/run_cmake"
  chmod +x "$work/run_cmake"

  source=$work/horovod-$version
  sed -i '/xla_mpi_ops\.cc/d' "$source/horovod/tensorflow/CMakeLists.txt"

  options=(HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1)
  if [ "$mpi" = none ]; then options+=(HOROVOD_WITHOUT_MPI=1); else options+=(HOROVOD_WITH_MPI=1); fi
  if [ "$nccl" = 1 ]; then options+=(HOROVOD_GPU_OPERATIONS=NCCL); fi
  # The libraries of a Python environment lie four folders above the extension. Looking there first
  # lets one wheel serve every environment that has its MPI from PyPI; a system MPI is found as ever.
  # (The dollar is the linker's, not the shell's.)
  # shellcheck disable=SC2016
  rpath='-Wl,-rpath,$ORIGIN/../../../..'
  env "${options[@]}" HOROVOD_CMAKE="$work/run_cmake" LDFLAGS="$rpath ${LDFLAGS:-}" \
    MAKEFLAGS="-j$(nproc)" \
    "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/wheel" "$source" \
    >"$work/log" 2>&1 || { tail -n 60 "$work/log" >&2; die "the build failed (its last lines are above)"; }
  mkdir -p "$wheels"
  mv "$work"/wheel/horovod-*.whl "$wheels/"
fi

"$python" -m pip install -q --force-reinstall --no-deps "$wheels"/horovod-"$version"-*.whl
"$python" -m pip install -q "setuptools<81" "${requirements[@]}"
horovodrun --check-build
