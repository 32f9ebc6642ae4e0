"""`recalibrate` in one process, against NumPy in float64."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.models.recalibration import recalibrate
from tests.keras import KERAS_3, keras

L = keras.layers
NAMES = "first", "shared", "center"
BATCHES = np.split(np.random.default_rng(3).normal(1, 2, size=(37, 4)), [10, 20, 30])


def make_layers(dtype="float32"):
    """A chain in which one normalization is used twice; the last one has counts."""
    shared = L.BatchNormalization(name="shared", dtype=dtype)
    return [
        syncbn.SyncBatchNormalization(unbiased_moving_variance=True, name="first", dtype=dtype),
        L.Dense(5, "tanh", name="before", dtype=dtype),
        L.Dropout(0.5, seed=1, dtype=dtype),
        shared,
        L.Activation("tanh", dtype=dtype),
        shared,
        syncbn.SyncCentering(momentum=None, name="center", dtype=dtype),
        L.Dense(2, name="after", dtype=dtype),
    ]


class Chain(keras.Model):
    def __init__(self, layers, **kwargs):
        super().__init__(**kwargs)
        self.chain = layers

    def call(self, x, training=None):
        for layer in self.chain:
            x = layer(x, training=training) if isinstance(layer, L.Dropout) else layer(x)
        return x


def functional(layers, dtype):
    inputs = x = keras.Input((4,), dtype=dtype)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def sequential(layers, dtype):
    return keras.Sequential([keras.Input((4,), dtype=dtype), *layers])


def subclassed(layers, dtype):
    return Chain(layers, dtype=dtype)


def nested(layers, dtype):
    # Tracked in another order than they are called in.
    model = Chain([Chain(layers[5:], name="inner", dtype=dtype), *layers[:5]], dtype=dtype)
    model.chain = [*model.chain[1:], model.chain[0]]
    return model


def make_model(kind=sequential, dtype="float32"):
    keras.utils.set_random_seed(2)
    layers = make_layers(dtype)
    model = kind(layers, dtype)
    model(BATCHES[0].astype(dtype))
    rng = np.random.default_rng(4)
    for layer in layers[0], layers[3]:
        gamma, beta, *others = layer.get_weights()
        layer.set_weights([rng.normal(size=gamma.shape), rng.normal(size=beta.shape), *others])
    return model, {layer.name: layer for layer in layers}


def moments(values):
    """Count, mean and variance of rows; where there are none, one of each anyway."""
    return len(values), values.mean(0), values.var(0)


def inputs_of_layers(layers, batches, fixed):
    """What each normalization sees; those without ``fixed`` statistics use the batch's."""
    seen = {name: [] for name in NAMES}

    def normalize(name, x):
        seen[name].append(x)
        _, mean, variance = fixed[name] if name in fixed else moments(x)
        if name == "center":
            return x - mean
        gamma, beta = (np.float64(weight) for weight in layers[name].get_weights()[:2])
        return gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta

    kernel, bias = layers["before"].get_weights()
    for x in batches:
        x = np.tanh(normalize("first", x) @ kernel + bias)
        normalize("center", normalize("shared", np.tanh(normalize("shared", x))))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def bessel(count, mean, variance):
    return count, mean, variance * count / (count - 1)


def expected_statistics(layers, batches, exact):
    if not exact:
        seen = inputs_of_layers(layers, batches, {})
        found = {name: moments(values) for name, values in seen.items()}
        return {**found, "first": bessel(*found["first"])}
    found = {}
    for name in NAMES:
        found[name] = moments(inputs_of_layers(layers, batches, found)[name])
        if name == "first":
            found[name] = bessel(*found[name])
    return found


def statistics_of(model):
    """Count, mean and variance by the layers' own names."""
    return {
        name.rpartition("/")[2]: (one.count, one.mean, one.variance)
        for name, one in syncbn.moving_statistics(model).items()
    }


@pytest.mark.parametrize("kind", [functional, sequential, subclassed, nested])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_the_statistics_are_those_of_the_whole_dataset(kind, dtype, tolerance):
    model, layers = make_model(kind, dtype)
    batches = [batch.astype(dtype) for batch in BATCHES]  # the last one is smaller
    for exact in False, True:
        recalibrate(model, batches, exact=exact, verbose=0)
        found = statistics_of(model)
        for name, (count, mean, variance) in expected_statistics(layers, batches, exact).items():
            np.testing.assert_allclose(found[name][1], mean, rtol=tolerance, atol=tolerance)
            if name == "center":
                np.testing.assert_array_equal(found[name][0], np.full(5, count))
            else:
                np.testing.assert_allclose(found[name][2], variance, rtol=tolerance)


