"""Quantise a published geometry on real images: time per layer and peak memory.

The weights are drawn, the images are photographs, one in each file of a zip:

    cd workflow/scripts/benchmarks
    OMP_NUM_THREADS=1 taskset -c 0 python quantize_at_scale.py alexnet photographs.zip

Prints a line for each layer and writes everything as JSON if --output is given.
"""

import argparse
import json
import os
import resource
import time
import zipfile

import numpy as np
from PIL import Image, ImageOps

from qcnn_py.architectures import drawn_network
from qcnn_py.artefacts import save_json
from qcnn_py.config import ARCHITECTURES, LayerSettings, QuantizeConfig, SpeedConfig
from qcnn_py.quantization import (
    KeptResponses,
    collect_moments,
    quantize_from_moments,
)


def read_images(path, limit, size):
    """Return the first images of a zip, centre crops of (n, 3, size, size)."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(
            name
            for name in archive.namelist()
            if name.lower().endswith((".jpg", ".jpeg", ".png"))
        )[:limit]
        images = np.empty((len(names), 3, size, size), np.float32)
        for image, name in zip(images, names, strict=True):
            with archive.open(name) as file:
                crop = ImageOps.fit(Image.open(file).convert("RGB"), (size, size))
            image[...] = np.asarray(crop, np.float32).transpose(2, 0, 1)
    return (images - 118) / 58


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("images", help="zip of photographs")
    parser.add_argument("--preset", default="paper-alexnet")
    parser.add_argument("--method", default="gptvq")
    parser.add_argument("--calibration-images", type=int, default=500)
    parser.add_argument("--positions-per-image", type=int, default=64)
    parser.add_argument("--kmeans-restarts", type=int, default=1)
    parser.add_argument("--layers", nargs="*", help="only these, behind dense ones")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()

    run = SpeedConfig(architecture=arguments.architecture)
    dense = {layer.name: LayerSettings(dense=True) for layer in run.layers}
    network = drawn_network(run.published_name, dense, seed=0)
    keys = ("method", "calibration_images", "positions_per_image", "kmeans_restarts")
    plans = QuantizeConfig.from_mapping(
        {
            "preset": arguments.preset,
            # It gains about 1 % in wide layers, for half of the time.
            "fc": {"relaxation_rounds": 0},
            **{key: getattr(arguments, key) for key in keys},
        }
    ).plan(run.layers)
    size = network.input_shape[1]
    images = read_images(arguments.images, arguments.calibration_images, size)

    layers, quantized = [], network
    names = arguments.layers or list(plans)
    kept = KeptResponses(network, images, arguments.calibration_images)
    for i, name in enumerate(names):
        plan = plans[name]
        start, cpu = time.perf_counter(), time.process_time()
        kept.advance(quantized, names[i:])
        moments = collect_moments(
            network, quantized, name, images, plan.settings, kept=kept
        )
        collected = time.perf_counter()
        result = quantize_from_moments(network, name, moments, plan.settings)
        layers.append(
            {
                "layer": name,
                "statistics": type(moments).__name__,
                "inputs": moments.shape[1],
                "collect_seconds": collected - start,
                "quantize_seconds": time.perf_counter() - collected,
                # Of all threads: what counts where others use the machine too.
                "cpu_seconds": time.process_time() - cpu,
                "relative_error": result.metrics.relative_error,
                "kmeans_relative_error": result.metrics.kmeans_relative_error,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
        print(json.dumps(layers[-1]), flush=True)
        quantized = quantized.with_quantized_layer(name, result.weights)
    total = sum(
        layer[key]
        for layer in layers
        for key in ("collect_seconds", "quantize_seconds")
    )
    report = {
        "arguments": vars(arguments),
        "images": len(images),
        "cores": len(os.sched_getaffinity(0)),
        "layers": layers,
        "seconds": total,
    }
    print(f"{total:.0f} s in all")
    if arguments.output:
        save_json(arguments.output, report)


if __name__ == "__main__":
    main()
