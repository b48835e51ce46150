"""The oracle: every operation of the graph in plain float64 NumPy.

Written to be read and believed, not to be fast: one function per operation,
convolutions as a sum over kernel positions, pooling as a loop over windows,
product-quantised weights decoded by indexing. Nothing of the engine or of the
package is used, so agreement means that two independent readings of the
specification agree.

A network is anything with ``nodes``, ``tensors``, ``input_name`` and ``output``
as :class:`qcnn_py.Network` has them. Batches are ``(N, C, H, W)`` or ``(N, F)``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Attributes = Mapping[str, Any]
Parameters = Mapping[str, Array]


def execute(network: Any, x: Array) -> dict[str, Array]:
    """Every value of the network for the batch ``x``, in float64, by name."""
    values = {network.input_name: np.asarray(x, dtype=np.float64)}
    for node in network.nodes:
        values[node.name] = respond(network, node, values)
    return values


def respond(network: Any, node: Any, values: Mapping[str, Array]) -> Array:
    """Response of one node to the values before it."""
    prefix = f"{node.name}."
    parameters = {
        key.removeprefix(prefix): tensor
        for key, tensor in network.tensors.items()
        if key.startswith(prefix)
    }
    inputs = [np.asarray(values[name], dtype=np.float64) for name in node.inputs]
    # Infinities and NaN are legitimate inputs here; what becomes of them is tested.
    with np.errstate(all="ignore"):
        return OPERATIONS[node.op](inputs, node.attributes, parameters)


def decode_conv(codebooks: Array, codes: Array, channels: int) -> Array:
    """Dense ``(C_out, channels, kh, kw)`` of codes ``(C_out, kh, kw, M)``.

    ``codebooks`` is ``(M, K, dsub)``, or ``(sets, M, K, dsub)`` where equal parts
    of the output channels have their own. ``channels`` are those of one group.
    """
    n_out, height, width, n_subspaces = codes.shape
    sets = codebooks if codebooks.ndim == 4 else codebooks[None]
    set_outputs = n_out // len(sets)
    dsub = sets.shape[-1]
    weight = np.zeros((n_out, n_subspaces * dsub, height, width))
    for part, books in enumerate(sets):
        outputs = slice(part * set_outputs, (part + 1) * set_outputs)
        for m, book in enumerate(books):
            codewords = book[codes[outputs, ..., m]]
            channel = m * dsub
            weight[outputs, channel : channel + dsub] = np.moveaxis(codewords, 3, 1)
    return weight[:, :channels]


def decode_fc(codebooks: Array, codes: Array, features: int) -> Array:
    """Dense ``(C_out, features)`` of codes ``(C_out, M)``."""
    return decode_conv(codebooks, codes[:, None, None, :], features)[:, :, 0, 0]


def _weight(a: Attributes, p: Parameters, channels: int) -> Array:
    """Weight of a convolution or fully connected layer, whatever its form."""
    match a["weights"]["type"]:
        case "dense":
            return p["weight"].astype(np.float64)
        case "binary":
            return p["signs"].astype(np.float64)
    decode = decode_conv if "kernel" in a else decode_fc
    return decode(p["codebooks"], p["codes"], channels)


def _conv(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    (x,) = inputs
    n, channels, height, width = x.shape
    kernel_h, kernel_w = a["kernel"]
    stride_h, stride_w = a["stride"]
    dilation_h, dilation_w = a["dilation"]
    top, left, bottom, right = a["padding"]
    groups = a["groups"]
    group_in = channels // groups
    group_out = a["out_channels"] // groups
    weight = _weight(a, p, group_in)
    out_h = (height + top + bottom - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    out_w = (width + left + right - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out = np.zeros((n, a["out_channels"], out_h, out_w))
    for group in range(groups):
        into = slice(group * group_in, (group + 1) * group_in)
        onto = slice(group * group_out, (group + 1) * group_out)
        for ky in range(kernel_h):
            for kx in range(kernel_w):
                y0, x0 = ky * dilation_h, kx * dilation_w
                seen = padded[
                    :,
                    into,
                    y0 : y0 + stride_h * (out_h - 1) + 1 : stride_h,
                    x0 : x0 + stride_w * (out_w - 1) + 1 : stride_w,
                ]
                out[:, onto] += np.einsum(
                    "oc,nchw->nohw", weight[onto, :, ky, kx], seen, optimize=True
                )
    if a["bias"]:
        out += p["bias"].astype(np.float64)[:, None, None]
    return out


def _fc(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    (x,) = inputs
    weight = _weight(a, p, x.shape[1])
    out = x @ weight.T
    if a["bias"]:
        out = out + p["bias"].astype(np.float64)
    return out


def pool_extent(
    extent: int, kernel: int, stride: int, before: int, after: int, ceil_mode: bool
) -> int:
    """Number of windows along one axis.

    Rounded up in ceil mode, except that a window must start inside the input or
    its leading padding.
    """
    travel = extent + before + after - kernel
    if not ceil_mode:
        return travel // stride + 1
    count = math.ceil(travel / stride) + 1
    if (count - 1) * stride >= extent + before:
        count -= 1
    return count


def _pool(
    x: Array,
    a: Attributes,
    reduce: Callable[[Array, tuple[int, int], int], Array],
) -> Array:
    """Apply ``reduce(pixels, window position, padded pixels)`` to every window."""
    n, channels, height, width = x.shape
    kernel_h, kernel_w = a["kernel"]
    stride_h, stride_w = a["stride"]
    top, left, bottom, right = a["padding"]
    out_h = pool_extent(height, kernel_h, stride_h, top, bottom, a["ceil_mode"])
    out_w = pool_extent(width, kernel_w, stride_w, left, right, a["ceil_mode"])
    out = np.zeros((n, channels, out_h, out_w))
    for oy in range(out_h):
        for ox in range(out_w):
            y0, x0 = oy * stride_h - top, ox * stride_w - left
            y1, x1 = y0 + kernel_h, x0 + kernel_w
            pixels = x[:, :, max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
            # Pixels of the window in the input and its explicit padding, without
            # what hangs over in ceil mode.
            covered = (min(y1, height + bottom) - y0) * (min(x1, width + right) - x0)
            out[:, :, oy, ox] = reduce(pixels, (oy, ox), covered)
    return out


def _max_pool(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    return _pool(inputs[0], a, lambda pixels, _, __: pixels.max(axis=(2, 3)))


def _average_pool(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    def mean(pixels: Array, _: tuple[int, int], covered: int) -> Array:
        inside = pixels.shape[2] * pixels.shape[3]
        divisor = covered if a["count_include_pad"] else inside
        return pixels.sum(axis=(2, 3)) / divisor

    return _pool(inputs[0], a, mean)


def _global_average_pool(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    return inputs[0].mean(axis=(2, 3), keepdims=True)


def _global_max_pool(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    return inputs[0].max(axis=(2, 3), keepdims=True)


def _lrn(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    (x,) = inputs
    channels, size = x.shape[1], a["size"]
    # An even window reaches one channel further up than down, as in ONNX.
    below, above = (size - 1) // 2, size - 1 - (size - 1) // 2
    out = np.empty_like(x)
    for c in range(channels):
        window = x[:, max(0, c - below) : min(channels, c + above + 1)]
        total = (window**2).sum(axis=1)
        out[:, c] = x[:, c] / (a["bias"] + a["alpha"] / size * total) ** a["beta"]
    return out


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _unary(function: Callable[[Array, Attributes], Array]) -> Callable[..., Array]:
    def operation(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
        (x,) = inputs
        return function(x, a)

    return operation


def _quantize_linear(x: Array, a: Attributes) -> Array:
    """In float32, as the format says: where levels change must not depend on more."""
    x = x.astype(np.float32)
    low, high = np.float32(a["low"]), np.float32(a["high"])
    step = (high - low) / np.float32(2 ** a["bits"] - 1)
    return np.clip(np.rint(x / step) * step, low, high) + np.float32(0)


def _quantize_log2(x: Array, a: Attributes) -> Array:
    """Search the level in the list of all."""
    n_powers = 2 ** (a["bits"] - 1) - 1
    # Attributes are float32 numbers, shortest in decimal.
    powers = np.float64(np.float32(a["high"])) * 2.0 ** np.arange(1 - n_powers, 1)
    thresholds = (powers / 2 * np.float64(np.sqrt(np.float32(2)))).astype(np.float32)
    levels = np.concatenate([[0.0], powers])
    x = x.astype(np.float32)
    level = levels[np.searchsorted(thresholds, np.abs(x), side="right")]
    return np.where(np.isnan(x), x, np.where(x < 0, -level, level) + 0.0)


def _sign(x: Array, a: Attributes) -> Array:
    return np.where(np.isnan(x), x, np.where(x >= 0, 1.0, -1.0))


def _batch_norm(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    (x,) = inputs
    shape = (-1,) + (1,) * (x.ndim - 2)
    scale, bias, mean, variance = (
        p[name].astype(np.float64).reshape(shape)
        for name in ("scale", "bias", "mean", "variance")
    )
    return scale * (x - mean) / np.sqrt(variance + a["epsilon"]) + bias


def _softmax(x: Array, a: Attributes) -> Array:
    exponential = np.exp(x - x.max(axis=1, keepdims=True))
    return exponential / exponential.sum(axis=1, keepdims=True)


def _log_softmax(x: Array, a: Attributes) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _slice(x: Array, a: Attributes) -> Array:
    for axis, start, step, count in zip(
        range(1, x.ndim), a["start"], a["step"], a["shape"], strict=True
    ):
        x = x.take(start + step * np.arange(count), axis)
    return x


def _pad(x: Array, a: Attributes) -> Array:
    widths = [(0, 0), *zip(a["before"], a["after"], strict=True)]
    return np.pad(x, widths, constant_values=a["value"])


def _transpose(x: Array, a: Attributes) -> Array:
    view = x.reshape(len(x), *a["view"])
    moved = view.transpose(0, *(axis + 1 for axis in a["axes"]))
    return moved.reshape(len(x), *a["shape"])


def _add(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    total = inputs[0]
    for other in inputs[1:]:
        total = total + other
    return total


def _mul(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    product = inputs[0]
    for other in inputs[1:]:
        product = product * other
    return product


def _concat(inputs: list[Array], a: Attributes, p: Parameters) -> Array:
    return np.concatenate(inputs, axis=1)


OPERATIONS: dict[str, Callable[[list[Array], Attributes, Parameters], Array]] = {
    "conv": _conv,
    "fc": _fc,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "global_average_pool": _global_average_pool,
    "global_max_pool": _global_max_pool,
    "lrn": _lrn,
    "relu": _unary(lambda x, a: np.maximum(x, 0.0)),
    "leaky_relu": _unary(lambda x, a: np.where(x < 0, a["alpha"] * x, x)),
    "clip": _unary(lambda x, a: np.minimum(np.maximum(x, a["low"]), a["high"])),
    "sigmoid": _unary(lambda x, a: _sigmoid(x)),
    "tanh": _unary(lambda x, a: np.tanh(x)),
    "hard_sigmoid": _unary(lambda x, a: np.clip(a["alpha"] * x + a["beta"], 0, 1)),
    "hard_swish": _unary(lambda x, a: x * np.clip(x / 6 + 0.5, 0, 1)),
    "silu": _unary(lambda x, a: x * _sigmoid(x)),
    "quantize_linear": _unary(_quantize_linear),
    "quantize_log2": _unary(_quantize_log2),
    "sign": _unary(_sign),
    "add": _add,
    "mul": _mul,
    "concat": _concat,
    "flatten": _unary(lambda x, a: x.reshape(len(x), math.prod(x.shape[1:]))),
    "reshape": _unary(lambda x, a: x.reshape(len(x), *a["shape"])),
    "slice": _unary(_slice),
    "pad": _unary(_pad),
    "transpose": _unary(_transpose),
    "batch_norm": _batch_norm,
    "softmax": _unary(_softmax),
    "log_softmax": _unary(_log_softmax),
    "dropout": _unary(lambda x, a: x),
}
