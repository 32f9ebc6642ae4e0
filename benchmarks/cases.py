"""What a case is."""

from __future__ import annotations

from typing import NamedTuple


class Contestant(NamedTuple):
    """One of those that take turns: what it is, and the job that it runs in."""

    layer: str
    """A key of `contestants.LAYERS`."""
    engine: str
    """A key of `jobs.ENGINES`."""
    keras: int = 3


class Point(NamedTuple):
    """One input that a case measures."""

    shape: tuple[int, ...]
    """Of one replica's batch."""
    layers: int = 1
    dtype: str = "float32"
    """Or a policy of mixed precision."""
    at_most: dict[str, float] = {}  # noqa: RUF012  (never changed)
    """By peer: what ours may take, as a multiple of theirs."""

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
    """Of which rows: (ours, the peer)."""
    unit: str = "ms"
    alone: bool = False
    """Each contestant has a process of its own."""

    @property
    def engines(self) -> list[str]:
        """Those of its contestants."""
        return sorted({contestant.engine for contestant in self.contestants.values()})

    @property
    def has_target(self) -> bool:
        """Whether it says how fast ours should be."""
        return any(point.at_most for point in self.points)


LARGE = (8, 56, 56, 64)
RESNET_50 = Point((2, 224, 224, 3), 53)
"""The images that its 53 normalizations come from; `chain` has their shapes."""


def peers(engine: str) -> tuple[dict[str, Contestant], tuple[tuple[str, str], ...]]:
    """Returns ours and all peers that exist under an engine, and whom they are compared with."""
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
