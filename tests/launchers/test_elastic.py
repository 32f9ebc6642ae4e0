"""An elastic job of Horovod: one worker is killed, one is added, one is removed."""

import itertools
import json
import re

import numpy as np
import pytest

from tests import elastic_truth, patience, processes

LAUNCHER = str(processes.ROOT / "launch" / "horovod.sh")


@pytest.mark.parametrize(
    # In a step of `fit`, and one of a loop; the last commit before, to which the other goes back.
    ("legacy", "fault", "step", "committed"),
    [(False, "is killed", 13, 12), (True, "sleeps", 8, 7)],
    ids=["keras3-fit", "keras2-loop"],
)
def test_workers_come_and_go(legacy, fault, step, committed, tmp_path):
    (tmp_path / "hosts").write_text("localhost:1\n127.0.0.1:1\n")
    discovery = tmp_path / "discover"
    discovery.write_text(f"#!/bin/sh\ncat '{tmp_path}/hosts'\n")
    discovery.chmod(0o755)
    command = [
        *(LAUNCHER, "-np", "2", "--min-np", "1", "--max-np", "2"),
        *("--host-discovery", str(discovery), "--network-interface", "lo", "--"),
        *processes.program("elastic_training", str(tmp_path), "1", fault, str(step)),
    ]
    limit = f"{20 * patience.factor():g}" if fault == "sleeps" else "600"
    env = {
        "TF_USE_LEGACY_KERAS": str(int(legacy)),
        # How long the one that is left waits for a new one, on a machine that may be busy.
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "600",
        "SYNCBN_WARN_SECONDS": "4",
        "SYNCBN_TIMEOUT_SECONDS": limit,
        "SYNCBN_RECORDS": str(tmp_path),
    }
    finished = processes.run([("horovod.sh", command, {})], takes=40, env=env)
    assert finished.code == 0, finished.output
    assert "has been removed from elastic job" in finished.output, finished.output
    assert finished.output.count("A worker is lost: the others go back") == 1, finished.output
    waits = r"rank \d has waited \d+ s in syncbn/sync_batch_normalization/statistics \(call \d+\); "
    sleeps = r"rank \d \(process \d+ on \S+\) is in no collective"
    watched = f"says so after 4 s, and goes on without the missing after {limit} s"
    assert finished.output.count(watched) >= 4, finished.output  # two workers, twice
    if fault == "sleeps":
        ends = rf"{waits}{sleeps}.*, the limit of {limit} s\. The others go on without this rank"
        assert re.search(ends, finished.output), finished.output
        (record,) = tmp_path.glob("syncbn-record-horovod-*.json")
        assert "before_step" in json.loads(record.read_text())["stack"]
    else:
        assert not list(tmp_path.glob("syncbn-record-*"))
    assert "rank_store.py" not in finished.output, finished.output  # in a traceback
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert [size for size, _ in itertools.groupby(sizes)] == [2, 1, 2, 1], sizes
    assert sizes.index(1) == committed, sizes
    initial, final = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("initial", "final"))
    expected = elastic_truth.trained(initial, sizes)
    for name, value in final.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
