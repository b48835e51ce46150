from snakemake.utils import min_version

min_version("9.1")


configfile: "config.yaml"


include: "workflow/rules/common.smk"


CONFIG = checked_config()
check_networks()

RUN = f"{CONFIG.results}/{{run}}"
REPLICATE = f"{RUN}/replicates/{{replicate}}"


wildcard_constraints:
    run=one_of(CONFIG.runs),
    replicate=r"\d+",
    layer=r"[^/]+",
    shard=r"\d+",
    cell=r"[^/]+",
    kind="conv|fc",


include: "workflow/rules/prepare.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/compare.smk"
include: "workflow/rules/report.smk"


onstart:
    lock_results()


rule all:
    default_target: True
    input:
        final_outputs(),
