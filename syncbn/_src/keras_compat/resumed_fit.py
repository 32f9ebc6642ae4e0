"""A `fit` that goes on where another one has ended: at an epoch, and at a step within it.

A callback has no public way to say so. The attributes set here are those that Keras' own
`BackupAndRestore` sets for the epoch. Tried with Keras 3.10, 3.15 and tf_keras 2.21, which call
``model.train_function`` for each step; tests/parallel/test_preemption.py holds it.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat.keras_api import KERAS_3, prepare_training


def resume_at_epoch(model: Any, epoch: int | None) -> None:
    """Makes the `fit` that begins start at an epoch; ``None`` leaves that to its argument."""
    if KERAS_3:
        model._initial_epoch = epoch
    else:
        model._training_state = None if epoch is None else _Counters(epoch)


class _Counters:
    """What tf_keras asks for where to start."""

    def __init__(self, epoch: int):
        self._epoch = epoch

    def maybe_load_initial_counters_from_ckpt(self, *_: Any, **__: Any) -> tuple[int, int]:
        # Not the step: an epoch without any left would have no logs, which tf_keras refuses.
        return self._epoch, 0


def executes_too_many(model: Any, steps: int) -> bool:
    """Says whether `fit` with ``steps_per_epoch`` makes more steps, to fill an execution."""
    return KERAS_3 and steps % model.steps_per_execution != 0


def leave_no_steps_out(model: Any) -> None:
    """Lets all steps train, where a `fit` that ended in an error has left `SkippedSteps`."""
    skipped = _skipped_steps(model)
    if skipped is not None:
        skipped.end()


def is_skipped(model: Any, step: int) -> bool:
    """Says whether a step that begins or ends is one of `SkippedSteps`."""
    skipped = _skipped_steps(model)
    return skipped is not None and step < skipped.steps


def _skipped_steps(model: Any) -> SkippedSteps | None:
    skipped = getattr(getattr(model, "train_function", None), "__self__", None)
    return skipped if isinstance(skipped, SkippedSteps) else None


class SkippedSteps:
    """Lets the first steps of an epoch pass without training.

    Only steps that `begin` was told of: those of a later `fit`, without the callback, all train.

    Args:
        model: What is fitted.
        steps: Their number.
        drop_batches: Whether the batches of these steps are drawn from the data, and dropped;
            otherwise the data begin behind them.

    Raises:
        ValueError: they end within an execution of several.
    """

    def __init__(self, model: Any, steps: int, drop_batches: bool):
        # In tf_keras a variable, perhaps of a strategy.
        per_execution = int(tf.convert_to_tensor(model.steps_per_execution))
        if steps % per_execution:
            raise ValueError(
                "Training can go on at the first step of an execution only. Received: "
                f"steps_per_execution={per_execution}, and {steps} steps of an epoch that were "
                "made. Compile the model with one that divides these, such as the one it had then."
            )
        self._model, self.steps, self._drop_batches = model, steps, drop_batches
        self._begun: int | None = None
        self._train = model.train_function
        model.train_function = self._train_or_skip

    def begin(self, step: int) -> None:
        """Is told of each step before it is made."""
        self._begun = step

    def end(self) -> None:
        """Lets all further steps train."""
        if self._model.train_function == self._train_or_skip:
            self._model.train_function = self._train

    def _train_or_skip(self, iterator: Any) -> Any:
        step, self._begun = self._begun, None
        if step is not None and step < self.steps:
            return {}
        self.end()
        if step is None:
            return self._train(iterator)
        last = self._drop(iterator) if self._drop_batches else None
        try:
            return self._train(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            # That was all of an epoch of unknown length. Keras asks the metrics for a result, which
            # in Keras 3 those of a model that was not trained yet do not have.
            alone = self._model.distribute_strategy.num_replicas_in_sync == 1
            if last is not None and alone:  # a strategy's `fit` has asked them before
                prepare_training(self._model, last)
            raise

    def _drop(self, iterator: Any) -> Any:
        """Drops the batches of the steps, and returns the last one."""
        batch = None
        for number in range(self.steps):
            try:
                batch = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError) as error:
                if KERAS_3 and self.steps - number < self._model.steps_per_execution:
                    break  # of an epoch's last execution, which counts as a full one
                raise ValueError(
                    "The data must have the batches that the checkpoint has seen. "
                    f"Received: data that end after {number} batches of an epoch, and a "
                    f"checkpoint of {self.steps}. Give the data and steps_per_execution that it "
                    "was made with."
                ) from error
        return batch
