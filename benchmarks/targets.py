"""The cases of which it was said beforehand how fast ours should be."""

from __future__ import annotations

from benchmarks.cases import LARGE, RESNET_50, Case, Contestant, Point, peers


def cases_with_targets() -> dict[str, Case]:
    """Returns the cases of which it was said beforehand how fast ours should be."""
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
