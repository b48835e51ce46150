"""Quantise what the layers of a trained network read."""

from qcnn_py.activation_quantization import quantize_activations
from qcnn_py.config import ActivationsConfig
from qcnn_py.datasets import Dataset
from qcnn_py.network import Network
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    config = ActivationsConfig.from_mapping(snakemake.params.config)
    images, _ = Dataset.load(snakemake.input.dataset).calibration(
        config.calibration_images, snakemake.params.seed
    )
    network = Network.load(snakemake.input.network)
    quantize_activations(network, config, images).save(snakemake.output.network)
