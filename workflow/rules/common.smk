# Functions that the rules use. A "run" is an entry of `runs` in the configuration;
# the globals CONFIG, RUN and REPLICATE are set in the Snakefile.

import fcntl
import re
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

from snakemake.exceptions import WorkflowError

from qcnn_py.config import (
    ActivationsConfig,
    ComparisonConfig,
    NetworkFileConfig,
    SpeedConfig,
    load_config,
)
from qcnn_py.errors import QcnnError
from qcnn_py.workflow import (
    code_fingerprint,
    folder_fingerprint,
    read_layer_shapes,
)


def checked_config():
    """Return the configuration, or stop with one line per mistake in it."""
    try:
        return load_config(config)
    except QcnnError as error:
        raise WorkflowError(str(error)) from None


def check_networks():
    """Stop if a network file is unreadable or its layers cannot be as configured."""
    for run, settings in CONFIG.runs.items():
        if not isinstance(settings, ComparisonConfig):
            planned_layers(run)


def one_of(names):
    """Return the pattern that matches any of the names and nothing else."""
    return "|".join(map(re.escape, names)) or "(?!)"


def runs_of_kind(kind):
    """Return the names of the runs of a kind ("pipeline", "speed", "activations")."""
    return [name for name, run in CONFIG.runs.items() if run.kind == kind]


def final_outputs():
    """Return the files that the whole workflow is for."""
    # A comparison has no model of its own.
    models = [run for kind in ("pipeline", "speed") for run in runs_of_kind(kind)]
    return [
        *expand(f"{RUN}/model.qcnn", run=models),
        *expand(
            f"{RUN}/{{file}}", run=CONFIG.runs, file=["report.json", "report.html"]
        ),
        f"{CONFIG.results}/index.html",
    ]


def all_reports():
    """Return report.json of every run."""
    return expand(f"{RUN}/report.json", run=CONFIG.runs)


def lock_results():
    """Let one Snakemake work on the results at a time.

    The system drops this lock when the process dies, however it dies: a killed run
    can be resumed at once. Snakemake's own lock would have to be removed by hand;
    the default profile turns it off.
    """
    results = Path(CONFIG.results)
    # Held until the process ends, as long as this name exists.
    global lock_file
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock_file = (results / ".lock").open("w")
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkflowError(f"{results}: another Snakemake is working here") from None
    except OSError as error:
        raise WorkflowError(
            f"{results}: expected a folder to write to: {error.strerror}"
        ) from None


def code_of(rule):
    """Return a parameter that changes when the code behind a rule's script does.

    It stands in for Snakemake's code trigger, which sees the script alone and takes
    a new comment in it for new code; the default profile turns that off.
    """
    return code_fingerprint(
        Path(workflow.basedir) / "workflow" / "scripts" / f"{rule}.py"
    )


def settings_of(wildcards, section):
    """Return a section of a run's configuration as plain values."""
    return getattr(CONFIG.runs[wildcards.run], section).model_dump(mode="json")


def run_settings(wildcards):
    """Return the whole configuration of a run as plain values."""
    return CONFIG.runs[wildcards.run].model_dump(mode="json")


def dataset_settings(wildcards):
    """Return the settings of a run's images."""
    return settings_of(wildcards, "dataset")


def network_settings(wildcards):
    """Return the settings of a run's network."""
    return settings_of(wildcards, "network")


def activation_settings(wildcards):
    """Return the settings of quantised activations in a run."""
    return settings_of(wildcards, "activations")


def training_noise(wildcards):
    """Return whether the activations of a run get noise in fine-tuning."""
    settings = CONFIG.runs[wildcards.run]
    return settings.activations.noise or trained_activations(settings).noise


def trained_activations(settings):
    """Return how the activations of a run's network are quantised from the start."""
    if isinstance(settings.network, NetworkFileConfig):
        return ActivationsConfig()
    return settings.network.activations


def finetune_settings(wildcards):
    """Return the settings of fine-tuning in a run."""
    return settings_of(wildcards, "finetune")


def distill_settings(wildcards):
    """Return the settings of distillation in a run."""
    return settings_of(wildcards, "distill")


def benchmark_settings(wildcards):
    """Return the settings of a run's speed test."""
    return settings_of(wildcards, "benchmark")


def layer_name(wildcards):
    """Return the name of the layer of the wildcards."""
    return unquote(wildcards.layer)


def layer_plan(wildcards):
    """Return how the layer of the wildcards is quantised."""
    return planned_layers(wildcards.run)[layer_name(wildcards)]


def layer_settings(wildcards):
    """Return the settings that decide how the layer of the wildcards is quantised."""
    settings = plain_settings(layer_plan(wildcards))
    # Whatever the shards are, the layer is the same.
    return {**settings, "shards": 1}


def channel_order_settings(wildcards):
    """Return what the order of channels depends on, for layers that get another one."""
    keys = ("reorder_inputs", "subvector_dim", "codebook_groups")
    return {
        name: {key: getattr(plan.settings, key) for key in keys}
        for name, plan in planned_layers(wildcards.run).items()
        if plan.settings.reorder_inputs and not plan.settings.dense
    }


