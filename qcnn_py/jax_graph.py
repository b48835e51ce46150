"""A network as a pure, differentiable JAX function of its parameters, for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from qcnn_py import jax_activations
from qcnn_py.errors import ConfigError
from qcnn_py.network import Network, decode

__all__ = [
    "Parameters",
    "batch_moments",
    "decoding_function",
    "values_function",
]

Parameters = Mapping[str, jax.Array]

# Groups of a convolution that are computed one by one.
_MOST_PARTS = 8

_Attributes = Mapping[str, Any]
_Operation = Callable[[_Attributes, Sequence[jax.Array], Parameters], jax.Array]


def values_function(
    network: Network, *, noise: bool = False, normalize_batches: bool = False
) -> Callable[[Parameters, jax.Array, jax.Array | None], dict[str, jax.Array]]:
    """Return the function that computes all values of a network.

    Parameters
    ----------
    network : Network
        All layers dense.
    noise : bool
        Whether quantised activations get noise in training.
    normalize_batches : bool
        Whether batch normalisation uses mean and variance of the batch in training,
        not those stored.

    Returns
    -------
    callable
        ``values(parameters, x, key)``: all values, the input's included, by name.
        `parameters` are named like ``network.tensors``, `x` is float32 of shape
        (N, …). With a key it is training: dropout drops, and what is asked for above
        happens. With ``None`` the network computes what it does at inference.

    Raises
    ------
    ConfigError
        If a layer is product-quantised (`decoding_function` makes dense weights of
        its parameters) or binary.
    """
    for node in network.nodes:
        if node.quantized or node.binary:
            kind = "binary" if node.binary else "product-quantised"
            raise ConfigError(
                f"layer {node.name!r} is {kind}, expected dense weights "
                "(Network.decoded makes them so)"
            )

    def compute(
        parameters: Parameters, x: jax.Array, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        values = {network.input_name: x}
        for number, node in enumerate(network.nodes):
            operands = [values[name] for name in node.inputs]
            own_key = None if key is None else jax.random.fold_in(key, number)
            if node.op == "dropout":
                value, rate = operands[0], node.attributes["rate"]
                if own_key is not None and rate:
                    value = _dropout(value, rate, own_key)
            elif node.op in _QUANTIZERS:
                quantizer = _QUANTIZERS[node.op]
                random = _fast_key(own_key) if noise and own_key is not None else None
                value = quantizer(operands[0], **node.attributes, key=random)
            elif node.op in ("flatten", "reshape"):
                value = operands[0].reshape(-1, *network.shapes[node.name])
            else:
                prefix = f"{node.name}."
                own = {
                    name.removeprefix(prefix): array
                    for name, array in parameters.items()
                    if name.startswith(prefix)
                }
                if node.op == "batch_norm" and normalize_batches and key is not None:
                    own |= batch_moments(operands[0])
                value = _OPERATIONS[node.op](node.attributes, operands, own)
            values[node.name] = value
        return values

    return compute


def decoding_function(network: Network) -> Callable[[Parameters], Parameters]:
    """Return the function that makes dense weights of a network's codebooks.

    Parameters
    ----------
    network : Network
        Its codes are part of the function.

    Returns
    -------
    callable
        ``decoded(parameters)``: of parameters named like ``network.tensors``, codes
        left out, those of ``network.decoded()``.
    """
    layers = {layer.name: layer for layer in network.layers if layer.quantized}

    def decoded(parameters: Parameters) -> Parameters:
        dense = dict(parameters)
        for name, layer in layers.items():
            codes = network.tensors[f"{name}.codes"]
            books = dense.pop(f"{name}.codebooks")
            dense[f"{name}.weight"] = decode(books, codes, layer.channels)
        return dense

    return decoded


def _fast_key(key: jax.Array) -> jax.Array:
    """Return a key of the generator that XLA compiles several times faster."""
    data = jnp.tile(jax.random.key_data(key), 2)
    fast: jax.Array = jax.random.wrap_key_data(data, impl="rbg")
    return fast


def batch_moments(x: jax.Array) -> dict[str, jax.Array]:
    """Return ``mean`` and ``variance`` of each channel over a batch, (N, C, …)."""
    axes = (0, *range(2, x.ndim))
    return {"mean": x.mean(axes), "variance": x.var(axes)}


def _dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero a share of the values and scale the others to keep the expectation."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def _conv(
    attributes: _Attributes, operands: Sequence[jax.Array], own: Parameters
) -> jax.Array:
    top, left, bottom, right = attributes["padding"]
    x, weight, groups = operands[0], own["weight"], attributes["groups"]
    # XLA's gradient of a grouped convolution is ten times slower on a CPU than
    # those of one convolution per group, unless there are very many.
    n_parts = groups if groups <= _MOST_PARTS else 1
    y = jnp.concatenate(
        [
            lax.conv_general_dilated(
                part,
                kernels,
                window_strides=attributes["stride"],
                padding=((top, bottom), (left, right)),
                rhs_dilation=attributes["dilation"],
                dimension_numbers=("NCHW", "OIHW", "NCHW"),
                feature_group_count=groups // n_parts,
            )
            for part, kernels in zip(
                jnp.split(x, n_parts, axis=1),
                jnp.split(weight, n_parts, axis=0),
                strict=True,
            )
        ],
        axis=1,
    )
    return y + own["bias"][:, None, None] if attributes["bias"] else y


def _fc(
    attributes: _Attributes, operands: Sequence[jax.Array], own: Parameters
) -> jax.Array:
    y: jax.Array = operands[0] @ own["weight"].T
    return y + own["bias"] if attributes["bias"] else y


def _batch_norm(
    attributes: _Attributes, operands: Sequence[jax.Array], own: Parameters
) -> jax.Array:
    x = operands[0]
    per_channel = (-1, *[1] * (x.ndim - 2))
    scale = own["scale"] / jnp.sqrt(own["variance"] + attributes["epsilon"])
    shift = own["bias"] - own["mean"] * scale
    return x * scale.reshape(per_channel) + shift.reshape(per_channel)


def _lrn(
    attributes: _Attributes, operands: Sequence[jax.Array], own: Parameters
) -> jax.Array:
    (x,) = operands
    size = attributes["size"]
    window = (1, size, *[1] * (x.ndim - 2))
    padding = ((0, 0), ((size - 1) // 2, size // 2), *[(0, 0)] * (x.ndim - 2))
    sums: jax.Array = lax.reduce_window(
        jnp.square(x), 0.0, lax.add, window, (1,) * x.ndim, padding
    )
    base = attributes["bias"] + attributes["alpha"] / size * sums
    y: jax.Array = x / base ** attributes["beta"]
    return y


def _max_pool(
    attributes: _Attributes, operands: Sequence[jax.Array], own: Parameters
) -> jax.Array:
    return _pooled(operands[0], attributes, -jnp.inf, lax.max)


def _average_pool(
    attributes: _Attributes, operands: Sequence[jax.Array], own: Parameters
) -> jax.Array:
    (x,) = operands
    sums = _pooled(x, attributes, 0.0, lax.add)
    rows, columns = (
        _window_lengths(attributes, axis, length, n_windows)
        for axis, (length, n_windows) in enumerate(
            zip(x.shape[2:], sums.shape[2:], strict=True)
        )
    )
    return sums / np.outer(rows, columns).astype(np.float32)


def _pooled(
    x: jax.Array,
    attributes: _Attributes,
    initial: float,
    combine: Callable[[Any, Any], Any],
) -> jax.Array:
    padding = [
        _pool_padding(attributes, axis, length)
        for axis, length in enumerate(x.shape[2:])
    ]
    pooled: jax.Array = lax.reduce_window(
        x,
        initial,
        combine,
        (1, 1, *attributes["kernel"]),
        (1, 1, *attributes["stride"]),
        ((0, 0), (0, 0), *padding),
    )
    return pooled


def _pool_padding(attributes: _Attributes, axis: int, length: int) -> tuple[int, int]:
    """Return the padding before and behind one axis, overhang of ceil mode included."""
    kernel, stride = attributes["kernel"][axis], attributes["stride"][axis]
    before, behind = attributes["padding"][axis], attributes["padding"][axis + 2]
    travel = length + before + behind - kernel
    overhang = -travel % stride if attributes["ceil_mode"] else 0
    last_start = travel + overhang - (travel + overhang) % stride
    if overhang and last_start >= length + before:
        # A window that would start behind the input is left out.
        overhang = 0
    return before, behind + overhang


def _window_lengths(
    attributes: _Attributes, axis: int, length: int, n_windows: int
) -> npt.NDArray[Any]:
    """Return how many elements of one axis each window averages."""
    before, behind = attributes["padding"][axis], attributes["padding"][axis + 2]
    start = np.arange(n_windows) * attributes["stride"][axis] - before
    stop = start + attributes["kernel"][axis]
    if attributes["count_include_pad"]:
        counted: npt.NDArray[Any] = np.minimum(stop, length + behind) - start
    else:
        counted = np.minimum(stop, length) - np.maximum(start, 0)
    return counted


def _slice(x: jax.Array, attributes: _Attributes) -> jax.Array:
    ranges = zip(*(attributes[key] for key in ("start", "step", "shape")), strict=True)
    return x[:, *(slice(a, a + step * n, step) for a, step, n in ranges)]


def _pad(x: jax.Array, attributes: _Attributes) -> jax.Array:
    widths = zip(attributes["before"], attributes["after"], strict=True)
    return jnp.pad(x, [(0, 0), *widths], constant_values=attributes["value"])


def _transpose(x: jax.Array, attributes: _Attributes) -> jax.Array:
    view = x.reshape(-1, *attributes["view"])
    moved = view.transpose(0, *(axis + 1 for axis in attributes["axes"]))
    return moved.reshape(-1, *attributes["shape"])


def _elementwise(
    function: Callable[[jax.Array, _Attributes], jax.Array],
) -> _Operation:
    return lambda attributes, operands, own: function(operands[0], attributes)


_QUANTIZERS: Mapping[str, Callable[..., jax.Array]] = {
    "quantize_linear": jax_activations.linear,
    "quantize_log2": jax_activations.log2,
    "sign": jax_activations.sign,
}

_OPERATIONS: Mapping[str, _Operation] = {
    "conv": _conv,
    "fc": _fc,
    "batch_norm": _batch_norm,
    "lrn": _lrn,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "global_max_pool": _elementwise(lambda x, _: x.max((2, 3), keepdims=True)),
    "global_average_pool": _elementwise(lambda x, _: x.mean((2, 3), keepdims=True)),
    "relu": _elementwise(lambda x, _: jax.nn.relu(x)),
    "leaky_relu": _elementwise(lambda x, a: jnp.where(x > 0, x, a["alpha"] * x)),
    "clip": _elementwise(lambda x, a: jnp.clip(x, a["low"], a["high"])),
    "sigmoid": _elementwise(lambda x, _: jax.nn.sigmoid(x)),
    "tanh": _elementwise(lambda x, _: jnp.tanh(x)),
    "hard_sigmoid": _elementwise(
        lambda x, a: jnp.clip(a["alpha"] * x + a["beta"], 0, 1)
    ),
    "hard_swish": _elementwise(lambda x, _: x * jnp.clip(x / 6 + 0.5, 0, 1)),
    "silu": _elementwise(lambda x, _: jax.nn.silu(x)),
    "softmax": _elementwise(lambda x, _: jax.nn.softmax(x, axis=1)),
    "log_softmax": _elementwise(lambda x, _: jax.nn.log_softmax(x, axis=1)),
    "slice": _elementwise(_slice),
    "pad": _elementwise(_pad),
    "transpose": _elementwise(_transpose),
    "add": lambda attributes, operands, own: sum(operands[1:], start=operands[0]),
    "mul": lambda attributes, operands, own: prod(operands[1:], start=operands[0]),
    "concat": lambda attributes, operands, own: jnp.concatenate(operands, axis=1),
}
