"""Quantised activations at the edges of their levels, to the bit.

The engine, the oracle, NumPy, JAX and ONNX Runtime get the same numbers: around every
threshold, at both ends, zeros, infinities, NaN.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
import pytest
from numpy_executor import execute
from random_networks import NetworkBuilder

from qcnn_py import ModelFormatError, Network, Node, activations
from qcnn_py.jax_graph import values_function

SQRT_2 = np.sqrt(np.float32(2))

QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear-2": ("quantize_linear", {"bits": 2, "low": -1.0, "high": 1.0}),
    "linear-3-uneven": ("quantize_linear", {"bits": 3, "low": -0.3, "high": 1.7}),
    "linear-4-positive": ("quantize_linear", {"bits": 4, "low": 0.5, "high": 2.0}),
    "linear-8": ("quantize_linear", {"bits": 8, "low": 0.0, "high": 6.0}),
    "linear-8-integers": ("quantize_linear", {"bits": 8, "low": 0.0, "high": 255.0}),
    "linear-16": ("quantize_linear", {"bits": 16, "low": -2.0, "high": 3.0}),
    "log2-2": ("quantize_log2", {"bits": 2, "high": 1.0}),
    "log2-3": ("quantize_log2", {"bits": 3, "high": 0.5}),
    "log2-4": ("quantize_log2", {"bits": 4, "high": 8.0}),
    "log2-8-smallest": ("quantize_log2", {"bits": 8, "high": 1.0}),
    "log2-8-largest": ("quantize_log2", {"bits": 8, "high": 2.0**127}),
    "sign": ("sign", {}),
}


def network_of(operation: str, attributes: dict[str, Any], size: int) -> Network:
    builder = NetworkBuilder((size,))
    builder.add(operation, name="out", **attributes)
    return builder.build()


def edges(operation: str, attributes: dict[str, Any]) -> np.ndarray:
    """Numbers around which a quantiser does something, and their neighbours."""
    marks = [0.0, np.inf, 1.0, 0.5, 1e-30, 1e30, np.finfo(np.float32).tiny]
    if operation == "quantize_linear":
        low, high = np.float32(attributes["low"]), np.float32(attributes["high"])
        n_steps = 2 ** attributes["bits"] - 1
        step = (high - low) / np.float32(n_steps)
        halves = np.arange(-2 * n_steps - 3, 2 * n_steps + 4) / 2
        if n_steps > 1000:
            halves = np.concatenate([halves[:50], halves[::997], halves[-50:]])
        marks += [low, high, *(halves * step)]
    if operation == "quantize_log2":
        exponents = np.arange(-150, 128)
        marks += [*np.ldexp(1.0, exponents), *np.ldexp(np.float64(SQRT_2), exponents)]
    with np.errstate(over="ignore"):
        marks = np.float32(marks)
        marks = np.concatenate([marks, -marks])
        around = [np.nextafter(marks, np.float32(to)) for to in (-np.inf, np.inf)]
    return np.concatenate([marks, *around, np.float32([np.nan, -np.nan])])


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal, zeros of the same sign; any NaN is as good as another."""
    expected = expected.astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = np.where(nan, 0, actual.view(np.uint32))
    np.testing.assert_array_equal(bits, np.where(nan, 0, expected.view(np.uint32)))


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_engine_has_the_bits_of_numpy(
    quantizer: tuple[str, dict[str, Any]], isa: str
) -> None:
    x = edges(*quantizer)[None]
    network = network_of(*quantizer, x.size)
    expected = execute(network, x)["out"]
    assert_same_bits(network.compile(isa=isa)(x), expected)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_onnx_runtime_gives_the_same_numbers(
    quantizer: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    x = edges(*quantizer)[None]
    network = network_of(*quantizer, x.size)
    network.to_onnx(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "network.onnx", providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {"input": x})
    np.testing.assert_array_equal(output, execute(network, x)["out"])


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_jax_gives_the_same_numbers(quantizer: tuple[str, dict[str, Any]]) -> None:
    x = edges(*quantizer)[None]
    # XLA takes subnormal numbers for zeros.
    x = x[np.isnan(x) | (np.abs(x) >= np.finfo(np.float32).tiny)][None]
    network = network_of(*quantizer, x.size)
    output = jax.jit(values_function(network))({}, x, None)["out"]
    np.testing.assert_array_equal(output, execute(network, x)["out"])


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_the_python_functions_give_the_same_numbers(
    quantizer: tuple[str, dict[str, Any]],
) -> None:
    operation, attributes = quantizer
    x = edges(*quantizer)[None]
    function = getattr(activations, operation.removeprefix("quantize_"))
    expected = network_of(*quantizer, x.size).compile()(x)
    got = function(x, **attributes)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


# Written out by hand from the formulas.
VECTORS: dict[str, list[tuple[float, float]]] = {
    # Steps of 2/3; halves go to the even step, the ends are cut off.
    "linear-2": [(0.3, 0), (0.35, 2 / 3), (0.99, 2 / 3), (1.01, 1), (9, 1), (-9, -1)],
    "linear-8-integers": [(0.5, 0), (1.5, 2), (2.5, 2), (254.5, 254), (300, 255)],
    # Powers 2, 4, 8 … 1/8; sqrt(1/2) / 8 is 0.0884.
    "log2-4": [
        (0.088, 0),
        (0.089, 0.125),
        (-0.17, -0.125),
        (-0.18, -0.25),
        (1.41, 1),
        (1.42, 2),
        (100, 8),
        (-np.inf, -8),
    ],
    # One power only.
    "log2-2": [(0.7, 0), (0.71, 1), (-0.71, -1), (5, 1)],
    "sign": [(0.0, 1), (-0.0, 1), (1e-45, 1), (-1e-45, -1), (-np.inf, -1)],
}


@pytest.mark.parametrize("name", VECTORS)
def test_written_out_values(name: str, isa: str) -> None:
    x, expected = np.float32(VECTORS[name]).T
    network = network_of(*QUANTIZERS[name], x.size)
    np.testing.assert_array_equal(network.compile(isa=isa)(x[None])[0], expected)


def test_thresholds_of_log2_go_up() -> None:
    threshold = np.float32([[SQRT_2, -SQRT_2, SQRT_2 / 2]])
    below = np.nextafter(threshold, np.float32(0))
    model = network_of("quantize_log2", {"bits": 3, "high": 4.0}, 3).compile()
    np.testing.assert_array_equal(model(threshold), [[2, -2, 1]])
    np.testing.assert_array_equal(model(below), [[1, -1, 0]])


@pytest.mark.parametrize(
    ("operation", "attributes", "message"),
    [
        ("quantize_linear", {"bits": 1, "low": 0, "high": 1}, "bits is 1, .*sign"),
        ("quantize_linear", {"bits": 17, "low": 0, "high": 1}, "bits is 17, expected"),
        ("quantize_linear", {"bits": 8, "low": 1, "high": 1}, "low is 1 and high is 1"),
        ("quantize_linear", {"bits": 8, "low": 0}, "missing field `high`"),
        ("quantize_log2", {"bits": 9, "high": 1}, "bits is 9, expected 2..=8"),
        ("quantize_log2", {"bits": 3, "high": 3}, "high is 3, expected a power of two"),
        ("quantize_log2", {"bits": 8, "high": 0.5}, r"from 2\^0 on with 8 bits"),
        ("quantize_log2", {"bits": 3, "high": 1, "low": 0}, "unknown field `low`"),
        ("sign", {"bits": 1}, "unknown field `bits`"),
    ],
)
def test_bad_attributes_are_named(
    operation: str, attributes: dict[str, Any], message: str
) -> None:
    node = Node("out", operation, ("input",), attributes)
    with pytest.raises(ModelFormatError, match=message):
        Network([node], {}, (4,))
