"""The check: a model on several replicas, and on one, side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import model_and_layers
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.models.equivalence import diagnosis
from syncbn._src.models.equivalence.batch import as_arrays, number_of_samples, shares
from syncbn._src.models.equivalence.batch_replicas import BatchReplicas, comparison_replicas
from syncbn._src.models.equivalence.differences import Row, table
from syncbn._src.models.equivalence.measurements import Comparison, Names, random_projections
from syncbn._src.training.variable_broadcast import broadcast

_TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """What `check_equivalence` has found. As text it is a table, and the advice.

    Example:
        >>> def build_model():
        ...     plain = tf.keras.layers.BatchNormalization()
        ...     return tf.keras.Sequential([tf.keras.Input((4,)), plain])
        >>> found = syncbn.check_equivalence(build_model, x)
        >>> print(str(found).splitlines()[0])
        On 2 replicas the model does not do what it does on one.
    """

    replicas: int
    rows: list[Row]
    """How far each array of each quantity is from that on one replica, and whether that is within
    the tolerance."""
    advice: list[str]
    """What is probably wrong, and what was not checked."""

    @property
    def equivalent(self) -> bool:
        """Whether all rows are within their tolerance."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        verdict = "does" if self.equivalent else "does not do"
        head = f"On {self.replicas} replicas the model {verdict} what it does on one."
        return "\n".join(
            [head, "", table(self.rows), "", *(f"- {a}" for a in self.advice)]
        ).rstrip()


def check_equivalence(
    build_model: Callable[[], Any],
    batch: Any,
    replicas: int = 2,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    split: Sequence[int] | None = None,
    rtol: float | None = None,
) -> Equivalence:
    """Trains a model on several replicas, and on one with the whole batch, and compares.

    Compared are the outputs in training, the gradients of the inputs and of the parameters, and the
    change of the moving statistics; of a compiled model also the gradients that its `train_step`
    applies, with its loss and optimizer. So this finds layers that are not synchronized, losses
    that are scaled wrongly, and gradients that are summed twice.

    The replicas are GPUs, if there are enough, or logical devices of the CPU, under
    `tf.distribute.MirroredStrategy`. In a job of Horovod or MPI they are its workers, one each; all
    of them make the call, with the same batch. There the whole batch, too, goes through the
    `train_step` that averages over the workers, so an error that it makes on all of them alike is
    not found.

    The check builds models of its own, and leaves other models unchanged. No seed is set.

    Args:
        build_model: Returns a new `tf.keras.Model` at each call, compiled or not. Its initial
            weights may be random: those of the first are copied.
        batch: The inputs ``x``, or a tuple ``(x, y)`` or ``(x, y, sample_weight)``, as for `fit`:
            arrays, or lists, tuples and dictionaries of them, with the samples of all replicas.
        replicas: The number of replicas, 2 at least.
        loss: A function of ``y`` and the outputs, for all but `train_step`. A loss for each sample
            is averaged over the whole batch. A scalar is taken for a replica's share: those of all
            replicas are summed, as tf.distribute does. By default a fixed random projection of the
            outputs, which needs no ``y``.
        split: The number of samples for each replica, possibly zero. By default all get the same
            number. `train_step` is not checked with unequal ones, since losses of Keras give
            replicas, not samples, equal weights.
        rtol: The tolerance for an array, relative to its largest element (of gradients: that of all
            of them; of moving statistics: that of their change). By default as the dtype of the
            model's layers allows: 1e-8, 1e-4, 0.02 and 0.1 for float64, float32, float16 and
            bfloat16. Deep networks can amplify rounding beyond that; float64 shows whether it is
            rounding.

    Returns:
        What differs, and advice. A model with dropout, or other randomness, is reported as such and
        not compared.

    Raises:
        TypeError: ``build_model`` is not a function that returns a `tf.keras.Model`; ``batch`` is a
            dataset.
        ValueError: fewer than two replicas; a negative ``rtol``; a batch without samples, of parts
            of different lengths, or that ``replicas`` does not divide; a ``split`` that does not
            fit the batch; models, or batches of workers, that differ; a `train_step` that changes
            nothing.
        RuntimeError: TensorFlow has started with fewer devices, or this is called in the scope of a
            strategy.

    Example:
        >>> def build_model():
        ...     return tf.keras.Sequential([tf.keras.Input((4,)), syncbn.SyncBatchNormalization()])
        >>> syncbn.check_equivalence(build_model, x).equivalent
        True
    """
    # A model can be called, too.
    if not callable(build_model) or isinstance(build_model, keras_api.keras.Model):
        raise TypeError(
            "`build_model` must be a function that returns a new model at each call. "
            f"Received: build_model={build_model!r}."
        )
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"`rtol` must be 0 or more. Received: rtol={rtol}.")
    data = as_arrays(batch)
    samples = number_of_samples(data)
    sizes = shares(samples, replicas, split)
    several, single, communicator = comparison_replicas(sizes, data)
    reference = _build(single, build_model, data[0])
    if communicator is not None:
        # One worker with the whole batch, without the others.
        for layer in diagnosis.of_kind(reference, SynchronizedLayer).values():
            layer._communicator = "local"
        broadcast(reference.weights, 0, communicator)
    comparison = Comparison(
        Names.of(reference, data[0]),
        reference.get_weights(),
        data,
        loss,
        _tolerance(reference) if rtol is None else rtol,
    )
    outputs = comparison.outputs(single, reference)
    projections = random_projections(outputs, samples)
    expected = comparison.measure(single, reference, projections)
    rows = comparison.output_rows(diagnosis.REPEATED, outputs, expected.outputs)
    if several.any_worker(any(not row.ok for row in rows)):
        return Equivalence(replicas, rows, [diagnosis.randomness(rows, reference, "the model")])
    model = _build(several, build_model, data[0])
    _require_same_structure(reference, model)
    rows = comparison.rows(comparison.measure(several, model, projections), expected)

    untrained = _why_not_trained(reference, data, sizes)
    if untrained is None:
        once, twice = comparison.train(single, reference, 2)
        repeated = comparison.gradient_rows(diagnosis.REPEATED_TRAINING, twice, once)
        if several.any_worker(any(not row.ok for row in repeated)):
            advice = diagnosis.randomness(repeated, reference, "train_step")
            return Equivalence(replicas, repeated, [advice])
        (applied,) = comparison.train(several, model, 1)
        rows += comparison.gradient_rows(diagnosis.TRAINING, applied, once)
    found = diagnosis.diagnose(rows, model, replicas, communicator)
    return Equivalence(replicas, rows, [*found, untrained] if untrained else found)


