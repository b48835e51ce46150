"""Layers and images that say little or too much: quantised right, or refused."""

import numpy as np
import pytest
from random_networks import NetworkBuilder

from qcnn_py import ConfigError, Network, quantize

METHODS = ["kmeans", "bcd", "gptvq"]
SETTINGS = {"n_centroids": 8, "subvector_dim": 4, "kmeans_restarts": 1}

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.filterwarnings("error"),
]


def make_network(kernel: int = 3) -> Network:
    builder = NetworkBuilder((2, 9, 8))
    builder.conv(6, 3, padding=1, name="first")
    builder.add("relu")
    builder.conv(12, kernel, name="second")
    builder.add("relu")
    builder.pool("max_pool", 3, stride=3)
    builder.fc(24, name="third")
    builder.add("relu")
    builder.fc(8, name="fourth")
    return builder.build()


def make_images(n: int = 48) -> np.ndarray:
    return NetworkBuilder((2, 9, 8), seed=5).images(n)


def error(original: Network, images: np.ndarray, method: str, **changes) -> float:
    """Return the relative error of what the quantised network puts out."""
    settings = {**SETTINGS, "method": method, "exclude": ["fourth"], **changes}
    quantized = quantize(original, images, settings)
    wanted = original.compile(precision="exact")(images)
    got = quantized.compile(precision="exact")(images)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def changed(network: Network, name: str, change) -> Network:
    tensors = dict(network.tensors)
    tensors[name] = change(tensors[name].copy())
    return network.replace(tensors=tensors)


def test_constant_layer(method):
    network = make_network()
    for layer in ("first", "second", "third"):
        network = changed(network, f"{layer}.weight", lambda w: np.full_like(w, 0.125))
    # float16 codebooks know this number.
    assert error(network, make_images(), method) < 1e-6


def test_layer_of_zeros(method):
    network = changed(make_network(), "second.weight", np.zeros_like)
    assert error(network, make_images(), method, exclude=["first", "fourth"]) < 0.2


def test_dead_channels(method):
    """Half of the first layer's outputs are never above zero."""

    def dead(bias):
        bias[::2] = -1e3
        return bias

    network = changed(make_network(), "first.bias", dead)
    assert error(network, make_images(), method) < 0.5


def test_images_of_zeros(method):
    assert error(make_network(), np.zeros_like(make_images()), method) < 0.5


def test_one_image(method):
    assert error(make_network(), make_images(1), method) < 0.5


def test_extreme_scales(method):
    network = make_network()
    network = changed(network, "first.weight", lambda w: w * np.float32(1e-3))
    network = changed(network, "second.weight", lambda w: w * np.float32(1e3))
    assert error(network, make_images() * np.float32(100), method) < 0.5


def test_fewer_distinct_subvectors_than_codewords(method):
    """Four different rows of weights, for eight codewords."""

    def repeated(weight):
        weight[4:] = weight[np.arange(len(weight) - 4) % 4]
        return weight.astype(np.float16).astype(np.float32)

    network = changed(make_network(kernel=1), "second.weight", repeated)
    names = ["first", "third", "fourth"]
    images = make_images()
    assert error(network, images, method, exclude=names, codebook_bits=32) < 1e-5


def test_one_output(method):
    builder = NetworkBuilder((2, 9, 8))
    builder.conv(1, 3, name="narrow")
    builder.fc(8, name="fourth")
    network, images = builder.build(), make_images()
    assert error(network, images, method) < 0.5
    builder = NetworkBuilder((24,))
    builder.fc(1, name="single")
    with pytest.raises(ConfigError, match=r"single.*n_centroids"):
        quantize(builder.build(), builder.images(9), {**SETTINGS, "method": method})
