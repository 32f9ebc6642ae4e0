"""Workers with different numbers of batches."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from tests.keras import keras
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

    alone = compiled(keras.layers.BatchNormalization(), optimizer=keras.optimizers.SGD(0.1, 0.9))
    alone.set_weights(weights)
    for _ in range(2):
        for step in range(7):
            together = np.concatenate([part[3 * step : 3 * step + 3] for part in parts])
            alone.train_on_batch(x[together], y[together])
    for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(ours)


def test_join_says_what_it_cannot_take(replicas):
    with pytest.raises(TypeError, match=r"Call \.batch"):
        training.join(tf.data.Dataset.range(3))
    with pytest.raises(TypeError, match=r"must be a tf\.data\.Dataset"):
        training.join([1, 2])
    with pytest.raises(ValueError, match=r"needs elements \(x, y\)"):
        training.join(tf.data.Dataset.range(3).batch(1), sample_weight=True)
