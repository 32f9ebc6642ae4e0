"""What constructs give for every derivative on every engine: right, or refused with a sentence.

``python -m tests.control_flow_table`` writes it to docs/control-flow.md. With
``SYNCBN_TEST_CELLS=all`` every cell is tested, otherwise a choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from tests.control_flow import CONSTRUCTS
from tests.processes import ROOT

PAGE = ROOT / "docs" / "control-flow.md"
RUNS = ROOT / "tests" / "control_flow_runs.json"
"""When every cell was tested: `tests/control_flow_runs.py` writes it."""
ALL = os.environ.get("SYNCBN_TEST_CELLS") == "all"

LAYERS = ("SyncBatchNormalization", "SyncCentering")
PLAIN = "BatchNormalization"
KINDS = (
    "outputs",
    "gradients",
    "second derivatives",
    "forward mode",
    "jacobian",
    "batch_jacobian",
)
PROCESSES = ("horovod", "mpi")
TWO_LEVELS = ("horovod+mirrored", "mpi+mirrored")
STRATEGIES = ("mirrored", "multiworker", *TWO_LEVELS)
ENGINES = ("local", *PROCESSES, *STRATEGIES)
BRANCHES = ("tf.cond", "tf.switch_case", "tf.case", "if", "training=tensor")
WHILES = ("for", "while", "tf.while_loop", "tf.scan")
MAPS = ("tf.map_fn", "parallel tf.map_fn", "RNN")
# Eagerly, the other constructs are Python, and what is inside of them is as if it were alone.
NOT_PYTHON = ("tf.vectorized_map", "tf.recompute_grad", "tf.function")


class Cell(NamedTuple):
    layer: str
    graph: bool
    construct: str
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}, {'graph' if self.graph else 'eager'}, {self.construct}, {self.kind}"


class Refusal(NamedTuple):
    """Cells that raise an error; what is empty means all of its kind."""

    sentence: str
    """What the error's text contains."""
    why: str
    plain: bool = False
    """Whether TensorFlow refuses the plain layer on one replica too."""
    constructs: tuple[str, ...] = ()
    """They, or pairs with one of them."""
    apart_from: tuple[str, ...] = ()
    """Pairs, or outer constructs of pairs, that make a difference."""
    kinds: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    graph: bool | None = None

    def covers(self, engine: str, construct: str, kind: str, graph: bool) -> bool:
        parts = construct.removesuffix(", replicas delayed").split(" in ")
        return (
            (not self.constructs or any(part in self.constructs for part in (construct, *parts)))
            and not {construct, parts[-1]} & {*self.apart_from}
            and (not self.kinds or kind in self.kinds)
            and (not self.engines or engine in self.engines)
            and self.graph in (None, graph)
        )


