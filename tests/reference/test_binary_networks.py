"""Networks whose weights and activations are 1 and -1: bits are counted."""

import numpy as np
import pytest
from numpy_executor import execute, respond
from random_networks import Binary, NetworkBuilder

from qcnn_py import Network


def binary_network() -> tuple[Network, NetworkBuilder]:
    b = NetworkBuilder((3, 14, 12), seed=1)
    b.conv(40, 3, padding=1, quantized=Binary(), name="first")
    b.batch_norm()
    b.add("sign")
    b.conv(70, 3, padding=1, quantized=Binary(), name="pooled")
    b.pool("max_pool", 2, stride=2)
    b.batch_norm()
    b.add("sign")
    b.conv(36, 3, padding=1, groups=2, quantized=Binary(), bias=False, name="grouped")
    b.batch_norm()
    b.add("sign")
    b.pool("max_pool", 3, stride=2)
    b.add("flatten")
    b.fc(50, quantized=Binary(), bias=False, name="hidden")
    b.batch_norm()
    b.add("sign")
    b.fc(10, quantized=Binary(), name="logits")
    b.batch_norm()
    b.add("softmax", name="prob")
    return b.build(), b


COUNTING = ("pooled", "grouped", "hidden", "logits")


def test_layers_whose_inputs_are_signs_count_bits(isa: str) -> None:
    network, _ = binary_network()
    for precision in ("exact", "fast", "int8"):
        model = network.compile(precision=precision, isa=isa)
        names = {layer["name"]: layer["kernel_name"] for layer in model.layers}
        assert all(names[name].endswith("-b1-xnor") for name in COUNTING)
        assert not names["first"].endswith("-b1-xnor")


def test_each_node_agrees_with_oracle(isa: str) -> None:
    network, builder = binary_network()
    images = builder.images(5)
    model = network.compile(isa=isa)
    traced = model.trace(images)
    values = {"input": images} | traced
    for node in network.nodes:
        expected = respond(network, node, values)
        if node.name in COUNTING or node.op == "sign":
            np.testing.assert_array_equal(traced[node.name], np.float32(expected))
        else:
            np.testing.assert_allclose(traced[node.name], expected, 1e-5, 1e-4)
    # What runs folded in one go gives the same bits.
    np.testing.assert_array_equal(model(images), traced["prob"])
    np.testing.assert_array_equal(model(images[3:4]), traced["prob"][3:4])


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_non_finite_inputs(value: float, isa: str) -> None:
    network, builder = binary_network()
    images = builder.images(3)
    images[1, 2, 5, 6] = value
    traced = network.compile(isa=isa).trace(images)
    expected = execute(network, images)
    # An infinity is a sign like any other, but for sums of both.
    for name in ("first", "pooled", "grouped", "hidden", "prob"):
        np.testing.assert_array_equal(np.isnan(traced[name]), np.isnan(expected[name]))
    output = network.compile(isa=isa)(images)
    np.testing.assert_array_equal(output, traced["prob"])


def test_thresholds_at_the_edges() -> None:
    """Normalisations that never or always give 1, or change at a single product."""
    network, builder = binary_network()
    images = builder.images(4)
    name = next(node.name for node in network.nodes if node.inputs == ("grouped",))
    channels = network.shapes["grouped"][0]
    for scale, mean, bias in [
        (1, 0, 0),
        (-1, 0, 0),
        (0, 3, 0),
        (0, 3, -1),
        (1, 1e9, 0),
        (-1, 1e9, 0),
        (1e-30, 4, 0),
        (1e30, 4, -1e30),
    ]:
        changed = network.replace(
            tensors={
                f"{name}.scale": np.full(channels, scale, np.float32),
                f"{name}.mean": np.full(channels, mean, np.float32),
                f"{name}.bias": np.full(channels, bias, np.float32),
            }
        )
        model = changed.compile()
        np.testing.assert_array_equal(model(images), model.trace(images)["prob"])


def test_sign_values_are_followed_through_other_operations() -> None:
    builder = NetworkBuilder((4, 6, 6))
    first = builder.add("sign")
    builder.add("slice", start=[0, 1, 1], step=[1, 1, 1], shape=[4, 4, 4])
    builder.add("transpose", view=[4, 4, 4], axes=[0, 2, 1], shape=[4, 4, 4])
    other = builder.pool("max_pool", 3, first)
    builder.add("mul", builder.nodes[-2].name, other)
    joined = builder.add("concat", builder.last, other)
    builder.conv(5, 2, joined, quantized=Binary(), name="signs")
    # Zeros are none.
    padded = builder.add("pad", joined, before=[0, 1, 0], after=[0, 0, 0], value=0.0)
    builder.conv(5, 2, padded, quantized=Binary(), name="padded")
    builder.conv(5, 2, joined, name="dense")
    builder.add("relu", joined)
    builder.conv(5, 2, quantized=Binary(), name="zeros")
    network, images = builder.build(), builder.images(2)
    model = network.compile(precision="exact")
    kernels = {layer["name"]: layer["kernel_name"] for layer in model.layers}
    counting = {name for name, kernel in kernels.items() if "xnor" in kernel}
    assert counting == {"signs"}
    traced, expected = model.trace(images), execute(network, images)
    for name in kernels:
        np.testing.assert_allclose(traced[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "low", "high", "exact"),
    [
        (8, 0.0, 1.0, True),
        (8, -1.0, 127 / 128, True),
        (2, -0.5, 1.0, True),
        # 0 lies between two levels, outside of them; there are too many levels.
        (8, -1.0, 1.0, False),
        (8, 1.0, 2.0, False),
        (9, 0.0, 1.0, False),
    ],
)
def test_inputs_on_a_grid_of_8_bits_are_multiplied_as_they_are(
    bits: int, low: float, high: float, exact: bool
) -> None:
    builder = NetworkBuilder((3, 20, 21))
    builder.add("quantize_linear", bits=bits, low=low, high=high)
    builder.add("slice", start=[0, 1, 1], step=[1, 1, 1], shape=[3, 18, 18])
    builder.pool("max_pool", 2)
    builder.add("relu")
    builder.conv(40, 3, padding=1, quantized=Binary(), name="first")
    network, images = builder.build(), builder.images(3)
    for precision in ("exact", "fast", "int8"):
        model = network.compile(precision=precision)
        if model.isa.startswith("avx512v"):
            kernel = model.layers[0]["kernel_name"]
            assert kernel.endswith("-i8-gemm") is exact
        expected = execute(network, images)["first"]
        np.testing.assert_allclose(model(images), expected, rtol=1e-5, atol=1e-5)
        # A number that is none spoils its image only.
        spoilt = images.copy()
        spoilt[1, 0, 5, 5] = np.nan
        responses = model(spoilt)
        assert np.isnan(responses[1, :, 3:5, 3:5]).all()
        np.testing.assert_array_equal(responses[::2], model(images)[::2])


def test_file_of_a_binary_network_is_small() -> None:
    network, _ = binary_network()
    layers = {layer.name: layer for layer in network.layers}
    assert layers["pooled"].bytes == 70 * 40 * 9 // 8 + 4 * 70
    assert layers["hidden"].dense_bytes > 31 * layers["hidden"].bytes
