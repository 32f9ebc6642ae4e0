"""The digits trained by W workers, and by one process with the whole batch: the same numbers."""

import numpy as np
import pytest
import tensorflow as tf
from digits_data import load_data
from train_digits import build_model, initial_weights

from syncbn import training
from tests.keras import keras
from tests.kinds_of_replicas import Strategy

STEPS, BATCH = 20, 24
PARTS = {
    "even": lambda size: [BATCH // size] * size,
    "ragged": lambda size: [BATCH - 2 * (size - 1)] + [2] * (size - 1),
}


def update(model, optimizer, images, digits, scale):
    """A step on the loss ``scale * (sum over the samples given)``."""
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        losses = keras.losses.sparse_categorical_crossentropy(digits, logits, from_logits=True)
        loss = scale * tf.reduce_sum(losses)
    weights = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


@pytest.fixture(scope="module")
def batches():
    data, _ = load_data()
    images, digits = data.images[: STEPS * BATCH], data.digits[: STEPS * BATCH]
    return list(zip(np.split(images, STEPS), np.split(digits.astype("int32"), STEPS), strict=True))


@pytest.fixture(scope="module")
def expected(batches):
    """The weights after the steps in one process, with the layer of Keras and the whole batch."""
    model = build_model("batch")
    model.set_weights(initial_weights(0))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    step = tf.function(lambda x, y: update(model, optimizer, x, y, 1 / BATCH))
    for images, digits in batches:
        step(tf.constant(images), tf.constant(digits))
    return model.get_weights()


@pytest.mark.parametrize("parts", PARTS)
def test_the_weights_are_those_of_one_process_with_the_whole_batch(
    replicas, batches, expected, parts
):
    sizes = PARTS[parts](replicas.size)
    train = _with_strategy if isinstance(replicas, Strategy) else _with_distribute
    actual = train(replicas, batches, np.cumsum(sizes)[:-1])
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max(), err_msg=f"weight {number}"
        )


def _with_distribute(replicas, batches, cuts):
    model = build_model("sync")
    model.set_weights(initial_weights(0))
    optimizer = training.distribute(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(model.trainable_variables)
    # The optimizer takes the mean over the workers; their losses add up to the mean over samples.
    step = tf.function(lambda x, y: update(model, optimizer, x, y, replicas.size / BATCH))
    for images, digits in batches:
        own = np.split(images, cuts)[replicas.rank], np.split(digits, cuts)[replicas.rank]
        step(*map(tf.constant, own))
    return model.get_weights()


def _with_strategy(replicas, batches, cuts):
    strategy = replicas.strategy
    with strategy.scope():
        model = build_model("sync")
        model.set_weights(initial_weights(0))
        # It takes the sum over the replicas, which `distribute` averages over processes.
        optimizer = training.distribute(keras.optimizers.SGD(0.1, momentum=0.9))
        optimizer.build(model.trainable_variables)

    @tf.function
    def step(images, digits):
        scale = replicas.processes / BATCH
        strategy.run(lambda x, y: update(model, optimizer, x, y, scale), args=(images, digits))

    def parted(values):
        parts = np.split(values, cuts)
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[replicas.first + context.replica_id_in_sync_group])
        )

    for images, digits in batches:
        step(parted(images), parted(digits))
    return model.get_weights()
