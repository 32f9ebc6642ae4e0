"""The layers in a session: gradients, updates, and a `training` that is fed."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import oracle

v1 = tf.compat.v1
LAYERS = [syncbn.SyncBatchNormalization, syncbn.SyncCentering]


def update_ops():
    return v1.get_collection(v1.GraphKeys.UPDATE_OPS)


def placeholder(shape=(None, 3)):
    return v1.placeholder(tf.float32, shape)


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape).astype("float32")


def training_of(kind):
    """Returns a value for `training`, and what makes it true."""
    if kind == "true":
        return True, {}
    if kind == "placeholder":
        training = v1.placeholder_with_default(False, [])
        return training, {training: True}
    return None, {tf.keras.backend.learning_phase(): 1}


@pytest.mark.parametrize(
    ("shape", "options", "masked"),
    [
        ((8, 3), {}, False),
        ((8, 3), {"momentum": None}, False),
        ((8, 5, 4), {}, True),
        ((8, 3, 4), {"axis": 1, "momentum": None}, True),
        ((4, 48, 48, 64), {}, False),  # large enough for the fused kernels
        ((2, 3), {}, False),  # all of it is the second worker's
        ((0, 3), {"momentum": None}, False),
    ],
)
@pytest.mark.parametrize("kind", ["true", "placeholder", "learning phase"])
@pytest.mark.parametrize("make", LAYERS)
def test_two_steps_are_those_of_the_whole_batch(make, kind, shape, options, masked, workers, run):
    options = {"momentum": 0.9, **options}
    axis = options.get("axis", -1)
    x, dy = placeholder((None, *shape[1:])), placeholder((None, *shape[1:]))
    mask = v1.placeholder(tf.bool, (None, *shape[1:-1])) if masked else None
    training, feed = training_of(kind)
    layer = make(**options)
    y = layer(x, training=training, mask=mask)
    gradients = v1.gradients(y, [x, *layer.trainable_variables], grad_ys=dy)
    moving = [layer.moving_mean, *([layer.moving_variance] if gradients[1:] else [])]
    count = [layer.moving_count] if options["momentum"] is None else []

    expected = [np.zeros(shape[axis]), np.ones(shape[axis])][: len(moving)]
    seen = 0
    for step in range(2):
        whole, whole_dy = draw(shape, step), draw(shape, step + 10) - 3
        whole_mask = draw(shape[:-1], step) > 2 if masked else None
        feed = {**feed, x: workers.part(whole), dy: workers.part(whole_dy)}
        if masked:
            feed[mask] = workers.part(whole_mask)
        ours, (dx, *parameters), _ = run([y, gradients, update_ops()], feed)

        if make is syncbn.SyncCentering:
            truth = oracle.centering(whole, whole_dy, axis=axis, mask=whole_mask)
        else:
            gamma, beta = np.ones(shape[axis]), np.zeros(shape[axis])
            truth = oracle.batch_normalization(
                whole, whole_dy, gamma, beta, axis=axis, mask=whole_mask
            )
        near = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(ours, workers.part(truth.y), **near)
        np.testing.assert_allclose(dx, workers.part(truth.dx), **near)
        if workers.size == 1:  # several have a share of these each
            for gradient, true in zip(
                parameters, [truth.dgamma, truth.dbeta], strict=bool(parameters)
            ):
                np.testing.assert_allclose(gradient, true, rtol=1e-4, atol=2e-3)
        seen = seen + truth.count
        rate = truth.count / np.maximum(seen, 1) if count else 0.1 * (truth.count > 0)
        for index, true in enumerate([truth.mean, truth.variance][: len(moving)]):
            expected[index] = expected[index] + rate * (true - expected[index])
        for value, true in zip(run(moving), expected, strict=True):
            np.testing.assert_allclose(value, true, **near)
        if count:
            np.testing.assert_array_equal(run(layer.moving_count), seen * np.ones(shape[axis]))


@pytest.mark.parametrize("kind", ["placeholder", "learning phase"])
@pytest.mark.parametrize("make", LAYERS)
def test_not_training_moves_nothing_and_communicates_with_nobody(make, kind, workers, run):
    x = placeholder()
    training, _ = training_of(kind)
    layer = make(momentum=None)
    y = layer(x, training=training)
    fetches = [y, v1.gradients(y, x), update_ops()]
    run(layer.moving_mean.assign([1, 2, 3]))
    weights = run(layer.weights)
    if workers.rank == 0:  # alone: it would wait for the others
        batch = draw((4, 3))
        outputs, (dx,), _ = run(fetches, {x: batch})
        scale = 1 if make is syncbn.SyncCentering else 1 / np.sqrt(1 + 1e-3)
        np.testing.assert_allclose(outputs, scale * (batch - [1, 2, 3]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, np.full([4, 3], scale), rtol=1e-5)
        for one, other in zip(run(layer.weights), weights, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("make", LAYERS)
def test_training_without_the_updates_moves_nothing(make, workers, run):
    x = placeholder()
    layer = make(momentum=0.0)
    y = layer(x, training=True)
    before = run(layer.weights)
    run([y, v1.gradients(y, x)], {x: workers.part(draw((8, 3)))})
    for one, other in zip(run(layer.weights), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("make", LAYERS)
def test_inference_and_frozen_layers_have_no_updates(make):
    make()(placeholder(), training=False)
    make(trainable=False)(placeholder(), training=True)
    assert update_ops() == []


@pytest.mark.parametrize("make", LAYERS)
def test_the_collection_holds_the_updates_of_the_layers(make):
    model = tf.keras.Sequential([make(), tf.keras.layers.Dense(2), make(momentum=None)])
    model(placeholder(), training=True)
    updates = [update for layer in model.layers for update in layer.updates]
    assert update_ops() == model.updates == updates
    assert len(updates) == (5 if make is syncbn.SyncBatchNormalization else 3)


def test_updates_for_one_input_are_told_from_those_for_another(workers, run):
    # A functional model is called once when it is made, on inputs of its own.
    model = tf.keras.Sequential([tf.keras.Input([3]), syncbn.SyncCentering(momentum=0.0)])
    x = placeholder()
    model(x, training=True)
    batch = draw((8, 3))
    run(model.get_updates_for(x), {x: workers.part(batch)})
    np.testing.assert_allclose(run(model.weights[0]), batch.mean(0), rtol=1e-5)


def test_a_function_moves_the_statistics_whenever_it_runs(workers, run):
    x = placeholder()
    layer = syncbn.SyncCentering(momentum=0.0)
    layer.build((None, 3))
    y = tf.function(lambda x: layer(x, training=True))(x)
    assert update_ops() == []
    batch = draw((8, 3))
    run(y, {x: workers.part(batch)})
    np.testing.assert_allclose(run(layer.moving_mean), batch.mean(0), rtol=1e-5)


@pytest.mark.skipif(
    not v1.control_flow_v2_enabled(),
    reason="with TensorFlow 1's control flow an update in a branch exists, in that branch",
)
def test_a_training_call_inside_of_a_branch_is_refused():
    x, condition = placeholder(), v1.placeholder(tf.bool, [])
    layer = syncbn.SyncCentering()
    layer.build((None, 3))
    with pytest.raises(NotImplementedError, match=r"layer\(x, training=condition\)"):
        tf.cond(condition, lambda: layer(x, training=True), lambda: x)


def test_the_control_flow_that_was_chosen_stays():
    before = v1.control_flow_v2_enabled()
    syncbn.SyncCentering()(placeholder(), training=training_of("placeholder")[0])
    assert v1.control_flow_v2_enabled() == before
