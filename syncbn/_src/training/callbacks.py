"""Callbacks for `Model.fit` in jobs of several processes, over Horovod or MPI."""

from __future__ import annotations

from typing import Any

import numpy as np

from syncbn._src.communicators.base import Communicator, joins_by_messages, process_communicator
from syncbn._src.communicators.host_collectives import all_gather, require_agreement
from syncbn._src.communicators.resolution import check_communicator, resolve
from syncbn._src.communicators.strategy import local_replicas
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import named_layers
from syncbn._src.keras_compat.optimizer_state import (
    create_optimizer_state,
    has_state,
    optimizer_variables,
)
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.training.joint_history import train_jointly
from syncbn._src.training.joint_metrics import MetricsBeforeReset, joint_logs, joint_results
from syncbn._src.training.kept_local import shared_variables
from syncbn._src.training.model_optimizers import optimizers_of
from syncbn._src.training.optimizer import require_averages_of_scaled
from syncbn._src.training.variable_broadcast import broadcast


class WorkerCallback(keras_api.keras.callbacks.Callback):
    """A callback that communicates with the other workers."""

    def __init__(self, communicator: str | Communicator = "auto") -> None:
        super().__init__()
        self._communicator = check_communicator(communicator)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Is there so that Keras calls callbacks one after the other, in this thread."""

    def _resolve(self) -> Communicator:
        # A model that was created under a strategy is trained under it, wherever `fit` is called.
        with self.model.distribute_strategy.scope():
            return process_communicator(resolve(self._communicator))


class BroadcastVariables(WorkerCallback):
    """Starts the training of all workers from the variables of one of them.

    Weights, moving statistics and the optimizer's state are those of worker ``root`` from the first
    step on: initial ones, or those that it has loaded from a checkpoint. Variables that do not
    exist before the first batch on any worker, as in a model or an optimizer that is not built,
    follow after that batch. Other optimizers that are attributes of the model belong to it too.
    Under tf.distribute it does nothing, as variables are created equal there; where each process of
    a job has a strategy, all per-replica copies of all processes get the values.

    Variables that the optimizer keeps local (see `distribute`) are left unchanged, as is the
    optimizer's state for them.

    What starts equal stays equal where gradients are averaged. So the weights that are trained are
    compared, bit for bit, after the first two batches and at the end of each epoch, however the
    gradients were averaged. At the end of an epoch the workers stop if one of them would (over MPI
    after each batch), and compare their learning rates.

    Args:
        root: The rank of the worker that has the values.
        communicator: As for `syncbn.SyncBatchNormalization`.
        same_weights: Whether weights are compared. False where workers are meant to differ within
            an epoch.

    Raises:
        ValueError: when training begins: workers have different models, or numbers of replicas, or
            begin at different epochs, or ``root`` is not a rank; or an optimizer other than
            ``model.optimizer`` is built on some workers only. Or there are local variables, and the
            optimizer was loaded and has not been told them again, or has state that cannot be
            attributed to variables.
        RuntimeError: when training begins: Keras has wrapped a distributed optimizer in one that
            scales the loss (see `distribute`), or the optimizer is Horovod's own, which averages
            nothing under Keras 3. In training: workers have other weights, or learning rates, than
            others.

    Example:
        >>> start_equal = syncbn.training.BroadcastVariables()
        >>> history = model.fit(x, y, callbacks=[start_equal], verbose=0)
    """

    def __init__(
        self,
        root: int = 0,
        communicator: str | Communicator = "auto",
        *,
        same_weights: bool = True,
    ) -> None:
        super().__init__(communicator)
        self.root = root
        self.same_weights = same_weights

    def on_train_begin(self, logs: Any = None) -> None:
        communicator = self._resolve()
        self._optimizers = optimizers_of(self.model, self.model.optimizer)
        for optimizer in self._optimizers.values():
            require_averages_of_scaled(optimizer)
            horovods = type(optimizer).__module__.partition(".")[0] == "horovod"
            if keras_api.KERAS_3 and horovods and communicator.size > 1:
                raise RuntimeError(
                    "Gradients must be averaged over the workers. Received: Horovod's "
                    "DistributedOptimizer, which averages nothing under Keras 3. Use "
                    "compile(syncbn.training.distribute(optimizer)), with the optimizer itself."
                )
        self._require_same_layers(communicator)
        train_jointly(self.model, communicator, self.same_weights)
        state = self._share_what_is_built(communicator)
        self._pending = not state
        self._broadcast(communicator, weights=self.model.built, state=state)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._pending:
            # The weights too: the first step was made with other states of the optimizer.
            self._broadcast(self._resolve(), weights=True, state=True)
            self._pending = False

    def _require_same_layers(self, communicator: Communicator) -> None:
        """Raises where workers would wait for layers that others do not have."""
        if not joins_by_messages(communicator):
            return
        layers = {
            f"{self.model.name}/{path}": layer
            for path, layer in named_layers(self.model).items()
            if isinstance(layer, SynchronizedLayer)
        }
        names = list(layers)
        # By its names, too, are the calls of a layer that trains matched or compared.
        descriptions = [
            f"{type(layer).__name__} {name if layer.trainable else 'that is frozen'}"
            for name, layer in layers.items()
        ]
        with self.model.distribute_strategy.scope():
            descriptions.append(f"{local_replicas()} replicas")
        descriptions.append(f"optimizers: {', '.join(self._optimizers)}")
        names += ["of a process", "of the model"]
        remedy = (
            "Where only the number in a name differs, since others were made before on a worker, "
            "give the model and the layers names, or call tf.keras.backend.clear_session() before "
            "the model is built."
        )
        require_agreement(
            communicator, descriptions, names, "synchronized layers", self.root, remedy
        )

    def _share_what_is_built(self, communicator: Communicator) -> bool:
        """Builds the model's optimizer if it is built on a worker; says whether all are on all."""
        if not joins_by_messages(communicator):
            return True
        # One worker may have loaded a model, with the state of its optimizer.
        own = [self.model.built, *map(has_state, self._optimizers.values())]
        rows = all_gather(communicator, np.array(own, np.float64), "syncbn/fit/built") != 0
        models, built = rows[:, 0], rows[:, 1:].T
        for (name, optimizer), on in zip(self._optimizers.items(), built, strict=True):
            if on.all() or not on.any() or not models.all():
                continue
            if name != "optimizer":
                raise ValueError(
                    "Each optimizer of a model must be built on all workers, or on none. Received: "
                    f"{name}, built on rank {', '.join(map(str, np.flatnonzero(on)))} only. Build "
                    f"it on all before training: model.{name}.build(variables)."
                )
            with self.model.distribute_strategy.scope():
                create_optimizer_state(optimizer, self.model.trainable_variables)
            on[:] = True
        return bool(rows.all())

    def _broadcast(self, communicator: Communicator, weights: bool, state: bool) -> None:
        if communicator.name == "tf.distribute":
            return  # and outside of the strategy's scope it has no replicas
        # In Keras 3 `variables` has the states of random generators too, which stay different.
        optimizers, variables = self._optimizers.values(), []
        if weights:
            variables += self.model.weights
        if state:
            variables += [one for each in optimizers for one in optimizer_variables(each)]
        broadcast(shared_variables(variables, optimizers), self.root, communicator)


