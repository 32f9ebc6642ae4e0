"""XLA for what lies between the collectives of a step, which it cannot compile as a whole."""

from __future__ import annotations

import tensorflow as tf

# There is no public API to have XLA compile for CPUs once TensorFlow is imported: it reads
# TF_XLA_FLAGS before a script can set it. Tried with TensorFlow 2.21;
# tests/single/test_clustering.py covers it.
from tensorflow.python import pywrap_tfe


def compile_around_collectives() -> None:
    """Lets XLA compile what lies between the collectives, in every `tf.function` and in `fit`.

    A collective rules out ``jit_compile=True`` for the whole function around it. TensorFlow's
    automatic clustering works around it: it finds the operations that XLA can compile, and leaves
    out collectives, and kernels whose inner workings a result depends on. Results are the same.

    Call it once in each process, first in the script: before anything is computed, and before a
    strategy is created. ``--xla`` of the launchers does the same. Eager code is not compiled. XLA
    recompiles for each new shape: batch with ``drop_remainder=True``. On CPUs it does not always
    pay off; see docs/jobs.md. `tf.config.optimizer.set_jit(False)` undoes it.

    Where TensorFlow sees GPUs, XLA compiles only for these, and the call may come at any time.

    Raises:
        RuntimeError: TensorFlow has started, and without GPUs it is too late to enable XLA.

    Example:
        >>> syncbn.training.compile_around_collectives()  # doctest: +SKIP
    """
    if not tf.config.get_visible_devices("GPU"):
        _compile_for_cpus()
    tf.config.optimizer.set_jit("autoclustering")


def _compile_for_cpus() -> None:
    compiled_before = pywrap_tfe.TF_SetTfXlaCpuGlobalJit(True)
    if _has_started() and not compiled_before:
        pywrap_tfe.TF_SetTfXlaCpuGlobalJit(False)
        raise RuntimeError(
            "XLA compiles for CPUs only if enabled before TensorFlow starts. Received: a call of "
            "compile_around_collectives() after something was computed, or a strategy was created. "
            "Make it the first call of the script, or start the script with --xla of a launcher, "
            "which sets TF_XLA_FLAGS='--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit'."
        )


def _has_started() -> bool:
    """Says whether TensorFlow has initialized its devices, and with them XLA's."""
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    try:
        tf.config.threading.set_inter_op_parallelism_threads(threads + 1)
    except RuntimeError:  # "cannot be modified after initialization"
        return True
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return False
