"""Schedulers for the pipelines of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schedule import NoiseSchedule

if TYPE_CHECKING:
    from .flow_scheduler import FlowRunScheduler


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
    return _of_run(schedule.num_timesteps, schedule.shift, kind)


def read_flow_scheduler(folder: Path, config: dict[str, Any]) -> FlowRunScheduler:
    """The scheduler for a saved pipeline of a run on a flow, whichever scheduler was saved with it."""
    from .flow_scheduler import FlowRunScheduler

    FlowRunScheduler.load_config(folder, local_files_only=True)  # raises where it is damaged
    return _of_run(config["num_timesteps"], config.get("shift", 1.0), config["prediction"])


def _of_run(num_timesteps: int, shift: float, prediction: str) -> FlowRunScheduler:
    from .flow_scheduler import FlowRunScheduler

    return FlowRunScheduler(num_timesteps, shift, prediction)
