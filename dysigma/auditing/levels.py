"""The noise levels that an audited function is called with, and its weights, read with care."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_name
from ..schedule import NoiseSchedule

WeightFunction = Callable[[Tensor], Tensor]

LEVELS = ("snr", "log_snr", "sigma", "timesteps")

# Functions are called on a part of the levels and in another order; a rounding of float32 is no difference.
_SAME = 1e-4


def levels(schedule: NoiseSchedule, as_: str = "snr") -> Tensor:
    """The levels of a schedule in the unit that a weight function takes: (T,) float64, int64 for timesteps.

    as_: "snr"; "log_snr", its natural logarithm; "timesteps", 0 the cleanest; or "sigma", what
    samplers call so: the ratio of noise to signal, SNR^-1/2, on a variance-preserving path, and the
    share of noise s on a rectified flow.
    """
    if as_ == "timesteps":
        return torch.arange(schedule.num_timesteps)
    return from_log_snr(schedule.log_snr.cpu(), as_, schedule.is_flow)


def from_log_snr(log_snr: Tensor, as_: str, is_flow: bool) -> Tensor:
    """Levels given by log_snr, in another unit (not timesteps, which only a schedule knows)."""
    check_name("unit of the noise level", as_, LEVELS, error=ValueError)
    if as_ == "snr":
        return log_snr.exp()
    if as_ == "log_snr":
        return log_snr.clone()
    # On a flow alpha = 1 - s and sigma = s, so that s = 1 / (1 + sqrt(SNR)).
    return torch.sigmoid(-log_snr / 2) if is_flow else torch.exp(-log_snr / 2)


def call(function: WeightFunction, level: Tensor) -> Tensor:
    """function(level) as float64 weights of the same shape (N,).

    Raises ValueError, in one line, if the function raises, or returns another shape or something
    else than numbers.
    """
    try:
        # A copy: the function may work in place.
        answer = function(level.clone())
    except Exception as error:
        raise ValueError(f"the weight function raised {type(error).__name__}: {error}") from error
    wanted = "the weight function must return a tensor of weights"
    try:
        found = torch.as_tensor(answer).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}; got {type(answer).__name__}") from error
    if found.is_complex():
        raise ValueError(f"{wanted}; got {found.dtype}")
    weights = found.to("cpu", torch.float64)
    if weights.shape != level.shape:
        raise ValueError(
            f"the weight function must return one weight for each level: {tuple(level.shape)} in, "
            f"{tuple(weights.shape)} out"
        )
    return weights


def read_weights(function: WeightFunction, schedule: NoiseSchedule, as_: str = "snr") -> Tensor:
    """The weights of a function at all timesteps of the schedule: (T,) float64, finite, not negative, not all 0.

    Raises ValueError for anything else, and for a weight that depends on more than its own level:
    on the order of the levels, on the other levels of the batch, or on chance.
    """
    level = levels(schedule, as_)
    weights = call(function, level)
    _check_values(weights, schedule)
    _check_own_level(function, level, weights)
    return weights


def _check_values(weights: Tensor, schedule: NoiseSchedule) -> None:
    bad = ~weights.isfinite()
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        where = f"timestep {first}, SNR {float(schedule.log_snr[first].exp()):.3g}"
        raise ValueError(
            f"the weight function must return finite weights; {int(bad.sum())} of {len(weights)} are not, "
            f"the first at {where}: {float(weights[first])}"
        )
    if bool((weights < 0).any()):
        first = int((weights < 0).nonzero()[0])
        raise ValueError(
            f"the weight function must return weights >= 0; {int((weights < 0).sum())} of {len(weights)} are "
            f"negative, the first at timestep {first}: {float(weights[first]):.3g}"
        )
    if not bool((weights > 0).any()):
        raise ValueError("the weight function must not return 0 for every level")


def _check_own_level(function: WeightFunction, level: Tensor, weights: Tensor) -> None:
    order = torch.randperm(len(level), generator=torch.Generator().manual_seed(0))
    part = torch.arange(0, len(level), 3)
    checks = {
        "a second time": (call(function, level), weights),
        "in another order": (call(function, level[order]), weights[order]),
        "for a third of the levels": (call(function, level[part]), weights[part]),
    }
    for how, (again, before) in checks.items():
        if torch.allclose(again, before, rtol=_SAME, atol=0.0):
            continue
        raise ValueError(
            f"a weight must depend on its own level alone; called {how}, the function gave other weights. "
            "Audit the weights before they are divided by a mean over the batch"
        )
