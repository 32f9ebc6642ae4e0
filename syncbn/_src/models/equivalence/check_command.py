"""The check on the command line."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from syncbn._src.communicators.launcher import launched
from syncbn._src.models.equivalence.batch_replicas import devices
from syncbn._src.models.equivalence.check import check_equivalence


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
        "--batch", metavar="16", type=int, default=16, help="the number of random samples"
    )
    parser.add_argument("--replicas", metavar="2", type=int, help="the number of replicas")
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
        0 if the model is equivalent, 1 if it is not, 2 if that could not be determined.
    """
    split = arguments.split
    replicas = arguments.replicas or (len(split) if split else 2)
    try:
        # Before a module of the user starts TensorFlow.
        if launched().processes == 1 and replicas > 1:
            devices(replicas)
        build_model = user_function(arguments.build_model)
        loss = user_function(arguments.loss) if arguments.loss else None
        if arguments.batch_from:
            batch = user_function(arguments.batch_from)()
        else:
            shape = (arguments.batch, *arguments.input_shape)
            batch = np.random.default_rng(0).standard_normal(shape)
        found = check_equivalence(
            build_model, batch, replicas, loss=loss, split=split, rtol=arguments.rtol
        )
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception:
        # It may be the user's code that fails, which needs the traceback.
        traceback.print_exc()
        return 2
    print(found)
    return 0 if found.equivalent else 1


class UsageError(ValueError):
    """What a user should know without a traceback."""


def user_function(name: str) -> Callable[..., Any]:
    """Returns the function that is named as module:function."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UsageError(f"A function is given as module:function. Received: {name}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"There is no module {error.name}. Received: {name}") from error
    function = getattr(module, path, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {path}. Received: {name}")
    return function


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
