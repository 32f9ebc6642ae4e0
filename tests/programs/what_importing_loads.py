"""Importing the package, and making a layer, loads no engine."""

import sys

import syncbn

layer = syncbn.SyncBatchNormalization()
loaded = {name.partition(".")[0] for name in sys.modules}
unwanted = loaded & {"horovod", "mpi4py", "benchmarks"}
assert not unwanted, unwanted
print(layer)