def variables_of(model):
    """All that a model has: weights, the states of seeds and metrics, the optimizer's."""
    optimizer = model.optimizer.variables
    optimizer = optimizer() if callable(optimizer) else optimizer
    return [*model.variables, *(v for m in model.metrics for v in m.variables), *optimizer]


def test_all_else_stays_as_it_is():
    model, layers = make_model(subclassed)
    extras = [L.Normalization(name="own_statistics"), L.SpectralNormalization(L.Dense(4))]
    model.chain[:0] = extras
    extras[0].adapt(BATCHES[0])
    model.compile("adam", "mse", metrics=["mae"])
    data = np.concatenate(BATCHES).astype("float32")
    model.fit(data, np.ones([len(data), 2]), epochs=2, verbose=0)
    variables = variables_of(model)
    statistics = {
        id(getattr(layers[name], statistic, None))
        for name in NAMES
        for statistic in ("moving_mean", "moving_variance", "moving_count")
    }
    before = [np.array(variable) for variable in variables]
    for exact in False, True:
        recalibrate(model, [data], exact=exact, verbose=0)
        after = variables_of(model)
        assert [id(variable) for variable in after] == [id(variable) for variable in variables]
        moved = {id(v) for v, old in zip(after, before, strict=True) if not np.array_equal(v, old)}
        assert moved == statistics - {id(None)}
    assert not any("call" in vars(layer) for layer in layers.values())
    assert not tf.config.functions_run_eagerly()
    model.fit(data, np.ones([len(data), 2]), verbose=0)


def test_a_mask_chooses_the_elements():
    ids = np.random.default_rng(5).integers(1, 9, size=(11, 6))
    ids[:, 4:], ids[3:8, 1:], ids[8:] = 0, 0, 0  # the last batch has nothing that is not masked
    norms = [syncbn.SyncBatchNormalization(name="ours"), L.BatchNormalization(name="plain")]
    embedding = L.Embedding(9, 3, mask_zero=True)
    model = keras.Sequential([keras.Input((6,), dtype="int32"), embedding, *norms, L.GRU(2)])
    recalibrate(model, np.split(ids, [5, 8]), exact=True, verbose=0)
    found = statistics_of(model)
    seen = np.float64(embedding(ids).numpy()[ids > 0])
    for name in "ours", "plain":
        _, mean, variance = moments(seen)
        np.testing.assert_allclose(found[name][1], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found[name][2], variance, rtol=1e-6)
        seen = (seen - mean) / np.sqrt(variance + 1e-3)


@pytest.mark.parametrize("axis", [1, -1])
def test_a_large_mean_costs_no_digits(axis):
    data = np.random.default_rng(6).normal(1e4, 1, size=(200, 3, 40, 3)).astype("float32")
    model = keras.Sequential([keras.Input(data.shape[1:]), L.BatchNormalization(axis, name="norm")])
    recalibrate(model, np.split(data, [60, 70, 150]), verbose=0)
    ((_, mean, variance),) = statistics_of(model).values()
    rows = np.moveaxis(np.float64(data), axis, -1).reshape(-1, 3)
    np.testing.assert_array_equal(mean, rows.mean(0).astype("float32"))
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_frozen_layer_keeps_its_statistics_and_uses_them(exact):
    frozen = syncbn.SyncBatchNormalization(epsilon=0, name="frozen")
    model = keras.Sequential([keras.Input((4,)), frozen, L.BatchNormalization(name="norm")])
    syncbn.set_moving_statistics(model, {"frozen": (np.full(4, 3.0), np.full(4, 4.0))})
    frozen.trainable = False
    recalibrate(model, BATCHES, exact=exact, verbose=0)
    _, mean, variance = moments((np.concatenate(BATCHES) - 3) / 2)
    np.testing.assert_array_equal(statistics_of(model)["frozen"][1:], [[3] * 4, [4] * 4])
    np.testing.assert_allclose(statistics_of(model)["norm"][1], mean, rtol=1e-6)
    np.testing.assert_allclose(statistics_of(model)["norm"][2], variance, rtol=1e-6)


def test_a_layer_that_inference_does_not_call_keeps_its_statistics():
    class Auxiliary(Chain):
        def call(self, x, training=None):
            return (self.chain[1] if training else self.chain[0])(x)

    norms = L.BatchNormalization(name="used"), L.BatchNormalization(name="unused")
    for norm in norms:
        norm.build((None, 4))
    model = Auxiliary(list(norms))
    model(BATCHES[0])
    before = statistics_of(model)["unused"]
    for exact in False, True:
        recalibrate(model, BATCHES, exact=exact, verbose=0)
        np.testing.assert_array_equal(statistics_of(model)["unused"][1:], before[1:])
        mean = np.concatenate(BATCHES).mean(0)
        np.testing.assert_allclose(statistics_of(model)["used"][1], mean, rtol=1e-6)


