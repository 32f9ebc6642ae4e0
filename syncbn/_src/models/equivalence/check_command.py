"""The check on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from syncbn._src.communicators.launcher import launched
from syncbn._src.named_functions import UsageError, named_function
from syncbn._src.option_types import positive_whole_number
from syncbn._src.terminal import BAD, GOOD, HEADING, show

_BATCH = 16
_STYLES = {
    r"^On .* does not do .*": BAD,
    r"^On .* does what .*": GOOD,
    r"(?m)\bDIFFERS$": BAD,
    r"(?m)^ +largest difference.*": HEADING,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command line, which `run` takes."""
    parser.add_argument(
        "build_model", metavar="module:function", help="a function that returns the model"
    )
    batch = parser.add_mutually_exclusive_group(required=True)
    batch.add_argument(
        "--input-shape",
        metavar="8,8,3",
        type=_whole_numbers,
        help="the shape of one sample; the samples are random",
    )
    batch.add_argument(
        "--batch-from",
        metavar="module:function",
        help="a function that returns the batch: x, (x, y) or (x, y, sample_weight)",
    )
    parser.add_argument(
        "--batch",
        metavar="16",
        type=positive_whole_number,
        help=f"the number of random samples (default: the sum of --split, or {_BATCH})",
    )
    parser.add_argument(
        "--replicas", metavar="2", type=positive_whole_number, help="the number of replicas"
    )
    parser.add_argument(
        "--split", metavar="3,1", type=_whole_numbers, help="the number of samples for each replica"
    )
    parser.add_argument(
        "--loss",
        metavar="module:function",
        help="a loss of y and the outputs, instead of a random projection",
    )
    parser.add_argument("--rtol", metavar="1e-4", type=float, help="the tolerance")


def run(arguments: argparse.Namespace) -> int:
    """Runs the check that the arguments ask for, and prints what it finds.

    Returns:
        0 if the model is equivalent, 1 if it is not.

    Raises:
        UsageError: what the arguments name does not exist, or the batch cannot be shared out.
    """
    found = _found(arguments)
    show(found, _STYLES)
    return 0 if found.equivalent else 1


def _found(arguments: argparse.Namespace) -> Any:
    """Returns what `check_equivalence` finds."""
    import numpy as np  # these take seconds, which ``--help`` need not wait for

    from syncbn._src.models.equivalence.batch import as_arrays, number_of_samples
    from syncbn._src.models.equivalence.batch_replicas import devices
    from syncbn._src.models.equivalence.check import check_equivalence

    split = arguments.split
    # In a job, its processes.
    processes = max(2, launched().processes)
    replicas = arguments.replicas or (len(split) if split else processes)
    samples = arguments.batch or (sum(split) if split else _BATCH)
    if not arguments.batch_from:
        _require_shares(samples, replicas, split, f"--batch {samples}")
    # Before a module of the user starts TensorFlow.
    if launched().processes == 1 and replicas > 1:
        devices(replicas)
    build_model = named_function(arguments.build_model)
    loss = named_function(arguments.loss) if arguments.loss else None
    if arguments.batch_from:
        batch = named_function(arguments.batch_from)()
        samples = number_of_samples(as_arrays(batch))
        _require_shares(samples, replicas, split, f"{samples} samples of {arguments.batch_from}")
    else:
        batch = np.random.default_rng(0).standard_normal((samples, *arguments.input_shape))
    return check_equivalence(
        build_model, batch, replicas, loss=loss, split=split, rtol=arguments.rtol
    )


def _require_shares(
    samples: int, replicas: int, split: Sequence[int] | None, received: str
) -> None:
    """Refuses a batch that cannot be shared out as the arguments say.

    Raises:
        UsageError: it cannot.
    """
    if replicas < 2:
        raise UsageError(f"--replicas must be 2 at least. Received: {replicas}")
    if split is None:
        if samples % replicas:
            even = ",".join(
                str(samples // replicas + (i < samples % replicas)) for i in range(replicas)
            )
            raise UsageError(
                f"The batch must be a multiple of --replicas, {replicas}, unless --split says how "
                f"many samples each replica gets. Received: {received}. Use --split {even}, or "
                f"{samples - samples % replicas or replicas} samples."
            )
    elif len(split) != replicas or sum(split) != samples or min(split) < 0:
        raise UsageError(
            f"--split must have a number of samples for each of {replicas} replicas, not negative, "
            f"{samples} in all. Received: --split {','.join(map(str, split))} and {received}. "
            f"Change --split, --batch or --replicas."
        )


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between them, such as 3,1. Received: {text}"
        ) from error
