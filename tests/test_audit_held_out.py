"""Twenty loss weights that the audit was not made from: ten that are what they claim, ten that are not.

They were written from the papers before the audit existed, each in its author's own notation, and multiplied by a
random factor, which no audit may see. The truth of each is stated here by hand: the weighting and the target whose
formula it really is. Some formulas have two names that are equal up to a factor; both are then right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import dysigma
from dysigma import NoiseSchedule

LINEAR = NoiseSchedule.linear()
SCALED_LINEAR = NoiseSchedule.scaled_linear()
COSINE = NoiseSchedule.cosine()
ZERO_TERMINAL = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
FLOW = NoiseSchedule.flow()
SHIFTED_FLOW = NoiseSchedule.flow(shift=3.0)


@dataclass(frozen=True)
class Case:
    """A loss weight, what its author says it is, and the (name, target, params) that it is."""

    label: str
    function: Callable[[Tensor], Tensor]
    schedule: NoiseSchedule
    target: str
    claims: str
    truths: tuple[tuple[str, str, dict[str, float]], ...]
    params: dict[str, float] = field(default_factory=dict)
    as_: str = "snr"


# Hang et al. 2023: min(SNR, gamma) on x0, divided by SNR for epsilon and by SNR + 1 for v.
def min_snr_of_v(snr: Tensor) -> Tensor:
    return torch.where(snr > 5, torch.full_like(snr, 5.0), snr) / (1 + snr)


def min_snr_of_epsilon(snr: Tensor) -> Tensor:
    return (1.0 / snr).clamp(max=1.0)


# Crowson, k-diffusion: 1 / (sigma^2 + sigma_data^2) on the denoised image.
def soft_min_snr_of_sigma(sigma: Tensor) -> Tensor:
    return 1 / (sigma * sigma + 0.25)


# Choi et al. 2022: 1 / (k + SNR)^gamma on epsilon.
def p2_of_epsilon(snr: Tensor) -> Tensor:
    return 1 / (1 + snr)


def p2_half_of_v(snr: Tensor) -> Tensor:
    return snr / (1 + snr) / torch.sqrt(1 + snr)


# Yu et al. (arXiv 2310.08442): 1 / sqrt(SNR) on epsilon; sqrt(SNR) / (1 + SNR) on v is a hyperbolic secant.
def debiased_of_v(log_snr: Tensor) -> Tensor:
    return 0.5 / torch.cosh(0.5 * log_snr)


# Karras et al. 2022, table 1: lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
def edm_of_sigma(sigma: Tensor) -> Tensor:
    return (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2


# Salimans, Ho 2022: max(alpha^2 / sigma^2, 1) on x0.
def truncated_of_v(snr: Tensor) -> Tensor:
    return torch.maximum(snr, torch.ones_like(snr)) / (snr + 1)


# The velocity's error is that of x0 over s^2, so s^2 makes it the plain error of x0.
def const_x0_of_flow(s: Tensor) -> Tensor:
    return s.square()


# Kingma, Gao 2023: sigmoid(b - log_snr) on epsilon.
def sigmoid_of_epsilon(log_snr: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(log_snr - 2))


RIGHT = [
    Case("min-snr of v", min_snr_of_v, ZERO_TERMINAL, "v_prediction", "min-snr",
         (("min-snr", "v_prediction", {"gamma": 5.0}),), {"gamma": 5}),
    Case("min-snr 1 of epsilon", min_snr_of_epsilon, LINEAR, "epsilon", "min-snr",
         (("min-snr", "epsilon", {"gamma": 1.0}),), {"gamma": 1}),
    Case("soft-min-snr by sigma", soft_min_snr_of_sigma, COSINE, "sample", "soft-min-snr",
         (("soft-min-snr", "sample", {"gamma": 4.0}),), as_="sigma"),
    Case("p2 of epsilon", p2_of_epsilon, SCALED_LINEAR, "epsilon", "p2",
         (("p2", "epsilon", {"k": 1.0, "gamma": 1.0}),)),
    Case("p2 one half of v", p2_half_of_v, LINEAR, "v_prediction", "p2",
         (("p2", "v_prediction", {"k": 1.0, "gamma": 0.5}),), {"gamma": 0.5}),
    Case("debiased of v", debiased_of_v, SCALED_LINEAR, "v_prediction", "debiased",
         (("debiased", "v_prediction", {}),), as_="log_snr"),
    Case("edm by sigma", edm_of_sigma, COSINE, "sample", "edm",
         (("edm", "sample", {"sigma_data": 0.5}),), as_="sigma"),
    Case("truncated of v", truncated_of_v, COSINE, "v_prediction", "truncated-snr",
         (("truncated-snr", "v_prediction", {"gamma": 1.0}),)),
    Case("const-x0 of a flow", const_x0_of_flow, SHIFTED_FLOW, "flow_prediction", "const-x0",
         (("const-x0", "flow_prediction", {}),), as_="sigma"),
    Case("sigmoid of epsilon", sigmoid_of_epsilon, SCALED_LINEAR, "epsilon", "sigmoid",
         (("sigmoid", "epsilon", {"bias": 2.0}),), as_="log_snr"),
]  # fmt: skip


def epsilons_division(snr: Tensor) -> Tensor:
    return snr.clamp(max=3) / snr


def max_for_min(snr: Tensor) -> Tensor:
    return torch.clamp(snr, min=5) / (snr + 1)


def no_division(snr: Tensor) -> Tensor:
    return torch.fmin(snr, torch.tensor(5.0, dtype=snr.dtype))


def amplitude_ratio(snr: Tensor) -> Tensor:
    ratio = torch.sqrt(snr)
    return ratio.clamp(max=5) / ratio


def p2_half_of_epsilon(snr: Tensor) -> Tensor:
    return (1 + snr) ** -0.5


def debiased_of_epsilon(snr: Tensor) -> Tensor:
    return torch.rsqrt(snr)


def without_the_root(snr: Tensor) -> Tensor:
    return torch.reciprocal(snr)


def edm_of_unit_data(sigma: Tensor) -> Tensor:
    return (sigma.square() + 1) / sigma.square()


def variance_for_precision(snr: Tensor) -> Tensor:
    return 0.25 / (snr + 0.25)


def v_division_on_a_flow(snr: Tensor) -> Tensor:
    return snr.clamp(max=5.0) / (snr + 1.0)


WRONG = [
    Case("divided as for epsilon", epsilons_division, LINEAR, "v_prediction", "min-snr",
         (("min-snr", "epsilon", {"gamma": 3.0}),), {"gamma": 3}),
    Case("max for min", max_for_min, SCALED_LINEAR, "v_prediction", "min-snr",
         (("max-snr", "v_prediction", {"gamma": 5.0}),
          ("truncated-snr", "v_prediction", {"gamma": 5.0}))),
    Case("not divided", no_division, COSINE, "epsilon", "min-snr",
         (("min-snr", "sample", {"gamma": 5.0}),)),
    # SNR for SNR < 25, then 5 sqrt(SNR): P2 with the exponent 1/2 has these two slopes, with a softer knee.
    Case("amplitude ratio", amplitude_ratio, SCALED_LINEAR, "epsilon", "min-snr",
         (("p2", "epsilon", {}),)),
    Case("p2 of the other target", p2_half_of_epsilon, COSINE, "v_prediction", "p2",
         (("p2", "epsilon", {"k": 1.0, "gamma": 0.5}),), {"gamma": 0.5}),
    Case("debiased of the other target", debiased_of_epsilon, SCALED_LINEAR, "v_prediction",
         "debiased", (("debiased", "epsilon", {}),)),
    Case("the root left out", without_the_root, SCALED_LINEAR, "epsilon", "debiased",
         (("const-x0", "epsilon", {}),)),
    Case("other data", edm_of_unit_data, COSINE, "sample", "edm",
         (("edm", "sample", {"sigma_data": 1.0}), ("const-v", "sample", {})), as_="sigma"),
    Case("variance for precision", variance_for_precision, LINEAR, "epsilon", "soft-min-snr",
         (("soft-min-snr", "epsilon", {"gamma": 0.25}),), {"gamma": 4}),
    Case("v's division on a flow", v_division_on_a_flow, FLOW, "flow_prediction", "min-snr",
         (("min-snr", "v_prediction", {"gamma": 5.0}),)),
]  # fmt: skip

CASES = [*RIGHT, *WRONG]


@cache
def audited_number(number: int) -> Any:
    """The audit of a case's formula times a factor between 1e-4 and 1e4, the same at every run."""
    case = CASES[number]
    draw = torch.Generator().manual_seed(number)
    factor = 10 ** (8 * float(torch.rand(1, generator=draw)) - 4)
    return dysigma.audit(
        lambda level: factor * case.function(level),
        case.schedule,
        case.target,
        claims=case.claims,
        params=case.params,
        as_=case.as_,
    )


def audited(case: Case) -> Any:
    return audited_number(CASES.index(case))


def is_named(case: Case) -> bool:
    """Whether the nearest weighting is a true one: name, target and parameters to 3 per cent."""
    nearest = audited(case).nearest
    for name, target, params in case.truths:
        same_params = all(
            math.isclose(nearest["params"][key], value, rel_tol=0.03, abs_tol=0.03)
            for key, value in params.items()
            if nearest["name"] == name
        )
        if (nearest["name"], nearest["target"]) == (name, target) and same_params:
            return True
    return False


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.label)
def test_no_right_formula_raises_an_alarm(case: Case):
    assert audited(case).agrees


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.label)
def test_no_wrong_formula_passes(case: Case):
    assert not audited(case).agrees


def test_the_nearest_weighting_is_the_true_one_for_18_of_20():
    missed = [case.label for case in CASES if not is_named(case)]
    assert len(CASES) == 20 and len(missed) <= 2, missed
