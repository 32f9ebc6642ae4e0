"""What users get wrong: the error names the requirement, what came, and the way out."""

import os
import re
import sys

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators.launcher import launched
from tests import processes
from tests.keras import KERAS_3, keras

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])


@BOTH
@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_outside_of_the_input(make, axis):
    with pytest.raises(ValueError, match=rf"name dimensions of the input.*axis={axis}.*axis=-1"):
        make(axis=axis).build((2, 3, 4))


@pytest.mark.skipif(KERAS_3, reason="Keras 3 takes one axis, which test_properties.py checks")
def test_duplicate_axes_of_batch_normalization():
    with pytest.raises(ValueError, match=r"each dimension once.*Remove"):
        syncbn.SyncBatchNormalization(axis=[1, -2]).build((2, 3, 4))


def test_duplicate_axes():
    with pytest.raises(ValueError, match=r"each dimension once.*\[1, -2\].*Remove"):
        syncbn.SyncCentering(axis=[1, -2]).build((2, 3, 4))


@BOTH
def test_an_unknown_number_of_channels(make):
    with pytest.raises(ValueError, match=r"known size.*\(None, 3, None\).*input shape"):
        make().build((None, 3, None))


@BOTH
def test_an_input_without_a_batch(make):
    with pytest.raises(ValueError, match=r"rank 2 at least.*\(3,\)"):
        make().build((3,))


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_an_input_that_is_no_number(make, training):
    layer = make()
    layer.build((None, 2))
    with pytest.raises(TypeError, match=r"floats, integers or booleans.*complex64.*tf\.cast"):
        layer.call(tf.zeros([1, 2], tf.complex64), training=training)


@BOTH
def test_an_unknown_rank_where_the_layer_is_not_built(make):
    with pytest.raises(ValueError, match=r"rank 2 at least.*<unknown>.*layer\.build\(shape\)"):
        make().build(tf.TensorShape(None))


@BOTH
@pytest.mark.parametrize("shape", [(), (4, 3, 2)])
def test_a_mask_of_the_wrong_rank(make, shape):
    layer = make()
    with pytest.raises(ValueError, match=r"one dimension fewer.*mask shape.*\(4, 3, 2\)"):
        layer(np.ones((4, 3, 2), "float32"), training=True, mask=np.ones(shape, bool))


@BOTH
@pytest.mark.parametrize("shape", [(5, 3), (5,), (4, 2)])
def test_a_mask_of_another_batch(make, shape):
    layer = make()
    message = rf"leading dimensions.*mask shape {re.escape(str(shape))} for .*\(4, 3, 2\).*Pass"
    with pytest.raises(ValueError, match=message):
        layer(np.ones((4, 3, 2), "float32"), training=True, mask=np.ones(shape, bool))


@BOTH
def test_a_mask_of_another_batch_where_a_graph_knows_no_sizes(make):
    layer = make()
    layer.build((None, None, 2))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, 2]), tf.TensorSpec([None] * 2, "bool")]
    )
    def step(x, mask):
        return layer(x, training=True, mask=mask)

    x = tf.ones([4, 3, 2])
    for shape in (4, 3), (1, 3), (4, 1):  # those of one sample, or step, go for all
        assert step(x, tf.ones(shape, "bool")).shape == x.shape
    with pytest.raises(tf.errors.InvalidArgumentError, match="must_have_the_sizes_of_its_input"):
        step(x, tf.ones([5, 3], "bool"))


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_a_sparse_tensor(make, training):
    with pytest.raises(TypeError, match=r"dense inputs.*a SparseTensor.*tf\.sparse\.to_dense"):
        make()(tf.sparse.eye(3), training=training)


@pytest.mark.parametrize(
    ("options", "masked"),
    [({"target_batch": 4}, False), ({"virtual_batch_size": 2}, False), ({}, True)],
    ids=["target_batch", "virtual_batch_size", "dense mask"],
)
def test_a_ragged_tensor_of_which_the_layer_needs_the_samples(options, masked):
    layer = syncbn.SyncBatchNormalization(**options)
    x = tf.RaggedTensor.from_row_lengths(tf.ones([3, 3]), [1, 2])
    mask = tf.ones([2, 2], tf.bool) if masked else None
    with pytest.raises(ValueError, match=r"takes a ragged tensor if.*Received.*\(2, None, 3\).*x"):
        layer(x, training=True, mask=mask)
    assert layer(x, training=False).shape.as_list() == [2, None, 3]
    # The way out that it names.
    layer(x.to_tensor(), training=True, mask=tf.sequence_mask(x.row_lengths()))


