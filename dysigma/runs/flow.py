"""Pipelines of flows: what diffusers asks of a network, put in terms of the run that trained it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..schedule import NoiseSchedule, make_schedule

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


def read_flow_scheduler(folder: Path, config: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """The saved scheduler, calling the network with timesteps of the run and stepping by velocities.

    diffusers calls the network of a flow with T s and takes what comes for noise - x0. Networks
    trained here are called with the number of the timestep, and may predict x0, noise or v.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = make_schedule("flow", config["num_timesteps"], shift=config.get("shift", 1.0))
    kind = config["prediction"]
    last = _last_usable_timestep(schedule, kind)

    class OfRun(FlowMatchEulerDiscreteScheduler):
        timesteps: Tensor

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            numbers = schedule.timestep_of(self.timesteps.cpu() / schedule.num_timesteps)
            self.timesteps = numbers.clamp(max=last).to(self.timesteps)
            self.set_begin_index(0)  # timesteps may repeat, so they do not tell where to begin

        def step(self, output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
            numbers = torch.full((len(sample),), int(timestep))
            velocity = schedule.to_velocity(output.cpu(), sample.cpu(), numbers, kind)
            return super().step(velocity.to(sample), timestep, sample, **kwargs)

    saved = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True)
    return OfRun.from_config(saved.config)


def _last_usable_timestep(schedule: NoiseSchedule, prediction_type: str) -> int:
    """At SNR 0 a network that predicts the noise says nothing about the image."""
    ends_in_noise = schedule.log_snr[-1] == -math.inf
    skipped = 1 if prediction_type == "epsilon" and ends_in_noise else 0
    return schedule.num_timesteps - 1 - skipped
