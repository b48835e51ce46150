"""Train codebooks and biases to give back the original network's outputs."""

from qcnn_py.artefacts import save_json
from qcnn_py.config import DistillConfig
from qcnn_py.datasets import Dataset
from qcnn_py.distillation import distill_codebooks
from qcnn_py.network import Network
from qcnn_py.workflow import checkpoint_of, reporting

with reporting(snakemake.log[0]), checkpoint_of(snakemake) as checkpoint:
    config = DistillConfig.from_mapping(snakemake.params.config)
    images, _ = Dataset.load(snakemake.input.dataset).calibration(
        config.images, snakemake.params.seed
    )
    distilled, history = distill_codebooks(
        Network.load(snakemake.input.original),
        Network.load(snakemake.input.quantized),
        images,
        config,
        snakemake.params.seed,
        checkpoint,
    )
    distilled.save(snakemake.output.model)
    save_json(snakemake.output.history, history)
