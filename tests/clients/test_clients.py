"""Other packages' models, without weights: converted, trained on two replicas, saved, loaded."""

import numpy as np
import pytest

import syncbn
from syncbn._src.keras_compat.layer_names import named_layers
from tests.keras import KERAS_3, keras


def resnet():
    import keras_hub

    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )


def cspnet():
    import keras_hub

    return keras_hub.models.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=2,
        stackwise_depth=[1, 1],
        stackwise_strides=[1, 2],
        stackwise_num_filters=[8, 16],
        block_type="dark_block",
        stage_type="dark",
        image_shape=(32, 32, 3),
    )


def lcnet():
    from keras_cv_attention_models import mobilenetv3_family

    return mobilenetv3_family.LCNet050(
        input_shape=(32, 32, 3), num_classes=4, pretrained=None, dropout=0
    )


# One of the two packages works with Keras 2, the other with Keras 3.
CLIENTS = [resnet, cspnet] if KERAS_3 else [lcnet]


def compiled(build, weights=None):
    model = build()
    if weights is not None:
        model.set_weights(weights)
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    return model


@pytest.mark.parametrize("build", CLIENTS, ids=lambda build: build.__name__)
def test_a_model_is_converted_trained_saved_and_loaded(build, two_replicas, tmp_path):
    whole = compiled(build)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 32, 32, 3)).astype("float32")
    outputs = whole(x).numpy()
    y = rng.normal(size=outputs.shape).astype("float32")
    with two_replicas.scope():
        model = compiled(build, whole.get_weights())
    result = syncbn.convert_sync_batchnorm(model, return_conversion=True)
    assert result.converted
    assert not result.unchanged
    np.testing.assert_array_equal(model(x), outputs)

    for one in whole, model:
        one.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    syncbn.assert_synchronized(model)
    for one, truth in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(one, truth, rtol=1e-3, atol=1e-4)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    layers = named_layers(loaded).values()
    kept = [layer for layer in layers if isinstance(layer, syncbn.SyncBatchNormalization)]
    assert len(kept) == len(result.converted)
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
    )