@BOTH
def test_a_ragged_tensor_with_channels_in_front(make):
    x = tf.RaggedTensor.from_uniform_row_length(
        tf.RaggedTensor.from_row_lengths(tf.ones([8, 4]), [1, 2, 1, 4]), 2
    )
    with pytest.raises(ValueError, match=r"takes a ragged tensor if.*\(2, 2, None, 4\).*to_tensor"):
        make(axis=1)(x, training=True)


@BOTH
@pytest.mark.parametrize("axis", ["channels", 1.5, ["channels"], None])
def test_an_axis_that_is_no_number(make, axis):
    message = rf"must be an integer.*Received: axis={re.escape(repr(axis))}.*axis=-1"
    with pytest.raises(TypeError, match=message):
        make(axis=axis)


def test_keras_2_is_asked_for_between_the_imports():
    finished = processes.python(
        "import os, tensorflow as tf\n"
        "tf.keras.layers\n"
        "os.environ['TF_USE_LEGACY_KERAS'] = '1'\n"
        "import syncbn",
        TF_USE_LEGACY_KERAS="0",
    )
    assert finished.code != 0
    assert "RuntimeError: TF_USE_LEGACY_KERAS must be set before TensorFlow" in finished.output


def test_keras_2_is_asked_for_and_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['tf_keras'] = None")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {"TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": path}
    sentence = "`tf.keras` cannot be Keras 2 without the package tf_keras"
    doctor = [sys.executable, "-m", "syncbn", "doctor", "--engine", "mirrored"]
    finished = processes.run([("doctor", doctor, env)])
    assert finished.code == 1, finished.output
    assert "Traceback" not in finished.output
    assert f"tf.keras      failed: {sentence}" in finished.output, finished.output
    assert f"mirrored      failed: {sentence}" in finished.output, finished.output
    finished = processes.python("import syncbn", **env)
    assert f"ImportError: {sentence}" in finished.output, finished.output


@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_weights_of_a_plain_model(make, tmp_path):
    def model(normalization):
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), normalization])

    file = str(tmp_path / "plain.weights.h5")
    plain = model(keras.layers.BatchNormalization())
    plain.set_weights([np.full(weight.shape, 2.0) for weight in plain.get_weights()])
    plain.save_weights(file)
    with pytest.raises(ValueError, match=r"none for sync_\w+.*convert_sync_batchnorm\(model\)"):
        model(make()).load_weights(file)
    # The way out that it names.
    again = model(keras.layers.BatchNormalization())
    again.load_weights(file)
    syncbn.convert_sync_batchnorm(again)
    assert isinstance(again.layers[-1], syncbn.SyncBatchNormalization)
    for ours, theirs in zip(again.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@BOTH
@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_outside_of_its_range(make, momentum):
    with pytest.raises(ValueError, match=r"\[0, 1\].*None.*Received: momentum"):
        make(momentum=momentum)
    with pytest.raises(ValueError, match=r"\[0, 1\].*None.*Received: momentum"):
        make(momentum=tf.Variable(momentum))


@BOTH
@pytest.mark.parametrize("thing", ["0.9", [0.9], object(), np.zeros(1)])
def test_a_momentum_that_is_no_number(make, thing):
    with pytest.raises(TypeError, match=r"a number, or.*Received: momentum=.*tf\.Variable"):
        make(momentum=thing)


@BOTH
@pytest.mark.parametrize("value", [[0.9], 1], ids=["shape", "dtype"])
def test_a_momentum_that_is_another_variable(make, value):
    with pytest.raises(TypeError, match=r"a scalar variable of floats.*Received: momentum="):
        make(momentum=tf.Variable(value))


@BOTH
def test_a_momentum_that_has_no_value_yet(make):
    with pytest.raises(TypeError, match=r"a number, or.*Received: momentum="):
        tf.function(lambda momentum: make(momentum=momentum) and None)(tf.constant(0.9))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_keras_names_the_package_of_a_layer_that_it_does_not_know(tmp_path):
    # Nothing of the package runs there, so this is all that a user is told; docs/troubleshooting.md
    # says what to do.
    model = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization()])
    file = str(tmp_path / ("model.keras" if KERAS_3 else "model.h5"))
    model.save(file)
    load = f"import tensorflow as tf; tf.keras.models.load_model({file!r})"
    legacy = str(int(not KERAS_3))
    finished = processes.python(load, TF_USE_LEGACY_KERAS=legacy)
    assert finished.code != 0
    assert "syncbn>SyncBatchNormalization" in finished.output, finished.output
    finished = processes.python(f"import syncbn; {load}", TF_USE_LEGACY_KERAS=legacy)
    assert finished.code == 0, finished.output


