# The order of channels and the activations first, if they are to change. Then one job
# per layer, behind jobs that gather the statistics of its inputs and responses on a
# shard of the images each. A layer sees the responses of the layers quantised before it,
# so the jobs of a kind form a chain.


rule order_channels:
    input:
        network=rules.prepare_network.output.network,
    output:
        network=f"{REPLICATE}/ordered.qcnn",
    log:
        f"{RUN}/logs/{{replicate}}/order_channels.log",
    benchmark:
        f"{REPLICATE}/timings/order_channels.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        settings=channel_order_settings,
        code=code_of("order_channels"),
    message:
        "{wildcards.run}/{wildcards.replicate}: ordering channels"
    script:
        "../scripts/order_channels.py"


rule quantize_activations:
    input:
        dataset=rules.prepare_dataset.output.dataset,
        network=original_network,
    output:
        network=f"{REPLICATE}/activations.qcnn",
    log:
        f"{RUN}/logs/{{replicate}}/quantize_activations.log",
    benchmark:
        f"{REPLICATE}/timings/quantize_activations.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        config=activation_settings,
        seed=replicate_seed,
        code=code_of("quantize_activations"),
    message:
        "{wildcards.run}/{wildcards.replicate}: rounding activations"
    script:
        "../scripts/quantize_activations.py"


rule collect_statistics:
    input:
        dataset=rules.prepare_dataset.output.dataset,
        original=float_or_finetuned,
        network=network_to_quantize,
        previous=previous_layers,
    output:
        statistics=temp(
            f"{REPLICATE}/statistics/{{kind}}/{{layer}}/{{shard}}.safetensors"
        ),
    log:
        f"{RUN}/logs/{{replicate}}/collect_statistics.{{kind}}.{{layer}}.{{shard}}.log",
    benchmark:
        f"{REPLICATE}/timings/collect_statistics.{{kind}}.{{layer}}.{{shard}}.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        layer=layer_name,
        shard=shard_number,
        settings=statistics_settings,
        seed=replicate_seed,
        code=code_of("collect_statistics"),
    message:
        "{wildcards.run}/{wildcards.replicate}: statistics of {params.layer}, shard {params.shard}"
    script:
        "../scripts/collect_statistics.py"


rule quantize_conv_layer:
    input:
        network=original_network,
        statistics=conv_shards,
    output:
        layer=f"{REPLICATE}/quantized/{{layer}}.safetensors",
    log:
        f"{RUN}/logs/{{replicate}}/quantize_conv_layer.{{layer}}.log",
    benchmark:
        f"{REPLICATE}/timings/quantize_conv_layer.{{layer}}.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        layer=layer_name,
        settings=layer_settings,
        seed=replicate_seed,
        code=code_of("quantize_conv_layer"),
    message:
        "{wildcards.run}/{wildcards.replicate}: quantising {params.layer}"
    script:
        "../scripts/quantize_conv_layer.py"


rule requantize_fc_layer:
    input:
        network=f"{REPLICATE}/finetuned.qcnn",
        statistics=fc_shards,
    output:
        layer=f"{REPLICATE}/requantized/{{layer}}.safetensors",
    log:
        f"{RUN}/logs/{{replicate}}/requantize_fc_layer.{{layer}}.log",
    benchmark:
        f"{REPLICATE}/timings/requantize_fc_layer.{{layer}}.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        layer=layer_name,
        settings=layer_settings,
        seed=replicate_seed,
        code=code_of("requantize_fc_layer"),
    message:
        "{wildcards.run}/{wildcards.replicate}: quantising {params.layer}"
    script:
        "../scripts/requantize_fc_layer.py"


rule assemble_model:
    input:
        network=f"{REPLICATE}/finetuned.qcnn",
        layers=requantized_fc_layers,
    output:
        network=f"{REPLICATE}/assembled.qcnn",
    log:
        f"{RUN}/logs/{{replicate}}/assemble_model.log",
    conda:
        "../envs/qcnn.yaml"
    params:
        code=code_of("assemble_model"),
    message:
        "{wildcards.run}/{wildcards.replicate}: assembling the quantised network"
    script:
        "../scripts/assemble_model.py"


rule distill_codebooks:
    input:
        dataset=rules.prepare_dataset.output.dataset,
        original=original_network,
        quantized=rules.assemble_model.output.network,
    output:
        model=f"{REPLICATE}/model.qcnn",
        history=f"{REPLICATE}/distillation.json",
    log:
        f"{RUN}/logs/{{replicate}}/distill_codebooks.log",
    benchmark:
        f"{REPLICATE}/timings/distill_codebooks.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        config=distill_settings,
        seed=replicate_seed,
        code=code_of("distill_codebooks"),
    message:
        "{wildcards.run}/{wildcards.replicate}: training codebooks on the original's outputs"
    script:
        "../scripts/distill_codebooks.py"


rule publish_model:
    input:
        model=f"{RUN}/replicates/0/model.qcnn",
    output:
        model=f"{RUN}/model.qcnn",
    log:
        f"{RUN}/logs/publish_model.log",
    wildcard_constraints:
        run=one_of(runs_of_kind("pipeline")),
    conda:
        "../envs/qcnn.yaml"
    params:
        code=code_of("publish_model"),
    message:
        "{wildcards.run}: the first replicate's model becomes the run's"
    script:
        "../scripts/publish_model.py"
