"""What is measured: each case by its name."""

from __future__ import annotations

from benchmarks.cases import LARGE, RESNET_50, Case, Contestant, Point, peers
from benchmarks.targets import cases_with_targets

SHAPES = (
    (16, 64),
    (2, 7, 7, 512),
    (4, 28, 28, 256),
    (8, 56, 56, 64),
    (8, 112, 112, 64),
    (2, 64, 64, 64, 32),
)
JOBS = ("mirrored", "multiworker", "horovod-gloo", "horovod-mpi", "mpi")


def _with_engines() -> dict[str, Case]:
    """Returns the cases that are the same under every engine."""
    cases = {}
    for engine in JOBS:
        contestants, ratios = peers(engine)
        for workers in (2, 4):
            where = f"{workers} workers, {engine}"
            cases[f"layer-{engine}-{workers}"] = Case(
                f"one layer, forward and backward, {where}",
                "stack",
                workers,
                contestants,
                (
                    *(Point(shape) for shape in SHAPES),
                    *(Point(shape, dtype="mixed_bfloat16") for shape in SHAPES),
                    Point(LARGE, dtype="mixed_float16"),
                ),
                ratios,
            )
            cases[f"stack-{engine}-{workers}"] = Case(
                f"stacks of layers, forward and backward, {where}",
                "stack",
                workers,
                contestants,
                tuple(Point((2, 7, 7, 512), layers) for layers in (1, 4, 53)),
                ratios,
            )
            cases[f"chain-{engine}-{workers}"] = Case(
                f"ResNet-50's chain of 53 layers, {where}",
                "chain",
                workers,
                contestants,
                (RESNET_50,),
                ratios,
            )
            cases[f"digits-{engine}-{workers}"] = Case(
                f"a step of launch/train_digits.py, 8 images in each replica, {where}",
                "digits",
                workers,
                {name: contestants[name] for name in ("syncbn", "Keras 3")},
                (Point((8, 8, 8, 1), 3),),
                (("syncbn", "Keras 3"),),
            )
    return cases


def _with_traces() -> dict[str, Case]:
    """Returns the cases of a function's first call."""
    cases = {}
    for engine, workers in (("alone", 1), ("mirrored", 2)):
        contestants, ratios = peers(engine)
        cases[f"trace-{engine}-{workers}"] = Case(
            f"first call of a function, {workers} replica{'s' if workers > 1 else ''}, {engine}",
            "trace",
            workers,
            contestants,
            tuple(Point((16, 64), layers) for layers in (10, 40)),
            ratios,
        )
    return cases


def _with_gpu() -> dict[str, Case]:
    """Returns the cases of a GPU. Two replicas share it: it says what layers cost, not scaling."""
    engine = "mirrored-gpu"
    contestants, ratios = peers(engine)
    dtypes = ("float32", "mixed_float16", "mixed_bfloat16")
    return {
        f"layer-{engine}-2": Case(
            "one layer, forward and backward, 2 replicas on one GPU",
            "stack",
            2,
            contestants,
            tuple(Point(shape, dtype=dtype) for dtype in dtypes for shape in SHAPES),
            ratios,
        ),
        f"layer-{engine}-1": Case(
            "one replica on a GPU against TensorFlow's fused batch norm in training form",
            "stack",
            1,
            {name: Contestant(name, engine) for name in ("syncbn", "fused op")},
            tuple(Point(LARGE, layers, dtype) for dtype in dtypes for layers in (1, 4)),
            (("syncbn", "fused op"),),
        ),
    }


def _tiny() -> Case:
    contestants, ratios = peers("mirrored")
    keras_3 = {name: one for name, one in contestants.items() if one.keras == 3}
    pairs = tuple(pair for pair in ratios if pair[0] in keras_3)
    summary = "one small layer, 2 replicas: whether all works"
    return Case(summary, "stack", 2, keras_3, (Point((16, 64)),), pairs)


CASES: dict[str, Case] = {
    **cases_with_targets(),
    **_with_engines(),
    **_with_gpu(),
    **_with_traces(),
    "tiny": _tiny(),
}
