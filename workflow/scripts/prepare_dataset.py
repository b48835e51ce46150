"""Read the images of a data set, split them and write the splits."""

from pydantic import TypeAdapter

from qcnn_py.dataset_config import DatasetConfig
from qcnn_py.datasets import prepare_dataset
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    dataset = prepare_dataset(
        TypeAdapter(DatasetConfig).validate_python(snakemake.params.config),
        replicate=int(snakemake.wildcards.replicate),
        seed=snakemake.params.seed,
    )
    dataset.save(snakemake.output.dataset)
