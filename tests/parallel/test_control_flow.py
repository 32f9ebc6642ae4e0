"""Control flow and derivatives, on every engine: docs/control-flow.md is made from the same table."""

import faulthandler
import json
import os
import re
import traceback

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.control_flow import CONSTRUCTS, EPSILON, KINDS, MOMENTUM, Given, Plain, delayed
from tests.keras import keras

SURVEY = os.environ.get("SYNCBN_SURVEY")
SAMPLES, CHANNELS = 4, 3
TOLERANCE = 1e-8
RNG = np.random.default_rng(3)
GAMMA, BETA = RNG.normal(1.5, 0.3, CHANNELS), RNG.normal(0, 0.3, CHANNELS)
MODES = ["graph", "eager"]


def data(size):
    """Samples of every replica; their means differ."""
    x, weights, tangent = np.random.default_rng(7).normal(size=(3, size, SAMPLES, CHANNELS))
    return x + np.arange(size)[:, None, None] / 2, weights, tangent


def truth(replicas, name, kind, normalizes):
    given = [array.reshape(-1, CHANNELS) for array in data(replicas.size)]
    plain = Plain(GAMMA, BETA, replicas.size * SAMPLES, normalizes)
    derivatives = plain.derivatives(kind, CONSTRUCTS[name].meaning, Given(*map(tf.constant, given)))
    whole = {key: value.numpy() for key, value in derivatives.items()}
    parts = []
    for rank in range(replicas.size):
        rows = {k: v[rank * SAMPLES : (rank + 1) * SAMPLES] for k, v in whole.items()}
        parts.append({k: v.sum(0) if k.startswith(("dg", "db")) else v for k, v in rows.items()})
    return parts, plain.moving


def build(replicas, layer, **options):
    layers = replicas.build(
        lambda rank: layer(momentum=MOMENTUM, dtype="float64", **options), (None, CHANNELS)
    )
    for one in layers:
        if one.trainable_variables:
            one.set_weights([GAMMA, BETA, *one.get_weights()[2:]])
    return layers


def ask(name, kind):
    """Returns the step that a replica runs."""

    def step(layer, *given):
        def call(x, training=True):
            return layer(x, training=training)

        if name.endswith("delayed"):
            call = delayed(call, syncbn.resolve().rank)
        found = KINDS[kind](
            lambda x: CONSTRUCTS[name].apply(call, x), Given(*given), layer.trainable_variables
        )
        if kind == "second derivatives":  # of which the parts are nobody's own
            for key in "dgamma", "dbeta":
                if found.get(key) is not None:
                    found[key] = syncbn.resolve().all_reduce_sum(found[key], f"test/{key}")
        missing = tf.fill([], tf.constant(np.nan, tf.float64))
        return {key: missing if value is None else value for key, value in found.items()}

    return step


def message(error):
    """Returns the error's text without the frames that autograph puts before it."""
    text = " ".join(str(error).split())
    parts = re.split(r" (?=\w+(?:Error|Exception):)", text)
    named = f"{type(error).__name__}: {text}"
    found = (parts[-1] if text.startswith("in user code") else named)[:500]
    cause = error.__cause__ or error.__context__
    if "vectorizing" in found and cause is not None:
        found += " <- " + message(cause)
    if found.rstrip().endswith("Error:"):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        found += f" at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return re.sub(r"_\d+", "", found)


def find(replicas, layer, name, kind, mode, **options):
    """Returns "right", or what is wrong, or the error."""
    try:
        normalizes = layer is not syncbn.SyncCentering
        layers = build(replicas, layer, **options)
        arguments = [tuple(map(tf.constant, part)) for part in zip(*data(replicas.size))]
        results = replicas.run(ask(name, kind), layers, arguments, graph=mode == "graph")
    except Exception as error:
        # `tf.map_fn` and `tf.scan` set it, and leave it behind when their body raises.
        with tf.compat.v1.get_default_graph().as_default():
            tf.compat.v1.get_variable_scope().set_caching_device(None)
        return message(error)
    expected, moving = truth(replicas, name, kind, normalizes)
    if kind == "second derivatives":
        for key in ("dgamma", "dbeta")[: 2 * normalizes]:
            total = sum(part[key] for part in expected)
            for part in expected:
                part[key] = total
    wrong = {}
    for rank, result in results.items():
        for key, value in result.items():
            if value.ndim == 0:
                wrong[key] = "None"
            else:
                scale = max(np.abs(part[key]).max() for part in expected)
                error = np.abs(value - expected[rank][key]).max() / scale
                if not error <= TOLERANCE:
                    wrong[key] = f"{error:.2g}"
    for key, values in replicas.moving(layers).items():
        for value in values.values():
            error = np.abs(value - moving[key]).max() / np.abs(moving[key]).max()
            if not error <= TOLERANCE:
                wrong[key] = f"{error:.2g}"
    return "wrong: " + ", ".join(f"{k} {v}" for k, v in wrong.items()) if wrong else "right"


CELLS = [
    (layer, mode, kind, name)
    for layer in ("SyncBatchNormalization", "SyncCentering", "BatchNormalization")
    for name in CONSTRUCTS
    for mode in MODES
    for kind in KINDS
]


def survey_cells(rank):
    path = f"{SURVEY}.{rank}.jsonl"
    done = set()
    if os.path.exists(path):
        done = {tuple(json.loads(line)["cell"]) for line in open(path)}
    return path, done


def test_survey(replicas):
    """Writes what is; not a test."""
    if not SURVEY:
        pytest.skip("SYNCBN_SURVEY is not set")
    rank = getattr(replicas, "rank", None)
    if rank is None:
        rank = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
    only = os.environ.get("SYNCBN_SURVEY_ONLY", "").split(",")
    path = f"{SURVEY}.{rank}.jsonl"
    with open(f"{SURVEY}.skip") as file:
        done = {tuple(json.loads(line)["cell"]) for line in file}
    for cell in CELLS:
        layer, mode, kind, name = cell
        if cell in done or not all(word in "/".join(cell) for word in only):
            continue
        if layer == "BatchNormalization" and replicas.size > 1:
            continue
        with open(path, "a") as file:
            file.write(json.dumps({"cell": cell, "start": True}) + "\n")
        faulthandler.dump_traceback_later(25, exit=True)
        made = (
            keras.layers.BatchNormalization
            if layer == "BatchNormalization"
            else getattr(syncbn, layer)
        )
        found = find(replicas, made, name, kind, mode)
        faulthandler.cancel_dump_traceback_later()
        with open(path, "a") as file:
            file.write(json.dumps({"cell": cell, "found": found}) + "\n")