def _why_not_trained(model: Any, data: tuple[Any, ...], sizes: Sequence[int]) -> str | None:
    """Returns ``None`` where `train_step` is to be checked, ``""`` where there is none."""
    if getattr(model, "optimizer", None) is None or not model.trainable_variables:
        return ""
    if len(data) == 1 and getattr(model, "loss", None) is not None:
        return "train_step was not checked: the compiled loss needs a batch of (x, y)."
    if len(set(sizes)) > 1:
        return (
            "train_step was not checked: with unequal shares, losses of Keras give replicas, not "
            "samples, equal weights."
        )
    return None


def _tolerance(model: Any) -> float:
    layers = model_and_layers(model).values()
    dtypes = {tf.as_dtype(layer.compute_dtype or "float32").name for layer in layers}
    return max(_TOLERANCES.get(dtype, 0.0) for dtype in dtypes) or _TOLERANCES["float32"]


def _build(replicas: BatchReplicas, build_model: Callable[[], Any], x: Any) -> Any:
    with replicas.scope():
        model = build_model()
        if not isinstance(model, keras_api.keras.Model):
            raise TypeError(
                "`build_model` must return a tf.keras.Model. "
                f"Received: {type(model).__module__}.{type(model).__qualname__}."
            )
        if not all(layer.built for layer in model_and_layers(model).values()):
            model(tf.nest.map_structure(lambda array: tf.constant(array[:1]), x), training=False)
    return model


def _require_same_structure(reference: Any, model: Any) -> None:
    first, second = (
        [f"{'trainable' if w.trainable else 'fixed'} {tuple(w.shape)}" for w in m.weights]
        for m in (reference, model)
    )
    if first != second:
        pairs = itertools.zip_longest(first, second, fillvalue="none")
        number, (one, other) = next((n, p) for n, p in enumerate(pairs) if p[0] != p[1])
        raise ValueError(
            "`build_model` must return the same model at each call. Received: weight "
            f"{number} of the first is {one}, of the second {other}."
        )
