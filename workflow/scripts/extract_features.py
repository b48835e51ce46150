"""Compute what the quantised conv part hands to the fully connected layers."""

from qcnn_py.datasets import Dataset
from qcnn_py.finetuning import extract_features
from qcnn_py.network import Network
from qcnn_py.quantization import apply_layers
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    network = apply_layers(
        Network.load(snakemake.input.network), snakemake.input.layers
    )
    features = extract_features(network, Dataset.load(snakemake.input.dataset))
    features.save(snakemake.output.features)
