"""Putting quantisers of activations into networks."""

from typing import Any

import numpy as np
import pytest
from random_networks import NetworkBuilder, Quantized

from qcnn_py import Network, Node, activations, quantize
from qcnn_py.activation_quantization import quantize_activations
from qcnn_py.config import ActivationsConfig, LayerSettings
from qcnn_py.errors import ConfigError, DatasetError, QcnnError
from qcnn_py.quantization import collect_moments

LINEAR: dict[str, Any] = {"scheme": "linear", "bits": 8, "percentile": 100}


def chain() -> Network:
    builder = NetworkBuilder((3, 8, 8))
    builder.conv(6, 3, padding=1, name="conv1")
    builder.add("relu", name="relu1")
    builder.conv(6, 3, padding=1, name="conv2")
    builder.add("flatten", name="flat")
    builder.fc(10, name="fc1")
    builder.add("relu", name="relu2")
    builder.fc(4, name="fc2")
    builder.add("softmax", name="prob")
    return builder.build(metadata={"origin": "here"})


def images(n: int = 40) -> np.ndarray:
    return NetworkBuilder((3, 8, 8), seed=1).images(n)


def test_all_layers_but_the_first_read_quantised_values() -> None:
    network = quantize_activations(chain(), LINEAR, images())
    reads = {name: network.node(name).inputs for name in ("conv1", "conv2", "fc1")}
    assert reads == {
        "conv1": ("input",),
        "conv2": ("relu1_quantized",),
        "fc1": ("flat_quantized",),
    }
    assert network.node("fc2").inputs == ("relu2_quantized",)
    assert network.metadata == {"origin": "here"}
    assert network.output == "prob"
    trace = network.compile(precision="exact").trace(images())
    node = network.node("relu1_quantized")
    np.testing.assert_array_equal(
        trace["relu1_quantized"], activations.linear(trace["relu1"], **node.attributes)
    )
    assert len(np.unique(trace["relu1_quantized"])) > 100


def test_range_is_the_percentile() -> None:
    pictures = images()
    values = chain().compile(precision="exact").trace(pictures)["relu1"]
    for percentile in (100, 99, 90):
        settings = LINEAR | {"percentile": percentile, "bits": 4}
        node = quantize_activations(chain(), settings, pictures).node("relu1_quantized")
        ordered = np.sort(values.ravel())
        share = 1 - percentile / 100
        expected = ordered[-1 - int(share * values.size)]
        assert node.attributes == {"bits": 4, "low": 0, "high": pytest.approx(expected)}
    # All of them at once or in batches, and no more than are asked for.
    settings = LINEAR | {"percentile": 99, "calibration_images": 20}
    parts = iter([pictures[:7], pictures[7:40]])
    whole = quantize_activations(chain(), settings, pictures[:20])
    assert quantize_activations(chain(), settings, parts).nodes == whole.nodes


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_signed_values_have_two_to_the_bits_levels(bits: int) -> None:
    settings = LINEAR | {"bits": bits}
    network = quantize_activations(chain(), settings, images())
    a = network.node("flat_quantized").attributes
    low, high = np.float32(a["low"]), np.float32(a["high"])
    step = activations.LinearLevels.of(**a).step
    assert low / step == -(2 ** (bits - 1))
    assert high / step == 2 ** (bits - 1) - 1
    largest = np.abs(chain().compile("exact").trace(images())["flat"]).max()
    assert largest <= high < largest * (1 + 2.0 ** (bits - 23)) + 1e-30


def test_log2_ends_at_a_power_of_two() -> None:
    settings = {"scheme": "log2", "bits": 4, "percentile": 100}
    network = quantize_activations(chain(), settings, images())
    values = chain().compile("exact").trace(images())
    for name in ("relu1", "flat"):
        high = network.node(f"{name}_quantized").attributes["high"]
        assert high == 2.0 ** round(np.log2(np.abs(values[name]).max()))


def test_only_layers_see_quantised_values() -> None:
    builder = NetworkBuilder((4, 6, 6))
    builder.add("relu", name="shared")
    builder.conv(4, 3, "shared", padding=1, name="left")
    builder.conv(4, 1, "shared", name="right")
    builder.add("add", "left", "right", "shared")
    builder.fc(3, name="fc")
    network = builder.build()
    quantized = quantize_activations(network, LINEAR, builder.images(5))
    assert len(quantized.nodes) == len(network.nodes) + 2
    assert quantized.node("left").inputs == quantized.node("right").inputs
    assert quantized.node("left").inputs == ("shared_quantized",)
    assert quantized.node(network.node("flatten4").inputs[0]).inputs[2] == "shared"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"layers": ["conv1", "fc2"]}, ["input_quantized", "relu2_quantized"]),
        ({"exclude": ["conv2", "fc2"]}, ["flat_quantized"]),
        ({"layers": ["conv2", "fc2"], "exclude": ["fc2"]}, ["relu1_quantized"]),
        ({"scheme": "none"}, []),
    ],
)
def test_layers_are_chosen(choice: dict[str, Any], expected: list[str]) -> None:
    network = quantize_activations(chain(), LINEAR | choice, images())
    names = {node.name for node in network.nodes} - {n.name for n in chain().nodes}
    assert names == set(expected)
    assert network.compile()(images()).shape == (40, 4)


