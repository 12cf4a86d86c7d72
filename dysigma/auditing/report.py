"""The audit: what a function of the noise level weighs, next to what it claims to weigh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_name, check_options
from ..samplers import TimestepSampler
from ..schedule import NoiseSchedule, check_schedule
from ..weightings import PREDEFINED, WEIGHTINGS, effective_sample_size, make_weighting
from . import mistakes
from .levels import WeightFunction, call, from_log_snr, read_weights
from .nearest import Fit, find_nearest
from .tables import (
    TOLERANCE,
    as_float,
    log_error_ratio,
    log_ratio,
    log_x0_weight,
    share_off,
    total_variation,
)


@dataclass
class Audit:
    """What `audit` found. Every comparison is up to a factor: the median ratio over timesteps is taken out.

    agrees: no timestep is more than 10 per cent off. off: share of timesteps that are.
    total_variation: share of the total weight that sits elsewhere. ratio_at_noisiest: of the weight
    to the claimed one at the last timestep; inf if the claim is 0 there. factor: the median ratio
    itself. nearest: {"name", "target", "params"} of the named weighting nearest to the weights, and
    nearest_off, the share of timesteps more than 10 per cent off it. effective_sample_size: share
    of timesteps that does the work. at_zero_snr, at_infinite_snr: where the weight goes, in words.
    right_formula: the claim as code. weights, reference: (T,) float64, of mean 1, on the error of
    target; log_snr: (T,). All three are (T - 1,) for a noise network on a flow that ends in pure
    noise.
    """

    target: str
    claims: str | None
    params: dict[str, float]
    agrees: bool
    off: float
    total_variation: float
    ratio_at_noisiest: float
    factor: float
    nearest: dict[str, Any]
    nearest_off: float
    diagnosis: str
    right_formula: str
    effective_sample_size: float
    at_zero_snr: str
    at_infinite_snr: str
    log_snr: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    reference: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tables, ready for JSON; an infinite or undefined ratio becomes None."""
        tables = ("log_snr", "weights", "reference")
        record: dict[str, Any] = {}
        for key, value in vars(self).items():
            if key in tables:
                continue
            is_number = isinstance(value, float)
            record[key] = None if is_number and not math.isfinite(value) else value
        return record

    def __str__(self) -> str:
        wanted = mistakes.target_in_words(self.target)
        nearest = _named(self.nearest["name"], self.nearest["params"])
        nearest += f" on {mistakes.target_in_words(self.nearest['target'])}"
        if self.nearest_off > 0:
            nearest += f", roughly ({self.nearest_off:.1%} of the timesteps are off)"
        if self.claims is None:
            claim = "No claim was given; the figures compare with the nearest named weighting."
        else:
            verdict = "agrees with" if self.agrees else "is not"
            claim = f"The weight {verdict} {_named(self.claims, self.params)} on {wanted}."
        rows = [
            ("more than 10 % off", f"{self.off:.1%} of the timesteps"),
            ("weight that sits elsewhere", f"{self.total_variation:.1%} of the total"),
            ("ratio at the noisiest step", f"{self.ratio_at_noisiest:.3g}"),
            ("effective sample size", f"{self.effective_sample_size:.1%} of the timesteps"),
            ("as SNR goes to 0", self.at_zero_snr),
            ("as SNR goes to infinity", self.at_infinite_snr),
            ("what it really is", nearest),
            ("right formula" if self.claims else "formula of the nearest", self.right_formula),
        ]
        lines = [f"  {label:28} {value}" for label, value in rows]
        return "\n".join([claim, self.diagnosis, *lines])


def _named(name: str, params: Mapping[str, float]) -> str:
    values = ", ".join(f"{key} = {value:g}" for key, value in params.items())
    return f"{name} ({values})" if values else name


