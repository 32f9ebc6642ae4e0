"""The study of statistics over micro-batches: its exact way is exact, and the others are not."""

import numpy as np
import tensorflow as tf

from benchmarks.studies import accumulated_statistics as study


def test_the_gradient_layer_by_layer_is_that_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(study, "DEPTH", 2)
    rng = np.random.default_rng(0)
    x, labels = tf.constant(rng.normal(size=(study.BATCH, 8, 8, 1))), rng.integers(10, size=32)
    network = study.Network(0)
    truth, whole = study.by_itself(network, x, labels)
    parts = [(x[start : start + 8], labels[start : start + 8]) for start in range(0, 32, 8)]
    assert study.difference(study.exactly(network, parts), truth)[0] < 1e-12
    statistics = [study.mean_and_variance(seen) for seen in whole]
    constants = [study.with_constants(network, *part, statistics) for part in parts]
    assert study.difference(study.summed(constants), truth)[0] > 0.05
