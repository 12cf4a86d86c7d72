"""Diffusers schedulers made to hold given levels. Each is read back before it is given out."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .reading import LAST_ALPHA, read_scheduler
from .tables import NoiseLevels, are_same, check_alphas_cumprod


def make_scheduler(
    levels: NoiseLevels, scheduler_class: type | None, prediction_type: str, options: dict[str, Any]
) -> Any:
    """A scheduler of this class with these levels; see NoiseSchedule.to_diffusers.

    prediction_type: the diffusers name of one that the path has.
    """
    if scheduler_class is not None and not isinstance(scheduler_class, type):
        raise TypeError(
            "to_diffusers takes a scheduler's class, such as diffusers.DDIMScheduler; got "
            f"{type(scheduler_class).__name__}"
        )
    if scheduler_class is None:
        import diffusers

        default = "FlowMatchEulerDiscreteScheduler" if levels.is_flow else "DDPMScheduler"
        scheduler_class = getattr(diffusers, default)
    make = _make_of_flow if levels.is_flow else _make_of_betas
    return make(levels, scheduler_class, prediction_type, options)


def _make_of_betas(
    levels: NoiseLevels, scheduler_class: type, prediction_type: str, options: dict[str, Any]
) -> Any:
    name = scheduler_class.__name__
    known = _parameters(scheduler_class)
    arguments: dict[str, Any] = {"num_train_timesteps": len(levels.alphas_cumprod), **options}
    if "prediction_type" in known:
        arguments["prediction_type"] = prediction_type
    elif prediction_type != "epsilon":
        raise ValueError(f"{name} steps by epsilon alone; got {prediction_type}")
    if "snr_shift_scale" in known:
        arguments.setdefault("snr_shift_scale", 1.0)  # the levels given are shifted already
    refused: TypeError | None = None
    for attempt in _attempts(levels, known):
        try:
            scheduler = scheduler_class(**{**attempt, **arguments})
        except NotImplementedError:  # the class does not know this beta_schedule
            continue
        except TypeError as error:  # an option that it does not take, or betas of another type
            refused = error
            continue
        if _holds(scheduler, levels):
            return scheduler
    if refused is not None:
        raise refused
    given = f" with {options}" if options else ""
    raise ValueError(f"{name}{given} cannot hold the levels of this schedule")


def _attempts(levels: NoiseLevels, known: set[str]) -> list[dict[str, Any]]:
    """Arguments that may make these levels in a scheduler, the most readable ones first."""
    if not {"num_train_timesteps", "beta_schedule", "trained_betas"} <= known:
        return []
    bar = levels.alphas_cumprod
    alphas = bar / torch.cat([bar.new_ones(1), bar[:-1]])
    attempts: list[dict[str, Any]] = [] if levels.config is None else [dict(levels.config)]
    # A class that knows of SNR 0 can perhaps sample from it.
    ends_at_zero = bool(bar[-1] == 0)
    if not ends_at_zero or "rescale_betas_zero_snr" in known:
        attempts.append({"trained_betas": (1 - alphas).tolist()})
    if ends_at_zero:
        alphas[-1] = LAST_ALPHA
        attempts.append({"trained_betas": (1 - alphas).tolist()})
    attempts.append({"trained_betas": (1 - alphas).numpy()})  # as RePaintScheduler wants them
    return attempts


def _make_of_flow(
    levels: NoiseLevels, scheduler_class: type, prediction_type: str, options: dict[str, Any]
) -> Any:
    name = scheduler_class.__name__
    known = _parameters(scheduler_class)
    arguments: dict[str, Any] = {"num_train_timesteps": len(levels.alphas_cumprod)}
    if {"use_flow_sigmas", "flow_shift"} <= known:
        if prediction_type == "v_prediction":
            raise ValueError(
                f"{name} reads v as on the variance-preserving path; convert outputs with "
                "to_velocity and give prediction_type='flow_prediction'"
            )
        arguments["use_flow_sigmas"] = True
        arguments["flow_shift"] = levels.shift
        arguments["prediction_type"] = prediction_type
    elif {"shift", "num_train_timesteps"} <= known:
        if prediction_type != "flow_prediction":
            raise ValueError(
                f"{name} steps by flow_prediction alone; convert outputs of {prediction_type} with "
                "to_velocity and leave prediction_type out"
            )
        arguments["shift"] = levels.shift
    else:
        raise ValueError(
            f"{name} holds no flow; use FlowMatchEulerDiscreteScheduler or one with use_flow_sigmas"
        )
    scheduler = scheduler_class(**{**arguments, **options})
    if not _holds(scheduler, levels):
        raise ValueError(f"{name} cannot hold the levels of this flow: they are no shift of s")
    return scheduler


def _holds(scheduler: Any, levels: NoiseLevels) -> bool:
    """Whether a scheduler just made has these levels, and finite numbers to sample with."""
    sigmas = torch.as_tensor(getattr(scheduler, "sigmas", 0.0))
    if not bool(sigmas.isfinite().all()):
        return False
    try:
        found = read_scheduler(scheduler).alphas_cumprod
        check_alphas_cumprod(found)
    except ValueError:
        return False
    return are_same(found, levels.alphas_cumprod)


def _parameters(scheduler_class: type) -> set[str]:
    """Names that a scheduler's constructor takes; a subclass that passes on **kwargs has its base's."""
    names: set[str] = set()
    for each in scheduler_class.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        names.update(p.name for p in parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
