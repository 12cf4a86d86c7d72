"""Learning curves: how many images until a value is reached.

A curve is a pair of arrays: images seen (M,), rising, and values (M,), positive, lower is better.
Logarithms are natural.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

Curve = tuple[Array, Array]  # images (M,), values (M,)


def check_curve(images: ArrayLike, values: ArrayLike) -> Curve:
    """Both arrays in float64; ValueError for what is no curve.

    An empty curve is one: that of a training that diverged before its first evaluation.

    >>> check_curve([10, 20], [0.5, 0.25])
    (array([10., 20.]), array([0.5 , 0.25]))
    """
    n = np.asarray(images, dtype=np.float64)
    v = np.asarray(values, dtype=np.float64)
    in_order = n.ndim == 1 and np.isfinite(n).all() and (np.diff(n) > 0).all() and (n >= 0).all()
    fitting = n.shape == v.shape and np.isfinite(v).all() and (v > 0).all()
    if not (in_order and fitting):
        raise ValueError(
            "a curve needs images (M,), rising from 0 or more, and values (M,), finite and "
            f"positive; got {n} and {v}"
        )
    return n, v


def worst_to_come(values: Array) -> Array:
    """The largest value from each evaluation on, (M,): what a training has yet to fall below.

    >>> worst_to_come(np.array([4.0, 1.0, 3.0, 2.0]))
    array([4., 3., 3., 2.])
    """
    return np.maximum.accumulate(values[::-1])[::-1]


def log_curve_until(images: Array, values: Array, end: float) -> Curve:
    """(ln images, ln values) from the first images above 0 to `end`, interpolated there.

    Raises ValueError where `end` lies outside the evaluations: nothing is extrapolated.

    >>> ln_images, ln_values = log_curve_until(np.array([1.0, 4.0]), np.array([8.0, 2.0]), end=2.0)
    >>> np.exp(ln_images), np.exp(ln_values)
    (array([1., 2.]), array([8., 4.]))
    """
    trained = images > 0
    n = images[trained]
    v = values[trained]
    if len(n) == 0 or not n[0] < end <= n[-1]:
        raise ValueError(f"nothing is extrapolated: {end} images are not within {n}")
    before = n < end
    ln_end = np.log(end)
    ln_last = np.interp(ln_end, np.log(n), np.log(v))
    ln_images = np.append(np.log(n[before]), ln_end)
    ln_values = np.append(np.log(v[before]), ln_last)
    return ln_images, ln_values


def images_to_threshold(images: ArrayLike, values: ArrayLike, threshold: float) -> float:
    """Images until a curve (M,), (M,) reaches a threshold and stays there.

    The curve stays from an evaluation on if that value and all later ones are at most `threshold`.
    The last evaluation may be the first that does. Between two evaluations ln value is taken as
    linear in ln images; from the untrained network, at 0 images, as linear in images.

    Returns inf where the curve never gets there (a censored training; an empty curve too). Where
    the first evaluation is already there, its images are returned: an upper bound. Raises
    ValueError for what is no curve, or a threshold that is not positive.

    >>> images_to_threshold([1, 2, 4], [8, 4, 2], 4)
    2.0
    >>> images_to_threshold([1, 2, 4], [8, 4, 2], 1)
    inf
    """
    n, v = check_curve(images, values)
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be finite and above 0; got {threshold!r}")
    there = worst_to_come(v) <= threshold
    if not there.any():
        return math.inf
    after = int(there.argmax())
    if after == 0:
        return float(n[0])
    before = after - 1
    # The part of the way from ln v[before] down to ln v[after] at which the threshold lies.
    share = math.log(v[before] / threshold) / math.log(v[before] / v[after])
    if n[before] == 0:
        return float(n[after] * share)
    return float(n[before] * (n[after] / n[before]) ** share)
