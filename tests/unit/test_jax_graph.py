"""The JAX interpretation of a graph against the NumPy oracle."""

from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_executor import execute
from random_networks import Binary, NetworkBuilder, Quantized, relative_error

from qcnn_py.errors import ConfigError
from qcnn_py.jax_graph import Parameters, decoding_function, values_function
from qcnn_py.network import Network

POOLS: list[dict[str, Any]] = [
    {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    for kernel, stride, padding, ceil_mode in product(
        (2, 3), (2, (3, 4)), (0, [1, 0, 0, 1], [0, 1, 1, 0]), (False, True)
    )
]


def forward_function(
    network: Network,
) -> Callable[[Parameters, Any, jax.Array | None], jax.Array]:
    """Return the function that computes the network's output."""
    values = values_function(network)
    return lambda parameters, x, key: values(parameters, x, key)[network.output]


def check(builder: NetworkBuilder) -> None:
    """Compare the output of a network with the oracle's."""
    network, images = builder.build(), builder.images(2)
    expected = execute(network, images)[network.output]
    # Compiled as a whole: much faster than operation by operation.
    forward = jax.jit(forward_function(network))
    actual = np.asarray(forward(dict(network.tensors), images, None))
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("options", POOLS, ids=str)
def test_pooling(options: dict[str, Any]) -> None:
    options = dict(options)
    builder = NetworkBuilder((2, 7, 8))
    kernel = options.pop("kernel")
    pools = [builder.pool("max_pool", kernel, **options)]
    for include in (False, True):
        pools.append(
            builder.pool(
                "average_pool", kernel, "input", **options, count_include_pad=include
            )
        )
    builder.add("concat", *pools)
    check(builder)


def test_branches_and_normalisations() -> None:
    builder = NetworkBuilder((4, 9, 7))
    builder.conv(6, (3, 2), stride=(2, 1), padding=[1, 0, 2, 1], groups=2, name="first")
    builder.batch_norm()
    builder.add("lrn", name="odd", size=3, alpha=0.3, beta=0.75, bias=2.0)
    builder.add("lrn", "first", name="even", size=4, alpha=0.3, beta=0.5, bias=1.0)
    builder.add("concat", "odd", "even", "first")
    builder.conv(5, 3, padding=2, dilation=2, bias=False, name="second")
    builder.add("add", "second", "second", "second", name="sum")
    builder.add("global_max_pool", "sum", name="max")
    builder.add("global_average_pool", "sum", name="mean")
    builder.add("concat", "max", "mean")
    builder.add("reshape", shape=[5, 2, 1])
    builder.add("dropout", rate=0.9)
    builder.fc(7)
    builder.batch_norm()
    builder.fc(3, bias=False)
    builder.add("softmax")
    check(builder)


def test_binary_weights_are_refused() -> None:
    builder = NetworkBuilder((4,))
    builder.fc(2, name="fc", quantized=Binary())
    network, images = builder.build(), builder.images(3)
    with pytest.raises(ConfigError, match=r"'fc' is binary, .* \(Network.decoded"):
        forward_function(network)
    decoded = network.decoded()
    output = forward_function(decoded)(dict(decoded.tensors), images, None)
    assert relative_error(output, execute(network, images)["fc"]) < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_groups(groups: int) -> None:
    builder = NetworkBuilder((16, 5, 6))
    builder.conv(32, 3, groups=groups, stride=(1, 2))
    check(builder)


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_codewords_stand_for_weights(parts: int) -> None:
    builder = NetworkBuilder((10, 4, 4))
    # Five channels a group: the last sub-vector is padded.
    quantized = Quantized(6, 2, parts)
    builder.conv(4, 3, groups=2, name="conv", quantized=quantized)
    builder.fc(5, name="fc", quantized=Quantized(300, 3))
    builder.fc(2, name="last")
    network = builder.build()
    decoded = decoding_function(network)
    parameters = {
        name: jnp.asarray(array)
        for name, array in network.tensors.items()
        if not name.endswith(".codes")
    }
    expected = network.decoded().tensors
    weights = jax.jit(decoded)(parameters)
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array)
    # A codeword's gradient is the sum over the sub-vectors that use it.
    gradient = jax.grad(lambda p: decoded(p)["fc.weight"].sum())(parameters)
    codes = network.tensors["fc.codes"]
    counts = [np.bincount(codes[:, m], minlength=300) for m in range(codes.shape[1])]
    np.testing.assert_array_equal(gradient["fc.codebooks"][:, :, 0], np.stack(counts))


def test_activations() -> None:
    builder = NetworkBuilder((3, 5, 4))
    activations: dict[str, dict[str, float]] = {
        "relu": {},
        "leaky_relu": {"alpha": 0.1},
        "clip": {"low": -0.5, "high": 1.0},
        "sigmoid": {},
        "tanh": {},
        "hard_sigmoid": {"alpha": 0.3, "beta": 0.4},
        "hard_swish": {},
        "silu": {},
        "softmax": {},
    }
    values = [builder.add(op, "input", **a) for op, a in activations.items()]
    builder.add("concat", *values)
    check(builder)


@pytest.fixture
def dropping() -> Network:
    builder = NetworkBuilder((50, 20, 20))
    builder.add("dropout", rate=0.3, name="first")
    builder.add("dropout", "input", rate=0.3, name="second")
    builder.add("concat", "first", "second")
    return builder.build()


def test_dropout_drops_with_a_key_only(dropping: Network) -> None:
    forward = forward_function(dropping)
    ones = jnp.ones((1, 50, 20, 20))
    np.testing.assert_array_equal(forward({}, ones, None), 1)
    values = np.asarray(forward({}, ones, jax.random.key(0)))[0]
    assert set(np.unique(values)) == {0, np.float32(1) / np.float32(0.7)}
    # 40,000 draws: five standard deviations are 0.017.
    assert values.mean() == pytest.approx(1, abs=0.017)
    assert not np.array_equal(values[:50], values[50:])
    np.testing.assert_array_equal(forward({}, ones, jax.random.key(0))[0], values)


def test_gradients_reach_every_parameter() -> None:
    builder = NetworkBuilder((2, 6, 6))
    builder.conv(3, 3)
    builder.batch_norm()
    builder.add("silu")
    builder.fc(4)
    network, images = builder.build(), builder.images(3)
    forward = forward_function(network)

    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        return jnp.square(forward(parameters, images, None)).sum()

    gradients = jax.jit(jax.grad(loss))(
        {k: jnp.asarray(v) for k, v in network.tensors.items()}
    )
    assert gradients.keys() == network.tensors.keys()
    assert all(jnp.abs(gradient).max() > 0 for gradient in gradients.values())


def test_quantised_layers_are_refused() -> None:
    builder = NetworkBuilder((4, 5, 5))
    builder.conv(6, 3, name="conv1", quantized=Quantized(4, 2))
    with pytest.raises(ConfigError, match="'conv1' is product-quantised"):
        forward_function(builder.build())
