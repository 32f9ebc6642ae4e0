"""The public names of `syncbn`. Importing this imports TensorFlow, and registers the layers."""

from syncbn import testing as testing
from syncbn import training
from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.horovod import HorovodCommunicator
from syncbn._src.communicators.launcher import launched as _launched
from syncbn._src.communicators.local import LocalCommunicator
from syncbn._src.communicators.mpi import MPICommunicator
from syncbn._src.communicators.resolution import resolve
from syncbn._src.communicators.tf_distribute import DistributeCommunicator
from syncbn._src.layers.sync_batch_normalization import SyncBatchNormalization
from syncbn._src.layers.sync_centering import SyncCentering
from syncbn._src.models.advice_estimation import advise
from syncbn._src.models.agreement import assert_synchronized
from syncbn._src.models.communication_report import Report, report
from syncbn._src.models.conversion import Conversion, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn._src.models.equivalence.check import Equivalence, check_equivalence
from syncbn._src.models.recalibration import recalibrate
from syncbn._src.models.statistics import (
    MovingStatistics,
    moving_statistics,
    set_moving_statistics,
)
from syncbn._src.models.synchronization_advice import Advice
from syncbn._src.watchdog.exits import install as _watch_exits

__all__ = [
    "Advice",
    "Communicator",
    "Conversion",
    "DistributeCommunicator",
    "Equivalence",
    "HorovodCommunicator",
    "LocalCommunicator",
    "MPICommunicator",
    "MovingStatistics",
    "Report",
    "SyncBatchNormalization",
    "SyncCentering",
    "advise",
    "assert_synchronized",
    "check_equivalence",
    "convert_sync_batchnorm",
    "moving_statistics",
    "recalibrate",
    "report",
    "resolve",
    "revert_sync_batchnorm",
    "set_moving_statistics",
    "training",
]

# Here, not where the package is imported: a command may import that without the names.
if _launched().processes > 1:
    _watch_exits()
