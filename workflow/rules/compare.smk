# Networks trained from scratch with quantised weights and activations. A job trains one
# of them, for all replicates: compiling the training takes as long as a few of them.


rule train_cell:
    input:
        datasets=all_datasets,
    output:
        network=f"{RUN}/cells/{{cell}}.qcnn",
        result=f"{RUN}/cells/{{cell}}.json",
    log:
        f"{RUN}/logs/train_cell.{{cell}}.log",
    benchmark:
        f"{RUN}/timings/train_cell.{{cell}}.tsv"
    wildcard_constraints:
        run=one_of(runs_of_kind("activations")),
    conda:
        "../envs/qcnn.yaml"
    params:
        config=cell_network,
        seed=run_seed,
        code=code_of("train_cell"),
    message:
        "{wildcards.run}: training {wildcards.cell}"
    script:
        "../scripts/train_cell.py"


rule race_cells:
    input:
        networks=cell_models,
        dataset=f"{RUN}/replicates/0/dataset.safetensors",
    output:
        benchmark=f"{RUN}/benchmark.json",
    log:
        f"{RUN}/logs/race_cells.log",
    benchmark:
        f"{RUN}/timings/race_cells.tsv"
    wildcard_constraints:
        run=one_of(runs_of_kind("activations")),
    conda:
        "../envs/qcnn.yaml"
    # All cores: nothing else may run while times are taken.
    threads: workflow.cores
    params:
        cells=cell_names,
        config=benchmark_settings,
        code=code_of("race_cells"),
    message:
        "{wildcards.run}: speed test"
    script:
        "../scripts/race_cells.py"


rule report_comparison:
    input:
        results=cell_results,
        networks=cell_models,
        timings=cell_timings,
        dataset=f"{RUN}/replicates/0/dataset.safetensors",
        benchmark=rules.race_cells.output.benchmark,
    output:
        json=f"{RUN}/report.json",
        html=f"{RUN}/report.html",
    log:
        f"{RUN}/logs/report_comparison.log",
    wildcard_constraints:
        run=one_of(runs_of_kind("activations")),
    conda:
        "../envs/qcnn.yaml"
    params:
        config=run_settings,
        code=code_of("report_comparison"),
    message:
        "{wildcards.run}: report"
    script:
        "../scripts/report_comparison.py"
