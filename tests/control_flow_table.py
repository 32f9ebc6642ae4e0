"""What constructs give for every derivative on every engine: right, or refused with a sentence.

``python -m tests.control_flow_table`` writes it to docs/control-flow.md. With
``SYNCBN_TEST_CELLS=all`` every cell is tested, with that of a family those with one of its
constructs outermost, otherwise a choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.control_flow import CONSTRUCTS, FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "control-flow.md"
RUNS = ROOT / "tests" / "control_flow_runs.json"
"""When every cell was tested: `tests/control_flow_runs.py` writes it."""
ASKED = os.environ.get("SYNCBN_TEST_CELLS", "")

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


class Where(NamedTuple):
    """A cell on an engine."""

    engine: str
    cell: Cell

    @property
    def chain(self) -> tuple[str, ...]:
        """The constructs, from the outermost to that of the call."""
        name = self.cell.construct.removesuffix(", replicas delayed")
        return () if name == "none" else tuple(reversed(name.split(" in ")))

    @property
    def first(self) -> str:
        """The outermost construct that is no branch."""
        return next((part for part in self.chain if part not in BRANCHES), "")

    @property
    def forward(self) -> bool:
        return self.cell.kind == "forward mode"

    @property
    def jacobian(self) -> bool:
        return self.cell.kind in ("jacobian", "batch_jacobian")

    def only(self, *constructs: str) -> bool:
        return {*self.chain} <= {*constructs}

    def nests(self, outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
        """Says whether one of ``inner`` is inside of one of ``outer``."""
        return len(self.chain) == 2 and self.chain[0] in outer and self.chain[1] in inner


class Refusal(NamedTuple):
    """Cells that raise an error."""

    sentence: str
    """What the error's text contains."""
    why: str
    covers: Callable[[Where], bool]
    plain: str = ""
    """What the error's text contains with which TensorFlow refuses the plain layer on one replica,
    if it does."""


# What TensorFlow says when it refuses something.
SYMBOLIC = "Iterating over a symbolic `tf.Tensor` is not allowed"
NO_RECOMPUTATION = "recompute_grad tried to transpose grad of"
NO_DTYPE = "`dtype` <dtype: 'variant'> is not compatible with"
NO_BOOL = "Using a symbolic `tf.Tensor` as a Python `bool` is not allowed"
NONE = "'NoneType' object is not iterable"
NO_SLICE = "Attempting to slice scalar input"
NO_STACK = "Attempted to stack a variant-dtype tensor"
NO_GRAPH = "Tensor.graph is undefined when eager execution is enabled"
NO_CAPTURE = "is in list of internal_captures but not in"
NO_DATA = "of a variable without handle data"
NOT_VECTORIZED = "Encountered an exception while vectorizing the"
NO_TYPE = "Could not generate a generic TraceType"
ASSERTION = "AssertionError"

FUNCTION, RECOMPUTE, VECTORIZED = ("tf.function",), ("tf.recompute_grad",), ("tf.vectorized_map",)
SEVERAL = (*PROCESSES, *STRATEGIES)

