"""How the quantiser's time grows: with images, K, sub-vector length, and layer size.

Weights are drawn, inputs are photographs (8x8 pixels become 192 channels), one in each
file of a zip; one setting is varied at a time:

    cd workflow/scripts/benchmarks
    OMP_NUM_THREADS=1 taskset -c 0 python quantizer_cost.py photographs.zip cost

Writes cost.json and cost.svg. The figure gives, for each line, the power of the setting
that the time grows with between the two largest values.
"""

import argparse
import json
import math
import os
import statistics
import time

import matplotlib.pyplot as plt
from quantize_at_scale import read_images

from qcnn_py.architectures import conv_fc
from qcnn_py.artefacts import replacing, save_json
from qcnn_py.config import LayerSettings
from qcnn_py.quantization import collect_moments, quantize_from_moments

BASE = {
    "images": 200,
    "n_centroids": 64,
    "subvector_dim": 4,
    "channels": 48,
    "outputs": 256,
}
SWEEPS = {
    "images": [50, 100, 200, 400],
    "n_centroids": [16, 32, 64, 128, 256],
    "subvector_dim": [1, 2, 4, 8, 16],
    "channels": [24, 48, 96, 192],
    "outputs": [64, 128, 256, 512, 1024],
}
LABELS = {
    "images": "calibration images",
    "n_centroids": "codewords, K",
    "subvector_dim": "sub-vector length, C'",
    "channels": "input channels",
    "outputs": "output channels",
}
STEPS = {"collect_seconds": "statistics", "quantize_seconds": "quantising"}


def measured(photographs, repeats, *, images, channels, outputs, **settings):
    """Return the median seconds of both steps for a 3x3 convolution."""
    network = conv_fc((channels, 28, 28), [outputs], [], 2, pool_after=[])
    settings = LayerSettings(
        positions_per_image=64, calibration_images=images, **settings
    )
    inputs = photographs[:images, :channels]
    times = {step: [] for step in STEPS}
    for _ in range(repeats):
        start = time.perf_counter()
        moments = collect_moments(network, network, "conv1", inputs, settings)
        collected = time.perf_counter()
        quantize_from_moments(network, "conv1", moments, settings)
        times["collect_seconds"].append(collected - start)
        times["quantize_seconds"].append(time.perf_counter() - collected)
    return {step: statistics.median(values) for step, values in times.items()}


def exponent(points, setting, step):
    """Return the slope between the last two points, both axes logarithmic."""
    first, last = points[-2:]
    return math.log(last[step] / first[step]) / math.log(last[setting] / first[setting])


def draw(sweeps, path):
    """Write the figure as SVG, one panel for each setting."""
    plt.rcParams["svg.hashsalt"] = "qcnn"
    figure, panels = plt.subplots(
        1, len(sweeps), figsize=(15, 3.2), sharey=True, layout="constrained"
    )
    for panel, (setting, points) in zip(panels, sweeps.items(), strict=True):
        for (step, words), marker in zip(STEPS.items(), "os", strict=True):
            panel.loglog(
                [point[setting] for point in points],
                [point[step] for point in points],
                marker=marker,
                label=f"{words}, power {exponent(points, setting, step):.2f}",
            )
        values = [point[setting] for point in points]
        panel.set_xticks(values, values)
        panel.minorticks_off()
        panel.set_xlabel(LABELS[setting])
        panel.legend(fontsize="small")
    panels[0].set_ylabel("seconds")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", help="zip of photographs")
    parser.add_argument("output", help="name of both files, without ending")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    # (n, 3, 224, 224) to (n, 192, 28, 28): the pixels of a block become channels.
    count = max(SWEEPS["images"])
    crops = read_images(arguments.images, count, 224)
    blocks = crops.reshape(len(crops), 3, 28, 8, 28, 8).transpose(0, 1, 3, 5, 2, 4)
    photographs = blocks.reshape(len(crops), 192, 28, 28)

    sweeps = {}
    for setting, values in SWEEPS.items():
        sweeps[setting] = []
        for value in values:
            settings = {**BASE, setting: value}
            times = measured(photographs, arguments.repeats, **settings)
            sweeps[setting].append({**settings, **times})
            print(json.dumps(sweeps[setting][-1]), flush=True)
    report = {
        "cores": len(os.sched_getaffinity(0)),
        "repeats": arguments.repeats,
        "weights": "drawn",
        "sweeps": sweeps,
    }
    save_json(f"{arguments.output}.json", report)
    draw(sweeps, f"{arguments.output}.svg")


if __name__ == "__main__":
    main()
