"""The predefined weightings: one documented function of log_snr each.

Every function maps log_snr (any shape, natural log, float64) to the log of the weight on the x0
error, of the same shape. That is the convention of Min-SNR (Hang et al. 2023). S is the
signal-to-noise ratio, exp(log_snr).

To add one, write such a function with its equation and source in the docstring, and put it into
PREDEFINED. The annotation of a parameter says which numbers it takes: Positive, NonNegative, or
float for any finite number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..checks import check_number, check_options, find_named
from ..schedule import NoiseSchedule, canonical_prediction_type


class Above(NamedTuple):
    """The numbers that a parameter takes: those above low, and low itself if inclusive."""

    low: float
    inclusive: bool = False


Positive = Annotated[float, Above(0.0)]
NonNegative = Annotated[float, Above(0.0, inclusive=True)]

Name = str | Callable[..., Any]  # of a weighting, or one of your own


def _log(value: float) -> float:
    """ln(value), -inf at 0."""
    return math.log(value) if value > 0 else -math.inf


def _log_of_sum(log_snr: Tensor, other: float) -> Tensor:
    """ln(S + e^other) without overflow."""
    return torch.logaddexp(log_snr, log_snr.new_tensor(other))


# ---------------------------------------------------------------- the plain errors of the four targets


def const_x0(log_snr: Tensor) -> Tensor:
    """w = 1: the plain error of x0, which Min-SNR (Hang et al. 2023) calls Const.

    >>> const_x0(torch.tensor([2.0, 0.0]))
    tensor([0., 0.])
    """
    return torch.zeros_like(log_snr)


def const_eps(log_snr: Tensor) -> Tensor:
    """w = S: the plain error of the noise, the simple loss of DDPM (Ho, Jain, Abbeel 2020).

    >>> const_eps(torch.tensor([2.0, 0.0]))
    tensor([2., 0.])
    """
    return log_snr


def const_v(log_snr: Tensor) -> Tensor:
    """w = S + 1: the plain error of v (Salimans, Ho 2022).

    >>> const_v(torch.tensor([0.0])).exp()
    tensor([2.])
    """
    return _log_of_sum(log_snr, 0.0)


def const_flow(log_snr: Tensor) -> Tensor:
    """w = (1 + sqrt(S))^2 = 1 / s^2: the plain error of noise - x0 on a rectified flow (Liu, Gong,
    Liu 2023).

    >>> const_flow(torch.tensor([0.0])).exp()
    tensor([4.])
    """
    return 2 * _log_of_sum(log_snr / 2, 0.0)


# ---------------------------------------------------------------- weightings of the literature


def truncated_snr(log_snr: Tensor, *, gamma: NonNegative = 1.0) -> Tensor:
    """w = max(S, gamma): truncated SNR, with gamma = 1 (Salimans, Ho 2022)."""
    return log_snr.clamp(min=_log(gamma))


def max_snr(log_snr: Tensor, *, gamma: NonNegative = 5.0) -> Tensor:
    """w = max(S, gamma): the opposite of Min-SNR, compared there (Hang et al. 2023)."""
    return log_snr.clamp(min=_log(gamma))


def min_snr(log_snr: Tensor, *, gamma: Positive = 5.0) -> Tensor:
    """w = min(S, gamma): Min-SNR (Hang et al. 2023).

    >>> min_snr(torch.tensor([8.0, 0.0]), gamma=5.0).exp()
    tensor([5., 1.])
    """
    return log_snr.clamp(max=math.log(gamma))


def soft_min_snr(log_snr: Tensor, *, gamma: Positive = 4.0) -> Tensor:
    """w = gamma S / (S + gamma): the smooth Min-SNR of k-diffusion, with gamma = 1 /
    sigma_data^2."""
    log_gamma = math.log(gamma)
    return log_snr + log_gamma - _log_of_sum(log_snr, log_gamma)


def p2(log_snr: Tensor, *, k: NonNegative = 1.0, gamma: NonNegative = 1.0) -> Tensor:
    """w = S / (k + S)^gamma: perception prioritised weighting (Choi et al. 2022).

    gamma = 0 is the plain error of the noise.
    """
    if gamma == 0:
        return log_snr
    return log_snr - gamma * _log_of_sum(log_snr, _log(k))


def debiased(log_snr: Tensor) -> Tensor:
    """w = sqrt(S): debiased estimation (Yu et al. 2023, arXiv 2310.08442)."""
    return log_snr / 2


def edm(log_snr: Tensor, *, sigma_data: Positive = 0.5) -> Tensor:
    """w = S + 1 / sigma_data^2: lambda(sigma) of EDM (Karras et al. 2022) at sigma^2 = 1 / S.

    EDM also draws its levels from a lognormal distribution. That is the timestep sampler
    "lognormal", not a weight.
    """
    return _log_of_sum(log_snr, -2 * math.log(sigma_data))


def sigmoid(log_snr: Tensor, *, bias: float = 2.0) -> Tensor:
    """w = S sigmoid(bias - log_snr), per timestep.

    Kingma and Gao (2023) state it per unit of log_snr; theirs is this one times d log_snr / dt.
    """
    return log_snr - _log_of_sum(log_snr - bias, 0.0)


def elbo(log_snr: Tensor) -> Tensor:
    """w = (S(t-1) - S(t)) / 2: the variational bound in discrete time (Kingma et al. 2021).

    log_snr: (T,), the whole schedule, as the weight is a difference of neighbours. t = 0 has no
    predecessor; it repeats the first step in log SNR.
    """
    first = 2 * log_snr[:1] - log_snr[1:2]
    before = torch.cat([first, log_snr[:-1]])
    # S(t-1) - S(t) = S(t-1) (1 - e^(log_snr(t) - log_snr(t-1)))
    share = -torch.expm1(log_snr - before)
    return before + torch.log(share) - math.log(2)


def split(log_snr: Tensor, *, ratio: NonNegative = 1.0, at: float = 0.0) -> Tensor:
    """w = ratio S where log_snr > at, S elsewhere: two objectives in any proportion, to sweep a
    Pareto front with."""
    return torch.where(log_snr > at, log_snr + _log(ratio), log_snr)


PREDEFINED: dict[str, Callable[..., Tensor]] = {
    "const-x0": const_x0,
    "const-eps": const_eps,
    "const-v": const_v,
    "const-flow": const_flow,
    "truncated-snr": truncated_snr,
    "max-snr": max_snr,
    "min-snr": min_snr,
    "soft-min-snr": soft_min_snr,
    "p2": p2,
    "debiased": debiased,
    "edm": edm,
    "sigmoid": sigmoid,
    "elbo": elbo,
    "split": split,
}

# What the plain error of a target is called as a weighting.
PLAIN = {
    "epsilon": "const-eps",
    "sample": "const-x0",
    "v_prediction": "const-v",
    "flow_prediction": "const-flow",
}


# ---------------------------------------------------------------- from the x0 error to other targets


def log_error_factor(log_snr: Tensor, prediction_type: str, is_flow: bool = False) -> Tensor:
    """Log of how many times larger the squared error of a target is than that of x0: (T,) to (T,).

    It is the weight of PLAIN: 1 (sample), S (epsilon), S + 1 (v) or (1 + sqrt(S))^2 (flow). v =
    alpha noise - sigma x0 depends on the path. x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2), so
    its squared error is (alpha^2 + sigma^2)^2 / sigma^2 times that of x0: 1 + S on the
    variance-preserving path, (1 + S)^2 / (1 + sqrt(S))^2 on the flow, where sigma = 1 / (1 +
    sqrt(S)).
    """
    kind = canonical_prediction_type(prediction_type)
    if kind == "v_prediction" and is_flow:
        factor = 2 * (_log_of_sum(log_snr, 0.0) - _log_of_sum(log_snr / 2, 0.0))
        return torch.where(torch.isposinf(log_snr), math.inf, factor)  # and not inf - inf
    return PREDEFINED[PLAIN[kind]](log_snr)


def log_conversion(log_snr: Tensor, prediction_type: str, is_flow: bool = False) -> Tensor:
    """What a log-weight on the x0 error gains on the error of another target: (T,) to (T,).

    The error of the target is log_error_factor larger, so the log-weight is less by as much. Where
    SNR = 0 the input is the noise, and an error in it says nothing about x0. A flow always ends
    there, and epsilon gets the log-weight -inf at that level. On other schedules that is a choice,
    and ValueError is raised for epsilon.

    >>> log_conversion(torch.tensor([2.0, -1.0]), "epsilon")
    tensor([-2.,  1.])
    """
    kind = canonical_prediction_type(prediction_type)
    if kind == "epsilon" and is_flow:
        return torch.where(torch.isneginf(log_snr), -math.inf, -log_snr)
    if kind == "epsilon" and bool(torch.isneginf(log_snr).any()):
        raise ValueError(
            "prediction_type='epsilon' has no weight where SNR = 0 (zero terminal SNR): the input there is the noise, "
            "whose error says nothing about x0. Use 'v_prediction' or 'sample', or a schedule that ends above 0"
        )
    return -log_error_factor(log_snr, kind, is_flow)


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    # Python evaluates them from text, which costs more than the formula itself.
    return get_type_hints(function, include_extras=True)


def check_parameters(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a predefined weighting as Python numbers.

    Raises ValueError for one that it does not have or that lies outside of what the annotation
    allows.

    >>> check_parameters("min-snr", {"gamma": 2})
    {'gamma': 2}
    """
    function = PREDEFINED[name]
    check_options(name, params, function)
    hints = _annotations(function)
    checked = {}
    for key, value in params.items():
        metadata = getattr(hints.get(key), "__metadata__", (Above(-math.inf),))
        limit = metadata[0]
        checked[key] = check_number(f"{key} of {name}", value, limit.low, inclusive=limit.inclusive)
    return checked


def log_weight(name: Name, schedule: NoiseSchedule, prediction_type: str, **params: Any) -> Tensor:
    """Log of a predefined weight on the error of the model's own target, on the formula's scale:
    (T,) float64.

    name: of PREDEFINED, or such a function of your own, itself or as "module:function". Raises
    KeyError for an unknown name, ValueError for bad parameters, and for a function that does not
    give a number below inf for each log_snr.

    >>> log_weight("min-snr", NoiseSchedule.linear(3), "sample", gamma=2.0)
    tensor([0.6931, 0.6931, 0.6931], dtype=torch.float64)
    """
    function = find_named(name, PREDEFINED, "predefined weighting")
    if isinstance(name, str) and name in PREDEFINED:
        params = check_parameters(name, params)
    else:
        check_options(str(name), params, function)
    log_snr = schedule.log_snr
    table = function(log_snr, **params)
    is_table = isinstance(table, Tensor) and table.shape == log_snr.shape
    if not is_table or not bool((table < math.inf).all()):  # NaN is not below inf either
        raise ValueError(
            f"{name} must give a log-weight below inf for each of {len(log_snr)} log_snr; got {table}"
        )
    on_target: Tensor = table + log_conversion(log_snr, prediction_type, schedule.is_flow)
    return on_target
