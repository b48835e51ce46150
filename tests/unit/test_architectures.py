"""Networks with drawn parameters."""

from typing import Any

import numpy as np
import pytest

from qcnn_py.architectures import conv_fc, drawn_network
from qcnn_py.config import ActivationsConfig, LayerSettings, QuantizeConfig, SpeedConfig
from qcnn_py.errors import ConfigError
from qcnn_py.network import Network


def test_conv_fc_geometry() -> None:
    network = conv_fc(
        (3, 9, 8), (4, 5, 6), (11, 7), 3, kernel_size=5, pool_after=[1, 3]
    )
    assert [node.name for node in network.nodes] == [
        *("conv1", "conv1_relu", "pool1", "conv2", "conv2_relu"),
        *("conv3", "conv3_relu", "pool3", "flatten"),
        *("fc1", "fc1_relu", "fc1_dropout", "fc2", "fc2_relu", "fc2_dropout"),
        *("fc3", "prob"),
    ]
    assert network.shapes["conv2"] == (5, 4, 4)
    assert network.shapes["flatten"] == (6 * 2 * 2,)
    assert network.shapes["prob"] == (3,)
    assert network.conv_layers == ["conv1", "conv2", "conv3"]
    assert network.fc_layers == ["fc1", "fc2", "fc3"]


def test_conv_fc_pools_after_every_convolution_by_default() -> None:
    network = conv_fc((1, 8, 8), (2, 3), (), 10, metadata={"class_names": ["a"]})
    assert network.shapes["flatten"] == (3 * 2 * 2,)
    assert network.metadata == {"class_names": ["a"]}


@pytest.mark.parametrize(
    ("activations", "after_conv1", "after_fc1"),
    [
        ({"scheme": "none"}, ["conv1_relu"], ["fc1_relu"]),
        ({"scheme": "sign"}, ["conv1_sign"], ["fc1_sign"]),
        (
            {"scheme": "log2", "bits": 3, "range": "given", "high": 2},
            ["conv1_relu", "conv1_quantized"],
            ["fc1_relu", "fc1_quantized"],
        ),
        ({"scheme": "sign", "exclude": ["conv2"]}, ["conv1_relu"], ["fc1_sign"]),
        ({"scheme": "sign", "layers": ["conv2"]}, ["conv1_sign"], ["fc1_relu"]),
    ],
)
def test_conv_fc_with_normalisation_and_quantised_activations(
    activations: dict[str, Any], after_conv1: list[str], after_fc1: list[str]
) -> None:
    network = conv_fc(
        (1, 8, 8),
        (4, 5),
        (6,),
        3,
        dropout=0.0,
        batch_norm=True,
        activations=ActivationsConfig.from_mapping(activations),
    )
    names = [node.name for node in network.nodes]
    assert names[:3] == ["conv1", "pool1", "conv1_norm"]
    assert names[3 : names.index("conv2")] == after_conv1
    assert names[names.index("fc1") : -3] == ["fc1", "fc1_norm", *after_fc1]
    assert names[-3:] == ["fc2", "fc2_norm", "prob"]
    assert not any(node.attributes.get("bias") for node in network.nodes)


def test_conv_fc_refuses_unknown_layers_in_activations() -> None:
    activations = ActivationsConfig(scheme="sign", exclude=("conv9",))
    with pytest.raises(ConfigError, match=r"activations\.exclude: got 'conv9'"):
        conv_fc((1, 8, 8), (4,), (6,), 3, activations=activations)


def test_conv_fc_parameters_are_drawn_from_the_seed() -> None:
    def parameters(seed: int) -> dict[str, Any]:
        return dict(conv_fc((3, 8, 8), (64,), (500,), 10, seed=seed).tensors)

    first, again, other = parameters(0), parameters(0), parameters(1)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        if name.endswith(".bias"):
            assert not array.any()
        else:
            assert not np.array_equal(array, other[name])
            # He initialisation; the draws are many enough for 10 %.
            spread = array.std() * np.sqrt(array[0].size / 2)
            assert spread == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, "kernel_size is 4, expected an odd number"),
        ({"pool_after": [3]}, r"pool_after is \[3\], expected .* 1 to 2"),
        ({"input_shape": (1, 3, 8)}, "2 poolings halve an image of 3 x 8 to nothing"),
    ],
    ids=["kernel", "pool", "size"],
)
def test_impossible_conv_fc_is_refused(changes: dict[str, Any], message: str) -> None:
    options = {"input_shape": (1, 8, 8), "conv_channels": (2, 3), "fc_features": ()}
    with pytest.raises(ConfigError, match=message):
        conv_fc(n_classes=10, **{**options, **changes})