def statistics_settings(wildcards):
    """Return the settings that the statistics of the layer of the wildcards need."""
    settings = plain_settings(layer_plan(wildcards))
    keys = (
        "calibration_images",
        "shards",
        "augmented_copies",
        "flip",
        "shift",
        "positions_per_image",
    )
    return {key: settings[key] for key in keys}


def shard_number(wildcards):
    """Return the number of the shard of the wildcards."""
    return int(wildcards.shard)


def layer_shards(wildcards, kind):
    """Return the statistics of the layer of the wildcards, one file for each shard."""
    shards = range(layer_plan(wildcards).settings.shards)
    return [
        f"{REPLICATE}/statistics/{kind}/{{layer}}/{shard}.safetensors"
        for shard in shards
    ]


def conv_shards(wildcards):
    """Return the statistics of the conv layer of the wildcards."""
    return layer_shards(wildcards, "conv")


def fc_shards(wildcards):
    """Return the statistics of the fc layer of the wildcards."""
    return layer_shards(wildcards, "fc")


def all_layer_settings(wildcards):
    """Return the settings of all layers of a run's network, by name."""
    plans = planned_layers(wildcards.run)
    return {name: plain_settings(plan) for name, plan in plans.items()}


def adaptations(wildcards):
    """Return what the run's preset did to fit the layers, by name."""
    plans = planned_layers(wildcards.run)
    return {name: plan.adaptation for name, plan in plans.items() if plan.adaptation}


def run_seed(wildcards):
    """Return the seed of a run."""
    return CONFIG.runs[wildcards.run].seed


def replicate_seed(wildcards):
    """Return the seed of a replicate."""
    return run_seed(wildcards) + int(wildcards.replicate)


def dataset_files(wildcards):
    """Return the files and folders that a run's images come from."""
    return list(map(str, CONFIG.runs[wildcards.run].dataset.input_paths))


def dataset_content(wildcards):
    """Return a parameter that changes when the images in a run's folders do.

    Snakemake compares the time of a folder alone, which a changed, added or removed
    file further down leaves as it is.
    """
    return image_folders(wildcards.run)


@cache
def image_folders(run):
    """Return the fingerprints of the folders that a run's images come from."""
    paths = CONFIG.runs[run].dataset.input_paths
    return list(filter(None, map(folder_fingerprint, paths)))


def network_files(wildcards):
    """Return the file that a run's network comes from, if it comes from one."""
    network = CONFIG.runs[wildcards.run].network
    return [network.path] if isinstance(network, NetworkFileConfig) else []


def first_dataset(wildcards):
    """Return the images of a run's first replicate, if the run has images."""
    if isinstance(CONFIG.runs[wildcards.run], SpeedConfig):
        return []
    return [f"{RUN}/replicates/0/dataset.safetensors"]


def published_name(wildcards):
    """Return the name of the published network that a run times."""
    return CONFIG.runs[wildcards.run].published_name


@cache
def planned_layers(run):
    """Return how each layer of a run's network is quantised, by name and in order."""
    settings = CONFIG.runs[run]
    if isinstance(settings, SpeedConfig):
        return settings.quantize.plan(settings.layers)
    if not isinstance(settings.network, NetworkFileConfig):
        layers = settings.network.layers(settings.dataset.known_classes)
        return settings.quantize.plan(layers)
    try:
        plans = settings.quantize.plan(read_layer_shapes(settings.network.path))
    except (QcnnError, OSError, ImportError) as error:
        raise WorkflowError(f"runs.{run}: {error}") from None
    if "fc" not in (plan.kind for plan in plans.values()):
        raise WorkflowError(
            f"runs.{run}.network.path: {settings.network.path} has no fully connected "
            "layer, expected one to fine-tune"
        )
    return plans


def plain_settings(plan):
    """Return the settings of a planned layer as plain values."""
    return plan.settings.model_dump(mode="json")


def quantized_layers(run, kind):
    """Return the names of the layers of a kind that are quantised, in order."""
    return [
        name
        for name, plan in planned_layers(run).items()
        if plan.kind == kind and not plan.settings.dense
    ]


def layer_files(names, kind):
    """Return the artefacts of quantised layers of a kind."""
    folder = {"conv": "quantized", "fc": "requantized"}[kind]
    return [
        f"{REPLICATE}/{folder}/{quote(name, safe='')}.safetensors" for name in names
    ]


def quantized_conv_layers(wildcards):
    """Return the artefacts of all quantised conv layers, in order."""
    return layer_files(quantized_layers(wildcards.run, "conv"), "conv")


def requantized_fc_layers(wildcards):
    """Return the artefacts of all quantised fc layers, in order."""
    return layer_files(quantized_layers(wildcards.run, "fc"), "fc")


def previous_layers(wildcards):
    """Return the artefacts of the layers quantised before that of the wildcards."""
    names = quantized_layers(wildcards.run, wildcards.kind)
    return layer_files(names[: names.index(layer_name(wildcards))], wildcards.kind)


