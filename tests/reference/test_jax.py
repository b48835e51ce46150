"""Dense execution against JAX, a second independent judge beside ONNX Runtime."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from random_networks import NetworkBuilder, relative_error

CONVOLUTIONS: list[dict[str, Any]] = [
    {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    for stride, dilation, groups, padding in product(
        (1, 2, (3, 1)), (1, 2), (1, 2), (0, [0, 1, 2, 3])
    )
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(options: dict[str, Any], isa: str) -> None:
    builder = NetworkBuilder((4, 11, 13))
    builder.conv(6, (3, 4), name="conv", **options)
    network, images = builder.build(), builder.images(3)
    attributes = network.node("conv").attributes
    top, left, bottom, right = attributes["padding"]
    expected = lax.conv_general_dilated(
        images,
        network.tensors["conv.weight"],
        window_strides=attributes["stride"],
        padding=((top, bottom), (left, right)),
        rhs_dilation=attributes["dilation"],
        feature_group_count=attributes["groups"],
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        precision=lax.Precision.HIGHEST,
    )
    expected = expected + network.tensors["conv.bias"][:, None, None]
    output = network.compile(precision="exact", isa=isa)(images)
    assert relative_error(output, np.asarray(expected)) < 1e-5


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [1, 0, 2, 1]], ids=str)
def test_max_pool(stride: int, padding: list[int], isa: str) -> None:
    builder = NetworkBuilder((4, 11, 13))
    builder.pool("max_pool", 3, stride=stride, padding=padding)
    network, images = builder.build(), builder.images(3)
    top, left, bottom, right = padding
    expected = lax.reduce_window(
        jnp.asarray(images),
        -jnp.inf,
        lax.max,
        window_dimensions=(1, 1, 3, 3),
        window_strides=(1, 1, stride, stride),
        padding=((0, 0), (0, 0), (top, bottom), (left, right)),
    )
    output = network.compile(precision="exact", isa=isa)(images)
    np.testing.assert_array_equal(output, np.asarray(expected))


def test_classifier(isa: str) -> None:
    builder = NetworkBuilder((3, 8, 8))
    builder.fc(40, name="hidden")
    builder.add("relu")
    builder.fc(10, name="logits")
    builder.add("softmax")
    network, images = builder.build(), builder.images(17)
    t = network.tensors
    hidden = images.reshape(17, -1) @ t["hidden.weight"].T + t["hidden.bias"]
    logits = jax.nn.relu(hidden) @ t["logits.weight"].T + t["logits.bias"]
    output = network.compile(precision="exact", isa=isa)(images)
    assert relative_error(output, np.asarray(jax.nn.softmax(logits))) < 1e-5
