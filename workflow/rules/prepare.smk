# Images and networks.


rule prepare_dataset:
    input:
        files=dataset_files,
    output:
        dataset=f"{REPLICATE}/dataset.safetensors",
    log:
        f"{RUN}/logs/{{replicate}}/prepare_dataset.log",
    benchmark:
        f"{REPLICATE}/timings/prepare_dataset.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        config=dataset_settings,
        content=dataset_content,
        seed=run_seed,
        code=code_of("prepare_dataset"),
    message:
        "{wildcards.run}/{wildcards.replicate}: reading and splitting the images"
    script:
        "../scripts/prepare_dataset.py"


rule prepare_network:
    input:
        files=network_files,
        dataset=rules.prepare_dataset.output.dataset,
    output:
        network=f"{REPLICATE}/network.qcnn",
        history=f"{REPLICATE}/training.json",
    log:
        f"{RUN}/logs/{{replicate}}/prepare_network.log",
    benchmark:
        f"{REPLICATE}/timings/prepare_network.tsv"
    conda:
        "../envs/qcnn.yaml"
    params:
        config=network_settings,
        seed=replicate_seed,
        code=code_of("prepare_network"),
    message:
        "{wildcards.run}/{wildcards.replicate}: preparing the network"
    script:
        "../scripts/prepare_network.py"


rule draw_network:
    output:
        model=f"{RUN}/model.qcnn",
    log:
        f"{RUN}/logs/draw_network.log",
    benchmark:
        f"{RUN}/timings/draw_network.tsv"
    wildcard_constraints:
        run=one_of(runs_of_kind("speed")),
    conda:
        "../envs/qcnn.yaml"
    params:
        architecture=published_name,
        layers=all_layer_settings,
        seed=run_seed,
        code=code_of("draw_network"),
    message:
        "{wildcards.run}: drawing a network"
    script:
        "../scripts/draw_network.py"
