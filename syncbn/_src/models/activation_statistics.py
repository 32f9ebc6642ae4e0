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
    """

    def __init__(self, model: Any, layers: Mapping[str, Any], *, all_fixed: bool = False) -> None:
        self._model, self._layers, self._all_fixed = model, layers, all_fixed
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

        That is count, mean and (biased) variance, float64 ``(3, channels)``.
        """
        sizes = {name: int(tf.size(given[0])) for name, given in self._given.items()}
        return {name: tf.zeros([3, size], tf.float64) for name, size in sizes.items()}

    def __call__(self, batch: Any, seen: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns what the layers have seen after one more batch; ``seen`` for those fixed.

        Args:
            batch: As a dataset gives it: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``, or what
                a custom ``predict_step`` takes.
            seen: What the layers have seen before.

        Raises:
            NotImplementedError: a layer is called in a loop or branch of the model's graph.
        """
        if not self._has_own_step:  # the rest may be anything
            batch, _, _ = keras_api.keras.utils.unpack_x_y_sample_weight(batch)
        elif isinstance(batch, list):
            batch = tuple(batch)
        data = tf.nest.map_structure(_to_tensor, batch)
        return self._function(data, self._fixed, self._given, seen)

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
                seen[name] = _merged(seen[name], _moments(self._layers[name], inputs, mask))
                return list(given[name])

            def of_batch() -> tuple[tf.Tensor, list[tf.Tensor]]:
                batch = _moments(self._layers[name], inputs, mask)
                pairs = zip(tf.unstack(batch)[1:], given[name], strict=False)
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


def _moments(layer: Any, inputs: tf.Tensor, mask: Any) -> tf.Tensor:
    """Returns count, mean and variance, float64 ``(3, channels)``."""
    # Not from `axis`, which tf_keras shifts for virtual batches.
    axes = tuple(sorted(axis % inputs.shape.rank for axis in layer.input_spec.axes))
    mask = None if mask is None else expand_mask(mask, inputs)
    count, mean, variance = exact_moments(inputs, axes, mask)
    return tf.stack([tf.broadcast_to(count, tf.shape(mean)), mean, variance])


def _merged(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Merges `_moments` of two batches; the formula is that of Chan, Golub & LeVeque (1983)."""
    (count, mean, variance), (count_b, mean_b, variance_b) = tf.unstack(a), tf.unstack(b)
    share = tf.math.divide_no_nan(count_b, count + count_b)
    step = mean_b - mean
    between = (1.0 - share) * tf.square(step)
    variance += share * (variance_b - variance + between)
    return tf.stack([count + count_b, mean + share * step, variance])
