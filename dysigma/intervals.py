"""Intervals and tests: Student t, jackknife, Holm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def t_interval(values: ArrayLike) -> tuple[NDArray, NDArray]:
    """Mean over the first axis of (S, ...), the seeds, and half the width of its 95 % t-interval, NaN for one seed."""
    from scipy.stats import t

    array = np.asarray(values, dtype=float)
    spread = array.std(0, ddof=1) if len(array) > 1 else np.nan * array[0]
    return array.mean(0), t.ppf(0.975, len(array) - 1) * spread / len(array) ** 0.5


def t_quantile(micro_batches: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, micro_batches - 1))


def jackknife_se(left_out: Tensor) -> Tensor:
    return ((left_out - left_out.mean(0)).square().mean(0) * (len(left_out) - 1)).sqrt()


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Adjusted p-values (m,) of m tests, for the chance of any false alarm among them (Holm 1979, step-down).

    NaN, a test that could not be made, stays NaN and counts among the m. Raises ValueError outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError(f"p_values must be (m,), each from 0 to 1; got {p_values}")
    order, adjusted = np.argsort(p), np.empty_like(p)  # NaN comes last
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
