"""Hypothesis strategies for random networks."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from random_networks import Binary, NetworkBuilder, Quantized

UNARY: dict[str, dict[str, Any]] = {
    "relu": {},
    "leaky_relu": {"alpha": 0.2},
    "clip": {"low": -1.0, "high": 1.5},
    "sigmoid": {},
    "tanh": {},
    "hard_sigmoid": {"alpha": 0.2, "beta": 0.5},
    "hard_swish": {},
    "silu": {},
    "softmax": {},
    "log_softmax": {},
    "flatten": {},
    "dropout": {"rate": 0.25},
}

# A response next to a threshold may fall on either side of it, whoever computes it:
# such networks are compared node by node, or with themselves.
QUANTIZERS: dict[str, dict[str, Any]] = {
    "quantize_linear": {"bits": 3, "low": -1.0, "high": 1.5},
    "quantize_log2": {"bits": 4, "high": 2.0},
    "sign": {},
}

small = st.integers(1, 3)


@st.composite
def quantizations(draw: st.DrawFn) -> Quantized | Binary | None:
    """Draw how a layer is stored: dense, binary, or a setting of its codes."""
    match draw(st.sampled_from(["dense", "binary", "codes", "codes"])):
        case "dense":
            return None
        case "binary":
            return Binary()
    return Quantized(
        n_centroids=draw(st.sampled_from([1, 2, 3, 16, 31, 64, 256, 257])),
        # Long sub-vectors too: without them the engine would decode, not look up.
        subvector_dim=draw(st.integers(1, 16)),
        parts=draw(st.integers(0, 3)),
        codebook_bits=draw(st.sampled_from([32, 16, 8])),
    )


@st.composite
def paddings(draw: st.DrawFn, kernel: tuple[int, int], limit: int) -> list[int]:
    """Draw ``[top, left, bottom, right]``, below the kernel for pooling."""
    height, width = (min(limit, k) for k in kernel)
    sides = [height, width, height, width]
    return [draw(st.integers(0, side - 1)) for side in sides]


def _fits(shape: tuple[int, ...], padding: list[int], span: tuple[int, int]) -> bool:
    top, left, bottom, right = padding
    return shape[1] + top + bottom >= span[0] and shape[2] + left + right >= span[1]


@st.composite
def networks(
    draw: st.DrawFn,
    max_nodes: int = 5,
    max_extent: int = 12,
    quantizers: bool = False,
) -> NetworkBuilder:
    """Draw a builder filled with up to `max_nodes` operations."""
    unary = UNARY | QUANTIZERS if quantizers else UNARY
    extents = st.integers(1, max_extent)
    shape = (draw(st.integers(1, 24)), draw(extents), draw(extents))
    builder = NetworkBuilder(shape, seed=draw(st.integers(0, 2**32 - 1)))
    values = ["input"]
    for _ in range(draw(st.integers(1, max_nodes))):
        _append(draw, builder, draw(st.sampled_from(values)), unary)
        values = ["input", *(node.name for node in builder.nodes)]
    return builder


def _append(
    draw: st.DrawFn,
    builder: NetworkBuilder,
    source: str,
    unary: dict[str, dict[str, Any]],
) -> None:
    """Append one operation that `source` allows, with drawn attributes."""
    shape = builder.shape(source)
    kinds = ["fc", "unary", "batch_norm", "combine", "concat", "reshape"]
    kinds += ["slice", "pad", "transpose"]
    if len(shape) == 3:
        kinds += ["conv"] * 4 + ["pool"] * 2 + ["global", "lrn"]
    match draw(st.sampled_from(kinds)):
        case "fc":
            builder.fc(
                draw(st.integers(1, 20)),
                source,
                bias=draw(st.booleans()),
                quantized=draw(quantizations()),
            )
        case "unary":
            op = draw(st.sampled_from(sorted(unary)))
            builder.add(op, source, **unary[op])
        case "batch_norm":
            builder.batch_norm(source)
        case "combine":
            # The others may have extents of 1.
            kept = [n if draw(st.booleans()) else 1 for n in shape]
            part = _slice(draw, builder, source, kept)
            op = draw(st.sampled_from(["add", "mul"]))
            builder.add(op, source, *draw(st.permutations([source, part])))
        case "concat":
            builder.add("concat", *[source] * draw(st.integers(2, 3)))
        case "slice":
            counts = [draw(st.integers(1, n)) for n in shape]
            _slice(draw, builder, source, counts)
        case "pad":
            builder.add(
                "pad",
                source,
                before=[draw(st.integers(0, 2)) for _ in shape],
                after=[draw(st.integers(0, 2)) for _ in shape],
                value=draw(st.sampled_from([0.0, -1.5])),
            )
        case "transpose":
            axes = draw(st.permutations(range(len(shape))))
            moved = [shape[axis] for axis in axes]
            builder.add("transpose", source, view=list(shape), axes=axes, shape=moved)
        case "reshape":
            channels, *pixels = shape if len(shape) == 3 else (1, *shape, 1)
            builder.add("reshape", source, shape=[channels, *reversed(pixels)])
        case "conv":
            _append_conv(draw, builder, source, draw(quantizations()))
        case "pool":
            if draw(st.booleans()):
                _append_pool(draw, builder, source, "max_pool")
            else:
                counted = draw(st.booleans())
                _append_pool(
                    draw, builder, source, "average_pool", count_include_pad=counted
                )
        case "global":
            builder.add(
                draw(st.sampled_from(["global_average_pool", "global_max_pool"])),
                source,
            )
        case "lrn":
            builder.add(
                "lrn",
                source,
                size=draw(st.integers(1, 7)),
                alpha=draw(st.sampled_from([1e-4, 0.5])),
                beta=draw(st.sampled_from([0.5, 0.75, 1.0])),
                bias=draw(st.sampled_from([1.0, 2.0])),
            )


def _slice(
    draw: st.DrawFn, builder: NetworkBuilder, source: str, counts: list[int]
) -> str:
    """Append a slice of the given extents, with a drawn start and step."""
    starts, steps = [], []
    for extent, count in zip(builder.shape(source), counts, strict=True):
        step = draw(st.integers(1, max(1, (extent - 1) // max(count - 1, 1))))
        steps.append(step)
        starts.append(draw(st.integers(0, extent - 1 - (count - 1) * step)))
    return builder.add("slice", source, start=starts, step=steps, shape=counts)


@st.composite
def binary_networks(draw: st.DrawFn) -> NetworkBuilder:
    """Draw a network of 1 and -1, but for the input."""
    extents = st.integers(1, 12)
    shape = (draw(st.integers(1, 70)), draw(extents), draw(extents))
    builder = NetworkBuilder(shape, seed=draw(st.integers(0, 2**32 - 1)))
    builder.add("sign")
    for _ in range(draw(st.integers(1, 3))):
        if len(builder.shape(builder.last)) == 3 and draw(st.booleans()):
            _append_conv(draw, builder, builder.last, Binary())
            if draw(st.booleans()):
                _append_pool(draw, builder, builder.last, "max_pool")
        else:
            bias = draw(st.booleans())
            builder.fc(draw(st.integers(1, 70)), bias=bias, quantized=Binary())
        if draw(st.booleans()):
            builder.batch_norm()
        builder.add("sign")
    return builder


def _append_pool(
    draw: st.DrawFn, builder: NetworkBuilder, source: str, op: str, **counted: bool
) -> None:
    kernel = (draw(small), draw(small))
    padding = draw(paddings(kernel, 3))
    if not _fits(builder.shape(source), padding, kernel):
        kernel, padding = (1, 1), [0, 0, 0, 0]
    builder.pool(
        op,
        kernel,
        source,
        stride=(draw(small), draw(small)),
        padding=padding,
        ceil_mode=draw(st.booleans()),
        **counted,
    )


def _append_conv(
    draw: st.DrawFn,
    builder: NetworkBuilder,
    source: str,
    quantized: Quantized | Binary | None,
) -> None:
    shape = builder.shape(source)
    divisors = [n for n in range(1, shape[0] + 1) if shape[0] % n == 0]
    groups = draw(st.sampled_from(divisors))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(small), draw(small))
    padding = draw(paddings((4, 4), 4))
    span = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    if not _fits(shape, padding, span):
        kernel, dilation = (1, 1), (1, 1)
    builder.conv(
        groups * draw(st.integers(1, max(1, 64 // groups))),
        kernel,
        source,
        stride=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        quantized=quantized,
    )


def agree(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Whether two values agree relative to the larger of 1 and the expected maximum.

    Responses of the random networks are of the order of one; where all of them
    happen to cancel, what counts is the size of what was summed.
    """
    if actual.shape != expected.shape:
        return False
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    return bool(np.abs(actual - expected).max(initial=0) <= tolerance * scale)
