"""Whole runs: what comes out, and that it comes out the same."""

import fcntl
import json
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest

import qcnn_py
from qcnn_py.network import Network
from qcnn_py.quantization import QuantizedLayer


def test_end_to_end(finished):
    results = finished.path / "results" / "tiny"
    model = qcnn_py.load(results / "model.qcnn")
    assert [layer["quantized"] for layer in model.layers] == [True] * 4
    assert model(np.zeros((2, 1, 8, 8), np.float32)).shape == (2, 10)
    report = json.loads((results / "report.json").read_text())
    assert report["run"] == "tiny"
    assert "<html" in (results / "report.html").read_text()
    assert 'href="tiny/report.html"' in (results.parent / "index.html").read_text()


@pytest.mark.long
def test_quantised_activations_are_in_every_stage(workspace):
    activations = {"scheme": "linear", "bits": 4, "noise": True}
    workspace.edit_config(
        lambda config: config["runs"]["tiny"].update(activations=activations)
    )
    done = workspace.run()
    assert done.returncode == 0, done.stdout
    results = workspace.path / "results" / "tiny"
    report = json.loads((results / "report.json").read_text())
    stages = [stage["name"] for stage in report["accuracy"]["stages"]]
    assert stages[:3] == ["original", "activations_quantized", "conv_quantized"]
    names = ["pool1_quantized", "flatten_quantized", "fc1_relu_quantized"]
    for file in ("activations.qcnn", "finetuned.qcnn", "model.qcnn"):
        network = qcnn_py.Network.load(workspace.replicate / file)
        ops = {node.name for node in network.nodes if node.op == "quantize_linear"}
        assert ops == set(names), file


def test_networks_are_compared(workspace):
    run = {
        "kind": "activations",
        "replicates": 2,
        "dataset": {"source": "digits", "limit": {"train": 200, "test": 50}},
        "network": {
            "source": "train",
            "conv_channels": [4],
            "fc_features": [8],
            "batch_norm": True,
            "training": {"epochs": 1, "batch_size": 20},
        },
        # In alphabetical order, as they are written.
        "cells": {
            "a-float": {},
            "bits": {"weights": "binary", "activations": {"scheme": "sign"}},
        },
        "benchmark": {"repeats": 1, "batches": 2, "warmup": 1},
    }
    workspace.edit_config(lambda config: config["runs"].update(bits=run))
    done = workspace.run()
    assert done.returncode == 0, done.stdout
    results = workspace.path / "results" / "bits"
    cells = json.loads((results / "report.json").read_text())["cells"]
    assert [len(cell["top1"]["values"]) for cell in cells] == [2, 2]
    assert cells[1]["weight_bytes"] < cells[0]["weight_bytes"] / 20
    assert not (results / "model.qcnn").exists()


def test_second_run_does_nothing(workspace):
    done = workspace.run()
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def start(workspace):
    return subprocess.Popen(
        workspace.command("results/tiny/model.qcnn"),
        cwd=workspace.path,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(path, process):
    """Wait for the log of a stage, which it opens before it does anything."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"snakemake has not written {path}"
        assert process.poll() is None, f"snakemake ended before {path}"
        time.sleep(0.005)


def kill_everything(process):
    os.killpg(process.pid, signal.SIGKILL)


def kill_stage(process):
    (stage,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("python")
    )
    stage.kill()


def test_killed_run_resumes_to_the_same_bytes(workspace, finished):
    results = workspace.path / "results" / "tiny"
    kept = {"dataset.safetensors", "network.qcnn", "training.json", "conv1.safetensors"}
    for path in results.rglob("*"):
        if path.is_file() and path.name not in kept and path.suffix != ".tsv":
            path.unlink()

    for kill, output, job in (
        (kill_everything, "quantized/conv2.safetensors", "quantize_conv_layer.conv2"),
        (kill_stage, "finetuned.qcnn", "finetune_fc"),
    ):
        process = start(workspace)
        wait_for(results / "logs" / "0" / f"{job}.log", process)
        kill(process)
        assert process.wait() != 0
        assert not (workspace.replicate / output).exists()

    done = workspace.run()
    assert done.returncode == 0, done.stdout
    assert workspace.artefacts() == finished.artefacts()


def test_shards_give_the_same_layers(workspace, finished):
    workspace.edit_config(
        lambda config: config["runs"]["tiny"]["quantize"].update(shards=3)
    )
    layers = ["quantized/conv1", "quantized/conv2", "requantized/fc1"]
    for layer in layers:
        path = workspace.replicate / f"{layer}.safetensors"
        path.unlink()
    replicate = workspace.replicate.relative_to(workspace.path)
    done = workspace.run(str(replicate / "requantized" / "fc1.safetensors"))
    assert done.returncode == 0, done.stdout
    assert not list((workspace.replicate / "statistics").rglob("*.safetensors"))
    for layer in layers:
        one, three = (
            QuantizedLayer.load(each.replicate / f"{layer}.safetensors")
            for each in (finished, workspace)
        )
        assert one.metrics.samples == three.metrics.samples
        np.testing.assert_array_equal(one.weights.codes, three.weights.codes)
        # Sums in another order; the stored float16 may be the next one.
        np.testing.assert_allclose(
            one.weights.codebooks, three.weights.codebooks, rtol=2**-10, atol=1e-6
        )


def test_channels_are_ordered(workspace):
    settings = {"reorder_inputs": True, "subvector_dim": 2}
    workspace.edit_config(
        lambda config: config["runs"]["tiny"]["quantize"].update(
            layers={"conv2": settings}
        )
    )
    replicate = workspace.replicate.relative_to(workspace.path)
    done = workspace.run(str(replicate / "ordered.qcnn"))
    assert done.returncode == 0, done.stdout
    original, ordered = (
        Network.load(workspace.replicate / f"{name}.qcnn")
        for name in ("network", "ordered")
    )
    weights = [each.tensors["conv2.weight"] for each in (original, ordered)]
    assert not np.array_equal(*weights)
    np.testing.assert_array_equal(*[np.sort(weight, axis=1) for weight in weights])


def test_two_runs_at_once_are_refused(workspace):
    (workspace.path / "results" / "tiny" / "report.html").unlink()
    with (workspace.path / "results" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = workspace.run()
    assert done.returncode == 1
    assert "results: another Snakemake is working here" in done.stdout


def test_failed_stage_says_why_in_one_line(workspace):
    np.savez(workspace.path / "images.npz", images=np.zeros((3, 2)), labels=[0, 1, 0])
    workspace.edit_config(
        lambda config: config["runs"]["tiny"].update(
            dataset={"source": "npz", "path": "images.npz"}
        )
    )
    done = workspace.run()
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "images.npz" in lines[0]
    assert "Traceback" not in done.stdout
    log = workspace.path / "results" / "tiny" / "logs" / "0" / "prepare_dataset.log"
    assert lines[0].removeprefix("error: ") in log.read_text()
