"""Whether a model on several replicas does what it does on one, with the whole batch."""

from syncbn.models.equivalence.check import Equivalence, check_equivalence
from syncbn.models.equivalence.command import add_arguments, run
from syncbn.models.equivalence.differences import Row

__all__ = ["Equivalence", "Row", "add_arguments", "check_equivalence", "run"]
