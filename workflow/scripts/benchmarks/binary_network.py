"""Time the convolutional network of BinaryNet against its decoded dense form.

The geometry is the one that the authors trained on CIFAR-10; weights are drawn, but for
time that does not matter. Other engines take part where they are named:

    cd workflow/scripts/benchmarks
    OMP_NUM_THREADS=1 taskset -c 0 python binary_network.py --peers onnxruntime-int8

Prints the table of the speed test and the kernels, writes all as JSON with --output.
"""

import argparse

import numpy as np

from qcnn_py import Network, Node
from qcnn_py.artefacts import save_json
from qcnn_py.benchmarking import benchmark, format_table
from qcnn_py.contenders import PEERS

# Outputs of each layer, and whether maxima of 2 x 2 follow.
CONVOLUTIONS = [(128, 0), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1)]
FULLY_CONNECTED = [1024, 1024, 10]


def drawn_network(seed):
    """Return the network for images of 3 x 32 x 32, with binary weights."""
    random = np.random.default_rng(seed)
    nodes, tensors = [], {}

    def add(name, op, **attributes):
        inputs = (nodes[-1].name if nodes else "input",)
        nodes.append(Node(name, op, inputs, attributes))

    def add_layer(name, op, outputs, shape, **attributes):
        add(name, op, bias=False, weights={"type": "binary"}, **attributes)
        tensors[f"{name}.signs"] = random.choice(np.int8([-1, 1]), (outputs, *shape))

    def add_norm(name, outputs):
        add(name, "batch_norm", epsilon=1e-4)
        for part in ("scale", "bias", "mean"):
            numbers = random.standard_normal(outputs).astype(np.float32)
            tensors[f"{name}.{part}"] = numbers
        tensors[f"{name}.variance"] = np.full(outputs, 100, np.float32)

    channels, extent = 3, 32
    for number, (outputs, pool) in enumerate(CONVOLUTIONS, 1):
        add_layer(
            f"conv{number}",
            "conv",
            outputs,
            (channels, 3, 3),
            out_channels=outputs,
            kernel=[3, 3],
            stride=[1, 1],
            padding=[1, 1, 1, 1],
            dilation=[1, 1],
            groups=1,
        )
        if pool:
            add(
                f"pool{number}",
                "max_pool",
                kernel=[2, 2],
                stride=[2, 2],
                padding=[0, 0, 0, 0],
                ceil_mode=False,
            )
            extent //= 2
        add_norm(f"norm{number}", outputs)
        add(f"sign{number}", "sign")
        channels = outputs
    add("flat", "flatten")
    features = channels * extent**2
    for number, outputs in enumerate(FULLY_CONNECTED, 1):
        add_layer(f"fc{number}", "fc", outputs, (features,), out_features=outputs)
        add_norm(f"fc_norm{number}", outputs)
        if number < len(FULLY_CONNECTED):
            add(f"fc_sign{number}", "sign")
        features = outputs
    return Network(nodes, tensors, (3, 32, 32))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--isa", help="instruction-set level")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    result = benchmark(
        drawn_network(seed=0),
        repeats=arguments.repeats,
        batches=arguments.batches,
        precisions=["exact"],
        isa=arguments.isa,
        peers=arguments.peers,
    )
    print(format_table(result))
    for layer in result["layers"]:
        print(layer["name"], layer["dense_kernel"], layer["kernel"])
    if arguments.output:
        save_json(arguments.output, result)


if __name__ == "__main__":
    main()
