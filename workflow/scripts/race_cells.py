"""Time the networks of a comparison against each other."""

from qcnn_py.artefacts import save_json
from qcnn_py.benchmarking import N_IMAGES, race
from qcnn_py.datasets import Dataset
from qcnn_py.network import Network
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    images = next(Dataset.load(snakemake.input.dataset).batches("test", N_IMAGES))
    networks = {
        cell: Network.load(path)
        for cell, path in zip(
            snakemake.params.cells, snakemake.input.networks, strict=True
        )
    }
    result = race(networks, images, **snakemake.params.config)
    save_json(snakemake.output.benchmark, result)
