"""`advise` against NumPy in float64, and against what happens in training."""

import json

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.cli import main
from syncbn._src.models.advice_estimation import advise
from tests import oracle
from tests.keras import keras

L = keras.layers
REPLICAS, SAMPLES = 4, 3


def make_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            L.BatchNormalization(name="first"),
            L.Conv2D(4, 3, 2, activation="tanh"),
            syncbn.SyncCentering(name="center"),
            L.Dropout(0.5),
            L.Conv2D(3, 2, name="last_conv"),
            syncbn.SyncBatchNormalization(name="last", momentum=None),
            L.Flatten(),
            L.Dense(1),
        ]
    )


def samples(number, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 3, (number, 6, 6, 2)) + rng.normal(0, 2, (number, 1, 1, 2))
    return x.astype("float32")


def seen_by_layers(model, x):
    """What each normalization sees where all before it have the statistics of all of ``x``."""
    seen = {}
    for layer in model.layers:
        if hasattr(layer, "moving_mean"):
            rows = seen[layer.name] = np.float64(x)
            mean = rows.mean(tuple(range(rows.ndim - 1)))
            if isinstance(layer, syncbn.SyncCentering):
                x = rows - mean
            else:
                variance = rows.var(tuple(range(rows.ndim - 1)))
                x = (rows - mean) / np.sqrt(variance + layer.epsilon)
        else:
            x = layer(np.float32(x), training=False).numpy()
    return seen


def test_it_observes_what_replicas_see_and_changes_nothing():
    model, x = make_model(), samples(5 * REPLICAS * SAMPLES + 2)
    before = [weight.numpy() for weight in model.weights]
    # Batches of another size than that of a replica; what is left over is left out.
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x)))).batch(7)
    found = advise(model, data, REPLICAS, batch=SAMPLES, batches=20, verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)

    runs = [seen_by_layers(model, run) for run in np.split(x[: 20 * SAMPLES], 5)]
    assert [layer.name for layer in found.layers] == ["first", "center", "last"]
    for layer in found.layers:
        rows = np.concatenate([run[layer.name] for run in runs])
        batches = rows.reshape(20, -1, rows.shape[-1])
        centers = layer.name == "center"
        epsilon = 0.0 if centers else 1e-3
        mean = batches.mean((0, 1))
        variance = np.mean(batches.var(1) + (batches.mean(1) - mean) ** 2, 0)
        error = oracle.measured_errors(batches, mean, variance, epsilon)
        # Estimated without bias: the mean of all is nearer to these batches than the true one.
        assert layer.errors[0].mean == pytest.approx(error[0] * np.sqrt(20 / 19), rel=1e-3)
        if centers:
            assert layer.errors[0].variance is None
            assert layer.errors[0].output == layer.errors[0].mean
        else:
            assert layer.errors[0].variance == pytest.approx(error[1], rel=0.1)
        assert layer.elements == batches.shape[1]
        assert [one.replicas for one in layer.errors] == [1, 2, 4]
    assert (found.replicas, found.batch) == (REPLICAS, SAMPLES)


