"""What went wrong: the slips that turn a right weight into the one that was found, and the right formula as code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import PREDICTION_TYPES, NoiseSchedule
from ..weightings import PLAIN, PREDEFINED
from .nearest import Fit
from .tables import distance, log_error_ratio, log_x0_weight, parameters_of

# A slip explains a weight if the two are within one per cent of each other (root mean square).
_EXPLAINS = 0.01

# The weight on the x0 error as code, with the parameters by name.
X0_CODE = {
    "const-x0": "1",
    "const-eps": "snr",
    "const-v": "(snr + 1)",
    "const-flow": "(1 + sqrt(snr)) ** 2",
    "truncated-snr": "max(snr, {gamma})",
    "max-snr": "max(snr, {gamma})",
    "min-snr": "min(snr, {gamma})",
    "soft-min-snr": "{gamma} * snr / (snr + {gamma})",
    "p2": "snr / ({k} + snr) ** {gamma}",
    "debiased": "sqrt(snr)",
    "edm": "(snr + 1 / {sigma_data} ** 2)",
    "sigmoid": "snr * sigmoid({bias} - log(snr))",
    "split": "snr * ({ratio} if log(snr) > {at} else 1)",
}

# The error of a target over the error of x0, by which a weight on x0 is divided.
ERROR_CODE = {
    "epsilon": "snr",
    "sample": "1",
    "v_prediction": "(snr + 1)",
    "flow_prediction": "(1 + sqrt(snr)) ** 2",
}

# That of v = alpha noise - sigma x0 on a rectified flow.
FLOW_V_CODE = "((snr + 1) / (1 + sqrt(snr))) ** 2"

_WORDS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "the flow velocity",
}


def target_in_words(target: str) -> str:
    """A prediction type as a reader says it: "x0" for "sample"."""
    return _WORDS[target]


def error_code(target: str, is_flow: bool = False) -> str:
    """The error of a target over the error of x0 as code; v's depends on the path."""
    is_flow_v = is_flow and target == "v_prediction"
    return FLOW_V_CODE if is_flow_v else ERROR_CODE[target]


def code_of(name: str, target: str, params: Mapping[str, float], is_flow: bool = False) -> str:
    """The weight on the error of a target as a line of code, up to a factor.

    >>> code_of("min-snr", "v_prediction", {"gamma": 5})
    'min(snr, 5) / (snr + 1)'
    """
    division = error_code(target, is_flow)
    if PLAIN[target] == name and division == ERROR_CODE[target]:
        return "1"
    if name not in X0_CODE:
        options = "".join(f", {key}={value:g}" for key, value in params.items())
        return f'dysigma.make_weighting("{name}", schedule, "{target}"{options}).weights()'
    values = {key: f"{value:g}" for key, value in {**parameters_of(name), **params}.items()}
    numerator = re.sub(r" \*\* 1(?![\d.])", "", X0_CODE[name].format(**values))
    if target == "sample":
        return numerator
    return f"{numerator} / {division}"


@dataclass
class Slip:
    """A way to get a formula wrong: what was done, and the log-weights (T,) that it gives."""

    words: str
    table: Tensor


@dataclass(frozen=True)
class _Claim:
    """The claimed formula for a target, at levels of log_snr other than the schedule's own too."""

    name: str
    params: Mapping[str, float]
    target: str
    is_flow: bool

    def on_x0(self, log_snr: Tensor) -> Tensor:
        return PREDEFINED[self.name](log_snr, **self.params)

    def division(self, used: str, log_snr: Tensor) -> Tensor:
        return log_error_ratio(log_snr, used, self.target, self.is_flow)

    def on(self, used: str, log_snr: Tensor) -> Tensor:
        return self.on_x0(log_snr) - self.division(used, log_snr)