# The first that covers a cell counts. One without a reason is explained by an earlier one.
REFUSALS = [
    Refusal(
        "Forward-mode differentiation cannot follow a collective of",
        "Inside of a graph TensorFlow would take its tangent for zero. An accumulator that is made "
        "outside of the graph, around the call of the function, is right.",
        constructs=("none", *BRANCHES, "tf.vectorized_map"),
        apart_from=("tf.function", "tf.recompute_grad", *WHILES, *MAPS),
        kinds=("forward mode",),
        engines=(*PROCESSES, *STRATEGIES),
        graph=True,
    ),
    Refusal(
        "Forward-mode differentiation cannot follow a collective of",
        "",
        constructs=("tf.vectorized_map",),
        kinds=("forward mode",),
        engines=(*PROCESSES, *STRATEGIES),
        graph=False,
    ),
    Refusal(
        "A vectorized loop cannot contain a collective of tf.distribute",
        "TensorFlow would take what other processes compute for the same in all iterations.",
        constructs=("tf.vectorized_map",),
        apart_from=("tf.cond in tf.vectorized_map",),
        engines=("multiworker",),
        graph=True,
    ),
    Refusal(
        "Attempting to slice scalar input",
        "TensorFlow cannot vectorize an assignment in a branch.",
        plain=True,
        constructs=("tf.cond in tf.vectorized_map",),
        kinds=tuple(kind for kind in KINDS if kind != "forward mode"),
        engines=("local", *PROCESSES),
    ),
    Refusal(
        "recompute_grad tried to transpose grad of",
        "`tf.recompute_grad` gives first derivatives in reverse mode only.",
        plain=True,
        constructs=("tf.recompute_grad",),
        apart_from=("tf.recompute_grad in tf.cond",),
        kinds=("second derivatives",),
    ),
    Refusal(
        "recompute_grad tried to transpose grad of",
        "",
        constructs=("tf.recompute_grad",),
        kinds=("forward mode",),
    ),
    Refusal(
        "`dtype` <dtype: 'variant'> is not compatible with",
        "TensorFlow has no forward mode for loops in a graph that collect outputs.",
        plain=True,
        constructs=MAPS,
        apart_from=("tf.function",),
        kinds=("forward mode",),
        graph=True,
    ),
    Refusal(
        "`merge_call` called while defining a new graph",
        "A strategy of tf.distribute lets replicas meet in the graph of `strategy.run` only, not "
        "in those of branches, loops and functions inside of it.",
        constructs=(*BRANCHES, *WHILES, *MAPS, "tf.function"),
        engines=STRATEGIES,
        graph=True,
    ),
    Refusal(
        "`merge_call` called while defining a new graph",
        "",
        constructs=("tf.function", "tf.vectorized_map"),
        engines=STRATEGIES,
        graph=False,
    ),
    Refusal(
        "A vectorized loop cannot contain a collective of tf.distribute",
        "",
        kinds=("jacobian", "batch_jacobian"),
        engines=("multiworker",),
        graph=True,
    ),
    Refusal(
        "`merge_call` called while defining a new graph",
        "",
        kinds=("jacobian", "batch_jacobian"),
        engines=STRATEGIES,
        graph=False,
    ),
    Refusal(
        "Tensor.graph is undefined when eager execution is enabled",
        "`tf.recompute_grad` in a branch reads variables that TensorFlow does not find there.",
        plain=True,
        constructs=("tf.recompute_grad in tf.cond",),
        kinds=("gradients", "jacobian", "batch_jacobian"),
    ),
    Refusal(
        "Encountered an exception while vectorizing the",
        "TensorFlow cannot vectorize the gradient of a branch with what it keeps of a loop.",
        plain=True,
        constructs=("tf.cond in tf.recompute_grad", "parallel tf.map_fn in tf.cond"),
        kinds=("jacobian", "batch_jacobian"),
        graph=True,
    ),
    Refusal(
        "of a variable without handle data",
        "TensorFlow has no forward mode for loops in a graph in which variables are assigned.",
        plain=True,
        constructs=WHILES,
        apart_from=("tf.function",),
        kinds=("forward mode",),
        graph=True,
    ),
    Refusal(
        "AssertionError",
        "TensorFlow has no forward mode for branches of branches in a graph.",
        plain=True,
        constructs=("tf.case", "tf.cond in tf.cond", "training=tensor in tf.cond"),
        apart_from=("tf.function",),
        kinds=("forward mode",),
        graph=True,
    ),
    Refusal(
        "Could not generate a generic TraceType",
        "TensorFlow has no forward mode for `tf.switch_case` in a graph.",
        plain=True,
        constructs=("tf.switch_case",),
        kinds=("forward mode",),
        graph=True,
    ),
    Refusal(
        "'NoneType' object is not iterable",
        "TensorFlow cannot vectorize an assignment in a branch, and then fails to say so.",
        plain=True,
        constructs=("tf.cond in tf.vectorized_map",),
        kinds=("forward mode",),
        engines=("local",),
    ),
    Refusal(
        "AssertionError",
        "`tf.recompute_grad` gives first derivatives only, and says no more in a branch.",
        plain=True,
        constructs=("tf.recompute_grad in tf.cond",),
        kinds=("second derivatives",),
        engines=("local",),
    ),
]


def refusal(engine: str, construct: str, kind: str, graph: bool) -> Refusal | None:
    """Returns what is said of a cell, or None where it must be right."""
    covering = (r for r in REFUSALS if r.covers(engine, construct, kind, graph))
    return next(covering, None)


def constructs(engine: str, graph: bool) -> list[str]:
    return [
        name
        for name in CONSTRUCTS
        if (graph or " in " not in name or name.endswith(NOT_PYTHON))
        and (engine != "local" or "delayed" not in name)
    ]


def cells(engine: str) -> list[Cell]:
    """Returns all of them, of our layers."""
    return [
        Cell(layer, graph, construct, kind)
        for layer in LAYERS
        for graph in (True, False)
        for construct in constructs(engine, graph)
        for kind in KINDS
    ]


