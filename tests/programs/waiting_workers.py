"""Workers that would wait for ever, each with a process of its own. Number 1 ends the job.

Arguments: whom it sends a signal ("self" or "parent"), which signal, and a mark in the command
lines of all processes.
"""

import json
import os
import signal
import subprocess
import sys
import time

target, name, marker = sys.argv[1:]
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", marker])
if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
    print("now", flush=True)
    os.kill(os.getpid() if target == "self" else os.getppid(), signal.Signals[name])
time.sleep(600)