def _slips(claim: _Claim, log_snr: Tensor) -> Iterator[Slip]:
    """Slips in the order in which they are likely, with the given target's own formula before the others'."""
    target = claim.target
    others = [each for each in PREDICTION_TYPES if each != target]
    wanted = target_in_words(target)
    name = claim.name
    own_division = error_code(target, claim.is_flow)

    if own_division == FLOW_V_CODE:
        yield Slip(
            f"the division by {ERROR_CODE[target]} is that of v on a variance-preserving path; on "
            f"this flow it is {own_division}",
            claim.on_x0(log_snr) - log_error_ratio(log_snr, target, target, is_flow=False),
        )
    for other in others:
        table = claim.on(other, log_snr)
        if other == "sample":
            words = f"the division by {own_division} is missing: this is {name} on the error of x0"
        else:
            words = f"this is {name} on the error of {target_in_words(other)}, not of {wanted}"
        yield Slip(words, table)

    for used in (target, *others):
        of = f"{name} on {target_in_words(used)}"
        own = claim.on(used, log_snr)
        code = error_code(used, claim.is_flow and used == target)
        plus_one = torch.nn.functional.softplus(log_snr)
        yield Slip(
            f"1 is added to the weight of {of}; the + 1 belongs to the SNR that divides",
            torch.logaddexp(own, torch.zeros_like(own)),
        )
        yield Slip(
            f"SNR + 1 stands in the place of SNR in the formula of {of}", claim.on(used, plus_one)
        )
        yield Slip(
            f"SNR + 1 stands in the place of SNR above the division, in the formula of {of}",
            claim.on_x0(plus_one) - claim.division(used, log_snr),
        )
        # gamma SNR / min(SNR, gamma) is max(SNR, gamma).
        swapped = log_snr - claim.on_x0(log_snr) - claim.division(used, log_snr)
        if "min" in name:
            words = f"max stands in the place of min in the formula of {of}"
        elif "max" in name or "truncated" in name:
            words = f"min stands in the place of max in the formula of {of}"
        else:
            words = f"SNR is divided by the weight on x0 in the place of that weight, in {of}"
        yield Slip(words, swapped)
        yield Slip(
            f"the weight of {of} is multiplied by {code} where it should be divided",
            claim.on_x0(log_snr) + claim.division(used, log_snr),
        )
        yield Slip(f"the square root of the weight of {of} is taken", own / 2)
        yield Slip(f"the weight of {of} is squared, or a square root is missing", 2 * own)
        levels = {
            "alpha / sigma stands in the place of SNR, its square": log_snr / 2,
            "SNR is squared": 2 * log_snr,
            "sigma / alpha stands in the place of SNR": -log_snr / 2,
            "SNR is upside down (sigma^2 / alpha^2)": -log_snr,
            "the base-10 logarithm stands in the place of the natural one": log_snr / math.log(10),
            "10 stands in the place of e as the base of log-SNR": log_snr * math.log(10),
        }
        for what, level in levels.items():
            yield Slip(f"{what}, in the formula of {of}", claim.on(used, level))
            numerator = claim.on_x0(level) - claim.division(used, log_snr)
            yield Slip(f"{what}, above the division, in the formula of {of}", numerator)


def find_slip(
    log_weights: Tensor,
    schedule: NoiseSchedule,
    target: str,
    name: str,
    params: Mapping[str, float],
) -> str | None:
    """The first slip in the claimed formula that gives these log-weights (T,), in words; None if none does."""
    if name not in PREDEFINED:
        return None
    log_snr = schedule.log_snr.cpu()
    # A slip that changes nothing explains nothing.
    claim = _Claim(name, params, target, schedule.is_flow)
    right = log_x0_weight(name, schedule, params) - claim.division(target, log_snr)
    for slip in _slips(claim, log_snr):
        if slip.table.isposinf().any() or float(distance(slip.table, right)) < _EXPLAINS:
            continue
        counted = (log_weights - slip.table).isfinite().double().mean()
        if counted > 0.9 and float(distance(log_weights, slip.table)) < _EXPLAINS:
            return slip.words
    return None


def parameter_slip(nearest: Fit, params: Mapping[str, float]) -> str:
    """How the parameters that were found differ from those that were claimed, in words."""
    changes = []
    for key, found in nearest.params.items():
        claimed = {**parameters_of(nearest.name), **params}[key]
        if math.isclose(found, claimed, rel_tol=0.01, abs_tol=0.01):
            continue
        changes.append(f"{key} is {found:g}, not {claimed:g}{_relation(found, claimed)}")
    return " and ".join(changes)


def _relation(found: float, claimed: float) -> str:
    """What was perhaps done to a parameter."""
    if claimed <= 0 or found <= 0:
        return ""
    relations = {
        "its inverse": 1 / claimed,
        "its square": claimed**2,
        "its square root": math.sqrt(claimed),
        "its inverse square": claimed**-2,
        "its natural logarithm": math.log(claimed),
        "its exponential": math.exp(min(claimed, 50.0)),
        "one more": claimed + 1,
    }
    for words, value in relations.items():
        if math.isclose(found, value, rel_tol=0.01):
            return f" ({words})"
    return ""