def test_dropout_sees_quantised_values() -> None:
    builder = NetworkBuilder((4,))
    builder.fc(6, name="fc1")
    builder.add("relu", name="relu")
    builder.add("dropout", rate=0.5, name="dropout")
    builder.fc(3, name="fc2")
    network = quantize_activations(builder.build(), LINEAR, builder.images(5))
    assert network.node("fc2").inputs == ("dropout",)
    assert network.node("dropout").inputs == ("relu_quantized",)


def test_given_ranges_need_no_images() -> None:
    settings = {"scheme": "linear", "bits": 2, "range": "given", "low": -1, "high": 2}
    network = quantize_activations(chain(), settings)
    assert network.node("flat_quantized").attributes == {
        "bits": 2,
        "low": -1,
        "high": 2,
    }
    sign = quantize_activations(chain(), {"scheme": "sign"})
    assert sign.node("flat_quantized").op == "sign"


def test_eight_bits_change_little_and_two_change_more() -> None:
    pictures = images()
    expected = chain().compile("exact")(pictures)

    def error(bits: int) -> float:
        network = quantize_activations(chain(), LINEAR | {"bits": bits}, pictures)
        return float(np.abs(network.compile("exact")(pictures) - expected).max())

    assert 0 < error(8) < 0.02
    assert error(2) > 4 * error(8)


@pytest.mark.parametrize(
    ("settings", "pictures", "message"),
    [
        ({"exclude": ["fc9"]}, images(), r"activations.exclude: got 'fc9'.*'fc1'"),
        ({"layers": ["relu1"]}, images(), r"activations.layers: got 'relu1'"),
        ({}, images(0), "calibration images: got none"),
        ({}, [], "calibration images: got none"),
        ({}, np.full((1, 3, 8, 8), np.nan, np.float32), "infinity or NaN"),
        ({"bits": 40}, images(), "bits: Input should be less than or equal to 16"),
        ({"bitz": 4}, images(), "bitz: unknown key; did you mean 'bits'"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: dict[str, Any], pictures: Any, message: str
) -> None:
    with pytest.raises(QcnnError, match=message):
        quantize_activations(chain(), LINEAR | settings, pictures)


def test_values_that_are_always_zero_are_refused() -> None:
    builder = NetworkBuilder((4,))
    builder.add("clip", low=0.0, high=0.0, name="dead")
    builder.fc(3)
    network = builder.build()
    with pytest.raises(DatasetError, match="value 'dead' is 0"):
        quantize_activations(network, LINEAR, builder.images(3))


def test_a_name_that_is_taken_is_refused() -> None:
    once = quantize_activations(chain(), LINEAR, images())
    extended = Network(
        [
            *chain().nodes,
            Node("relu1_quantized", "relu", ("prob",), {}),
        ],
        chain().tensors,
        (3, 8, 8),
    )
    with pytest.raises(QcnnError, match="'relu1_quantized' already"):
        quantize_activations(extended, LINEAR, images())
    # What is quantised already may be so once more.
    assert (
        "flat_quantized_quantized"
        in quantize_activations(once, LINEAR, images()).shapes
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "linear", "range": "given"}, "high: got none"),
        ({"scheme": "linear", "low": 1}, "range: got percentile, expected given"),
        (
            {"scheme": "linear", "range": "given", "low": 2, "high": 1},
            "low is 2.0 and high is 1.0",
        ),
        ({"scheme": "log2", "range": "given", "high": 3, "bits": 4}, "power of two"),
        ({"scheme": "log2", "bits": 9}, "bits: got 9, expected 2 to 8 with log2"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationsConfig.from_mapping(settings)


def test_error_correction_sees_quantised_inputs_and_float_targets() -> None:
    original, pictures = chain(), images()
    student = quantize_activations(original, LINEAR | {"bits": 2}, pictures)
    settings = {
        "n_centroids": 4,
        "subvector_dim": 2,
        "layers": {"fc2": {"dense": True}},
    }
    layer = LayerSettings(n_centroids=4, subvector_dim=2, calibration_images=40)
    moments = collect_moments(original, student, "fc1", pictures, layer)
    trace = student.compile("exact").trace(pictures)
    targets = original.compile("exact").trace(pictures)["fc1"]
    np.testing.assert_array_equal(moments.inputs, trace["flat_quantized"])
    np.testing.assert_array_equal(moments.targets, targets)
    # The whole network: quantisers stay, and the result follows the float network.
    compressed = quantize(student, pictures, settings, original=original)
    assert "flat_quantized" in compressed.shapes
    assert compressed.node("fc1").quantized
    blind = quantize(original, pictures, settings)
    with_inputs = quantize_activations(blind, LINEAR | {"bits": 2}, pictures)

    def distance(network: Network) -> float:
        got, wanted = (
            x.compile("exact").trace(pictures)["fc2"] for x in (network, original)
        )
        return float(np.linalg.norm(got - wanted))

    assert distance(compressed) < distance(with_inputs)


def test_product_quantised_networks_are_taken() -> None:
    builder = NetworkBuilder((4, 6, 6))
    builder.conv(8, 3, name="conv1", quantized=Quantized(4, 2))
    builder.add("relu", name="relu1")
    builder.fc(5, name="fc1", quantized=Quantized(4, 2))
    network = builder.build()
    quantized = quantize_activations(network, LINEAR, builder.images(10))
    assert [layer.quantized for layer in quantized.layers] == [True, True]
