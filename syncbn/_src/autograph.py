"""Functions that AutoGraph leaves as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable[..., Any])


def unconverted(function: _Function) -> _Function:
    """Is `tf.autograph.experimental.do_not_convert`, and shows the signature of ``function``.

    TensorFlow's wrapper has ``*args, **kwargs``, and `inspect.getfullargspec` says so. Wrappers ask
    it whether a layer takes a mask, or whether it knows of training.
    """
    wrapper = tf.autograph.experimental.do_not_convert(function)
    wrapper.__signature__ = inspect.signature(function)
    return wrapper