def test_functions_within_the_model_are_neither_passed_by_nor_changed():
    class Compiled(Chain):
        @tf.function
        def call(self, x, training=None):
            return super().call(x, training)

    model = Compiled([L.Dense(3), L.BatchNormalization()])
    data = np.concatenate(BATCHES).astype("float32")
    model(data[:20], training=False)  # traced before, and for other batches only afterwards
    recalibrate(model, [data[:20], data[20:]], verbose=0)
    seen = np.float64(model.chain[0](data).numpy())
    expected = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-3)
    for size in 20, len(data):
        np.testing.assert_allclose(model(data[:size]), expected[:size], rtol=1e-4, atol=1e-5)


class Sequence(keras.utils.PyDataset if KERAS_3 else keras.utils.Sequence):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"x": np.concatenate(BATCHES)[index::2]}, np.zeros(3)


def test_any_iterable_of_batches_will_do():
    inputs = keras.Input((4,), name="x")
    model = keras.Model({"x": inputs}, L.BatchNormalization(name="norm")(inputs))
    labelled = [({"x": x}, ["never looked at"]) for x in BATCHES]
    dataset = tf.data.Dataset.from_tensor_slices({"x": np.concatenate(BATCHES)}).batch(9)
    weighted = [(*batch, np.ones(3)) for batch in labelled]
    for data in labelled, dataset, weighted, Sequence(), (batch for batch in labelled):
        norm = model.get_layer("norm")
        norm.set_weights([np.ones_like(weight) for weight in norm.get_weights()])
        recalibrate(model, data, verbose=0)
        mean = np.concatenate(BATCHES).mean(0)
        np.testing.assert_allclose(statistics_of(model)["norm"][1], mean, rtol=1e-6)
    for data in labelled, dataset.repeat():
        recalibrate(model, data, steps=1, verbose=0)
        mean = np.concatenate(BATCHES)[: 10 if data is labelled else 9].mean(0)
        np.testing.assert_allclose(statistics_of(model)["norm"][1], mean, rtol=1e-6)


class Endless(Sequence):
    """A sequence that is an iterator without end, which has been used, as legacy Keras has them."""

    def __init__(self):
        super().__init__()
        self.numbers = itertools.cycle([1, 0])

    def __iter__(self):
        return self

    def __next__(self):
        return self[next(self.numbers)]

    def __getitem__(self, index):
        assert index < 2, "Asked to retrieve what is not there"
        return super().__getitem__(index)


class Long:
    """Goes on after its length, as some pipelines do."""

    def __len__(self):
        return 3

    def __iter__(self):
        return itertools.cycle([({"x": x},) for x in [*BATCHES[:3], BATCHES[3] + 100]])


@pytest.mark.parametrize(
    ("data", "steps", "rows"),
    [
        (Endless, None, np.concatenate(BATCHES)),
        (Endless, 5, np.concatenate(BATCHES)),
        (Endless, 1, np.concatenate(BATCHES)[::2]),
        (Long, None, np.concatenate(BATCHES[:3])),
        (Long, 2, np.concatenate(BATCHES[:2])),
    ],
)
def test_an_iterable_ends_at_its_length(data, steps, rows, capsys):
    inputs = keras.Input((4,), name="x")
    norms = L.BatchNormalization(name="norm"), L.BatchNormalization(name="next")
    model = keras.Model({"x": inputs}, norms[1](norms[0](inputs)))
    data = data()
    if isinstance(data, Endless):
        next(data)
    recalibrate(model, data, exact=steps is None, steps=steps, verbose=2)
    batches = min(len(data), steps) if steps else 2 * len(data)
    assert f"{batches}/{batches}" in capsys.readouterr().out
    np.testing.assert_allclose(statistics_of(model)["norm"][1], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics_of(model)["norm"][2], rows.var(0), rtol=1e-6)


def test_an_image_generator_is_gone_through_once():
    images = np.random.default_rng(7).normal(3, 2, size=(10, 4, 4, 1)).astype("float32")
    generator = keras.preprocessing.image.ImageDataGenerator()
    flow = generator.flow(images, np.arange(10), batch_size=4, shuffle=True, seed=1)
    next(flow)
    model = keras.Sequential([keras.Input((4, 4, 1)), L.BatchNormalization(name="norm")])
    recalibrate(model, flow, exact=True, verbose=0)
    np.testing.assert_allclose(statistics_of(model)["norm"][1], [images.mean()], rtol=1e-6)
    np.testing.assert_allclose(statistics_of(model)["norm"][2], [images.var()], rtol=1e-6)


