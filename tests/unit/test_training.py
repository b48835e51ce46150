"""Training: the loop, its options, and networks from files."""

import logging
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest
from random_networks import NetworkBuilder, Quantized

from qcnn_py.config import NetworkFileConfig, OptimizerConfig, TrainedNetworkConfig
from qcnn_py.dataset_config import DigitsConfig, SplitLimits
from qcnn_py.datasets import Dataset, prepare_dataset
from qcnn_py.errors import ConfigError, QcnnError
from qcnn_py.evaluation import evaluate
from qcnn_py.fitting import (
    Examples,
    LatentWeights,
    Training,
    build_optimizer,
    build_schedule,
    fit,
)
from qcnn_py.network import Network
from qcnn_py.preprocessing import Preprocessing
from qcnn_py.training import prepare_network, train_cell, train_network

NO_EXAMPLES = Examples(np.empty((0, 6), np.float32), np.empty(0, np.int64))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    limit = SplitLimits(train=500, validation=50, test=200)
    return prepare_dataset(DigitsConfig(limit=limit))


def small_config(**training: Any) -> TrainedNetworkConfig:
    options = {"epochs": 5, "batch_size": 20, "learning_rate": 1e-2, **training}
    return TrainedNetworkConfig(
        conv_channels=(8,), fc_features=(32,), dropout=0.1, training=options
    )


