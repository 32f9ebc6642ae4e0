"""The benchmarks run, and report what they say."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import patience, processes

BENCHMARKS = [sys.executable, "-m", "benchmarks"]


def bench(*options, takes=12):
    # With matplotlib, for their pictures.
    command = [*BENCHMARKS, *options]
    return processes.run([("benchmarks", command, {})], takes=takes, hide=False)


def test_a_case_gives_json_a_table_and_a_picture(tmp_path):
    options = ["--quick", "--case", "tiny", "--repeats", "2", "--out", str(tmp_path)]
    finished = bench(*options)
    assert finished.code == 0, finished.output
    assert "[1/1] tiny, round 1/1" in finished.output

    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["machine"]["tensorflow"]
    (point,) = report["cases"]["tiny"]["points"]
    medians = {one["who"]: one["median"] for one in point["results"]}
    assert list(medians) == ["syncbn", "Keras 3", "Keras 3 synchronized"]
    for one in point["results"]:
        assert 0 < one["lower"] <= one["median"] <= one["upper"], one
        assert one["samples"] == 2
    assert {one["peer"]: one["ratio"] for one in point["ratios"]} == pytest.approx(
        {peer: medians["syncbn"] / medians[peer] for peer in ("Keras 3", "Keras 3 synchronized")}
    )

    page = (tmp_path / "benchmarks.md").read_text()
    assert f"- CPU: {report['machine']['CPU']}" in page
    assert f"| 1 layer (16, 64) | syncbn | {medians['syncbn']:.2f} |" in page
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_whole_model_is_measured_in_a_loop_and_in_fit_at_first_and_after(tmp_path):
    options = ["--quick", "--case", "tiny-model", "--repeats", "4", "--out", str(tmp_path)]
    finished = bench(*options, takes=30)
    assert finished.code == 0, finished.output
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    (point,) = report["cases"]["tiny-model"]["points"]
    medians = {one["who"]: one["median"] for one in point["results"]}
    names = ["syncbn", "Keras 3", "Keras 3 synchronized"]
    names += ["syncbn on tf_keras", "tf_keras", "tf_keras synchronized"]
    whats = ["", ", first call", ", fit", ", fit, first call"]
    assert set(medians) == {f"{name}{what}" for name in names for what in whats}
    for name in names:
        # A first call traces, which takes much longer than so small a model.
        assert medians[f"{name}, first call"] > 2 * medians[name] > 0, medians
        assert medians[f"{name}, fit, first call"] > 2 * medians[f"{name}, fit"] > 0, medians
    assert {one["ours"] for one in point["ratios"]} == {
        f"{name}{what}" for name in ("syncbn", "syncbn on tf_keras") for what in whats
    }


def test_the_program_finds_them_whatever_the_path_leads_to(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError('another one')")
    program = [("syncbn", ["syncbn", "bench", "--list", "--case", "tiny"], {})]
    finished = processes.run(program, env={"PYTHONPATH": str(tmp_path)})
    assert finished.code == 0, finished.output
    assert "\ntiny " in finished.output


def test_without_a_gpu_its_cases_are_left_out_and_say_what_they_need(tmp_path):
    finished = bench("--engine", "mirrored-gpu", "--out", str(tmp_path))
    assert finished.code == 0, finished.output
    left_out = "- Left out: syncbn, fused op (TensorFlow sees no GPU: this needs one of NVIDIA's"
    assert left_out in (tmp_path / "benchmarks.md").read_text()
    assert left_out in finished.output


@pytest.mark.parametrize("name", ["layer-mirrored-gpu-1", "layer-mirrored-gpu-2"])
def test_the_cases_of_a_gpu_run_on_a_cpu_in_its_place(name):
    command = processes.program("gpu_cases_on_a_cpu", name)
    finished = processes.run([(name, command, {"TF_USE_LEGACY_KERAS": "0"})])
    assert finished.code == 0, finished.output


def test_an_unknown_case_is_an_error_that_names_it():
    finished = bench("--case", "tiny", "huge")
    assert finished.code == 2
    assert "--case must name cases that --list shows. Received: huge" in finished.output


def test_options_that_leave_no_case_are_an_error():
    finished = bench("--case", "tiny", "--engine", "mpi")
    assert finished.code == 2
    assert "must leave a case" in finished.output


def test_list_shows_every_case():
    from benchmarks.cases import CASES

    finished = bench("--list")
    assert finished.code == 0, finished.output
    listed = re.findall(r"^(\S+) {2,}\S", finished.output, re.MULTILINE)
    assert listed == list(CASES)


def test_a_target_that_is_missed_is_shown_as_missed():
    from benchmarks.cases import CASES
    from benchmarks.measuring import presentation

    case = CASES["target-one-replica"]
    seconds = {"syncbn": [[0.002] * 3, [0.003] * 3], "fused op": [[0.001] * 3, [0.001] * 3]}
    point = presentation.results_of(case, case.points[0], seconds)
    (ratio,) = point["ratios"]
    assert ratio["ratio"] == pytest.approx(2.5)  # the medians of the rounds are 2 and 3 ms
    assert (ratio["at_most"], ratio["reached"]) == (1.4, False)
    found = {"summary": "s", "unit": "ms", "points": [point], "left_out": [], "failures": ["why"]}
    page = presentation.markdown({"machine": {}, "settings": {}, "cases": {"c": found}})
    assert "| c | 1 layer (8, 56, 56, 64) | syncbn / fused op | 2.50 | 1.40 | **no** |" in page
    assert "Failed:\n\n```\nwhy\n```" in page


def test_a_job_that_does_not_end_is_ended_and_said_to_have_failed(tmp_path):
    code = (
        "from benchmarks.measuring import command\n"
        "from benchmarks.__main__ import main\n"
        "command.LIMIT = 2\n"
        f"raise SystemExit(main(['--case', 'tiny', '--out', {str(tmp_path)!r}]))"
    )
    finished = processes.python(code)
    assert finished.code == 1, finished.output
    assert "no end within 2 s" in (tmp_path / "benchmarks.md").read_text()


def test_benchmarks_that_are_ended_take_their_processes_along(tmp_path):
    process = subprocess.Popen(
        [*BENCHMARKS, "--case", "tiny", "--out", str(tmp_path)],
        cwd=processes.ROOT,
        env=processes.environment(TMPDIR=str(tmp_path)),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + patience.limit()
        while not running(tmp_path):
            assert time.monotonic() < deadline, "the job did not start"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(patience.limit()) == 128 + signal.SIGTERM
        assert not running(tmp_path)
    finally:
        process.kill()
        process.wait()


def running(folder):
    """The workers whose orders are in ``folder``."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            arguments = file.read_bytes().decode(errors="replace").split("\0")
            if "benchmarks.measuring.worker" in arguments and any(
                str(folder) in one for one in arguments
            ):
                found.append(arguments)
    return found


def test_the_check_for_gpus_runs_on_a_cpu_in_its_place(tmp_path):
    check = [sys.executable, "-m", "benchmarks.studies.gpu_check", "--out", str(tmp_path)]
    program = [("gpu_check", [*check, "--parts", "layers", "memory", "contract"], {})]
    finished = processes.run(program, takes=30)
    assert finished.code == 0, finished.output
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not report["gpu"]
    assert {one["passed"] > 0 for one in report["contract"].values()} == {True}
    assert [one["failures"] for one in report["contract"].values()] == [[]] * 4
    assert "| 2x8x8x4 float32 |" in finished.output
