"""A case of the benchmarks that is for GPUs, named by the argument, on CPUs in their place."""

import sys

import tensorflow as tf

from benchmarks.cases import CASES, LARGE
from benchmarks.measuring import job_replicas
from benchmarks.measuring.workloads import WORKLOADS

job_replicas.SHARED["mirrored-gpu"] = "CPU"
case = CASES[sys.argv[1]]
job = job_replicas.JobReplicas("mirrored-gpu", case.workers)
layers = {name: one.layer for name, one in case.contestants.items() if one.keras == 3}
for point in {point.dtype: point._replace(shape=LARGE) for point in case.points}.values():
    samples = WORKLOADS[case.workload].measure(job, layers, point, 1)
    assert samples.keys() == layers.keys()
    assert all(one[0] > 0 for one in samples.values()), samples

# Each replica has its input with it, and waits for its own part of the device.
(x,) = job.normal([(2, 3)], tf.float32, 1)
graph = tf.function(lambda x: job.run(tf.square, x)).get_concrete_function(x).graph
waits = [one for one in graph.get_operations() if one.type == "SyncDevice"]
for devices in (
    [one.device for one in job.strategy.experimental_local_results(x)],
    [one.device for one in waits],
):
    indices = [tf.DeviceSpec.from_string(device).device_index for device in devices]
    assert indices == list(range(case.workers)), devices
assert all(one.control_inputs for one in waits)
