"""`assert_synchronized` and `report` where replicas are real."""

import collections

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.models.agreement import assert_synchronized
from syncbn._src.models.communication_report import report
from syncbn._src.models.training_job import job_of
from tests.parallel.test_collectives import arguments, collectives, forward_and_backward


def test_what_one_replica_has_otherwise_is_found_on_all(replicas):
    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(name="norm"), (None, 3, 5))
    replicas.run(forward_and_backward, layers, arguments(replicas, 4, 3, 5))
    assert_synchronized(layers[0])
    assert_synchronized(layers[0], weights=True)

    job = job_of(layers[0])
    for rank, copy in zip(job.ranks, job.copies(layers[0].moving_variance), strict=True):
        if rank == replicas.size - 1:
            copy.assign(np.full(5, 7, "float32"))
    message = f"another moving_variance of norm on rank {replicas.size - 1} than on rank 0"
    with pytest.raises(ValueError, match=message):
        assert_synchronized(layers[0])


@pytest.mark.parametrize("options", [{}, {"group_size": 1}], ids=str)
def test_the_report_counts_the_collectives_that_there_are(options, replicas):
    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(**options), (None, 3, 5))
    replicas.run(forward_and_backward, layers, arguments(replicas, 4, 3, 5), graph=True)
    found = report(layers[0], "auto")
    assert found.size == replicas.size
    assert found.total.seconds > 0
    sent = found.total.forward + found.total.backward
    assert collections.Counter(payload.elements for payload in sent) == collections.Counter(
        operation.inputs[0].shape.num_elements() for operation in collectives(replicas.operations)
    )


def test_the_engine_adds_up_in_turn_for_every_size(replicas, engine):
    layers = replicas.build(lambda rank: tf.keras.layers.Dense(1), (None, 1))
    job = job_of(layers[0])
    assert (job.communicator.name, job.size) == (engine, replicas.size)
    rows = job.gather([np.array([rank, 0.5]) for rank in job.ranks], "syncbn/rows")
    np.testing.assert_array_equal(rows, [[rank, 0.5] for rank in range(replicas.size)])
    assert 0 < job.latency(3, "float64") < 1
