"""Prints how often the size of its input each layer of a stack holds between the passes."""

import gc
import json
import os
from pathlib import Path

import tensorflow as tf

import syncbn

LAYERS = 6


class Two(syncbn.LocalCommunicator):
    size = 2


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(layer, shape, dtype, masked=False, **options):
    """When an eager tape has seen the stack."""
    policy = f"mixed_{dtype}" if dtype in ("float16", "bfloat16") else dtype
    layers = [layer(dtype=policy, **options) for _ in range(LAYERS)]
    x = tf.cast(tf.random.normal(shape), dtype)
    mask = tf.ones(shape[:-1], tf.bool) if masked else None

    def forward():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for one in layers:
                y = one(y, training=True, mask=mask)
        return tape, y, resident()

    forward()
    before = resident()
    tape, y, after = forward()
    assert tape.gradient(y, x) is not None
    return (after - before) / (tf.size(x).numpy() * x.dtype.size * LAYERS)


batch_normalization, centering = syncbn.SyncBatchNormalization, syncbn.SyncCentering
last, first = (8, 56, 56, 64), (8, 64, 56, 56)
found = {
    f"{name} {dtype}": held(batch_normalization, last, dtype, communicator=communicator)
    for name, communicator in (("one", "local"), ("two", Two()))
    for dtype in ("float32", "float64", "float16", "bfloat16")
}
found["axis 1"] = held(batch_normalization, first, "float32", communicator=Two(), axis=1)
found["mask"] = held(batch_normalization, last, "float32", masked=True, communicator=Two())
found["centering"] = held(centering, last, "bfloat16", communicator=Two())
found["centering, mask"] = held(centering, last, "float32", masked=True, communicator=Two())
print("held", json.dumps(found))
