"""The training levels of a diffusers scheduler, read from its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import described
from .tables import (
    BETAS,
    NoiseLevels,
    are_same,
    cosine,
    falls,
    flow_alphas_cumprod,
    flow_shares,
    products,
)

# What alphas_cumprod ends at in schedulers of diffusers that cannot sample from exactly 0.
DIFFUSERS_ZERO = 2.0**-24

# The last alpha in place of 0 when one of our schedules goes to such a scheduler. As a power of two
# it is exact in float32, so that reading the scheduler back recognises it.
LAST_ALPHA = 2.0**-12

_HOW_TO_GIVE_LEVELS = (
    "Give its levels yourself, clean to noisy, in float64: NoiseSchedule(log_snr.sigmoid()), for "
    "EDM with log_snr = -2 ln sigma; and call weighting.at(losses, log_snr) at the levels drawn"
)


def read_scheduler(scheduler: Any) -> NoiseLevels:
    """The levels that a diffusers scheduler is for; see NoiseSchedule.from_diffusers."""
    _check_is_scheduler(scheduler)
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    table = getattr(scheduler, "alphas_cumprod", None)
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} has timestep_type='continuous': its network was trained on a continuum of "
            f"levels, and alphas_cumprod does not hold them. {_HOW_TO_GIVE_LEVELS}"
        )
    is_flow = hasattr(scheduler, "scale_noise") if table is None else config.get("use_flow_sigmas")
    if is_flow:
        return _read_flow(scheduler, config)
    if isinstance(table, np.ndarray | list | tuple):
        table = torch.as_tensor(table)
    if not isinstance(table, Tensor):
        raise ValueError(
            f"{name} has no alphas_cumprod and is no plain flow matching: its training levels "
            f"are unknown. {_HOW_TO_GIVE_LEVELS}"
        )
    betas = getattr(scheduler, "betas", None)
    betas = None if betas is None else torch.as_tensor(betas)
    bar = _read_alphas_cumprod(table, betas, config)
    return NoiseLevels(bar, config=_config_that_makes(bar, config))


def _check_is_scheduler(scheduler: Any) -> None:
    """Raise TypeError, with the way, for what is near a scheduler object and none."""
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return
    is_object = not isinstance(scheduler, type | str | Mapping)
    if not is_object or not (hasattr(scheduler, "step") or hasattr(scheduler, "set_timesteps")):
        raise TypeError(
            f"from_diffusers takes a scheduler object; got {described(scheduler)}: of a pipeline give "
            "its .scheduler, of a model DDPMScheduler.from_pretrained(model, subfolder='scheduler'), of "
            "a config DDPMScheduler.from_config(config)"
        )


def _read_flow(scheduler: Any, config: Mapping[str, Any]) -> NoiseLevels:
    num_timesteps = config.get("num_train_timesteps")
    if not num_timesteps or config.get("invert_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod and is no plain flow matching "
            "(num_train_timesteps levels that are not inverted): its training levels are "
            f"unknown. {_HOW_TO_GIVE_LEVELS}"
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if config.get("use_dynamic_shifting"):
        shift = 1.0
    s = flow_shares(num_timesteps, shift)
    named = NoiseLevels(flow_alphas_cumprod(s), is_flow=True, shift=float(shift))
    has_sampled = getattr(scheduler, "num_inference_steps", None) is not None
    if has_sampled or config.get("use_flow_sigmas"):
        return named
    # Until it is set to sample, the table of the scheduler holds the levels of training.
    own = scheduler.sigmas.detach().to("cpu", torch.float64)[:num_timesteps].flip(0)
    if own.shape != s.shape or torch.allclose(own, s, atol=1e-5):
        return named
    return NoiseLevels(flow_alphas_cumprod(own), is_flow=True)


def _read_alphas_cumprod(table: Tensor, betas: Tensor | None, config: Mapping[str, Any]) -> Tensor:
    """The training levels in a scheduler's float32 table, in float64."""
    bar = table.detach().to("cpu", torch.float64)
    if bar.ndim != 1 or len(bar) < 2:
        return bar
    replaced = config.get("rescale_betas_zero_snr") and bar[-1] == DIFFUSERS_ZERO
    if replaced or bar[-1] == bar[-2] * LAST_ALPHA:
        bar = torch.cat([bar[:-1], bar.new_zeros(1)])
    smallest = torch.finfo(torch.float32).tiny
    is_exact = falls(bar) and bool((bar[:-1] > smallest).all())
    if is_exact or betas is None:
        return bar
    # Products below the smallest float32, or nearer to 1 than its step, are lost in the table but not
    # in the betas that made it.
    exact = products(betas.detach().to("cpu", torch.float64))
    if exact.shape == bar.shape and torch.allclose(exact, bar, rtol=1e-2, atol=1e-6):
        ends_at_zero = bar[-1] == 0 and bar[-2] > smallest
        return torch.cat([exact[:-1], bar.new_zeros(1)]) if ends_at_zero else exact
    return bar


def _config_that_makes(bar: Tensor, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of a scheduler's config that name this table; None where it was made in another way."""
    name = config.get("beta_schedule")
    if name == "squaredcos_cap_v2":
        named = cosine(len(bar), 0.008, 0.999)
        kept = {"beta_schedule": name}
    elif name in BETAS:
        kept = {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end")}
        named = products(BETAS[name](kept["beta_start"], kept["beta_end"], len(bar)))
    else:
        return None
    return kept if are_same(named, bar) else None
