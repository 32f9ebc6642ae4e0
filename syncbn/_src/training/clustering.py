"""XLA for what lies between the collectives of a step, which it cannot compile as a whole."""

from __future__ import annotations

import tensorflow as tf

# There is no public way to have XLA compile for CPUs once TensorFlow is imported: it reads
# TF_XLA_FLAGS before a script can know that. Tried with TensorFlow 2.21;
# tests/single/test_clustering.py holds it.
from tensorflow.python import pywrap_tfe

__all__ = ["compile_around_collectives"]


def compile_around_collectives() -> None:
    """Lets XLA compile what lies between the collectives, in every `tf.function` and in `fit`.

    A collective ends ``jit_compile=True`` for the whole function that it is in. TensorFlow's
    automatic clustering goes on around it: it finds the operations that XLA can compile, and leaves
    collectives, and kernels on whose inside a result rests, as they are. Results are the same.

    One call in each process, first in the script: before anything is computed, and before a
    strategy is made. ``--xla`` of the launchers does the same from outside. What runs eagerly is
    not compiled. XLA compiles anew for each shape that comes: batch with ``drop_remainder=True``.
    On CPUs it does not always pay; see docs/sharp-bits.md. `tf.config.optimizer.set_jit(False)`
    takes it back.

    With GPUs in sight only these are compiled for, and the call may come at any time.

    Raises:
        RuntimeError: TensorFlow has started, and without GPUs XLA can no longer come in.
    """
    if not tf.config.get_visible_devices("GPU"):
        _compile_for_cpus()
    tf.config.optimizer.set_jit("autoclustering")


def _compile_for_cpus() -> None:
    compiled_before = pywrap_tfe.TF_SetTfXlaCpuGlobalJit(True)
    if _has_started() and not compiled_before:
        pywrap_tfe.TF_SetTfXlaCpuGlobalJit(False)
        raise RuntimeError(
            "XLA compiles for CPUs only if that is said before TensorFlow starts. Received: a call "
            "of compile_around_collectives() after something was computed, or a strategy was made. "
            "Make it the first call of the script, or start the script with --xla of a launcher, "
            "which sets TF_XLA_FLAGS='--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit'."
        )


def _has_started() -> bool:
    """Says whether TensorFlow has made its devices, with which XLA registers what it compiles."""
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    try:
        tf.config.threading.set_inter_op_parallelism_threads(threads + 1)
    except RuntimeError:  # "cannot be modified after initialization"
        return True
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return False
