"""The templates for schedulers: Slurm and Kubernetes."""

import os
import re
import sys

import yaml

from tests import processes
from tests.launch_scripts import ARGUMENTS, LAUNCH, path, printed

# Runs two tasks, tells both to end once both are ready, and returns the highest code.
SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys, time
print(*("<%s>" % argument for argument in sys.argv[1:]), sep="\\n", flush=True)
command = sys.argv[1:]
options = dict(command.pop(0).split("=") for _ in list(command) if command[0][:1] == "-")
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": index}}, start_new_session=True)
    for index in "01"
]
folder, told, deadline = pathlib.Path("{folder}"), False, float("inf")
while None in (codes := [task.poll() for task in tasks]):
    if not told and len([*folder.glob("ready-*")]) == 2:
        told = True
        for task in tasks:
            task.terminate()
    if codes != [None, None] and deadline == float("inf"):
        deadline = time.monotonic() + float(options.get("--wait", 0) or "inf")
    at_once = options["--kill-on-bad-exit"] == "1" and any(codes)
    if at_once or time.monotonic() > deadline:
        for task in tasks:
            task.kill()
    time.sleep(0.01)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

# The second worker takes longer.
TOLD_WORKER = """#!/bin/bash
[ -z "$FAILS_WITH" ] || exit "$FAILS_WITH"
trap 'sleep $((2 * SLURM_PROCID)); exit 75' TERM
touch {folder}/ready-$SLURM_PROCID
while :; do read -rt 0.1 <> <(:); done
"""


def test_the_slurm_template_starts_the_workers_of_one_cluster(tmp_path):
    script = LAUNCH / "slurm.sbatch"
    finished = processes.run([("shellcheck", ["shellcheck", str(script)], {})])
    assert finished.code == 0, finished.output
    lines = script.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert "--ntasks-per-node=1" in options
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options), options
    # Slurm reads options up to the first command only.
    first = next(number for number, line in enumerate(lines) if line and line[0] != "#")
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    for name, text in (("srun", SRUN), ("python", TOLD_WORKER)):
        (tmp_path / name).write_text(text.format(python=sys.executable, folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    names = 'if [ "$1" = show ]; then printf \'node1\\nnode2\\n\'; else echo "told $*"; fi'
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{names}\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = {"PATH": path(tmp_path), "SLURM_JOB_ID": "20005", "SLURM_JOB_NODELIST": "node[1-2]"}
    command = ["bash", str(script), *ARGUMENTS]
    finished = processes.run([("sbatch", command, {**env, "FAILS_WITH": "7"})])
    assert finished.code == 7, finished.output
    assert printed(finished.output) == [
        *("--kill-on-bad-exit=0", "--wait=600"),
        *("launch/multiworker.py", "--host", "node1:12005,node2:12005"),
        *("--", "python", "launch/train_digits.py", *ARGUMENTS),
    ]
    assert "told" not in finished.output
    # Both have saved, one exits after the other, and the job is to go on.
    finished = processes.run([("sbatch", command, env)])
    assert finished.code == os.EX_TEMPFAIL, finished.output
    assert "told requeue 20005\n" in finished.output, finished.output
    assert {"--signal=TERM@120", "--requeue"} <= {*options}


def test_the_kubernetes_template_is_a_job_of_the_image():
    job = yaml.safe_load((LAUNCH / "kubernetes-mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][kind] for kind in ("Launcher", "Worker"))
    assert launcher["replicas"] == 1
    containers = []
    for replicas in (launcher, worker):
        (container,) = replicas["template"]["spec"]["containers"]
        assert container["image"] == "syncbn:cpu"
        assert container["securityContext"]["runAsUser"] == 1000
        assert all(isinstance(argument, str) for argument in container["args"])
        containers.append(container)
    script, *arguments = containers[0]["args"]
    ranks = worker["replicas"] * spec["slotsPerWorker"]
    assert arguments == ["-np", str(ranks), "--", "python", "launch/train_digits.py"]
    assert os.access(processes.ROOT / script, os.X_OK)
    assert (processes.ROOT / arguments[-1]).exists()
    # The server lets in whoever has the key that the operator mounts, and so has the launcher.
    mounted = spec["sshAuthMountPath"]
    assert f"-oAuthorizedKeysFile={mounted}/authorized_keys" in containers[1]["args"]
    assert f"-oHostKey={mounted}/id_rsa" in containers[1]["args"]
