"""Quantise one fine-tuned fc layer behind the layers that are already quantised."""

from qcnn_py.config import LayerSettings
from qcnn_py.datasets import Dataset
from qcnn_py.network import Network
from qcnn_py.quantization import apply_layers, quantize_layer
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    settings = LayerSettings.from_mapping(snakemake.params.settings)
    network = Network.load(snakemake.input.network)
    dataset = Dataset.load(snakemake.input.dataset)
    quantized = quantize_layer(
        network,
        apply_layers(network, snakemake.input.previous),
        snakemake.params.layer,
        dataset.calibration(settings.calibration_images, snakemake.params.seed),
        settings,
        snakemake.params.seed,
    )
    quantized.save(snakemake.output.layer)