# The first that covers a cell counts.
REFUSALS = [
    Refusal(
        SYMBOLIC,
        "Autograph leaves what `tf.vectorized_map` calls eagerly as it is.",
        lambda w: not w.cell.graph and w.nests(VECTORIZED, ("for", "while", "if")),
        plain=SYMBOLIC,
    ),
    # What strategies and collectives refuse.
    Refusal(
        "Forward-mode differentiation cannot follow a collective of",
        "Inside of a graph TensorFlow would take its tangent for zero. An accumulator that is made "
        "outside of the graph, around the call of the function, is right.",
        lambda w: (
            w.engine in SEVERAL
            and w.forward
            and w.only(*BRANCHES, *VECTORIZED)
            and (w.cell.graph or w.first in VECTORIZED)
        ),
    ),
    Refusal(
        "loses the gradients of variables",
        "TensorFlow takes them for zero there, a plain layer's too. `SyncCentering` has none.",
        lambda w: (
            w.cell.graph
            and w.nests(VECTORIZED, RECOMPUTE)
            and w.cell.layer == "SyncBatchNormalization"
        ),
    ),
    Refusal(
        NO_DTYPE,
        "TensorFlow has no forward mode for loops in a graph that collect outputs.",
        lambda w: (
            w.forward
            and (w.cell.graph or w.chain[:1] == VECTORIZED)
            and next((p for p in w.chain if p not in (*BRANCHES, *VECTORIZED)), "") in MAPS
        ),
        plain=NO_DTYPE,
    ),
    Refusal(
        "A vectorized loop cannot contain a collective of",
        "TensorFlow would take what other processes compute for the same in all iterations.",
        lambda w: (
            w.engine in ("multiworker", *TWO_LEVELS)
            and w.cell.graph
            and (
                (w.only(*VECTORIZED) and w.chain)
                or (w.nests(VECTORIZED, RECOMPUTE) and not w.forward)
                or (w.only(*RECOMPUTE) and w.jacobian)
                or w.nests(RECOMPUTE, VECTORIZED)
                # RNN calls its cell outside of the loop first.
                or w.nests(("RNN",), VECTORIZED)
            )
        ),
    ),
    Refusal(
        NO_RECOMPUTATION,
        "`tf.recompute_grad` gives first derivatives in reverse mode only.",
        lambda w: (
            w.engine in STRATEGIES
            and _beyond_first(w)
            and "tf.recompute_grad" in w.chain
            and _replicas_meet(w)
            and (w.forward or not w.nests(VECTORIZED, RECOMPUTE))
        ),
        plain=NO_RECOMPUTATION,
    ),
    Refusal(
        "`merge_call` called while defining a new graph",
        "Replicas of a strategy of tf.distribute can communicate in the graph of `strategy.run` "
        "only, not in those of branches, loops and functions inside of it.",
        lambda w: (
            w.engine in STRATEGIES
            and (
                not w.only(*VECTORIZED, *RECOMPUTE)
                if w.cell.graph
                else w.jacobian or not {*w.chain}.isdisjoint((*VECTORIZED, *FUNCTION))
            )
        ),
    ),
    # What TensorFlow refuses to a vectorized loop.
    Refusal(
        NONE,
        "TensorFlow cannot vectorize an assignment in a branch, and then fails to say so.",
        lambda w: w.forward and w.nests(VECTORIZED, ("tf.cond", "tf.switch_case", "tf.case", "if")),
        plain=NONE,
    ),
    Refusal(
        NO_SLICE,
        "TensorFlow cannot vectorize an assignment in a branch, loop or function.",
        lambda w: (
            w.nests(VECTORIZED, FUNCTION)
            or (
                w.nests(VECTORIZED, ("tf.cond", "tf.switch_case", "tf.case", "if", *WHILES, *MAPS))
                and not w.forward
            )
        ),
        plain=NO_SLICE,
    ),
    Refusal(
        NO_STACK,
        "TensorFlow cannot vectorize what a branch keeps for these derivatives.",
        lambda w: w.nests(VECTORIZED, ("training=tensor",)) and _beyond_first(w),
        plain=NO_STACK,
    ),
    # What it refuses to `tf.recompute_grad`.
    Refusal(
        NO_GRAPH,
        "`tf.recompute_grad` in a branch reads variables that TensorFlow does not find there.",
        lambda w: (
            w.nests(BRANCHES, RECOMPUTE)
            and w.cell.graph
            and w.cell.kind in ("gradients", "jacobian", "batch_jacobian")
        ),
        plain=NO_GRAPH,
    ),
    Refusal(
        ASSERTION,
        "`tf.recompute_grad` gives first derivatives only, and gives no reason in a branch.",
        lambda w: (
            w.nests(BRANCHES, RECOMPUTE) and w.cell.graph and w.cell.kind == "second derivatives"
        ),
        plain=ASSERTION,
    ),
    Refusal(
        NO_CAPTURE,
        "`tf.recompute_grad` in a loop reads variables that TensorFlow does not find there.",
        lambda w: (
            w.nests((*WHILES, *MAPS), RECOMPUTE)
            and w.cell.graph
            and w.cell.kind in ("gradients", "second derivatives")
        ),
        plain=NO_CAPTURE,
    ),
    Refusal(
        NO_DATA,
        "TensorFlow has no forward mode for loops in a graph in which variables are assigned.",
        lambda w: (
            w.forward and ((w.cell.graph and w.first in WHILES) or w.nests(VECTORIZED, WHILES))
        ),
        plain=NO_DATA,
    ),
    Refusal(
        NO_RECOMPUTATION,
        "",
        lambda w: (
            "tf.recompute_grad" in w.chain
            and _beyond_first(w)
            and (w.forward or not w.nests(VECTORIZED, RECOMPUTE))
        ),
        plain=NO_RECOMPUTATION,
    ),
    Refusal(
        NOT_VECTORIZED,
        "TensorFlow cannot vectorize the gradient of what is inside of a branch or loop, or "
        "recomputed.",
        lambda w: (
            w.jacobian
            and (
                (w.cell.graph and w.nests((*BRANCHES, *WHILES, *MAPS), MAPS))
                or (w.cell.graph and w.nests((*WHILES, *MAPS), RECOMPUTE))
                or w.nests(RECOMPUTE, BRANCHES)
            )
        ),
        plain=NOT_VECTORIZED,
    ),
    Refusal(
        NO_DTYPE,
        "TensorFlow cannot vectorize the gradient of a loop that it recomputes.",
        lambda w: w.jacobian and w.nests(RECOMPUTE, MAPS),
        plain=NOT_VECTORIZED,
    ),
    # What it has no forward mode for.
    Refusal(
        ASSERTION,
        "TensorFlow has no forward mode for branches of branches in a graph.",
        lambda w: (
            w.forward
            and w.cell.graph
            and w.only(*BRANCHES)
            and (len(w.chain) == 2 or w.chain == ("tf.case",))
        ),
        plain=ASSERTION,
    ),
    Refusal(
        NO_TYPE,
        "TensorFlow has no forward mode for `tf.switch_case` in a graph.",
        lambda w: w.forward and w.cell.graph and w.chain == ("tf.switch_case",),
        plain=NO_TYPE,
    ),
]


