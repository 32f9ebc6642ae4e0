"""Workers with different numbers of batches."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import KERAS_3, keras
from tests.parallel import workers
from tests.parallel.workers import compiled, same_on_all_ranks, samples

pytestmark = workers.in_separate_processes


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_joined_dataset_is_as_long_as_the_longest(replicas, known):
    own = [7, 4, 0][replicas.rank % 3]
    dataset = tf.data.Dataset.range(2 * own).map(
        lambda i: {
            "x": (tf.fill([3], i), tf.ragged.range(tf.fill([2], i % 3))),
            "y": tf.as_string(i),
        }
    )
    dataset = dataset.batch(2)
    dataset = dataset if known else dataset.filter(lambda element: True)
    joined = training.join(dataset)
    assert int(joined.cardinality()) == (7 if known else tf.data.UNKNOWN_CARDINALITY)
    for _ in range(2):  # a dataset can be gone through again
        elements = list(joined)
        sizes = [int(element["y"].shape[0]) for element in elements]
        assert sizes == [2] * own + [0] * (7 - own)
        seen = [text for element in elements for text in element["y"].numpy().tolist()]
        assert seen == [str(i).encode() for i in range(2 * own)]


class Pair(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    "structure", [lambda i: (i,), lambda i: Pair(i, {"a": i}), lambda i: ((i, i), {"b": (i,)})]
)
def test_any_structure_is_joined(replicas, structure):
    dataset = tf.data.Dataset.range(3 + replicas.rank).map(structure).batch(2)
    joined = training.join(dataset.filter(lambda *element: True))
    assert joined.element_spec == dataset.element_spec
    assert len(list(joined)) == (3 + replicas.size) // 2


def test_an_early_end_leaves_nothing_half_done(replicas):
    dataset = tf.data.Dataset.range(4 + replicas.rank).batch(1).filter(lambda element: True)
    joined = training.join(dataset)
    for _ in range(3):
        assert len(list(joined.take(2))) == 2
    assert len(list(joined)) == 3 + replicas.size


# What Keras 3 says after the first epoch of any dataset of unknown length.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_ragged_job_is_the_job_of_one_process(replicas, known):
    """Workers with 7, 4 and 0 batches; what they do together, one process does batch by batch."""
    lengths = [7, 4, 0][: replicas.size]
    x, y = samples(3 * sum(lengths))
    parts = np.split(np.arange(len(x)), np.cumsum([3 * n for n in lengths])[:-1])
    own = parts[replicas.rank]
    dataset = tf.data.Dataset.from_tensor_slices((x[own], y[own])).batch(3)
    dataset = dataset if known else dataset.filter(lambda *element: True)
    keras.utils.set_random_seed(0)
    model = compiled()
    weights = model.get_weights()
    model.fit(
        training.join(dataset, sample_weight=True),
        epochs=2,
        verbose=0,
        shuffle=False,
        callbacks=[training.BroadcastVariables()],
    )

    alone = compiled(
        keras.layers.BatchNormalization(),
        optimizer=keras.optimizers.SGD(0.1, 0.9),
        run_eagerly=True,
    )
    alone.set_weights(weights)
    for _ in range(2):
        for step in range(7):
            together = np.concatenate([part[3 * step : 3 * step + 3] for part in parts])
            alone.train_on_batch(x[together], y[together])
    for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(ours)


def batches_of(size):
    """The batch sizes of each worker in three steps."""
    return [[3, 3, 1], [3, 2, 0], [0, 0, 0]][:size]


@pytest.mark.parametrize(
    ("sample", "shape", "dtype"),
    [
        ((2,), (), "float32"),
        ((2,), (1,), "int32"),
        ((4, 2), (1,), "float16"),
        ((4, 2), (4,), "float64"),
        ((4, 2), (4, 1), "bool"),
    ],
)
def test_given_weights_may_have_any_shape(replicas, sample, shape, dtype):
    rng = np.random.default_rng(0)
    sizes = batches_of(replicas.size)
    y = [rng.normal(size=(sum(own), *sample)).astype("float32") for own in sizes]
    w = [(3 * rng.random(size=(sum(own), *shape))).astype(dtype) for own in sizes]
    own = y[replicas.rank], y[replicas.rank], w[replicas.rank]
    dataset = tf.data.Dataset.from_tensor_slices(own)
    mse = keras.losses.MeanSquaredError()

    joined = training.join(dataset.batch(3), sample_weight=True)

    # Of unknown batch size, as in `fit`: of none at all, Keras 3 has no mean.
    @tf.function(input_signature=[tf.TensorSpec([None, *sample]), joined.element_spec[2]])
    def loss(y, weights):
        return mse(y, tf.zeros_like(y), sample_weight=weights)

    joined = list(joined)
    assert {weights.dtype for _, _, weights in joined} == {
        tf.float64 if dtype == "float64" else tf.float32
    }
    assert {weights.shape[1:] for _, _, weights in joined} == {shape}
    own = tf.stack([tf.cast(loss(y, weights), tf.float64) for _, y, weights in joined])
    means = syncbn.resolve().all_reduce_sum(own, "losses").numpy() / replicas.size
    starts = [np.cumsum([0, *own]) for own in sizes]
    assert len(means) == 3
    for step, mean in enumerate(means):
        parts = [slice(start[step], start[step + 1]) for start in starts]
        whole_y = np.concatenate([one[part] for one, part in zip(y, parts, strict=True)])
        whole_w = np.concatenate([one[part] for one, part in zip(w, parts, strict=True)])
        losses = np.mean(np.float64(whole_y) ** 2, -1).reshape(len(whole_y), -1)
        truth = np.mean(np.float64(whole_w).reshape(len(whole_y), -1) * losses)
        np.testing.assert_allclose(mean, truth, rtol=1e-5)
        # One process of this Keras, with the whole batch.
        np.testing.assert_allclose(loss(whole_y, whole_w), truth, rtol=1e-5)


def two_outputs(optimizer, **options):
    inputs = keras.Input((3,))
    outputs = {name: keras.layers.Dense(units, name=name)(inputs) for name, units in UNITS.items()}
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, "mse", jit_compile=False, **options)
    return model


UNITS = {"a": 1, "b": 2}


def some_weights(w):
    """Weights for one of two outputs."""
    return {"a": w, "b": None} if KERAS_3 else {"a": tf.expand_dims(w, -1)}


def test_weights_of_one_output_of_several_are_those_of_one_process(replicas):
    rng = np.random.default_rng(1)
    sizes = batches_of(replicas.size)
    x = rng.normal(size=(sum(map(sum, sizes)), 3)).astype("float32")
    w = rng.random(len(x)).astype("float32")
    starts = np.cumsum([0, *map(sum, sizes)])

    def dataset(start, stop):
        own = tf.data.Dataset.from_tensor_slices((x[start:stop], w[start:stop]))
        return own.batch(3).map(lambda x, w: (x, {"a": x[:, :1], "b": x[:, 1:]}, some_weights(w)))

    rank = replicas.rank
    keras.utils.set_random_seed(0)
    model = two_outputs(training.distribute(keras.optimizers.SGD(0.1)))
    weights = model.get_weights()
    joined = training.join(dataset(starts[rank], starts[rank + 1]), sample_weight=True)
    model.fit(joined, verbose=0, shuffle=False)

    alone = two_outputs(keras.optimizers.SGD(0.1), run_eagerly=True)
    alone.set_weights(weights)
    for step in range(3):
        begins = [start + sum(own[:step]) for start, own in zip(starts, sizes, strict=False)]
        rows = np.concatenate(
            [np.arange(own[step]) + begin for own, begin in zip(sizes, begins, strict=True)]
        )
        alone.train_on_batch(x[rows], {"a": x[rows, :1], "b": x[rows, 1:]}, some_weights(w[rows]))
    for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_join_of_one_rank_alone_puts_nobody_out_of_step(replicas):
    dataset = tf.data.Dataset.range(4 + replicas.rank).batch(1).filter(lambda element: True)
    for _ in range(replicas.rank):
        assert len(list(training.join(dataset, "local"))) == 4 + replicas.rank
    # Two at a time, which must not take each other's messages.
    joined = [training.join(one) for one in (dataset, dataset.take(2))]
    assert [len(list(one)) for one in reversed(joined)] == [2, 3 + replicas.size]
    assert len(list(tf.data.Dataset.zip(*joined))) == 2


def test_workers_that_weigh_and_workers_that_do_not_are_told(replicas):
    dataset = tf.data.Dataset.range(4).map(lambda i: (i, i)).batch(1)
    odd = replicas.size - 1
    with pytest.raises(
        ValueError, match=rf"or none\. Received: sample_weight=True on rank {odd} o"
    ):
        training.join(dataset, sample_weight=replicas.rank == odd)


def test_join_says_what_it_cannot_take(replicas):
    with pytest.raises(TypeError, match=r"Call \.batch"):
        training.join(tf.data.Dataset.range(3))
    with pytest.raises(TypeError, match=r"must be a tf\.data\.Dataset"):
        training.join([1, 2])
    with pytest.raises(ValueError, match=r"needs elements \(x, y\)"):
        training.join(tf.data.Dataset.range(3).batch(1), sample_weight=True)
