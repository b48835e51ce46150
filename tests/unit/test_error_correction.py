"""Coordinate descent against brute force on explicit samples."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from qcnn_py.error_correction import CoordinateDescent
from qcnn_py.statistics import SecondMoments

CASES: dict[str, dict[str, Any]] = {
    "fc": {},
    "fc, padded": {"channels": 7},
    "conv": {"positions": 4},
    "conv, padded": {"positions": 4, "channels": 7},
    "conv, one subspace": {"positions": 6, "channels": 3, "outputs": 10},
    "groups, shared": {"groups": 3, "positions": 2},
    "groups, one set each": {"groups": 3, "positions": 2, "n_sets": 3},
    "groups, two sets each": {"groups": 2, "positions": 2, "n_sets": 4},
    "depthwise": {"groups": 6, "channels": 1, "outputs": 1, "positions": 9},
    "several windows": {"channels": 36, "positions": 4},
    "more inputs than samples": {"channels": 40, "samples": 12},
    "no damping": {"damping": 0.0, "positions": 2},
    "strong damping": {"damping": 10.0, "positions": 2},
    "dead input": {"dead": 2, "positions": 2, "damping": 0.0},
}


@dataclass
class Problem:
    """Samples (groups, n, p), targets (groups, n, outputs), weights to stay near."""

    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    positions: int
    n_sets: int
    damping: float

    def moments(self) -> SecondMoments:
        groups, _, n_inputs = self.inputs.shape
        moments = SecondMoments(groups, n_inputs, self.targets.shape[2])
        moments.add(self.inputs.swapaxes(0, 1), self.targets.swapaxes(0, 1))
        return moments

    def descent(self, n_centroids: int = 6, subvector_dim: int = 4):
        descent = CoordinateDescent(
            self.moments().error_with_best_bias(),
            self.weight,
            n_positions=self.positions,
            n_centroids=n_centroids,
            subvector_dim=subvector_dim,
            n_sets=self.n_sets,
            damping=self.damping,
        )
        descent.seed_with_feedback(n_init=1, seed=0, rounds=1)
        return descent

    def objective(self, weight: np.ndarray) -> float:
        """Damped squared response error, sample by sample."""
        centred = self.inputs - self.inputs.mean(axis=1, keepdims=True)
        targets = self.targets - self.targets.mean(axis=1, keepdims=True)
        ridge = max(self.damping, 1e-8) * (centred**2).sum(axis=1).mean(axis=1)
        return float(
            ((targets - centred @ weight) ** 2).sum()
            + (ridge[:, None, None] * (weight - self.weight) ** 2).sum()
        )

    def set_of(self, group: int, output: int) -> int:
        groups, _, outputs = self.weight.shape
        return (group * outputs + output) * self.n_sets // (groups * outputs)

    def decode(self, codebooks: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Weights (groups, p, outputs) that codes stand for, output by output."""
        weight = np.zeros_like(self.weight)
        groups, _, outputs = weight.shape
        subspace = np.arange(codes.shape[3])
        codes = codes.reshape(groups, outputs, *codes.shape[2:])
        for g, o in np.ndindex(groups, outputs):
            vectors = codebooks[self.set_of(g, o)][subspace, codes[g, o]].reshape(
                self.positions, -1
            )
            by_channel = vectors.T.ravel()  # what is left over is padding
            weight[g, :, o] = by_channel[: weight.shape[1]]
        return weight


def make_problem(
    *,
    groups: int = 1,
    channels: int = 8,
    positions: int = 1,
    outputs: int = 12,
    samples: int = 100,
    n_sets: int = 1,
    damping: float = 0.01,
    dead: int | None = None,
    seed: int = 0,
) -> Problem:
    rng = np.random.default_rng(seed)
    n_inputs = channels * positions
    # Correlated inputs that are never negative, as behind a ReLU.
    mixing = rng.standard_normal((groups, n_inputs, n_inputs)) / np.sqrt(n_inputs)
    mixing += 0.5
    noise = rng.standard_normal((groups, samples, n_inputs))
    inputs = np.maximum(noise @ mixing, 0)
    if dead is not None:
        inputs[:, :, dead] = 0
    weight = rng.standard_normal((groups, n_inputs, outputs))
    disturbance = rng.standard_normal((groups, samples, outputs))
    targets = inputs @ weight + 0.1 * disturbance + 3
    return Problem(inputs, targets, weight, positions, n_sets, damping)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(**request.param)


