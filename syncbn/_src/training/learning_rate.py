"""Learning rates that grow with the number of replicas, as callbacks for `Model.fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from syncbn._src.communicators.base import Communicator, joins_by_messages, process_communicator
from syncbn._src.communicators.host_collectives import require_agreement
from syncbn._src.communicators.resolution import resolve
from syncbn._src.keras_compat.keras_api import keras, variable
from syncbn._src.keras_compat.optimizer_state import current_rate, velocities
from syncbn._src.keras_compat.resumed_fit import is_skipped, leave_no_steps_out
from syncbn._src.training.callbacks import WorkerCallback


class LearningRateSchedule(WorkerCallback):
    """Sets the learning rate to ``base_rate * replicas * multiplier`` in some epochs.

    A batch of k replicas is k times as large as that of one, and takes k times the learning rate
    (the linear scaling rule of Goyal et al., "Accurate, Large Minibatch SGD", 2017). So the rate is
    given as that of one replica, and the same script is right for any number of them.

    It is that of ``model.optimizer``; other optimizers that a model may have keep theirs.

    Several may follow one another, as may `LearningRateWarmup` and callbacks of Keras. The rate is
    in the logs of each epoch as ``learning_rate``.

    With ``momentum_correction``, the velocity of SGD and RMSprop with momentum, a sum of past
    steps, is multiplied by the change of the rate, as if those had been made at the new one
    (equation 10 of the paper). Other optimizers sum gradients, without a rate, and need none.

    It works under every engine. All workers must have the same arguments and numbers of steps,
    which they compare when training begins, but for what a function returns.

    Args:
        base_rate: The learning rate for one replica, positive. (Horovod's ``initial_lr`` is this
            times the number of workers.)
        multiplier: A number, or a function of the epoch that returns one.
        start_epoch: The first epoch in which the rate is set, from 0.
        end_epoch: The first epoch in which it is no longer set; ``None`` for no end.
        staircase: Whether the rate is set once in an epoch, for an integer ``epoch``. Otherwise it
            is set at each batch, for ``epoch + batch / steps``. (With ``steps_per_execution``, at
            the first batch of each execution.)
        momentum_correction: See above.
        steps_per_epoch: The number of batches in an epoch, where Keras does not know it.
        first_batch: The number of batches that are done in the epoch with which training begins,
            where it goes on within one (see `CommitState`): Keras counts from 0 again, and knows
            only of those that are left. They count as if they had had the size of those.
        communicator: As for `syncbn.SyncBatchNormalization`.

    Raises:
        ValueError: ``base_rate`` is not positive, or ``first_batch`` negative. When training
            begins: the number of steps in an epoch is needed and unknown, or workers have different
            schedules.
        TypeError: when the rate is set: that of the optimizer is a schedule.

    Example:
        >>> schedule = syncbn.training.LearningRateSchedule(0.1, lambda epoch: 0.1 ** (epoch // 2))
        >>> history = model.fit(x, y, epochs=4, callbacks=[schedule], verbose=0)
        >>> print(np.round(history.history["learning_rate"], 3))  # with one replica
        [0.1  0.1  0.01 0.01]
    """

    def __init__(
        self,
        base_rate: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        *,
        first_batch: int = 0,
        communicator: str | Communicator = "auto",
    ):
        super().__init__(communicator)
        if not base_rate > 0:
            raise ValueError(f"`base_rate` must be positive. Received: base_rate={base_rate!r}.")
        self.base_rate = float(base_rate)
        self.multiplier = multiplier
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.staircase, self.momentum_correction = staircase, momentum_correction
        self.steps_per_epoch = steps_per_epoch
        if not isinstance(first_batch, int) or first_batch < 0:
            raise ValueError(
                "`first_batch` must be a number of batches, 0 or more. "
                f"Received: first_batch={first_batch!r}."
            )
        self.first_batch = first_batch

    def on_train_begin(self, logs: Any = None) -> None:
        leave_no_steps_out(self.model)
        self._done = self.first_batch
        left = self.params.get("steps")
        self._steps = self.steps_per_epoch or (left and left + self._done)
        if not self.staircase and not self._steps:
            raise ValueError(
                f"{type(self).__name__} needs the number of steps in an epoch. Received: data of "
                "unknown length. Give it steps_per_epoch."
            )
        # Within the scope, where the replicas of this process count too.
        with self.model.distribute_strategy.scope():
            communicator = resolve(self._communicator)
            self._replicas = communicator.size
        joined = process_communicator(communicator)
        if joins_by_messages(joined):
            facts = {
                "base_rate": self.base_rate,
                "multiplier": "a function" if callable(self.multiplier) else self.multiplier,
                "epochs": (self.start_epoch, self.end_epoch),
                "staircase": self.staircase,
                "momentum_correction": self.momentum_correction,
                "steps in an epoch": None if self.staircase else self._steps,
                "first_batch": None if self.staircase else self.first_batch,
            }
            require_agreement(joined, [*map(str, facts.values())], [*facts], "learning rates")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._set_in_epoch = epoch, False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._epoch < self.start_epoch or (
            self.end_epoch is not None and self._epoch >= self.end_epoch
        ):
            return
        if is_skipped(self.model, batch):
            return  # a rate of zero would end the momentum that belongs to a later one
        if not self.staircase:
            self._set(self._multiplier(self._epoch + (self._done + batch) / self._steps))
        elif not self._set_in_epoch:
            self._set_in_epoch = True
            self._set(self._multiplier(self._epoch))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._done = 0  # of the next epoch, if there is one in this call of `fit`
        if logs is not None:
            logs["learning_rate"] = current_rate(self.model.optimizer)

    def _multiplier(self, epoch: float) -> float:
        return self.multiplier(epoch) if callable(self.multiplier) else self.multiplier

    def _set(self, multiplier: float) -> None:
        optimizer = self.model.optimizer
        if isinstance(optimizer.learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            # Optimizers of Keras 2's `legacy`; the others raise by themselves.
            raise TypeError(
                f"{type(self).__name__} sets the learning rate, so it must be a number. Received: "
                f"an optimizer with learning_rate={optimizer.learning_rate!r}."
            )
        rate, before = self.base_rate * self._replicas * multiplier, current_rate(optimizer)
        optimizer.learning_rate = rate
        if self.momentum_correction and before > 0 and before != current_rate(optimizer):
            for velocity in map(variable, velocities(optimizer, self.model.trainable_variables)):
                velocity.assign(velocity * (rate / before))


class LearningRateWarmup(LearningRateSchedule):
    """Raises the learning rate from that of one replica to that of all of them, step by step.

    With k replicas the rate of step t, from 0, is
    ``base_rate * (1 + (k - 1) * (t + 1) / (warmup_epochs * steps))``, so that the last step of the
    warm-up has ``base_rate * k``: the gradual warm-up of Goyal et al., "Accurate, Large Minibatch
    SGD" (2017). Afterwards the rate is left alone, for others to set; also in training that resumes
    after the warm-up, from a checkpoint. To continue with a schedule, give `LearningRateSchedule`
    the same ``base_rate`` and ``start_epoch=warmup_epochs``.

    Args:
        base_rate: The learning rate for one replica, positive. (Horovod's ``initial_lr`` is this
            times the number of workers.)
        warmup_epochs: The number of epochs that the warm-up takes, positive.
        momentum_correction: As for `LearningRateSchedule`.
        steps_per_epoch: The number of batches in an epoch, where Keras does not know it.
        first_batch: As for `LearningRateSchedule`.
        communicator: As for `syncbn.SyncBatchNormalization`.

    Raises:
        ValueError: an argument is not positive; and as for `LearningRateSchedule`.
        TypeError: as for `LearningRateSchedule`.

    Example:
        >>> warmup = syncbn.training.LearningRateWarmup(0.1, warmup_epochs=2)
        >>> history = model.fit(x, y, epochs=3, callbacks=[warmup], verbose=0)
    """

    def __init__(
        self,
        base_rate: float,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        *,
        first_batch: int = 0,
        communicator: str | Communicator = "auto",
    ):
        if not warmup_epochs > 0:
            raise ValueError(
                "`warmup_epochs` must be positive; without a warm-up, use LearningRateSchedule. "
                f"Received: warmup_epochs={warmup_epochs!r}."
            )
        super().__init__(
            base_rate,
            self._growth,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
            first_batch=first_batch,
            communicator=communicator,
        )
        self.warmup_epochs = warmup_epochs

    def _growth(self, epoch: float) -> float:
        share = min(1.0, (epoch + 1 / self._steps) / self.warmup_epochs)
        return (1 + (self._replicas - 1) * share) / self._replicas
