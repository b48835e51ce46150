"""Copy a replicate's model."""

from shutil import copyfile

from qcnn_py.artefacts import replacing
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]), replacing(snakemake.output.model) as path:
    copyfile(snakemake.input.model, path)
