"""Intervals and tests: Student t, jackknife, Holm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def t_interval(values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the first axis of (S, ...), the seeds, and half the width of its 95 % t-interval.

    For a single seed the width is NaN.

    >>> mean, half = t_interval([1.0, 2.0, 3.0])
    >>> print(f"{mean:.1f} ± {half:.3f}")
    2.0 ± 2.484
    """
    from scipy.stats import t

    array = np.asarray(values, dtype=float)
    seeds = len(array)
    spread = array.std(0, ddof=1) if seeds > 1 else np.nan * array[0]
    return array.mean(0), t.ppf(0.975, seeds - 1) * spread / seeds**0.5


def t_quantile(micro_batches: int) -> float:
    """Half the width of a 95 % interval in standard errors, for an error from so many micro-batches.

    >>> round(t_quantile(16), 3)
    2.131
    """
    from scipy.stats import t

    return float(t.ppf(0.975, micro_batches - 1))


def jackknife_se(left_out: Tensor) -> Tensor:
    """Standard error of a statistic from its values (M, ...) with one of M observations left out (Tukey 1958).

    Of a mean it is the usual one:

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> jackknife_se((x.sum() - x) / 2), x.std() / 3**0.5
    (tensor(1.5275), tensor(1.5275))
    """
    deviation = left_out - left_out.mean(0)
    return (deviation.square().mean(0) * (len(left_out) - 1)).sqrt()


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Adjusted p-values (m,) of m tests, for the chance of any false alarm among them (Holm 1979, step-down).

    NaN, a test that could not be made, stays NaN and counts among the m. Raises ValueError outside [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError(f"p_values must be (m,), each from 0 to 1; got {p_values}")
    order = np.argsort(p)  # NaN comes last
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return adjusted
