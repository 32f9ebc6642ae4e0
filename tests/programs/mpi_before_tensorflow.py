"""Two ranks that load MPI first, and then TensorFlow's library."""

import ctypes
import importlib.util

from mpi4py import MPI

# The library by itself, which takes less time than all of TensorFlow.
(folder,) = importlib.util.find_spec("tensorflow").submodule_search_locations
ctypes.CDLL(f"{folder}/libtensorflow_framework.so.2", ctypes.RTLD_GLOBAL)
assert MPI.COMM_WORLD.allreduce(1) == 2
