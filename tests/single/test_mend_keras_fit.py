"""What `mend_keras_fit` replaces in Keras, and what it leaves alone."""

import importlib
import inspect

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit
from tests import processes
from tests.keras import KERAS_3, keras
from tests.unmended_keras import unmended_keras

BUILD, REDUCE = "TensorFlowTrainer._maybe_symbolic_build", "reduce_per_replica"
APPLY = "LossScaleOptimizer.apply"


@pytest.fixture
def trainer():
    """Keras' trainer, with its own functions: a layer of another test may have replaced them."""
    if not KERAS_3:
        pytest.skip("the trainer of Keras 3")
    with unmended_keras():
        yield importlib.import_module("keras.src.backend.tensorflow.trainer")


def test_all_functions_of_this_keras_are_replaced_once(trainer):
    # A Keras that has fixed one of them fails this: the list then gets shorter, from that version.
    assert mend_keras_fit() == (BUILD, REDUCE, APPLY)
    mended = trainer.reduce_per_replica
    assert mend_keras_fit() == ()
    assert trainer.reduce_per_replica is mended


def fit_an_uneven_batch(strategy, make):
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), make(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(np.ones((3, 3)), np.ones((3, 1)), batch_size=4, verbose=0)


def test_a_synchronized_layer_in_a_scope_replaces_them_by_itself(trainer, mirrored):
    strategy = mirrored(2).strategy
    with pytest.raises(tf.errors.InvalidArgumentError, match="AddN"):
        fit_an_uneven_batch(strategy, keras.layers.BatchNormalization)
    syncbn.SyncCentering()  # outside of any scope
    assert inspect.unwrap(trainer.reduce_per_replica) is trainer.reduce_per_replica
    fit_an_uneven_batch(strategy, syncbn.SyncBatchNormalization)
    assert inspect.unwrap(trainer.reduce_per_replica) is not trainer.reduce_per_replica
    assert mend_keras_fit() == ()


def test_a_layer_leaves_a_trainer_that_is_not_known_alone(trainer, mirrored, monkeypatch):
    monkeypatch.delattr(trainer.TensorFlowTrainer, "_maybe_symbolic_build")
    reduce = trainer.reduce_per_replica
    with mirrored(2).strategy.scope():
        syncbn.SyncBatchNormalization()  # with no warning, of which tests make an error
    assert trainer.reduce_per_replica is reduce


def test_a_function_without_the_fault_stays(trainer, monkeypatch):
    def reduce_per_replica(values, strategy, reduction):
        return strategy.reduce("MEAN", values, axis=None)

    monkeypatch.setattr(trainer, REDUCE, reduce_per_replica)
    assert mend_keras_fit() == (BUILD, APPLY)
    assert trainer.reduce_per_replica is reduce_per_replica


def test_a_trainer_that_is_not_known_is_left_alone_with_a_warning(trainer, monkeypatch):
    monkeypatch.delattr(trainer.TensorFlowTrainer, "_maybe_symbolic_build")
    reduce = trainer.reduce_per_replica
    with pytest.warns(UserWarning, match="knows the trainer of Keras 3.10 to 3.15"):
        assert mend_keras_fit() == ()
    assert trainer.reduce_per_replica is reduce


def step_in_float16(strategy, scales):
    """Returns what a step leaves on each replica: a weight, and by how much losses are scaled."""
    with strategy.scope():
        dense = keras.layers.Dense(1, dtype="mixed_float16", kernel_initializer="ones")
        model = keras.Sequential([keras.Input((3,)), dense])
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
        model.compile(optimizer, "mse")
    # A sample for each replica.
    x = np.array(scales)[:, None] * np.ones((len(scales), 3))
    model.fit(x, np.zeros((len(x), 1)), batch_size=len(x), shuffle=False, verbose=0)
    kernels, scales = (
        strategy.experimental_local_results(variable.value)
        for variable in (dense.kernel, optimizer.dynamic_scale)
    )
    return [float(kernel[0, 0]) for kernel in kernels], [float(scale) for scale in scales]


@pytest.mark.parametrize("overflows", [0, 1])
def test_a_step_is_skipped_whichever_replica_has_gradients_that_are_not_finite(
    trainer, mirrored, overflows
):
    strategy, scales = mirrored(2).strategy, [0.01, 0.01]
    scales[overflows] = 100.0
    kernels, _ = step_in_float16(strategy, scales)
    assert np.isfinite(kernels).all() == (overflows == 0)  # Keras' own
    assert mend_keras_fit() == (BUILD, REDUCE, APPLY)
    assert step_in_float16(strategy, scales) == ([1.0] * 2, [2.0**14] * 2)
    # Where all are finite. The gradient is 2 * 0.03 * 0.01.
    kernels, loss_scales = step_in_float16(strategy, [0.01, 0.01])
    np.testing.assert_allclose(kernels, 1 - 0.1 * 6e-4, rtol=1e-6)
    assert loss_scales == [2.0**15] * 2


@pytest.mark.skipif(KERAS_3, reason="tf_keras")
def test_keras_2_is_left_alone():
    assert mend_keras_fit() == ()


def test_a_strategy_can_be_made_afterwards():
    # As MultiWorkerMirroredStrategy is, devices are configured before TensorFlow's first operation.
    finished = processes.python(
        "import tensorflow as tf\n"
        "from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit\n"
        "assert len(mend_keras_fit()) == 3\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()])",
        TF_USE_LEGACY_KERAS="0",
    )
    assert finished.code == 0, finished.output
