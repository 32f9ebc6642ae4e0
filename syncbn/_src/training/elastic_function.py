"""Training that goes on where workers come and go: Horovod's elastic mode."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from syncbn._src.communicators.horovod import import_horovod, watch_elastic_job
from syncbn._src.communicators.horovod_errors import lost_collectives_as_internal_errors
from syncbn._src.communicators.launcher import is_elastic
from syncbn._src.training.elastic_state import ElasticState
from syncbn._src.watchdog.watchdog import within_reset

_log = logging.getLogger("syncbn")


def elastic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of an `ElasticState` start again from it where workers come and go.

    In an elastic job of Horovod (``syncbn launch horovod --min-np``), the function begins with the
    state of rank 0 on all workers. Where a worker is lost, the others go back to the last commit,
    and the function is called again, in a job of another size. Where one is to join or to leave,
    that happens at the next commit, and nothing is lost. In any other job, and in one process, the
    function is called once, with the state of rank 0. Under tf.distribute nothing is sent: the
    workers' states must be the same, which is checked.

    The function has to go on from the state: read rank and size in it (``job = start()``), make
    datasets and callbacks, and call `join` and `fit` in it. Build the model, its optimizer and the
    state before it. A `tf.function` may be made before it or in it: none that goes through `syncbn`
    keeps a size. No collective may be called before the function, since those that have been there
    for long do not call it again.

    A failed collective is recognized, whichever it was; other exceptions are raised as they are.
    A worker that raises one ends, and counts as lost. So does one that hangs: the watchdog ends it
    after ``SYNCBN_TIMEOUT_SECONDS``. One that is to leave is aborted by Horovod where it begins
    again, "has been removed from elastic job", after its last commit.

    Args:
        function: Takes an `ElasticState`, and other arguments.

    Returns:
        A function with the same arguments, which returns what ``function`` does.

    Raises:
        TypeError: when it is called: the first argument is not an `ElasticState`.
        RuntimeError: when it is called: Horovod is not initialized in an elastic job.
        ValueError: when it is called: see `ElasticState.sync`.

    Example:
        >>> @syncbn.training.elastic
        ... def train(state):
        ...     while state.epoch < 2:
        ...         model.fit(x, y, verbose=0)
        ...         state.epoch += 1
        ...         state.commit()
        >>> state = syncbn.training.ElasticState(model)
        >>> train(state)
        >>> state.epoch
        2
    """

    @functools.wraps(function)
    def run(state: ElasticState, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state, ElasticState):
            raise TypeError(
                "The first argument of an elastic function must be an ElasticState. "
                f"Received: {state!r}."
            )
        if not is_elastic():
            state.sync()
            return function(state, *args, **kwargs)
        hvd = import_horovod()
        if not hvd.is_initialized():
            raise RuntimeError(
                "An elastic function needs Horovod to be initialized. Received: a process in which "
                "it is not. Call syncbn.training.start() first."
            )
        from horovod.common.elastic import run_fn
        from horovod.common.exceptions import HorovodInternalError

        def go_on(state: ElasticState, *args: Any, **kwargs: Any) -> Any:
            try:
                with lost_collectives_as_internal_errors():
                    return function(state, *args, **kwargs)
            except HorovodInternalError:
                _log.warning("A worker is lost: the others go back to the last commit.")
                raise

        def reset() -> None:
            with within_reset():
                hvd.shutdown()
                # Horovod aborts a worker that has no place in the job any more, here.
                sys.stdout.flush()
                sys.stderr.flush()
                hvd.init()
            watch_elastic_job()
            _log.info("The job goes on with %d workers.", hvd.size())

        watch_elastic_job()  # where `start` has not
        return run_fn(go_on, reset)(state, *args, **kwargs)

    return run
