"""Quantise one conv layer from the statistics of all shards."""

from qcnn_py.config import LayerSettings
from qcnn_py.network import Network
from qcnn_py.quantization import quantize_from_moments
from qcnn_py.statistics import load_merged
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    quantized = quantize_from_moments(
        Network.load(snakemake.input.network),
        snakemake.params.layer,
        load_merged(snakemake.input.statistics),
        LayerSettings.from_mapping(snakemake.params.settings),
        snakemake.params.seed,
    )
    quantized.save(snakemake.output.layer)
