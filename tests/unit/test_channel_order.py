"""Orders of the channels between layers."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
from random_networks import NetworkBuilder

from qcnn_py import Network, quantize
from qcnn_py.channel_order import order_channels
from qcnn_py.config import LayerSettings

PAIRS = LayerSettings(
    subvector_dim=2, n_centroids=4, codebook_groups="per_group", reorder_inputs=True
)


def correlated(weight: np.ndarray, groups: int) -> None:
    """Have each input channel go with one in the other half of its group."""
    half = weight.shape[1] // 2
    for seed, part in enumerate(np.split(weight, groups)):
        partner = np.random.default_rng(seed).permutation(half)
        part[:, half:] = 0.1 * part[:, half:] + part[:, partner]


def chain(groups: int = 1, groups_before: int = 1) -> NetworkBuilder:
    builder = NetworkBuilder((4, 9, 9))
    builder.conv(24, 3, groups=groups_before, name="first")
    builder.batch_norm()
    builder.add("relu")
    builder.pool("max_pool", 2, stride=2)
    builder.conv(8, 3, groups=groups, name="second")
    builder.add("tanh")
    builder.add("global_average_pool")
    builder.add("flatten")
    builder.fc(6, name="third")
    builder.add("relu")
    builder.fc(5, name="fourth")
    return builder


def outputs(network: Network, images: np.ndarray) -> np.ndarray:
    return network.compile(precision="exact")(images)


@pytest.mark.parametrize("groups_before", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_function_stays(groups: int, groups_before: int) -> None:
    builder = chain(groups, groups_before)
    network, images = builder.build(), builder.images(5)
    layers = dict.fromkeys(["first", "second", "third", "fourth"], PAIRS)
    ordered = order_channels(network, layers)
    for name in ("second", "third", "fourth"):
        weight = f"{name}.weight"
        assert not np.array_equal(ordered.tensors[weight], network.tensors[weight])
    np.testing.assert_allclose(
        outputs(ordered, images), outputs(network, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_what_varies_together_comes_together(groups: int) -> None:
    builder = chain(groups)
    correlated(builder.tensors["second.weight"], groups)
    ordered = order_channels(builder.build(), {"second": PAIRS})
    for part in np.split(ordered.tensors["second.weight"], groups):
        vectors = part.swapaxes(0, 1).reshape(part.shape[1], -1)
        neighbours = np.corrcoef(vectors)[::2, 1::2].diagonal()
        assert (np.abs(neighbours) > 0.9).all()


def test_the_error_falls() -> None:
    builder = chain()
    correlated(builder.tensors["second.weight"], 1)
    network, images = builder.build(), builder.images(200)
    config = {
        "subvector_dim": 2,
        "n_centroids": 8,
        "layers": {name: {"dense": True} for name in ("first", "third", "fourth")},
    }
    errors = [
        np.linalg.norm(
            outputs(
                quantize(network, images, config | {"reorder_inputs": chosen}), images
            )
            - outputs(network, images)
        )
        for chosen in (False, True)
    ]
    assert errors[1] < 0.7 * errors[0]


def read_twice(builder: NetworkBuilder) -> None:
    source = builder.conv(8, 1, name="source")
    layer = builder.conv(8, 1, name="layer")
    builder.add("add", source, layer)


def behind_norm_over_channels(builder: NetworkBuilder) -> None:
    builder.conv(8, 1, name="source")
    builder.add("lrn", size=5, alpha=1e-4, beta=0.75, bias=1.0)
    builder.conv(8, 1, name="layer")


def flattened_maps(builder: NetworkBuilder) -> None:
    builder.conv(8, 1, name="source")
    builder.fc(8, name="layer")


def behind_a_sum(builder: NetworkBuilder) -> None:
    source = builder.conv(8, 1, name="source")
    builder.add("add", source, builder.conv(8, 1, "input", name="other"))
    builder.conv(8, 1, name="layer")


def first_layer(builder: NetworkBuilder) -> None:
    builder.conv(8, 1, name="layer")


def shared_by_groups(builder: NetworkBuilder) -> None:
    builder.conv(8, 1, name="source")
    builder.conv(8, 1, groups=2, name="layer")


@pytest.mark.parametrize(
    "build",
    [
        read_twice,
        behind_norm_over_channels,
        flattened_maps,
        behind_a_sum,
        first_layer,
        shared_by_groups,
    ],
)
def test_channels_that_have_to_stay(
    build: Callable[[NetworkBuilder], None], caplog: pytest.LogCaptureFixture
) -> None:
    builder = NetworkBuilder((8, 4, 4))
    build(builder)
    network = builder.build()
    shared = PAIRS.model_copy(update={"codebook_groups": "shared"})
    with caplog.at_level(logging.INFO, "qcnn_py"):
        ordered = order_channels(network, {"layer": shared})
    assert "layer: its input channels stay in their order" in caplog.text
    for name, tensor in network.tensors.items():
        np.testing.assert_array_equal(ordered.tensors[name], tensor)


def test_only_where_asked_for() -> None:
    network = chain().build()
    settings = PAIRS.model_copy(update={"reorder_inputs": False})
    dense = PAIRS.model_copy(update={"dense": True})
    ordered = order_channels(network, {"second": settings, "third": dense})
    assert ordered is network
