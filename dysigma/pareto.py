"""Pareto tools in float64: the min-norm point, stationarity, dominance, hypervolume. Every objective is minimised.

Computed on the CPU in numpy; the result is a tensor on the argument's device if that was a tensor, else an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _array(values: Any) -> np.ndarray:
    return np.asarray(
        values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64
    )


def _like(result: np.ndarray, argument: Any) -> Any:
    return torch.from_numpy(result).to(argument.device) if isinstance(argument, Tensor) else result


def _square(gramian: Any) -> np.ndarray:
    matrix = _array(gramian)
    if matrix.ndim != 2 or len(set(matrix.shape)) != 1 or not 1 <= len(matrix) <= 64:
        raise ValueError(f"gramian must be (K, K) with 1 <= K <= 64; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"gramian holds {(~np.isfinite(matrix)).sum()} entries that are NaN or infinite"
        )
    return matrix


def _points(points: Any) -> np.ndarray:
    values = _array(points)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(
            f"points must be (n, m), one row per point and one column per objective; got {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"points in rows {np.flatnonzero(~np.isfinite(values).all(1))[:5]} are not finite: leave them out"
        )
    return values


def project_psd(gramian: Any) -> Any:
    """The nearest positive semi-definite matrix in Frobenius norm: negative eigenvalues set to 0. (K, K) to (K, K)."""
    values, vectors = np.linalg.eigh(_square(gramian))
    return _like((vectors * np.maximum(values, 0)) @ vectors.T, gramian)


def min_norm_weights(gramian: Any) -> Any:
    """Weights on the simplex that minimise w' G w: the shortest convex combination of gradients (Désidéri 2012).

    gramian: (K, K) inner products of gradients, K <= 64. Returns (K,) float64, non-negative, summing to 1. Exact up
    to rounding, for gradient norms of very different sizes too: an active-set method (Lawson, Hanson 1974) on the
    cosines. If some gradients are exactly zero they share the weight. Raises ValueError for a matrix that is not
    symmetric and positive semi-definite.
    """
    matrix = _square(gramian)
    squares = np.diag(matrix)
    if (squares == 0).any():
        return _like((squares == 0) / (squares == 0).sum(), gramian)
    norms = np.sqrt(np.abs(squares))
    cosine = matrix / np.outer(norms, norms)
    lowest = np.linalg.eigvalsh(cosine)[0] if (squares > 0).all() else -np.inf
    # What was computed in float32 is symmetric and semi-definite to float32 only.
    tolerance = len(matrix) * (
        1e-8 if "float64" in str(getattr(gramian, "dtype", "float64")) else 1e-3
    )
    if np.abs(cosine - cosine.T).max() > tolerance or lowest < -tolerance:
        raise ValueError(
            "gramian must be symmetric and positive semi-definite; its cosine matrix is not (lowest eigenvalue "
            f"{lowest:.2g}). A debiased estimate need not be: pass project_psd(gramian)"
        )
    # Up to a factor, the minimiser of u'Cu + (1 - d'u)^2 over u >= 0 is that of u'Cu over d'u = 1.
    inverse_norms = norms.min() / norms
    hessian = cosine + np.outer(inverse_norms, inverse_norms)
    weights, active = np.zeros(len(matrix)), np.zeros(len(matrix), dtype=bool)
    for _ in range(10 * len(matrix)):
        descent = np.where(active, 0, inverse_norms - hessian @ weights)
        entering = descent.argmax()
        if descent[entering] <= 1e-13:
            break
        active[entering] = True
        while True:
            candidate = np.zeros(len(matrix))
            candidate[active] = np.linalg.lstsq(
                hessian[active][:, active], inverse_norms[active], rcond=None
            )[0]
            blocking = active & (candidate <= 0)
            if not blocking.any():
                break
            steps = np.where(blocking, weights / np.maximum(weights - candidate, 1e-300), np.inf)
            weights = weights + steps.min() * (candidate - weights)
            active[steps.argmin()] = False
        weights = candidate
        if not active[entering]:
            break  # turned back at once: what descent was left is rounding
    return _like(weights * inverse_norms / (weights @ inverse_norms), gramian)


def stationarity(gramian: Any, held_out: Any = None) -> float:
    """How far from Pareto stationary: the norm of the shortest convex combination of gradients; 0 iff stationary.

    On its own, a noisy gramian can never read 0: its diagonal holds the noise, and the weights are fitted to it. With
    held_out, an unbiased Gramian from independent samples, the weights come from gramian (projected to be positive
    semi-definite) and are judged on held_out: sign(v) sqrt|v| of v = w' held_out w, whose expectation has no noise
    floor. A negative value means indistinguishable from 0.
    """
    weights = _array(min_norm_weights(gramian if held_out is None else project_psd(gramian)))
    square = weights @ _square(gramian if held_out is None else held_out) @ weights
    return float(np.sign(square) * np.sqrt(abs(square)))


def non_dominated(points: Any) -> Any:
    """Which points no other point dominates (no worse in every objective, better in one): (n, m) to (n,) bool.

    Equal points do not dominate each other, so all copies stay. Raises ValueError if a value is not finite.
    """
    values = _points(points)
    dominated = [((values <= p).all(1) & (values < p).any(1)).any() for p in values]
    return _like(~np.array(dominated, dtype=bool), points)


def _volume(points: np.ndarray, reference: np.ndarray) -> float:
    points = points[np.argsort(points[:, -1])]
    depths = np.diff(points[:, -1], append=reference[-1])
    if points.shape[1] == 2:
        return float(depths @ (reference[0] - np.minimum.accumulate(points[:, 0])))
    return sum(
        d * _volume(points[: i + 1, :-1], reference[:-1]) for i, d in enumerate(depths) if d > 0
    )


def hypervolume(points: Any, reference: Any) -> float:
    """Volume dominated by points (n, m) and bounded by reference (m,); exact, 2 <= m <= 4, larger is better.

    A sweep for m = 2, slices of sweeps above (cost n^(m-1)). Points not strictly below the reference add nothing.
    Raises ValueError for other m, a reference of another length, values that are not finite.
    """
    values, corner = _points(points), _array(reference)
    if (
        values.shape[1] not in (2, 3, 4)
        or corner.shape != values.shape[1:]
        or not np.isfinite(corner).all()
    ):
        raise ValueError(
            f"need points (n, m), m from 2 to 4, and a finite reference (m,); got {values.shape}, {corner}"
        )
    values = values[(values < corner).all(1)]
    return _volume(values[non_dominated(values)], corner)


def knee(points: Any) -> int:
    """Index of the knee of a front: the point furthest below the plane through the ends (Das 1999).

    points: (n, m). Objectives are scaled so that the non-dominated points span [0, 1] in each.
    """
    values = _points(points)
    front = values[non_dominated(values)]
    span = np.ptp(front, axis=0)
    return int((values / np.where(span > 0, span, 1)).sum(1).argmin())


def attainment(fronts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Empirical attainment of S two-objective fronts, one per seed (Grunert da Fonseca, Fonseca, Hall 2001).

    fronts: S point sets (n_s, 2). Returns x (G,), every first objective in order, and y (S, G): y[k - 1] is the second
    objective that at least k of the S seeds reach with first objective <= x, +inf where fewer do. Draw y[k - 1] with
    ``step(x, y, where="post")``; the middle k is the median front.
    """
    seeds = [_points(front) for front in fronts]
    if not seeds or any(front.shape[1] != 2 for front in seeds):
        raise ValueError(
            f"attainment takes at least one front, each (n, 2); got {[front.shape for front in seeds]}"
        )
    x = np.unique(np.concatenate([front[:, 0] for front in seeds]))
    best = [np.where(front[:, :1] <= x, front[:, 1:], np.inf).min(0) for front in seeds]
    return x, np.sort(best, axis=0)
