"""The cases that every engine is put through, and how to draw more of them."""

from hypothesis import strategies as st

from tests.contract import Case


def splits(size):
    """Even, ragged, partly empty, and wholly empty batches for ``size`` replicas."""
    ragged = tuple(range(1, size + 1))
    return [(3,) * size, ragged, (*ragged[:-1], 0), (0,) * (size - 1) + (4,), (0,) * size]


def some_groups(size):
    """Groups of ``size`` replicas: of one each, of different sizes, or of neighbours."""
    named = {2: ("groups", ((1,), (0,))), 3: ("groups", ((2, 0), (1,)))}
    return named.get(size, ("group_size", max(size // 2, 1)))


RENORM = (
    ("renorm", True),
    ("renorm_momentum", 0.8),
    ("renorm_clipping", {"rmin": 0.5, "rmax": 1.5, "dmax": 0.7}),
)
VIRTUAL = (("virtual_batch_size", 2),)


def paired_cases(size):
    """Groups, renormalization, virtual batches and masks: each alone, and in pairs."""
    even, ragged, last_empty, one_full, empty = splits(size)
    groups = (some_groups(size),)
    center = "SyncCentering"
    nan = float("nan")
    return [
        Case(ragged, options=groups, steps=2),
        Case(last_empty, options=groups, graph=True),
        Case(empty, options=groups),
        Case(ragged, options=groups, layer=center, steps=2, graph=True),
        Case(ragged, options=groups, masked=True, poison=nan),
        Case(one_full, options=groups, masked=True, axis=1, layer=center),
        Case(ragged, options=(*groups, ("momentum", None)), steps=2),
        Case(ragged, options=(*groups, ("unbiased_moving_variance", True)), axis=1),
        Case(ragged, options=(*groups, *RENORM), steps=3),
        Case(last_empty, options=(*groups, *RENORM), masked=True, steps=2, axis=1),
        Case(ragged, options=groups, dtype="float16"),
        Case(ragged, options=groups, sample=(48, 48, 64), graph=True),
        Case(ragged, options=(("renorm", True),), steps=3),
        Case(last_empty, options=RENORM, steps=2, graph=True),
        Case(empty, options=RENORM),
        Case(ragged, options=RENORM, masked=True, poison=nan, steps=2),
        Case(ragged, options=(*RENORM, ("momentum", None)), steps=2, axis=1),
        Case(ragged, options=(*RENORM, ("center", False), ("scale", False)), steps=2),
        Case(even, options=RENORM, sample=(48, 48, 64), steps=2),
        Case(ragged, options=VIRTUAL, steps=2),
        Case(last_empty, options=VIRTUAL, graph=True, axis=1),
        Case(empty, options=VIRTUAL),
        Case(ragged, options=VIRTUAL, masked=True, poison=nan, graph=True),
        Case(last_empty, options=VIRTUAL, masked=True, axis=1, sample=(3, 4, 2, 5)),
        Case(ragged, options=(*VIRTUAL, ("unbiased_moving_variance", True)), sample=(4, 6)),
        Case(ragged, options=(*VIRTUAL, *RENORM), steps=3),
        Case(ragged, options=VIRTUAL, sample=(7,), graph=True),
        Case(last_empty, options=(*VIRTUAL, *RENORM), sample=(7,), masked=True, tiny=True),
        Case(even, options=(("virtual_batch_size", 1),), dtype="bfloat16"),
        Case(even, options=VIRTUAL, mean=1e3, spread=10.0, sample=(16, 16, 4)),
    ]


def messages(size):
    """The cases that differ in what is sent, and to whom; others differ in arithmetic alone.

    They are among `cases` and `paired_cases`.
    """
    _, ragged, last_empty, _, empty = splits(size)
    groups = (some_groups(size),)
    center = "SyncCentering"
    return [
        Case(ragged),
        Case(empty),
        Case(empty, layer=center),
        Case(last_empty, graph=True, steps=3),
        Case(ragged, layer=center, graph=True, steps=3),
        Case(ragged, masked=True, unmasked=(0,)),
        # Counts of each channel.
        Case(ragged, axis=1, masked=True),
        Case(ragged, axis=1, layer=center, masked=True, unmasked=(0,)),
        # Large enough for the fused kernels, which a branch chooses.
        Case(ragged, sample=(48, 48, 64), graph=True),
        Case(last_empty, dtype="bfloat16"),
        Case(ragged, options=(("momentum", None),), steps=3),
        # To the others of a group, and to all for the moving statistics.
        Case(ragged, options=groups, steps=2),
        Case(last_empty, options=groups, graph=True),
        Case(empty, options=groups),
        Case(ragged, options=groups, layer=center, steps=2, graph=True),
        Case(last_empty, options=(*groups, *RENORM), masked=True, steps=2, axis=1),
        Case(last_empty, options=RENORM, steps=2, graph=True),
        # To nobody but for the moving statistics.
        Case(last_empty, options=VIRTUAL, graph=True, axis=1),
        Case(empty, options=VIRTUAL),
    ]


def cases(size):
    """Cases for ``size`` replicas: each option once or more, and the splits with all of them."""
    even, ragged, last_empty, one_full, empty = splits(size)
    center = "SyncCentering"
    return [
        *(Case(split) for split in splits(size)),
        *(Case(split, layer=center) for split in splits(size)),
        *(Case(split, graph=True, steps=3) for split in (ragged, last_empty, empty)),
        Case(ragged, layer=center, graph=True, steps=3),
        Case(ragged, masked=True, poison=float("nan")),
        Case(last_empty, masked=True, poison=float("inf"), graph=True),
        Case(ragged, masked=True, poison=float("nan"), layer=center),
        Case(ragged, axis=1, masked=True),
        Case(one_full, axis=1, sample=(3, 4, 2, 5)),
        Case(ragged, axis=1, layer=center, masked=True),
        Case(ragged, axis=-2, sample=(6, 3)),
        Case(even, sample=(7,), graph=True),
        Case((1,) * size, sample=(7,)),
        Case(ragged, sample=(2, 3, 2, 4)),
        # Large enough for the fused kernels.
        Case(ragged, sample=(48, 48, 64), graph=True),
        Case(last_empty, sample=(48, 48, 64), masked=True),
        Case(ragged, dtype="float64"),
        Case(ragged, dtype="float16"),
        Case(last_empty, dtype="bfloat16"),
        Case(ragged, dtype="float16", layer=center),
        Case(ragged, mean=1e3, spread=10.0, sample=(16, 16, 4)),
        Case(ragged, options=(("momentum", None),), steps=3),
        Case(last_empty, options=(("momentum", None),), axis=1, masked=True, steps=2),
        Case(empty, options=(("momentum", None),)),
        Case(ragged, options=(("unbiased_moving_variance", True),)),
        Case(ragged, options=(("center", False), ("scale", False))),
        Case(ragged, options=(("center", False),)),
        Case(last_empty, masked=True, unmasked=(0,), axis=1),
        Case(ragged, layer=center, masked=True, unmasked=(0,), axis=1),
        Case(ragged, masked=True, unmasked=(0,)),
        Case(even, mean=1e3, axis=1, sample=(3, 40, 40)),
    ]


@st.composite
def drawn_cases(draw, size):
    """Draws a case for ``size`` replicas."""
    sample = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    axis = draw(st.integers(1, len(sample)))
    layer = draw(st.sampled_from(["SyncBatchNormalization", "SyncCentering"]))
    groups = st.sampled_from([(), (some_groups(size),)])
    options = groups
    if layer == "SyncBatchNormalization":
        units = groups | st.sampled_from([(), VIRTUAL])
        options = st.builds(lambda *parts: sum(parts, ()), units, st.sampled_from([(), RENORM]))
    return Case(
        split=tuple(draw(st.integers(0, 4)) for _ in range(size)),
        sample=sample,
        layer=layer,
        axis=draw(st.sampled_from([axis, axis - len(sample) - 1])),
        dtype=draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"])),
        masked=draw(st.booleans()),
        poison=draw(st.sampled_from([None, float("nan"), float("inf")])),
        graph=draw(st.booleans()),
        options=(("momentum", draw(st.sampled_from([None, 0.0, 0.9, 1.0]))), *draw(options)),
        seed=draw(st.integers(0, 1000)),
        tiny=True,
    )