def test_objective_is_the_sum_over_samples(problem: Problem) -> None:
    descent = problem.descent()
    trace = descent.run(max_rounds=3, tolerance=0)
    weight = problem.decode(descent.codebooks, descent.codes)
    expected = problem.objective(weight)
    scale = problem.objective(np.zeros_like(weight))
    assert trace[-1] == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


def test_start_is_what_was_given(problem: Problem) -> None:
    descent = problem.descent()
    random = np.random.default_rng(0)
    codebooks = random.standard_normal(descent.codebooks.shape)
    codes = random.integers(0, codebooks.shape[2], descent.codes.shape)
    # One dimension of outputs, as codes are stored.
    descent.start(codebooks, codes.reshape(-1, *codes.shape[2:]))
    weight = problem.decode(codebooks, codes)
    assert descent.objective() == pytest.approx(problem.objective(weight), rel=1e-9)
    np.testing.assert_array_equal(problem.decode(descent.codebooks, codes), weight)


def test_objective_never_rises(problem: Problem) -> None:
    trace = problem.descent().run(max_rounds=20, tolerance=0)
    scale = problem.objective(np.zeros_like(problem.weight))
    assert (np.diff(trace) <= 1e-12 * scale).all()


def test_outcome_is_a_coordinatewise_optimum(problem: Problem) -> None:
    descent = problem.descent()
    trace = descent.run(max_rounds=60, tolerance=1e-8)
    codes, codebooks = descent.codes, descent.codebooks
    least = trace[-1] * (1 - 1e-5)
    rng = np.random.default_rng(0)
    places = list(np.ndindex(codes.shape))
    for i in rng.permutation(len(places))[:6]:
        for k in range(codebooks.shape[2]):
            changed = codes.copy()
            changed[places[i]] = k
            assert problem.objective(problem.decode(codebooks, changed)) >= least
    for _ in range(6):
        step = 1e-4 * rng.standard_normal(codebooks.shape)
        assert problem.objective(problem.decode(codebooks + step, codes)) >= least


@pytest.mark.parametrize("n_sets", [1, 2, 4])
@pytest.mark.parametrize("positions", [1, 5])
def test_codewords_solve_least_squares(positions: int, n_sets: int) -> None:
    # With one subspace the last step of a round solves for all codewords.
    problem = make_problem(groups=2, channels=3, positions=positions, n_sets=n_sets)
    descent = problem.descent(n_centroids=5)
    descent.run(max_rounds=2, tolerance=0)
    codebooks, codes = descent.codebooks, descent.codes
    n_centroids, dim = 5, 3
    groups, samples, _ = problem.inputs.shape
    codes = codes.reshape(groups, -1, positions, 1)
    centred = problem.inputs - problem.inputs.mean(axis=1, keepdims=True)
    targets = problem.targets - problem.targets.mean(axis=1, keepdims=True)
    ridge = np.sqrt(problem.damping * (centred**2).sum(axis=1).mean(axis=1))
    rows, values = [], []
    for g, o in product(range(groups), range(codes.shape[1])):
        design = np.zeros((samples, n_sets, n_centroids, dim))
        damping = np.zeros((positions, dim, n_sets, n_centroids, dim))
        for t, j in product(range(positions), range(dim)):
            word = (problem.set_of(g, o), codes[g, o, t, 0], j)
            design[(slice(None), *word)] += centred[g, :, j * positions + t]
            damping[(t, j, *word)] = ridge[g]
        weight = problem.weight[g, :, o].reshape(dim, positions).T
        rows += [design.reshape(samples, -1), damping.reshape(positions * dim, -1)]
        values += [targets[g, :, o], ridge[g] * weight.ravel()]
    solution, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values))
    expected = solution.reshape(n_sets, n_centroids, dim)
    used = np.zeros((n_sets, n_centroids), dtype=bool)
    for g, o in np.ndindex(codes.shape[:2]):
        used[problem.set_of(g, o), codes[g, o, :, 0]] = True
    np.testing.assert_allclose(
        codebooks[:, 0, :, :dim][used], expected[used], rtol=1e-6, atol=1e-8
    )


