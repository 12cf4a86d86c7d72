"""Named weightings as tables of log-weights on the x0 error, and what two tables have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checks import plain_number
from ..schedule import NoiseSchedule
from ..weightings import PREDEFINED, WEIGHTINGS, log_weight, make_weighting
from ..weightings.formulas import log_error_factor

# A weight agrees with its claim where it is within 10 per cent, after the median ratio has been taken out.
TOLERANCE = 0.1

# Where only one of two weights is 0 their log-ratio is infinite; the distance counts it as e^7, a factor of 1000.
_LARGEST = 7.0


def predefined_names() -> list[str]:
    """The names of WEIGHTINGS that the losses do not change, each a formula that a function may claim to be."""
    names = []
    for name, factory in WEIGHTINGS.items():
        # The first look is at the function of a partial.
        made = getattr(factory, "func", factory)
        if not getattr(made, "learns", False):
            names.append(name)
    return names


def parameters_of(name: str) -> dict[str, float]:
    """The numbers that a named weighting can be given, with their defaults."""
    found = PREDEFINED.get(name, WEIGHTINGS[name])
    defaults = {}
    for parameter in inspect.signature(found).parameters.values():
        is_number = isinstance(parameter.default, int | float)
        if is_number and not isinstance(parameter.default, bool):
            defaults[parameter.name] = float(parameter.default)
    return defaults


def log_x0_weight(name: str, schedule: NoiseSchedule, params: Mapping[str, float]) -> Tensor:
    """Log of a named weight on the x0 error: (T,) float64, up to a constant. Raises as make_weighting does."""
    if name in WEIGHTINGS and name not in PREDEFINED:
        options: dict[str, Any] = dict(params)
        weighting = make_weighting(name, schedule, "sample", **options)
        return weighting.weights().double().log().cpu()
    return log_weight(name, schedule, "sample", **params).cpu()


def log_error_ratio(log_snr: Tensor, used: str, target: str, is_flow: bool) -> Tensor:
    """Log of the error of a target over the error of x0; a weight on the target's error is divided by this ratio.

    used: the target whose formula is meant. The audited one has the formula of its own path. Of the
    others it is the published one, because that is what people copy: v's is that of a
    variance-preserving path.
    """
    return log_error_factor(log_snr, used, is_flow and used == target)


def log_ratio(log_weights: Tensor, reference: Tensor) -> Tensor:
    """Log of weights over reference, minus its median. NaN where both are 0, +-inf where one of them is."""
    difference = log_weights - reference
    return difference - difference.nanmedian()


def share_off(log_weights: Tensor, reference: Tensor) -> float:
    """Share of timesteps whose weight is more than TOLERANCE off the reference, from the median ratio."""
    ratio = log_ratio(log_weights, reference).exp()
    # Both weights 0 (NaN) is agreement.
    return float(((ratio - 1).abs() > TOLERANCE).double().mean())


def total_variation(log_weights: Tensor, reference: Tensor) -> float:
    """Share of the total weight that sits elsewhere: half the summed difference of the weights, each of sum 1."""
    return float((log_weights.softmax(0) - reference.softmax(0)).abs().sum() / 2)


def distance(log_weights: Tensor, reference: Tensor) -> Tensor:
    """Root mean square of the log-ratio over timesteps, its own mean taken out: (..., T) to (...).

    Timesteps where both are 0, or where the reference has no value, do not count. NaN if none
    counts.
    """
    difference = log_weights - reference
    centred = difference - difference.nanmedian(-1, keepdim=True).values
    limited = centred.clamp(-_LARGEST, _LARGEST)
    mean = limited.nanmean(-1, keepdim=True)
    return (limited - mean).square().nanmean(-1).sqrt()


def as_float(name: str, value: object) -> float:
    """A number given in Python, NumPy or torch, as a float; ValueError for anything else."""
    number = plain_number(value)
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ValueError(f"parameters of a claim are numbers; got {name} = {value!r}")
    return float(number)