class AverageMetrics(WorkerCallback):
    """Reports the metrics of all workers together, at the end of each epoch.

    The sums and counts that make up a metric are summed over the workers, so that every sample has
    the same weight, and metrics that are not means (AUC, say) are right too. What ``train_step``
    logs besides metrics is averaged. Put it before the callbacks that read the logs, such as
    `EarlyStopping`. Either all workers validate or none does. It is for `fit`; outside of it,
    `syncbn.training.evaluate` does the same. Under tf.distribute it does nothing, as Keras does
    this there; where each process of a job has a strategy, it sums over the processes. As with
    `BroadcastVariables`, workers stop together and compare their learning rates.

    Args:
        communicator: As for `syncbn.SyncBatchNormalization`.

    Raises:
        ValueError, TypeError: no such communicator. When training begins: workers begin at
            different epochs.
        RuntimeError: in training: workers have other learning rates than others; and see
            `syncbn.resolve`.

    Example:
        >>> callbacks = [syncbn.training.BroadcastVariables(), syncbn.training.AverageMetrics()]
        >>> history = model.fit(x, y, callbacks=callbacks, verbose=0)
    """

    def __init__(self, communicator: str | Communicator = "auto") -> None:
        super().__init__(communicator)
        self._training: dict[str, Any] | None = None
        self._validation: dict[str, Any] = {}
        self._before_reset: MetricsBeforeReset | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        communicator = self._resolve()
        train_jointly(self.model, communicator, same_weights=False)
        if joins_by_messages(communicator):
            self._before_reset = MetricsBeforeReset(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._training, self._validation = None, {}
        self._forget()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._forget()

    def on_test_begin(self, logs: Any = None) -> None:
        # Validation resets the metrics: what they have accumulated in training is read before.
        self._training = self._totals(self._kept())

    def on_test_end(self, logs: Any = None) -> None:
        self._validation = {f"val_{name}": value for name, value in self._totals().items()}

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        communicator = self._resolve()
        if logs is None or not joins_by_messages(communicator):
            return
        # A callback before this one may have evaluated, which resets the metrics too.
        training = self._totals(self._kept()) if self._training is None else self._training
        logs.update(joint_logs(communicator, logs, {**training, **self._validation}))
        # A worker without validation data has none of these, and callbacks act on them.
        logs.update(self._validation)

    def on_train_end(self, logs: Any = None) -> None:
        if self._before_reset is not None:
            self._before_reset.end()
            self._before_reset = None

    def _totals(self, own: list[np.ndarray] | None = None) -> dict[str, Any]:
        """Returns the values of the model's metrics over all workers."""
        communicator = self._resolve()
        return (
            joint_results(self.model, communicator, own) if joins_by_messages(communicator) else {}
        )

    def _kept(self) -> list[np.ndarray] | None:
        return None if self._before_reset is None else self._before_reset.values

    def _forget(self) -> None:
        if self._before_reset is not None:
            self._before_reset.values = None
