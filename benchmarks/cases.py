"""What is measured, and against whom: each case by its name.

A new case is one entry here. Its workload is one of `measuring.workloads`, its contestants are of
`contestants`, its engines of `measuring.jobs`.
"""

from __future__ import annotations

from typing import NamedTuple


class Contestant(NamedTuple):
    """One of the layers that are timed in turn, and the job that it runs in."""

    layer: str
    """A key of `contestants.LAYERS`."""
    engine: str
    """A key of `jobs.ENGINES`."""
    keras: int = 3


class Point(NamedTuple):
    """One input that a case measures."""

    shape: tuple[int, ...]
    """The shape of one replica's batch."""
    layers: int = 1
    dtype: str = "float32"
    """Or a mixed-precision policy."""
    at_most: dict[str, float] = {}  # noqa: RUF012  (never changed)
    """The target, by peer: how long ours may take, as a multiple of theirs."""

    def __str__(self) -> str:
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.layers} layer{'s' if self.layers > 1 else ''} {self.shape}{dtype}"


class Case(NamedTuple):
    """What is measured together, and shown in one table."""

    summary: str
    workload: str
    """A key of `workloads.WORKLOADS`."""
    workers: int
    contestants: dict[str, Contestant]
    points: tuple[Point, ...]
    ratios: tuple[tuple[str, str], ...]
    """The rows that are compared: (ours, the peer)."""
    unit: str = "ms"
    alone: bool = False
    """Whether each contestant has a process of its own."""

    @property
    def engines(self) -> list[str]:
        """The engines of its contestants."""
        return sorted({contestant.engine for contestant in self.contestants.values()})

    @property
    def has_target(self) -> bool:
        """Whether it says how fast ours should be."""
        return any(point.at_most for point in self.points)


LARGE = (8, 56, 56, 64)
RESNET_50 = Point((2, 224, 224, 3), 53)
"""The images that its 53 normalizations come from; `chain` has their shapes."""


def peers(engine: str) -> tuple[dict[str, Contestant], tuple[tuple[str, str], ...]]:
    """Returns ours and all peers that exist under an engine, and the pairs that are compared."""
    contestants = {
        "syncbn": Contestant("syncbn", engine),
        "Keras 3": Contestant("keras", engine),
        "syncbn on tf_keras": Contestant("syncbn", engine, 2),
        "tf_keras": Contestant("keras", engine, 2),
    }
    ratios = [("syncbn", "Keras 3"), ("syncbn on tf_keras", "tf_keras")]
    if engine in ("mirrored", "mirrored-gpu", "multiworker"):
        contestants["Keras 3 synchronized"] = Contestant("keras synchronized", engine)
        contestants["tf_keras synchronized"] = Contestant("keras synchronized", engine, 2)
        ratios += [
            ("syncbn", "Keras 3 synchronized"),
            ("syncbn on tf_keras", "tf_keras synchronized"),
        ]
    elif engine.startswith("horovod"):
        contestants["Horovod's own"] = Contestant("horovod", engine, 2)
        ratios.append(("syncbn on tf_keras", "Horovod's own"))
    if engine == "horovod-mpi":
        # The statistics bypass Horovod, which still carries the gradients.
        contestants["syncbn over MPI"] = Contestant("syncbn over MPI", engine)
        ratios.append(("syncbn over MPI", "syncbn"))
    return contestants, tuple(ratios)


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