def blobs(n: int, seed: int, spread: float = 0.5) -> Examples:
    """Return points around three corners of a cube in six dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    noise = rng.normal(scale=spread, size=(n, 6))
    return Examples((np.eye(3, 6)[labels] + noise).astype(np.float32), labels)


def classifier(*, dropout: float = 0.0) -> Network:
    builder = NetworkBuilder((6,))
    builder.fc(5, name="hidden")
    builder.add("relu")
    builder.add("dropout", rate=dropout, name="dropout")
    builder.fc(3, name="logits")
    builder.add("softmax")
    return builder.build()


def same(a: Network, b: Network) -> bool:
    return all(np.array_equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def cross_entropy(network: Network, examples: Examples) -> float:
    """Return the mean loss, computed by NumPy."""
    t = network.tensors
    hidden = np.maximum(examples.inputs @ t["hidden.weight"].T + t["hidden.bias"], 0)
    logits = hidden @ t["logits.weight"].T + t["logits.bias"]
    right = logits[np.arange(len(logits)), examples.labels]
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - right))


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> tuple[Network, dict[str, Any]]:
    return prepare_network(small_config(), digits, seed=0)


def test_digits_are_learnt(
    digits: Dataset, trained: tuple[Network, dict[str, Any]]
) -> None:
    network, history = trained
    assert evaluate(network, digits)["top1"] > 0.8
    assert network.metadata == digits.metadata()
    assert [entry["epoch"] for entry in history["epochs"]] == [1, 2, 3, 4, 5]
    assert history["epochs"][-1]["train_loss"] < history["epochs"][0]["train_loss"] / 2
    assert 0.7 < history["epochs"][-1]["validation_accuracy"] <= 1
    assert (history["best_epoch"], history["stopped_early"]) == (5, False)


def test_the_same_seed_gives_the_same_bits(
    digits: Dataset,
    trained: tuple[Network, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "qcnn_py.fitting"):
        network, history = prepare_network(small_config(), digits, seed=0)
    assert same(network, trained[0])
    assert history == trained[1]
    # Before the first epoch, and after each.
    assert len(caplog.records) == 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [0.1] * 4),
        ({"schedule": "cosine"}, [0.05 * (1 + cos(pi * t / 4)) for t in (1, 2, 3, 4)]),
        (
            {"schedule": "step", "step_epochs": 2, "step_factor": 0.5},
            [0.1, 0.05, 0.05, 0.025],
        ),
        ({"schedule": "constant", "warmup_epochs": 2}, [0.05, 0.1, 0.1, 0.1]),
        (
            {"schedule": "cosine", "warmup_epochs": 2},
            [0.05, 0.1, 0.05, 0.0],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_schedules(options: dict[str, Any], expected: list[float]) -> None:
    config = OptimizerConfig(epochs=4, learning_rate=0.1, **options)
    schedule = build_schedule(config, n_steps=30)
    rates = [float(schedule(30 * epoch)) for epoch in (1, 2, 3, 4)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_decay_and_biases_do_not(name: str) -> None:
    config = OptimizerConfig(optimizer=name, weight_decay=0.5)
    schedule = optax.constant_schedule(0.01)
    optimizer = build_optimizer(config, schedule, config.weight_decay)
    parameters = {"fc1.weight": np.full((2, 2), 3.0), "fc1.bias": np.full(2, 3.0)}
    no_gradient = {key: np.zeros_like(array) for key, array in parameters.items()}
    updates, _ = optimizer.update(no_gradient, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["fc1.weight"], -0.01 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["fc1.bias"], 0)


def test_early_stopping_keeps_the_best_parameters() -> None:
    # Few noisy examples and a large step size: learnt by heart within few epochs.
    train, validation = blobs(12, 0, spread=1.5), blobs(200, 1, spread=1.5)
    config = OptimizerConfig(
        epochs=100, batch_size=12, learning_rate=0.1, schedule="constant", patience=3
    )
    network, history = fit(classifier(), train, validation, config, 0)
    losses = [entry["validation_loss"] for entry in history["epochs"]]
    assert history["stopped_early"]
    assert len(losses) == history["best_epoch"] + 3 < 100
    best = min([history["initial"]["validation_loss"], *losses])
    assert cross_entropy(network, validation) == pytest.approx(best, rel=1e-5)


def test_the_parameters_before_may_be_the_best() -> None:
    config = OptimizerConfig(epochs=9, learning_rate=100, optimizer="sgd", patience=1)
    network, history = fit(classifier(), blobs(20, 0), blobs(50, 1), config, 0)
    assert (history["best_epoch"], len(history["epochs"])) == (0, 1)
    assert same(network, classifier())


def test_validation_in_several_batches_is_the_mean_over_all() -> None:
    validation = blobs(2500, 1)
    config = OptimizerConfig(epochs=0)
    _, history = fit(classifier(), blobs(9, 0), validation, config, 0)
    assert history["initial"]["validation_loss"] == pytest.approx(
        cross_entropy(classifier(), validation), rel=1e-5
    )


def test_no_epochs_change_nothing() -> None:
    network, history = fit(
        classifier(), blobs(9, 0), NO_EXAMPLES, OptimizerConfig(epochs=0), 0
    )
    assert same(network, classifier())
    assert history == {
        "initial": {},
        "epochs": [],
        "best_epoch": 0,
        "stopped_early": False,
    }


def test_dropout_of_the_settings_beats_the_network() -> None:
    def trained(own: float, override: float | None) -> Network:
        config = OptimizerConfig(epochs=2, batch_size=10, dropout=override)
        network, _ = fit(classifier(dropout=own), blobs(40, 0), NO_EXAMPLES, config, 0)
        assert network.node("dropout").attributes["rate"] == own
        return network

    plain = trained(0.0, None)
    assert same(trained(0.5, 0.0), plain)
    assert not same(trained(0.5, None), plain)


def test_statistics_of_batch_normalisation_stay() -> None:
    builder = NetworkBuilder((6,))
    builder.batch_norm()
    builder.fc(3)
    network = builder.build()
    trained, _ = fit(network, blobs(30, 0), NO_EXAMPLES, OptimizerConfig(epochs=1), 0)
    for name, array in network.tensors.items():
        learnt = not name.endswith((".mean", ".variance"))
        assert np.array_equal(trained.tensors[name], array) != learnt, name


QUANTIZED: dict[str, dict[str, Any]] = {
    "float": {},
    "binary and sign": {"weights": "binary", "activations": {"scheme": "sign"}},
    "noise": {
        "weights": "binary",
        "activations": {"scheme": "sign", "noise": True},
    },
    "linear": {
        "weights": "linear",
        "weight_bits": 2,
        "activations": {"scheme": "linear", "bits": 2, "range": "given", "high": 2},
    },
    "log2": {"activations": {"scheme": "log2", "bits": 3, "range": "given", "high": 2}},
}


@pytest.fixture(scope="module", params=QUANTIZED.values(), ids=QUANTIZED)
def quantized(
    request: pytest.FixtureRequest, digits: Dataset
) -> tuple[Network, dict[str, Any]]:
    config = TrainedNetworkConfig(
        conv_channels=(8, 16),
        fc_features=(32,),
        pool_after=(2,),
        dropout=0.0,
        batch_norm=True,
        training={"epochs": 4, "batch_size": 20, "learning_rate": 1e-2},
        **request.param,
    )
    return train_network(digits, config, seed=0)


def test_quantised_networks_learn(
    digits: Dataset, quantized: tuple[Network, dict[str, Any]]
) -> None:
    network, history = quantized
    # What was trained is what the engine computes.
    accuracy = evaluate(network, digits, "exact")["top1"]
    assert accuracy > 0.6
    first, *_, last = (entry["train_loss"] for entry in history["epochs"])
    assert last < 0.8 * first
    scores = network.compile("exact")(digits.images("validation")).argmax(axis=1)
    hits = (scores == digits.labels("validation")).mean()
    # A sum at the edge of a level may round differently.
    expected = history["epochs"][-1]["validation_accuracy"]
    assert abs(hits - expected) <= 1 / len(scores) + 1e-6


def test_few_levels_are_stored_in_few_bits(digits: Dataset) -> None:
    def layers(**quantized: Any) -> tuple[Network, dict[str, int]]:
        config = TrainedNetworkConfig(
            conv_channels=(8,),
            fc_features=(64,),
            dropout=0.0,
            batch_norm=True,
            training={"epochs": 1, "batch_size": 50},
            **quantized,
        )
        network, _ = train_network(digits, config, seed=0)
        return network, {layer.name: layer.bytes for layer in network.layers}

    binary, sizes = layers(weights="binary")
    assert sizes == {"conv1": 9, "fc1": 64 * 128 // 8, "fc2": 10 * 64 // 8}
    assert all(layer.binary for layer in binary.layers)
    few, sizes = layers(weights="linear", weight_bits=2)
    # Codes and, for each input channel, four codewords in float16.
    assert sizes["fc1"] == 64 * 128 * 2 // 8 + 4 * 128 * 2
    decoded = few.decoded().tensors
    for name in ("conv1", "fc1", "fc2"):
        assert set(np.unique(decoded[f"{name}.weight"])) <= {-1, -0.5, 0, 0.5}
    many, sizes = layers(weights="linear", weight_bits=8)
    # Ten outputs share 256 codewords: float32 takes less.
    assert not {x.name: x.quantized for x in many.layers}["fc2"]
    assert sizes["fc2"] == 4 * 10 * 64
    assert sizes["fc1"] == 4 * 64 * 128


def test_normalisation_follows_the_batches() -> None:
    builder = NetworkBuilder((6,))
    norm = builder.batch_norm()
    builder.fc(3)
    network = builder.build()
    examples = blobs(4000, 0)
    config = OptimizerConfig(epochs=2, batch_size=100, learning_rate=1e-6)
    training = Training(network, config, normalize_batches=True)
    trained, _ = training.fit(network, examples, NO_EXAMPLES, 0)
    inputs = examples.inputs.astype(np.float64)
    squares = (inputs - inputs.mean(0)) ** 2
    # The running averages weigh about 19 batches of 100: four standard errors.
    for part, samples in {"mean": inputs, "variance": squares}.items():
        error = trained.tensors[f"{norm}.{part}"] - samples.mean(0)
        assert (np.abs(error) < 4 * samples.std(0) / np.sqrt(1900)).all()


def test_latent_weights_stay_in_range_and_are_not_returned() -> None:
    network = classifier()
    config = OptimizerConfig(epochs=20, batch_size=8, learning_rate=0.3)
    latent = LatentWeights(1)
    training = Training(network, config, latent=latent)
    trained, _ = training.fit(network, blobs(80, 0), NO_EXAMPLES, 0)
    assert set(np.unique(trained.tensors["hidden.weight"])) == {-1, 1}
    assert set(np.unique(trained.tensors["hidden.bias"])) - {-1, 1}
    far = {"a.weight": jnp.asarray([-3.0, 0.2, 5.0]), "a.bias": jnp.asarray([4.0])}
    kept = latent.constrained(far)
    np.testing.assert_allclose(kept["a.weight"], [-1, 0.2, 1])
    assert kept["a.bias"] == 4
    np.testing.assert_allclose(
        LatentWeights(2).constrained(far)["a.weight"], [-1, 0.2, 0.5]
    )
    np.testing.assert_allclose(
        LatentWeights(3).used({"a.weight": jnp.asarray([-0.9, 0.12, 0.6])})["a.weight"],
        [-1, 0, 0.5],
    )


def test_noise_changes_training_and_follows_the_seed() -> None:
    builder = NetworkBuilder((6,))
    builder.fc(8, name="hidden")
    builder.add("sign")
    builder.fc(3, name="logits")
    network = builder.build()
    config = OptimizerConfig(epochs=1, batch_size=8)

    def trained(noise: bool, seed: int = 0) -> Network:
        return fit(network, blobs(80, 0), NO_EXAMPLES, config, seed, noise=noise)[0]

    assert same(trained(True), trained(True))
    assert not same(trained(True), trained(False))
    assert not same(trained(True), trained(True, seed=1))


def test_replicates_of_a_cell(digits: Dataset) -> None:
    config = small_config(epochs=1)
    network, result = train_cell([digits, digits], config, seed=3)
    # Each is what it is alone, though they share what is compiled.
    for number, replicate in enumerate(result["replicates"]):
        alone, history = train_network(digits, config, 3 + number)
        assert replicate["history"] == history
        assert replicate["top1"] == evaluate(alone, digits)["top1"]
        assert "predictions" not in replicate
        assert same(alone, network) == (number == 0)


def test_inputs_are_prepared_by_batch() -> None:
    examples = blobs(40, 0)
    config = OptimizerConfig(epochs=1, batch_size=8)

    def halve(inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        assert len(inputs) <= 8
        return (inputs / 2).astype(np.float32)

    doubled = Examples(examples.inputs.astype(np.float64) * 2, examples.labels)
    expected, _ = fit(classifier(), examples, NO_EXAMPLES, config, 0)
    training = Training(classifier(), config)
    actual, _ = training.fit(classifier(), doubled, NO_EXAMPLES, 0, prepare=halve)
    assert same(actual, expected)


def test_impossible_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="patience is 2 without validation images"):
        fit(classifier(), blobs(9, 0), NO_EXAMPLES, OptimizerConfig(patience=2), 0)
    config = OptimizerConfig(optimizer="sgd", learning_rate=1e30, epochs=3)
    with pytest.raises(QcnnError, match="training diverged"):
        fit(classifier(), blobs(9, 0), NO_EXAMPLES, config, 0)


def test_a_network_from_a_file(digits: Dataset, tmp_path: Path) -> None:
    builder = NetworkBuilder((1, 8, 8))
    builder.conv(3, 3, name="conv1")
    builder.batch_norm()
    builder.fc(10)
    network = builder.build(metadata={"origin": "elsewhere"})
    path = tmp_path / "network.qcnn"
    network.save(path)
    read, history = prepare_network(NetworkFileConfig(path=str(path)), digits, 0)
    assert [node.op for node in read.nodes] == ["conv", "flatten", "fc"]
    assert read.metadata == {"origin": "elsewhere", **digits.metadata()}
    assert history["epochs"] == []
    images = digits.images("test")
    np.testing.assert_allclose(
        read.compile()(images), network.compile()(images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("softmax_last", [True, False])
def test_a_network_from_an_onnx_model(
    softmax_last: bool, digits: Dataset, tmp_path: Path
) -> None:
    builder = NetworkBuilder((1, 8, 8))
    builder.conv(3, 3, name="conv1")
    builder.batch_norm()
    builder.fc(10, name="logits")
    builder.add("reshape", shape=[10, 1, 1])
    builder.add("softmax")
    if not softmax_last:
        builder.add("flatten")
    network = builder.build()
    path = tmp_path / "network.onnx"
    network.to_onnx(path)
    read, _ = prepare_network(NetworkFileConfig(path=str(path)), digits, 0)
    assert [layer.name for layer in read.layers] == ["conv1", "logits"]
    assert read.metadata == digits.metadata()
    images = digits.images("test")
    expected = network.compile()(images)
    np.testing.assert_allclose(read.compile()(images), expected, atol=1e-5)
    # Training starts from logits: a step of size 0 has the loss of these probabilities.
    examples = Examples(images, digits.labels("test"))
    config = OptimizerConfig(learning_rate=1e-30, epochs=1, batch_size=len(images))
    _, history = fit(read, examples, NO_EXAMPLES, config, 0)
    right = expected.reshape(-1, 10)[np.arange(len(images)), examples.labels]
    loss = history["epochs"][0]["train_loss"]
    assert loss == pytest.approx(-np.log(right).mean(), rel=1e-3)


def test_a_file_knows_how_prepared_images_were_prepared(
    digits: Dataset, tmp_path: Path
) -> None:
    builder = NetworkBuilder((1, 8, 8))
    builder.fc(10)
    own = Preprocessing("gray", resize=(8, 8)).to_json()
    path = tmp_path / "network.qcnn"
    builder.build(metadata={"preprocessing": own}).save(path)
    config = NetworkFileConfig(path=str(path))
    assert prepare_network(config, digits, 0)[0].metadata == digits.metadata()
    prepared = replace(digits, preprocessing=Preprocessing(None))
    metadata = prepare_network(config, prepared, 0)[0].metadata
    assert metadata == {**prepared.metadata(), "preprocessing": own}


@pytest.mark.parametrize(
    ("size", "outputs", "options", "metadata", "message"),
    [
        (9, 10, {}, {}, r"input shape \(1, 9, 9\), expected \(1, 8, 8\)"),
        (8, 11, {}, {}, "outputs 11, expected 10"),
        (8, 10, {}, {"class_names": ["a"] * 10}, r"class names \['a'"),
        (8, 10, {"quantized": Quantized(4, 2)}, {}, "quantised layers .'only'."),
    ],
    ids=["shape", "outputs", "classes", "quantised"],
)
def test_a_file_that_does_not_fit_is_refused(
    size: int,
    outputs: int,
    options: dict[str, Any],
    metadata: dict[str, Any],
    message: str,
    digits: Dataset,
    tmp_path: Path,
) -> None:
    builder = NetworkBuilder((1, size, size))
    builder.fc(outputs, name="only", **options)
    path = tmp_path / "network.qcnn"
    builder.build(metadata=metadata).save(path)
    with pytest.raises(ConfigError, match=message):
        prepare_network(NetworkFileConfig(path=str(path)), digits, 0)
