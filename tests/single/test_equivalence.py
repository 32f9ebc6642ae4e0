"""`check_equivalence`: a right model passes, and each fault is found and named."""

import re

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src import cli
from syncbn._src.models.equivalence import diagnosis
from syncbn._src.models.equivalence.check import check_equivalence
from syncbn._src.models.equivalence.differences import compare
from syncbn.testing import assert_equivalent
from tests import processes
from tests.keras import KERAS_3, keras
from tests.two_optimizers import TwoOptimizers

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(2, 3, size=(8, 4)).astype(np.float32)
Y = GENERATOR.normal(size=(8, 2)).astype(np.float32)
ALL_QUANTITIES = [
    diagnosis.OUTPUTS,
    diagnosis.INPUT_GRADIENTS,
    diagnosis.PARAMETER_GRADIENTS,
    diagnosis.STATISTICS,
    diagnosis.TRAINING,
]


def dense(*layers, model=keras.Sequential, optimizer="adam", loss="mse"):
    """Returns a function that builds a small model around layers, each made by a function."""

    def build():
        made = [
            keras.Input((4,)),
            keras.layers.Dense(3, name="first"),
            *(layer() for layer in layers),
            keras.layers.Dense(2, name="last"),
        ]
        built = model(made)
        if optimizer is not None:
            built.compile(optimizer() if callable(optimizer) else optimizer, loss)
        return built

    return build


def norm():
    return syncbn.SyncBatchNormalization(name="norm")


def plain():
    return keras.layers.BatchNormalization(name="plain")


def wrong(found):
    return sorted({row.quantity for row in found.rows if not row.ok})


def test_a_right_model_passes_in_every_quantity():
    found = check_equivalence(dense(norm, lambda: syncbn.SyncCentering(name="center")), (X, Y))
    assert found.equivalent, found
    assert not found.advice
    assert list(dict.fromkeys(row.quantity for row in found.rows)) == ALL_QUANTITIES
    names = {row.name for row in found.rows}
    assert names >= {"output 0", "input", "first/kernel", "norm/gamma", "norm/moving_variance"}
    assert "center/moving_mean" in names
    assert str(found).startswith("On 2 replicas the model does what it does on one.")


def test_a_plain_normalization_is_found_and_named():
    found = check_equivalence(dense(plain), (X, Y))
    assert wrong(found) == sorted(ALL_QUANTITIES)
    assert "Not synchronized: plain. A plain BatchNormalization" in found.advice[0]
    assert "convert_sync_batchnorm" in found.advice[0]
    text = str(found)
    assert text.startswith("On 2 replicas the model does not do")
    assert "DIFFERS" in text
    assert found.advice[0] in text


def test_the_synchronized_one_of_keras_passes():
    layer = lambda: keras.layers.BatchNormalization(synchronized=True)  # noqa: E731
    assert_equivalent(dense(layer), (X, Y))


