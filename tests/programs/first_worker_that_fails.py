"""Of three workers, which meet in the folder of the argument, number 1 fails first."""

import json
import os
import pathlib
import sys
import time

index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
folder = pathlib.Path(sys.argv[1])
(folder / str(index)).touch()
# The others have some seconds from then on, so all of them are there before.
while len(list(folder.iterdir())) < 3:
    time.sleep(0.01)
if index == 1:
    sys.exit(7)
time.sleep(1)
sys.exit("worker 1 is gone")
