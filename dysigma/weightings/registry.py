"""Every weighting by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..checks import check_options, find_named
from ..schedule import NoiseSchedule
from .adaptive import _Adaptive, _Fixed, _loss_balance, _Random, _variance_aware
from .base import Setting, Weighting
from .dy_sigma import DySigma, _Uncertainty
from .formulas import PREDEFINED, Name
from .gramian import _UGD, _GramianRule

WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    **{name: partial(_Fixed, name) for name in PREDEFINED},
    "uncertainty": _Uncertainty,
    "ugd": _UGD,
    "loss-balance": partial(_Adaptive, _loss_balance),
    "variance-aware": partial(_Adaptive, _variance_aware),
    "random": _Random,
    "dy-sigma": DySigma,
    "gramian": _GramianRule,
}


def make_weighting(
    name: Name,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    normalize: bool = True,
    **params: Any,
) -> Weighting:
    """The named weighting for losses in the target space of prediction_type, on the device of the schedule.

    name: of WEIGHTINGS; or your own, as an object or "module:function" (imported, so run): a subclass of Weighting, a
    partial of one, or a function of log_snr that gives the log-weight on the x0 error, like those of PREDEFINED.
    normalize=True: weights of mean 1 over timesteps; False: the formula's own scale. params: those of the weighting, by
    name. Raises KeyError for an unknown name, ImportError for a module that does not load, ValueError for an unknown or
    bad parameter, epsilon where SNR = 0, a target that the schedule does not have, and weights all 0 or not finite.
    """
    found = find_named(name, WEIGHTINGS, "weighting")
    if not hasattr(schedule, "log_snr"):
        kind = type(schedule).__name__
        raise TypeError(
            f"schedule must be a NoiseSchedule; got {kind}: use NoiseSchedule.from_diffusers(scheduler)"
        )
    check_options(str(name), params, PREDEFINED.get(str(name), found))
    made = getattr(found, "func", found)  # of a partial
    factory = (
        found if isinstance(made, type) and issubclass(made, Weighting) else partial(_Fixed, name)
    )
    return factory(Setting(schedule, prediction_type, normalize), **params).to(
        schedule.log_snr.device
    )