class OwnStep(keras.Sequential):
    """A training step of its own, whose loss is a mean over this replica's samples."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.scale * tf.reduce_mean((self(x, training=True) - y) ** 2)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


class NotDivided(OwnStep):
    scale = 1.0


class DividedTwice(OwnStep):
    @property
    def scale(self):
        return 1 / tf.distribute.get_strategy().num_replicas_in_sync ** 2


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (NotDivided, "train_step are 2 times those of one replica: the loss is not divided by"),
        (DividedTwice, "train_step are 0.5 times those of one replica: the loss is divided by.*tw"),
    ],
)
def test_a_training_step_that_scales_its_loss_wrongly(model, advice):
    found = check_equivalence(dense(norm, model=model), (X, Y))
    assert wrong(found) == [diagnosis.TRAINING]
    (received,) = found.advice
    assert re.search(advice, received), received


def several_in_one():
    by_name = keras.optimizers.OptimizerMap(keras.optimizers.Adam(), {".*": keras.optimizers.SGD()})
    return keras.optimizers.MultiOptimizer(by_name)


OPTIMIZERS = [keras.optimizers.Adam]
if hasattr(keras.optimizers, "MultiOptimizer"):
    OPTIMIZERS.append(several_in_one)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_optimizer_of_a_model_gives_its_gradients(make):
    def build():
        model = TwoOptimizers()
        model.compile(make(), keras.optimizers.SGD(1e-3))
        return model

    found = check_equivalence(build, (X, Y))
    assert wrong(found) == [diagnosis.TRAINING]
    assert found.advice[0].startswith("All gradients of train_step are 2 times those of one")


def test_a_loss_that_scales_wrongly():
    found = check_equivalence(
        dense(norm, optimizer=None),
        (X, Y),
        loss=lambda y, outputs: tf.reduce_mean((y - outputs) ** 2),
    )
    assert wrong(found) == [diagnosis.INPUT_GRADIENTS, diagnosis.PARAMETER_GRADIENTS]
    assert found.advice[0].startswith("All gradients of `loss` are 2 times those of one replica")


class ReducesItsGradients(keras.layers.Layer):
    """Adds up the gradient of its scale over the replicas, as the optimizer does again."""

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")
        super().build(shape)

    def call(self, x):
        @tf.custom_gradient
        def added_up(scale):
            def gradient(dy):
                context = tf.distribute.get_replica_context()
                return context.all_reduce(tf.distribute.ReduceOp.SUM, dy)

            return tf.identity(scale), gradient

        return x * added_up(tf.convert_to_tensor(self.scale))


def test_a_double_reduction_is_found_and_named():
    found = check_equivalence(dense(norm, lambda: ReducesItsGradients(name="twice")), (X, Y))
    assert wrong(found) == [diagnosis.TRAINING, diagnosis.PARAMETER_GRADIENTS]
    assert [row.name for row in found.rows if not row.ok] == ["twice/scale"] * 2
    (advice,) = found.advice
    assert advice.startswith("Double reduction: the gradients of twice/scale are 2 times too large")


def test_dropout_is_reported_as_randomness():
    found = check_equivalence(dense(norm, lambda: keras.layers.Dropout(0.5, name="drop")), (X, Y))
    assert not found.equivalent
    assert wrong(found) == [diagnosis.REPEATED]
    assert "Random layers: drop (Dropout)" in found.advice[0]


def test_what_is_not_finite_is_no_randomness():
    found = check_equivalence(dense(norm, optimizer=None), np.full_like(X, np.nan))
    assert found.advice == ["Not finite, even on one replica: output 0."]


class RandomStep(NotDivided):
    @property
    def scale(self):
        return tf.random.uniform([])


def test_a_training_step_that_is_random():
    found = check_equivalence(dense(norm, model=RandomStep), (X, Y))
    assert wrong(found) == [diagnosis.REPEATED_TRAINING]
    assert "since train_step gives different results at each call" in found.advice[0]


def test_a_local_layer_is_named():
    layer = lambda: syncbn.SyncBatchNormalization(communicator="local", name="alone")  # noqa: E731
    found = check_equivalence(dense(layer, optimizer=None), X)
    assert found.advice[0] == "Not synchronized: alone, by communicator='local'."


def test_a_layer_that_synchronizes_within_groups_is_named():
    layer = lambda: syncbn.SyncBatchNormalization(group_size=2, name="grouped")  # noqa: E731
    found = check_equivalence(dense(layer, optimizer=None), X, 4)
    assert not found.equivalent
    assert found.advice[0].startswith(
        "Synchronized within groups or virtual batches only, as asked for: grouped."
    )


class CentersItself(keras.layers.Layer):
    def call(self, x):
        return x - tf.reduce_mean(x, 0)


def test_a_layer_that_nobody_knows():
    found = check_equivalence(dense(CentersItself, optimizer=None), X)
    assert not found.equivalent
    assert "uses a quantity of its own replica" in found.advice[0]


def test_what_is_not_finite_differs():
    expected = np.ones((2, 3))
    for value in np.inf, np.nan:
        actual = np.array([expected, np.where(np.eye(2, 3) > 0, value, 1.0)])
        (row,) = compare(diagnosis.TRAINING, ["kernel"], [actual], [expected], 1e-3, [1.0])
        assert not row.ok
        assert row.factor is None


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_dtypes(dtype):
    # With other weights, scaled gradients may be too large for float16, and a step is skipped.
    keras.utils.set_random_seed(0)
    policy = keras.mixed_precision.set_global_policy
    before = keras.mixed_precision.global_policy()
    policy(dtype)
    try:
        right = check_equivalence(dense(norm), (X, Y))
        faulty = check_equivalence(dense(plain), (X, Y))
    finally:
        policy(before)
    assert right.equivalent, right
    assert diagnosis.TRAINING in wrong(faulty), faulty


def nested():
    image, code = (
        keras.Input((4, 4, 3), name="image"),
        keras.Input((2,), dtype="int32", name="code"),
    )
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.ReLU()(syncbn.SyncBatchNormalization(name="norm")(x))
    x = keras.layers.Flatten()(x)
    words = keras.layers.Flatten()(keras.layers.Embedding(5, 3, name="words")(code))
    x = keras.layers.Concatenate()([x, words])
    outputs = {"a": keras.layers.Dense(1, name="a")(x), "b": keras.layers.Dense(3, name="b")(x)}
    model = keras.Model({"image": image, "code": code}, outputs)
    model.compile("sgd", {"a": "mse", "b": "mse"})
    return model


def test_nested_inputs_and_outputs():
    x = {
        "image": GENERATOR.normal(size=(6, 4, 4, 3)),
        "code": GENERATOR.integers(5, size=(6, 2)).astype(np.int32),
    }
    y = {"a": GENERATOR.normal(size=(6, 1)), "b": GENERATOR.normal(size=(6, 3))}
    found = check_equivalence(nested, (x, y))
    assert found.equivalent, found
    names = [row.name for row in found.rows if row.quantity == diagnosis.INPUT_GRADIENTS]
    assert names == ["input/image"]
    assert len([row for row in found.rows if row.name == "words/embeddings"]) == 2


@pytest.mark.parametrize("split", [(3, 1), (4, 0)])
def test_unequal_shares(split):
    def loss(y, outputs):
        return tf.reduce_mean((y - outputs) ** 2, -1)

    right = check_equivalence(dense(norm), (X[:4], Y[:4]), split=split, loss=loss)
    assert right.equivalent, right
    assert "train_step was not checked: with unequal shares" in right.advice[0]
    if 0 not in split:
        assert not check_equivalence(dense(plain), (X[:4], Y[:4]), split=split).equivalent


def test_a_batch_without_targets_does_without_the_compiled_loss():
    found = check_equivalence(dense(norm), X)
    assert found.equivalent
    assert "needs a batch of (x, y)" in found.advice[0]
    assert diagnosis.TRAINING not in {row.quantity for row in found.rows}


def test_clipping_each_replicas_gradient_is_found():
    clipping = dense(norm, optimizer=lambda: keras.optimizers.SGD(clipnorm=0.01))
    if KERAS_3:
        found = check_equivalence(clipping, (X, Y))
        assert wrong(found) == [diagnosis.TRAINING]
        assert "(clipped, say)" in found.advice[0]
    else:  # which clips what it has added up
        assert_equivalent(clipping, (X, Y))


@pytest.mark.skipif(KERAS_3, reason="Keras 2 has them")
def test_a_legacy_optimizer():
    assert_equivalent(dense(norm, optimizer=keras.optimizers.legacy.Adam), (X, Y))


def test_assert_equivalent_raises_the_table():
    with pytest.raises(AssertionError, match=r"largest difference[\s\S]*convert_sync_batchnorm"):
        assert_equivalent(dense(plain, optimizer=None), X)
    assert_equivalent(dense(plain, optimizer=None), X, rtol=1e9)


class SelfBuilt(keras.Model):
    """Not built before it is called."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = keras.layers.Dense(3), syncbn.SyncBatchNormalization()

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)


