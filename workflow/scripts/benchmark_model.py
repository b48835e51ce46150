"""Time a quantised network against its decoded weights."""

import logging

from qcnn_py.artefacts import save_json
from qcnn_py.benchmarking import benchmark, format_table
from qcnn_py.network import Network
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    result = benchmark(
        Network.load(snakemake.input.model),
        **snakemake.params.config,
        seed=snakemake.params.seed,
    )
    logging.info("speed test\n%s", format_table(result))
    save_json(snakemake.output.benchmark, result)
