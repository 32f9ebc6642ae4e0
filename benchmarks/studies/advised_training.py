"""What becomes of models that follow `syncbn.advise`, and what the tolerance rests on.

    python -m benchmarks.studies.advised_training [--part replicas|sizes] [--seeds N]

Two tasks with data that scikit-learn has: the digits, and which of its two photographs a small grey
patch is from. Networks that end at one pixel, at 2 x 2 or at 4 x 4.

- ``replicas``: eight replicas of two images under MirroredStrategy, with all normalizations plain,
  all synchronized, and as advised before training.
- ``sizes``: one replica, with as many virtual batches as there are groups of such replicas. This is
  the same arithmetic, and faster: the accuracy over the size of groups, next to the error of the
  worst layer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

import syncbn

REPLICAS, SAMPLES = 8, 2
EPOCHS = {"digits": 16, "photos": 8}
RATES = {"digits": 0.1, "photos": 0.05}
PATCH, STRIDE = 16, 10


def digits():
    """Returns images, digits: those to train on, and those to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    return _split(images, labels)


def photos():
    """Returns grey patches, each of mean 0 and deviation 1, and which photograph shows them.

    The test patches come from the right of each photograph, which no other patch shows.
    """
    parts = []
    for sides in slice(0, 416), slice(432, None):
        found = []
        for photo in load_sample_images().images:
            grey = photo[:, sides].mean(-1).astype("float32")
            grid = np.lib.stride_tricks.sliding_window_view(grey, (PATCH, PATCH))
            found.append(grid[::STRIDE, ::STRIDE].reshape(-1, PATCH, PATCH, 1))
        patches = np.concatenate(found)
        patches = patches - patches.mean((1, 2), keepdims=True)
        patches /= patches.std((1, 2), keepdims=True) + 1
        parts.append((patches, np.repeat(range(len(found)), [len(one) for one in found])))
    return parts


def _split(images, labels):
    x, x_test, y, y_test = train_test_split(
        images, labels, train_size=1280, test_size=512, stratify=labels, random_state=0
    )
    return (x, y), (x_test, y_test)


DATA = {"digits": digits, "photos": photos}


def build(task, pixels, normalization):
    """Returns a network that comes down to so many pixels a side."""
    size = {"digits": 8, "photos": PATCH}[task]
    halvings = (size // pixels).bit_length() - 1
    depth = {"digits": 3, "photos": 4}[task]
    layers = tf.keras.layers
    model = tf.keras.Sequential([tf.keras.Input((size, size, 1))])
    for block in range(depth):
        filters, strides = min(16 * 2**block, 64), 2 if block < halvings else 1
        model.add(layers.Conv2D(filters, 3, strides, padding="same", use_bias=False))
        model.add(normalization(momentum=0.9, name=f"norm_{block}"))
        model.add(layers.Activation("swish"))
    model.add(layers.Flatten())
    model.add(layers.Dense({"digits": 10, "photos": 2}[task]))
    return model


def compiled_for(task, model, **options):
    """Compiles a model; returns it."""
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.SGD(RATES[task], 0.9), loss, metrics=["accuracy"], **options)
    return model


def trained(task, seed, model, parts):
    """Trains a model; returns test loss, test accuracy in percent, and the seconds of a step."""
    (x, y), test = parts
    order = np.random.default_rng(seed)
    seconds = []
    for epoch in range(EPOCHS[task]):
        chosen = order.permutation(len(x))[: len(x) // 16 * 16]
        start = time.perf_counter()
        rate = RATES[task] * (1 + np.cos(np.pi * epoch / EPOCHS[task])) / 2
        model.optimizer.learning_rate.assign(rate)
        model.fit(x[chosen], y[chosen], batch_size=16, shuffle=False, verbose=0)
        seconds.append((time.perf_counter() - start) / (len(chosen) // 16))
    left = len(test[0]) // 128 * 128
    scores = model.evaluate(test[0][:left], test[1][:left], batch_size=128, verbose=0)
    return scores[0], 100 * scores[1], statistics.median(seconds[1:])


def judged(task, pixels, parts):
    """Returns the advice for a new network."""
    model = build(task, pixels, tf.keras.layers.BatchNormalization)
    data = tf.data.Dataset.from_tensor_slices(parts[0]).shuffle(10**4, seed=0).batch(SAMPLES)
    return syncbn.advise(model, data, REPLICAS, verbose=0)


def over_sizes(seeds, tasks):
    """Prints accuracy over the size of groups."""
    print("| task | last pixels | replicas in a group | error | test loss | test accuracy, % |")
    print("|---|---|---|---|---|---|", flush=True)
    for task in tasks:
        parts = DATA[task]()
        for pixels in 1, 2, 4:
            tf.keras.utils.set_random_seed(0)
            worst = max(judged(task, pixels, parts).layers, key=lambda one: one.errors[0].output)
            for error in worst.errors:

                def ghosts(group=error.replicas, **kwargs):
                    size = SAMPLES * group
                    virtual = None if group == REPLICAS else size
                    return syncbn.SyncBatchNormalization(virtual_batch_size=virtual, **kwargs)

                runs = []
                for seed in seeds:
                    tf.keras.utils.set_random_seed(seed)
                    model = compiled_for(task, build(task, pixels, ghosts))
                    runs.append(trained(task, seed, model, parts))
                cells = [_spread([run[0] for run in runs], 3), _spread([run[1] for run in runs], 2)]
                print(
                    f"| {task} | {pixels} x {pixels} | {error.replicas} | {error.output:.2f} | "
                    f"{' | '.join(cells)} |",
                    flush=True,
                )


def on_replicas(seeds, tasks):
    """Prints what becomes of networks on eight replicas."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * REPLICAS,
    )
    tf.data.experimental.enable_debug_mode()  # no thread pool for each replica
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])
    print("| task | last pixels | normalizations | synchronized | loss | accuracy, % | step, ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for task in tasks:
        parts = DATA[task]()
        for pixels in 1, 2:
            runs = {}
            for seed in seeds:
                tf.keras.utils.set_random_seed(seed)
                advice = judged(task, pixels, parts)
                choices = {"plain": [], "all synchronized": None, "as advised": advice}
                for name, only in choices.items():
                    tf.keras.utils.set_random_seed(seed)
                    with strategy.scope():
                        model = build(task, pixels, tf.keras.layers.BatchNormalization)
                        done = syncbn.convert_sync_batchnorm(
                            model, only=only, return_conversion=True
                        )
                        compiled_for(task, model, jit_compile=False)
                    scores = trained(task, seed, model, parts)
                    runs.setdefault(name, []).append((len(done.converted), *scores))
            for name, found in runs.items():
                numbers, losses, accuracies, seconds = zip(*found, strict=True)
                synchronized = "-".join(map(str, sorted(set(numbers))))
                print(
                    f"| {task} | {pixels} x {pixels} | {name} | {synchronized} of "
                    f"{len(advice.layers)} | {_spread(losses, 3)} | {_spread(accuracies, 2)} | "
                    f"{1e3 * statistics.median(seconds):.1f} |",
                    flush=True,
                )


def _spread(values, digits):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description="Trains as advised, and otherwise.")
    parser.add_argument("--part", choices=("replicas", "sizes"), default="replicas")
    parser.add_argument("--seeds", type=int, default=3, help="at least two; default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=DATA, default=list(DATA))
    arguments = parser.parse_args()
    {"replicas": on_replicas, "sizes": over_sizes}[arguments.part](
        range(arguments.seeds), arguments.tasks
    )


if __name__ == "__main__":
    main()
