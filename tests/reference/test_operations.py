"""Every operation of the graph, at the edges of its parameters.

The engine is compared with the oracle, and the oracle itself with ONNX Runtime, so
that none of the three can be wrong alone.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy_executor import execute
from random_networks import Binary, NetworkBuilder, relative_error

from qcnn_py import Network

TOLERANCE = 1e-5
Case = tuple[tuple[int, ...], Callable[[NetworkBuilder], object]]

CONVOLUTIONS: dict[str, Case] = {
    "1x1-map": ((4, 1, 1), lambda b: b.conv(5, 1)),
    "1x1-map-3x3-kernel": ((4, 1, 1), lambda b: b.conv(5, 3, padding=1)),
    "kernel-beyond-map": ((3, 2, 3), lambda b: b.conv(4, 7, padding=3)),
    "padding-beyond-kernel": ((2, 3, 3), lambda b: b.conv(3, 2, padding=3)),
    "one-channel": ((1, 6, 6), lambda b: b.conv(1, 3)),
    "no-bias": ((3, 6, 6), lambda b: b.conv(4, 3, bias=False)),
    "row-kernel": ((3, 5, 9), lambda b: b.conv(4, (1, 5), padding=[0, 2, 0, 2])),
    "column-kernel": ((3, 9, 5), lambda b: b.conv(4, (5, 1), padding=[2, 0, 2, 0])),
    "even-kernel": ((3, 6, 7), lambda b: b.conv(4, (2, 4))),
    "stride-2": ((3, 9, 10), lambda b: b.conv(4, 3, stride=2, padding=1)),
    "stride-3x1": ((3, 10, 7), lambda b: b.conv(4, 3, stride=(3, 1))),
    "stride-4": ((3, 35, 39), lambda b: b.conv(8, 11, stride=4)),
    "stride-beyond-kernel": ((3, 8, 9), lambda b: b.conv(4, 2, stride=4)),
    "dilation": ((3, 9, 9), lambda b: b.conv(4, 3, dilation=(2, 3), padding=2)),
    "dilation-stride": ((2, 11, 12), lambda b: b.conv(4, 3, dilation=2, stride=2)),
    "asymmetric-padding": ((3, 5, 6), lambda b: b.conv(4, 3, padding=[0, 1, 2, 3])),
    "padding-one-side": (
        (3, 6, 6),
        lambda b: b.conv(4, 3, stride=2, padding=[1, 0, 0, 0]),
    ),
    "groups-2": ((6, 7, 7), lambda b: b.conv(4, 3, groups=2, padding=1)),
    "groups-3-stride": ((9, 8, 8), lambda b: b.conv(6, 3, groups=3, stride=2)),
    "depthwise": ((5, 7, 7), lambda b: b.conv(5, 3, groups=5, padding=1)),
    "depthwise-multiplier": ((3, 7, 7), lambda b: b.conv(6, 3, groups=3)),
    "binary": ((5, 7, 6), lambda b: b.conv(9, 3, padding=1, quantized=Binary())),
    "binary-groups-stride": (
        (6, 8, 9),
        lambda b: b.conv(4, 3, groups=2, stride=2, quantized=Binary()),
    ),
    "many-channels": ((70, 5, 5), lambda b: b.conv(67, 3, padding=1)),
}

FULLY_CONNECTED: dict[str, Case] = {
    "1-to-1": ((1,), lambda b: b.fc(1)),
    "1-to-9": ((1,), lambda b: b.fc(9)),
    "100-to-17": ((100,), lambda b: b.fc(17)),
    "1023-to-3": ((1023,), lambda b: b.fc(3, bias=False)),
    "image": ((3, 4, 5), lambda b: b.fc(8)),
    "binary": ((67,), lambda b: b.fc(5, quantized=Binary())),
}

MAX_POOLS: dict[str, Case] = {
    "plain": ((3, 6, 6), lambda b: b.pool("max_pool", 2, stride=2)),
    "overlapping": ((3, 7, 9), lambda b: b.pool("max_pool", 3, stride=2)),
    "floor-drops-a-row": ((2, 8, 8), lambda b: b.pool("max_pool", 3, stride=2)),
    "ceil-overhang": (
        (2, 8, 8),
        lambda b: b.pool("max_pool", 3, stride=2, ceil_mode=True),
    ),
    "ceil-without-overhang": (
        (2, 7, 7),
        lambda b: b.pool("max_pool", 3, stride=2, ceil_mode=True),
    ),
    # The last window of a rounded-up size would start in the padding: it is dropped.
    "ceil-window-in-padding": (
        (2, 5, 5),
        lambda b: b.pool("max_pool", 2, stride=3, padding=1, ceil_mode=True),
    ),
    "padding": (
        (3, 6, 6),
        lambda b: b.pool("max_pool", (3, 2), padding=[2, 1, 1, 0]),
    ),
    "padding-ceil": (
        (3, 6, 7),
        lambda b: b.pool("max_pool", 3, stride=2, padding=1, ceil_mode=True),
    ),
    "1x1-map": ((3, 1, 1), lambda b: b.pool("max_pool", 1)),
    "whole-map": ((3, 4, 5), lambda b: b.pool("max_pool", (4, 5))),
    "stride-beyond-kernel": ((3, 9, 9), lambda b: b.pool("max_pool", 2, stride=4)),
}


def _average(count_include_pad: bool) -> dict[str, Case]:
    def case(shape: tuple[int, ...], kernel: int, **options: object) -> Case:
        return shape, lambda b: b.pool(
            "average_pool", kernel, count_include_pad=count_include_pad, **options
        )

    return {
        "plain": case((3, 6, 6), 2, stride=2),
        "padding": case((3, 6, 6), 3, stride=2, padding=[2, 1, 1, 0]),
        "ceil": case((3, 8, 8), 3, stride=2, ceil_mode=True),
        "ceil-padding": case((3, 6, 6), 3, stride=2, padding=1, ceil_mode=True),
        "ceil-uneven": case((3, 6, 7), 3, stride=2, padding=[0, 0, 1, 1]),
        "1x1-map": case((3, 1, 1), 3, padding=1),
    }


def _lrn(size: int, alpha: float = 0.3, beta: float = 0.75, bias: float = 1.0) -> Case:
    return (6, 3, 4), lambda b: b.add(
        "lrn", size=size, alpha=alpha, beta=beta, bias=bias
    )


def _branches(operation: str) -> Case:
    def fill(b: NetworkBuilder) -> None:
        first = b.conv(4, 3, "input", padding=1)
        second = b.conv(4, 1, "input")
        third = b.add("relu", second)
        b.add(operation, first, second, third)

    return (3, 5, 5), fill


def _gated(*kept: int) -> Case:
    """Product with a part of the input whose extents are `kept`."""

    def fill(b: NetworkBuilder) -> None:
        part = b.add("slice", start=[0] * 3, step=[1] * 3, shape=list(kept))
        b.add("mul", "input", b.add("sigmoid", part))

    return (4, 5, 6), fill


def _slice(start: list[int], step: list[int], shape: list[int]) -> Case:
    return (4, 7, 9), lambda b: b.add("slice", start=start, step=step, shape=shape)


def _pad(before: list[int], after: list[int], value: float = 0.0) -> Case:
    return (4, 7, 9), lambda b: b.add("pad", before=before, after=after, value=value)


def _transpose(view: list[int], axes: list[int], shape: list[int]) -> Case:
    return (4, 6, 5), lambda b: b.add("transpose", view=view, axes=axes, shape=shape)


OTHERS: dict[str, Case] = {
    "global_average_pool": ((3, 5, 7), lambda b: b.add("global_average_pool")),
    "global_average_pool-1x1": ((3, 1, 1), lambda b: b.add("global_average_pool")),
    "global_max_pool": ((3, 5, 7), lambda b: b.add("global_max_pool")),
    "lrn-1": _lrn(1),
    "lrn-5": _lrn(5, alpha=1e-4),
    "lrn-beyond-channels": _lrn(15),
    "lrn-beta-1": _lrn(3, beta=1.0, bias=2.0),
    "lrn-beta-0.5": _lrn(3, beta=0.5, bias=2.0),
    "relu": ((3, 4, 5), lambda b: b.add("relu")),
    "leaky_relu": ((3, 4, 5), lambda b: b.add("leaky_relu", alpha=0.1)),
    "leaky_relu-negative": ((3, 4, 5), lambda b: b.add("leaky_relu", alpha=-0.5)),
    "leaky_relu-steep": ((3, 4, 5), lambda b: b.add("leaky_relu", alpha=3.0)),
    "clip": ((3, 4, 5), lambda b: b.add("clip", low=-0.5, high=0.25)),
    "clip-to-a-point": ((3, 4, 5), lambda b: b.add("clip", low=1.0, high=1.0)),
    "sigmoid": ((3, 4, 5), lambda b: b.add("sigmoid")),
    "tanh": ((3, 4, 5), lambda b: b.add("tanh")),
    "hard_sigmoid": ((3, 4, 5), lambda b: b.add("hard_sigmoid", alpha=0.2, beta=0.5)),
    "hard_swish": ((3, 4, 5), lambda b: b.add("hard_swish")),
    "silu": ((3, 4, 5), lambda b: b.add("silu")),
    "quantize_linear": (
        (3, 4, 5),
        lambda b: b.add("quantize_linear", bits=3, low=-1.0, high=1.5),
    ),
    "quantize_log2": ((3, 4, 5), lambda b: b.add("quantize_log2", bits=4, high=2.0)),
    "sign": ((3, 4, 5), lambda b: b.add("sign")),
    "add": _branches("add"),
    "add-itself": ((3, 4, 5), lambda b: b.add("add", "input", "input")),
    "mul": _branches("mul"),
    "mul-channels": _gated(4, 1, 1),
    "mul-pixels": _gated(1, 5, 6),
    "mul-columns": _gated(1, 1, 6),
    "mul-ends": _gated(4, 1, 6),
    "mul-number": _gated(1, 1, 1),
    "slice": _slice([1, 0, 2], [1, 1, 1], [2, 7, 5]),
    "slice-strided": _slice([0, 1, 0], [1, 2, 2], [4, 3, 5]),
    "slice-one": _slice([3, 6, 8], [1, 1, 1], [1, 1, 1]),
    "slice-features": ((9,), lambda b: b.add("slice", start=[2], step=[3], shape=[3])),
    "pad-channels": _pad([2, 0, 0], [1, 0, 0]),
    "pad-pixels": _pad([0, 1, 2], [0, 3, 0], value=-1.5),
    "pad-nothing": _pad([0, 0, 0], [0, 0, 0], value=3.0),
    "transpose-channels-last": _transpose([4, 6, 5], [1, 2, 0], [6, 5, 4]),
    "transpose-shuffle": _transpose([2, 2, 30], [1, 0, 2], [4, 6, 5]),
    "transpose-depth-to-space": _transpose(
        [1, 2, 2, 6, 5], [0, 3, 1, 4, 2], [1, 12, 10]
    ),
    "transpose-to-features": _transpose([24, 5], [1, 0], [120]),
    "log_softmax": ((11,), lambda b: b.add("log_softmax")),
    "log_softmax-pixels": ((4, 3, 5), lambda b: b.add("log_softmax")),
    "concat": _branches("concat"),
    "concat-features": ((7,), lambda b: b.add("concat", "input", b.fc(3))),
    "flatten": ((3, 4, 5), lambda b: b.add("flatten")),
    "flatten-features": ((7,), lambda b: b.add("flatten")),
    "reshape": ((3, 4, 5), lambda b: b.add("reshape", shape=[10, 3, 2])),
    "reshape-to-image": ((12,), lambda b: b.add("reshape", shape=[3, 2, 2])),
    "batch_norm": ((3, 4, 5), lambda b: b.batch_norm()),
    "batch_norm-features": ((9,), lambda b: b.batch_norm(epsilon=1e-3)),
    "softmax": ((11,), lambda b: b.add("softmax")),
    "softmax-pixels": ((4, 3, 5), lambda b: b.add("softmax")),
    "softmax-single": ((1,), lambda b: b.add("softmax")),
    "dropout": ((3, 4, 5), lambda b: b.add("dropout", rate=0.5)),
}

# ONNX Runtime refuses even windows.
EVEN_LRN: dict[str, Case] = {f"lrn-{size}": _lrn(size) for size in (2, 4, 6, 14)}

JUDGED_BY_ONNX_RUNTIME: dict[str, Case] = {
    **{f"conv-{name}": case for name, case in CONVOLUTIONS.items()},
    **{f"fc-{name}": case for name, case in FULLY_CONNECTED.items()},
    **{f"max_pool-{name}": case for name, case in MAX_POOLS.items()},
    **{f"average_pool-{name}": case for name, case in _average(False).items()},
    **{f"average_pool-counted-{name}": case for name, case in _average(True).items()},
    **OTHERS,
}
ALL = JUDGED_BY_ONNX_RUNTIME | EVEN_LRN


def made(case: Case) -> tuple[Network, np.ndarray]:
    """Return the network of a case and three images."""
    shape, fill = case
    builder = NetworkBuilder(shape)
    fill(builder)
    return builder.build(), builder.images(3)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_engine_agrees_with_oracle(case: Case, isa: str) -> None:
    network, images = made(case)
    expected = execute(network, images)
    traced = network.compile(precision="exact", isa=isa).trace(images)
    errors = {name: relative_error(traced[name], expected[name]) for name in traced}
    assert list(traced) == [node.name for node in network.nodes]
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    "case", JUDGED_BY_ONNX_RUNTIME.values(), ids=JUDGED_BY_ONNX_RUNTIME
)
def test_onnx_runtime_agrees_with_oracle(case: Case, tmp_path: Path) -> None:
    network, images = made(case)
    file = tmp_path / "network.onnx"
    network.to_onnx(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {network.input_name: images})
    expected = execute(network, images)[network.output]
    assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_shapes_agree_with_oracle(case: Case) -> None:
    network, images = made(case)
    expected = {k: v.shape[1:] for k, v in execute(network, images).items()}
    assert dict(network.shapes) == expected


@pytest.mark.parametrize("scale", [1e4, 80.0, 1e-30])
def test_softmax_of_extreme_logits(scale: float, isa: str) -> None:
    builder = NetworkBuilder((10,))
    builder.add("softmax")
    network = builder.build()
    logits = np.float32(scale) * builder.images(5)
    probabilities = network.compile(precision="exact", isa=isa)(logits)
    assert relative_error(probabilities, execute(network, logits)["softmax0"]) < 1e-5


@pytest.mark.parametrize("operation", ["sigmoid", "tanh", "silu", "hard_swish"])
def test_saturated_activations(operation: str, isa: str) -> None:
    builder = NetworkBuilder((12,))
    builder.add(operation, name="out")
    network = builder.build()
    # Tails and tiny arguments, where careless formulas overflow or cancel.
    x = np.float32([-1e30, -1e4, -90, -20, -1e-6, -1e-30, 0, 1e-30, 1e-6, 20, 90, 1e4])
    out = network.compile(precision="exact", isa=isa)(x[None])
    expected = execute(network, x[None])["out"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-37)


NON_FINITE = {
    name: case
    for name, case in ALL.items()
    if not name.startswith(("conv-many", "fc-1023"))
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("case", NON_FINITE.values(), ids=NON_FINITE)
def test_non_finite_inputs_follow_ieee_arithmetic(case: Case, value: float) -> None:
    """NaN is never dropped, and nothing leaks into the batch's other images."""
    network, images = made(case)
    model = network.compile(precision="exact")
    clean = model(images)
    spoilt = images.copy()
    spoilt[1].flat[images[1].size // 2] = value
    output = model(spoilt)
    expected = execute(network, spoilt)[network.output]
    np.testing.assert_array_equal(output[[0, 2]], clean[[0, 2]])
    assert relative_error(output[1], expected[1]) < TOLERANCE
