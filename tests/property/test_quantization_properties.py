"""What holds for every quantiser, data set and problem."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcnn_py import ProductQuantizer
from qcnn_py.error_correction import CoordinateDescent
from qcnn_py.quadratics import MomentQuadratic, Quadratic, SampleQuadratic
from qcnn_py.statistics import SampleError, SecondMoments


@st.composite
def fitted(draw: st.DrawFn) -> tuple[ProductQuantizer, np.ndarray]:
    """A quantiser and its vectors, with repetitions and outliers."""
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 9)))
    elements = st.one_of(st.integers(-3, 3), st.floats(-1e6, 1e6, width=32))
    vectors = draw(hnp.arrays(np.float64, shape, elements=elements))
    quantizer = ProductQuantizer(
        n_centroids=draw(st.integers(1, shape[0])),
        subvector_dim=draw(st.integers(1, shape[1] + 1)),
        n_init=1,
        random_state=draw(st.integers(0, 3)),
    )
    return quantizer.fit(vectors), vectors


def subvectors(quantizer: ProductQuantizer, vectors: np.ndarray) -> np.ndarray:
    """Zero-padded sub-vectors, shape (n, n_subspaces, subvector_dim)."""
    n_subspaces, _, dsub = quantizer.codebooks_.shape
    padding = n_subspaces * dsub - vectors.shape[1]
    padded = np.pad(vectors, ((0, 0), (0, padding)))
    return padded.reshape(len(vectors), n_subspaces, dsub)


@given(fitted())
def test_codes_are_the_nearest_codewords(case) -> None:
    quantizer, vectors = case
    parts = subvectors(quantizer, vectors)
    differences = parts[:, :, None] - quantizer.codebooks_
    distances = (differences**2).sum(axis=3)
    codes = quantizer.encode(vectors)
    chosen = np.take_along_axis(distances, codes[:, :, None].astype(int), axis=2)
    # Distances are computed from products, whose rounding scales with the vectors.
    slack = 1e-12 * ((parts**2).sum(axis=2) + (quantizer.codebooks_**2).sum())
    assert (chosen[:, :, 0] <= distances.min(axis=2) + slack).all()


@given(fitted())
def test_shapes_and_padding(case) -> None:
    quantizer, vectors = case
    n_subspaces = -(-vectors.shape[1] // quantizer.subvector_dim)
    assert quantizer.codes_.shape == (len(vectors), n_subspaces)
    assert quantizer.codes_.max() < quantizer.n_centroids
    assert quantizer.decode(quantizer.codes_).shape == vectors.shape
    padding = n_subspaces * quantizer.subvector_dim - vectors.shape[1]
    if padding:
        assert (quantizer.codebooks_[-1, :, -padding:] == 0).all()
    assert np.isfinite(quantizer.codebooks_).all()


@given(fitted())
def test_decoded_vectors_stay_what_they_are(case) -> None:
    quantizer, vectors = case
    decoded = quantizer.decode(quantizer.encode(vectors))
    again = quantizer.decode(quantizer.encode(decoded))
    np.testing.assert_allclose(again, decoded, atol=1e-6 * np.abs(vectors).max())


@given(fitted())
def test_equal_seeds_give_equal_bits(case) -> None:
    quantizer, vectors = case
    again = ProductQuantizer(**quantizer.get_params()).fit(vectors)
    assert again.codebooks_.tobytes() == quantizer.codebooks_.tobytes()
    assert again.codes_.tobytes() == quantizer.codes_.tobytes()


@given(fitted())
def test_enough_codewords_lose_nothing(case) -> None:
    quantizer, vectors = case
    parts = subvectors(quantizer, vectors)
    decoded = subvectors(quantizer, quantizer.decode(quantizer.codes_))
    for m in range(parts.shape[1]):
        if len(np.unique(parts[:, m], axis=0)) <= quantizer.n_centroids:
            np.testing.assert_array_equal(decoded[:, m], parts[:, m])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A layer, samples of it, and settings of the descent."""
    groups, positions = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    channels, outputs = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    parts = draw(st.sampled_from([n for n in range(1, 10) if outputs % n == 0]))
    n_sets = draw(st.sampled_from([1, groups * parts]))
    most = outputs * positions * groups // n_sets
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    samples = draw(st.integers(1, 60))
    n_inputs = channels * positions
    return {
        "inputs": rng.standard_normal((samples, groups, n_inputs)),
        "targets": rng.standard_normal((samples, groups, outputs)) + 1,
        "original": rng.standard_normal((groups, n_inputs, outputs)),
        "options": {
            "n_positions": positions,
            "n_centroids": draw(st.integers(1, most)),
            "subvector_dim": draw(st.integers(1, channels + 1)),
            "n_sets": n_sets,
            "damping": draw(st.sampled_from([0.0, 0.01, 1.0])),
        },
    }


