"""The examples in the docstrings of public names run, all of them in this process."""

import inspect

import pytest

import syncbn
import syncbn.testing
from tests import docstrings
from tests.unmended_keras import unmended_keras

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


@pytest.mark.parametrize("name", [one for one in PUBLIC if one not in (*IN_A_JOB, *NOT_RUN)])
def test_the_examples_of_a_public_name_run(name):
    with unmended_keras():
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
