"""The model of the all-reduce, against what can be computed by hand, and its fit, against truth."""

import json
import sys

import numpy as np
import pytest

from benchmarks.measuring.layer_steps import resnet_50_shapes
from benchmarks.studies import all_reduce, cost_model, scaling
from benchmarks.studies.cost_model import fit
from syncbn._src.models import network_costs
from syncbn._src.models.network_costs import ALGORITHMS, Costs, added, network, steps, terms
from tests import patience, processes

CHANNELS = [shape[-1] for shape in resnet_50_shapes(1)]
TRUTH = {
    "recursive doubling": Costs(1.2e-6, 1.5e-10, 2.5e-6, 0.9e-6),
    "ring": Costs(0.7e-6, 1.8e-10, 3.5e-6, 2e-6),
    "tree": Costs(1e-6, 1.2e-10, 1.5e-6, 1.1e-6),
}


def measurements(noise=0.0, cores=2):
    """What `all_reduce.measure_all_reduces` would give if the truth were as above."""
    generator = np.random.default_rng(0)
    points = [
        {
            "algorithm": algorithm,
            "workers": workers,
            "length": length,
            "seconds": [
                terms(algorithm, workers, length, cores)
                @ costs
                * np.exp(noise * generator.standard_normal())
            ],
        }
        for algorithm, costs in TRUTH.items()
        for workers in all_reduce.WORKERS
        for length in all_reduce.LENGTHS
        if algorithm != "ring" or length >= workers
    ]
    return {"machine": {"CPU": "imagined"}, "cores": cores, "points": points}


def of(algorithm, found):
    return [point for point in found["points"] if point["algorithm"] == algorithm]


@pytest.mark.parametrize(
    ("algorithm", "workers", "microseconds"),
    [
        # log2(p) (2 + 1)
        ("recursive doubling", 1, 0),
        ("recursive doubling", 2, 3),
        ("recursive doubling", 4, 6),
        ("recursive doubling", 1024, 30),
        # 2 (p - 1) 2 + 2 (p - 1) / p
        ("ring", 1, 0),
        ("ring", 2, 5),
        ("ring", 4, 13.5),
        ("ring", 1024, 4093.998046875),
        # 2 log2(p) (2 + 1)
        ("tree", 1, 0),
        ("tree", 2, 6),
        ("tree", 4, 12),
        ("tree", 1024, 60),
    ],
)
def test_with_a_core_each_the_formulas_are_those_of_the_paper(algorithm, workers, microseconds):
    # A latency of 2 µs, and 1 µs for the 1,000 bytes.
    time = terms(algorithm, workers, 125) @ Costs(2e-6, 1e-9)
    assert 1e6 * time == pytest.approx(microseconds)


@pytest.mark.parametrize(
    ("algorithm", "latencies", "wake_ups", "payloads"),
    [
        ("recursive doubling", 3 * 4, 3 * 4, 3 * 4),  # 8 workers take 4 turns on 2 cores
        ("ring", 14 * 4, 14 * 4, 14 * 4 / 8),
        ("tree", 2 * (4 + 2 + 1), 2 * (4 + 2), 2 * (4 + 2 + 1)),  # the last 2 have a core each
    ],
)
def test_eight_workers_on_two_cores_take_turns(algorithm, latencies, wake_ups, payloads):
    paid = Costs(*terms(algorithm, 8, 100, cores=2))
    assert paid == Costs(latencies, payloads * 800, 0, wake_ups)


def test_a_message_above_the_limit_has_a_handshake():
    assert Costs(*terms("recursive doubling", 4, 512)).handshake == 0
    assert Costs(*terms("recursive doubling", 4, 513)).handshake == 2
    assert Costs(*terms("ring", 4, 4 * 512)).handshake == 0  # each message is a quarter
    assert Costs(*terms("ring", 4, 4 * 513)).handshake == 6


