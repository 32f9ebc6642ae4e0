"""The replicas that a layer shares its statistics with: all, or those of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator, is_resizable, kept_for
from syncbn._src.communicators.fingerprints import sums_for_call
from syncbn._src.communicators.groups import Grouping, Groups
from syncbn._src.communicators.strategy import GroupRows
from syncbn._src.ops.moments import Moments, Sums, average, pack, unbiased, unpack, weigh
from syncbn._src.ops.replicas import Replicas


class ReplicaGroups:
    """The groups of a layer, created when it first trains with a communicator, and kept."""

    def __init__(self, grouping: Grouping):
        self.grouping = grouping
        self._kept: list[tuple[Communicator, int, Any]] = []

    def replicas(self, communicator: Communicator, batch: int | None, scope: str) -> Replicas:
        """Returns the replicas to share statistics with.

        The moving statistics follow the average over all groups, weighted by count; so they stay
        equal on all replicas.

        Args:
            communicator: The communicator of all replicas.
            batch: The number of samples on this replica, or ``None`` where it is unknown.
            scope: The first part of the names of the collectives.

        Raises:
            NotImplementedError: groups in an elastic job.
        """
        all_reduce_sum = sums_for_call(communicator, scope)
        size = communicator.size
        if is_resizable(communicator):
            if self.grouping.is_given():
                raise NotImplementedError(
                    "Groups are made of a fixed number of replicas. Received: a layer with groups "
                    "in an elastic job. Leave out group_size, groups and target_batch, or start a "
                    "job of fixed size."
                )
            return Replicas(all_reduce_sum)  # also where there are no others at the moment
        # A single replica has no groups, so that a model made for a job also runs without one.
        if size == 1 or not self.grouping.is_given():
            return Replicas(all_reduce_sum, alone=size == 1)
        group = self._own_group(communicator, size, batch)
        if group is None:
            return Replicas(all_reduce_sum)
        if isinstance(group, GroupRows):
            return _OneCollectiveGroups(group, scope)
        return _SubgroupReplicas(sums_for_call(group, scope), all_reduce_sum)

    def _own_group(self, communicator: Communicator, size: int, batch: int | None) -> Any:
        for known, known_size, group in self._kept:
            if known is communicator and known_size == size:
                return group
        group = _split(communicator, self.grouping.choose(communicator, batch))
        self._kept.append((communicator, size, group))
        return group


_splits: dict[int, dict[Groups, Any]] = {}
"""What each communicator was split into, by groups: layers with the same groups share it."""


def _split(communicator: Communicator, groups: Groups) -> Any:
    """Returns the communicator of this replica's group, or ``None`` if one group has all."""
    if len(groups) == 1:
        return None
    if not hasattr(communicator, "split"):
        raise TypeError(
            "A layer with groups needs a communicator that has a method split(groups). "
            f"Received: communicator={communicator!r}."
        )
    made = kept_for(communicator, _splits, dict)
    if groups not in made:
        made[groups] = communicator.split(groups)
    return made[groups]


class _SubgroupReplicas(Replicas):
    """Groups with collectives of their own, and one over all for the moving statistics."""

    def __init__(self, all_reduce_sum: Callable, all_reduce_sum_over_all: Callable):
        super().__init__(all_reduce_sum)
        self._over_all = all_reduce_sum_over_all

    def merge(self, sums: Sums, bessel: bool = False) -> tuple[Moments, Moments]:
        merged, own = super().merge(sums, bessel)
        # Each replica counts for its part of the group's count.
        variance = None if own.variance is None else sums.count * own.variance
        share = pack(sums._replace(second=variance))
        return merged, average(self._over_all(share, "moving"), sums)


class _OneCollectiveGroups(Replicas):
    """Groups that share one collective, in which each has a row."""

    def __init__(self, groups: GroupRows, scope: str):
        self._groups, self._scope = groups, scope
        super().__init__(lambda tensor, name: groups.own(self._rows(tensor, name)))

    def merge(self, sums: Sums, bessel: bool = False) -> tuple[Moments, Moments]:
        rows = self._rows(pack(sums), "statistics")
        each = unpack(rows, sums)
        share = pack(weigh(unbiased(each) if bessel else each))
        return unpack(self._groups.own(rows), sums), average(tf.reduce_sum(share, 0), sums)

    def _rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._groups.all_reduce_rows(tensor, f"{self._scope}/{name}")
