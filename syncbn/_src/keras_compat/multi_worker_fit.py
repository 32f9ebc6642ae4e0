"""`fit` and `evaluate` of Keras 3 under `MultiWorkerMirroredStrategy`, where Keras' own fail.

Two private functions of Keras' trainer are at fault (keras#20585); there is no public API to avoid
them. Tried with Keras 3.10.0, 3.12.0, 3.14.1 and 3.15.1, which need both of them fixed. The code
here probes the Keras that it finds, not its version. tf_keras needs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.keras_compat.keras_api import KERAS_3, keras
from syncbn._src.keras_compat.loss_scaling import mend_loss_scaling

_log = logging.getLogger("syncbn")


def mend_keras_fit() -> tuple[str, ...]:
    """Makes Keras 3's `fit` and `evaluate` right where tf.distribute has several replicas.

    A synchronized layer that is created in the scope of a `MirroredStrategy` or a
    `MultiWorkerMirroredStrategy` does it by itself. Call it for models that have none, or whose
    layers were created outside of a scope: once in every worker, before `fit`, and before or after
    the strategy is created. It patches Keras for the whole process, so it is no side effect of an
    import; and it patches Keras rather than a model, so that models of any class, loaded ones too,
    need nothing.

    Each function of the trainer is first tried on a stand-in for a strategy, and replaced only if
    it has the fault. So a trainer that has fixed it is left alone, as is tf_keras, and a second
    call does nothing.

    - Before its first step, Keras averages the first batch over the replicas, to infer shapes from
      it. That fails with several workers, and under `MirroredStrategy` if the batch does not divide
      evenly. Instead, the shapes are those of this process's first replica.
    - After each step with several workers, Keras averages the logs, which are scalars, over their
      first axis. Instead, they are averaged over the replicas only, as under `MirroredStrategy`.
    - In ``mixed_float16``, each replica's gradients decide by themselves whether a step is skipped.
      Under `MirroredStrategy` only those of the first one do: where another one's overflow, weights
      become infinite. With several workers, those that take the step wait for ever for one that
      skips it. Instead, all skip it if the gradients of one are not finite: an all-reduce of a
      scalar in each step. This is replaced untried; a Keras that does it by itself does it twice.

    Returns:
        The names of what was replaced.

    Warns:
        If this Keras' trainer is built differently from those known here. It is left alone.

    Example:
        >>> replaced = syncbn.training.mend_keras_fit()
        >>> syncbn.training.mend_keras_fit()  # all is mended
        ()
    """
    try:
        return _mend()
    except _UnknownTrainerError as error:
        warnings.warn(
            "mend_keras_fit knows the trainer of Keras 3.10 to 3.15, and leaves others alone. "
            f"Received: Keras {keras.__version__} ({error}). If `fit` fails under "
            "MultiWorkerMirroredStrategy, use one of those, or TF_USE_LEGACY_KERAS=1.",
            stacklevel=2,
        )
        return ()


def mend_fit_in_scope() -> None:
    """Does the same in the scope of a strategy whose `fit` would fail, with no warning.

    That is safe there: what is replaced is what has the fault, and its replacement differs only in
    calls that fail without it. The shapes of a batch that divides evenly are those of its mean,
    the logs of several workers are never averaged otherwise, and a step in which all gradients are
    finite is never skipped.
    """
    strategies = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    if isinstance(tf.distribute.get_strategy(), strategies):
        with contextlib.suppress(_UnknownTrainerError):
            _mend_once()


@functools.cache
def _mend_once() -> None:
    if names := _mend():
        _log.info("Keras' own fails under this strategy: replaced %s.", " and ".join(names))


class _UnknownTrainerError(Exception):
    """This Keras' trainer is built differently from those that are known here."""


def _mend() -> tuple[str, ...]:
    if not KERAS_3:
        return ()
    try:
        from keras.src.backend.tensorflow import trainer

        faults = (
            ("TensorFlowTrainer._maybe_symbolic_build", _averages_batches, _mend_symbolic_build),
            ("reduce_per_replica", _averages_scalars_over_an_axis, _mend_reduce_per_replica),
        )
        found = [(name, mend) for name, has_fault, mend in faults if has_fault(trainer)]
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise _UnknownTrainerError(error) from error
    for _, mend in found:
        mend(trainer)
    return (*(name for name, _ in found), *mend_loss_scaling())


def _mend_symbolic_build(trainer: Any) -> None:
    build = trainer.TensorFlowTrainer._maybe_symbolic_build

    @functools.wraps(build)
    def maybe_symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        strategy = self._distribute_strategy
        if strategy is None or iterator is None:
            return build(self, iterator=iterator, data_batch=data_batch)
        *_, batches = next(iter(iterator))
        batch = next(batches, None)
        if batch is None:
            return None  # nothing is built for no data, as where a job is over
        first = trainer.tree.map_structure(
            lambda value: strategy.experimental_local_results(value)[0], batch
        )
        return build(self, data_batch=first)

    trainer.TensorFlowTrainer._maybe_symbolic_build = maybe_symbolic_build


def _mend_reduce_per_replica(trainer: Any) -> None:
    reduce = trainer.reduce_per_replica

    @functools.wraps(reduce)
    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        several_workers = trainer._collective_all_reduce_multi_worker(strategy)
        if several_workers and reduction in ("auto", "mean"):
            return trainer.tree.map_structure(
                lambda value: strategy.reduce("MEAN", value, axis=None), values
            )
        return reduce(values, strategy, reduction)

    trainer.reduce_per_replica = reduce_per_replica


# What follows must not run any TensorFlow operation: a strategy has to be created before the first
# one, and `mend_keras_fit` may be called before that.


class _Strategy(tf.distribute.MultiWorkerMirroredStrategy):
    """A stand-in for a strategy of several workers that records the axes Keras reduces over."""

    def __init__(self) -> None:
        # The strategy's own would start a server and wait for the other workers.
        self._extended = types.SimpleNamespace(_in_multi_worker_mode=lambda: True)
        self.axes: list[int | None] = []

    def scope(self) -> Any:
        return contextlib.nullcontext()

    def experimental_local_results(self, value: Any) -> Any:
        return value.values

    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        self.axes.append(axis)
        return value


class _Values(tf.distribute.DistributedValues):
    values = (tf.TensorSpec([1]),)


def _averages_batches(trainer: Any) -> bool:
    strategy = _Strategy()
    model = types.SimpleNamespace(
        distribute_strategy=strategy,
        _distribute_strategy=strategy,
        _symbolic_build=lambda data_batch: None,
    )

    class Iterator(trainer.TFEpochIterator):
        def __init__(self) -> None:
            trainer.EpochIterator.__init__(self, x=np.zeros([1, 1]))

        def _get_iterator(self) -> Any:
            return [(_Values(), _Values())]

    trainer.TensorFlowTrainer._maybe_symbolic_build(model, iterator=Iterator())
    return bool(strategy.axes)


def _averages_scalars_over_an_axis(trainer: Any) -> bool:
    strategy = _Strategy()
    trainer.reduce_per_replica(0.0, strategy, reduction="auto")
    return strategy.axes != [None]
