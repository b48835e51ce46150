"""Gather the statistics of one layer on one shard of the images."""

from qcnn_py.config import LayerSettings
from qcnn_py.datasets import Dataset
from qcnn_py.network import Network
from qcnn_py.quantization import apply_layers, collect_moments
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    settings = LayerSettings.from_mapping(snakemake.params.settings)
    images, first = Dataset.load(snakemake.input.dataset).calibration(
        settings.calibration_images,
        snakemake.params.seed,
        snakemake.params.shard,
        settings.shards,
    )
    statistics = collect_moments(
        Network.load(snakemake.input.original),
        apply_layers(Network.load(snakemake.input.network), snakemake.input.previous),
        snakemake.params.layer,
        images,
        settings,
        snakemake.params.seed,
        first,
    )
    statistics.save(snakemake.output.statistics)
