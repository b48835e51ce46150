"""Measure what quantising the activations of a finished network costs.

No weight changes: each line is the network as it is, with what its layers read rounded
by one scheme. Ranges come from training images.

    python workflow/scripts/benchmarks/quantize_activations_only.py \\
      results/cifar10/model.qcnn results/cifar10/replicates/0/dataset.safetensors
"""

import argparse
from pathlib import Path

from qcnn_py.activation_quantization import quantize_activations
from qcnn_py.config import ActivationsConfig
from qcnn_py.datasets import Dataset
from qcnn_py.evaluation import evaluate
from qcnn_py.network import Network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("network", type=Path, help="a .qcnn file")
    parser.add_argument("dataset", type=Path, help="its dataset.safetensors")
    parser.add_argument(
        "schemes",
        nargs="*",
        default=["linear-8", "linear-6", "linear-4", "log2-5"],
        help="linear-BITS or log2-BITS",
    )
    parser.add_argument("--images", type=int, default=200, help="for calibration")
    parser.add_argument("--percentile", type=float, default=99.99)
    arguments = parser.parse_args()
    network = Network.load(arguments.network)
    dataset = Dataset.load(arguments.dataset)
    images, _ = dataset.calibration(arguments.images, seed=0)
    reference = evaluate(network, dataset)["top1"]
    print(f"{'float32':10} top-1 {100 * reference:.2f} %")
    for name in arguments.schemes:
        scheme, _, bits = name.partition("-")
        config = ActivationsConfig.from_mapping(
            {"scheme": scheme, "bits": bits, "percentile": arguments.percentile}
        )
        quantized = quantize_activations(network, config, images)
        top1 = evaluate(quantized, dataset)["top1"]
        change = 100 * (top1 - reference)
        print(f"{name:10} top-1 {100 * top1:.2f} %, {change:+.2f} points", flush=True)


if __name__ == "__main__":
    main()
