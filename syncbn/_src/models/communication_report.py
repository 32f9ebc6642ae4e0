"""What synchronization costs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._src.communicators import horovod_settings
from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.models.communication_cost import Payload, trace_payloads
from syncbn._src.models.statistics import all_normalizations, channels_of
from syncbn._src.models.training_job import TrainingJob, job_of
from syncbn._src.text_tables import rich_table, with_rule
from syncbn._src.watchdog import watchdog


class LayerReport(NamedTuple):
    """A row of the table: a normalization of the model."""

    name: str
    kind: str
    """Its class."""
    input_shape: tuple[int | None, ...] | None = None
    """The shape that it was built for; ``None`` if it is not built."""
    channels: int | None = None
    """The number of channels that it has statistics of."""
    engine: str | None = None
    """The name of the communicator that it was given."""
    forward: tuple[Payload, ...] = ()
    """The collectives of a training call."""
    backward: tuple[Payload, ...] = ()
    """Those of its gradient."""
    seconds: float | None = None
    """How long all of them take, if that was measured."""
    note: str = ""
    """Why there are no collectives; the number of groups."""

    @property
    def collectives(self) -> tuple[int, int]:
        """The number of collectives, forward and backward."""
        return len(self.forward), len(self.backward)

    @property
    def bytes(self) -> tuple[int, int]:
        """The number of bytes that each replica sends, forward and backward."""
        return _bytes(self.forward), _bytes(self.backward)


class Report(NamedTuple):
    """What `report` returns; printed, a table.

    Example:
        >>> model = syncbn.convert_sync_batchnorm(model)
        >>> [(layer.name, layer.channels) for layer in syncbn.report(model).layers]
        [('normalization', 4)]
    """

    layers: tuple[LayerReport, ...]
    """The normalizations of the model, in its order."""
    engine: str | None = None
    """The name of the communicator that was measured, if any."""
    size: int | None = None
    """The number of replicas that it joins."""
    advice: tuple[str, ...] = ()
    """What to change, if there is something."""
    settings: str = ""
    """Horovod's settings for small messages, where it was measured."""
    watchdog: str = ""
    """Whether ranks that do not come are noticed, where a communicator was measured."""

    @property
    def total(self) -> LayerReport:
        """One step of all layers together, each called once."""
        seconds = [layer.seconds for layer in self.layers if layer.seconds is not None]
        return LayerReport(
            "total",
            "",
            forward=tuple(payload for layer in self.layers for payload in layer.forward),
            backward=tuple(payload for layer in self.layers for payload in layer.backward),
            seconds=sum(seconds) if seconds else None,
        )

    def __str__(self) -> str:
        return with_rule(self._rows(), self._notes(), right=())

    def __rich__(self) -> Any:
        """Returns the table that rich prints."""
        return rich_table(self._rows(), self._notes(), right=())

    def _rows(self) -> list[tuple[str, ...]]:
        return [_HEADINGS, *(_row(layer) for layer in (*self.layers, self.total))]

    def _notes(self) -> list[str]:
        notes = []
        if self.size == 1:
            notes.append("There is one replica here, which sends nothing: nothing was measured.")
        elif self.engine:
            settings = f", with {self.settings}" if self.settings else ""
            notes.append(f"Measured over {self.engine}, {self.size} replicas{settings}.")
        if self.watchdog:
            notes.append(f"Watchdog: {self.watchdog}.")
        return [*notes, *(f"- {advice}" for advice in self.advice)]


def report(model: Any, communicator: str | Communicator | None = None) -> Report:
    """Says which layers of a model synchronize, and what that costs a training step.

    The collectives and bytes are those of one training call of each layer and of its gradient, with
    respect to its input too: a layer that a step calls twice costs twice as much.

    Args:
        model: A model or layer of `tf.keras`.
        communicator: The one to measure: as for `syncbn.SyncBatchNormalization`, and ``"auto"``
            also finds the strategy that the model was built under. All workers make the call then.
            It takes some 300 all-reduces for each size of payload. ``None`` measures nothing.

    Returns:
        A table, when printed by `print` or by rich; the figures are in ``layers`` and ``total``.
        Where a communicator was measured, it predicts how long a step waits for collectives. It may
        end in advice.

    Raises:
        RuntimeError: with a communicator, in a graph or replica; and see `syncbn.resolve`.

    Example:
        >>> model = syncbn.convert_sync_batchnorm(model)
        >>> syncbn.report(model).total.collectives  # forward, and backward
        (1, 1)
    """
    job = None if communicator is None else job_of(model, communicator)
    rows = [_layer_report(name, layer, job) for name, layer in all_normalizations(model).items()]
    if job is None:
        return Report(tuple(rows), advice=tuple(_advice(rows)))
    latencies: dict[Payload, float] = {}
    if job.size > 1:
        different = sorted({payload for row in rows for payload in row.forward + row.backward})
        latencies = {payload: job.latency(*payload) for payload in different}
        rows = [_with_seconds(row, latencies) for row in rows]
    advice = [*_advice(rows), *_measured_advice(rows, job)]
    settings = horovod_settings.in_force() if job.communicator.name == "horovod" else ""
    several = job.size > len(job.ranks)
    return Report(
        tuple(rows),
        job.communicator.name,
        job.size,
        tuple(advice),
        settings,
        watchdog.described(several) if job.size > 1 else "",
    )


