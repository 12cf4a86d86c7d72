"""How much sooner does one arm of a race reach what another reaches? Images to a threshold, paired by seed.

Curves are (images (M,), values (M,)) of anything positive for which lower is better. Logarithms are natural.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _curve(images: ArrayLike, values: ArrayLike) -> Curve:
    """Both as float64 vectors; ValueError unless images rise from 0 or more and values are finite and positive."""
    n, v = np.asarray(images, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if n.ndim != 1 or n.shape != v.shape:
        raise ValueError(f"images and values must both be (M,); got shapes {n.shape} and {v.shape}")
    if not (np.isfinite(n).all() and (np.diff(n) > 0).all() and (n >= 0).all()):
        raise ValueError(f"images must be finite, 0 or more, and rise strictly; got {n.tolist()}")
    if not (np.isfinite(v).all() and (v > 0).all()):
        raise ValueError(f"values must be finite and positive, for their logarithm; got {v.tolist()}")
    return n, v


def images_to_threshold(images: ArrayLike, values: ArrayLike, threshold: float, *, slack: float = 0.0) -> float:
    """Images until a curve (M,), (M,) first reaches a threshold and stays: the first sustained crossing.

    Sustained: that value is at most threshold, and it and all later ones at most threshold (1 + slack). A crossing at
    the last evaluation counts. Between the two evaluations around it ln value is linear in ln images, or in images where
    the first of them is 0, the untrained network. inf: never (censored; so is an empty curve, of a training that
    diverged). Reached already at the first evaluation: the images of that one, which is then an upper bound. Raises
    ValueError for images or values that are no curve, a threshold not finite and positive, a negative slack.
    """
    n, v = _curve(images, values)
    if not (0 < threshold < math.inf and 0 <= slack < math.inf):
        raise ValueError(f"threshold must be finite and > 0, slack finite and >= 0; got {threshold!r} and {slack!r}")
    worst_to_come = np.maximum.accumulate(v[::-1])[::-1]
    reached = np.flatnonzero((v <= threshold) & (worst_to_come <= threshold * (1 + slack)))
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(n[0])
    share = math.log(v[i - 1] / threshold) / math.log(v[i - 1] / v[i])
    if n[i - 1] == 0:
        return float(n[i] * share)
    return float(n[i - 1] * (n[i] / n[i - 1]) ** share)
