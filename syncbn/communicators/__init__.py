"""The engines that join replicas, behind one protocol."""

from syncbn.communicators.base import Communicator
from syncbn.communicators.distribute import DistributeCommunicator
from syncbn.communicators.horovod import HorovodCommunicator
from syncbn.communicators.local import LocalCommunicator
from syncbn.communicators.mpi import MPICommunicator
from syncbn.communicators.resolve import resolve

__all__ = [
    "Communicator",
    "DistributeCommunicator",
    "HorovodCommunicator",
    "LocalCommunicator",
    "MPICommunicator",
    "resolve",
]