def _beyond_first(where: Where) -> bool:
    return where.cell.kind in ("second derivatives", "forward mode")


def _replicas_meet(where: Where) -> bool:
    """Says whether replicas of a strategy can meet there, vectorized loops apart."""
    if where.cell.graph:
        return where.only(*RECOMPUTE, *VECTORIZED)
    return not {*where.chain} & {*VECTORIZED, *FUNCTION}


def refusal(engine: str, cell: Cell) -> Refusal | None:
    """Returns what is said of a cell, or None where it must be right."""
    covering = (r for r in REFUSALS if r.covers(Where(engine, cell)))
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

    Each construct by itself, in a graph, or eagerly where it is not Python, with one or two of the
    kinds and one of the layers in turns; and every fifth pair in a graph, with one kind and layer.
    Which ones is another matter on another engine: together the five of one level have all.
    """
    shift = ENGINES.index(engine)
    pairs = [name for name in constructs(engine, True) if " in " in name]
    alone = [
        Cell(LAYERS[(row + column + shift) % 2], graph, name, kind)
        for graph in (True, False)
        for row, name in enumerate(constructs(engine, graph))
        for column, kind in enumerate(KINDS)
        if name not in pairs and (graph or name in ("none", "RNN", *NOT_PYTHON))
        if (row + column + shift) % 5 == 0
    ]
    nested = [
        Cell(LAYERS[turn // len(KINDS) % 2], True, name, KINDS[turn % len(KINDS)])
        for turn, name in enumerate(pairs[shift % 5 :: 5], shift)
    ]
    return alone + nested


def of_family(cell: Cell, family: str) -> bool:
    """Says whether the outermost construct is one of them; "all" are of all."""
    outermost = cell.construct.removesuffix(", replicas delayed").split(" in ")[-1]
    return family == "all" or outermost in FAMILIES[family]


def to_test(engine: str, asked: str = ASKED) -> list[Cell]:
    """Returns the cells that are tested: the choice, or all of a family."""
    if not asked:
        return chosen(engine)
    return [cell for cell in cells(engine) if of_family(cell, asked)]


def refused_to_plain_layers(asked: str = ASKED) -> list[tuple[Cell, tuple[str, ...]]]:
    """Returns what TensorFlow is said to refuse to the plain layer, and what it may say."""
    found: dict[Cell, tuple[str, ...]] = {}
    for engine in ENGINES:
        for cell in to_test(engine, asked):
            said = refusal(engine, cell)
            if said and said.plain and "delayed" not in cell.construct:
                # The plain layer of Keras 3 does not even take a tensor for `training`.
                other = (NO_BOOL,) if "training=tensor" in cell.construct else ()
                sentences = found.setdefault(cell._replace(layer=PLAIN), (said.plain, *other))
                assert said.plain in sentences, "one reason only for each cell"
    return list(found.items())


def plain_in_ci() -> list[tuple[Cell, tuple[str, ...]]]:
    """Returns one that is refused for each of TensorFlow's reasons."""
    reasons = {said[0]: (cell, said) for cell, said in refused_to_plain_layers("all")}
    return list(reasons.values())


