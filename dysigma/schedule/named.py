"""Noise schedules by name, and the check that something is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..checks import check_name, check_options, described
from .noise import NoiseSchedule

SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled-linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
    "flow": NoiseSchedule.flow,
}


def make_schedule(
    name: str, num_timesteps: int = 1000, *, zero_terminal_snr: bool = False, **params: float
) -> NoiseSchedule:
    """The named schedule. params are its own: beta_start, beta_end, offset, max_beta, shift.

    A flow ends at zero SNR, whatever zero_terminal_snr is. Raises KeyError with the choices for an
    unknown name, ValueError for a parameter that the schedule does not have.

    >>> make_schedule("flow", 1000, shift=3.0).is_flow
    True
    """
    check_name("schedule", name, SCHEDULES)
    make = SCHEDULES[name]
    check_options(f"schedule {name!r}", params, make)
    if name == "flow":
        return make(num_timesteps, **params)
    return make(num_timesteps, zero_terminal_snr=zero_terminal_snr, **params)


def configured_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that the configuration of a run names, one of before flows or shifts too.

    >>> configured_schedule({"schedule": "cosine", "num_timesteps": 100}).num_timesteps
    100
    """
    params = {"shift": config.get("shift", 1.0)} if config["schedule"] == "flow" else {}
    zero_terminal_snr = config.get("zero_terminal_snr", False)
    return make_schedule(
        config["schedule"], config["num_timesteps"], zero_terminal_snr=zero_terminal_snr, **params
    )


def check_schedule(schedule: Any) -> None:
    """Raise TypeError, with the way, unless schedule is a NoiseSchedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule; got {described(schedule)}: use make_schedule(name), or "
            "NoiseSchedule.from_diffusers(scheduler) with a scheduler that was made or opened"
        )
