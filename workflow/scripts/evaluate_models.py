"""Measure the accuracy after each stage on the test images."""

from qcnn_py.artefacts import save_json
from qcnn_py.datasets import Dataset
from qcnn_py.evaluation import evaluate
from qcnn_py.network import Network
from qcnn_py.quantization import apply_layers
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    dataset = Dataset.load(snakemake.input.dataset)
    original = Network.load(snakemake.input.original)
    networks = {"original": original}
    with_activations = original
    for path in snakemake.input.activations:
        with_activations = networks["activations_quantized"] = Network.load(path)
    networks["conv_quantized"] = apply_layers(with_activations, snakemake.input.layers)
    networks["finetuned"] = Network.load(snakemake.input.finetuned)
    for path in snakemake.input.requantized:
        networks["requantized"] = Network.load(path)
    networks["final"] = Network.load(snakemake.input.final)
    results = {stage: evaluate(network, dataset) for stage, network in networks.items()}
    save_json(snakemake.output.evaluation, {"stages": results})
