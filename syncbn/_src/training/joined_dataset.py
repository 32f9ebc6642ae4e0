"""Datasets of different lengths on different workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator, current_size, process_communicator
from syncbn._src.communicators.fingerprints import sums
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.communicators.mpi import MPICommunicator
from syncbn._src.communicators.resolution import resolve

_next_number = 0
"""Greater than the number of any joined dataset of this process."""


def join(
    dataset: tf.data.Dataset,
    communicator: str | Communicator = "auto",
    *,
    sample_weight: bool = False,
) -> tf.data.Dataset:
    """Lets workers have different numbers of batches: one that runs out continues with empty ones.

    The dataset of every worker becomes as long as the longest. No worker waits for one that has
    ended, nothing is dropped, and synchronized layers see the batches that exist. All workers make
    this call, with datasets of the same structure. Where all cardinalities are known it takes one
    small collective. Where one is not, and with ``sample_weight``, it takes one more with each
    batch; then every worker has to iterate as far as the others do, and nothing may prefetch after
    the join (`Model.fit` of Keras 3 does with ``class_weight``).

    The mean over the samples of each worker, averaged over the workers, is not the mean over all
    samples where batches differ in size. With ``sample_weight=True`` it is: each sample of a step
    gets the weight ``workers * samples of this worker / samples of all workers``, as `distribute`
    and losses that divide by the size of the batch (``reduction="sum_over_batch_size"``, which is
    the default of `tf.keras.losses`) need it. The loss that `fit` and `evaluate` report is then not
    the mean over all samples where sizes differ, also not with `AverageMetrics`: Keras weights by
    the size of the batch once more. The same function among the ``metrics`` is right. Data of
    validation, and for `evaluate`, need no weights.

    Under tf.distribute, where strategies distribute batches, the dataset is returned unchanged.
    Where each process of a job has a strategy, the datasets of the processes are joined, and each
    strategy distributes the batches of its process.

    Args:
        dataset: A dataset of batches: any structure of dense, ragged and sparse tensors whose first
            dimension is the batch. In empty batches, unknown dimensions have size 1.
        communicator: As for `syncbn.SyncBatchNormalization`. A communicator object is used from the
            threads of the dataset while the model may be using it too.
        sample_weight: Whether to append weights, float32 ``(batch,)``, to elements ``(x, y)``, or
            to multiply those of elements ``(x, y, sample_weight)``. These may have any shape that
            begins with the batch, and be a structure of weights, such as one for each output; they
            become float32, unless they are float64. ``None`` in it stands for weights of one.

    Returns:
        A dataset with the structure of ``dataset``; with ``sample_weight`` the weights are in it.

    Raises:
        TypeError: ``dataset`` is not a dataset, or has components without a batch dimension.
        ValueError: with ``sample_weight``, elements that are not ``(x, y)`` or ``(x, y, weights)``;
            some workers give ``sample_weight`` and others do not.
        RuntimeError: the call is made in a graph; MPI is not initialized for several threads; and
            see `syncbn.resolve`.

    Example:
        >>> data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        >>> joined = syncbn.training.join(data, sample_weight=True)
        >>> print(*(part.shape for part in next(iter(joined))))
        (4, 4) (4, 1) (4,)
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(f"`dataset` must be a tf.data.Dataset. Received: dataset={dataset!r}.")
    if not tf.executing_eagerly():
        raise RuntimeError(
            "join communicates with the other workers at once, so it must be called eagerly. "
            "Received: a call inside a tf.function or a graph."
        )
    spec = dataset.element_spec
    empty = tf.nest.map_structure(_empty, spec)
    if sample_weight and not (isinstance(spec, tuple) and len(spec) in (2, 3)):
        raise ValueError(
            "`sample_weight` needs elements (x, y) or (x, y, sample_weight). "
            f"Received: elements {spec}."
        )
    communicator = process_communicator(resolve(communicator))
    if communicator.name == "tf.distribute":
        return dataset
    global _next_number
    own = dataset.cardinality().numpy()
    rows = all_gather(communicator, np.array([own, _next_number, sample_weight]), "syncbn/join")
    cardinalities, numbers, weighted = rows.T
    if len(set(weighted)) > 1:
        raise ValueError(
            "All workers must give `sample_weight`, or none. Received: sample_weight=True on rank "
            f"{', '.join(map(str, np.flatnonzero(weighted)))} only."
        )
    # Workers may have joined different numbers of datasets before; here they agree on one.
    number = int(numbers.max())
    _next_number = number + 1
    if (cardinalities == tf.data.INFINITE_CARDINALITY).all() and not sample_weight:
        return dataset
    known = (cardinalities >= 0).all()
    if known and not sample_weight:
        steps = int(cardinalities.max())
        padding = tf.data.Dataset.from_tensors(empty).repeat(steps - own)
        return dataset.concatenate(padding).apply(tf.data.experimental.assert_cardinality(steps))
    if isinstance(communicator, MPICommunicator):
        # Exchanges run in the threads of the dataset, in any order with those of the layers.
        communicator = communicator.lane(number)
    joined = _with_exchange(dataset, empty, communicator, f"syncbn/join/{number}/batch")
    joined = joined.map(_weigh if sample_weight else _without_weight)
    if known:
        joined = joined.apply(tf.data.experimental.assert_cardinality(int(cardinalities.max())))
    # By itself TensorFlow may prefetch, so that workers which stop early would leave an exchange
    # half done, and map in parallel, so that exchanges would overtake each other.
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_parallelization = False
    return joined.with_options(options)