def _with_targets() -> dict[str, Case]:
    """Returns the cases with a target that was set beforehand."""
    synchronized, plain = "Keras 3 synchronized", "Keras 3"
    four = {
        (8, 56, 56, 64): {synchronized: 0.55, plain: 0.60},
        (4, 28, 28, 256): {synchronized: 0.60},
        (2, 7, 7, 512): {synchronized: 0.60},
        (16, 64): {synchronized: 0.55},
    }
    mirrored, ratios = peers("mirrored")
    keras_3 = {name: one for name, one in mirrored.items() if one.keras == 3}
    among_keras_3 = tuple(pair for pair in ratios if pair[0] in keras_3)
    gloo, mpi = "horovod-gloo", "mpi"
    slow, own = "Horovod's own, its default cycle", "Horovod's own"
    own_over_mpi = "Horovod's own, MPI"
    added, raw = "added by synchronization", "2 x (all-reduce + numpy_function)"
    return {
        "target-mirrored": Case(
            "4 layers forward and backward, 2 replicas, against Keras 3",
            "stack",
            2,
            keras_3,
            tuple(Point(shape, 4, at_most=at_most) for shape, at_most in four.items()),
            among_keras_3,
        ),
        "target-one-replica": Case(
            "one replica against TensorFlow's fused batch norm in training form",
            "stack",
            1,
            {"syncbn": Contestant("syncbn", "alone"), "fused op": Contestant("fused op", "alone")},
            tuple(Point(LARGE, layers, at_most={"fused op": 1.4}) for layers in (1, 4)),
            (("syncbn", "fused op"),),
        ),
        "target-chain-mpi": Case(
            "ResNet-50's chain, ours over MPI against Horovod's own layer over Gloo",
            "chain",
            2,
            {
                "syncbn": Contestant("syncbn", mpi),
                own: Contestant("horovod", gloo, 2),
                slow: Contestant("horovod", "horovod-gloo-default", 2),
            },
            (RESNET_50._replace(at_most={own: 0.35}),),
            (("syncbn", own), ("syncbn", slow)),
        ),
        "target-chain-horovod": Case(
            "ResNet-50's chain, ours over Horovod against Horovod's own layer, a job each pair",
            "chain",
            2,
            {
                "syncbn": Contestant("syncbn", gloo, 2),
                own: Contestant("horovod", gloo, 2),
                "syncbn, MPI": Contestant("syncbn", "horovod-mpi", 2),
                own_over_mpi: Contestant("horovod", "horovod-mpi", 2),
            },
            (RESNET_50._replace(at_most={own: 0.7, own_over_mpi: 0.7}),),
            (("syncbn", own), ("syncbn, MPI", own_over_mpi)),
        ),
        "target-latency": Case(
            "time per layer that synchronization over MPI adds, against the messages alone",
            "latency",
            2,
            {
                "syncbn": Contestant("syncbn", mpi),
                "without synchronization": Contestant("syncbn local", mpi),
            },
            (Point((16, 64), 53, at_most={raw: 1.3}),),
            ((added, raw),),
            unit="µs",
        ),
        "target-memory": Case(
            "memory held between forward and backward, eager, and the peak of a step, 2 replicas",
            "memory",
            2,
            {name: keras_3[name] for name in ("syncbn", plain, synchronized)},
            (Point(LARGE, 16, at_most={synchronized: 0.5}),),
            tuple(
                (f"syncbn{what}", f"{peer}{what}")
                for what in ("", ", peak of a graph")
                for peer in (plain, synchronized)
            ),
            unit="MB",
            alone=True,
        ),
    }


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
        if engine == "alone":  # on one replica too, Keras' synchronized layer runs other code
            contestants["Keras 3 synchronized"] = Contestant("keras synchronized", engine)
            ratios += (("syncbn", "Keras 3 synchronized"),)
        where = f"{workers} replica{'s' if workers > 1 else ''} ({engine})"
        cases[f"model-resnet50-{engine}-{workers}"] = Case(
            f"a step of ResNet-50, in a custom loop and in fit, {where}",
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
    """Returns the pairs of all that `whole_models.times` measures."""
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
            "one small layer, 2 replicas: a smoke test",
            "stack",
            2,
            keras_3,
            (Point((16, 64)),),
            pairs,
        ),
        "tiny-model": Case(
            "a model with two normalizations, 2 replicas: a smoke test",
            "small-model",
            2,
            contestants,
            (Point((2, 16, 16, 3), 2),),
            _of_models(ratios),
        ),
    }


CASES: dict[str, Case] = {
    **_with_targets(),
    **_with_engines(),
    **_with_gpu(),
    **_with_traces(),
    **_with_models(),
    **_tiny(),
}
