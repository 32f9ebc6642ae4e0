"""What the synchronized layers share: the communicator, checked inputs, moving averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.autograph import unconverted
from syncbn._src.call_stack import loses_gradients, repeats_forward
from syncbn._src.communicators.base import Communicator, process_communicator
from syncbn._src.communicators.fingerprints import numbered
from syncbn._src.communicators.groups import Grouping
from syncbn._src.communicators.local import LocalCommunicator
from syncbn._src.communicators.resolution import check_communicator, resolve, supports_jit
from syncbn._src.communicators.strategy import joined_processes, outside_of_replicas
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import collective_scope
from syncbn._src.keras_compat.multi_worker_fit import mend_fit_in_scope
from syncbn._src.keras_compat.session_graphs import cond
from syncbn._src.keras_compat.statistics_layer import StatisticsLayer
from syncbn._src.keras_compat.untrained_traces import never_trains
from syncbn._src.layers.momentum import MomentumAttribute, momentum_of
from syncbn._src.layers.replica_groups import ReplicaGroups
from syncbn._src.ops.channels import normalized_axes, statistics_dtype
from syncbn._src.ops.empty_convolutions import with_checked_channels
from syncbn._src.ops.moments import expand_mask
from syncbn._src.ops.replicas import Replicas
from syncbn._src.ops.shared_traces import shared


class SynchronizedLayer(StatisticsLayer):
    """A layer that computes statistics over all replicas when it trains.

    Subclasses set `momentum`, build their statistics, call `_build_count`, and define
    `_statistics`, `_call_training` and `_call_inference`.
    """

    momentum = MomentumAttribute(or_none="the cumulative average")
    _host_supports_jit = True

    def __init__(
        self,
        momentum: Any,
        communicator: str | Communicator,
        grouping: Grouping,
        **kwargs: Any,
    ) -> None:
        self._communicator = check_communicator(communicator)
        self._groups = ReplicaGroups(grouping)
        super().__init__(**kwargs)
        self.momentum = momentum
        self.supports_masking = True
        mend_fit_in_scope()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), MomentumAttribute):
            # Keras would make a variable that it sees one of the layer's weights.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def communicator(self) -> str | Communicator:
        """The communicator that the layer was given."""
        return self._communicator

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile a training step with this layer, with the engine used now."""
        return self._host_supports_jit and supports_jit(self._communicator)

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._host_supports_jit = value

    def get_config(self) -> dict[str, Any]:
        communicator = self._communicator
        name = communicator if isinstance(communicator, str) else communicator.name
        own = {"momentum": momentum_of(self, "momentum").value(), "communicator": name}
        return {**super().get_config(), **own, **self._groups.grouping._asdict()}

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    @unconverted
    def call(
        self,
        inputs: Any,
        training: Any = None,
        mask: Any = None,
        update_moving_statistics: Any = True,
    ) -> Any:
        """Applies the layer.

        Args:
            inputs: Rank 2 at least. Integers and booleans are cast to floats. A `tf.RaggedTensor`
                must have its channels in dimensions that are not ragged.
            training: Whether to use the statistics of the batch over all replicas, and move the
                moving ones towards them, rather than use the moving ones. In that case every
                replica has to make the call, with an empty batch if need be. A call in the
                cross-replica context of a strategy is given one batch: the statistics are those of
                that batch (over Horovod and MPI of the batches of all processes), and all
                per-replica copies move alike.
            mask: Booleans, with one dimension fewer than ``inputs``: they cover all dimensions but
                the last. With still fewer they cover the leading ones. The statistics are those of
                the elements where it is true, whatever the others hold; all elements are
                normalized. With ragged inputs it is ragged too.
            update_moving_statistics: Whether a training call updates the moving statistics; a bool,
                or a tensor. False for a batch that is seen a second time. The forward pass that
                `tf.recompute_grad` repeats for the gradient does not update them anyway, unless it
                is that of a `tf.function`, whose trace is the same both times.

        Returns:
            The outputs, in the shape of ``inputs`` and the layer's compute dtype.

        Raises:
            TypeError: inputs that are not floats, integers or booleans, or are sparse.
            ValueError: a mask of more dimensions, or an axis that the inputs do not have; a ragged
                tensor with another kind of mask, with ``target_batch`` or virtual batches.
            NotImplementedError: with ``renorm``, in `tf.recompute_grad`; with gamma or beta, where
                that is inside of a vectorized loop of a graph.
            RuntimeError: in the cross-replica context of a strategy that joins several workers,
                each of which would give a batch of its own; over Horovod and MPI also for a layer
                with groups, which are groups of replicas.
            ImportError, RuntimeError: see `syncbn.resolve`.
        """
        training = keras_api.training_mode(self, training)
        if isinstance(inputs, tf.RaggedTensor):
            dense, mask = self._without_padding(inputs, mask, training is not False)
            # Not `self.call`: where a subclass has its own, that is running already.
            outputs = SynchronizedLayer.call(self, dense, training, mask, update_moving_statistics)
            return inputs.with_flat_values(
                tf.squeeze(outputs, list(range(1, inputs.ragged_rank + 1)))
            )
        inputs = self._with_known_channels(self._floating(inputs))
        if training is False:
            return self._call_inference(inputs)
        if self.trainable_weights and loses_gradients():
            raise NotImplementedError(
                "In a graph, tf.recompute_grad inside of a vectorized loop loses the gradients of "
                f"variables. Received: a training call there of {self.name}, which has "
                f"{len(self.trainable_weights)}. Use tf.map_fn, or put tf.vectorized_map inside of "
                "tf.recompute_grad."
            )
        # Read once, so that all uses of a statistic are of its value before the assignment.
        # (TensorFlow 2.21 orders a second read before the assignment, but loses that later.)
        before = {name: tf.convert_to_tensor(getattr(self, name)) for name in self._moving()}
        if tf.is_tensor(training):
            # The statistics move outside of the branches, where a session can run it as an update.
            outputs, *batch = cond(
                training,
                lambda: self._with_counts(*self._train(inputs, mask, before)),
                lambda: (self._call_inference(inputs), *self._no_batch()),
            )
        else:
            outputs, *batch = self._train(inputs, mask, before)
        self._take_up(before, batch, update_moving_statistics)
        return outputs

    def _take_up(
        self, before: Mapping[str, tf.Tensor], batch: Sequence[tf.Tensor], update: Any
    ) -> None:
        """Moves the statistics by `_move`, unless ``update``, a bool or a tensor, is false."""
        if isinstance(update, tf.Variable):
            update = tf.convert_to_tensor(update)
        if tf.is_symbolic_tensor(update):
            # Where the count is zero, nothing moves; but zero times a NaN of the batch is one.
            moves = tf.cast(update, tf.bool)
            batch = [tf.where(moves, one, tf.zeros_like(one)) for one in batch]
        elif not update:
            return
        if not repeats_forward():
            self._move(before, *batch)
        elif self._uses_moving_statistics():
            raise NotImplementedError(
                f"tf.recompute_grad repeats a call of {self.name}, whose outputs depend on "
                "statistics that the first call has moved. Received: renorm=True. Call it with "
                "update_moving_statistics=False there, or leave out one of the two."
            )

    def _without_padding(
        self, inputs: tf.RaggedTensor, mask: Any, trains: bool
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns the elements of a ragged tensor and of its mask, dense, with the same axes.

        All are in the first dimension; those that were ragged have size one.
        """
        ragged = inputs.ragged_rank
        masked = trains and mask is not None
        shape = inputs.shape if inputs.shape.rank else [None] * self.input_spec.ndim
        behind = min(normalized_axes(self.axis, list(shape))) > ragged
        if (
            not behind
            or (masked and getattr(mask, "ragged_rank", None) != ragged)
            or (trains and self._counts_samples())
        ):
            raise ValueError(
                f"{type(self).__name__} takes a ragged tensor if the channels are behind its "
                "ragged dimensions, a mask is ragged as well, and neither virtual_batch_size nor "
                f"target_batch is given. Received: axis={self.axis} for input shape "
                f"{tuple(shape)}, and a mask of type {type(mask).__name__}. Pass a dense "
                "tensor and its mask: layer(x.to_tensor(), mask=tf.sequence_mask(x.row_lengths()))."
            )
        at = (slice(None), *[tf.newaxis] * ragged)
        return inputs.flat_values[at], mask.flat_values[at] if masked else None

    def _counts_samples(self) -> bool:
        """Says whether results depend on which elements are of the same sample."""
        return self._groups.grouping.target_batch is not None

    def _uses_moving_statistics(self) -> bool:
        """Says whether the outputs in training depend on statistics that the call updates."""
        return False

    def _floating(self, inputs: Any) -> tf.Tensor:
        """Returns a tensor of floats: integers and booleans in the dtype of their statistics."""
        if isinstance(inputs, tf.SparseTensor):
            raise TypeError(
                f"{type(self).__name__} needs dense inputs, since its outputs are dense. Received: "
                "a SparseTensor. Use tf.sparse.to_dense(x)."
            )
        inputs = tf.convert_to_tensor(inputs)  # arrays, where Keras has not been asked to call
        if inputs.dtype.is_floating:
            return inputs
        if not (inputs.dtype.is_integer or inputs.dtype.is_bool):
            raise TypeError(
                f"{type(self).__name__} needs inputs that are floats, integers or booleans. "
                f"Received: dtype {inputs.dtype.name}. Cast them, with tf.cast(x, tf.float32)."
            )
        # Not to 16 bits, as Keras casts the outputs: that rounds integers from 257 on.
        return tf.cast(inputs, statistics_dtype(tf.as_dtype(self.compute_dtype)))

    def _wide_enough(self, inputs: tf.Tensor) -> tf.Tensor:
        """Casts floats that could not hold the outputs, which have the inputs' dtype until the end.

        Keras casts inputs to the compute dtype, but for a layer with ``autocast=False``.
        """
        compute = tf.as_dtype(self.compute_dtype)
        wide = statistics_dtype(compute)
        enough = inputs.dtype == compute or inputs.dtype.size >= wide.size
        return inputs if enough else tf.cast(inputs, wide)

    def _with_known_channels(self, inputs: tf.Tensor) -> tf.Tensor:
        """Sets the static rank and channels to those that the layer was built for.

        In a trace, both may be unknown.
        """
        rank = self.input_spec.ndim
        shape = [None] * rank if inputs.shape.rank is None else inputs.shape.as_list()
        known = {axis % len(shape): size for axis, size in self.input_spec.axes.items()}
        if all(shape[axis] is not None for axis in known):
            return inputs
        return tf.ensure_shape(inputs, [known.get(axis, size) for axis, size in enumerate(shape)])

    def _train(
        self, inputs: tf.Tensor, mask: Any, before: Mapping[str, tf.Tensor]
    ) -> tuple[tf.Tensor, ...]:
        """Returns the outputs, and the batch's arguments for `_move`."""
        axes = normalized_axes(self.axis, inputs.shape.as_list())
        inputs = self._wide_enough(with_checked_channels(inputs, axes))
        if mask is not None:
            mask = expand_mask(mask, inputs)
        replicas = self._replicas(inputs.shape[0])
        outputs, count, *targets = self._call_training(inputs, axes, mask, replicas, before)
        shape = before[self._statistics()[0]].shape
        if count.shape == [shape.num_elements()]:
            count = _shaped(count, shape)
        targets = [_shaped(target, shape) for target in targets]
        return tf.cast(outputs, self.compute_dtype), count, *targets

    def _with_counts(self, outputs: tf.Tensor, count: tf.Tensor, *targets: tf.Tensor) -> tuple:
        """Gives the count the shape of `_no_batch`, which branches must have in common."""
        return outputs, tf.broadcast_to(count, targets[0].shape), *targets

    def _no_batch(self) -> list[tf.Tensor]:
        """Returns arguments with which `_move` changes nothing."""
        names = self._statistics()
        return [tf.zeros(getattr(self, names[0]).shape, tf.float64)] * (1 + len(names))

    def _statistics(self) -> tuple[str, ...]:
        """Returns the names of the statistics that move towards a batch's, all of one shape."""
        raise NotImplementedError

    def _moving(self) -> tuple[str, ...]:
        """Returns the names of all weights that a training call reads and updates."""
        return (
            (*self._statistics(), "moving_count") if self.momentum is None else self._statistics()
        )

    def _call_training(
        self,
        inputs: tf.Tensor,
        axes: tuple[int, ...],
        mask: tf.Tensor | None,
        replicas: Replicas,
        before: Mapping[str, tf.Tensor],
    ) -> tuple[tf.Tensor, ...]:
        """Returns the outputs, the batch's count, and its value for each of the statistics."""
        raise NotImplementedError

    def _call_inference(self, inputs: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError

    def _replicas(self, batch: int | None) -> Replicas:
        # Looked up at each call: the layer may be tried out eagerly before it is trained under a
        # strategy. The lookup costs microseconds, and a graph pays them once.
        if never_trains():
            communicator: Communicator = LocalCommunicator()
        else:
            _require_replicas_in_step()
            communicator = resolve(self._communicator)
            if tf.distribute.in_cross_replica_context():
                communicator = self._given_once(communicator)
        return self._groups.replicas(communicator, batch, numbered(collective_scope(self)))

    def _given_once(self, communicator: Communicator) -> Communicator:
        """Returns the communicator for a call in a cross-replica context, one batch per process.

        All per-replica copies of the moving statistics then move alike.

        Raises:
            RuntimeError: no communicator can serve such a call.
        """
        if joined_processes() > 1:
            # Each worker would give its own batch, and tf.distribute sums in replica contexts only.
            raise outside_of_replicas(
                "A synchronized layer must be called in a replica context when training with "
                "several workers of tf.distribute."
            )
        if communicator.name == "tf.distribute":
            return LocalCommunicator()
        once = process_communicator(communicator)
        if once is not communicator and self._groups.grouping.is_given():
            raise outside_of_replicas(
                "Groups consist of replicas, so a layer with groups must be called in a replica "
                "context when training in several processes."
            )
        return once

    def _check_input_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape as a tuple; raises what `call` would for inputs of that shape."""
        given = tf.TensorShape(input_shape)
        if given.rank is None or given.rank < 2:
            raise ValueError(
                f"{type(self).__name__} needs inputs of rank 2 at least: a batch and channels. "
                f"Received: input shape {given}. Where a trace cannot know the rank, build the "
                "layer first, with layer.build(shape)."
            )
        shape = tuple(given.as_list())
        normalized_axes(self.axis, shape)
        return shape

    def _build_count(self, shape: Any) -> None:
        """Creates the cumulative average's weight: the number of elements seen per channel."""
        if self.momentum is None:
            # float64: in float32 a sum stops growing at ten million batches of a few elements.
            self.moving_count = self.add_statistic("moving_count", shape, "zeros", "float64")

    def _move(
        self, before: Mapping[str, tf.Tensor], count: tf.Tensor, *targets: tf.Tensor
    ) -> list[tf.Tensor]:
        """Moves the statistics towards those of a batch of ``count`` elements per channel.

        All arguments have the statistics' shape, or the count is one for all channels. The targets
        are float64. Where the count is zero, nothing moves. Returns the statistics' new values.
        """
        if self.momentum is None:
            total = before["moving_count"] + count
            rate = tf.math.divide_no_nan(count, total)
            self.update_statistic(self.moving_count, total)
        else:
            rate = momentum_of(self, "momentum").rate()
        return self._move_towards(before, self._statistics(), targets, count, rate)

    def _move_towards(
        self,
        before: Mapping[str, tf.Tensor],
        names: Sequence[str],
        targets: Sequence[tf.Tensor],
        count: tf.Tensor,
        rate: tf.Tensor,
    ) -> list[tf.Tensor]:
        moved = _moved(count, rate, *(before[name] for name in names), *targets)
        for name, value in zip(names, moved, strict=True):
            self.update_statistic(getattr(self, name), value)
        return moved


@shared
def _moved(count: tf.Tensor, rate: tf.Tensor, *averages_and_targets: tf.Tensor) -> list[tf.Tensor]:
    """Returns the averages, moved by ``rate`` towards as many targets, which are float64.

    Where ``count`` is zero, they stay.
    """
    half = len(averages_and_targets) // 2
    averages, targets = averages_and_targets[:half], averages_and_targets[half:]
    moved = tf.where(count > 0, rate, 0.0)
    kept = 1.0 - moved
    # Two shares, not the average plus a part of the difference: beside an average of 1 that would
    # round a variance of 1e-8 away. In float64, since in float32 they do not add up to one.
    return [
        tf.cast(kept * tf.cast(average, tf.float64) + moved * target, average.dtype)
        for average, target in zip(averages, targets, strict=True)
    ]


def _shaped(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    return tensor if tensor.shape == shape else tf.reshape(tensor, shape)


def _require_replicas_in_step() -> None:
    """Raises where a training call cannot be synchronized, whatever the engine."""
    asynchronous = (
        tf.distribute.experimental.ParameterServerStrategy,
        tf.compat.v1.distribute.experimental.ParameterServerStrategy,
    )
    if isinstance(tf.distribute.get_strategy(), asynchronous):
        raise RuntimeError(
            "Statistics can be synchronized only over replicas that run in step. Received: a "
            "training call under ParameterServerStrategy, whose workers are asynchronous. Use "
            "MirroredStrategy or MultiWorkerMirroredStrategy, or plain BatchNormalization."
        )
