"""The advice on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from syncbn._src.communicators.launcher import launched
from syncbn._src.named_functions import UsageError, named_function
from syncbn._src.option_types import positive_whole_number
from syncbn._src.terminal import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command line, which `run` takes."""
    parser.add_argument(
        "build_model", metavar="module:function", help="a function that returns the built model"
    )
    parser.add_argument(
        "--batch-from",
        metavar="module:function",
        required=True,
        help="a function that returns a dataset of batches, or the arrays x or (x, y) of all "
        "samples",
    )
    parser.add_argument(
        "--replicas", metavar="8", type=positive_whole_number, help="the replicas to train on"
    )
    parser.add_argument(
        "--batch",
        metavar="2",
        type=positive_whole_number,
        help="the samples of a replica in a step; those of the first batch, if not given",
    )
    parser.add_argument(
        "--batches",
        metavar="64",
        type=positive_whole_number,
        default=64,
        help="the batches of replicas to take",
    )
    parser.add_argument(
        "--tolerance",
        metavar="0.25",
        type=float,
        help="the largest error of a normalized element, in standard deviations",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the advice to this file")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw it (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the advice that the arguments ask for.

    Returns:
        0.

    Raises:
        UsageError: what the arguments name does not exist, or does not suffice.
    """
    # They take seconds.
    from syncbn._src.models.advice_estimation import TOLERANCE, advise
    from syncbn._src.models.training_job import job_of

    if arguments.replicas is None and launched().processes == 1:
        raise UsageError("Give the replicas that the model is to be trained on: --replicas 8.")
    model = named_function(arguments.build_model)()
    data = named_function(arguments.batch_from)()
    advice = advise(
        model,
        _batches(data, arguments.batch),
        arguments.replicas,
        batch=arguments.batch,
        batches=arguments.batches,
        tolerance=TOLERANCE if arguments.tolerance is None else arguments.tolerance,
    )
    if 0 in job_of(model).ranks:
        show(advice, {})
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(advice.to_json() + "\n")
        if arguments.picture:
            advice.draw(arguments.picture)
    return 0


def _batches(data: Any, batch: int | None) -> Iterable[Any]:
    """Returns a dataset of what may be arrays of all samples."""
    import numpy as np
    import tensorflow as tf

    if not isinstance(data, tuple | np.ndarray | tf.Tensor):
        return data
    if batch is None:
        raise UsageError("Arrays are cut into batches of --batch samples. Received: no --batch.")
    return tf.data.Dataset.from_tensor_slices(data).batch(batch)