def test_a_subclassed_model():
    found = check_equivalence(SelfBuilt, X)
    assert found.equivalent, found
    assert len(found.rows) == 1 + 1 + 4 + 2


def test_the_process_stays_as_it_was():
    model = dense(norm)()
    before, state = model.get_weights(), np.random.get_state()[1].copy()
    check_equivalence(dense(norm), (X, Y))
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert not tf.distribute.has_strategy()


def growing():
    sizes = iter([2, 3])
    return lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(next(sizes))])


@pytest.mark.parametrize(
    ("build_model", "batch", "options", "error", "message"),
    [
        ("no function", X, {}, TypeError, "must be a function that returns"),
        (dense(norm), X, {"rtol": -1.0}, ValueError, "must be 0 or more. Received: rtol=-1.0"),
        (dense(norm), X, {"rtol": np.nan}, ValueError, "must be 0 or more. Received: rtol=nan"),
        (
            lambda: "no model",
            X,
            {},
            TypeError,
            "must return a tf.keras.Model. Received: builtins.s",
        ),
        (growing(), X, {}, ValueError, r"weight 0 of the first is trainable \(4, 2\), of the sec"),
        (dense(norm), X[:7], {}, ValueError, "Received: 7 samples and replicas=2"),
        (dense(norm), X[:0], {}, ValueError, "the same number of samples"),
        (dense(norm), (X, Y[:2]), {}, ValueError, r"Received: \(8, 4\), \(2, 2\)"),
        (dense(norm), (X, X, X, X), {}, ValueError, "Received: a tuple of 4"),
        (dense(norm), X, {"replicas": 1}, ValueError, "must be 2 at least. Received: replicas=1"),
        (dense(norm), X, {"split": (3, 3)}, ValueError, r"Received: split=\(3, 3\)"),
        (dense(norm), X, {"split": (9, -1)}, ValueError, r"Received: split=\(9, -1\)"),
        (dense(norm), X, {"replicas": 999, "split": [8] + [0] * 998}, RuntimeError, "999 replicas"),
    ],
)
def test_bad_arguments(build_model, batch, options, error, message):
    with pytest.raises(error, match=message):
        check_equivalence(build_model, batch, **options)


