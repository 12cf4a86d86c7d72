"""Schedulers for the pipelines of runs."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..schedule import NoiseSchedule, make_schedule


def pipeline_scheduler(schedule: NoiseSchedule, prediction: str) -> Any:
    """The scheduler that a saved pipeline of a run gets.

    It is one of diffusers wherever that samples rightly: on every variance-preserving schedule, and
    on a flow for flow_prediction without a shift, to one timestep. Other runs on a flow get a
    FlowRunScheduler.
    """
    if not schedule.is_flow:
        # Sampling must start at the last timestep, where a zero-terminal-SNR model learned what pure
        # noise is.
        return schedule.to_diffusers(prediction_type=prediction, timestep_spacing="trailing")
    kind = schedule.canonical(prediction)
    if kind == "flow_prediction" and schedule.shift == 1:
        return schedule.to_diffusers()
    return _flow_run_scheduler()(schedule.num_timesteps, schedule.shift, kind)


def read_flow_scheduler(folder: Path, config: dict[str, Any]) -> Any:
    """A FlowRunScheduler for the saved pipeline of a run, whichever scheduler was saved with it."""
    scheduler_class = _flow_run_scheduler()
    scheduler_class.load_config(folder, local_files_only=True)  # raises where it is damaged
    shift = config.get("shift", 1.0)
    return scheduler_class(config["num_timesteps"], shift, config["prediction"])


def __getattr__(name: str) -> Any:
    """What diffusers asks this module for, when it opens a pipeline that names it."""
    if name == "FlowRunScheduler":
        return _flow_run_scheduler()
    if name == "SchedulerMixin":  # tells it how to open the class
        from diffusers import SchedulerMixin

        return SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _flow_run_scheduler() -> Any:
    """The class FlowRunScheduler, made when it is first needed: diffusers is slow to import."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.configuration_utils import register_to_config

    class FlowRunScheduler(FlowMatchEulerDiscreteScheduler):
        """Euler's method that calls the network as its run did, and steps by what it predicts.

        diffusers calls the network of a flow with T s and takes what comes for noise - x0. Networks
        trained here are called with the number of the timestep, and may predict x0, noise or v. A
        saved pipeline names this class, so that DDPMPipeline.from_pretrained either uses it or says
        that dysigma must be imported first; it never samples wrongly in silence.
        """

        timesteps: Tensor

        @classmethod
        def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            # The file also holds options of the class above, at which diffusers would warn.
            names = ("num_train_timesteps", "shift", "run_prediction")
            own = {name: config_dict[name] for name in names if name in config_dict}
            return super().extract_init_dict(own, **kwargs)

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
            self.last = _last_usable_timestep(self.schedule, self.kind)

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            numbers = self.schedule.timestep_of(self.timesteps.cpu() / self.schedule.num_timesteps)
            self.timesteps = numbers.clamp(max=self.last).to(self.timesteps)
            self.set_begin_index(0)  # timesteps may repeat, so they do not tell where to begin

        def step(self, output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
            numbers = torch.full((len(sample),), int(timestep))
            velocity = self.schedule.to_velocity(output.cpu(), sample.cpu(), numbers, self.kind)
            return super().step(velocity.to(sample), timestep, sample, **kwargs)

    FlowRunScheduler.__qualname__ = "FlowRunScheduler"  # pickle looks for it in this module
    return FlowRunScheduler


def _last_usable_timestep(schedule: NoiseSchedule, prediction_type: str) -> int:
    """At SNR 0 a network that predicts the noise says nothing about the image."""
    ends_in_noise = schedule.log_snr[-1] == -math.inf
    skipped = 1 if prediction_type == "epsilon" and ends_in_noise else 0
    return schedule.num_timesteps - 1 - skipped
