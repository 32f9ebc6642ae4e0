"""An elastic job of Horovod: one worker is killed, one is added, one is removed."""

import itertools
import json

import numpy as np
import pytest

from tests import elastic_truth, processes

LAUNCHER = str(processes.ROOT / "launch" / "horovod.sh")


@pytest.mark.parametrize(
    # Workers that are left when one is killed, in a step of `fit`, and in one of a loop; and the
    # last commit before it, to which they go back.
    ("legacy", "left", "killed_at", "committed"),
    [(False, 2, 13, 12), (True, 1, 8, 7)],
    ids=["keras3-fit", "keras2-loop"],
)
def test_workers_come_and_go(legacy, left, killed_at, committed, tmp_path):
    (tmp_path / "hosts").write_text(f"localhost:{left}\n127.0.0.1:1\n")
    discovery = tmp_path / "discover"
    discovery.write_text(f"#!/bin/sh\ncat '{tmp_path}/hosts'\n")
    discovery.chmod(0o755)
    command = [
        *(LAUNCHER, "-np", str(left + 1), "--min-np", str(left), "--max-np", str(left + 1)),
        *("--host-discovery", str(discovery), "--network-interface", "lo", "--"),
        *processes.program("elastic_training", str(tmp_path), str(left), str(killed_at)),
    ]
    env = {"TF_USE_LEGACY_KERAS": str(int(legacy))}
    finished = processes.run([("horovod.sh", command, {})], takes=40, env=env)
    assert finished.code == 0, finished.output
    assert "has been removed from elastic job" in finished.output, finished.output
    assert finished.output.count("A worker is lost: the others go back") == left, finished.output
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert [size for size, _ in itertools.groupby(sizes)] == [left + 1, left] * 2, sizes
    assert sizes.index(left) == committed, sizes
    initial, final = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("initial", "final"))
    expected = elastic_truth.trained(initial, sizes)
    for name, value in final.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
