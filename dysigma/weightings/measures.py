"""What a table of weights amounts to: effective sample size, differences, fluctuation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from .base import Weighting
from .formulas import PREDEFINED, log_conversion
from .registry import make_weighting

if TYPE_CHECKING:
    from pandas import DataFrame


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


def compare_weightings(
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    names: Sequence[str] | Mapping[str, Weighting] = tuple(PREDEFINED),
) -> DataFrame:
    """Weights in one unit, on the error of prediction_type with mean 1 over timesteps: a pandas
    DataFrame (T, names).

    names: names of WEIGHTINGS, made with their defaults, or {label: weighting}; those may be for
    any prediction type and are read as they are now. For a summary see effective_sample_size and
    share_changed.

    >>> table = compare_weightings(NoiseSchedule.linear(10), "sample", ["const-x0", "min-snr"])
    >>> table.shape, float(table["const-x0"].max())
    ((10, 2), 1.0)
    """
    from pandas import DataFrame

    if isinstance(names, Mapping):
        weightings = dict(names)
    else:
        weightings = {name: make_weighting(name, schedule, prediction_type) for name in names}
    unit = log_conversion(schedule.log_snr, prediction_type, schedule.is_flow)
    columns = {}
    for label, weighting in weightings.items():
        conversion = weighting.log_conversion
        on_x0 = weighting.weights().double().log() - conversion
        # Epsilon at the end of a flow: whatever its weight there, none is on x0.
        on_x0 = torch.where(torch.isneginf(conversion), -math.inf, on_x0)
        share = (on_x0 + unit).softmax(0)
        columns[label] = (share * len(share)).cpu().numpy()
    return DataFrame(columns).rename_axis("timestep")


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
