# Functions that the rules use. A "run" is an entry of `runs` in the configuration;
# the globals CONFIG, RUN and REPLICATE are set in the Snakefile.

import fcntl
import re
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

from snakemake.exceptions import WorkflowError

from qcnn_py.config import NetworkFileConfig, SpeedConfig, load_config
from qcnn_py.errors import QcnnError
from qcnn_py.workflow import (
    code_fingerprint,
    folder_fingerprint,
    read_layers,
)


def checked_config():
    """Return the configuration, or stop with one line per mistake in it."""
    try:
        return load_config(config)
    except QcnnError as error:
        raise WorkflowError(str(error)) from None


def check_networks():
    """Stop if a network file is unreadable or lacks a layer that a run needs."""
    for run in CONFIG.runs:
        layer_names(run)


def one_of(names):
    """Return the pattern that matches any of the names and nothing else."""
    return "|".join(map(re.escape, names)) or "(?!)"


def runs_of_kind(kind):
    """Return the names of the runs of a kind ("pipeline" or "speed")."""
    return [name for name, run in CONFIG.runs.items() if run.kind == kind]


def final_outputs():
    """Return the files that the whole workflow is for."""
    return expand(
        f"{RUN}/{{file}}",
        run=CONFIG.runs,
        file=["model.qcnn", "report.json", "report.html"],
    )


def lock_results():
    """Let one Snakemake work on the results at a time.

    The system drops this lock when the process dies, however it dies: a killed run
    can be resumed at once. Snakemake's own lock would have to be removed by hand;
    the default profile turns it off.
    """
    results = Path(CONFIG.results)
    results.mkdir(parents=True, exist_ok=True)
    # Held until the process ends, as long as this name exists.
    global lock_file
    lock_file = (results / ".lock").open("w")
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkflowError(f"{results}: another Snakemake is working here") from None


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


def finetune_settings(wildcards):
    """Return the settings of fine-tuning in a run."""
    return settings_of(wildcards, "finetune")


def benchmark_settings(wildcards):
    """Return the settings of a run's speed test."""
    return settings_of(wildcards, "benchmark")


def layer_name(wildcards):
    """Return the name of the layer of the wildcards."""
    return unquote(wildcards.layer)


def layer_settings(wildcards):
    """Return the resolved settings of the layer of the wildcards."""
    return resolved_layers(wildcards.run)[layer_name(wildcards)][1]


def all_layer_settings(wildcards):
    """Return the resolved settings of all layers of a run's network, by name."""
    layers = resolved_layers(wildcards.run)
    return {name: settings for name, (_, settings) in layers.items()}


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
def layer_names(run):
    """Return names and kinds of the conv and fc layers of a run's network."""
    settings = CONFIG.runs[run]
    if isinstance(settings, SpeedConfig):
        return settings.layer_names
    if not isinstance(settings.network, NetworkFileConfig):
        return settings.network.layer_names
    layers = file_layers(run)
    if "fc" not in (layer.kind for layer in layers):
        raise WorkflowError(
            f"runs.{run}.network.path: {settings.network.path} has no fully connected "
            "layer, expected one to fine-tune"
        )
    return [(layer.name, layer.kind) for layer in layers]


@cache
def file_layers(run):
    """Return the layers of the file that a run's network comes from."""
    settings = CONFIG.runs[run]
    try:
        layers = read_layers(settings.network.path)
        settings.quantize.check_layers(layer.name for layer in layers)
    except (QcnnError, OSError, ImportError) as error:
        raise WorkflowError(f"runs.{run}: {error}") from None
    return layers


def depthwise_layers(run):
    """Return the names of depthwise layers; only networks from files have any."""
    settings = CONFIG.runs[run]
    if isinstance(settings, SpeedConfig) or not isinstance(
        settings.network, NetworkFileConfig
    ):
        return set()
    return {layer.name for layer in file_layers(run) if layer.depthwise}


def resolved_layers(run):
    """Return kind and plain settings of each layer of a run's network, by name."""
    names = layer_names(run)
    depthwise = depthwise_layers(run)
    quantize = CONFIG.runs[run].quantize
    resolved = {}
    for name, kind in names:
        settings = quantize.resolve(
            name,
            kind,
            is_last=name == names[-1][0],
            depthwise=name in depthwise,
        )
        resolved[name] = (kind, settings.model_dump(mode="json"))
    return resolved


def quantized_layers(run, kind):
    """Return the names of the layers of a kind that are quantised, in order."""
    return [
        name
        for name, (layer_kind, settings) in resolved_layers(run).items()
        if layer_kind == kind and not settings["dense"]
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


def previous_layers(wildcards, kind):
    """Return the artefacts of the layers quantised before that of the wildcards."""
    names = quantized_layers(wildcards.run, kind)
    return layer_files(names[: names.index(layer_name(wildcards))], kind)


def previous_conv_layers(wildcards):
    """Return the artefacts of the quantised conv layers before this one."""
    return previous_layers(wildcards, "conv")


def previous_fc_layers(wildcards):
    """Return the artefacts of the quantised fc layers before this one."""
    return previous_layers(wildcards, "fc")


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


def all_quantized_layers(wildcards):
    """Return the artefacts of all quantised layers of all replicates."""
    layers = quantized_conv_layers(wildcards) + requantized_fc_layers(wildcards)
    return all_replicates(wildcards, layers)


def timings(wildcards):
    """Return the times of all stages of a pipeline, in the order of the stages."""
    conv, fc = (
        [quote(name, safe="") for name in quantized_layers(wildcards.run, kind)]
        for kind in ("conv", "fc")
    )
    stages = [
        "prepare_dataset",
        "prepare_network",
        *(f"quantize_conv_layer.{name}" for name in conv),
        "extract_features",
        "finetune_fc",
        *(f"requantize_fc_layer.{name}" for name in fc),
        "evaluate_models",
    ]
    files = [f"{REPLICATE}/timings/{stage}.tsv" for stage in stages]
    return [
        *all_replicates(wildcards, files),
        f"{RUN}/timings/benchmark_model.tsv",
    ]
