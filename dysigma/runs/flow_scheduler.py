"""The scheduler of a run on a flow that no scheduler of diffusers can sample. Imports diffusers."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

# diffusers looks here for how to open the class of a file that names this module.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..schedule import NoiseSchedule, make_schedule

__all__ = ["FlowRunScheduler", "SchedulerMixin"]


class FlowRunScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method that calls the network as its run did, and steps by what the network predicts.

    diffusers calls the network of a flow with T s and takes what comes for noise - x0. Networks
    trained here are called with the number of the timestep, and may predict x0, noise or v. A saved
    pipeline names this class, so that DDPMPipeline.from_pretrained either uses it or says which
    module to import first; it never samples wrongly in silence.
    """

    timesteps: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        run_prediction: str = "flow_prediction",
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)
        self.schedule = make_schedule("flow", num_train_timesteps, shift=shift)
        self.kind = self.schedule.canonical(run_prediction)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers does, with timesteps of the run in place of T s."""
        super().set_timesteps(*args, **kwargs)
        numbers = self.schedule.timestep_of(self.timesteps.cpu() / self.schedule.num_timesteps)
        last = _last_usable_timestep(self.schedule, self.kind)
        self.timesteps = numbers.clamp(max=last).to(self.timesteps)
        self.set_begin_index(0)  # timesteps may repeat, so they do not tell where to begin

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        """One step of Euler's method, by the velocity that the output implies."""
        numbers = torch.full((len(sample),), int(timestep))
        velocity = self.schedule.to_velocity(output.cpu(), sample.cpu(), numbers, self.kind)
        return super().step(velocity.to(sample), timestep, sample, **kwargs)


def _last_usable_timestep(schedule: NoiseSchedule, prediction_type: str) -> int:
    """At SNR 0 a network that predicts the noise says nothing about the image."""
    ends_in_noise = schedule.log_snr[-1] == -math.inf
    skipped = 1 if prediction_type == "epsilon" and ends_in_noise else 0
    return schedule.num_timesteps - 1 - skipped