def _with_exchange(
    dataset: tf.data.Dataset, empty: Any, communicator: Communicator, name: str
) -> tf.data.Dataset:
    """Returns elements ``(weight, element)`` until no worker has any left.

    The weight is that of each sample of the element, float64.
    """

    def exchange(present: tf.Tensor, element: Any) -> tuple[tf.Tensor, tf.Tensor, Any]:
        samples = tf.cast(_batch_size(element), tf.float64)
        totals = sums(communicator)(tf.stack([present, samples]), name)
        workers = tf.cast(current_size(communicator), tf.float64)
        weight = tf.math.divide_no_nan(workers * samples, totals[1])
        return totals[0] > 0, weight, element

    def tagged(*components: Any) -> tuple[tf.Tensor, Any]:
        # A dataset gives the components of a tuple one by one.
        return tf.ones([], tf.float64), tf.nest.pack_sequence_as(spec, tf.nest.flatten(components))

    spec = dataset.element_spec
    present = dataset.map(tagged)
    absent = tf.data.Dataset.from_tensors((tf.zeros([], tf.float64), empty)).repeat()
    exchanged = present.concatenate(absent).map(exchange)
    going_on = exchanged.take_while(lambda anyone, weight, element: anyone)
    return going_on.map(lambda anyone, weight, element: (weight, element))


def _without_weight(weight: tf.Tensor, element: Any) -> Any:
    return element


def _weigh(weight: tf.Tensor, element: Any) -> Any:
    x, y, *rest = element
    (given,) = rest or (None,)
    if isinstance(given, dict) and isinstance(y, dict):
        given = {**dict.fromkeys(y), **given}  # Keras 2 lets unweighted ones be left out

    def weigh(one: Any) -> Any:
        if one is None:
            return tf.fill([_batch_size(element)], tf.cast(weight, tf.float32))
        dtype = tf.float64 if one.dtype == tf.float64 else tf.float32
        # The same for all samples, so that the shape does not matter.
        return tf.cast(one, dtype) * tf.cast(weight, dtype)

    return x, y, tf.nest.map_structure(weigh, given)


def _batch_size(element: Any) -> tf.Tensor:
    first = next(part for part in tf.nest.flatten(element) if part is not None)
    if isinstance(first, tf.SparseTensor):
        return first.dense_shape[0]
    return first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first, tf.int64)[0]


def _empty(spec: tf.TypeSpec) -> Any:
    """Returns a batch of size zero."""
    # By its name: TensorFlow 2.16 does not export it, and its values have a type of their own.
    if type(spec).__name__ == "NoneTensorSpec":
        return None
    known = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)
    if not isinstance(spec, known) or not spec.shape.rank:
        raise TypeError(
            "Each component of the dataset must be a dense, ragged or sparse tensor whose first "
            f"dimension is the batch. Received: {spec}. Call .batch(...) first."
        )
    shape = [0] + [1 if size is None else size for size in spec.shape[1:]]
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensor(
            tf.zeros([0, len(shape)], tf.int64), tf.zeros([0], spec.dtype), shape
        )
    if isinstance(spec, tf.RaggedTensorSpec):
        values = tf.zeros([0, *shape[spec.ragged_rank + 1 :]], spec.dtype)
        splits = tf.zeros([1], spec.row_splits_dtype)
        return tf.RaggedTensor.from_nested_row_splits(values, [splits] * spec.ragged_rank)
    return tf.zeros(shape, spec.dtype)
