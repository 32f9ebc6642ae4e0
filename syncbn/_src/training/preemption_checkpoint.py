"""A callback that saves and ends a job that is preempted, and goes on where it was."""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.communicators.base import Communicator, process_communicator
from syncbn._src.communicators.host_collectives import gather_of_all, require_success
from syncbn._src.communicators.resolution import resolve
from syncbn._src.keras_compat.keras_api import steps_made
from syncbn._src.keras_compat.resumed_fit import (
    SkippedSteps,
    executes_too_many,
    leave_no_steps_out,
    resume_at_epoch,
)
from syncbn._src.models.training_job import job_of
from syncbn._src.training.callbacks import WorkerCallback
from syncbn._src.training.checkpoint_contents import CheckpointContents
from syncbn._src.training.checkpoint_files import CheckpointFiles, read_with_others
from syncbn._src.training.model_optimizers import optimizers_of
from syncbn._src.training.preemption_notice import PreemptionNotice
from syncbn._src.training.sample_order import SampleOrder
from syncbn._src.watchdog.messages import tell_user


class PreemptionCheckpoint(WorkerCallback):
    """Saves when the job is told to end, ends it, and goes on from there when it is started again.

    A signal to any process of the job is enough. About once a second the workers ask one another
    whether one has got one; then all of them save after the same step, and exit with a code of
    their own. The same job, started again, goes on after that step: with the same weights, moving
    statistics, optimizer state, epoch and batch. It may have another number of workers.

    A checkpoint is a folder in ``path``, which is there as a whole or not at all, and takes the
    place of the one before. All workers need to see ``path``: rank 0 writes, all read. Besides, one
    is written every so often, see ``every``, and at the end of training, after which there is
    nothing to go on with: to train anew, name another folder. What is not saved is what other
    callbacks remember, the state of random generators such as that of dropout, what the metrics
    have added up in the epoch that was interrupted, and the gradients that
    ``backward_passes_per_step`` has added up since the optimizer's last step (see `distribute`).

    **The data** go on behind the batches that have been seen. That takes an order that is the same
    in each run. `indices` gives one, shuffled anew in each epoch, in which nothing is read in vain,
    and in which other numbers of workers and other batches can go on. Any other data are read
    again, and the batches that have been seen are dropped: that is right where the order of an
    epoch does not depend on how many there were before, and the batch of all workers together is
    the same.

    In `fit` it belongs on all workers, behind the other callbacks, but before Keras'
    ``SwapEMAWeights(swap_on_epoch=True)`` and what saves or measures its averages: at the end of an
    epoch it saves the weights that are in the model then, and these must not be averages yet. Other
    callbacks see the steps that had been made before with empty logs: so ``logs.get("loss")``, not
    ``logs["loss"]``. They see the beginning of that epoch again, too: a learning rate that is
    multiplied there is so twice. A loop of one's own calls `restore` before it, `step` after each
    step, and `finish` at the end. Forked processes do not catch the signals.

    Args:
        path: The folder of the checkpoints of this job, and of no other. Its name has no ``*``,
            ``?``, ``[`` or backslash.
        every: When to save besides: ``"epoch"`` for after each epoch, or a number of steps, or
            ``None`` for not at all.
        signals: The signals that announce the end.
        exit_code: The code that all processes exit with after a signal. The default is 75,
            ``EX_TEMPFAIL``: a failure that another try may mend.
        communicator: As for `syncbn.SyncBatchNormalization`.

    Raises:
        ValueError: an argument is none of these. When training begins: the checkpoint is of another
            model, optimizer or order of the data, or is not the same one on all workers; the steps
            that have been made are no multiple of ``steps_per_execution``; the model, or one of
            several optimizers, is not built; or an optimizer keeps variables local (see
            `distribute`), which are not the same on all workers.
        RuntimeError: when training begins: not in the main thread, where alone signals can be
            caught. Later: a checkpoint cannot be written, as where the disk is full. The one before
            is still there.
        SystemExit: after a signal.

    Example:
        >>> import tempfile
        >>> preemption = syncbn.training.PreemptionCheckpoint(tempfile.mkdtemp())
        >>> data = preemption.indices(len(x), batch_size=4, epochs=2, seed=0)
        >>> data = data.map(lambda index: (tf.gather(x, index), tf.gather(y, index)))
        >>> options = {"epochs": 2, "steps_per_epoch": 4, "shuffle": False, "verbose": 0}
        >>> model.fit(data, **options, callbacks=[preemption]).epoch
        [0, 1]
        >>> model.fit(data, **options, callbacks=[preemption]).epoch  # nothing is left to do
        []
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int | Literal["epoch"] | None = "epoch",
        *,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        exit_code: int = os.EX_TEMPFAIL,
        communicator: str | Communicator = "auto",
    ) -> None:
        super().__init__(communicator)
        if every not in ("epoch", None):
            every = at_least_one("every", every, ", 'epoch' or None")
        with contextlib.suppress(TypeError):  # what is no number is refused below
            exit_code = operator.index(exit_code)
        if not (isinstance(exit_code, int) and 0 < exit_code < 128):
            raise ValueError(
                "`exit_code` must be one that stands for no success and for no signal, 1 to 127. "
                f"Received: exit_code={exit_code}."
            )
        self.path, self.every, self.exit_code = os.fspath(path), every, exit_code
        if {*self.path} & {*"*?[\\"}:
            raise ValueError(
                "`path` must have none of the characters *?[\\, which TensorFlow takes for a "
                f"pattern when it reads. Received: path={self.path!r}."
            )
        self._files = CheckpointFiles(path)
        self._notice = PreemptionNotice(signals)
        self._order: SampleOrder | None = None
        self._found: tuple[int, dict[str, Any]] | None = None
        """The last checkpoint when it was looked for, by its number, and what it says."""
        self._position, self._seen_before = (0, 0), 0
        """Where training goes on, and how many samples of that epoch have been seen before."""
        self._resumed: dict[str, Any] = {}
        """What the checkpoint says that training goes on from."""
        self._unsaved, self._reached = 0, (0, 0)
        """The steps since the last checkpoint, and the epoch and its steps that have been made."""
        self._saved: tuple[int, int] | None = None
        """The epoch and its steps of the last checkpoint."""
        self._in_fit = False
        self._skipped: SkippedSteps | None = None

    def indices(
        self, samples: int, batch_size: int, epochs: int, seed: int | None = None
    ) -> tf.data.Dataset:
        """Returns batches of the numbers of samples, in an order for all workers and epochs.

        In epoch ``e`` the order is a permutation that depends on ``seed`` and ``e`` alone. Step
        ``t`` has the samples at places ``t * batch_size`` to ``(t + 1) * batch_size - 1`` of it,
        and each worker every ``size``-th of these, so that the batch of all workers is the same
        whatever their number. After an interruption it goes on at the first place that nobody has
        seen. The samples that are left at the end of an epoch, too few for a batch, are left out.

        All workers call it, before `fit`; under a strategy in its scope. It makes one run through
        all epochs: give `fit` ``steps_per_epoch=samples // batch_size``. Map numbers to samples::

            data = preemption.indices(len(x), 32, epochs=10, seed=0)
            data = data.map(lambda index: (tf.gather(x, index), tf.gather(y, index)))

        Args:
            samples: How many samples there are.
            batch_size: The batch of all workers together, a multiple of their number.
            epochs: As for `fit`.
            seed: Shuffles; ``None`` takes the samples as they come, in each epoch.

        Returns:
            Batches of int64: over Horovod and MPI this worker's part, ``(batch_size / size,)``, and
            under tf.distribute, which shares them out, ``(batch_size,)``.

        Raises:
            ValueError: the batch is no multiple of the number of workers, or larger than
                ``samples``; or the checkpoint was made with other samples or another seed.
        """
        # Numbers of NumPy and TensorFlow go into no JSON.
        samples, batch_size, epochs = map(operator.index, (samples, batch_size, epochs))
        seed = None if seed is None else operator.index(seed)
        order = SampleOrder(samples, batch_size, seed)
        workers = process_communicator(resolve(self._communicator))
        shared = workers.name == "tf.distribute"
        rank, size = (0, 1) if shared else (workers.rank, workers.size)
        if not 0 < batch_size <= samples or batch_size % size:
            raise ValueError(
                "`batch_size` is that of all workers together: a multiple of their number, and no "
                f"more than `samples`. Received: batch_size={batch_size} for {size} workers and "
                f"samples={samples}."
            )
        _, progress = self._find()
        made_with = progress.get("order")
        if progress and made_with != [samples, seed]:
            was = "other data" if made_with is None else "samples={}, seed={}".format(*made_with)
            raise ValueError(
                "An epoch can go on in the order only in which it was begun. Received: "
                f"samples={samples}, seed={seed}, and a checkpoint in {self.path} made with {was}."
            )
        self._order = order
        return order.batches(
            progress.get("epoch", 0), progress.get("seen") or 0, epochs, rank, size
        )

    def restore(self, model: Any, optimizer: Any = None) -> tuple[int, int]:
        """Restores the last checkpoint, if there is one, and listens for signals from now on.

        For loops of one's own; `fit` does it by itself. All workers call it.

        Args:
            model: A built model.
            optimizer: Its optimizer, if any. Others that are attributes of the model belong to it
                too, and must be built.

        Returns:
            The epoch and the number of its steps that have been made: where to go on.

        Raises:
            ValueError, RuntimeError: see `PreemptionCheckpoint`.
        """
        self._restore(model, optimizer)
        self._save_if_over()
        self._notice.listen()
        return self._position

    def step(self, epoch: int, steps: int) -> None:
        """Is to be called after each step, by all workers: saves, and exits after a signal.

        With ``every="epoch"`` it saves after the first step of the epoch that follows.

        For loops of one's own, after `restore`; `fit` does it by itself.

        Args:
            epoch: The epoch.
            steps: The number of its steps that have been made.

        Raises:
            SystemExit: a worker has got a signal.
            RuntimeError: the checkpoint cannot be written.
        """
        epoch, steps = operator.index(epoch), operator.index(steps)
        begun = epoch != self._reached[0]
        self._reach(epoch, steps)
        self._exit_if_told(epoch, steps)
        if self._is_due() or (self.every == "epoch" and begun):
            self._save(epoch, steps)

    def finish(self, epochs: int) -> None:
        """Is to be called when training is over, by all workers: saves, and leaves signals alone.

        After a signal that came since the last step it exits, like `step`.

        For loops of one's own; `fit` does it by itself.

        Args:
            epochs: The number of epochs of the whole training.

        Raises:
            SystemExit: a worker has got a signal.
            RuntimeError: the checkpoint cannot be written.
        """
        # Where there are to be fewer epochs than have been begun, it is not over before they are.
        end = max((operator.index(epochs), 0), self._reached)
        if self._reached != self._position:
            self._saved = None  # other callbacks may set weights at the end, such as the best ones
        self._exit_if_told(*end, ask=True)
        self._save(*end)
        self._notice.stop()

    def on_train_begin(self, logs: Any = None) -> None:
        leave_no_steps_out(self.model)
        self._restore(self.model, self.model.optimizer)
        self._in_fit, self._skipped = True, None
        self._require_same_data()
        self._save_if_over()
        self._notice.listen(within=_frame_of_fit())
        if not self._resumed:
            return
        epoch, steps = self._position
        if self._workers.rank == 0:
            where = f"goes on at epoch {epoch + 1}, after {steps} of its steps"
            if epoch >= self.params["epochs"]:
                where = f"has nothing to do after {epoch} epochs"
            tell_user(f"{where}, from {self.path}")
        resume_at_epoch(self.model, epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        resume_at_epoch(self.model, None)  # the next `fit` may be one without this callback
        self._epoch = epoch
        if self._steps_skipped(epoch):
            self._skipped = SkippedSteps(
                self.model, self._steps_skipped(epoch), drop_batches=self._order is None
            )

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._skipped is not None:
            self._skipped.begin(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch < self._steps_skipped(self._epoch):
            return
        steps = steps_made(self, batch)
        self._reach(self._epoch, steps)
        if steps == self.params.get("steps"):
            return  # saved at the end of the epoch, with its validation
        self._exit_if_told(self._epoch, steps)
        if self._is_due():
            self._save(self._epoch, steps)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._skipped is not None:
            self._skipped.end()
            self._skipped = None
        self._exit_if_told(epoch + 1, 0, ask=True)
        if self.every == "epoch" or self._is_due():
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        resume_at_epoch(self.model, None)
        # Where training was stopped before its last epoch, it is not to go on either.
        self.finish(self.params["epochs"])
        self._in_fit = False

    def _restore(self, model: Any, optimizer: Any) -> None:
        job = job_of(model, self._communicator)
        self._workers = workers = job.workers()
        with job.scope():
            optimizers = optimizers_of(model, optimizer)
            self._contents = CheckpointContents(model, optimizers, workers)
        self._require_same(workers)
        number, progress = self._find()
        self._found = None  # there may be others when it is asked again
        if progress:
            require_success(workers, lambda: self._read(number, progress), "Restoring")
        self._resumed, self._unsaved = progress, 0
        epoch, steps, seen = (progress.get(name) or 0 for name in ("epoch", "batch", "seen"))
        if seen and self._order is not None:  # whose batches may have another size now
            left = self._order.steps_behind(seen)
            # An epoch of which no batch is left is over.
            steps = self._order.steps - left
            epoch, steps, seen = (epoch, steps, seen) if left else (epoch + 1, 0, 0)
        self._position, self._seen_before = (epoch, steps), seen
        self._reached = self._position
        self._saved = self._position if progress else None

    def _save_if_over(self) -> None:
        """Saves that an epoch is over of which no batch was left: it may have been the last one."""
        if self._resumed and self._position[0] != self._resumed["epoch"]:
            self._saved = None
            self._save(*self._position)

    def _reach(self, epoch: int, steps: int) -> None:
        """Counts the steps since it was called last: an execution of `fit` may have several."""
        before, steps_before = self._reached
        self._unsaved += steps - steps_before if epoch == before else steps
        self._reached = (epoch, steps)

    def _require_same_data(self) -> None:
        """Raises where `fit` has other data than those of which the checkpoint is."""
        if self._order is not None and self.params.get("steps") != self._order.steps:
            raise ValueError(
                "`indices` makes one run through all epochs, so `fit` has to be told of how many "
                f"steps one is. Received: {self.params.get('steps')} of them. Give it "
                f"steps_per_epoch={self._order.steps}."
            )
        if self._order is not None and executes_too_many(self.model, self._order.steps):
            raise ValueError(
                "Keras 3 makes more steps than it is told where steps_per_execution does not "
                "divide them, and would see samples of the next epoch. Received: "
                f"steps_per_execution={self.model.steps_per_execution}, and {self._order.steps} "
                "steps. Compile the model with one that divides these."
            )
        if not self._resumed:
            return
        if self._order is None and self._resumed["order"] is not None:
            raise ValueError(
                "An epoch can go on in the order only in which it was begun. Received: a "
                f"checkpoint in {self.path} of data from PreemptionCheckpoint.indices, and others."
            )
        steps = self._resumed["steps"]
        if self._order is None and self._position[1] and steps != self.params.get("steps"):
            raise ValueError(
                "An epoch can go on in the batches only in which it was begun. Received: an epoch "
                f"of {self.params.get('steps')} steps, and a checkpoint of one of {steps} in "
                f"{self.path}. Keep the batch of all workers together, or take the data from "
                "PreemptionCheckpoint.indices, which goes on with any."
            )

    def _steps_skipped(self, epoch: int) -> int:
        """Returns the steps of an epoch that were made before training went on."""
        first, steps = self._position
        return steps if self._resumed and epoch == first else 0

    def _find(self) -> tuple[int, dict[str, Any]]:
        """Returns the number of the last checkpoint and what it says; 0 and nothing without one."""
        if self._found is None:
            number = self._files.latest()
            self._found = number, self._files.progress(number) if number else {}
        return self._found

    def _require_same(self, workers: Communicator) -> None:
        """Raises where workers would go on from different places."""

        def own() -> np.ndarray:
            number, progress = self._find()
            return np.array([number, progress.get("epoch", 0), progress.get("batch", 0)])

        rows = gather_of_all(workers, own, 3, "Restoring").astype(int)
        if (rows != rows[0]).any():
            raise ValueError(
                f"All workers must go on from the same checkpoint in {self.path}. Received: number "
                f"{', '.join(map(str, rows[:, 0]))} on ranks 0 to {len(rows) - 1}, where 0 is "
                "none. Name a folder that all of them see."
            )

    def _read(self, number: int, progress: dict[str, Any]) -> None:
        self._contents.require_of_this_model(progress, self.path)
        self._files.read(number, self._contents.variables)

    def _is_due(self) -> bool:
        """Says whether as many steps have been made as `every` says."""
        return isinstance(self.every, int) and self._unsaved >= self.every

    def _exit_if_told(self, epoch: int, steps: int, ask: bool = False) -> None:
        """Saves and exits if a worker has got a signal."""
        heard = self._notice.heard(self._workers, ask)
        if not heard:
            return
        try:
            self._save(epoch, steps)
        except BaseException:
            self._notice.stop()  # nobody would ask for another signal
            raise
        if self._workers.rank == 0:
            who = ", ".join(f"{name} on rank {rank}" for rank, name in heard.items())
            where = f"epoch {epoch + 1}, after {steps} of its steps"
            tell_user(f"{who}: saved {where}, in {self.path}; exits with {self.exit_code}")
        # A second signal must not cut the end short: the signals stay caught.
        sys.stdout.flush()
        sys.exit(self.exit_code)

    def _save(self, epoch: int, steps: int) -> None:
        if self._saved == (epoch, steps) and not self._unsaved:
            return
        total = self.params.get("steps") if self._in_fit else None
        progress = {
            "epoch": epoch,
            "batch": steps,
            "steps": None if total is None else operator.index(total),
            "order": self._order and [self._order.samples, self._order.seed],
            "seen": self._seen(epoch, steps),
            "workers": self._workers.size,
            **self._contents.described(),
        }

        workers = self._workers
        in_cluster = workers.name == "tf.distribute" and workers.size > 1

        def write() -> None:
            if workers.rank == 0:
                self._files.write(self._contents.variables, progress, others_read=in_cluster)
            elif in_cluster:
                read_with_others(self._contents.variables)

        # All wait for it: a worker that exits earlier may end the job.
        require_success(workers, write, "Saving")
        self._unsaved, self._saved = 0, (epoch, steps)

    def _seen(self, epoch: int, steps: int) -> int | None:
        """Returns how many samples of an epoch all workers together have seen, if it is known."""
        if self._order is None:
            return None
        first, before = self._position
        if epoch != first:
            return steps * self._order.batch_size
        return self._seen_before + (steps - before) * self._order.batch_size


def _frame_of_fit() -> FrameType | None:
    """Returns the call of `fit` that calls a callback, or ``None`` where another loop does."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "fit":
        frame = frame.f_back
    return frame
