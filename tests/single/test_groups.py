"""Which replicas make a group, and what cannot be one."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators import groups
from syncbn._src.layers import replica_groups
from tests import kinds_of_replicas as kinds

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])


class Pretender:
    """One of many replicas; the others have what it has."""

    name, supports_jit, rank = "local", False, 0
    finds_mixups = True  # or it would be given vectors

    def __init__(self, size):
        self.size = size

    def all_reduce_sum(self, tensor, name):
        rows = tensor.numpy()
        return tf.constant(np.repeat(rows[:1], self.size, 0) if rows.ndim > 1 else rows * self.size)

    def split(self, groups):
        return Pretender(len(groups[0]))


def chosen(size, batch=None, **grouping):
    grouping = {"group_size": None, "groups": None, "target_batch": None, **grouping}
    return groups.check_grouping(**grouping).choose(Pretender(size), batch)


def test_neighbours_are_in_a_group():
    assert chosen(6, group_size=2) == ((0, 1), (2, 3), (4, 5))
    assert chosen(4, group_size=1) == ((0,), (1,), (2,), (3,))
    assert chosen(4, group_size=4) == ((0, 1, 2, 3),)


@pytest.mark.parametrize(
    ("batch", "size"),
    [(2, 12), (3, 12), (4, 6), (8, 4), (9, 4), (16, 2), (32, 1), (100, 1)],
)
def test_a_target_batch_picks_the_nearest_group_size(batch, size):
    # 32 samples, 12 replicas; of 4 and 6 with a batch of 8 each, 4 is nearer.
    assert len(chosen(12, batch, target_batch=32)[0]) == size


def test_replicas_of_one_machine(monkeypatch):
    assert chosen(3, group_size="node") == ((0, 1, 2),)
    hosts = ["a", "b", "a", "c", "b"]
    monkeypatch.setattr(groups, "_hosts", lambda communicator: hosts)
    assert chosen(5, group_size="node") == ((0, 2), (1, 4), (3,))


def test_a_strategy_knows_the_machines_of_its_cluster(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "b:2"], "ps": ["c:1"]}
    spec = SimpleNamespace(cluster_spec=lambda: tf.train.ClusterSpec(cluster))
    strategy = SimpleNamespace(cluster_resolver=spec, num_replicas_in_sync=6)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    grouping = groups.check_grouping("node", None, None)
    assert grouping.choose(syncbn.DistributeCommunicator(), None) == ((0, 1), (2, 3, 4, 5))


@BOTH
@pytest.mark.parametrize("size", [0, -2, 1.5, "host", True])
def test_a_group_size_that_is_none(make, size):
    with pytest.raises(ValueError, match=r"positive integer, or 'node'.*Received: group_size="):
        make(group_size=size)


@BOTH
@pytest.mark.parametrize("target", [0, -1, 2.5, "32"])
def test_a_target_batch_that_is_none(make, target):
    with pytest.raises(ValueError, match=r"`target_batch` must be a positive integer.*Received"):
        make(target_batch=target)


@BOTH
@pytest.mark.parametrize("ranks", [[[0, 1], [1, 2]], [[0], []], [[-1, 0]], []], ids=str)
def test_groups_that_overlap_or_are_empty(make, ranks):
    with pytest.raises(ValueError, match=r"each replica, from 0, once.*Received: groups="):
        make(groups=ranks)


@BOTH
@pytest.mark.parametrize("ranks", [[0, 1], "node", [[0, "one"]]], ids=str)
def test_groups_that_are_no_lists_of_ranks(make, ranks):
    with pytest.raises(TypeError, match=r"lists of ranks, such as.*Received: groups="):
        make(groups=ranks)


@BOTH
def test_groups_are_given_once(make):
    with pytest.raises(ValueError, match=r"one of `group_size`.*group_size=2.*target_batch=32"):
        make(group_size=2, target_batch=32)


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ({"group_size": 4}, r"divide the number of replicas, 6.*group_size=4.*\[1, 2, 3, 6\]"),
        ({"groups": [[0, 1], [2, 3]]}, r"each of the 6 replicas, from 0 to 5.*\[\[0, 1\], \[2, 3"),
        ({"groups": [[0, 1, 2, 3, 4, 6]]}, r"each of the 6 replicas"),
        ({"target_batch": 32}, r"needs to know the batch.*drop_remainder=True.*`group_size`"),
    ],
    ids=str,
)
def test_groups_that_this_job_cannot_have(grouping, message):
    with pytest.raises(ValueError, match=message):
        chosen(6, **grouping)


def test_a_size_that_does_not_divide_in_training():
    mirrored = kinds.mirrored(2)
    layers = mirrored.build(lambda rank: syncbn.SyncBatchNormalization(group_size=4), (None, 3))
    inputs = [(tf.ones([2, 3]),)] * 2
    with pytest.raises(ValueError, match=r"divide the number of replicas, 2.*group_size=4"):
        mirrored.run(lambda layer, x: layer(x, training=True), layers, inputs)


def test_a_communicator_that_cannot_be_split():
    class Whole(syncbn.LocalCommunicator):
        size = 4

    layer = syncbn.SyncCentering(communicator=Whole(), group_size=2)
    with pytest.raises(TypeError, match=r"method split\(groups\)"):
        layer(tf.ones([2, 3]), training=True)


def test_one_replica_needs_no_groups():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    plain, grouped = syncbn.SyncBatchNormalization(), syncbn.SyncBatchNormalization(group_size=4)
    np.testing.assert_array_equal(plain(x, training=True), grouped(x, training=True))


@BOTH
def test_groups_are_part_of_the_config(make):
    for grouping in {"group_size": 2}, {"groups": ((0, 1), (2, 3))}, {"target_batch": 32}:
        config = make(**grouping).get_config()
        again = make.from_config(config).get_config()
        assert again == config
        assert {key: config[key] for key in grouping} == grouping


class Counting(Pretender):
    def __init__(self, size):
        self.size, self.calls = size, []

    def split(self, groups):
        self.calls.append(groups)
        return Pretender(len(groups[0]))


class Equal(Counting):
    """Not hashable, as classes are that say what equals them."""

    def __eq__(self, other):
        return isinstance(other, Equal)


class Slotted:
    """Neither hashable nor weakly referenced."""

    __slots__ = ("calls", "size")
    __eq__ = Equal.__eq__
    __init__ = Counting.__init__
    name, supports_jit, rank, finds_mixups = "local", False, 0, True
    all_reduce_sum = Pretender.all_reduce_sum
    split = Counting.split


@pytest.mark.parametrize("make", [Counting, Equal, Slotted])
def test_layers_with_the_same_groups_share_what_was_split(make):
    communicator, other = make(4), make(4)
    for _ in range(3):
        layer = syncbn.SyncCentering(communicator=communicator, group_size=2)
        for _ in range(2):
            layer(tf.ones([2, 3]), training=True)
    assert communicator.calls == [((0, 1), (2, 3))]
    assert other.calls == []
    layer = syncbn.SyncCentering(communicator=other, group_size=2)
    layer(tf.ones([2, 3]), training=True)
    assert other.calls == [((0, 1), (2, 3))]


def test_what_was_split_ends_with_its_communicator():
    communicator = Equal(4)
    layer = syncbn.SyncCentering(communicator=communicator, group_size=2)
    layer(tf.ones([2, 3]), training=True)
    key, end = id(communicator), weakref.ref(communicator)
    assert key in replica_groups._splits
    del layer, communicator
    gc.collect()
    assert end() is None
    assert key not in replica_groups._splits
