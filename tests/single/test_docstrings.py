"""The examples in the docstrings of public names run, all of them in this process."""

import importlib
import inspect

import pytest

import syncbn
import syncbn.testing
from syncbn._src.keras_compat import multi_worker_fit
from tests import docstrings
from tests.keras import KERAS_3, keras

IN_A_JOB = [one for names in docstrings.IN_A_JOB.values() for one in names]
# It has to come before TensorFlow starts, as it does in tests/launchers/test_clustering.py.
NOT_RUN = ("syncbn.training.compile_around_collectives",)
# Of their own.
RAISES_NOTHING = (
    "syncbn.DistributeCommunicator",
    "syncbn.LocalCommunicator",
    "syncbn.moving_statistics",
    "syncbn.training.mend_keras_fit",
    "syncbn.training.prediction_variables",
)

PUBLIC = [
    f"{module.__name__}.{name}"
    for module in (syncbn, syncbn.training, syncbn.testing)
    for name in module.__all__
    if name != "training"
]


@pytest.fixture
def _keras_comes_back(monkeypatch):
    """What `mend_keras_fit` replaces is there again after the test."""
    if KERAS_3:
        trainer = importlib.import_module("keras.src.backend.tensorflow.trainer")
        for owner, name in (
            (trainer, "reduce_per_replica"),
            (trainer.TensorFlowTrainer, "_maybe_symbolic_build"),
            (keras.optimizers.LossScaleOptimizer, "apply"),
        ):
            monkeypatch.setattr(owner, name, getattr(owner, name))
    yield
    # Or the layers of other tests would take what comes back now for mended.
    multi_worker_fit._mend_once.cache_clear()


@pytest.mark.parametrize("name", [one for one in PUBLIC if one not in (*IN_A_JOB, *NOT_RUN)])
@pytest.mark.usefixtures("_keras_comes_back")
def test_the_examples_of_a_public_name_run(name):
    assert docstrings.run_examples(name) > 0


@pytest.mark.parametrize("name", [*IN_A_JOB, *NOT_RUN])
def test_names_whose_examples_are_run_elsewhere_have_some(name):
    assert docstrings.examples(name).examples


@pytest.mark.parametrize("name", PUBLIC)
def test_the_arguments_of_a_public_name_are_described_and_what_it_raises(name):
    public = docstrings.public(name)
    # What functions return, and protocols, are not called by users.
    if not hasattr(public, "_fields") and name not in ("syncbn.Communicator", "syncbn.Equivalence"):
        takes = [one for one in inspect.signature(public).parameters if one != "self"]
        assert not takes or "Args:" in public.__doc__
        assert ("Raises:" in public.__doc__) != (name in RAISES_NOTHING)
