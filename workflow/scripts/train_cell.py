"""Train a network of a comparison once per replicate and measure its accuracy."""

from qcnn_py.artefacts import save_json
from qcnn_py.config import TrainedNetworkConfig
from qcnn_py.datasets import Dataset
from qcnn_py.training import train_cell
from qcnn_py.workflow import checkpoint_of, reporting

with reporting(snakemake.log[0]), checkpoint_of(snakemake) as checkpoint:
    network, result = train_cell(
        [Dataset.load(path) for path in snakemake.input.datasets],
        TrainedNetworkConfig.from_mapping(snakemake.params.config),
        snakemake.params.seed,
        checkpoint,
    )
    network.save(snakemake.output.network)
    save_json(snakemake.output.result, result)
