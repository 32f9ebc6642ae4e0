"""What XLA compiles in this process by automatic clustering, which is on where tests ask for it.

``SYNCBN_TEST_CLUSTERS`` is a folder in which each process makes one of its own. Import this before
TensorFlow starts.
"""

import os
import tempfile
from pathlib import Path

from syncbn.training import compile_around_collectives

ON = "SYNCBN_TEST_CLUSTERS" in os.environ

if ON:
    _folder = Path(tempfile.mkdtemp(dir=os.environ["SYNCBN_TEST_CLUSTERS"]))
    # XLA reads this when it first compiles.
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={_folder} --xla_dump_hlo_module_re=cluster_"
    compile_around_collectives()


def compiled():
    """Returns the files with the text of each cluster, before XLA optimizes it."""
    return sorted(_folder.glob("*.before_optimizations.txt"))
