"""What the workers of an elastic job have in common: committed, restored, and given to new ones."""

from __future__ import annotations

import json
import threading
import zlib
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import joins_by_messages, process_communicator
from syncbn._src.communicators.horovod_errors import lost_collectives_as_internal_errors
from syncbn._src.communicators.host_collectives import require_agreement
from syncbn._src.communicators.launcher import is_elastic
from syncbn._src.communicators.resolution import resolve
from syncbn._src.keras_compat.keras_api import OPTIMIZERS
from syncbn._src.keras_compat.layer_names import full_name
from syncbn._src.keras_compat.optimizer_state import optimizer_variables
from syncbn._src.models.training_job import job_of
from syncbn._src.training.kept_local import shared_variables
from syncbn._src.training.model_optimizers import create_states, optimizers_of
from syncbn._src.training.optimizer import require_averages_of_scaled
from syncbn._src.training.variable_broadcast import broadcast, broadcast_text


class ElasticState:
    """The state of training that survives the loss of workers, and that new workers get.

    It has the weights of a model, moving statistics included, the state of its optimizers, and
    values of your own, which are its attributes: ``state.epoch``, ``state.batch``, and those that
    are given by name. `commit` keeps a copy in memory; when a worker is lost, `elastic` takes the
    others back to it. New workers get that of one that was there before.

    A value is a number, a string, a boolean, ``None``, or lists and dictionaries of these: it is
    sent as JSON. A commit copies all of the state, and asks the other workers whether the job is to
    change, so commit as often as you would lose that many steps (see `CommitState`).

    Variables that an optimizer keeps local (see `distribute`) are committed and restored, and not
    given to new workers. Of ``backward_passes_per_step``, passes that have not made a step are
    dropped where the state is restored or synchronized.

    Args:
        model: A model that is built.
        optimizer: An optimizer of `tf.keras`. Its state is created now, if it has none yet. The
            one that the model was compiled with, if any, where it is ``None``. Those that a model
            with a ``train_step`` of its own has besides, as attributes, belong to it too, and must
            be built.
        epoch: The number of epochs that are done.
        batch: The number of batches that are done in the epoch after these.
        values: Other values.

    Raises:
        ValueError: the model, or one of several optimizers, is not built, or a value has the name
            of a method.
        TypeError: not an optimizer of `tf.keras`; here or at a commit: a value cannot be sent.
        RuntimeError: Keras has wrapped a distributed optimizer in one that scales the loss (see
            `distribute`).

    Example:
        >>> state = syncbn.training.ElasticState(model, best=None)
        >>> state.epoch, state.best = 1, 0.25
        >>> state.commit()
        >>> state.best = 0.5
        >>> state.restore()
        >>> state.epoch, state.batch, state.best
        (1, 0, 0.25)
    """

    def __init__(
        self, model: Any, optimizer: Any = None, *, epoch: int = 0, batch: int = 0, **values: Any
    ) -> None:
        if not model.built:
            raise ValueError(
                "`model` must have its weights, which new workers get. Received: a model that is "
                "not built. Build it first: model.build(input_shape)."
            )
        optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if optimizer is not None and not isinstance(optimizer, OPTIMIZERS):
            raise TypeError(
                "`optimizer` must be one of tf.keras.optimizers. "
                f"Received: optimizer={optimizer!r}."
            )
        optimizers = optimizers_of(model, optimizer)
        for one in (*optimizers.values(), getattr(model, "optimizer", None)):
            require_averages_of_scaled(one)
        taken = sorted(name for name in values if hasattr(type(self), name))
        if taken:
            raise ValueError(f"Values must have names of their own. Received: {', '.join(taken)}.")
        self.model, self.optimizer = model, optimizer
        self._optimizers = [*optimizers.values()]
        with model.distribute_strategy.scope():
            create_states(optimizers, model.trainable_variables)
        self._names = ("epoch", "batch", *values)
        self.epoch, self.batch = epoch, batch
        for name, value in values.items():
            setattr(self, name, value)
        self._hosts_changed = threading.Event()
        self._save()

    def commit(self) -> None:
        """Keeps the state as it is now. All workers make the call.

        In an elastic job it is also the place where workers that are to join or leave are noticed,
        by an exception that `elastic` catches; so nothing else should catch all exceptions.

        Raises:
            TypeError: a value cannot be sent to new workers.
        """
        self._save()
        if is_elastic():
            self._interrupt_where_hosts_change()

    def restore(self) -> None:
        """Goes back to the last commit."""
        # Before the job is set up anew, which takes the changes up; it may not know a later one.
        self._hosts_changed.clear()
        with self.model.distribute_strategy.scope():
            for variable, value in zip(self._variables(), self._committed, strict=True):
                variable.assign(value)
        self._set_values(self._committed_values)
        self._clear_accumulation()

    def sync(self) -> None:
        """Gives the state of rank 0 to all workers, and commits it. `elastic` calls it.

        Under tf.distribute, where variables are created equal, states are compared, and not sent.

        Raises:
            ValueError: workers have different models or optimizers, or, under tf.distribute,
                different states.
            RuntimeError: see `syncbn.resolve`.
        """
        with lost_collectives_as_internal_errors(), self.model.distribute_strategy.scope():
            communicator = process_communicator(resolve())
            broadcast(shared_variables(self._variables(), self._optimizers))
            if joins_by_messages(communicator):
                self._set_values(broadcast_text(self._values(), communicator))
        self._clear_accumulation()
        self._save()
        if communicator.name == "tf.distribute":
            self._require_same_state()

    def on_hosts_updated(self, timestamp: int, update: Any) -> None:
        """Takes a note, for the next commit. Horovod calls it, in another thread, on rank 0."""
        self._hosts_changed.set()

    def on_reset(self) -> None:
        """Does nothing. Horovod calls it where the job has another size, or other workers."""

    def _interrupt_where_hosts_change(self) -> None:
        """Raises, on all workers, where one has been told that hosts have changed."""
        from horovod.common.exceptions import HostsUpdatedInterrupt

        told = tf.constant([float(self._hosts_changed.is_set())])
        with lost_collectives_as_internal_errors():
            total = process_communicator(resolve()).all_reduce_sum(told, "syncbn/elastic/hosts")
        if total.numpy()[0]:
            self._hosts_changed.clear()  # as in `restore`
            # Always with `sync`: Horovod leaves it out where hosts are only removed, and then a
            # worker that is added at the same time waits for the others in it.
            raise HostsUpdatedInterrupt(skip_sync=False)

    def _variables(self) -> list[Any]:
        # In Keras 3 `variables` has the states of random generators too, which stay different.
        state = [one for each in self._optimizers for one in optimizer_variables(each)]
        return [*self.model.weights, *state]

    def _require_same_state(self) -> None:
        """Raises where a worker has committed another state than rank 0."""
        names = [full_name(one) for one in self._variables()]
        checksums = [f"of checksum {zlib.crc32(one.tobytes()):08x}" for one in self._committed]
        require_agreement(
            job_of(self.model).workers(),
            [self._committed_values, *checksums],
            ["its values", *names],
            "state to begin with",
        )

    def _save(self) -> None:
        self._committed_values = self._values()
        self._committed = [np.array(variable.numpy()) for variable in self._variables()]

    def _values(self) -> str:
        values = {name: getattr(self, name) for name in self._names}
        if not _is_plain(values):
            raise TypeError(
                "The values of an ElasticState must be numbers, strings, booleans, None, or lists "
                f"and dictionaries (with names) of them. Received: {values}. Convert those of "
                "NumPy and TensorFlow, by float(value) or value.tolist()."
            )
        return json.dumps(values)

    def _set_values(self, text: str) -> None:
        for name, value in json.loads(text).items():
            setattr(self, name, value)

    def _clear_accumulation(self) -> None:
        for optimizer in self._optimizers:
            accumulation = getattr(optimizer, "_syncbn_accumulation", None)
            if accumulation is not None:
                accumulation.clear()


def _is_plain(value: Any) -> bool:
    """Says whether a value comes back from JSON as it was."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
