"""The flight recorder: which collectives a rank has begun, and which of them it waits in."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from syncbn._src.watchdog.flight_recorder import FlightRecorder
from tests import patience


def doubled(tensor):
    return 2 * tensor


def test_a_collective_of_a_graph_is_counted_wherever_it_is():
    recorder = FlightRecorder()

    @tf.custom_gradient
    def watched(x):
        def gradient(dy):
            return recorder.watch("backward", None, dy, doubled)

        return recorder.watch("forward", None, x, doubled), gradient

    @tf.function
    def step(x, branch):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cond(branch, lambda: watched(x), lambda: x)
        return tape.gradient(y, x)

    x = tf.ones([3])
    assert step(x, tf.constant(True)).numpy().tolist() == [2, 2, 2]
    assert step(x, tf.constant(False)).numpy().tolist() == [1, 1, 1]
    assert recorder.counts() == {"forward": 1, "backward": 1}
    assert recorder.waiting() is None


def test_a_loop_and_a_vectorized_loop_count_too():
    recorder = FlightRecorder()

    @tf.function
    def loop(x):
        for _ in tf.range(3):
            x = recorder.watch("loop", None, x, doubled)
        return x

    assert loop(tf.constant(1.0)).numpy() == 8
    assert recorder.counts()["loop"] == 3
    vectorized = tf.function(
        lambda rows: tf.vectorized_map(lambda x: recorder.watch("row", None, x, doubled), rows)
    )
    assert vectorized(tf.ones([4, 2])).numpy().tolist() == [[2, 2]] * 4
    # TensorFlow may keep the counters of what it has converted, too; what counts is that both do.
    assert recorder.counts()["row"] >= 1
    assert recorder.waiting() is None
    # It is the time since the entry, and not since 1970.
    assert all(0 <= seconds < patience.limit() for seconds in recorder.seconds().values())


def test_collectives_of_a_graph_do_not_wait_for_each_other():
    recorder, second_began = FlightRecorder(), threading.Event()

    def wait(x):
        assert second_began.wait(patience.limit())
        return x

    def begin(x):
        second_began.set()
        return x

    def call(function, x):
        # As a collective of Horovod, not one of those that TensorFlow keeps in program order.
        return tf.numpy_function(function, [x], x.dtype, stateful=False)

    @tf.function
    def step(x):
        first = recorder.watch("first", None, x, lambda x: call(wait, x))
        second = recorder.watch("second", None, x, lambda x: call(begin, x))
        return first + second

    assert step(tf.ones([2])).numpy().tolist() == [2, 2]
    assert recorder.counts() == {"first": 1, "second": 1}


def test_the_time_in_collectives_of_graphs_adds_up():
    recorder, raises = FlightRecorder(), []

    def sleep(x):
        assert not raises
        time.sleep(0.1)
        return x

    @tf.function
    def step(x):
        return recorder.watch("slow", None, x, lambda x: tf.numpy_function(sleep, [x], x.dtype))

    step(tf.ones([2]))
    assert 0.09 < recorder.seconds()["slow"] < patience.limit()
    step(tf.ones([2]))
    before = recorder.seconds()["slow"]
    assert 0.19 < before < patience.limit()
    # A call that fails does not count, and does not keep later ones from counting.
    raises.append(True)
    with pytest.raises(tf.errors.OpError):
        step(tf.ones([2]))
    assert recorder.seconds()["slow"] == before
    raises.clear()
    step(tf.ones([2]))
    assert before + 0.09 < recorder.seconds()["slow"] < patience.limit()


def test_a_graph_that_waits_is_seen_from_another_thread():
    recorder, goes_on = FlightRecorder(), threading.Event()

    def wait(x):
        assert goes_on.wait(60)
        return x

    @tf.function
    def step(x):
        return recorder.watch("slow", [0, 1], x, lambda x: tf.numpy_function(wait, [x], x.dtype))

    thread = threading.Thread(target=step, args=(tf.ones([2]),))
    thread.start()
    try:
        patience.soon(lambda: recorder.waiting() is not None)
        waiting = recorder.waiting()
        assert (waiting.name, waiting.call, waiting.members) == ("slow", 1, [0, 1])
        assert waiting.since == recorder.waiting().since
    finally:
        goes_on.set()
        thread.join()
    assert recorder.waiting() is None


def test_the_oldest_of_what_waits_is_told():
    recorder = FlightRecorder()
    with recorder.enter("done", None):
        pass
    recorder.enter("first", None)
    recorder.enter("second", None)
    assert recorder.waiting()[:2] == ("first", 2)
    assert [one["name"] for one in recorder.as_json()["collectives"]] == ["done", "first", "second"]


def test_what_fails_eagerly_is_waited_for_no_longer():
    recorder = FlightRecorder()
    with pytest.raises(ZeroDivisionError):
        recorder.watch("bad", None, tf.ones([1]), lambda x: 1 / 0)
    assert recorder.waiting() is None
    assert np.array_equal(recorder.watch("good", None, tf.ones([1]), doubled), [2])
    assert [one["left"] is None for one in recorder.as_json()["collectives"]] == [True, False]


def test_a_step_that_has_failed_is_waited_for_no_longer_once_others_are_done():
    recorder = FlightRecorder()

    def checked(x):
        tf.debugging.assert_positive(x)
        return tf.identity(x)

    step = tf.function(lambda x: recorder.watch("step", None, x, checked))
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(-1.0))
    for _ in range(4):
        step(tf.constant(1.0))
        waiting = recorder.waiting()
    assert waiting is None


def test_who_begins_anew_waits_for_nothing_and_counts_from_one():
    recorder = FlightRecorder()

    def checked(x):
        tf.debugging.assert_positive(x)
        return tf.identity(x)

    step = tf.function(lambda x: recorder.watch("step", None, x, checked))
    step(tf.constant(1.0))
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(-1.0))
    recorder.enter("eager", None)
    assert recorder.waiting() is not None
    recorder.begin_anew()
    assert recorder.waiting() is None
    step(tf.constant(1.0))
    assert recorder.waiting() is None
    assert recorder.counts() == {"step": 1}
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(-1.0))  # as if it waited
    assert recorder.waiting()[:2] == ("step", 2)
    assert recorder.enter("eager", None).number == 1
