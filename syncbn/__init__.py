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
from syncbn.models import MovingStatistics, moving_statistics, set_moving_statistics

__all__ = [
    "Communicator",
    "DistributeCommunicator",
    "HorovodCommunicator",
    "LocalCommunicator",
    "MPICommunicator",
    "MovingStatistics",
    "SyncBatchNormalization",
    "SyncCentering",
    "moving_statistics",
    "resolve",
    "set_moving_statistics",
    "training",
]

__version__ = _version("syncbn")
