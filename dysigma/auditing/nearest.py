"""The named weighting nearest to a table of weights: over all names, targets and parameters, up to a factor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..schedule import PREDICTION_TYPES, NoiseSchedule
from .tables import distance, log_error_ratio, log_x0_weight, parameters_of, predefined_names

# Fits within one per cent of each other count as equal; the simpler then wins, and before it the name that was claimed.
_PER_PARAMETER = 0.01
_OTHER_TARGET = 0.005

# A root mean square of the log-ratio that rounding alone explains.
_EXACT = 1e-4

# How many fits on the grid are worth polishing, besides every name's fit to the given target.
_POLISHED = 6


@dataclass
class Fit:
    """A named weighting for the error of a target, and its distance from the audited weights."""

    name: str
    target: str
    params: dict[str, float]
    distance: float
    table: Tensor = field(repr=False)
    penalty: float = 0.0

    @property
    def score(self) -> float:
        """Distance plus what complexity costs: the least is nearest."""
        return self.distance + self.penalty


def find_nearest(
    log_weights: Tensor,
    schedule: NoiseSchedule,
    target: str,
    claims: str | None = None,
    params: Mapping[str, float] | None = None,
) -> Fit:
    """The nearest of all names of WEIGHTINGS that do not learn, for log-weights (T,) on the error of target.

    Distance is the root mean square of the log-ratio over timesteps. Parameters are fitted. Every
    target's conversion is tried, because the formula of another target is the commonest mistake.
    Among equals the claimed name wins, then fewer parameters, then the given target.
    """
    coarse = []
    for name in predefined_names():
        known = dict(params or {}) if name == claims else {}
        coarse += _on_grid(name, log_weights, schedule, target, known)
    for fit in coarse:
        is_claimed = fit.name == claims
        fit.penalty = 0.0 if is_claimed else _PER_PARAMETER * len(fit.params)
        fit.penalty += 0.0 if fit.target == target else _OTHER_TARGET
    best_first = sorted(coarse, key=_by_score)
    if best_first[0].distance < _EXACT:
        return best_first[0]
    of_target = [fit for fit in best_first[_POLISHED:] if fit.target == target]
    promising = [*best_first[:_POLISHED], *of_target]
    polished = [_polish(fit, log_weights, schedule, target) for fit in promising]
    return min(polished + best_first, key=_by_score)


def _by_score(fit: Fit) -> float:
    return fit.score if math.isfinite(fit.score) else math.inf


def _grid(name: str, schedule: NoiseSchedule, known: Mapping[str, float]) -> list[dict[str, float]]:
    """Parameters to try: the default ones, those that were claimed, and a grid around."""
    defaults = parameters_of(name)
    if not defaults:
        return [{}]
    size = 25 if len(defaults) == 1 else 13
    axes = []
    for key, default in defaults.items():
        if _must_be_positive(name, schedule, key):
            axes.append([default * factor for factor in np.geomspace(1e-3, 1e3, size).tolist()])
        else:
            axes.append([default + step for step in np.linspace(-12.0, 12.0, size).tolist()])
    points = [dict(zip(defaults, values, strict=True)) for values in itertools.product(*axes)]
    return [defaults, {**defaults, **known}, *points]


def _must_be_positive(name: str, schedule: NoiseSchedule, key: str) -> bool:
    try:
        log_x0_weight(name, schedule, {key: -1.0})
    except ValueError:
        return True
    return False


def _on_grid(
    name: str,
    log_weights: Tensor,
    schedule: NoiseSchedule,
    target: str,
    known: Mapping[str, float],
) -> list[Fit]:
    """The best point of the grid for the audited target and for each of the others."""
    points = _grid(name, schedule, known)
    tables = torch.stack([log_x0_weight(name, schedule, point) for point in points])
    log_snr = schedule.log_snr.cpu()
    fits = []
    for used in PREDICTION_TYPES:
        candidates = tables - log_error_ratio(log_snr, used, target, schedule.is_flow)
        distances = distance(log_weights, candidates)
        usable = torch.where(distances.isfinite(), distances, math.inf)
        # A point of the grid must be really better than the default, which comes first.
        best = int((usable > usable.min() + 1e-6).int().argmin())
        fits.append(Fit(name, used, points[best], float(usable[best]), candidates[best]))
    return fits


def _polish(fit: Fit, log_weights: Tensor, schedule: NoiseSchedule, target: str) -> Fit:
    """Minimise the distance over the parameters, from where the grid led, and round them if that costs nothing."""
    if not fit.params or fit.distance < _EXACT:
        return fit
    from scipy.optimize import minimize

    keys = list(fit.params)
    positive = {key: _must_be_positive(fit.name, schedule, key) for key in keys}
    log_snr = schedule.log_snr.cpu()
    conversion = log_error_ratio(log_snr, fit.target, target, schedule.is_flow)

    def params_at(point: np.ndarray) -> dict[str, float]:
        values = zip(keys, point.tolist(), strict=True)
        return {key: math.exp(value) if positive[key] else value for key, value in values}

    def table_at(params: dict[str, float]) -> Tensor:
        return log_x0_weight(fit.name, schedule, params) - conversion

    def loss(point: np.ndarray) -> float:
        if np.abs(point).max() > 50:
            return math.inf
        return float(distance(log_weights, table_at(params_at(point))))

    start = [math.log(v) if positive[key] else v for key, v in fit.params.items()]
    options = {"xatol": 1e-6, "fatol": 1e-9, "maxiter": 200 * len(keys)}
    found = minimize(loss, start, method="Nelder-Mead", options=options)
    params = params_at(found.x)
    rounded = {key: float(f"{value:.3g}") for key, value in params.items()}
    for choice in (rounded, params):
        table = table_at(choice)
        reached = float(distance(log_weights, table))
        if reached <= found.fun + 1e-3:
            return Fit(fit.name, fit.target, choice, reached, table, fit.penalty)
    return fit
