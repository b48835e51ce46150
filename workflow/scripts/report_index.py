"""Write the page that compares all runs."""

from qcnn_py.report import build_index
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    build_index(snakemake.input.reports, snakemake.output.html)
