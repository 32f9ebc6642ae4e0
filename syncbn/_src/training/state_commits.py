"""The callback that commits the state of an elastic job in `Model.fit`."""

from __future__ import annotations

import functools
import logging
from typing import Any

from syncbn._src.arguments import at_least_one
from syncbn._src.keras_compat import keras_api
from syncbn._src.training.elastic_state import ElasticState

_log = logging.getLogger("syncbn")


class CommitState(keras_api.keras.callbacks.Callback):
    """Counts epochs and batches in an `ElasticState`, and commits it, in `Model.fit`.

    After each batch ``state.batch`` is the number of batches that are done in this epoch; after
    each epoch ``state.epoch`` is that of epochs, and ``state.batch`` zero. It commits after each
    epoch, and within one when so many batches are done and another begins. Put it last: what comes
    behind it does not see the end of an epoch after which workers join or leave. But put Keras'
    ``SwapEMAWeights(swap_on_epoch=True)`` behind it: it commits the weights that are in the model
    then, and these must not be averages yet.

    Of data of unknown length (a generator, ``filter``, TFRecords) nobody knows whether another
    batch follows, and an epoch cannot go on with none: there it commits after epochs only, and logs
    that once. `tf.data.experimental.assert_cardinality`, before ``skip``, makes the length known.

    `fit` goes on within an epoch with the batches that are left of it, and with
    ``initial_epoch=state.epoch``, so that each call is best of one epoch: see `elastic`, and the
    page on elastic jobs. The logs of an epoch that goes on are those of its last call.

    Args:
        state: The state.
        batches_per_commit: After how many batches to commit, where the length of the data is known.

    Raises:
        TypeError: ``state`` is not an `ElasticState`.
        ValueError: ``batches_per_commit`` is not a positive integer.

    Example:
        >>> state = syncbn.training.ElasticState(model)
        >>> commit = syncbn.training.CommitState(state, batches_per_commit=10)
        >>> history = model.fit(x, y, epochs=2, callbacks=[commit], verbose=0)
        >>> state.epoch, state.batch
        (2, 0)
    """

    def __init__(self, state: ElasticState, batches_per_commit: int = 1) -> None:
        super().__init__()
        if not isinstance(state, ElasticState):
            raise TypeError(f"`state` must be an ElasticState. Received: state={state!r}.")
        self.state = state
        self.batches_per_commit = at_least_one("batches_per_commit", batches_per_commit)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Of an epoch that goes on, some batches are done.
        if epoch != self.state.epoch:
            self.state.epoch, self.state.batch = epoch, 0
        self._known = self.params.get("steps") is not None
        if not self._known:
            _say_once()
        self._before = self.state.batch
        self._committed = self._before

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Not behind a batch, which may be the last: then nothing would be left of the epoch. Where
        # the length is unknown, Keras calls this behind the last one too.
        if self._known and self.state.batch - self._committed >= self.batches_per_commit:
            self._committed = self.state.batch
            self.state.commit()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.state.batch = self._before + keras_api.steps_made(self, batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state.epoch, self.state.batch = epoch + 1, 0
        self.state.commit()


@functools.cache
def _say_once() -> None:
    _log.warning(
        "CommitState commits after each epoch only, since the length of the data is unknown. To "
        "commit within one, apply tf.data.experimental.assert_cardinality(batches) to them."
    )