def test_a_model_is_no_function_that_builds_it_and_a_dataset_no_batch():
    with pytest.raises(TypeError, match="must be a function that returns a new model"):
        check_equivalence(dense(norm)(), X)
    with pytest.raises(TypeError, match=r"Give next\(iter\(dataset\)\)"):
        check_equivalence(dense(norm), tf.data.Dataset.from_tensors(X))


def test_within_a_strategy_it_is_refused(mirrored):
    with mirrored(2).strategy.scope(), pytest.raises(RuntimeError, match="Call it outside"):
        check_equivalence(dense(norm), X)


def test_among_workers_of_tf_distribute_it_is_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}}')
    with pytest.raises(RuntimeError, match="Received: TF_CONFIG"):
        check_equivalence(dense(norm), X)


def command(*arguments):
    return cli.main(["check", *arguments])


HERE = "tests.single.test_equivalence"
RIGHT, FAULTY = dense(norm), dense(plain)


def make_batch():
    return X, Y


def test_the_command_line(capsys):
    assert command(f"{HERE}:RIGHT", "--batch-from", f"{HERE}:make_batch") == 0
    assert diagnosis.TRAINING in capsys.readouterr().out
    assert command(f"{HERE}:FAULTY", "--input-shape", "4", "--split", "4,2") == 1
    assert "convert_sync_batchnorm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((f"{HERE}", "--input-shape", "4"), "given as module:function. Received: tests"),
        ((f"{HERE}:nobody", "--input-shape", "4"), "has no function nobody"),
        (("no_such:build", "--input-shape", "4"), "There is no module no_such"),
        (
            (f"{HERE}:RIGHT", "--input-shape", "4", "--replicas", "3"),
            "a multiple of --replicas, 3, unless --split says how many samples each replica gets. "
            "Received: --batch 16. Use --split 6,5,5, or 15 samples.",
        ),
        (
            (f"{HERE}:RIGHT", "--input-shape", "4", "--batch", "9"),
            "Received: --batch 9. Use --split 5,4, or 8 samples.",
        ),
        (
            (f"{HERE}:RIGHT", "--batch-from", f"{HERE}:make_batch", "--replicas", "5"),
            f"Received: 8 samples of {HERE}:make_batch. Use --split 2,2,2,1,1, or 5 samples.",
        ),
        (
            (f"{HERE}:RIGHT", "--input-shape", "4", "--batch", "9", "--split", "5,5"),
            "9 in all. Received: --split 5,5 and --batch 9.",
        ),
        (
            (f"{HERE}:RIGHT", "--input-shape", "4", "--split", "5,3", "--replicas", "3"),
            "for each of 3 replicas, not negative, 8 in all. Received: --split 5,3 and --batch 8.",
        ),
        (
            (f"{HERE}:RIGHT", "--input-shape", "4", "--replicas", "1"),
            "--replicas must be 2 at least. Received: 1",
        ),
        ((f"{HERE}:RIGHT", "--input-shape", "5"), "Error"),
    ],
)
def test_bad_usage_of_the_command_line(arguments, message, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    # Only the user's own code needs a traceback.
    assert ("Traceback" in error) == (message == "Error")


def test_it_splits_the_cpu_by_itself_or_says_how():
    finished = processes.run([("python", processes.program("splits_the_cpu"), {})])
    assert finished.code == 0, finished.output
    assert "Received: 0 GPUs and 3 CPU devices. Put this first" in finished.output
