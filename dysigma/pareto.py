"""Pareto tools in float64: the min-norm point, stationarity, dominance, hypervolume. Every objective is minimised.

Computed on the CPU in numpy. The result is a tensor on the argument's device if that was a tensor, else an array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

MAX_OBJECTIVES = 64

Values = ArrayLike | Tensor

Array = NDArray[np.float64]


def _array(values: Values) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _like(result: NDArray[Any], argument: Values) -> Any:
    if isinstance(argument, Tensor):
        return torch.from_numpy(result).to(argument.device)
    return result


def _square(gramian: Values) -> Array:
    matrix = _array(gramian)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or not 1 <= len(matrix) <= MAX_OBJECTIVES:
        raise ValueError(
            f"gramian must be (K, K) with 1 <= K <= {MAX_OBJECTIVES}; got shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"gramian holds {(~np.isfinite(matrix)).sum()} entries that are NaN or infinite"
        )
    return matrix


def _points(points: Values) -> Array:
    values = _array(points)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(
            f"points must be (n, m), one row per point and one column per objective; got {values.shape}"
        )
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise ValueError(
            f"points in rows {np.flatnonzero(~finite)[:5]} are not finite: leave them out"
        )
    return values


def project_psd(gramian: Values) -> Any:
    """The nearest positive semi-definite matrix in Frobenius norm (Higham 1988): (K, K) to (K, K).

    Negative eigenvalues are set to 0. Raises ValueError unless gramian is square and finite.

    >>> project_psd([[1.0, 2.0], [2.0, 1.0]]).round(6)
    array([[1.5, 1.5],
           [1.5, 1.5]])
    """
    values, vectors = np.linalg.eigh(_square(gramian))
    return _like((vectors * np.maximum(values, 0)) @ vectors.T, gramian)


def _cosines(matrix: Array, tolerance: float) -> Array:
    """The cosine matrix of a Gramian with a positive diagonal; ValueError unless it is one, up to tolerance."""
    norms = np.sqrt(np.abs(np.diag(matrix)))
    cosines = matrix / np.outer(norms, norms)
    lowest = -np.inf
    if (np.diag(matrix) > 0).all():
        lowest = np.linalg.eigvalsh(cosines)[0]
    if np.abs(cosines - cosines.T).max() > tolerance or lowest < -tolerance:
        raise ValueError(
            "gramian must be symmetric and positive semi-definite; its cosine matrix is not (lowest eigenvalue "
            f"{lowest:.2g}). A debiased estimate need not be: pass project_psd(gramian)"
        )
    return cosines


def min_norm_weights(gramian: Values) -> Any:
    """Weights on the simplex that minimise w' G w: the shortest convex combination of gradients (Désidéri 2012).

    gramian: (K, K) inner products of gradients, K <= 64. Returns (K,) float64, non-negative, summing to 1. Exact up to
    rounding, also for gradient norms of very different sizes. If some gradients are exactly zero they share the
    weight; where several mixtures are equally short, one of them is returned. Raises ValueError for a matrix that is
    not symmetric and positive semi-definite.

    >>> min_norm_weights([[1.0, 0.0], [0.0, 4.0]])
    array([0.8, 0.2])
    """
    from scipy.optimize import nnls

    matrix = _square(gramian)
    squares = np.diag(matrix)
    zero = squares == 0
    if zero.any():
        return _like(zero / zero.sum(), gramian)
    # What was computed in float32 is symmetric and semi-definite to float32 only.
    is_double = "float64" in str(getattr(gramian, "dtype", "float64"))
    cosines = _cosines(matrix, tolerance=len(matrix) * (1e-8 if is_double else 1e-3))

    # With w = u / |g|, w' G w = u' C u, C the cosine matrix, and sum(w) = d' u, d = min|g| / |g| up to a factor.
    # Up to a factor, the minimiser of u' C u + (1 - d' u)^2 over u >= 0 is that of u' C u where d' u = 1. This is the
    # non-negative least squares problem |A u - b|^2 with the rows of A a root of C, and d.
    norms = np.sqrt(squares)
    inverse_norms = norms.min() / norms
    values, vectors = np.linalg.eigh(cosines)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    system = np.vstack([root, inverse_norms])
    target = np.zeros(len(system))
    target[-1] = 1
    solution, _ = nnls(system, target, maxiter=100 * len(matrix))
    weights = solution * inverse_norms
    return _like(weights / weights.sum(), gramian)


def stationarity(gramian: Values) -> float:
    """How far from Pareto stationary: the norm of the shortest convex combination of gradients; 0 iff stationary.

    A noisy gramian can never read 0: its diagonal holds the noise, and the weights are fitted to it. ``conflicts``
    reports a value without that noise floor.

    >>> round(stationarity([[4.0, 0.0], [0.0, 4.0]]), 6)
    1.414214
    """
    weights = _array(min_norm_weights(gramian))
    square = weights @ _square(gramian) @ weights
    return float(np.sign(square) * np.sqrt(abs(square)))


def non_dominated(points: Values) -> Any:
    """Which points no other point dominates (no worse in every objective, better in one): (n, m) to (n,) bool.

    Equal points do not dominate each other, so all copies stay. Raises ValueError if a value is not finite.

    >>> non_dominated([[1, 3], [2, 1], [2, 3]])
    array([ True,  True, False])
    """
    values = _points(points)
    kept = np.empty(len(values), dtype=bool)
    for i, point in enumerate(values):
        no_worse = (values <= point).all(1)
        better = (values < point).any(1)
        kept[i] = not (no_worse & better).any()
    return _like(kept, points)


def _volume(points: Array, reference: Array) -> float:
    """Slices along the last objective; in each the volume of the points below it, one dimension lower."""
    points = points[np.argsort(points[:, -1])]
    depths = np.diff(points[:, -1], append=reference[-1])
    if points.shape[1] == 2:
        widths = reference[0] - np.minimum.accumulate(points[:, 0])
        return float(depths @ widths)
    total = 0.0
    for i, depth in enumerate(depths):
        if depth > 0:
            total += depth * _volume(points[: i + 1, :-1], reference[:-1])
    return total


def hypervolume(points: Values, reference: Values) -> float:
    """Volume dominated by points (n, m) and bounded by reference (m,); exact, 2 <= m <= 4, larger is better.

    A sweep for m = 2, slices of sweeps above (cost n^(m-1)). Points not strictly below the reference add nothing.
    Raises ValueError for other m, a reference of another length, values that are not finite.

    >>> hypervolume([[1, 3], [2, 1]], [4, 4])
    7.0
    """
    values = _points(points)
    corner = _array(reference)
    fits = values.shape[1] in (2, 3, 4) and corner.shape == values.shape[1:]
    if not fits or not np.isfinite(corner).all():
        raise ValueError(
            f"need points (n, m), m from 2 to 4, and a finite reference (m,); got {values.shape}, {corner}"
        )
    inside = values[(values < corner).all(1)]
    return _volume(inside[non_dominated(inside)], corner)
