"""Keras 2/3 compatibility: which of them `tf.keras` is, and what differs in their API.

`tf.keras` is Keras 3, or Keras 2 (the package ``tf_keras``) where ``TF_USE_LEGACY_KERAS=1`` was
set before TensorFlow was imported. Tried with Keras 3.15, and tf_keras 2.16 and 2.21.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from typing import Any

import tensorflow as tf

# The values with which TensorFlow takes tf_keras.
_ASKED_FOR_KERAS_2 = os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "True", "true")

if _ASKED_FOR_KERAS_2 and importlib.util.find_spec("tf_keras") is None:
    raise ImportError(
        "`tf.keras` cannot be Keras 2 without the package tf_keras. Received: "
        f"TF_USE_LEGACY_KERAS={os.environ['TF_USE_LEGACY_KERAS']}, and no tf_keras. "
        "Install it: pip install tf_keras; or unset the variable, for Keras 3."
    )

keras = tf.keras

KERAS_3 = hasattr(keras, "Variable")
"""Whether `tf.keras` is Keras 3; Keras 2 had no variables of its own."""

if KERAS_3 and _ASKED_FOR_KERAS_2:
    raise RuntimeError(
        "TF_USE_LEGACY_KERAS must be set before TensorFlow is imported, which then decides what "
        f"`tf.keras` is. Received: TF_USE_LEGACY_KERAS={os.environ['TF_USE_LEGACY_KERAS']}, set "
        "when `tf.keras` was Keras 3 already, whose layers no model of tf_keras takes. Set it in "
        "the shell, or above the first import of the script; or unset it."
    )

if KERAS_3 and keras.config.backend() != "tensorflow":
    raise ImportError(
        "syncbn needs Keras with the TensorFlow backend. Received: KERAS_BACKEND="
        f"{keras.config.backend()}. Set KERAS_BACKEND=tensorflow before importing Keras."
    )

VARIABLES: tuple[type, ...] = (tf.Variable, keras.Variable) if KERAS_3 else (tf.Variable,)
"""The types of a user's variables."""

register_keras_serializable = keras.utils.register_keras_serializable

OPTIMIZERS: tuple[type, ...] = (keras.optimizers.Optimizer,)
"""The base classes of the optimizers of `tf.keras`."""
if not KERAS_3:
    OPTIMIZERS += (keras.optimizers.legacy.Optimizer,)


# Looked up once: users may later assign a layer of this package to Keras' name, for code that looks
# it up there.
PLAIN_BATCH_NORMALIZATION: Any = keras.layers.BatchNormalization
"""The batch normalization of `tf.keras`."""

_NAMES_FIRST_STEP = KERAS_3 and [*map(int, keras.__version__.split(".")[:2])] < [3, 11]
"""Whether ``on_train_batch_end`` gets the first step of an execution; others give the last."""


def steps_made(callback: Any, batch: int) -> int:
    """Returns how many steps of an epoch have been made at a callback's ``on_train_batch_end``.

    Where nobody knows the length of the data, Keras 3 counts their last execution as a full one.
    """
    steps = batch + (callback.model.steps_per_execution if _NAMES_FIRST_STEP else 1)
    of_epoch = (callback.params or {}).get("steps")
    return steps if of_epoch is None else min(steps, of_epoch)


BATCH_NORMALIZATION: Any = PLAIN_BATCH_NORMALIZATION
"""The base class of all batch normalizations of `tf.keras`; that of Keras 2 is not public."""
if not KERAS_3:
    BATCH_NORMALIZATION = BATCH_NORMALIZATION.__base__


def require_renorm() -> None:
    """Raises where Keras' own `BatchNormalization` has no renormalization."""
    known = inspect.signature(PLAIN_BATCH_NORMALIZATION.__init__).parameters
    if KERAS_3 and "renorm" not in known:
        raise NotImplementedError(
            "renorm=True needs a Keras whose BatchNormalization has it: Keras 3.14, or Keras 2. "
            f"Received: Keras {keras.__version__}. Update it: pip install -U keras."
        )


def pass_on_configs(ours: Any) -> None:
    """Makes the Keras 2 class of the same name pass on the configs of our `SyncBatchNormalization`.

    Keras 2 looks up layers in wrappers, and in nested models in HDF5 files, by the bare class name.
    """
    if KERAS_3:
        return
    theirs = keras.layers.experimental.SyncBatchNormalization
    own = theirs.from_config.__func__

    @classmethod  # type: ignore[misc]
    def from_config(cls: Any, config: dict[str, Any]) -> Any:
        of_ours = cls is theirs and "communicator" in config
        return ours.from_config(config) if of_ours else own(cls, config)

    theirs.from_config = from_config


def variable(weight: Any) -> Any:
    """Returns the TensorFlow variable of a Keras variable; any other argument unchanged."""
    return weight.value if KERAS_3 and isinstance(weight, keras.Variable) else weight


def draws_numbers(layer: Any) -> bool:
    """Says whether a layer has a random number generator."""
    if KERAS_3:
        return any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    return isinstance(layer, keras.__internal__.layers.BaseRandomLayer)


def prepare_training(model: Any, data: tuple[Any, ...]) -> None:
    """Does what `fit` does before the first `train_step`; within the strategy's scope."""
    if KERAS_3:
        # Metrics and the loss are otherwise built in replicas, which must not create variables.
        # There is no public API for this.
        model._symbolic_build(data_batch=tf.nest.map_structure(tf.constant, data))


def training_mode(layer: Any, training: Any) -> Any:
    """Returns whether a call trains: a bool, or in a graph of Keras 2 possibly a tensor.

    ``None`` is Keras 2's learning phase, and false in Keras 3. A frozen layer does not train.
    """
    if not layer.trainable:
        return False
    if training is None:
        training = False if KERAS_3 else keras.backend.learning_phase()
    if tf.is_tensor(training):
        static = tf.get_static_value(training)
        return training if static is None else bool(static)
    return bool(training)
