"""What constructs give for every derivative on every engine: right, or refused with a sentence.

``PYTHONPATH=launch python -m tests.control_flow_table`` writes it to docs/control-flow.md.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.control_flow import CONSTRUCTS, SINGLE
from tests.processes import ROOT

PAGE = ROOT / "docs" / "control-flow.md"
KINDS = [
    "outputs",
    "gradients",
    "second derivatives",
    "forward mode",
    "jacobian",
    "batch_jacobian",
]
PROCESSES = ("horovod", "mpi")
STRATEGIES = ("mirrored", "multiworker")
BRANCHES = ("tf.cond", "tf.switch_case", "tf.case", "if", "training=tensor")
WHILES = ("for", "while", "tf.while_loop", "tf.scan")
MAPS = ("tf.map_fn", "parallel tf.map_fn", "RNN")
# Eagerly, branches and loops are Python, and nothing new.
EAGER = [
    "none",
    "tf.vectorized_map",
    "tf.recompute_grad",
    "tf.function",
    "RNN",
    "tf.cond in tf.function",
    "tf.function in tf.function",
]

# Of pairs, second derivatives take seconds to trace; a branch in a loop, four.
DIFFERENTIATED_TWICE = [
    "tf.cond in tf.cond",
    "if in for",
    "tf.while_loop in tf.cond",
    "tf.function in tf.function",
    "tf.recompute_grad in tf.cond",
]


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
        "Replicas of a strategy of tf.distribute can communicate in the graph of `strategy.run` "
        "only, not in those of branches, loops and functions inside of it.",
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
        "`tf.recompute_grad` gives first derivatives only, and gives no reason in a branch.",
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


def constructs(layer: str, graph: bool) -> list[str]:
    """Returns those that are tested."""
    if not graph:
        return EAGER if layer == "SyncBatchNormalization" else EAGER[:-2]
    return list(CONSTRUCTS if layer == "SyncBatchNormalization" else SINGLE)


def kinds(construct: str, engine: str) -> list[str]:
    """Returns what is tested: of pairs with several replicas, only what trains."""
    pair, several = " in " in construct, engine != "local"
    if pair and several:
        return KINDS[:2]
    left_out = set()
    if pair and construct not in DIFFERENTIATED_TWICE:
        left_out.add("second derivatives")
    if construct != "none" and (pair or several):
        left_out.add("batch_jacobian")  # which goes the way of the other
    return [kind for kind in KINDS if kind not in left_out]


def page() -> str:
    """Returns the page of the documents."""
    shown = [r for r in REFUSALS if r.why]
    numbers = {id(r): f"[{n}](#{n})" for n, r in enumerate(shown, 1)}
    first = {r.sentence: numbers[id(r)] for r in reversed(shown)}

    def table(engine: str, names: list[str], graph: bool) -> list[str]:
        lines = [f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
        for name in names:
            tested = kinds(name, engine)
            texts = (text(refusal(engine, name, k, graph)) if k in tested else "" for k in KINDS)
            lines.append(f"| {name} | {' | '.join(texts)} |")
        return [*lines, ""]

    def text(cell: Refusal | None) -> str:
        return "right" if cell is None else numbers.get(id(cell), first[cell.sentence])

    notes = [
        f'{n}. <a id="{n}"></a>`` {r.sentence} ``: {r.why}'
        + (" It refuses the plain layer too, on one replica." if r.plain else "")
        for n, r in enumerate(shown, 1)
    ]
    lines = [
        INTRODUCTION,
        "## In a graph, one replica",
        "",
        *table("local", list(CONSTRUCTS), True),
        "## In a graph, Horovod and MPI",
        "",
        *table("mpi", list(CONSTRUCTS), True),
        "## In a graph, MirroredStrategy",
        "",
        *table("mirrored", list(CONSTRUCTS), True),
        "## In a graph, MultiWorkerMirroredStrategy",
        "",
        *table("multiworker", list(CONSTRUCTS), True),
        "## Eagerly, one replica, Horovod and MPI",
        "",
        "Branches and loops are plain Python then, and make no difference.",
        "",
        *table("local", EAGER, False),
        "## Eagerly, MirroredStrategy and MultiWorkerMirroredStrategy",
        "",
        *table("mirrored", EAGER, False),
        "## What the errors say",
        "",
        *notes,
        "",
    ]
    return "\n".join(lines)


INTRODUCTION = """\
# Control flow and derivatives

A training call in branches, loops, mapped and nested functions, and what can be asked of it.
*Right* is what plain mathematics in float64 gives for the whole batch in one process: the outputs,
each replica's own share of the gradients, and the moving statistics afterwards. Everything else
raises an error, to which a number links. Both layers behave alike.

`tests/control_flow_table.py` holds the tables and wrote this page; `tests/control_flow.py` has the
code of each row. Each cell is tested, on each engine of its table
(`tests/parallel/test_control_flow.py`, `tests/single/test_control_flow.py`); pairs of constructs
with `SyncBatchNormalization` only. Empty cells are not tested. *A in B* is an A inside of a B.
*training=tensor* is a call whose `training` the graph does not know. *Replicas delayed* make
their calls at different times.

Two things hold for plain layers too. The calls of a vectorized loop all start from the same
moving statistics, and the update of the first one remains. `tf.keras.layers.RNN` calls its cell
once more for the first step, to infer what it returns, which updates the moving statistics once
more. And two hold for plain layers only: their second derivatives are wrong, as `tf.nn.moments`
stops a gradient, and inside of `tf.recompute_grad` their statistics are updated twice.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
