"""Fine-tuning the fully connected layers behind a quantised conv part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_networks import NetworkBuilder, Quantized

from qcnn_py.artefacts import save_arrays
from qcnn_py.config import OptimizerConfig
from qcnn_py.dataset_config import DigitsConfig, SplitLimits
from qcnn_py.datasets import Dataset, prepare_dataset
from qcnn_py.errors import ConfigError, ModelFormatError, ShapeError
from qcnn_py.evaluation import evaluate
from qcnn_py.finetuning import Features, extract_features, finetune_fc
from qcnn_py.fitting import Examples
from qcnn_py.network import Network

CONFIG = OptimizerConfig(epochs=5, batch_size=10, learning_rate=5e-3, patience=3)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    limit = SplitLimits(train=310, validation=60, test=200)
    return prepare_dataset(DigitsConfig(limit=limit))


def quantized_conv(**conv_options: Any) -> Network:
    """Return a network with a quantised convolution and untrained dense layers."""
    builder = NetworkBuilder((1, 8, 8))
    builder.conv(16, 3, padding=1, name="conv1", quantized=Quantized(16, 1))
    builder.add("relu")
    builder.pool("max_pool", 2, stride=2)
    builder.add("flatten", name="features")
    builder.add("dropout", rate=0.2)
    builder.fc(32, name="fc1")
    builder.add("relu")
    builder.fc(10, name="fc2")
    builder.add("softmax", name="prob")
    return builder.build(**conv_options)


@pytest.fixture(scope="module")
def features(digits: Dataset) -> Features:
    return extract_features(quantized_conv(), digits)


@pytest.fixture(scope="module")
def tuned(features: Features) -> tuple[Network, dict[str, Any]]:
    network = quantized_conv(metadata={"origin": "here"})
    return finetune_fc(network, features, CONFIG, seed=0)


def test_features_are_what_the_engine_computes(
    digits: Dataset, features: Features
) -> None:
    trace = quantized_conv().compile(precision="exact").trace(digits.images("train"))
    assert features.value == "features"
    assert features.train.inputs.shape == (310, 256)
    np.testing.assert_array_equal(features.train.inputs, trace["features"])
    np.testing.assert_array_equal(features.train.labels, digits.labels("train"))
    assert features.validation.inputs.shape == (60, 256)


def test_only_the_fully_connected_layers_learn(
    digits: Dataset, tuned: tuple[Network, dict[str, Any]]
) -> None:
    before, (after, history) = quantized_conv(), tuned
    assert evaluate(after, digits)["top1"] > 0.75 > evaluate(before, digits)["top1"]
    for name, array in before.tensors.items():
        frozen = name.startswith("conv1.")
        assert np.array_equal(after.tensors[name], array) == frozen, name
    assert after.nodes == before.nodes
    assert after.metadata == {"origin": "here"}
    assert history["best_epoch"] > 0


def test_the_seed_decides(
    features: Features, tuned: tuple[Network, dict[str, Any]]
) -> None:
    again, other = (
        finetune_fc(quantized_conv(), features, CONFIG, seed)[0] for seed in (0, 1)
    )
    for name, array in tuned[0].tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array)
    assert not np.array_equal(again.tensors["fc1.weight"], other.tensors["fc1.weight"])


def test_save_and_load(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    features.save(path)
    loaded = Features.load(path)
    assert loaded.value == features.value
    np.testing.assert_array_equal(loaded.train.inputs, features.train.inputs)
    np.testing.assert_array_equal(loaded.validation.labels, features.validation.labels)
    save_arrays(path, {}, {"value": "features"})
    with pytest.raises(
        ModelFormatError, match=r"expected features, lacks 'train\.inputs'"
    ):
        Features.load(path)


def test_features_of_another_network_are_refused(features: Features) -> None:
    builder = NetworkBuilder((1, 8, 8))
    builder.fc(10)
    with pytest.raises(ShapeError, match=r"'features'.*expected 'flatten0'.*\(64,\)"):
        finetune_fc(builder.build(), features, CONFIG, seed=0)


def test_a_network_without_fully_connected_layers_is_refused(digits: Dataset) -> None:
    builder = NetworkBuilder((1, 8, 8))
    builder.conv(10, 8)
    builder.add("softmax")
    with pytest.raises(ConfigError, match="no fully connected layer"):
        extract_features(builder.build(), digits)


def test_quantised_fully_connected_layers_are_refused() -> None:
    builder = NetworkBuilder((1, 2, 2))
    builder.fc(3, name="fc1", quantized=Quantized(4, 2))
    examples = Examples(np.zeros((2, 4), np.float32), np.zeros(2, np.int64))
    with pytest.raises(ConfigError, match="'fc1' is product-quantised"):
        finetune_fc(
            builder.build(),
            Features("flatten0", examples, examples),
            CONFIG,
            seed=0,
        )
