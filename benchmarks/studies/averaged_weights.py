"""What `recalibrate` gives for averaged weights (SWA): the digits, before and after."""

import statistics
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

import syncbn

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import digits_data
import train_digits

SEEDS, EPOCHS, AVERAGED_FROM = range(3), 8, 2


def scores(seed, train, test):
    """Returns test loss and accuracy of the last epoch's weights, and of averages of them."""
    keras = tf.keras
    keras.utils.set_random_seed(seed)
    model = train_digits.build_model("sync")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, 0.9), loss, metrics=["accuracy"])
    data = tf.data.Dataset.from_tensor_slices(tuple(train))
    seen = []
    for epoch in range(EPOCHS):
        model.fit(data.shuffle(len(train[0]), seed + epoch).batch(16), verbose=0)
        seen.append([weight.numpy() for weight in model.trainable_variables])

    def evaluated():
        return model.evaluate(*test, batch_size=512, verbose=0)

    rows = {"last epoch": evaluated()}
    epochs = zip(*seen[AVERAGED_FROM:], strict=True)
    for weight, values in zip(model.trainable_variables, epochs, strict=True):
        weight.assign(np.mean(values, 0))
    rows["averaged"] = evaluated()
    for name, exact in (("averaged, recalibrated", False), ("the same, exact=True", True)):
        syncbn.recalibrate(model, data.batch(256), exact=exact, verbose=0)
        rows[name] = evaluated()
    return rows


def main():
    train, test = digits_data.load_data()
    runs = []
    for seed in SEEDS:
        print(f"seed {seed} of {len(SEEDS)}", flush=True)
        runs.append(scores(seed, train, test))
    print("\n| weights | test loss | test accuracy, % |\n|---|---|---|")
    for name in runs[0]:
        loss, accuracy = zip(*(run[name] for run in runs), strict=True)
        cells = [
            f"{factor * statistics.mean(v):.{digits}f} ± {factor * statistics.stdev(v):.{digits}f}"
            for v, factor, digits in ((loss, 1, 4), (accuracy, 100, 2))
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