def float_or_finetuned(wildcards):
    """Return the network whose responses layers of the kind of the wildcards keep."""
    if wildcards.kind == "conv":
        return original_network(wildcards)
    return f"{REPLICATE}/finetuned.qcnn"


def original_network(wildcards):
    """Return the dense network whose layers are quantised."""
    name = "ordered" if channel_order_settings(wildcards) else "network"
    return f"{REPLICATE}/{name}.qcnn"


def quantizes_activations(run):
    """Return whether a run quantises the activations of a trained network."""
    return CONFIG.runs[run].activations.scheme != "none"


def network_of_layers(wildcards):
    """Return the network that quantised conv layers are put into."""
    if quantizes_activations(wildcards.run):
        return f"{REPLICATE}/activations.qcnn"
    return original_network(wildcards)


def network_to_quantize(wildcards):
    """Return the network that layers of the kind of the wildcards are put into."""
    if wildcards.kind == "conv":
        return network_of_layers(wildcards)
    return f"{REPLICATE}/finetuned.qcnn"


def network_with_activations(wildcards):
    """Return the network whose activations alone are quantised, if there is one."""
    if not quantizes_activations(wildcards.run):
        return []
    return [network_of_layers(wildcards)]


def all_replicates(wildcards, patterns):
    """Return files of all replicates of a run."""
    return expand(
        patterns,
        run=wildcards.run,
        replicate=range(CONFIG.runs[wildcards.run].replicates),
    )


def evaluations(wildcards):
    """Return the accuracies of all replicates."""
    return all_replicates(wildcards, f"{REPLICATE}/evaluation.json")


def finetuning_histories(wildcards):
    """Return the histories of fine-tuning of all replicates."""
    return all_replicates(wildcards, f"{REPLICATE}/finetuning.json")


def distillation_histories(wildcards):
    """Return the histories of distillation of all replicates."""
    return all_replicates(wildcards, f"{REPLICATE}/distillation.json")


def undistilled_model(wildcards):
    """Return the model before distillation, if that changes it."""
    if not CONFIG.runs[wildcards.run].distill.epochs:
        return []
    return [f"{REPLICATE}/assembled.qcnn"]


def all_quantized_layers(wildcards):
    """Return the artefacts of all quantised layers of all replicates."""
    layers = quantized_conv_layers(wildcards) + requantized_fc_layers(wildcards)
    return all_replicates(wildcards, layers)


def timings(wildcards):
    """Return the times of all stages of a pipeline, in the order of the stages."""

    def stages_of(kind, rule):
        for name in quantized_layers(wildcards.run, kind):
            file = quote(name, safe="")
            for shard in range(planned_layers(wildcards.run)[name].settings.shards):
                yield f"collect_statistics.{kind}.{file}.{shard}"
            yield f"{rule}.{file}"

    quantized = quantizes_activations(wildcards.run)
    stages = [
        "prepare_dataset",
        "prepare_network",
        *(["order_channels"] if channel_order_settings(wildcards) else []),
        *(["quantize_activations"] if quantized else []),
        *stages_of("conv", "quantize_conv_layer"),
        "extract_features",
        "finetune_fc",
        *stages_of("fc", "requantize_fc_layer"),
        "distill_codebooks",
        "evaluate_models",
    ]
    files = [f"{REPLICATE}/timings/{stage}.tsv" for stage in stages]
    return [
        *all_replicates(wildcards, files),
        f"{RUN}/timings/benchmark_model.tsv",
    ]


def cell_network(wildcards):
    """Return the settings of the network of the cell of the wildcards."""
    settings = CONFIG.runs[wildcards.run].network_of(wildcards.cell)
    return settings.model_dump(mode="json")


def all_datasets(wildcards):
    """Return the images of all replicates of a run."""
    return all_replicates(wildcards, f"{REPLICATE}/dataset.safetensors")


def cell_names(wildcards):
    """Return the names of the cells of a run, in order."""
    return list(CONFIG.runs[wildcards.run].cells)


def files_of_cells(wildcards, pattern):
    """Return a file of each cell of a run, in order."""
    return expand(pattern, run=wildcards.run, cell=cell_names(wildcards))


def cell_results(wildcards):
    """Return the accuracies of all cells of a run."""
    return files_of_cells(wildcards, f"{RUN}/cells/{{cell}}.json")


def cell_models(wildcards):
    """Return the first replicate's network of all cells of a run."""
    return files_of_cells(wildcards, f"{RUN}/cells/{{cell}}.qcnn")


def cell_timings(wildcards):
    """Return the times of all stages of a comparison, in the order of the stages."""
    return [
        *all_replicates(wildcards, f"{REPLICATE}/timings/prepare_dataset.tsv"),
        *files_of_cells(wildcards, f"{RUN}/timings/train_cell.{{cell}}.tsv"),
        f"{RUN}/timings/race_cells.tsv",
    ]