def moments_of(problem: dict[str, Any], samples: slice = slice(None)) -> SecondMoments:
    groups, n_inputs, n_outputs = problem["original"].shape
    moments = SecondMoments(groups, n_inputs, n_outputs)
    moments.add(problem["inputs"][samples], problem["targets"][samples])
    return moments


@given(problems(), st.booleans(), st.booleans())
def test_descent_never_climbs(
    problem: dict[str, Any], best_bias: bool, feedback: bool
) -> None:
    moments = moments_of(problem)
    error = (
        moments.error_with_best_bias()
        if best_bias
        else moments.error_with_bias(np.zeros_like(moments.sum_targets))
    )
    descent = CoordinateDescent(error, problem["original"], **problem["options"])
    if feedback:
        descent.seed_with_feedback(n_init=1, seed=0, rounds=2)
        seeded = descent.objective()
        descent.relax(rounds=2, temperature=0.2, seed=0)
        assert descent.objective() <= seeded
    else:
        random = np.random.default_rng(0)
        codes = random.integers(0, descent.codebooks.shape[2], descent.codes.shape)
        descent.start(random.standard_normal(descent.codebooks.shape), codes)
    trace = descent.run(max_rounds=6, tolerance=0)
    scale = moments.sum_squared_targets + (problem["original"] ** 2).sum()
    assert (np.diff(trace) <= 1e-9 * scale).all()
    assert min(trace) >= 0
    assert np.isfinite(descent.codebooks).all()
    assert descent.codes.min() >= 0
    assert descent.codes.max() < problem["options"]["n_centroids"]


@given(problems())
def test_both_forms_of_the_objective_agree(problem: dict[str, Any]) -> None:
    inputs, targets = problem["inputs"][:, 0], problem["targets"][:, 0]
    original = problem["original"][0].T[None].copy()
    moments = SecondMoments(1, inputs.shape[1], targets.shape[1])
    moments.add(inputs[:, None], targets[:, None])
    order = np.random.default_rng(0).permutation(inputs.shape[1])
    ordered = np.ascontiguousarray(original[:, :, order])
    forms: list[Quadratic] = [
        MomentQuadratic(
            moments.error_with_bias(np.zeros((1, targets.shape[1]))),
            ordered,
            order,
            0.1,
        ),
        SampleQuadratic(SampleError(inputs, targets), ordered, order, 0.1),
    ]
    eliminations = [form.eliminate() for form in forms]
    scale = 1e-8 * (1 + moments.sum_squared_targets)
    for start in range(0, inputs.shape[1], 3):
        rows = slice(start, min(start + 3, inputs.shape[1]))
        for what in ("block", "residual"):
            first, second = (getattr(form, what)(rows) for form in forms)
            np.testing.assert_allclose(first, second, atol=scale)
        planes = [elimination.plane(rows) for elimination in eliminations]
        for first, second in zip(*planes, strict=True):
            np.testing.assert_allclose(first, second, atol=scale)
        weight = planes[0][1] + 0.3
        for form, elimination in zip(forms, eliminations, strict=True):
            elimination.settle(rows, weight)
            form.move(rows, weight)
        np.testing.assert_allclose(*(form.value() for form in forms), atol=scale)


@given(problems(), st.integers(0, 60))
def test_moments_do_not_depend_on_shards(problem: dict[str, Any], cut: int) -> None:
    whole = moments_of(problem)
    merged = moments_of(problem, slice(cut))
    merged.merge(moments_of(problem, slice(cut, None)))
    assert merged.count == whole.count
    for name in ("sum_inputs", "sum_targets", "gram", "cross"):
        np.testing.assert_allclose(
            getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-9
        )


@given(problems())
def test_error_is_a_sum_of_squares(problem: dict[str, Any]) -> None:
    moments = moments_of(problem)
    weight = problem["original"]
    bias = np.ones_like(moments.sum_targets)
    response = np.einsum("ngp,gpo->ngo", problem["inputs"], weight) + bias
    error = np.linalg.norm(problem["targets"] - response)
    expected = error / np.linalg.norm(problem["targets"])
    np.testing.assert_allclose(
        moments.relative_error(weight, bias), expected, rtol=1e-6
    )
