# Fully connected layers, trained on after the convolutions are quantised.


rule extract_features:
    input:
        dataset=rules.prepare_dataset.output.dataset,
        network=network_of_layers,
        layers=quantized_conv_layers,
    output:
        features=f"{REPLICATE}/features.safetensors",
    log:
        f"{RUN}/logs/{{replicate}}/extract_features.log",
    benchmark:
        f"{REPLICATE}/timings/extract_features.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        code=code_of("extract_features"),
    message:
        "{wildcards.run}/{wildcards.replicate}: features of the quantised convolutions"
    script:
        "../scripts/extract_features.py"


rule finetune_fc:
    input:
        network=network_of_layers,
        layers=quantized_conv_layers,
        features=rules.extract_features.output.features,
    output:
        network=f"{REPLICATE}/finetuned.qcnn",
        history=f"{REPLICATE}/finetuning.json",
    log:
        f"{RUN}/logs/{{replicate}}/finetune_fc.log",
    benchmark:
        f"{REPLICATE}/timings/finetune_fc.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        config=finetune_settings,
        noise=training_noise,
        seed=replicate_seed,
        code=code_of("finetune_fc"),
    message:
        "{wildcards.run}/{wildcards.replicate}: fine-tuning the fully connected layers"
    script:
        "../scripts/finetune_fc.py"