def test_tiny_problem_reaches_the_global_optimum() -> None:
    # Two outputs, two codewords, one input: few enough partitions to try them all.
    problem = make_problem(channels=1, outputs=4)
    descent = problem.descent(n_centroids=2, subvector_dim=1)
    best = min(
        split_objective(problem, np.array(labels))
        for labels in product(range(2), repeat=4)
    )
    assert descent.run(10, 0)[-1] == pytest.approx(best, rel=1e-6)


def split_objective(problem: Problem, labels: np.ndarray) -> float:
    """Objective with the best codeword for each set of outputs of a 1-input layer."""
    s = problem.inputs[0, :, 0] - problem.inputs[0, :, 0].mean()
    t = problem.targets[0] - problem.targets[0].mean(axis=0)
    ridge = problem.damping * (s @ s)
    wanted = (s @ t + ridge * problem.weight[0, 0]) / (s @ s + ridge)
    weight = np.array([wanted[labels == label].mean() for label in labels])
    return problem.objective(weight[None, None])


def test_padding_stays_zero() -> None:
    problem = make_problem(channels=7, positions=4)
    descent = problem.descent()
    descent.run(max_rounds=5, tolerance=0)
    assert (descent.codebooks[:, -1, :, 3:] == 0).all()


def test_unused_codewords_are_put_to_use() -> None:
    # Two distinct columns of weights leave codewords over, but the targets differ.
    problem = make_problem(positions=2)
    problem.weight[:, :, 1:] = problem.weight[:, :, :1]
    descent = problem.descent(n_centroids=8)
    descent.run(max_rounds=10, tolerance=0)
    for m in range(2):
        assert len(np.unique(descent.codes[..., m])) == 8


def test_a_codeword_for_every_subvector_is_exact() -> None:
    problem = make_problem(positions=2, outputs=3, damping=0.0)
    descent = problem.descent(n_centroids=6)
    trace = descent.run(max_rounds=100, tolerance=0)
    inputs, targets = problem.inputs[0], problem.targets[0]
    inputs = inputs - inputs.mean(axis=0)
    targets = targets - targets.mean(axis=0)
    solution, *_ = np.linalg.lstsq(inputs, targets)
    best = ((targets - inputs @ solution) ** 2).sum()
    assert trace[-1] == pytest.approx(best, rel=1e-2)


def test_constant_inputs_keep_the_weights() -> None:
    problem = make_problem()
    problem.inputs[:] = 1.0
    problem.targets[:] = 2.0
    descent = problem.descent(n_centroids=12)
    assert descent.run(max_rounds=5, tolerance=0)[-1] == pytest.approx(0, abs=1e-9)
    weight = problem.decode(descent.codebooks, descent.codes)
    np.testing.assert_allclose(weight, problem.weight)


def test_stops_at_the_tolerance() -> None:
    problem = make_problem(positions=4, outputs=64)
    trace = problem.descent(n_centroids=16).run(max_rounds=50, tolerance=0.01)
    falls = -np.diff(trace) / trace[:-1]
    assert (falls[:-1] > 0.01).all()
    assert falls[-1] <= 0.01


def test_no_rounds() -> None:
    problem = make_problem()
    assert len(problem.descent().run(max_rounds=0, tolerance=0)) == 1


def test_same_seed_same_bits() -> None:
    problem = make_problem(positions=4, groups=2)
    first, second = (problem.descent() for _ in range(2))
    assert first.run(5, 0) == second.run(5, 0)
    assert first.codebooks.tobytes() == second.codebooks.tobytes()
    assert first.codes.tobytes() == second.codes.tobytes()