def chosen(engine: str) -> list[Cell]:
    """Returns those that are tested where not all are.

    Each construct with each kind of derivative, in a graph, and of every second pair one kind; with
    one of the layers. The layer, the pairs and their kinds are others from engine to engine.
    """
    shift = ENGINES.index(engine)
    found = []
    for graph in (True, False):
        for row, name in enumerate(constructs(engine, graph)):
            pair = " in " in name
            if pair and (not graph or (row + shift) % 2):
                continue
            if not graph and name not in ("none", "RNN", *NOT_PYTHON):
                continue
            for column, kind in enumerate(KINDS):
                turn = row // 2 + shift
                if not pair or turn % len(KINDS) == column:
                    layer = LAYERS[(turn // len(KINDS) if pair else row + column + shift) % 2]
                    found.append(Cell(layer, graph, name, kind))
    return found


def tested(engine: str) -> list[Cell]:
    return cells(engine) if ALL else chosen(engine)


def refused_to_plain_layers() -> list[tuple[Cell, Refusal]]:
    """Returns what TensorFlow is said to refuse to the plain layer too, on one replica."""
    found = {
        (Cell(PLAIN, graph, name, kind), REFUSALS.index(refused))
        for engine in ENGINES
        for graph in (True, False)
        for name in constructs("local", graph)
        for kind in KINDS
        if (refused := refusal(engine, name, kind, graph)) and refused.plain
    }
    return [(cell, REFUSALS[index]) for cell, index in sorted(found)]


GROUPS = {
    "One replica": ("local",),
    "Horovod and MPI": PROCESSES,
    "MirroredStrategy": ("mirrored",),
    "MultiWorkerMirroredStrategy, and a MirroredStrategy in each process of Horovod or MPI": (
        "multiworker",
        *TWO_LEVELS,
    ),
}


def page() -> str:
    """Returns the page of the documents."""
    shown = [r for r in REFUSALS if r.why]
    numbers = {id(r): f"[{n}](#{n})" for n, r in enumerate(shown, 1)}
    first = {r.sentence: numbers[id(r)] for r in reversed(shown)}

    def text(engines: tuple[str, ...], name: str, kind: str, graph: bool) -> str:
        (cell,) = {refusal(engine, name, kind, graph) for engine in engines}
        return "right" if cell is None else numbers.get(id(cell), first[cell.sentence])

    def table(engines: tuple[str, ...], graph: bool) -> Iterator[str]:
        rows: dict[tuple[str, ...], list[str]] = {}
        for name in constructs(engines[0], graph):
            row = tuple(text(engines, name, kind, graph) for kind in KINDS)
            rows.setdefault(row, []).append(name)
        yield f"| | {' | '.join(KINDS)} |"
        yield "|---" * (len(KINDS) + 1) + "|"
        for row, names in rows.items():
            yield f"| {'; '.join(names)} | {' | '.join(row)} |"
        yield ""

    lines = [INTRODUCTION, *_runs(), ""]
    for graph in (True, False):
        for title, engines in GROUPS.items():
            lines += [f"## {'In a graph' if graph else 'Eagerly'}: {title}", ""]
            lines += table(engines, graph)
    notes = [
        f'{n}. <a id="{n}"></a>`` {r.sentence} ``: {r.why}'
        + (" It refuses the plain layer too, on one replica." if r.plain else "")
        for n, r in enumerate(shown, 1)
    ]
    return "\n".join([*lines, "## What the errors say", "", *notes, ""])


def _runs() -> Iterator[str]:
    yield "| | cells | all tested | with | cells that CI tests |"
    yield "|---|---|---|---|---|"
    runs = json.loads(RUNS.read_text())
    for engine in ENGINES:
        run = runs[engine]
        few = len(chosen(engine))
        yield f"| {engine} | {run['cells']} | {run['date']} | {run['versions']} | {few} |"


INTRODUCTION = """\
# Control flow and derivatives

A training call in branches, loops, mapped and nested functions, and what can be asked of it. What
is right is what plain mathematics in float64 gives for the whole batch in one process: the
outputs, each replica's own share of the gradients, and the moving statistics afterwards. The rest
raises an error, to which a number leads. Both layers give the same.

*A in B* is an A inside of a B: of each family of constructs there is one in one of each other, and
of its own. *training=tensor* is a call whose `training` the graph does not know; what is inside of
another construct knows no `training`, so there is nothing inside of it. *Replicas delayed* come to
their calls at different times. Eagerly, branches, loops and cells are Python, and what is inside of
them is as if it were alone.

Two things hold for plain layers too. The calls of a vectorized loop all start from the same
moving statistics, and the first one's stay. `tf.keras.layers.RNN` calls its cell once more for
the first step, to learn what it returns, which moves the moving statistics once more. And two
hold only for them: a plain layer's second derivatives are wrong, as `tf.nn.moments` stops a
gradient, and inside of `tf.recompute_grad` its statistics move twice.

`tests/control_flow_table.py` holds the tables and wrote this page; `tests/control_flow.py` has the
code of each construct. A cell is a construct, a derivative, a layer, an engine, and a graph or
none. `make test-control-flow` tests all of them; where TensorFlow is said to refuse the plain layer
too, that is among the cells of one replica. CI tests a choice: on every engine each construct with
each derivative in a graph, with one of the layers in turns; eagerly what is not Python; and of
every second pair one derivative. The pairs and their derivatives are others on other engines.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