def count(engine: str, family: str) -> int:
    """Returns how many cells there are, with those of the plain layer that one replica shows."""
    plain = refused_to_plain_layers(family) if engine == "local" else []
    return len(to_test(engine, family)) + len(plain)


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

    def text(engines: tuple[str, ...], cell: Cell) -> str:
        (said,) = {refusal(engine, cell) for engine in engines}
        return "right" if said is None else numbers.get(id(said), first[said.sentence])

    def table(engines: tuple[str, ...], graph: bool) -> Iterator[str]:
        rows: dict[tuple[str, ...], list[str]] = {}
        for name in constructs(engines[0], graph):
            of_layers = {
                layer: tuple(text(engines, Cell(layer, graph, name, kind)) for kind in KINDS)
                for layer in LAYERS
            }
            alike = len({*of_layers.values()}) == 1
            for layer, row in of_layers.items():
                names = rows.setdefault(row, [])
                if name not in names:
                    names.append(name if alike else f"{name} ({layer})")
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
        f'{n}. <a id="{n}"></a>`` {r.sentence} ``: {r.why}' + _plain(r)
        for n, r in enumerate(shown, 1)
    ]
    return "\n".join([*lines, "## What the errors say", "", *notes, ""])


def _plain(refused: Refusal) -> str:
    if not refused.plain:
        return ""
    other = f" (`` {refused.plain} ``)" if refused.plain != refused.sentence else ""
    return f" It refuses the plain layer too, on one replica{other}."


def _runs() -> Iterator[str]:
    yield "| | cells | of them CI tests | all were tested | with |"
    yield "|---|---|---|---|---|"
    ran = json.loads(RUNS.read_text())
    for engine in ENGINES:
        runs = ran.get(engine, {})
        number = sum(count(engine, family) for family in FAMILIES)
        few = len(chosen(engine)) + (len(plain_in_ci()) if engine == "local" else 0)
        days = " to ".join(sorted({run["date"] for run in runs.values()})) or "no"
        missing = [family for family in FAMILIES if family not in runs]
        if missing:
            days += f"; not yet: outermost {', '.join(missing)}"
        versions = "; ".join(sorted({run["versions"] for run in runs.values()}))
        yield f"| {engine} | {number} | {few} | {days} | {versions} |"


INTRODUCTION = """\
# Control flow and derivatives

A training call in branches, loops, mapped and nested functions, and what can be asked of it.
*Right* is what plain mathematics in float64 gives for the whole batch in one process: the outputs,
each replica's own share of the gradients, and the moving statistics afterwards. Everything else
raises an error, to which a number links. Both layers behave alike, unless a row names one.

*A in B* is an A inside of a B: of each family of constructs (branches, loops, maps, and one each of
the others) there is one in one of every family. *training=tensor* is a call whose `training` the
graph does not know; nothing can be inside of a call. *Replicas delayed* make their calls at
different times. Eagerly, branches, loops and cells are plain Python, and make no difference to what
is inside of them.

Two things hold for plain layers too. The calls of a vectorized loop all start from the same
moving statistics, and the update of the first one remains. `tf.keras.layers.RNN` calls its cell
once more for the first step, to infer what it returns, which updates the moving statistics once
more. And two hold for plain layers only: their second derivatives are wrong, as `tf.nn.moments`
stops a gradient, and inside of `tf.recompute_grad` their statistics are updated twice.

`tests/control_flow_table.py` holds the tables and wrote this page; `tests/control_flow.py` has the
code of each construct. A cell is a construct, a derivative, a layer, an engine, and a graph or
none. `make test-control-flow` tests all of them, with two replicas, or two in each of two
processes; one replica's include the plain layer, wherever TensorFlow is said to refuse it too.
CI tests a choice on every engine: each construct by itself in a graph, and eagerly where it is not
Python, with one or two of the six, and every fifth pair with one; the layers in turns. Which ones
is another matter on another engine, and all are tested on one at least.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