_HEADINGS = ("layer", "input", "channels", "engine", "collectives", "bytes", "ms", "note")


def _row(layer: LayerReport) -> tuple[str, ...]:
    sends = layer.forward or not layer.note
    return (
        layer.name,
        "" if layer.input_shape is None else str(layer.input_shape),
        "" if layer.channels is None else str(layer.channels),
        layer.engine or "",
        "{} + {}".format(*layer.collectives) if sends else "",
        "{} + {}".format(*layer.bytes) if sends else "",
        "" if layer.seconds is None else f"{1e3 * layer.seconds:.3g}",
        layer.note,
    )


def _bytes(sent: Sequence[Payload]) -> int:
    return sum(elements * tf.as_dtype(dtype).size for elements, dtype in sent)


def _layer_report(name: str, layer: Any, job: TrainingJob | None) -> LayerReport:
    shape = layer.get_build_config()["input_shape"] if layer.built else None
    if shape is not None:
        shape = tuple(tf.TensorShape(shape).as_list())
    channels = channels_of(layer) if layer.built else None
    row = LayerReport(name, type(layer).__name__, shape, channels)
    if not isinstance(layer, SynchronizedLayer):
        # Other packages, and Keras itself, derive synchronized layers from it.
        plain = type(layer) is keras_api.PLAIN_BATCH_NORMALIZATION
        plain = plain and not getattr(layer, "synchronized", False)
        if plain and not layer.trainable:
            return row._replace(note="frozen")
        return row._replace(note="not synchronized" if plain else "not a layer of syncbn")
    given = layer.communicator
    row = row._replace(engine=given if isinstance(given, str) else given.name)
    if shape is None:
        return row._replace(note="not built")
    if not layer.trainable:
        return row._replace(note="frozen")
    if given == "local":
        return row._replace(note="each replica alone")
    forward, backward, note = trace_payloads(layer, shape, job)
    return row._replace(forward=forward, backward=backward, note=note)


def _with_seconds(row: LayerReport, latencies: dict[Payload, float]) -> LayerReport:
    sent = row.forward + row.backward
    return row._replace(seconds=sum(latencies[payload] for payload in sent)) if sent else row


BEST_BATCH = 128
"""The largest normalization batch of those that gave the best accuracy, 32 to 128 samples: Wu &
Johnson, "Rethinking 'Batch' in BatchNorm" (2021)."""


def _advice(rows: Sequence[LayerReport]) -> list[str]:
    plain = [row.name for row in rows if row.note == "not synchronized"]
    if not plain:
        return []
    if len(plain) == 1:
        them, makes = "1 BatchNormalization layer uses", "makes it a synchronized one."
    else:
        them = f"{len(plain)} BatchNormalization layers use"
        makes = "makes them synchronized ones."
    convert = "syncbn.convert_sync_batchnorm(model)"
    return [f"{them} the statistics of each replica alone: {convert} {makes}"]


def best_group(replicas: int, batch: int, at_least: int = 1) -> int:
    """Returns the size of the groups of replicas that is best for statistics.

    It divides the number of replicas, and is the largest with at most `BEST_BATCH` samples, or the
    smallest where none has so few.

    Args:
        replicas: Their number.
        batch: The samples of each.
        at_least: The smallest size.
    """
    sizes = [size for size in range(at_least, replicas + 1) if replicas % size == 0]
    small = [size for size in sizes if size * batch <= BEST_BATCH]
    return max(small) if small else min(sizes)


def _measured_advice(rows: Sequence[LayerReport], job: TrainingJob) -> list[str]:
    advice = []
    if job.communicator.name == "horovod":
        slow = horovod_settings.advice()
        advice += [f"{slow}."] if slow else []
    # Only where the model was built for batches of one known size, which are then those of a
    # replica; under a strategy, Keras may have had those of all together.
    batches = {row.input_shape[0] for row in rows if row.forward and row.input_shape}
    batch = batches.pop() if len(batches) == 1 else None
    if batch and batch * job.size > BEST_BATCH and job.size > 1 and job.strategy is None:
        best = best_group(job.size, batch)
        remedy = f"group_size={best}" if best > 1 else "communicator='local'"
        advice.append(
            f"{job.size} replicas with {batch} samples each normalize with {batch * job.size} "
            f"samples, and more than {BEST_BATCH} have not been found to help: {remedy} makes it "
            f"{best * batch}."
        )
    return advice
