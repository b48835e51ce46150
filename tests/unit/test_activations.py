"""The quantisers of activations against vectors written out by hand, and JAX's form."""

from collections.abc import Callable
from math import inf, nan, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

import qcnn_py
from qcnn_py import activations, jax_activations
from qcnn_py.activations import linear, log2, sign
from qcnn_py.errors import ConfigError, QcnnError, ShapeError

FloatArray = npt.NDArray[np.float32]

# The float32 numbers around the square root of 2.
ROOT = np.float32(sqrt(2))
BELOW_ROOT = np.nextafter(ROOT, np.float32(0))


def check(got: FloatArray, wanted: list[float]) -> None:
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32(wanted))
    assert not np.signbit(got[got == 0]).any()


@pytest.mark.parametrize(
    ("bits", "low", "high", "x", "wanted"),
    [
        pytest.param(
            2,
            0,
            3,
            [-1, -0.0, 0, 0.4, 0.5, 0.6, 1.5, 2.5, 2.6, 3.5, 9],
            # Halves go to the even level.
            [0, 0, 0, 0, 0, 1, 2, 2, 3, 3, 3],
            id="levels 0 to 3",
        ),
        pytest.param(
            2,
            -1,
            0.5,
            [-2, -1, -0.76, -0.75, -0.74, -0.25, 0.25, 0.26, 0.5, 1],
            [-1, -1, -1, -1, -0.5, 0, 0, 0.5, 0.5, 0.5],
            id="levels -2 to 1 of a half",
        ),
        pytest.param(
            3,
            -8,
            6,
            [-9, -7, -5, -3, -1, 1, 3, 5, 7],
            [-8, -8, -4, -4, 0, 0, 4, 4, 6],
            id="halves of a step of 2",
        ),
        pytest.param(
            2,
            -1,
            1,
            [-5, -1, -0.9, -0.4, -0.3, 0, 0.3, 0.4, 1],
            # The limits are no multiples of 2/3, but levels.
            [-1, -1, -2 / 3, -2 / 3, 0, 0, 0, 2 / 3, 1],
            id="limits off the grid",
        ),
        pytest.param(
            8,
            0,
            255,
            [0.49, 127.5, 128.5, 254.5, 254.51, 1e30],
            [0, 128, 128, 254, 255, 255],
            id="8 bits",
        ),
        pytest.param(
            16, 0, 65535, [1.5, 65534.5, 65535.1], [2, 65534, 65535], id="16 bits"
        ),
        pytest.param(
            4, -8, 7, [inf, -inf, nan, 3e38, -3e38], [7, -8, nan, 7, -8], id="limits"
        ),
        pytest.param(
            1, -1, 1, [-inf, -2, -0.0, 0, 0.1], [-1, -1, 1, 1, 1], id="one bit is sign"
        ),
    ],
)
def test_linear(
    bits: int, low: float, high: float, x: list[float], wanted: list[float]
) -> None:
    check(linear(np.float32(x), bits, low, high), wanted)


@pytest.mark.parametrize(
    ("bits", "high", "x", "wanted"),
    [
        pytest.param(
            2, 1, [0, -0.0, 0.7, 0.71, 1, 5, -5], [0, 0, 0, 1, 1, 1, -1], id="ternary"
        ),
        pytest.param(
            3,
            4,
            [0.7, 0.71, 1.4, 1.42, 2.8, 2.83, 5.6, 5.7, -1.4, -1.42],
            [0, 1, 1, 2, 2, 4, 4, 4, -1, -2],
            id="levels 1, 2 and 4",
        ),
        pytest.param(
            3,
            1,
            [x / 8 for x in (ROOT, BELOW_ROOT, 2 * ROOT, 2 * BELOW_ROOT, -ROOT)],
            [0.25, 0, 0.5, 0.25, -0.25],
            id="powers of two times the root of two",
        ),
        pytest.param(
            4, 0.5, [inf, -inf, nan, 1e-45, -1e-38], [0.5, -0.5, nan, 0, 0], id="limits"
        ),
        pytest.param(
            8,
            1,
            [2.0**-126, ROOT * 2.0**-127, BELOW_ROOT * 2.0**-127, 2.0**-125],
            [2.0**-126, 2.0**-126, 0, 2.0**-125],
            id="down to the least normal number",
        ),
    ],
)
def test_log2(bits: int, high: float, x: list[float], wanted: list[float]) -> None:
    check(log2(np.float32(x), bits, high), wanted)


