"""Write the report of a run that compares quantised networks."""

from pathlib import Path

from qcnn_py.report import build_comparison_report
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    build_comparison_report(
        run=snakemake.wildcards.run,
        config=snakemake.params.config,
        command=f"snakemake --cores 1 {snakemake.output.html}",
        files=[
            *snakemake.input.networks,
            snakemake.output.json,
            snakemake.input.benchmark,
            Path(snakemake.log[0]).parent,
        ],
        results=snakemake.input.results,
        networks=snakemake.input.networks,
        timings=snakemake.input.timings,
        dataset=snakemake.input.dataset,
        benchmark=snakemake.input.benchmark,
        schema=Path(snakemake.scriptdir).parent / "schemas" / "report.schema.json",
        json_path=snakemake.output.json,
        html_path=snakemake.output.html,
    )
