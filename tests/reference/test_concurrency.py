"""Models used by several threads, side by side, after a fork, and again and again."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_quantized_layers import mixed_network

PRECISIONS = ("exact", "fast", "int8")


def test_calls_from_sixteen_threads_agree(isa):
    network, builder = mixed_network()
    model = network.compile(precision="exact", isa=isa, threads=2)
    # Different batches, so that one thread's scratch must not serve another.
    batches = [builder.images(1 + i % 5) for i in range(64)]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(16) as pool:
        outputs = list(pool.map(model, batches))
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output, wanted)


def test_models_side_by_side_agree():
    network, builder = mixed_network()
    images = builder.images(3)
    models = [network.compile(precision=PRECISIONS[i % 3]) for i in range(48)]
    expected = [model(images) for model in models[:3]]
    with ThreadPoolExecutor(16) as pool:
        outputs = list(pool.map(lambda model: model(images), models))
    for i, output in enumerate(outputs):
        np.testing.assert_array_equal(output, expected[i % 3])


# In processes of their own: this one has too much in it to be forked or measured.
FORK = """
import os
import sys

import numpy as np

import qcnn_py

model = qcnn_py.load(sys.argv[1], threads=2)
images = np.ones((2, *model.input_shape[1:]), np.float32)
expected = model(images)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(model(images), expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

CYCLES = """
import sys
from pathlib import Path

import numpy as np

import qcnn_py

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])

def cycle():
    model = qcnn_py.load(sys.argv[1])
    model(images)

images = np.ones((1, *qcnn_py.load(sys.argv[1]).input_shape[1:]), np.float32)
for _ in range(1000):
    cycle()
before = resident()
for _ in range(9000):
    cycle()
print(resident() - before)
"""


def in_a_process(script, path):
    return subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout


@pytest.fixture
def model_file(tmp_path):
    network, _ = mixed_network()
    path = tmp_path / "model.qcnn"
    network.save(path)
    return path


def test_child_of_a_fork_computes_the_same(model_file):
    in_a_process(FORK, model_file)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)
def test_ten_thousand_models_leave_nothing(model_file):
    assert int(in_a_process(CYCLES, model_file)) < 1 << 20