def test_sign() -> None:
    x = [-inf, -1, -1e-45, -0.0, 0, 1e-45, 3, inf, nan]
    check(sign(np.float32(x)), [-1, -1, -1, 1, 1, 1, 1, 1, nan])


def test_float64_and_lists_of_floats_are_taken() -> None:
    assert sign(np.array([[0.5]])).dtype == np.float32
    check(linear([0.2, 0.8], 2, 0, 3), [0, 1])
    assert qcnn_py.activations is activations


Quantizer = Callable[..., FloatArray]

NOISY: list[tuple[str, Quantizer, FloatArray]] = [
    ("linear", lambda x, r: linear(x, 2, -2, 1, r), np.linspace(-2, 1, 25)),
    ("8 bits", lambda x, r: linear(x, 8, 0, 1, r), np.linspace(0, 1, 25)),
    ("log2", lambda x, r: log2(x, 3, 1.0, r), np.linspace(-1, 1, 41)),
    ("sign", sign, np.linspace(-1, 1, 21)),
]


@pytest.mark.parametrize(
    ("quantize", "x"), [case[1:] for case in NOISY], ids=[case[0] for case in NOISY]
)
def test_noise_makes_it_unbiased(quantize: Quantizer, x: FloatArray) -> None:
    n = 20_000
    rng = np.random.default_rng(0)
    values = np.float32(x)
    draws = quantize(np.tile(values, (n, 1)), rng).astype(np.float64)
    levels = quantize(np.linspace(-4, 4, 20001), None)
    assert np.isin(draws, levels).all()
    # Without noise the mean would be off.
    assert np.abs(quantize(values, None) - values).max() > 1e-3
    error = draws.mean(axis=0) - values
    standard_error = draws.std(axis=0) / np.sqrt(n)
    # Four instead of three: there are many values.
    assert np.all(np.abs(error) <= 4 * standard_error + 1e-6)
    assert abs(error.mean()) <= 3 * np.sqrt(np.sum(standard_error**2)) / len(x)


@pytest.mark.parametrize("quantize", [case[1] for case in NOISY])
def test_noise_leaves_the_ends_and_nan(quantize: Quantizer) -> None:
    rng = np.random.default_rng(0)
    ends = np.tile(np.float32([-inf, inf, nan, -1e30, 1e30]), (1000, 1))
    np.testing.assert_array_equal(quantize(ends, rng), quantize(ends, None))


