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
MODEL = (2, 96, 96, 3)
"""The images of a replica. More of them hide what a layer costs behind the convolutions."""
AT_MOST = {
    "Keras 3": 1.0,
    "Keras 3 synchronized": 0.75,
    "Keras 3, first call": 1.3,
}
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


def _with_models() -> dict[str, Case]:
    """Returns the cases of a whole model: converted, and with the layers of others."""
    cases = {}
    for engine, workers in (("alone", 1), ("mirrored", 2), ("mpi", 2)):
        contestants, ratios = peers(engine)
        if engine == "alone":  # in one replica too, Keras' way to synchronize is another
            contestants["Keras 3 synchronized"] = Contestant("keras synchronized", engine)
            ratios += (("syncbn", "Keras 3 synchronized"),)
        where = f"{workers} replica{'s' if workers > 1 else ''} ({engine})"
        cases[f"model-resnet50-{engine}-{workers}"] = Case(
            f"a step of ResNet-50, in a loop of one's own and in fit, {where}",
            "resnet50",
            workers,
            contestants,
            (Point(MODEL, 53, at_most=AT_MOST if engine != "mpi" else {}),),
            _of_models(ratios),
        )
        cases[f"model-resnet50-memory-{engine}-{workers}"] = Case(
            f"the peak of a step of ResNet-50, {where}",
            "resnet50-memory",
            workers,
            contestants,
            (Point(MODEL, 53),),
            ratios,
            unit="MB",
            alone=True,
        )
    return cases


def _of_models(ratios: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of all that `models.times` measures."""
    return tuple(
        (f"{ours}{what}", f"{peer}{what}")
        for what in ("", ", first call", ", fit", ", fit, first call")
        for ours, peer in ratios
    )


def _tiny() -> dict[str, Case]:
    contestants, ratios = peers("mirrored")
    keras_3 = {name: one for name, one in contestants.items() if one.keras == 3}
    pairs = tuple(pair for pair in ratios if pair[0] in keras_3)
    return {
        "tiny": Case(
            "one small layer, 2 replicas: whether all works",
            "stack",
            2,
            keras_3,
            (Point((16, 64)),),
            pairs,
        ),
        "tiny-model": Case(
            "a model with two normalizations, 2 replicas: whether all works",
            "small-model",
            2,
            contestants,
            (Point((2, 16, 16, 3), 2),),
            _of_models(ratios),
        ),
    }


CASES: dict[str, Case] = {
    **cases_with_targets(),
    **_with_engines(),
    **_with_gpu(),
    **_with_traces(),
    **_with_models(),
    **_tiny(),
}
