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

__all__ = [
    "Communicator",
    "DistributeCommunicator",
    "HorovodCommunicator",
    "LocalCommunicator",
    "MPICommunicator",
    "SyncBatchNormalization",
    "SyncCentering",
    "resolve",
    "training",
]

__version__ = _version("syncbn")