def audit(
    function: WeightFunction | str,
    schedule: NoiseSchedule,
    target: str,
    claims: str | None = None,
    params: Mapping[str, float] | None = None,
    as_: str = "snr",
    sampler: TimestepSampler | None = None,
) -> Audit:
    """Compare loss weights with what they claim to be, name what they are, and say what probably went wrong.

    function: takes noise levels (N,) in the unit as_ ("snr", "log_snr", "sigma" or "timesteps", see
    `levels`) and returns the weights (N,) on the squared error of target; or the name of a
    weighting. claims, params: the name and the parameters that the weights should have; without a
    claim they are compared with the nearest named weighting.
    sampler: a density of timesteps. The weight is multiplied by it, which gives the objective of a
    training run that draws so, as a weight over uniform timesteps. A sampler that is corrected for
    its density changes nothing.
    A network that predicts the noise has weight 0 at a last level of pure noise, with which flows
    end. There the function is not called, and all tables end one level before.

    Raises ValueError if the function returns another shape, values that are negative, NaN or
    infinite, or a weight that depends on more than its own level; KeyError for an unknown name;
    TypeError for what is no NoiseSchedule.

    >>> from dysigma import NoiseSchedule, audit
    >>> schedule = NoiseSchedule.scaled_linear()
    >>> found = audit(lambda snr: snr.clamp(max=5) / snr, schedule, "v_prediction", claims="min-snr")
    >>> found.agrees, round(found.total_variation, 2), found.nearest["target"]
    (False, 0.4, 'epsilon')
    """
    check_schedule(schedule)
    target = schedule.canonical(target)
    values = {key: as_float(key, value) for key, value in (params or {}).items()}
    _check_claim(claims, values)
    full = schedule
    if target == "epsilon" and schedule.is_flow and schedule.has_zero_terminal_snr:
        if schedule.num_timesteps < 3:
            raise ValueError(
                f"epsilon on a flow is audited without its last level; got {schedule.num_timesteps} "
                "timesteps, and 3 or more are wanted"
            )
        schedule = NoiseSchedule(full.alphas_cumprod[:-1], is_flow=True)
    is_named = isinstance(function, str)
    weights = weights_of(function, full if is_named else schedule, target, as_)
    weights = weights[: schedule.num_timesteps]
    if sampler is not None and not sampler.corrected:
        density = sampler.probabilities().cpu() * full.num_timesteps
        weights = weights * density[: schedule.num_timesteps]
    log_weights = weights.log()
    log_snr = schedule.log_snr.cpu()

    nearest = find_nearest(log_weights, schedule, target, claims, values)
    nearest_off = share_off(log_weights, nearest.table)
    if claims is None:
        reference = nearest.table
    else:
        if target == "epsilon" and schedule.has_zero_terminal_snr:
            raise ValueError(
                "epsilon has no weight where SNR = 0 (zero terminal SNR); audit v_prediction or sample there"
            )
        conversion = log_error_ratio(log_snr, target, target, schedule.is_flow)
        reference = log_x0_weight(claims, schedule, values) - conversion
    off = share_off(log_weights, reference)
    agrees = off == 0 and (claims is not None or nearest.target == target)
    right_formula = mistakes.code_of(
        claims or nearest.name, target, values if claims else nearest.params, schedule.is_flow
    )
    return Audit(
        target=target,
        claims=claims,
        params=values,
        agrees=agrees,
        off=off,
        total_variation=total_variation(log_weights, reference),
        ratio_at_noisiest=_last_ratio(log_weights, reference),
        factor=float((log_weights - reference).nanmedian().exp()),
        nearest={"name": nearest.name, "target": nearest.target, "params": nearest.params},
        nearest_off=nearest_off,
        diagnosis=_diagnosis(
            log_weights, schedule, target, claims, values, nearest, nearest_off, agrees
        ),
        right_formula=right_formula,
        effective_sample_size=float(effective_sample_size(weights)),
        at_zero_snr=_limit(function, schedule, as_, sampler, -1),
        at_infinite_snr=_limit(function, schedule, as_, sampler, 1),
        log_snr=log_snr,
        weights=weights / weights.mean(),
        reference=reference.softmax(0) * len(reference),
    )


def _check_claim(claims: str | None, params: Mapping[str, float]) -> None:
    if claims is None:
        if params:
            raise ValueError(f"parameters {sorted(params)} were given without a claim")
        return
    check_name("weighting", claims, WEIGHTINGS)
    check_options(claims, params, PREDEFINED.get(claims, WEIGHTINGS[claims]))


def weights_of(
    function: WeightFunction | str, schedule: NoiseSchedule, target: str, as_: str = "snr"
) -> Tensor:
    """The weights (T,) float64 that are audited, before any density; arguments as those of audit."""
    if callable(function):
        return read_weights(function, schedule, as_)
    return make_weighting(function, schedule, target).weights().double().cpu()


def _last_ratio(log_weights: Tensor, reference: Tensor) -> float:
    """The ratio at the noisiest timestep where not both weights are 0."""
    ratio = log_ratio(log_weights, reference)
    defined = ratio[~ratio.isnan()]
    return float(defined[-1].exp())


def _diagnosis(
    log_weights: Tensor,
    schedule: NoiseSchedule,
    target: str,
    claims: str | None,
    params: Mapping[str, float],
    nearest: Fit,
    nearest_off: float,
    agrees: bool,
) -> str:
    """The likely mistake in a sentence or two."""
    found = _named(nearest.name, nearest.params)
    on = mistakes.target_in_words(nearest.target)
    if claims is None:
        if nearest_off > 0:
            return f"No named weighting gives it; the nearest is {found} on the error of {on}."
        return f"It is {found} on the error of {on}."
    if agrees:
        return "Within 10 per cent of the claim at every timestep, up to a factor."
    is_exact = nearest_off == 0
    if is_exact and nearest.name == claims and nearest.target == target:
        return f"The parameters are others: {mistakes.parameter_slip(nearest, params)}."
    slip = mistakes.find_slip(log_weights, schedule, target, claims, params)
    if slip is not None:
        return f"Likely mistake: {slip}."
    if is_exact:
        return f"Likely mistake: another formula; this is {found} on the error of {on}."
    return (
        f"No single slip in {claims} gives this weight. The nearest named weighting is {found} on the error of "
        f"{on}, and {nearest_off:.0%} of the timesteps are more than {TOLERANCE:.0%} off that one too."
    )


def _limit(
    function: WeightFunction | str,
    schedule: NoiseSchedule,
    as_: str,
    sampler: TimestepSampler | None,
    direction: int,
) -> str:
    """Where the weight goes as log-SNR goes to -infinity or infinity (direction -1 or 1), in words."""
    if isinstance(function, str) or as_ == "timesteps" or sampler is not None:
        return "not known: a table over timesteps ends with the schedule"
    log_snr = direction * torch.tensor([24.0, 23.0], dtype=torch.float64)
    try:
        far, near = call(function, from_log_snr(log_snr, as_, schedule.is_flow)).tolist()
    except ValueError as error:
        return str(error)
    if not (math.isfinite(far) and math.isfinite(near)) or min(far, near) < 0:
        return "not finite, or negative"
    if far == 0:
        return "0"
    if near == 0:
        return "grows from 0"
    power = round(direction * math.log(far / near), 2)
    if abs(power) < 0.02:
        return f"tends to a constant, {far:.3g}"
    towards = "grows" if power * direction > 0 else "goes to 0"
    return f"{towards} like SNR^{power:g}"
