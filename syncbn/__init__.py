"""Synchronized batch normalization and centering for TensorFlow, over any engine."""

from importlib.metadata import version as _version

from syncbn import training
from syncbn.communicators import (
    Communicator,
    DistributeCommunicator,
    HorovodCommunicator,
    LocalCommunicator,
    MPICommunicator,
    resolve,
)
from syncbn.layers import SyncBatchNormalization, SyncCentering
from syncbn.models import (
    Conversion,
    Equivalence,
    MovingStatistics,
    Report,
    assert_synchronized,
    check_equivalence,
    convert_sync_batchnorm,
    moving_statistics,
    recalibrate,
    report,
    revert_sync_batchnorm,
    set_moving_statistics,
)

__all__ = [
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

__version__ = _version("syncbn")
