# Accuracy and speed.


rule evaluate_models:
    input:
        dataset=rules.prepare_dataset.output.dataset,
        original=rules.prepare_network.output.network,
        activations=network_with_activations,
        layers=quantized_conv_layers,
        finetuned=rules.finetune_fc.output.network,
        requantized=undistilled_model,
        final=rules.distill_codebooks.output.model,
    output:
        evaluation=f"{REPLICATE}/evaluation.json",
    log:
        f"{RUN}/logs/{{replicate}}/evaluate_models.log",
    benchmark:
        f"{REPLICATE}/timings/evaluate_models.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        code=code_of("evaluate_models"),
    message:
        "{wildcards.run}/{wildcards.replicate}: accuracy after each stage"
    script:
        "../scripts/evaluate_models.py"


rule benchmark_model:
    input:
        model=f"{RUN}/model.qcnn",
        dataset=first_dataset,
    output:
        benchmark=f"{RUN}/benchmark.json",
    log:
        f"{RUN}/logs/benchmark_model.log",
    benchmark:
        f"{RUN}/timings/benchmark_model.tsv"
    # A run of another kind may have left its model behind.
    wildcard_constraints:
        run=one_of(runs_of_kind("pipeline") + runs_of_kind("speed")),
    conda:
        "../envs/qcnn.yaml"
    # All cores: nothing else may run while times are taken.
    threads: workflow.cores
    params:
        config=benchmark_settings,
        seed=run_seed,
        code=code_of("benchmark_model"),
    message:
        "{wildcards.run}: speed test"
    script:
        "../scripts/benchmark_model.py"
