# report.json and report.html of each run, and index.html of all.


rule report_pipeline:
    input:
        evaluations=evaluations,
        finetuning=finetuning_histories,
        distillation=distillation_histories,
        layers=all_quantized_layers,
        timings=timings,
        dataset=f"{RUN}/replicates/0/dataset.safetensors",
        network=f"{RUN}/replicates/0/network.qcnn",
        model=f"{RUN}/model.qcnn",
        benchmark=rules.benchmark_model.output.benchmark,
    output:
        json=f"{RUN}/report.json",
        html=f"{RUN}/report.html",
    log:
        f"{RUN}/logs/report_pipeline.log",
    wildcard_constraints:
        run=one_of(runs_of_kind("pipeline")),
    conda:
        "../envs/qcnn.yaml"
    params:
        config=run_settings,
        adaptations=adaptations,
        code=code_of("report_pipeline"),
    message:
        "{wildcards.run}: report"
    script:
        "../scripts/report_pipeline.py"


rule report_speed:
    input:
        timings=[
            f"{RUN}/timings/draw_network.tsv",
            f"{RUN}/timings/benchmark_model.tsv",
        ],
        model=f"{RUN}/model.qcnn",
        benchmark=rules.benchmark_model.output.benchmark,
    output:
        json=f"{RUN}/report.json",
        html=f"{RUN}/report.html",
    log:
        f"{RUN}/logs/report_speed.log",
    wildcard_constraints:
        run=one_of(runs_of_kind("speed")),
    conda:
        "../envs/qcnn.yaml"
    params:
        config=run_settings,
        adaptations=adaptations,
        code=code_of("report_speed"),
    message:
        "{wildcards.run}: report"
    script:
        "../scripts/report_speed.py"


rule report_index:
    input:
        reports=all_reports(),
    output:
        html=f"{CONFIG.results}/index.html",
    log:
        f"{CONFIG.results}/index.log",
    conda:
        "../envs/qcnn.yaml"
    params:
        code=code_of("report_index"),
    message:
        "all runs side by side"
    script:
        "../scripts/report_index.py"