class Stepping(keras.Model):
    """A model that other code than `call` gives its inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = L.BatchNormalization(name="norm")
        self.step = None

    def call(self, x, training=False):
        return self.norm(x, training=training)

    def predict_step(self, data):
        return self.step(self, data)


def divides(model, data):
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    return model(tf.cast(x, tf.float32) / 255, training=False)


def looks_twice(model, data):
    x, *_ = data
    x = tf.cast(x, tf.float32)
    return (model(x, training=False) + model(tf.reverse(x, [1]), training=False)) / 2


def by_name(model, data):
    return model(tf.cast(data["image"], tf.float32), training=False), data["label"]


def of_four(model, data):
    a, b, _, weight = data
    return weight * (model(tf.cast(a, tf.float32), training=False) + model(b, training=False))


def in_python(model, data):
    return model(tf.constant(data[0].numpy() / 255.0, tf.float32), training=False)


PIXELS = np.random.default_rng(8).integers(0, 256, size=(30, 4)).astype("uint8")
LABELS = np.array(["a", "b", "c"] * 10)


@pytest.mark.parametrize(
    ("step", "data", "rows"),
    [
        (divides, (PIXELS, LABELS), PIXELS / 255),
        (divides, PIXELS, PIXELS / 255),
        (looks_twice, (PIXELS, LABELS), np.concatenate([PIXELS, PIXELS[:, ::-1]])),
        (by_name, {"image": PIXELS, "label": LABELS}, np.float64(PIXELS)),
        (
            of_four,
            (PIXELS, PIXELS + np.float32(7), LABELS, np.ones([30, 1], "float32")),
            np.concatenate([PIXELS, PIXELS + 7.0]),
        ),
        (in_python, (PIXELS, LABELS), PIXELS / 255),
    ],
    ids=["divides", "x", "looks_twice", "by_name", "of_four", "in_python"],
)
def test_the_model_runs_as_predict_runs_it(step, data, rows):
    model = Stepping()
    model(np.zeros([1, 4], "float32"))
    model.step = step
    if step is in_python:
        model.compile(run_eagerly=True)
    batches = [tf.nest.map_structure(lambda v, i=i: v[i::3], data) for i in range(3)]
    for dataset in batches, tf.data.Dataset.from_tensor_slices(data).batch(7):
        model.norm.set_weights([np.ones([4])] * 4)
        recalibrate(model, dataset, exact=True, verbose=0)
        np.testing.assert_allclose(model.norm.moving_mean, rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(model.norm.moving_variance, rows.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    "batch",
    [X := np.ones([3, 4], "float32"), (X,), (X, X), [X, X], {"x": X}],
    ids=["x", "(x,)", "(x, y)", "[x, y]", "{x}"],
)
def test_a_step_gets_what_predict_gives_it(batch):
    class Batches(Sequence):
        def __getitem__(self, index):
            return batch

    structures = []

    def record(model, data):
        structures.append(tf.nest.map_structure(lambda v: v.shape.rank, data))
        return model(tf.nest.flatten(data)[0], training=False)

    model = Stepping()
    model(X)
    model.step = record
    model.predict(Batches(), verbose=0)
    by_predict = structures.pop()
    recalibrate(model, Batches(), verbose=0)
    assert structures.pop() == by_predict


@pytest.mark.parametrize("scope", [False, True], ids=["outside_of_the_scope", "in_the_scope"])
def test_under_a_strategy_every_replica_gets_them(mirrored, scope):
    replicas = mirrored(2)
    with replicas.strategy.scope():
        model, layers = make_model()
        if scope:
            recalibrate(model, BATCHES, exact=True, verbose=0)
    if not scope:
        recalibrate(model, BATCHES, exact=True, verbose=0)
    expected = expected_statistics(layers, BATCHES, exact=True)
    for name in NAMES[::2]:
        for value in replicas.moving([layers[name]])["moving_mean"].values():
            np.testing.assert_allclose(value, expected[name][1], rtol=1e-6, atol=1e-6)


def test_the_progress_is_shown(capsys):
    model, _ = make_model()
    recalibrate(model, (batch for batch in BATCHES))
    assert "4/Unknown" in capsys.readouterr().out
    recalibrate(model, (batch for batch in BATCHES), verbose=2)
    assert "4/4" in capsys.readouterr().out
    recalibrate(model, BATCHES, exact=True, verbose=2)
    assert "12/12" in capsys.readouterr().out
    recalibrate(model, BATCHES, verbose=0)
    assert capsys.readouterr().out == ""


def failing():
    yield BATCHES[0]
    raise OSError("the disk is gone")


def with_nan():
    bad = np.copy(BATCHES[2])
    bad[1, 1] = np.nan
    return [BATCHES[0], bad]


class Shrinking:
    """Gives a batch less with each pass."""

    def __init__(self):
        self.batches = list(BATCHES)

    def __iter__(self):
        yield from self.batches
        del self.batches[-1]


class WithoutEnd(keras.utils.Sequence):
    if KERAS_3:
        num_batches = None
    else:

        def __len__(self):
            raise OSError("no end in sight")

    def __getitem__(self, index):
        return BATCHES[0]


class Looping(L.Layer):
    def __init__(self):
        super().__init__(name="looping")
        self.norm = L.BatchNormalization(name="norm")

    def build(self, shape):
        self.norm.build(shape)
        super().build(shape)

    def call(self, x):
        one = tf.constant(1)
        return tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, self.norm(x)), (one, x))[1]


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (with_nan(), {}, ValueError, "NaN or infinity in the inputs of first"),
        (with_nan(), {"exact": True}, ValueError, "NaN or infinity in the inputs of first"),
        ([], {}, ValueError, "empty `dataset`"),
        ([np.zeros([0, 4])], {}, ValueError, "batches are empty"),
        (failing, {}, OSError, "the disk is gone"),
        (np.zeros([3, 4]), {}, TypeError, r"Received: ndarray.*from_tensor_slices\(x\).batch"),
        (3, {}, TypeError, "iterable of batches.*Received: int"),
        (list(BATCHES[0]), {}, ValueError, r"samples, of shape \(4,\), for .*dataset\.batch\(32\)"),
        (
            lambda: tf.data.Dataset.from_tensor_slices((BATCHES[0], BATCHES[0])),
            {"exact": True},
            ValueError,
            r"must consist of batches. Received: single samples, of shape \(4,\)",
        ),
        (iter(BATCHES), {"exact": True}, ValueError, "3 times. Received: an iterator"),
        (
            lambda: tf.data.Dataset.range(1).repeat(),
            {},
            ValueError,
            "repeats forever. Give `steps`",
        ),
        (Shrinking, {"exact": True}, ValueError, "4 batches at first, and then 3"),
        (WithoutEnd, {}, (ValueError, OSError), "Give `steps`|no end in sight"),
        (BATCHES, {"steps": 0}, ValueError, "Received: steps=0"),
        ([np.zeros([3, 7])], {}, (ValueError, tf.errors.InvalidArgumentError), "7"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(dataset, options, error, message):
    model, layers = make_model()
    before = model.get_weights()
    dataset = dataset() if callable(dataset) else dataset  # not before TensorFlow may start
    with pytest.raises(error, match=message):
        recalibrate(model, dataset, verbose=0, **options)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert not any("call" in vars(layer) for layer in layers.values())
    assert not tf.config.functions_run_eagerly()


def test_the_layer_is_named_at_which_it_stops_being_finite():
    model, layers = make_model()
    layers["before"].set_weights([np.full(w.shape, np.inf) for w in layers["before"].get_weights()])
    for exact in False, True:
        with pytest.raises(ValueError, match="inputs of shared"):
            recalibrate(model, BATCHES, exact=exact, verbose=0)


def test_models_that_cannot_be_recalibrated():
    unbuilt = Chain([L.BatchNormalization()])
    with pytest.raises(ValueError, match="a model that is built"):
        recalibrate(unbuilt, BATCHES)
    without = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    with pytest.raises(ValueError, match="with none"):
        recalibrate(without, BATCHES)
    frozen, _ = make_model()
    frozen.trainable = False
    with pytest.raises(ValueError, match="with 3, all of them frozen"):
        recalibrate(frozen, BATCHES)
    looping = keras.Sequential([keras.Input((4,)), Looping()])
    before = looping.get_weights()
    with pytest.raises(NotImplementedError, match=r"(?s)a call of looping/norm in one"):
        recalibrate(looping, BATCHES, verbose=0)
    for now, then in zip(looping.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_it_is_called_eagerly_and_outside_of_replicas(mirrored):
    model, _ = make_model()
    with pytest.raises(RuntimeError, match="must be called eagerly"):
        tf.function(lambda: recalibrate(model, BATCHES))()
    with pytest.raises(RuntimeError, match="must be called eagerly"):
        mirrored(2).strategy.run(lambda: recalibrate(model, BATCHES))
