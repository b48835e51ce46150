"""Train a network on the data set, or read a trained one that fits it."""

from pydantic import TypeAdapter

from qcnn_py.artefacts import save_json
from qcnn_py.config import NetworkConfig
from qcnn_py.datasets import Dataset
from qcnn_py.training import prepare_network
from qcnn_py.workflow import checkpoint_of, reporting

with reporting(snakemake.log[0]), checkpoint_of(snakemake) as checkpoint:
    network, history = prepare_network(
        TypeAdapter(NetworkConfig).validate_python(snakemake.params.config),
        Dataset.load(snakemake.input.dataset),
        snakemake.params.seed,
        checkpoint,
    )
    network.save(snakemake.output.network)
    save_json(snakemake.output.history, history)
