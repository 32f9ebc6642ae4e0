"""Functions that AutoGraph does not convert."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable[..., Any])


def unconverted(function: _Function) -> _Function:
    """Wraps ``function`` in `tf.autograph.experimental.do_not_convert`, keeping its signature.

    TensorFlow's wrapper has ``*args, **kwargs``, which `inspect.getfullargspec` reports. Keras'
    wrapper layers use that to find out whether a layer takes ``mask`` or ``training``.
    """
    wrapper = tf.autograph.experimental.do_not_convert(function)
    wrapper.__signature__ = inspect.signature(function)
    return wrapper
