"""What is particular to an engine: its sub-groups, and what it refuses."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.watchdog.flight_recorder import RECORDER
from tests.parallel.conftest import ENGINE


@pytest.fixture
def alone(replicas):
    """Gives communicators of every single process: mine, and another one's as a function."""
    if ENGINE == "mpi":
        from mpi4py import MPI

        return syncbn.MPICommunicator(MPI.COMM_WORLD.Split(replicas.rank)), None
    if ENGINE == "horovod":
        sets = replicas.process_sets
        other = sets[(replicas.rank + 1) % replicas.size]
        return syncbn.HorovodCommunicator(sets[replicas.rank]), lambda: syncbn.HorovodCommunicator(
            other
        )
    pytest.skip("tf.distribute has no communicators to hand over, only strategies")


def test_a_communicator_can_be_that_of_some_processes(alone, replicas):
    mine, others = alone
    assert (mine.size, mine.rank) == (1, 0)
    layer = syncbn.SyncCentering(communicator=mine)
    x = np.float32([[replicas.rank], [replicas.rank + 2]])
    np.testing.assert_array_equal(layer(x, training=True), [[-1], [1]])
    if others is not None:
        with pytest.raises(ValueError, match=r"that it belongs to.*Give each process its own"):
            others()


def test_mpi_does_not_run_out_of_communicators(replicas):
    """Open MPI has 65,532. Those of one `mpi4py.MPI.Comm` share a duplicate, lanes another one."""
    if ENGINE != "mpi":
        pytest.skip("the other engines have no such limit")
    from mpi4py import MPI

    made = []

    class Counting(MPI.Intracomm):
        def Dup(self, info=None):  # noqa: N802
            made.append("Dup")
            return Counting(super().Dup(info))

        def Split(self, color=0, key=0):  # noqa: N802
            made.append("Split")
            return Counting(super().Split(color, key))

    world = Counting(MPI.COMM_WORLD.Dup())
    groups = [[rank] for rank in range(replicas.size)]
    for number in range(3):
        communicator = syncbn.MPICommunicator(world)
        one = tf.constant([1.0])
        assert communicator.all_reduce_sum(one, "x").numpy() == [replicas.size]
        assert communicator.split(groups).all_reduce_sum(one, "x").numpy() == [1]
        assert communicator.lane(number).all_reduce_sum(one, "x").numpy() == [replicas.size]
        assert made == ["Dup", "Split", "Dup", "Dup"]
    # That of a user may end before ours, and another one is another one.
    world.Free()
    assert communicator.all_reduce_sum(one, "x").numpy() == [replicas.size]
    syncbn.MPICommunicator(Counting(MPI.COMM_WORLD.Dup()))
    assert len(made) == 5


@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_a_function_that_xla_compiles_is_refused_before_anyone_waits(make, replicas):
    def step(layer, x):
        @tf.function(jit_compile=True)
        def compiled(x):
            return layer(x, training=True)

        return compiled(x)

    layers = replicas.build(lambda rank: make(), (None, 3))
    arguments = [(tf.ones([2, 3]),)] * replicas.size
    with pytest.raises(NotImplementedError, match="XLA cannot compile a collective"):
        replicas.run(step, layers, arguments)


def test_a_batch_that_each_worker_of_a_strategy_gives_once_is_refused(replicas):
    if ENGINE != "multiworker":
        pytest.skip("test_given_once.py and test_nested.py have what other strategies do")
    layers = replicas.build(lambda rank: syncbn.SyncCentering(), (None, 3))
    with replicas.strategy.scope():
        with pytest.raises(RuntimeError, match="replica context when training with several work"):
            layers[0](np.ones((2, 3), "float32"), training=True)
        layers[0](np.ones((2, 3), "float32"), training=False)


def test_fit_with_jit_compile_auto_just_works(replicas):
    if not hasattr(replicas, "rank"):
        pytest.skip("Keras itself leaves XLA alone under a strategy; test_fit.py fits there")
    model = tf.keras.Sequential(
        [tf.keras.Input((3,)), syncbn.SyncBatchNormalization(), tf.keras.layers.Dense(1)]
    )
    assert not model.layers[0].supports_jit
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 1)), batch_size=2, verbose=0)


@pytest.mark.skipif(ENGINE != "mpi", reason="the other engines match calls by their names")
@pytest.mark.parametrize("what", ["name", "shape", "dtype"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_different_calls_at_the_same_time_are_an_error_on_all_ranks(what, graph, replicas):
    number = replicas.rank % 2
    name = f"layer_{number}" if what == "name" else "layer"
    shape = [3 + number] if what == "shape" else [3]
    dtype = [tf.float32, tf.float64][number] if what == "dtype" else tf.float32

    def add_up():
        return syncbn.resolve().all_reduce_sum(tf.ones(shape, dtype), name)

    errors = RuntimeError, tf.errors.UnknownError
    with pytest.raises(errors, match=r"on rank 0 .*layer.*on rank 1"):
        (tf.function(add_up) if graph else add_up)()
    total = syncbn.resolve().all_reduce_sum(tf.ones([2]), "afterwards")
    np.testing.assert_array_equal(total, [replicas.size] * 2)


@pytest.mark.parametrize("way", ["graph", "eager"])
def test_horovod_matches_calls_by_their_names_in_whatever_order_they_come(way, replicas):
    if ENGINE != "horovod":
        pytest.skip("the other engines match calls by their order")
    communicator = syncbn.HorovodCommunicator()
    names = ["first", "second"] if replicas.rank else ["second", "first"]
    values = {"first": tf.constant([1.0]), "second": tf.constant([100.0])}
    found = {}

    def add_up(name, values):
        found[name] = communicator.all_reduce_sum(values[name], f"test/{name}")

    if way == "graph":

        @tf.function
        def add_up_all(values):
            for name in names:
                add_up(name, values)
            return dict(found)

        found = add_up_all(values)
    else:
        # Eagerly a call returns when it is done, so both are under way in threads only.
        threads = [threading.Thread(target=add_up, args=[name, values]) for name in names]
        for name, thread in zip(names, threads, strict=True):
            thread.start()
            while (RECORDER.last() or {}).get("name") != f"test/{name}":
                time.sleep(0.01)
        for thread in threads:
            thread.join()
    expected = {"first": [replicas.size], "second": [100 * replicas.size]}
    assert {name: total.numpy().tolist() for name, total in found.items()} == expected


def test_horovod_knows_the_name_of_a_call_where_functions_run_eagerly(replicas):
    if ENGINE != "horovod":
        pytest.skip("the other engines match calls by their order")
    communicator = syncbn.HorovodCommunicator()
    tf.config.run_functions_eagerly(True)
    try:
        total = communicator.all_reduce_sum(tf.ones([2]), "test/eagerly")
        groups = communicator.grouped_all_reduce_sum([tf.ones([1]), tf.ones([3])], "test/grouped")
    finally:
        tf.config.run_functions_eagerly(False)
    assert total.numpy().tolist() == [replicas.size] * 2
    # A list of one is none, whatever its name.
    (only,) = communicator.grouped_all_reduce_sum([tf.ones([2])], "test/eagerly")
    assert only.numpy().tolist() == [replicas.size] * 2
    # Of another shape, and by a name that no operation may have.
    total = communicator.all_reduce_sum(tf.ones([3]), "test/eagerly")
    assert total.numpy().tolist() == [replicas.size] * 3
    assert communicator.all_reduce_sum(tf.ones([]), "größe: 1").numpy() == replicas.size
    assert [one.numpy().tolist() for one in groups] == [[replicas.size], [replicas.size] * 3]
