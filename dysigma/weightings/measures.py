"""What a table of weights amounts to: effective sample size, differences, fluctuation."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / (T sum w^2) in (0, 1], the share of timesteps that does the work: weights (T,) to
    () float64.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    w = weights.double()
    return w.sum() ** 2 / (len(w) * (w * w).sum())


def share_changed(weights: Tensor, reference: Tensor, tolerance: float = 0.01) -> Tensor:
    """Share of timesteps whose weight relative to reference (T,) is off the median by more than
    tolerance; () float64.

    A factor common to all is no change.

    >>> share_changed(torch.tensor([2.0, 2.0, 2.0, 3.0]), torch.ones(4))
    tensor(0.2500, dtype=torch.float64)
    """
    relative = weights.double() / reference.double()
    off = (relative / relative.nanmedian() - 1).abs()
    return (off > tolerance).double().mean()


def fluctuation(trajectory: Tensor) -> Tensor:
    """Coefficient of variation of weights over training: (steps, T) or (steps, K) to (T,) or (K,),
    float64.

    Standard deviation over steps, divided by the mean.

    >>> fluctuation(torch.tensor([[1.0], [3.0]]))
    tensor([0.7071], dtype=torch.float64)
    """
    w = torch.as_tensor(trajectory, dtype=torch.float64)
    if w.ndim != 2 or len(w) < 2:
        raise ValueError(
            f"trajectory must be (steps, T) with at least two steps; got shape {tuple(w.shape)}"
        )
    return w.std(0) / w.mean(0)
