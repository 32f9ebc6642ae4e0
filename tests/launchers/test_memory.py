"""What is kept between the forward and the backward pass: the inputs, and channel vectors."""

import json

from tests import processes

# The process's size shows what TensorFlow allocates if every tensor is mapped by itself.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "TF_ENABLE_ONEDNN_OPTS": "0"}


def test_a_layer_holds_its_input_and_no_more():
    finished = processes.run(
        [("python", processes.program("prints_held_memory"), ENVIRONMENT)], takes=20
    )
    assert finished.code == 0, finished.output
    (line,) = (one for one in finished.output.splitlines() if one.strip().startswith("held"))
    found = json.loads(line.strip().removeprefix("held"))
    assert len(found) == 12
    # The first layer's input was there before; the last one's output counts instead.
    for case, times in found.items():
        assert 0.9 < times < 1.2, (case, times)