def test_what_is_left_out_by_a_mask_does_not_count():
    model = keras.Sequential(
        [keras.Input((5, 3)), L.Masking(0.0), syncbn.SyncBatchNormalization(name="norm")]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(4, 2, (400, 5, 3)).astype("float32")
    x[:, 2:] = 0.0
    found = advise(model, [x], 2, batch=4, batches=100, verbose=0).layers[0]
    rows = x[:, :2].reshape(100, 8, 3).astype("float64")
    assert found.elements == 8
    error = oracle.measured_errors(rows, rows.mean((0, 1)), rows.reshape(-1, 3).var(0), 1e-3)
    assert found.errors[0].mean == pytest.approx(error[0], rel=0.05)


def test_channels_first():
    first = keras.Sequential([keras.Input((2, 6, 6)), L.BatchNormalization(axis=1)])
    last = keras.Sequential([keras.Input((6, 6, 2)), L.BatchNormalization()])
    x = samples(48)
    advices = [
        advise(model, [data], 2, batch=3, verbose=0).layers[0].errors
        for model, data in ((first, np.moveaxis(x, -1, 1)), (last, x))
    ]
    np.testing.assert_allclose(*advices, rtol=1e-6)


def digits(pixels):
    layers = [keras.Input((8, 8, 1))]
    for number, strides in enumerate((2, 2, 2 if pixels == 1 else 1)):
        layers += [
            L.Conv2D(16 * 2**number, 3, strides, padding="same", use_bias=False),
            L.BatchNormalization(name=f"norm_{number}"),
            L.Activation("swish"),
        ]
    return keras.Sequential([*layers, L.Flatten(), L.Dense(10)])


@pytest.fixture(scope="module")
def digits_batches():
    import digits_data

    train, _ = digits_data.load_data()
    return tf.data.Dataset.from_tensor_slices(tuple(train)).batch(2)


@pytest.mark.parametrize("seed", range(3))
def test_networks_that_end_at_one_pixel_and_at_four_are_told_apart(digits_batches, seed):
    keras.utils.set_random_seed(seed)
    needs_it, does_not = (advise(digits(pixels), digits_batches, 8, verbose=0) for pixels in (1, 2))
    assert needs_it.needed == ("norm_2",)
    assert needs_it.layers[2].enough is None
    assert "Even all 8 replicas leave norm_2 beyond" in str(needs_it)
    assert needs_it.group_size is None
    assert needs_it.target_batch == 16
    assert needs_it.plain == does_not.plain == ("norm_0",)
    assert does_not.needed == ()
    assert does_not.layers[2].enough == 4
    assert "None needs it" in str(does_not)
    assert "None needs it" not in str(needs_it)


def test_where_replicas_have_enough_nothing_is_synchronized(digits_batches):
    found = advise(digits(2), digits_batches, 8, batch=16, verbose=0)
    assert (found.synchronized, found.group_size, found.options()) == ((), 1, {})
    assert "All 3 may stay plain" in str(found)
    # More than 128 samples together have not been found to help.
    many = advise(digits(1), digits_batches, 64, batch=4, verbose=0)
    assert (many.group_size, many.target_batch) == (32, 128)


def test_the_error_of_a_replica_is_within_a_fifth_of_that_measured(digits_batches):
    keras.utils.set_random_seed(0)
    model = digits(1)
    found = advise(model, digits_batches, 8, verbose=0)
    batches = [x.numpy() for x, _ in digits_batches.skip(300).take(100)]
    runs = [
        seen_by_layers(model, np.concatenate(batches[start : start + 10]))
        for start in range(0, 100, 10)
    ]
    for layer in found.layers:
        rows = np.concatenate([run[layer.name] for run in runs])
        own = rows.reshape(100, -1, rows.shape[-1])
        mean, variance = own.mean((0, 1)), own.reshape(-1, own.shape[-1]).var(0)
        error = oracle.measured_errors(own, mean, variance, 1e-3)
        np.testing.assert_allclose(layer.errors[0][1:], error, rtol=0.2)


@pytest.mark.parametrize(("replicas", "batch", "group"), [(6, 24, 3), (12, 16, 6), (7, 32, None)])
def test_groups_divide_the_replicas(digits_batches, replicas, batch, group):
    keras.utils.set_random_seed(0)
    found = advise(digits(1), digits_batches, replicas, batch=batch, tolerance=0.2, verbose=0)
    assert found.synchronized
    assert found.group_size == group
    # One more message, for the moving statistics, over all replicas.
    every, advised = found.seconds
    chosen = sum(layer.seconds for layer in found.layers if layer.synchronize)
    assert (advised > chosen) == (group is not None)
    assert every >= chosen


def test_groups_that_are_given_come_before_those_of_an_advice(digits_batches):
    keras.utils.set_random_seed(0)
    model = digits(1)
    found = advise(model, digits_batches, 8, verbose=0)
    syncbn.convert_sync_batchnorm(model, only=found, target_batch=4)
    config = model.get_layer("norm_2").get_config()
    assert (config["target_batch"], config["group_size"]) == (4, None)


def test_what_only_centers_is_not_converted(caplog):
    model, x = make_model(), samples(48)
    found = advise(model, [x], 8, batch=2, tolerance=1e-3, verbose=0)
    assert found.synchronized == ("first", "center", "last")
    assert [*found.options()] == ["first", "last"]
    syncbn.convert_sync_batchnorm(model, only=found)
    assert not caplog.text


def test_convert_follows_an_advice_and_returns_the_model(digits_batches):
    keras.utils.set_random_seed(0)
    model = digits(1)
    found = advise(model, digits_batches, 8, verbose=0)
    assert syncbn.convert_sync_batchnorm(model, only=found) is model
    kinds = [type(model.get_layer(f"norm_{number}")) for number in range(3)]
    assert kinds == [L.BatchNormalization, *2 * [syncbn.SyncBatchNormalization]]
    assert syncbn.revert_sync_batchnorm(model) is model
    assert type(model.get_layer("norm_2")) is L.BatchNormalization


@pytest.mark.parametrize(
    ("only", "converted"),
    [
        ("norm_1", ["norm_1"]),
        ("norm_*", ["norm_0", "norm_1", "norm_2"]),
        (["norm_0", "*2"], ["norm_0", "norm_2"]),
        (lambda name, layer: layer.gamma.shape[0] > 16, ["norm_1", "norm_2"]),
        ({"norm_2": {"group_size": 2}, "norm_0": {}}, ["norm_0", "norm_2"]),
        ([], []),
    ],
)
def test_only_some_are_converted(only, converted, caplog):
    model = digits(1)
    result = syncbn.convert_sync_batchnorm(model, only=only, return_conversion=True)
    assert list(result.converted) == converted
    assert set(result.unchanged.values()) <= {"is not one of those to convert"}
    if isinstance(only, dict):
        assert [model.get_layer(name).get_config()["group_size"] for name in converted] == [None, 2]
    assert not caplog.text


def test_what_could_not_be_converted_is_logged(caplog):
    class Own(L.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training=training, mask=mask)

    model = keras.Sequential([keras.Input((3,)), Own(name="own"), L.BatchNormalization()])
    assert syncbn.convert_sync_batchnorm(model) is model
    assert "Not converted in" in caplog.text
    assert ": own: is a Own, with methods of its own: call" in caplog.text


@pytest.mark.parametrize(
    ("only", "error"),
    [
        (["norm_0", "nrm_*"], "Received: nrm_"),
        ({"dense": {}}, "Received: dense"),
        ({"norm_0": {"axis": 1}}, "Received: axis"),
        ({"norm_0": None}, "Received: None in it"),
        ([L.Dense], "Received: .*Dense"),
    ],
)
def test_a_wrong_choice_changes_nothing(only, error):
    model = digits(1)
    with pytest.raises((TypeError, ValueError), match=error):
        syncbn.convert_sync_batchnorm(model, only=only)
    assert type(model.get_layer("norm_0")) is L.BatchNormalization


def test_bad_input():
    model, x = make_model(), samples(30)
    with pytest.raises(ValueError, match=r"several replicas. Received: 1, as in this job. Give"):
        advise(model, [x])
    with pytest.raises(ValueError, match=r"two batches of replicas at least. Received: no data"):
        advise(model, [], 2, verbose=0)
    with pytest.raises(ValueError, match="needs 32 samples at least, for 2 replicas with 16 each"):
        advise(model, [x], 2, batch=16, batches=30, verbose=0)
    for wrong in {"batch": -2}, {"batch": 0}, {"batch": 2.0}, {"batches": 0}, {"replicas": 0}:
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be a positive integer"):
            advise(model, [x], **{"replicas": 2, **wrong})
    with pytest.raises(TypeError, match=r"from_tensor_slices\(x\).batch\(32\)"):
        advise(model, x, 2, verbose=0)
    with pytest.raises(ValueError, match="must have the same shapes but for the first dimension"):
        advise(model, [x[:3], x[:3, :5]], 2, verbose=0)
    with pytest.raises(ValueError, match=r"must consist of batches. Received: single samples"):
        advise(model, list(x), 2, verbose=0)
    with pytest.raises(ValueError, match="tolerance=0"):
        advise(model, [x], 2, tolerance=0)
    with pytest.raises(ValueError, match=r"finite activations.*inputs of first"):
        advise(model, [np.full_like(x, np.nan)], 2, batch=2, verbose=0)
    without = keras.Sequential([keras.Input((3,)), L.Dense(1)])
    with pytest.raises(ValueError, match="which has none"):
        advise(without, [np.ones((4, 3))], 2)
    model.trainable = False
    with pytest.raises(ValueError, match="which has 3, all of them frozen"):
        advise(model, [x], 2)
    with pytest.raises(ValueError, match="which is not built"):
        advise(keras.Sequential([L.BatchNormalization()]), [x], 2)


def test_samples_that_do_not_stay_together_are_refused():
    class Gathered(L.Layer):
        def call(self, x):
            return tf.concat([x, x[:1]], 0)

    model = keras.Sequential(
        [keras.Input((6, 6, 2)), Gathered(), L.BatchNormalization(name="norm")]
    )
    with pytest.raises(Exception, match="What norm sees cannot be shared among 2 replicas"):
        advise(model, [samples(8)], 2, batch=2, verbose=0)


def test_a_table_a_picture_and_json(digits_batches, tmp_path):
    keras.utils.set_random_seed(0)
    found = advise(digits(1), digits_batches, 6, verbose=0)
    text = str(found)
    assert "may stay plain" in text
    assert "Synchronize 2 of 3 over all replicas, that is 12 samples" in text
    found.draw(tmp_path / "folder" / "advice.png")
    assert (tmp_path / "folder" / "advice.png").stat().st_size > 10_000
    read = json.loads(found.to_json())
    assert read["synchronized"] == ["norm_1", "norm_2"]
    assert read["needed"] == ["norm_2"]
    last = read["layers"][2]["errors"]
    assert [error["replicas"] for error in last] == [1, 2, 4, 6]
    assert last[3]["gain"] == pytest.approx(last[0]["output"] - last[3]["output"])


def built():
    return digits(1)


def arrays():
    rng = np.random.default_rng(0)
    return rng.random((64, 8, 8, 1)), np.zeros(64)


def test_on_the_command_line(tmp_path, capsys):
    name = "tests.single.test_advice"
    words = ["advise", f"{name}:built", "--batch-from", f"{name}:arrays"]
    options = ["--json", str(tmp_path / "new" / "a.json"), "--picture", str(tmp_path / "a.png")]
    assert main([*words, "--replicas", "4", "--batch", "2", *options]) == 0
    assert "Synchronize" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "a.json").read_text())["replicas"] == 4
    assert (tmp_path / "a.png").exists()
    assert main([*words, "--replicas", "4"]) == 2
    assert "Received: no --batch" in capsys.readouterr().err
    assert main([*words, "--batch", "2"]) == 2
    assert "--replicas 8" in capsys.readouterr().err
