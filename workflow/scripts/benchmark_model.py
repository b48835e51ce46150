"""Time a quantised network against its decoded weights and other engines."""

import logging

from qcnn_py.artefacts import save_json
from qcnn_py.benchmarking import N_IMAGES, benchmark, format_table
from qcnn_py.datasets import Dataset
from qcnn_py.network import Network
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    images = None
    if snakemake.input.dataset:
        dataset = Dataset.load(snakemake.input.dataset[0])
        images = next(dataset.batches("test", N_IMAGES))
    result = benchmark(
        Network.load(snakemake.input.model),
        **snakemake.params.config,
        seed=snakemake.params.seed,
        images=images,
    )
    logging.info("speed test\n%s", format_table(result))
    save_json(snakemake.output.benchmark, result)
