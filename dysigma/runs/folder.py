"""Run folders read back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..schedule import configured_schedule
from .checkpoints import load_checkpoint
from .files import RunError, read_config, read_metrics
from .flow import pipeline_scheduler, read_flow_scheduler
from .locks import is_in_use

if TYPE_CHECKING:
    import pandas
    from diffusers import DiffusionPipeline
    from torch import Tensor

# A file of any of these names beside a damaged one tells that the folder was a run or a race.
MARKS = {"race.json", "summary.json", "metrics.jsonl"}


@dataclass(frozen=True)
class Run:
    """A run folder read back."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def metrics(self) -> pandas.DataFrame:
        """One row per log line: step, images, loss, grad_norm, bin_losses (list of K), weights (list of K), ..."""
        import pandas

        return pandas.DataFrame(read_metrics(self.path / "metrics.jsonl"))

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers DDPMPipeline with the EMA weights.

        A run that has not ended gives the EMA weights of its last checkpoint, and a warning that
        says after how many images.

        That of a flow has a FlowRunScheduler, which knows how the run calls its network. Opened
        with DDPMPipeline.from_pretrained it is the same, after `import dysigma`; without that
        import diffusers says that it is missing, except for flow_prediction without a shift, which
        needs nothing of ours and is right to one timestep. Raises RunError if the run has written
        neither a pipeline nor a checkpoint yet, or it is damaged.
        """
        folder = self.path / "pipeline"
        if not (folder / "model_index.json").exists():
            return self._pipeline_so_far()
        try:
            return _read_pipeline(folder, self.config)
        except Exception as error:  # damaged files raise almost anything
            raise RunError(f"{folder} is damaged ({str(error).splitlines()[0]})") from None

    def _pipeline_so_far(self) -> DiffusionPipeline:
        """Of the last checkpoint, with a warning."""
        status = self.summary.get("status")
        nothing_yet = f"{self.path} has no pipeline yet (status: {status})"
        if not (self.path / "checkpoint/latest.json").exists():
            raise RunError(f"{nothing_yet}, and no checkpoint: let it train on")
        step, tensors, meta = load_checkpoint(self.path / "checkpoint")
        if "network" not in meta:
            raise RunError(
                f"{nothing_yet}: finish it with dysigma train --resume --out {self.path}"
            )
        images = step * self.config["batch_size"]
        warnings.warn(
            f"{self.path} has not ended: averaged weights after {images:,} of "
            f"{self.config['images']:,} images",
            stacklevel=3,
        )
        return _make_pipeline(tensors, meta["network"], self.config)


def _make_pipeline(
    tensors: dict[str, Tensor], network_config: dict[str, Any], config: dict[str, Any]
) -> DiffusionPipeline:
    """The pipeline that a run writes at its end, from the tensors of a checkpoint."""
    from diffusers import DDPMPipeline, UNet2DModel

    network = UNet2DModel.from_config(network_config)
    averages = {}
    for name, value in tensors.items():
        if name.startswith("ema."):
            averages[name.removeprefix("ema.")] = value
    network.load_state_dict(averages)
    schedule = configured_schedule(config)
    return DDPMPipeline(network.eval(), pipeline_scheduler(schedule, config["prediction"]))


def _read_pipeline(folder: Path, config: dict[str, Any]) -> DiffusionPipeline:
    """Read part by part and never from a pickle: nothing is imported because a file names it."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel.from_pretrained(
        folder / "unet",
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,  # to use little wants accelerate
    )
    if config.get("schedule") == "flow":
        scheduler = read_flow_scheduler(folder / "scheduler", config)
    else:
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    return DDPMPipeline(network, scheduler)


def load_run(path: str | Path) -> Run:
    """Read a run folder; RunError if it is not one."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise RunError(
            f"{path} is not a run folder (it has no config.json); dysigma runs FOLDER lists those there are"
        )
    summary = path / "summary.json"
    return Run(
        path=path,
        config=read_config(path / "config.json"),
        summary=read_config(summary) if summary.exists() else {},
    )


class Found(NamedTuple):
    """A line of the list of runs."""

    path: Path
    state: str  # running, interrupted, finished, failed or damaged
    progress: str
    last: str  # of a damaged one: the damage


def find_runs(folder: Path) -> Iterator[Found]:
    """Each run and race in and below a folder; anything else is passed over.

    Reads text alone: a damaged checkpoint shows when the run is resumed. RunError if there is no
    such folder.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}")
    for at, folders, files in os.walk(folder):
        path = Path(at)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        try:
            if "race.json" in files:
                yield _describe_race(path)
            elif "config.json" in files and _is_run(path):
                yield _describe_run(path)
        # What a file holds may be anything.
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if MARKS.intersection(files):
                yield Found(path, "damaged", "", str(error))


def _is_run(path: Path) -> bool:
    return {"weighting", "images"} <= read_config(path / "config.json").keys()


def _describe_race(path: Path) -> Found:
    race = read_config(path / "race.json")
    rows = read_metrics(path / "records.jsonl")
    # A grid entry may name the arms that are raced under it.
    of_a_seed = [len(fields.get("arms", race["arms"])) for fields in race["grid"].values()]
    total = len(race["seeds"]) * sum(of_a_seed)
    last = ""
    if rows:
        last = " ".join(str(rows[-1][key]) for key in ("grid", "arm", "seed"))
    state = "finished" if len(rows) == total else "interrupted"
    return Found(path, _or_running(path, state), f"{len(rows)} of {total} trainings", last)


def describe_loss(loss: float, prediction: str, images: int | None = None) -> str:
    """The words with which all commands tell a validation loss, the unweighted mean over timesteps.

    images: how many test images it is of; runs of before 0.1.0 do not say.

    >>> describe_loss(0.04321, "epsilon", 64)
    'validation loss 0.0432 (epsilon error of the EMA weights on 64 test images)'
    """
    count = "" if images is None else f"{images} "
    return (
        f"validation loss {loss:.4f} ({prediction} error of the EMA weights on {count}test images)"
    )


def _describe_run(path: Path) -> Found:
    run = load_run(path)
    rows = read_metrics(path / "metrics.jsonl")
    latest = rows[-1] if rows else {"images": 0}
    progress = f"{latest['images']:,} of {run.config['images']:,} images"
    last = run.config["weighting"]
    if "validation_loss" in run.summary:
        loss = run.summary["validation_loss"]
        images = run.summary.get("validation_images")
        last += ", " + describe_loss(loss, run.config["prediction"], images)
    elif "loss" in latest:
        last += f", weighted training loss {latest['loss']:.4g}"
    states = {"done": "finished", "failed": "failed"}
    state = states.get(str(run.summary.get("status")), "interrupted")
    return Found(path, _or_running(path, state), progress, last)


def _or_running(path: Path, state: str) -> str:
    return "running" if is_in_use(path) else state
