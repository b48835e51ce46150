"""Measure what a process that classifies one image takes: time to load, memory.

    cd workflow/scripts/benchmarks
    taskset -c 0 python footprint.py ../../../results/alexnet-speed/model.qcnn

Each round is two new processes: one that only imports NumPy, and one that loads the
model, runs one drawn image and loads the model again, which is what loading takes where
libraries and file are warm. Prints medians, and minima behind them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

_PEAK = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"

_NUMPY = f"""
import resource, numpy
print({_PEAK})
"""

_CLASSIFY = f"""
import json, resource, sys, time
import numpy as np
import qcnn_py

def load():
    begin = time.perf_counter()
    model = qcnn_py.load(sys.argv[1], precision=sys.argv[2])
    return model, 1e3 * (time.perf_counter() - begin)

model, first = load()
images = np.random.default_rng(0).standard_normal((1, *model.input_shape[1:]))
model(images.astype(np.float32))
peak = {_PEAK}
del model
print(json.dumps({{"first_ms": first, "warm_ms": load()[1], "peak_mib": peak}}))
"""


def measure(model, precision):
    """Return the times and the memory above NumPy's of one round."""

    def run(program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout

    numpy = float(run(_NUMPY))
    found = json.loads(run(_CLASSIFY, model, precision))
    return {
        "load, first in a process, ms": found["first_ms"],
        "load again, ms": found["warm_ms"],
        "peak memory above NumPy's, MiB": found["peak_mib"] - numpy,
    }


def main():
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a .qcnn file")
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rounds = [
        measure(str(arguments.model.resolve()), arguments.precision)
        for _ in range(arguments.rounds)
    ]
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        print(f"{name}: {median(values):.1f} (minimum {min(values):.1f})")


if __name__ == "__main__":
    main()