def test_noise_follows_its_generator() -> None:
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    for _, quantize, _ in NOISY:
        first, again, other = (
            quantize(x, np.random.default_rng(seed)) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear([0.0], 0, 0, 1), "bits is 0, expected 2 to 16"),
        (lambda: linear([0.0], 17, 0, 1), "bits is 17, expected 2 to 16"),
        (lambda: linear([0.0], True, 0, 1), "low is 0 and high is 1 with 1 bit"),
        (lambda: linear([0.0], 2.0, 0, 1), "bits is 2.0, expected an integer"),
        (lambda: linear([0.0], 2, 1, 1), "low is 1 and high is 1, expected"),
        (lambda: linear([0.0], 2, 2, 1), "low is 2 and high is 1, expected"),
        (lambda: linear([0.0], 2, nan, 1), "low is nan"),
        (lambda: linear([0.0], 2, 0, inf), "high is inf"),
        (lambda: linear([0.0], 2, -3e38, 3e38), "step of inf"),
        (lambda: linear([0.0], 8, 0, 1e-38), "normal float32 number"),
        (lambda: linear([0.0], 1, 0, 1), "one bit is the sign"),
        (lambda: log2([0.0], 1), "bits is 1, expected 2 to 8"),
        (lambda: log2([0.0], 9), "bits is 9, expected 2 to 8"),
        (lambda: log2([0.0], 4, 3.0), "high is 3.0, expected a power of two"),
        (lambda: log2([0.0], 4, -2.0), "high is -2.0, expected a power of two"),
        (lambda: log2([0.0], 4, 0.0), "high is 0.0, expected a power of two"),
        (lambda: log2([0.0], 4, nan), "high is nan, expected a power of two"),
        (lambda: log2([0.0], 8, 0.5), "levels from 2**-127 to 2**-1"),
    ],
)
def test_impossible_settings_are_refused(
    call: Callable[[], FloatArray], words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
        call()


@pytest.mark.parametrize("quantize", [case[1] for case in NOISY])
@pytest.mark.parametrize("x", [np.arange(3), np.array([True]), np.array([1j])])
def test_other_numbers_are_refused(
    quantize: Quantizer, x: npt.NDArray[np.generic]
) -> None:
    with pytest.raises(ShapeError, match=f"x has dtype {x.dtype}") as caught:
        quantize(x, None)
    assert isinstance(caught.value, QcnnError)


# The same quantiser by NumPy and by JAX, with the range of its gradient.
PAIRS = [
    pytest.param(
        lambda x: linear(x, 2, -2, 1),
        lambda x, key=None: jax_activations.linear(x, 2, -2, 1, key),
        (-2, 1),
        id="linear",
    ),
    pytest.param(
        lambda x: linear(x, 8, 0, 1.7),
        lambda x, key=None: jax_activations.linear(x, 8, 0, 1.7, key),
        (0, 1.7),
        id="linear 8 bits",
    ),
    pytest.param(
        lambda x: log2(x, 3, 2.0),
        lambda x, key=None: jax_activations.log2(x, 3, 2.0, key),
        (-2, 2),
        id="log2",
    ),
    pytest.param(
        lambda x: log2(x, 8, 1.0),
        lambda x, key=None: jax_activations.log2(x, 8, 1.0, key),
        (-1, 1),
        id="log2 8 bits",
    ),
    pytest.param(sign, jax_activations.sign, (-1, 1), id="sign"),
]


def grid() -> FloatArray:
    """Return ordinary values, and those where the quantisers change."""
    edges = [0, -0.0, inf, -inf, nan, 1e-30, 1, -1, 2, -2, 1.5, -1.5, 0.5, -0.5]
    edges += [
        s * r * 2.0**e
        for s in (1, -1)
        for r in (ROOT, BELOW_ROOT, 1)
        for e in range(-5, 3)
    ]
    random = np.random.default_rng(0).normal(size=4000)
    halves = np.arange(-300, 300) * np.float32(1.7 / 255) / 2
    return np.float32([*edges, *halves, *random])


@pytest.mark.parametrize(("reference", "quantize", "limits"), PAIRS)
@pytest.mark.parametrize("compiled", [False, True])
def test_jax_gives_the_same(
    reference: Quantizer,
    quantize: Callable[..., jax.Array],
    limits: tuple[float, float],
    compiled: bool,
) -> None:
    x = grid()
    function = jax.jit(quantize) if compiled else quantize
    np.testing.assert_array_equal(np.asarray(function(x)), reference(x))


@pytest.mark.parametrize(("reference", "quantize", "limits"), PAIRS)
def test_gradients_pass_straight_through_in_the_range(
    reference: Quantizer,
    quantize: Callable[..., jax.Array],
    limits: tuple[float, float],
) -> None:
    x = np.float32(np.linspace(-3, 3, 121))
    weights = jnp.arange(1.0, 122)
    low, high = np.float32(limits)
    wanted = np.where((low <= x) & (x <= high), weights, 0)
    gradient = jax.jit(jax.grad(lambda x, *key: jnp.sum(weights * quantize(x, *key))))
    for key in ((), (jax.random.key(0),)):
        np.testing.assert_array_equal(np.asarray(gradient(x, *key)), wanted)


@pytest.mark.parametrize(("reference", "quantize", "limits"), PAIRS)
def test_jax_noise_is_unbiased(
    reference: Quantizer,
    quantize: Callable[..., jax.Array],
    limits: tuple[float, float],
) -> None:
    x = np.linspace(*limits, 21).astype(np.float32)
    n = 20_000
    noisy = jax.jit(quantize)(jnp.tile(x, (n, 1)), jax.random.key(0))
    draws = np.asarray(noisy, dtype=np.float64)
    error = draws.mean(axis=0) - x
    standard_error = draws.std(axis=0) / np.sqrt(n)
    assert np.all(np.abs(error) <= 4 * standard_error + 1e-6)
    assert np.isin(draws, reference(np.float32(np.linspace(-4, 4, 20001)))).all()
