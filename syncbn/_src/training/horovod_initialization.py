"""Initializing Horovod for small messages."""

from __future__ import annotations

import os
from typing import Any

from syncbn._src.communicators.horovod import import_horovod
from syncbn._src.communicators.horovod_settings import to_be_set


def init_horovod(*args: Any, **kwargs: Any) -> None:
    """Calls ``hvd.init``, with settings for small messages where the environment has none.

    A synchronized layer sends a small message and waits for it, twice a step. Horovod's default
    settings are for large ones: it looks for work once in a millisecond
    (``HOROVOD_CYCLE_TIME=1``; 0.1 is set here), and over Gloo its response cache takes more rounds
    than it saves (``HOROVOD_CACHE_CAPACITY=1024``; 0 is set here, with up to 8 processes). It reads
    them when it is initialized, so this is the last place to set them. All processes make the call.
    With ``HOROVOD_AUTOTUNE=1``, Horovod finds its settings itself, and none is set.

    Args:
        args: The arguments of ``horovod.tensorflow.init``.
        kwargs: Likewise, such as ``process_sets="dynamic"``.

    Raises:
        ImportError: Horovod with TensorFlow support is not installed.
        RuntimeError: Horovod is initialized already.

    Example:
        In a job of two processes:

        >>> import horovod.tensorflow as hvd
        >>> syncbn.training.init_horovod()
        >>> hvd.size()
        2
    """
    hvd = import_horovod()
    if hvd.is_initialized():
        raise RuntimeError(
            "Horovod reads its settings when it is initialized. Received: a process in which it is "
            "already. Call init_horovod() in place of hvd.init()."
        )
    for setting in to_be_set():
        os.environ[setting.name] = setting.better
    hvd.init(*args, **kwargs)