def drawn(config: SpeedConfig) -> Network:
    settings = {
        name: plan.settings
        for name, plan in config.quantize.plan(config.layers).items()
    }
    return drawn_network(config.published_name, settings, config.seed)


def drawn_alexnet(config: QuantizeConfig, seed: int = 0) -> Network:
    return drawn(SpeedConfig(quantize=config, seed=seed))


def test_drawn_alexnet_has_the_published_cost() -> None:
    network = drawn_alexnet(QuantizeConfig(preset="paper-alexnet"))
    layers = network.layers
    assert [(layer.name, layer.kind) for layer in layers] == [
        layer[:2] for layer in SpeedConfig().layers
    ]
    assert network.input_shape == (3, 227, 227)
    assert network.shapes["pool5"] == (256, 6, 6)
    # Wu et al. 2016: 4.15x fewer operations, computed as 724.4 M against 174.3 M.
    dense = sum(layer.dense_operations for layer in layers)
    quantized = sum(layer.operations for layer in layers)
    assert dense == pytest.approx(724.4e6, rel=1e-4)
    assert quantized == pytest.approx(174.3e6, rel=1e-3)
    assert network.metadata["origin"]["parameters"] == "drawn"


def test_drawn_alexnet_follows_its_settings() -> None:
    config = QuantizeConfig.from_mapping(
        {
            "n_centroids": 16,
            "layers": {
                "conv1": {"dense": True},
                "conv2": {"codebook_groups": "per_group", "subvector_dim": 7},
                "conv3": {"codebook_groups": 3},
                "fc6": {"dense": True},
                "fc8": {"n_centroids": 300},
            },
        }
    )
    tensors = drawn_alexnet(config).tensors
    assert tensors["conv1.weight"].shape == (96, 3, 11, 11)
    # 48 channels in 7 subspaces of 7 dimensions: one is padding.
    assert tensors["conv2.codebooks"].shape == (2, 7, 16, 7)
    assert not tensors["conv2.codebooks"][:, -1, :, -1].any()
    assert tensors["conv2.codebooks"][:, -1, :, -2].all()
    assert tensors["conv3.codebooks"].shape[0] == 3
    assert tensors["conv3.codes"].shape == (384, 3, 3, 64)
    assert tensors["conv3.codes"].max() == 15
    assert tensors["fc8.codes"].dtype == np.uint16


def test_drawn_alexnet_repeats_and_needs_all_settings() -> None:
    small = QuantizeConfig(n_centroids=2, subvector_dim=64)
    first, again = drawn_alexnet(small, 1).tensors, drawn_alexnet(small, 1).tensors
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    with pytest.raises(ConfigError, match="expected conv2 among them"):
        drawn_network("AlexNet", {"conv1": LayerSettings()})


# Operation counts, in billions and as a ratio, and what enters the classifier.
# Published: 4.15x for AlexNet, 4.14x for CaffeNet, 5.78x for CNN-S, 4.06x for VGG-16;
# the last two networks have other numbers of classes than CaffeNet.
COSTS = {
    "alexnet": (0.7244, 4.156, (256, 6, 6)),
    "caffenet": (0.7244, 4.156, (256, 6, 6)),
    "vgg-cnn-s": (2.9277, 5.786, (512, 6, 6)),
    "vgg-16": (15.4703, 4.059, (512, 7, 7)),
    "caffenet-fgb": (0.7224, 4.192, (256, 6, 6)),
    "caffenet-fgd": (0.7211, 4.217, (256, 6, 6)),
}


@pytest.mark.parametrize(("name", "cost"), COSTS.items(), ids=COSTS)
def test_drawn_networks_have_the_published_cost(
    name: str, cost: tuple[float, float, tuple[int, ...]]
) -> None:
    network = drawn(SpeedConfig.from_mapping({"architecture": name}))
    dense = sum(layer.dense_operations for layer in network.layers)
    quantized = sum(layer.operations for layer in network.layers)
    expected_dense, expected_ratio, pooled = cost
    assert dense == pytest.approx(expected_dense * 1e9, rel=1e-3)
    assert dense / quantized == pytest.approx(expected_ratio, rel=1e-3)
    assert network.shapes["pool5"] == pooled
    assert all(layer.quantized for layer in network.layers)
