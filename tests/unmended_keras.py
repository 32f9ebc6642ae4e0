"""Keras as it is before `mend_keras_fit`."""

import contextlib
import importlib
import inspect

import pytest

from syncbn._src.keras_compat import multi_worker_fit
from tests.keras import KERAS_3, keras


@contextlib.contextmanager
def unmended_keras():
    """Within, Keras has its own functions, which may be mended anew; then those of before."""
    with contextlib.ExitStack() as stack:
        # At last, or the layers of other tests would take what is back then for mended.
        stack.callback(multi_worker_fit._mend_once.cache_clear)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if KERAS_3:
            trainer = importlib.import_module("keras.src.backend.tensorflow.trainer")
            for owner, name in (
                (trainer, "reduce_per_replica"),
                (trainer.TensorFlowTrainer, "_maybe_symbolic_build"),
                (keras.optimizers.LossScaleOptimizer, "apply"),
            ):
                patch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        multi_worker_fit._mend_once.cache_clear()
        yield