def test_the_fastest_algorithm_is_taken():
    costs = network(1e-6, 1e-9)
    assert network_costs.seconds(costs, 64, 1) == pytest.approx(6e-6 + 6 * 8e-9)  # doubling
    megabytes = 10**8
    assert network_costs.seconds(costs, 64, megabytes // 8) == pytest.approx(
        126e-6 + 126 / 64 * megabytes * 1e-9
    )  # the ring


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fit_finds_the_costs_that_made_the_times(algorithm):
    found = fit(of(algorithm, measurements()), 2)
    assert found == pytest.approx(TRUTH[algorithm], rel=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fit_finds_them_among_noise(algorithm):
    found = fit(of(algorithm, measurements(noise=0.05)), 2)
    assert found == pytest.approx(TRUTH[algorithm], rel=0.2)


def test_a_fit_gives_no_negative_costs():
    points = of("ring", measurements())
    for point in points:  # the longer the payload, the less time
        costs = Costs(1e-5, -1e-12)
        point["seconds"] = [terms("ring", point["workers"], point["length"], 2) @ costs]
    found = fit(points, 2)
    assert found.byte == 0
    assert min(found) >= 0
    assert found.latency == pytest.approx(1e-5, rel=0.1)


def test_a_disturbed_round_does_not_count():
    found = measurements()
    for number, point in enumerate(found["points"]):
        point["seconds"].insert(number % 2, 9 * point["seconds"][0])
    assert fit(of("tree", found), 2) == pytest.approx(TRUTH["tree"], rel=1e-6)


def test_the_fit_does_not_see_the_point_that_is_held_out():
    found = measurements()
    held_out = [p for p in found["points"] if (p["workers"], p["length"]) == scaling.HELD_OUT]
    assert len(held_out) == len(ALGORITHMS)
    for point in held_out:
        point["seconds"] = [2 * point["seconds"][0]]
    for algorithm, one in scaling.fitted(found).items():
        assert one.costs == pytest.approx(TRUTH[algorithm], rel=1e-6)
        assert cost_model.error(one.costs, one.held_out, 2) == pytest.approx(-0.5)
        # Of the 10 points with 8 workers it is the only one that the others do not predict.
        assert sorted(one.errors_of_most)[-2:] == pytest.approx([0, 0.5], abs=1e-6)


def test_resnet_50_has_53_layers_and_its_channels():
    assert len(CHANNELS) == 53
    assert sum(CHANNELS) == 26560  # a quarter of its 106,240 weights and statistics


@pytest.mark.parametrize(
    ("workers", "group", "collectives"),
    [(2, None, 106), (1024, None, 106), (64, 8, 159), (8, 8, 106), (8, 32, 106)],
)
def test_groups_make_a_third_collective_unless_they_are_everybody(workers, group, collectives):
    assert added(network(0, 0), CHANNELS, workers, group, call=1.0) == collectives


def test_layers_send_2c_plus_1_numbers_forward_and_2c_backward():
    a_second_per_byte = network(0, 1.0)
    numbers = 4 * sum(CHANNELS) + 53
    assert added(a_second_per_byte, CHANNELS, 2, None, 0.0) == pytest.approx(8 * numbers)
    # In groups of 2, and once more forward over 4, where a ring sends 1.5 payloads.
    moving = 1.5 * (2 * sum(CHANNELS) + 53)
    assert added(a_second_per_byte, CHANNELS, 4, 2, 0.0) == pytest.approx(8 * (numbers + moving))


def test_groups_save_time_beyond_the_square_of_their_size():
    only_latency = network(1e-6, 0)

    def saved(workers):
        return added(only_latency, [64], workers, None, 0.0) - added(
            only_latency, [64], workers, 8, 0.0
        )

    assert saved(32) < 0
    assert saved(64) == pytest.approx(0, abs=1e-12)
    assert saved(128) > 0


def test_other_numbers_of_workers_and_algorithms_are_errors():
    with pytest.raises(ValueError, match=r"power of two\. Received: 6"):
        steps("ring", 6)
    with pytest.raises(ValueError, match=r"algorithm must be one of .* Received: 'star'"):
        steps("star", 4)


def test_the_command_gives_tables_and_a_picture(tmp_path):
    (tmp_path / "known.json").write_text(json.dumps(measurements()))
    options = ["--measurements", str(tmp_path / "known.json"), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.studies.scaling", *options, "--call", "10"]
    finished = processes.run([("scaling", command, {})], hide=False)
    assert finished.code == 0, finished.output
    assert "- CPU: imagined" in finished.output
    assert "| ring | 0.70 | 2.00 | 3.50 | 5.6 | 0%, at most 0% |" in finished.output
    milliseconds = 1e3 * added(TRUTH, CHANNELS, 2, None, 1e-5)
    assert f"| this machine, a core for each worker | {milliseconds:.1f} |" in finished.output
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_job_measures_every_length():
    code = (
        "from benchmarks.studies import all_reduce\n"
        f"all_reduce.LIMIT = {patience.limit()}\n"
        "print(all_reduce.run('ring', 2))"
    )
    finished = processes.python(code)
    assert finished.code == 0, finished.output
    times = json.loads(finished.output[finished.output.index("[") :].splitlines()[0])
    assert len(times) == len(all_reduce.LENGTHS)
    assert min(times) > 0


def test_a_job_that_takes_too_long_is_ended_and_is_an_error():
    finished = processes.run([("python", processes.program("all_reduce_too_late"), {})])
    assert finished.code == 0, finished.output
    assert "no end within 0.1 s" in finished.output
