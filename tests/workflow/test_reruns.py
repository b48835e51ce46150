"""What an edit makes Snakemake do again, and what it does not."""

from collections import Counter

import pytest
from PIL import Image

REPORT = {"report_pipeline": 1, "report_index": 1}
DISTILLATION = {
    "distill_codebooks": 1,
    "evaluate_models": 1,
    "publish_model": 1,
    "benchmark_model": 1,
    **REPORT,
}
AFTER_FINETUNING = {
    "collect_statistics": 2,
    "requantize_fc_layer": 2,
    "assemble_model": 1,
    **DISTILLATION,
}
FINETUNING = {"finetune_fc": 1, **AFTER_FINETUNING}
AFTER_CONV = {"extract_features": 1, **FINETUNING}


def setting(*path, value):
    """Return an edit of one setting of the run."""

    def edit(config):
        section = config["runs"]["tiny"]
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "jobs", "layers"),
    [
        pytest.param(
            setting("dataset", "limit", "test", value=40),
            {
                "prepare_dataset": 1,
                "prepare_network": 1,
                "quantize_conv_layer": 2,
                **AFTER_CONV,
                "collect_statistics": 4,
            },
            {"conv1", "conv2", "fc1", "fc2"},
            id="data",
        ),
        pytest.param(
            setting("quantize", "layers", "conv1", "n_centroids", value=4),
            {"quantize_conv_layer": 2, **AFTER_CONV, "collect_statistics": 4},
            {"conv1", "conv2", "fc1", "fc2"},
            id="first conv layer",
        ),
        pytest.param(
            setting("quantize", "layers", "conv2", "n_centroids", value=4),
            {"quantize_conv_layer": 1, **AFTER_CONV, "collect_statistics": 3},
            {"conv2", "fc1", "fc2"},
            id="second conv layer",
        ),
        pytest.param(
            setting("quantize", "layers", "conv1", "dense", value=True),
            {"quantize_conv_layer": 1, **AFTER_CONV, "collect_statistics": 3},
            {"conv2", "fc1", "fc2"},
            id="a layer left dense",
        ),
        pytest.param(
            setting("quantize", "layers", "conv2", "reorder_inputs", value=True),
            {
                "order_channels": 1,
                "quantize_conv_layer": 2,
                **AFTER_CONV,
                "collect_statistics": 4,
            },
            {"conv1", "conv2", "fc1", "fc2"},
            id="order of channels",
        ),
        pytest.param(
            setting("activations", "scheme", value="linear"),
            {
                "quantize_activations": 1,
                "quantize_conv_layer": 2,
                **AFTER_CONV,
                "collect_statistics": 4,
            },
            {"conv1", "conv2", "fc1", "fc2"},
            id="activations",
        ),
        pytest.param(
            setting("finetune", "epochs", value=3),
            FINETUNING,
            {"fc1", "fc2"},
            id="fine-tuning",
        ),
        pytest.param(
            setting("quantize", "layers", "fc2", "n_centroids", value=4),
            {
                **AFTER_FINETUNING,
                "collect_statistics": 1,
                "requantize_fc_layer": 1,
            },
            {"fc2"},
            id="last fc layer",
        ),
        pytest.param(
            setting("quantize", "layers", "fc2", "shards", value=3),
            {
                **AFTER_FINETUNING,
                "collect_statistics": 3,
                "requantize_fc_layer": 1,
            },
            {"fc2"},
            id="shards",
        ),
        pytest.param(
            setting("quantize", "layers", "fc2", "augmented_copies", value=1),
            {
                **AFTER_FINETUNING,
                "collect_statistics": 1,
                "requantize_fc_layer": 1,
            },
            {"fc2"},
            id="augmented copies",
        ),
        pytest.param(
            setting("distill", "learning_rate", value=1e-3),
            DISTILLATION,
            set(),
            id="distillation",
        ),
        pytest.param(
            setting("distill", "epochs", value=0),
            DISTILLATION,
            set(),
            id="no distillation",
        ),
        pytest.param(
            setting("benchmark", "batches", value=3),
            {"benchmark_model": 1, **REPORT},
            set(),
            id="speed test",
        ),
        pytest.param(
            setting("report", "example_images", value=3),
            REPORT,
            set(),
            id="report",
        ),
        pytest.param(
            setting("finetune", "momentum", value=0.9), {}, set(), id="default given"
        ),
    ],
)
def test_edited_setting(workspace, edit, jobs, layers):
    workspace.edit_config(edit)
    plan = workspace.plan()
    # The report names all settings of the run.
    assert plan.jobs == Counter(jobs)
    assert plan.layers == layers


def test_comments_change_nothing(workspace):
    sources = [
        workspace.path / "config.yaml",
        workspace.path / "Snakefile",
        *workspace.path.glob("workflow/rules/*.smk"),
        *workspace.path.glob("workflow/scripts/*.py"),
        *workspace.path.glob("qcnn_py/*.py"),
    ]
    for source in sources:
        source.write_text(f"# A comment.\n{source.read_text()}\n# Another one.\n")
    assert workspace.plan().jobs == Counter()


@pytest.mark.parametrize(
    ("source", "jobs"),
    [
        ("qcnn_py/finetuning.py", {"extract_features": 1, **FINETUNING}),
        ("workflow/scripts/finetune_fc.py", FINETUNING),
        ("qcnn_py/distillation.py", DISTILLATION),
    ],
)
def test_changed_code_runs_again(workspace, source, jobs):
    path = workspace.path / source
    path.write_text(f"{path.read_text()}\nCHANGED = True\n")
    assert workspace.plan().jobs == Counter(jobs)


def test_images_in_a_folder_are_followed(workspace):
    for name in ("cat", "dog"):
        folder = workspace.path / "images" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 50 * number).save(folder / f"{number}.png")
    settings = {"source": "images", "path": "images", "test_split": "folds", "folds": 2}
    workspace.edit_config(
        lambda config: config["runs"]["tiny"].update(dataset=settings)
    )
    dataset = "results/tiny/replicates/0/dataset.safetensors"
    done = workspace.run(dataset)
    assert done.returncode == 0, done.stdout
    assert workspace.plan().jobs["prepare_dataset"] == 0
    # The time of the folder `images` itself stays.
    (workspace.path / "images" / "cat" / "0.png").unlink()
    Image.new("L", (8, 8), 99).save(workspace.path / "images" / "cat" / "4.png")
    assert workspace.plan().jobs["prepare_dataset"] == 1


def test_another_kind_of_run_is_made_anew(fresh):
    """Though the model that the run made before is still there."""

    def compare(config):
        run = config["runs"]["tiny"]
        linear = {"scheme": "linear", "bits": 2, "range": "given", "high": 2}
        config["runs"]["tiny"] = {
            "kind": "activations",
            **{key: run[key] for key in ("dataset", "network", "benchmark")},
            "cells": {"float": {}, "linear": {"activations": linear}},
        }

    workspace = fresh("another-kind")
    model = workspace.path / "results" / "tiny" / "model.qcnn"
    model.parent.mkdir(parents=True)
    model.touch()
    workspace.edit_config(compare)
    jobs = workspace.plan().jobs
    assert jobs["race_cells"] == 1
    assert "benchmark_model" not in jobs
