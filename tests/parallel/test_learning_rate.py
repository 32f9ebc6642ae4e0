"""Learning rates that grow with the replicas, under every engine."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from tests.keras import KERAS_3, keras
from tests.kinds_of_replicas import Strategy
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import LossScaleOptimizer, kept

STEPS, BASE = 4, 0.01  # steps in an epoch; the rate of one replica


class Rates(keras.callbacks.Callback):
    """Notes the rate of each batch, and the weight after it."""

    def __init__(self):
        super().__init__()
        self.rates, self.weights = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate.numpy()))

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(float(self.model.get_weights()[0].item()))


def fit(replicas, optimizer, callbacks, epochs, known=True, **options):
    """Trains a weight whose gradient is always 1, on every replica."""
    strategy = isinstance(replicas, Strategy)
    if strategy:
        training.mend_keras_fit()
    with replicas.strategy.scope() if strategy else contextlib.nullcontext():
        ones = keras.initializers.Ones()
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=ones)
        model = keras.Sequential([keras.Input((1,)), layer])
        model.compile(
            training.distribute(optimizer()),
            loss=lambda y, prediction: prediction,
            jit_compile=False,
        )
    rows = 2 * (replicas.size // replicas.processes if strategy else 1)  # for each process
    x = np.ones((STEPS * rows, 1), "float32")
    policy = tf.data.Options()
    policy.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(rows).with_options(policy)
    if not known:
        data = data.filter(lambda *element: True)
    rates = Rates()
    callbacks = [*callbacks, rates]
    history = model.fit(
        data, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks, **options
    )
    # Keras 2 also begins the batch with which it finds out that data have ended.
    return rates.rates[: len(rates.weights)], rates.weights, history.history


def warmed_up(size, epochs, warmup_epochs):
    """The rates of each step, after Goyal et al."""
    steps = np.arange(1, epochs * STEPS + 1)
    return BASE * (1 + (size - 1) * np.minimum(1, steps / (warmup_epochs * STEPS)))


def corrected(rates, momentum):
    """The weights after each step of SGD: v = m * (rate / last rate) * v - rate * g; w = w + v."""
    weight, velocity, last, weights = 1.0, 0.0, rates[0], []
    for rate in rates:
        velocity = momentum * rate / last * velocity - rate
        weight, last = weight + velocity, rate
        weights.append(weight)
    return weights


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.5, momentum=0.9),
    "scaling the loss": lambda: LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9)),
}
if not KERAS_3:
    OPTIMIZERS["legacy"] = lambda: keras.optimizers.legacy.SGD(0.5, momentum=0.9)


@pytest.mark.parametrize("name", kept(OPTIMIZERS, "SGD"))
def test_a_warm_up_goes_from_the_rate_of_one_replica_to_that_of_all(replicas, name):
    if name != "SGD" and isinstance(replicas, Strategy):
        pytest.skip("the optimizer is nothing to a strategy")
    warmup = training.LearningRateWarmup(BASE, warmup_epochs=2)
    rates, weights, logs = fit(replicas, OPTIMIZERS[name], [warmup], 3)
    truth = warmed_up(replicas.size, 3, 2)
    np.testing.assert_allclose(rates, truth, rtol=1e-5)
    np.testing.assert_allclose(weights, corrected(truth, 0.9), rtol=1e-5)
    np.testing.assert_allclose(logs["learning_rate"], truth[STEPS - 1 :: STEPS], rtol=1e-5)


@pytest.mark.arithmetic
def test_without_correction_the_velocity_stays(replicas):
    warmup = training.LearningRateWarmup(BASE, 2, momentum_correction=False)
    _, weights, _ = fit(replicas, OPTIMIZERS["SGD"], [warmup], 2)
    weight, velocity, truth = 1.0, 0.0, []
    for rate in warmed_up(replicas.size, 2, 2):
        velocity = 0.9 * velocity - rate
        weight += velocity
        truth.append(weight)
    np.testing.assert_allclose(weights, truth, rtol=1e-5)


@pytest.mark.arithmetic
def test_schedules_follow_one_another(replicas):
    """The example of the paper: warm-up, then a tenth each time."""
    schedules = [
        training.LearningRateWarmup(BASE, 1),
        training.LearningRateSchedule(BASE, 1.0, start_epoch=1, end_epoch=2),
        training.LearningRateSchedule(BASE, lambda e: 0.1 ** (e - 1), start_epoch=2, end_epoch=4),
        training.LearningRateSchedule(BASE, lambda e: 1 / e, start_epoch=4, staircase=False),
    ]
    rates, weights, _ = fit(replicas, OPTIMIZERS["SGD"], schedules, 5)
    full = BASE * replicas.size
    last = [full / (4 + batch / STEPS) for batch in range(STEPS)]
    middle = np.repeat([full, 0.1 * full, 0.01 * full], STEPS)
    truth = [*warmed_up(replicas.size, 1, 1), *middle, *last]
    np.testing.assert_allclose(rates, truth, rtol=1e-5)
    np.testing.assert_allclose(weights, corrected(truth, 0.9), rtol=1e-5)


@pytest.mark.arithmetic
def test_a_training_that_begins_after_the_warm_up_keeps_its_rate(replicas):
    warmup = training.LearningRateWarmup(BASE, 2)
    rates, _, _ = fit(replicas, OPTIMIZERS["SGD"], [warmup], 3, initial_epoch=2)
    np.testing.assert_allclose(rates, 0.5)


@pytest.mark.arithmetic
def test_adam_has_nothing_to_correct(replicas):
    warmup = training.LearningRateWarmup(BASE, 1)
    _, weights, _ = fit(replicas, lambda: keras.optimizers.Adam(0.5), [warmup], 1)
    # With a gradient of 1 each step of Adam is the rate.
    np.testing.assert_allclose(weights, 1 - np.cumsum(warmed_up(replicas.size, 1, 1)), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length_need_the_number_of_steps(replicas):
    if ENGINE == "multiworker":
        pytest.skip("Keras takes no such data there")
    with pytest.raises(ValueError, match="needs the number of steps in an epoch"):
        fit(replicas, OPTIMIZERS["SGD"], [training.LearningRateWarmup(BASE)], 1, known=False)
    warmup = training.LearningRateWarmup(BASE, 1, steps_per_epoch=STEPS)
    rates, _, _ = fit(replicas, OPTIMIZERS["SGD"], [warmup], 1, known=False)
    np.testing.assert_allclose(rates, warmed_up(replicas.size, 1, 1), rtol=1e-5)


@workers.in_separate_processes
def test_workers_with_other_schedules_are_told(replicas):
    rank = getattr(replicas, "process", replicas).rank
    warmup = training.LearningRateWarmup(BASE, 1, steps_per_epoch=STEPS + (rank == 1))
    with pytest.raises(ValueError, match=r"same learning rates.*steps in an epoch, "):
        fit(replicas, OPTIMIZERS["SGD"], [warmup], 1)
    schedule = training.LearningRateSchedule(BASE, 1.0 + (rank == 1))
    with pytest.raises(ValueError, match=r"same learning rates.*multiplier, "):
        fit(replicas, OPTIMIZERS["SGD"], [schedule], 1)
