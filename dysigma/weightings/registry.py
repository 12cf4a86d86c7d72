"""Every weighting by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..checks import check_options, find_named, keyword_parameters, plain_number
from ..schedule import NoiseSchedule, check_schedule
from .adaptive import LossBalance, Predefined, RandomWeighting, VarianceAware
from .base import Setting, Weighting
from .dy_sigma import DySigma, Uncertainty
from .formulas import PREDEFINED, Name
from .gramian import UGD, GramianRule
from .scalarization import Scalarization

WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    **{name: partial(Predefined, name) for name in PREDEFINED},
    "uncertainty": Uncertainty,
    "ugd": UGD,
    "loss-balance": LossBalance,
    "variance-aware": VarianceAware,
    "random": RandomWeighting,
    "dy-sigma": DySigma,
    "gramian": GramianRule,
    "scalarization": Scalarization,
}


def make_weighting(
    name: Name,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    normalize: bool = True,
    **params: Any,
) -> Weighting:
    """The named weighting for losses in the target space of prediction_type, on the device of the
    schedule.

    name: of WEIGHTINGS; or your own, as an object or "module:function" (imported, so run): a
    subclass of Weighting, a partial of one, or a function of log_snr that gives the log-weight on
    the x0 error, like those of PREDEFINED. normalize=True: weights of mean 1 over timesteps; False:
    the formula's own scale. params: those of the weighting, by name. Raises KeyError for an unknown
    name, ImportError for a module that does not load, TypeError for what is no NoiseSchedule,
    ValueError for an unknown or bad parameter, epsilon where SNR = 0 off the flow, a target that the schedule
    does not have, and weights all 0 or not finite.

    >>> weighting = make_weighting("p2", NoiseSchedule.linear(1000), "v_prediction", gamma=0.5)
    >>> weighting
    p2(k=1.0, gamma=0.5, target=v_prediction)
    >>> tuple(weighting.weights().shape)
    (1000,)
    """
    if isinstance(name, nn.Module):
        raise TypeError(
            f"name must be a name of WEIGHTINGS, a function or a class; got a {type(name).__name__} as an object"
        )
    found = find_named(name, WEIGHTINGS, "weighting")
    check_schedule(schedule)
    function = PREDEFINED.get(name, found) if isinstance(name, str) else found
    params = {key: plain_number(value) for key, value in params.items()}
    check_options(str(name), params, function)
    made = getattr(found, "func", found)  # of a partial
    is_class = isinstance(made, type) and issubclass(made, Weighting)
    factory = found if is_class else partial(Predefined, name)
    weighting: Weighting = factory(Setting(schedule, prediction_type, normalize), **params)
    weighting.name = name if isinstance(name, str) else getattr(made, "__name__", str(made))
    weighting.params = _all_parameters(function, params)
    return weighting.to(schedule.log_snr.device)


def _all_parameters(function: Callable[..., Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter that has a value, given or by default, in the order of the signature; None is
    none."""
    every = {key: each.default for key, each in keyword_parameters(function).items()}
    every.update(params)
    return {key: value for key, value in every.items() if value is not None}
