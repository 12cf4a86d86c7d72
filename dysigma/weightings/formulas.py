"""Loss weightings over timesteps, all behind ``loss = weighting(losses, timesteps)``.

One scale: a predefined weighting is a function of log_snr (natural log, float64) giving a log-weight on the x0 error,
the convention of Min-SNR (Hang et al. 2023). The squared error of epsilon is SNR times that of x0, the one of v SNR + 1
times, so on the model's own target the log-weight is less by 0 (sample), log_snr (epsilon), softplus(log_snr) (v) or
2 softplus(log_snr / 2) (flow, whose error noise - x0 has the factor (1 + sqrt(SNR))^2).

Dy-Sigma is an independent reconstruction from the abstract (Liu, Ye, Liu, Qin, IJCNN 2024), not the authors' formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, check_options, find_named
from ..schedule import PREDICTION_TYPES, NoiseSchedule, canonical_prediction_type


def _log_add(log_snr: Tensor, other: float) -> Tensor:
    return torch.logaddexp(log_snr, log_snr.new_tensor(other))


def _elbo(log_snr: Tensor) -> Tensor:
    # t = 0 has no predecessor: it repeats the first step in log SNR.
    before = torch.cat([2 * log_snr[:1] - log_snr[1:2], log_snr[:-1]])
    return before + torch.log(-torch.expm1(log_snr - before)) - math.log(2)


Name = str | Callable[..., Any]  # of a weighting, or one of your own

# What the plain error of a target is called as a weighting.
PLAIN = dict(zip(PREDICTION_TYPES, ("const-eps", "const-x0", "const-v", "const-flow"), strict=True))

# Log of the weight on the x0 error, as a function of log_snr; the comments give the weight itself and where it is from.
PREDEFINED: dict[str, Callable[..., Tensor]] = {
    # 1; what Min-SNR calls Const
    "const-x0": lambda log_snr: torch.zeros_like(log_snr),
    # SNR, plain epsilon error (Ho, Jain, Abbeel 2020)
    "const-eps": lambda log_snr: log_snr,
    # SNR + 1, plain v error (Salimans, Ho 2022)
    "const-v": lambda log_snr: _log_add(log_snr, 0.0),
    # (1 + sqrt(SNR))^2 = 1 / s^2, plain error of the velocity of a rectified flow
    "const-flow": lambda log_snr: 2 * _log_add(log_snr / 2, 0.0),
    # max(SNR, 1) (Salimans, Ho 2022), and for any gamma
    "truncated-snr": lambda log_snr, *, gamma=1.0: log_snr.clamp(min=math.log(gamma)),
    "max-snr": lambda log_snr, *, gamma=5.0: log_snr.clamp(min=math.log(gamma)),
    # min(SNR, gamma) (Hang et al. 2023)
    "min-snr": lambda log_snr, *, gamma=5.0: log_snr.clamp(max=math.log(gamma)),
    # gamma SNR / (SNR + gamma) (k-diffusion, with gamma = 1 / sigma_data^2)
    "soft-min-snr": lambda log_snr, *, gamma=4.0: (
        log_snr + math.log(gamma) - _log_add(log_snr, math.log(gamma))
    ),
    # SNR / (k + SNR)^gamma (Choi et al. 2022)
    "p2": lambda log_snr, *, k=1.0, gamma=1.0: log_snr - gamma * _log_add(log_snr, math.log(k)),
    # sqrt(SNR) (arXiv 2310.08442)
    "debiased": lambda log_snr: log_snr / 2,
    # SNR + 1 / sigma_data^2, lambda(sigma) of Karras et al. 2022 at sigma^2 = 1 / SNR, without their sampling
    "edm": lambda log_snr, *, sigma_data=0.5: _log_add(log_snr, -2 * math.log(sigma_data)),
    # SNR sigmoid(bias - log_snr), here per timestep; Kingma, Gao 2023 have it per unit of log_snr
    "sigmoid": lambda log_snr, *, bias=2.0: log_snr - _log_add(log_snr - bias, 0.0),
    # (SNR(t-1) - SNR(t)) / 2 (Kingma et al. 2021)
    "elbo": _elbo,
    # SNR, times ratio where log_snr > at: two objectives in any proportion, to sweep a front with
    "split": lambda log_snr, *, ratio=1.0, at=0.0: log_snr + math.log(ratio) * (log_snr > at),
}


def log_error_factor(log_snr: Tensor, prediction_type: str, is_flow: bool = False) -> Tensor:
    """Log of how many times larger the squared error of a target is than that of x0: (T,) to (T,).

    v = alpha noise - sigma x0 depends on the path. x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2), so
    its squared error is (alpha^2 + sigma^2)^2 / sigma^2 times that of x0: 1 + SNR on the
    variance-preserving path, (1 + SNR)^2 / (1 + sqrt(SNR))^2 on the flow, where sigma = 1 / (1 + sqrt(SNR)).
    """
    kind = canonical_prediction_type(prediction_type)
    if kind == "v_prediction" and is_flow:
        return 2 * (_log_add(log_snr, 0.0) - _log_add(log_snr / 2, 0.0))
    return PREDEFINED[PLAIN[kind]](log_snr)


def log_conversion(log_snr: Tensor, prediction_type: str, is_flow: bool = False) -> Tensor:
    """What a log-weight on the x0 error gains on the error of another target: (T,) to (T,).

    Raises ValueError for epsilon where SNR = 0.
    """
    kind = canonical_prediction_type(prediction_type)
    if kind == "epsilon" and bool(torch.isneginf(log_snr).any()):
        raise ValueError(
            "prediction_type='epsilon' has no weight where SNR = 0 (zero terminal SNR): the input there is the noise, "
            "whose error says nothing about x0. Use 'v_prediction' or 'sample', or a schedule that ends above 0"
        )
    return -log_error_factor(log_snr, kind, is_flow)


def log_weight(
    name: Name, schedule: NoiseSchedule, prediction_type: str, **params: float
) -> Tensor:
    """Log of a predefined weight on the error of the model's own target, on the formula's scale: (T,) float64.

    name: of PREDEFINED, or such a function of your own, itself or as "module:function".
    """
    function = find_named(name, PREDEFINED, "predefined weighting")
    check_options(str(name), params, function)
    for key, value in params.items() if name in PREDEFINED else ():
        check_number(f"{key} of {name}", value, low=-math.inf if key in ("bias", "at") else 0.0)
    table = function(schedule.log_snr, **params)
    if (
        not isinstance(table, Tensor)
        or table.shape != schedule.log_snr.shape
        or not bool((table < math.inf).all())
    ):
        raise ValueError(
            f"{name} must give a log-weight below inf for each of {len(schedule.log_snr)} log_snr; got {table}"
        )
    return table + log_conversion(schedule.log_snr, prediction_type, schedule.is_flow)
