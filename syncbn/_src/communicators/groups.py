"""Groups of replicas: which replicas share their statistics."""

from __future__ import annotations

import hashlib
import operator
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.communicators.base import Communicator, process_communicator
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.communicators.tf_distribute import DistributeCommunicator

Groups = tuple[tuple[int, ...], ...]
"""The ranks of each group; every rank is in one."""


class Grouping(NamedTuple):
    """The arguments of a layer about groups: one of these at most."""

    group_size: int | str | None = None
    """The number of neighbouring replicas, or ``"node"``: those of one machine."""
    groups: Groups | None = None
    target_batch: int | None = None
    """As many neighbouring replicas as bring the batch of a group nearest to this many samples."""

    def is_given(self) -> bool:
        return any(value is not None for value in self)

    def choose(self, communicator: Communicator, batch: int | None) -> Groups:
        """Returns the groups of the replicas that ``communicator`` joins; the same on each of them.

        A collective call, except over tf.distribute.

        Args:
            communicator: The communicator of the replicas.
            batch: The number of samples on this replica, or ``None`` where it is unknown.

        Raises:
            ValueError: the replicas cannot be grouped so, or ``batch`` is needed and not known.
        """
        size = communicator.size
        if self.groups is not None:
            return _complete(self.groups, size)
        if self.group_size == "node":
            return _by_host(_hosts(communicator))
        if self.target_batch is None:
            return _neighbours(self.group_size, size)
        return _neighbours(
            _nearest(self.target_batch, _mean_batch(communicator, batch), size), size
        )


def check_grouping(group_size: Any, groups: Any, target_batch: Any) -> Grouping:
    """Returns the arguments of a layer as a `Grouping`.

    Raises:
        ValueError: more than one of them, or one that no job could have.
        TypeError: one of another type.
    """
    given = {"group_size": group_size, "groups": groups, "target_batch": target_batch}
    if sum(value is not None for value in given.values()) > 1:
        raise ValueError(
            "Groups are given by one of `group_size`, `groups` and `target_batch`. Received: "
            + ", ".join(f"{name}={value!r}" for name, value in given.items())
            + "."
        )
    if group_size is not None and group_size != "node":
        group_size = at_least_one("group_size", group_size, ", or 'node'")
    if target_batch is not None:
        target_batch = at_least_one("target_batch", target_batch)
    if groups is not None:
        try:
            groups = tuple(tuple(operator.index(rank) for rank in group) for group in groups)
        except TypeError as error:
            raise TypeError(
                "`groups` must be lists of ranks, such as [[0, 1], [2, 3]]. "
                f"Received: groups={groups!r}."
            ) from error
        ranks = [rank for group in groups for rank in group]
        if not all(groups) or len(set(ranks)) != len(ranks) or min(ranks, default=-1) < 0:
            raise ValueError(
                "`groups` must name each replica, from 0, once, and no group may be empty. "
                f"Received: groups={[list(group) for group in groups]}."
            )
    return Grouping(group_size, groups, target_batch)


def _complete(groups: Groups, size: int) -> Groups:
    if sorted(rank for group in groups for rank in group) != list(range(size)):
        raise ValueError(
            f"`groups` must name each of the {size} replicas, from 0 to {size - 1}, once. "
            f"Received: groups={[list(group) for group in groups]}."
        )
    return groups


def _neighbours(group_size: Any, size: int) -> Groups:
    if size % group_size:
        divisors = [k for k in range(1, size + 1) if size % k == 0]
        raise ValueError(
            f"`group_size` must divide the number of replicas, {size}. Received: "
            f"group_size={group_size}. Use one of {divisors}, or `groups` of different sizes."
        )
    return tuple(tuple(range(first, first + group_size)) for first in range(0, size, group_size))


def _nearest(target: int, batch: float, size: int) -> int:
    """Returns the group size for ``target`` samples; the larger one in a tie."""
    divisors = (k for k in range(1, size + 1) if size % k == 0)
    return min(divisors, key=lambda k: (abs(k * batch - target), -k))


def _mean_batch(communicator: Communicator, batch: int | None) -> float:
    own = -1.0 if batch is None else float(batch)
    batches = [own]
    if not isinstance(communicator, DistributeCommunicator):
        batches = _gather(communicator, own, "batch")
    if min(batches) < 0:
        raise ValueError(
            "`target_batch` needs to know the batch of a replica when the layer first trains. "
            "Received: inputs whose batch size is unknown. Give it a fixed one, with "
            "dataset.batch(n, drop_remainder=True) or tf.keras.Input(batch_size=n); or use "
            "`group_size`."
        )
    return sum(batches) / len(batches)


def _hosts(communicator: Communicator) -> Sequence[Any]:
    """Returns an identifier of each replica's machine."""
    if isinstance(communicator, DistributeCommunicator):
        return communicator.hosts()
    name = hashlib.sha256(platform.node().encode()).digest()[:6]
    # 48 bits, which float64 represents exactly.
    return _gather(communicator, float(int.from_bytes(name, "big")), "host")


def _gather(communicator: Communicator, value: float, what: str) -> list[float]:
    """Returns the values of all replicas, also while a function is being traced."""
    with tf.init_scope():
        if not tf.executing_eagerly():
            raise NotImplementedError(
                "The replicas can only agree on groups where TensorFlow runs eagerly. Received: "
                "the graph of a session. Use `groups`, or `group_size` with a number."
            )
        rows = all_gather(
            process_communicator(communicator), np.array([value]), f"syncbn/groups/{what}"
        )
    # Replicas of one process have the same value.
    return np.repeat(rows, communicator.size // len(rows)).tolist()


def _by_host(hosts: Sequence[Any]) -> Groups:
    ranks: dict[Any, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return tuple(map(tuple, ranks.values()))