@BOTH
@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_empty_batch_of_a_convolution_on_cpus(make, activation):
    layers = [keras.layers.Conv2D(4, 3, activation=activation), make()]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3])])
    def step(x):
        return model(x, training=True)

    assert step(tf.ones([2, 8, 8, 3])).shape == (2, 6, 6, 4)
    convolution = tf.function(layers[0], input_signature=[tf.TensorSpec([None, 8, 8, 3])])
    try:
        right = convolution(tf.ones([0, 8, 8, 3])).shape == (0, 6, 6, 4)
    except tf.errors.InvalidArgumentError:
        right = False
    if right:
        pytest.skip("TensorFlow's convolution is right here: no oneDNN, or a later one")
    known_to_be_empty = tf.function(lambda x: model(x, training=True))
    for call in step, known_to_be_empty:
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=r"oneDNN.*TF_ENABLE_ONEDNN_OPTS_to_0"
        ):
            call(tf.ones([0, 8, 8, 3]))


def test_an_empty_batch_of_a_convolution_that_keeps_the_channels_changes_nothing():
    # Its other sizes are wrong with oneDNN, which is nothing to a normalization.
    convolution = keras.layers.Conv2D(3, 3, strides=2, padding="same", use_bias=False)
    layer = syncbn.SyncBatchNormalization()

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3])])
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(convolution(x), training=True)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, [*convolution.trainable_variables, *layer.trainable_variables])

    for gradient in step(tf.ones([0, 8, 8, 3])):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(3))


@pytest.mark.parametrize("epsilon", [-0.1, float("nan")])
def test_a_negative_epsilon(epsilon):
    with pytest.raises(ValueError, match=r"not be negative.*Received: epsilon="):
        syncbn.SyncBatchNormalization(epsilon=epsilon)


def test_a_synchronized_layer_that_is_not():
    with pytest.raises(ValueError, match="communicator='local'"):
        syncbn.SyncBatchNormalization(synchronized=False)


@BOTH
def test_an_unknown_communicator(make):
    with pytest.raises(ValueError, match=r"'auto', 'tf.distribute'.*communicator='nccl'"):
        make(communicator="nccl")


@BOTH
@pytest.mark.parametrize("thing", [3, None, object(), syncbn.LocalCommunicator])
def test_something_that_is_no_communicator(make, thing):
    with pytest.raises(TypeError, match=r"members of syncbn\.Communicator.*Received"):
        make(communicator=thing)


@BOTH
def test_a_communicator_whose_name_could_not_be_loaded_again(make):
    class Mine(syncbn.LocalCommunicator):
        name = "mine"

    with pytest.raises(ValueError, match=r"saved layer stores.*'local'.*Received: name='mine'"):
        make(communicator=Mine())


@pytest.mark.parametrize("name", ["horovod", "mpi"])
def test_an_engine_that_is_not_installed(name, monkeypatch):
    module = {"horovod": "horovod.tensorflow", "mpi": "mpi4py"}[name]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    layer = syncbn.SyncBatchNormalization(communicator=name)
    layer(np.ones((2, 3), "float32"))  # inference needs no engine
    remedy = {"horovod": "syncbn install-horovod", "mpi": r"pip install 'syncbn\[mpi\]'"}[name]
    with pytest.raises(ImportError, match=remedy):
        layer(np.ones((2, 3), "float32"), training=True)


@pytest.mark.parametrize(
    "variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS"]
)
def test_a_launcher_started_several_processes_and_no_engine_joins_them(variable, monkeypatch):
    monkeypatch.setenv(variable, "4")
    layer = syncbn.SyncCentering()
    with pytest.raises(RuntimeError, match=rf"{variable} says that 4 processes.*import mpi4py"):
        layer(np.ones((2, 3), "float32"), training=True)
    local = syncbn.SyncCentering(communicator="local")
    local(np.ones((2, 3), "float32"), training=True)


def test_a_tensorflow_cluster_without_its_strategy(monkeypatch):
    hosts = '["a:1", "b:1"]'
    monkeypatch.setenv("TF_CONFIG", f'{{"cluster": {{"worker": {hosts}, "chief": ["c:1"]}}}}')
    with pytest.raises(RuntimeError, match="TF_CONFIG says that 3 processes"):
        syncbn.resolve()


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"cluster": {}}'])
def test_a_broken_tf_config_says_nothing(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert launched().processes == 1


def test_the_message_of_a_layer_reaches_the_user_of_fit(mirrored):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = syncbn.SyncBatchNormalization(axis=5)

        def call(self, x, training=None):
            return self.layer(x, training=training)

    model = Model()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="name dimensions of the input"):
        model.fit(np.ones((4, 3)), np.ones((4, 3)), verbose=0)
