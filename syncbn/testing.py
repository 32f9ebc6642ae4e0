"""For tests of your own models; works with pytest and any other framework based on `assert`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from syncbn._src.models.equivalence.check import check_equivalence

__all__ = ["assert_equivalent"]


def assert_equivalent(
    build_model: Callable[[], Any], batch: Any, replicas: int = 2, **options: Any
) -> None:
    """Asserts that a model does on several replicas what it does on one with the whole batch.

    TensorFlow must not have started, or must have enough devices; a ``conftest.py`` is the place
    for ``tf.config.set_logical_device_configuration``.

    Args:
        build_model: As for `syncbn.check_equivalence`.
        batch: Likewise.
        replicas: Likewise.
        **options: The other arguments of `syncbn.check_equivalence`.

    Raises:
        AssertionError: it does not. The message is the table, and the advice.
        TypeError, ValueError, RuntimeError: see `syncbn.check_equivalence`.

    Example:
        >>> def build_model():
        ...     return tf.keras.Sequential([tf.keras.Input((4,)), syncbn.SyncBatchNormalization()])
        >>> syncbn.testing.assert_equivalent(build_model, x)
    """
    found = check_equivalence(build_model, batch, replicas, **options)
    if not found.equivalent:
        raise AssertionError(str(found))
