"""What a layer sends to the other replicas."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._src.communicators import fingerprints
from syncbn._src.communicators.groups import Grouping
from syncbn._src.communicators.strategy import GroupRows, joined_processes
from syncbn._src.communicators.tf_distribute import DistributeCommunicator
from syncbn._src.models.training_job import TrainingJob


class Payload(NamedTuple):
    """The payload of a collective."""

    elements: int
    dtype: str


def trace_payloads(
    layer: Any, shape: tuple[int | None, ...], job: TrainingJob | None
) -> tuple[tuple[Payload, ...], tuple[Payload, ...], str]:
    """Returns what a training call of a layer sends, what its gradient sends, and a note.

    A twin of the layer is traced with a communicator that records, so this is what the layer does,
    not what is documented.

    Args:
        layer: A built layer.
        shape: The shape of its input, as far as it is known.
        job: The replicas; ``None`` where they, and so the cost of groups, are unknown.
    """
    config = layer.get_config()
    groups, note = None, ""
    grouping = Grouping(*(config[name] for name in Grouping._fields))
    if grouping.is_given():
        note = "groups not counted"
        if job is not None and job.size > 1 and (shape[0] or not grouping.target_batch):
            with job.scope():
                groups = grouping.choose(job.communicator, shape[0])
            note = f"{len(groups)} groups"
    # Two at least: a single replica runs other kernels, and sends nothing.
    recorder = _Recorder(size=2)
    if job is not None and job.size > 1:
        more = fingerprints.LENGTH if _sends_fingerprints(job) else 0
        recorder = _Recorder(job.size, job.ranks[0], job.strategy is not None, more)
    # Any name will do; that of the layer may not be valid in a graph.
    config.update(communicator=recorder, name="twin", **Grouping(groups=groups)._asdict())
    # In a thread of its own, which is outside of any strategy and graph.
    with ThreadPoolExecutor(1) as thread:
        forward, backward = thread.submit(
            _trace, type(layer), config, shape, layer.compute_dtype, recorder
        ).result()
    return forward, backward, note


def _sends_fingerprints(job: TrainingJob) -> bool:
    if isinstance(job.communicator, DistributeCommunicator):
        with job.scope():
            return joined_processes() > 1
    return not getattr(job.communicator, "finds_mixups", False)


class _Recorder:
    """Records what a layer sends, in the place of a communicator."""

    name = "local"
    supports_jit = False
    finds_mixups = True

    def __init__(self, size: int, rank: int = 0, of_strategy: bool = False, more: int = 0):
        self.size, self.rank, self._of_strategy, self._more = size, rank, of_strategy, more
        self.payloads: list[Payload] = []

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        elements = tensor.shape.num_elements() + self._more
        self.payloads.append(Payload(elements, tensor.dtype.name))
        return tensor

    def split(self, groups: Sequence[Sequence[int]]) -> Any:
        part: Any = copy.copy(self)  # which records in the same list
        return GroupRows(part, groups) if self._of_strategy else part


def _trace(
    kind: Any, config: dict[str, Any], shape: Any, dtype: str, recorder: _Recorder
) -> tuple[tuple[Payload, ...], tuple[Payload, ...]]:
    twin = kind.from_config(config)
    twin.build(shape)
    forward: list[Payload] = []

    def step(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = twin(x, training=True)
        forward.extend(recorder.payloads)
        return tape.gradient(y, x)

    function = tf.function(step, autograph=False)
    function.get_concrete_function(tf.TensorSpec(shape, dtype))
    return tuple(forward), tuple(recorder.payloads[len(forward) :])
