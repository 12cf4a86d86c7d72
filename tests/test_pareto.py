"""Pareto tools against scipy, moocore and hand computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dysigma import pareto


def jacobian(kind: str, rng: np.random.Generator, k: int, p: int) -> np.ndarray:
    rows = rng.normal(size=(k, p))
    if kind == "scaled":
        rows *= 10 ** rng.uniform(-3, 3, size=(k, 1))
    elif kind == "aligned":
        rows += 2 * rng.normal(size=p)
    elif kind == "repeated":
        rows[-1] = rows[0]
    elif kind == "parallel":
        rows = np.outer(rng.uniform(0.5, 2, size=k), rows[0])
    return rows


@pytest.mark.parametrize(
    ("gramian", "weights"),
    [
        ([[4.0]], [1]),
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        # K = 2: w_1 = clip((G22 - G12) / (G11 + G22 - 2 G12), 0, 1); by hand 4/5, then clipped.
        ([[1.0, 0.0], [0.0, 4.0]], [0.8, 0.2]),
        ([[1.0, 1.5], [1.5, 4.0]], [1, 0]),
        # Three unit vectors at 120 degrees cancel.
        ([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]], [1 / 3, 1 / 3, 1 / 3]),
        # A zero gradient is stationary by itself.
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [0, 0.5, 0.5]),
    ],
)
def test_min_norm_by_hand(gramian, weights):
    np.testing.assert_allclose(pareto.min_norm_weights(gramian), weights, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "scaled", "aligned", "repeated", "parallel"])
@pytest.mark.parametrize("k", [2, 5, 20, 64])
def test_min_norm_is_optimal(kind, k):
    """Optimality on the simplex: no gradient has a smaller product with the combination than its squared norm."""
    rng = np.random.default_rng(k)
    for p in (1, 3, k, 3 * k):
        rows = jacobian(kind, rng, k, p)
        gramian = rows @ rows.T
        weights = pareto.min_norm_weights(gramian)
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
        shortest = weights @ rows
        assert shortest @ shortest - (rows @ shortest).min() <= 1e-6 * gramian.diagonal().min()


@pytest.mark.parametrize("kind", ["condition", "spread", "repeated", "cancelling"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_min_norm_is_optimal_on_hard_scales(kind, scale):
    """No convex combination is shorter, up to rounding: neither the shortest gradient nor any mixture."""
    rng = np.random.default_rng(7)
    for k in (2, 9, 63):
        rows = rng.normal(size=(k, 2 * k))
        if kind == "condition":  # Gramians of condition 1e12
            left, _, right = np.linalg.svd(rows, full_matrices=False)
            rows = left * np.logspace(0, -6, k) @ right
        elif kind == "spread":
            rows *= 10 ** rng.uniform(-8, 8, size=(k, 1))
        elif kind == "repeated":
            rows[k // 2 :] = rows[: k - k // 2]
        else:
            rows = np.vstack([rows, -rng.dirichlet(np.ones(k)) @ rows])
        rows = rows * scale
        weights = pareto.min_norm_weights(rows @ rows.T)
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
        least = ((weights @ rows) ** 2).sum()
        shortest_square = (rows**2).sum(1).min()
        assert least <= shortest_square * (1 + 1e-12)
        if kind == "cancelling":
            assert least < 1e-15 * shortest_square
        for _ in range(50):  # no mixture near the solution, or with any other, is shorter
            other = rng.dirichlet(np.full(len(rows), rng.choice([0.05, 1.0])))
            for share in (1e-6, 1e-3, 0.1):
                mixed = (1 - share) * weights + share * other
                assert ((mixed @ rows) ** 2).sum() >= least - 1e-12 * shortest_square


def test_min_norm_shares_the_weight_between_zero_gradients():
    rows = np.random.default_rng(0).normal(size=(5, 9))
    rows[[1, 3]] = 0
    assert pareto.min_norm_weights(rows @ rows.T).tolist() == [0, 0.5, 0, 0.5, 0]


def test_min_norm_agrees_with_scipy():
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    for kind in ("plain", "aligned"):
        rows = jacobian(kind, rng, 8, 6)
        gramian = rows @ rows.T
        solution = minimize(
            lambda w, g=gramian: w @ g @ w,
            np.full(8, 1 / 8),
            jac=lambda w, g=gramian: 2 * g @ w,
            bounds=[(0, 1)] * 8,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        weights = pareto.min_norm_weights(gramian)
        assert weights @ gramian @ weights <= solution.fun + 1e-9
        assert weights @ gramian @ weights == pytest.approx(solution.fun, abs=1e-6)


def test_min_norm_does_not_depend_on_the_unit():
    rows = jacobian("aligned", np.random.default_rng(3), 6, 9)
    weights = pareto.min_norm_weights(rows @ rows.T)
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(
            pareto.min_norm_weights(scale * rows @ rows.T), weights, atol=1e-9
        )


def test_tensors_in_tensors_out():
    gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    weights = pareto.min_norm_weights(gramian)
    assert isinstance(weights, torch.Tensor) and weights.dtype == torch.float64
    assert isinstance(pareto.min_norm_weights(gramian.numpy()), np.ndarray)
    assert pareto.non_dominated(torch.tensor([[1.0, 2.0], [2.0, 2.0]])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "project_psd"),
        ([[-1.0, 0.0], [0.0, 1.0]], "project_psd"),
        ([[1.0, 0.5], [-0.5, 1.0]], "project_psd"),
        ([[1.0, float("nan")], [0.0, 1.0]], "NaN"),
        ([[1.0, 0.0]], r"\(K, K\)"),
        (np.eye(65), "64"),
    ],
)
def test_bad_gramians_are_refused(gramian, message):
    with pytest.raises(ValueError, match=message):
        pareto.min_norm_weights(gramian)


def test_project_psd_is_the_nearest():
    """By hand: [[1, 2], [2, 1]] has eigenvalues 3 and -1; dropping -1 leaves 1.5 everywhere."""
    np.testing.assert_allclose(pareto.project_psd([[1.0, 2.0], [2.0, 1.0]]), np.full((2, 2), 1.5))
    rows = np.random.default_rng(0).normal(size=(4, 9))
    np.testing.assert_allclose(pareto.project_psd(rows @ rows.T), rows @ rows.T, atol=1e-12)


def test_stationarity_of_built_jacobians():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(6, 40))
    mix = rng.dirichlet(np.ones(6))
    rows[-1] = -(mix[:-1] @ rows[:-1]) / mix[-1]  # now mix @ rows = 0
    assert pareto.stationarity(rows @ rows.T) < 1e-7
    shift = np.zeros(40)
    shift[0] = 10
    rows[:, 0] = 0
    assert (
        pareto.stationarity((rows + shift) @ (rows + shift).T) >= 10
    )  # every combination has length >= 10
    np.testing.assert_allclose(
        pareto.stationarity(4 * np.eye(9)), 2 / 3
    )  # K orthogonal gradients of length 2


def test_noise_keeps_stationarity_away_from_zero():
    """At a stationary point, gradient-to-noise ratio 1: the squared value reads 1 / K."""
    rng = np.random.default_rng(2)
    k, p, repeats = 10, 4000, 20
    gradients = rng.normal(size=(k, p)) / np.sqrt(p)
    gradients -= gradients.mean(0)
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    squares = []
    for _ in range(repeats):
        noisy = gradients + rng.normal(size=(k, p)) / np.sqrt(p)
        squares.append(pareto.stationarity(noisy @ noisy.T) ** 2)
    assert pareto.stationarity(gradients @ gradients.T) < 0.01
    assert np.mean(squares) == pytest.approx(1 / k, rel=0.15)


def test_non_dominated_agrees_with_moocore():
    moocore = pytest.importorskip("moocore")
    rng = np.random.default_rng(0)
    for m in (2, 3, 5):
        for points in (
            rng.random((80, m)),
            rng.integers(0, 4, (60, m)).astype(float),
        ):  # the second holds ties and copies
            expected = moocore.is_nondominated(points, keep_weakly=True)
            np.testing.assert_array_equal(pareto.non_dominated(points), expected)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_agrees_with_moocore(m):
    moocore = pytest.importorskip("moocore")
    rng = np.random.default_rng(m)
    sphere = rng.random((60, m))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    for points, corner in (
        (sphere, 1.1),
        (sphere, 0.8),
        (rng.integers(0, 5, (40, m)).astype(float), 3.0),
    ):
        expected = moocore.hypervolume(points, ref=[corner] * m)
        assert pareto.hypervolume(points, [corner] * m) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_by_hand():
    assert pareto.hypervolume([[1, 3], [2, 1]], [4, 4]) == 3 + 6 - 2
    assert pareto.hypervolume([[0, 0, 0]], [1, 2, 3]) == 6
    assert pareto.hypervolume([[4, 0], [5, 5]], [4, 4]) == 0  # on the boundary, and beyond


@pytest.mark.parametrize(
    ("points", "reference", "message"),
    [
        ([[1, float("nan")]], [2, 2], "not finite"),
        ([[1, 1]], [2, 2, 2], "reference"),
        ([[1, 1]], [2, float("inf")], "finite reference"),
        ([[1.0]], [2], "2 to 4"),
        ([[1] * 5], [2] * 5, "2 to 4"),
        ([1, 2], [2, 2], "one row per point"),
    ],
)
def test_bad_points_are_refused(points, reference, message):
    with pytest.raises(ValueError, match=message):
        pareto.hypervolume(points, reference)
