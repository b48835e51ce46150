"""Write the report of a run that measures speed only."""

from pathlib import Path

from qcnn_py.report import build_speed_report
from qcnn_py.workflow import reporting

with reporting(snakemake.log[0]):
    build_speed_report(
        run=snakemake.wildcards.run,
        config=snakemake.params.config,
        adaptations=snakemake.params.adaptations,
        command=f"snakemake --cores 1 {snakemake.output.html}",
        files=[
            snakemake.input.model,
            snakemake.output.json,
            snakemake.input.benchmark,
            Path(snakemake.log[0]).parent,
        ],
        timings=snakemake.input.timings,
        benchmark=snakemake.input.benchmark,
        schema=Path(snakemake.scriptdir).parent / "schemas" / "report.schema.json",
        json_path=snakemake.output.json,
        html_path=snakemake.output.html,
    )
