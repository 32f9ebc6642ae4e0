"""The statistics of what the normalizations of a model see in a dataset."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from syncbn._src.autograph import unconverted
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.untrained_traces import never_trains
from syncbn._src.models.statistics import MovingStatistics
from syncbn._src.ops.moments import exact_moments, expand_mask

_NAMES = ("moving_mean", "moving_variance")


class Observer:
    """Runs a model in inference, and observes what its normalizations see.

    A model runs as in `Model.predict`: a custom ``predict_step`` gets the batch, and a model that
    was compiled with ``run_eagerly`` runs eagerly.

    Until the statistics of a normalization are fixed, it normalizes with those of the batch. Then
    it is no longer observed, unless all are fixed from the start. No variable of the model is
    assigned to; all other changes last only while a graph is traced.

    Args:
        model: The model to run.
        layers: Its normalizations, by name.
        all_fixed: Whether all statistics are fixed, and all layers observed.
        replicas: Where given, a batch is that of so many replicas, one after the other, and what
            each of them sees is told apart; all are normalized with the statistics of all.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Any],
        *,
        all_fixed: bool = False,
        replicas: int | None = None,
    ) -> None:
        self._model, self._layers = model, layers
        self._all_fixed, self._replicas = all_fixed, replicas
        self._has_own_step = _has_own_predict_step(model)
        eager = getattr(model, "run_eagerly", False)
        self._function = self._run if eager else tf.function(self._run, reduce_retracing=True)
        self.order: dict[str, int] = {}
        """The positions of the layers by their first call, from 1; empty before the first batch."""

    def start(self, statistics: Mapping[str, MovingStatistics]) -> None:
        """Gives the layers their moving statistics, by name. Those of frozen layers are fixed."""
        self._given = {
            name: [tf.constant(value) for value in one[:2] if value is not None]
            for name, one in statistics.items()
        }
        self._fixed = {
            name: tf.constant(not layer.trainable) for name, layer in self._layers.items()
        }

    def fix(self, name: str, statistics: MovingStatistics) -> None:
        """Gives a layer the statistics to normalize with from now on."""
        # In the dtype in which the layer will have them.
        pairs = zip(statistics, self._given[name], strict=False)
        self._given[name] = [tf.constant(value, old.dtype) for value, old in pairs]
        self._fixed[name] = tf.constant(True)

    def nothing(self) -> dict[str, tf.Tensor]:
        """Returns what the layers have seen before the first batch.

        That is count, mean and (biased) variance, float64 ``(3, channels)``, or ``(3, replicas,
        channels)``.
        """
        sizes = {name: int(tf.size(given[0])) for name, given in self._given.items()}
        replicas = [] if self._replicas is None else [self._replicas]
        return {name: tf.zeros([3, *replicas, size], tf.float64) for name, size in sizes.items()}

    def __call__(self, batch: Any, seen: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns what the layers have seen after one more batch; ``seen`` for those fixed.

        Args:
            batch: As a dataset gives it: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``, or what
                a custom ``predict_step`` takes.
            seen: What the layers have seen before.

        Raises:
            NotImplementedError: a layer is called in a loop or branch of the model's graph.
            ValueError: the batch is a single sample.
            ValueError, tf.errors.InvalidArgumentError: what a layer sees cannot be shared among
                the replicas.
        """
        return self.observe(self.inputs(batch), seen)

    def observe(self, inputs: Any, seen: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Does the same for what `inputs` returns."""
        data = tf.nest.map_structure(_to_tensor, inputs)
        return self._function(data, self._fixed, self._given, seen)

    def inputs(self, batch: Any) -> Any:
        """Returns the part of a batch that the model takes; the rest may be anything.

        Raises:
            ValueError: the batch is a single sample.
        """
        if self._has_own_step:
            return tuple(batch) if isinstance(batch, list) else batch
        inputs = keras_api.keras.utils.unpack_x_y_sample_weight(batch)[0]
        inputs = tf.nest.map_structure(_to_tensor, inputs)
        _require_batch(self._model, inputs)
        return inputs

    def _run(
        self, data: Any, fixed: dict[str, Any], given: dict[str, Any], seen: dict[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        with self._observing(fixed, given, seen) as now_seen:
            if self._has_own_step:
                self._model.predict_step(data)
            else:
                self._model(data, training=False)
        return now_seen

    @contextlib.contextmanager
    def _observing(
        self, fixed: dict[str, Any], given: dict[str, Any], seen: dict[str, tf.Tensor]
    ) -> Iterator[dict[str, tf.Tensor]]:
        """Intercepts the layers; what it yields is updated at each of their calls."""
        graph, seen = tf.compat.v1.get_default_graph(), dict(seen)

        def statistics(name: str, inputs: tf.Tensor, mask: Any) -> list[tf.Tensor]:
            if tf.compat.v1.get_default_graph() is not graph:
                raise NotImplementedError(
                    "A normalization cannot be observed in a loop or branch of the graph. "
                    f"Received: a call of {name} in one, as in tf.while_loop, tf.cond or "
                    "tf.vectorized_map (keras.layers.TimeDistributed, where the time is unknown)."
                )
            self.order.setdefault(name, len(self.order) + 1)

            if self._all_fixed:
                batch = _moments(self._layers[name], inputs, mask, self._replicas)
                seen[name] = _merged(seen[name], batch)
                return list(given[name])

            def of_batch() -> tuple[tf.Tensor, list[tf.Tensor]]:
                batch = _moments(self._layers[name], inputs, mask, self._replicas)
                pooled = batch if self._replicas is None else _pooled(batch)
                pairs = zip(tf.unstack(pooled)[1:], given[name], strict=False)
                values = [tf.reshape(tf.cast(new, old.dtype), old.shape) for new, old in pairs]
                return _merged(seen[name], batch), values

            seen[name], values = tf.cond(
                fixed[name], lambda: (seen[name], list(given[name])), of_batch
            )
            return values

        with contextlib.ExitStack() as borrowed:
            borrowed.enter_context(_inlining_functions())
            for name, layer in self._layers.items():
                call = _intercepted(layer, functools.partial(statistics, name))
                borrowed.enter_context(_replaced(layer, call=call))
            yield seen


def _require_batch(model: Any, data: Any) -> None:
    """Raises where a model that knows the shapes of its inputs gets one sample, and no batch.

    Raises:
        ValueError: so it is.
    """
    inputs = [tf.TensorShape(one.shape) for one in getattr(model, "inputs", None) or ()]
    given = [tensor.shape for tensor in tf.nest.flatten(data)]
    if not inputs or len(inputs) != len(given):
        return
    if all(
        whole.rank and one.rank == whole.rank - 1 and one.is_compatible_with(whole[1:])
        for one, whole in zip(given, inputs, strict=True)
    ):
        raise ValueError(
            "`dataset` must consist of batches. Received: single samples, of shape "
            f"{', '.join(map(str, given))}, for inputs of shape {', '.join(map(str, inputs))}. "
            "Give dataset.batch(32)."
        )


def _has_own_predict_step(model: Any) -> bool:
    base = keras_api.keras.Model
    if not isinstance(model, base):
        return False
    return getattr(model.predict_step, "__func__", None) is not base.predict_step


def _to_tensor(value: Any) -> Any:
    return value if value is None or tf.is_tensor(value) else tf.constant(value)


def _intercepted(
    layer: Any, statistics: Callable[[tf.Tensor, Any], list[tf.Tensor]]
) -> Callable[..., Any]:
    """Returns the layer's `call`, always in inference mode, with other moving statistics."""
    original = layer.call

    @unconverted
    def call(inputs: tf.Tensor, training: Any = None, mask: Any = None, **options: Any) -> Any:
        if mask is not None:
            options["mask"] = mask
        if never_trains():
            return original(inputs, training=training, **options)
        values = dict(zip(_NAMES, statistics(inputs, mask), strict=False))
        with _replaced(layer, **values):
            return original(inputs, training=False, **options)

    return call


@contextlib.contextmanager
def _replaced(layer: Any, **attributes: Any) -> Iterator[None]:
    """Temporarily replaces attributes of a layer."""
    # Not by `setattr`, with which Keras would track them.
    own = vars(layer)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


@contextlib.contextmanager
def _inlining_functions() -> Iterator[None]:
    """Makes every `tf.function` run its Python code, inlined in the graph that is being traced.

    One that was traced before would not run the layers' replaced `call`, and one that is traced now
    would keep it.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _moments(layer: Any, inputs: tf.Tensor, mask: Any, replicas: int | None) -> tf.Tensor:
    """Returns count, mean, variance, float64 ``(3, channels)`` or ``(3, replicas, channels)``."""
    # Not from `axis`, which tf_keras shifts for virtual batches.
    axes = tuple(sorted(axis % inputs.shape.rank for axis in layer.input_spec.axes))
    mask = None if mask is None else expand_mask(mask, inputs)
    if replicas is None:
        count, mean, variance = exact_moments(inputs, axes, mask)
        return tf.stack([tf.broadcast_to(count, tf.shape(mean)), mean, variance])
    # As another axis of channels, so that all are computed at once.
    inputs = _of_replicas(inputs, replicas, layer.name)
    mask = None if mask is None else _of_replicas(mask, replicas, layer.name)
    count, mean, variance = exact_moments(inputs, (0, *(axis + 1 for axis in axes)), mask)
    return tf.reshape(
        tf.stack([tf.broadcast_to(count, tf.shape(mean)), mean, variance]), [3, replicas, -1]
    )


def _of_replicas(batch: tf.Tensor, replicas: int, name: str) -> tf.Tensor:
    """Returns ``(replicas, rows, ...)`` of ``(replicas * rows, ...)``."""
    error = (
        f"What {name} sees cannot be shared among {replicas} replicas: its first dimension is no "
        "multiple of that, as the first dimension of the model's inputs is."
    )
    shape = tf.shape(batch)
    if batch.shape[0] is not None:
        if batch.shape[0] % replicas:
            raise ValueError(f"{error} Received: {batch.shape[0]}.")
        known = []
    else:
        known = [tf.debugging.assert_equal(shape[0] % replicas, 0, error)]
    with tf.control_dependencies(known):
        split = tf.concat([[replicas, shape[0] // replicas], shape[1:]], 0)
    return tf.ensure_shape(tf.reshape(batch, split), [replicas, None, *batch.shape[1:]])


def _pooled(moments: tf.Tensor) -> tf.Tensor:
    """Returns the moments ``(3, channels)`` of all replicas together."""
    count, mean, variance = tf.unstack(moments)
    total = tf.reduce_sum(count, 0)

    def average(value: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(tf.reduce_sum(count * value, 0), total)

    together = average(mean)
    return tf.stack([total, together, average(variance + tf.square(mean - together))])


def _merged(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Merges `_moments` of two batches; the formula is that of Chan, Golub & LeVeque (1983)."""
    (count, mean, variance), (count_b, mean_b, variance_b) = tf.unstack(a), tf.unstack(b)
    share = tf.math.divide_no_nan(count_b, count + count_b)
    step = mean_b - mean
    between = (1.0 - share) * tf.square(step)
    variance += share * (variance_b - variance + between)
    return tf.stack([count + count_b, mean + share * step, variance])
