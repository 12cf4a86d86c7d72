"""From steps to a run folder: metrics, checkpoints, summary, and what divergence leaves behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import runs
from ..bins import Bins
from ..data.dataset import ImageData
from ..images import save_grid
from ..runs.files import RunError
from ..runs.flow import pipeline_scheduler
from .config import TrainConfig
from .identity import identity
from .measures import Measures
from .parallel import from_first, rank_and_count
from .parts import build
from .precision import low_precision
from .step import StepRecord, TrainingDiverged
from .tracking import Tracker

FINAL_SAMPLES = 64
FINAL_SAMPLING_STEPS = 50


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what goes wrong in writing a run folder into a RunError that says how to go on."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write to {out} ({reason}); what was saved before is whole: make room and go on "
            "with --resume, or choose another --out"
        ) from None


class Recorder:
    """Turns step records into the run folder. Only the first rank writes.

    earlier: the summary of the part of the run that this one goes on with, {} for a new run.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        test: ImageData,
        out: Path,
        *,
        norm_num_groups: int | None = None,
        earlier: dict[str, Any] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.config, self.out, self.tracker = config, out, tracker
        self.state = build(config, data, norm_num_groups=norm_num_groups)
        self.measures = Measures(config, self.state, data, test)
        self.device = data.images.device
        rank, ranks = rank_and_count()
        self.first = rank == 0
        self.pending: list[StepRecord] = []
        self.skipped = 0
        self.seconds = 0.0
        self.since = time.perf_counter()

        self.provenance = runs.provenance()
        if ranks > 1:
            self.provenance["ranks"] = ranks
        started = (earlier or {}).get("provenance")
        if started and started != self.provenance:
            self.provenance["resumed_from"] = started
        # What the run is and no option says.
        network: Any = self.state.model
        precision = low_precision(config, self.device) or torch.float32
        self.about: dict[str, Any] = {
            "precision": str(precision).removeprefix("torch."),
            "compile": "no",
            "norm_num_groups": network.config.norm_num_groups,
        }
        if self.first:
            self.about["data"] = {
                "train": identity(data, with_labels=config.conditional),
                "test": identity(test, with_labels=config.conditional),
            }
            if config.distance_images:
                self.measures.prepare_distance()

    def begin(self) -> None:
        """Write config.json, and metrics.jsonl without the lines after the step that is gone on from."""
        rows = []
        if self.state.step:
            rows = runs.read_metrics(self.out / "metrics.jsonl", until_step=self.state.step)
        lines = [json.dumps(row) + "\n" for row in rows]
        with writing(self.out):
            runs.write_json(self.out / "config.json", self.config.to_dict())
            runs.write_atomically(self.out / "metrics.jsonl", "".join(lines))

    def log(self, *, validate: bool, report: bool) -> None:
        """Write one metrics line for the steps since the last one, with a validation and a report of conflicts."""
        if not self.first:
            self.pending.clear()
            return
        measured: dict[str, Any] = {}
        if validate:
            measured.update(self.measures.validate())
            measured.update(self.measures.distance())
        if report:
            measured.update(self.measures.conflicts())
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now
        row: dict[str, Any] = {
            "step": self.state.step,
            "images": self.state.step * self.config.batch_size,
            "seconds": round(self.seconds, 3),
        }
        if self.pending:
            row.update(self._means_of_steps())
        row.update(measured)
        with writing(self.out):
            runs.append_metrics(self.out / "metrics.jsonl", row)
        if self.tracker is not None:
            self.tracker.log(row)
        self.pending.clear()

    def _means_of_steps(self) -> dict[str, Any]:
        """Means over the steps not yet logged, and losses and weights by timestep bin."""
        loss = self._column("loss")
        norms = self._column("grad_norm")
        losses = self._column("losses")
        timesteps = self._column("timesteps")
        weights = self.state.weighting.weights().cpu()
        bins = Bins.uniform(self.config.num_timesteps, self.config.bins)
        row: dict[str, Any] = {"loss": float(loss.mean())}
        if not self.state.scaler.is_enabled():
            row["grad_norm"] = float(norms.mean())
        else:
            taken = norms.isfinite()
            skipped = int(taken.logical_not().sum())
            self.skipped += skipped
            row["grad_norm"] = float(norms[taken].mean()) if taken.any() else 0.0
            row["skipped_steps"] = skipped
        row["mean_loss"] = float(losses.mean())
        row["bin_losses"] = bins.mean(losses, timesteps)[0]
        row["bin_weights"] = bins.mean(weights, torch.arange(len(weights)))[0]
        return row

    def _column(self, name: str) -> Tensor:
        return torch.cat([getattr(record, name).view(-1) for record in self.pending]).cpu()

    def save(self, status: str) -> None:
        """Write a checkpoint, the steps not yet logged included, then the summary."""
        if not self.first:
            return
        tensors, rest = self.state.state_dict()
        if self.pending:
            for name in StepRecord._fields:
                column = [torch.as_tensor(getattr(record, name)) for record in self.pending]
                tensors[f"pending.{name}"] = torch.stack(column)
        rest["seconds"] = self.seconds
        rest["config"] = self.config.to_dict()
        network: Any = self.state.model
        rest["network"] = dict(network.config)  # makes the network again without the images
        if self.state.scaler.is_enabled():
            rest["skipped_steps"] = self.skipped
        with writing(self.out):
            runs.save_checkpoint(self.out / "checkpoint", self.state.step, tensors, rest)
        self.summarise(status)

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, if there is one; the first rank reads it for all."""
        folder = self.out / "checkpoint"
        found = None
        if self.first and any(folder.glob("*.json")):
            found = runs.load_checkpoint(folder, self.config.to_dict())
        found = from_first(found, self.device)
        if found is None:
            return
        step, tensors, rest = found
        try:
            self.pending = self._pending_of(tensors)
            self.seconds = rest["seconds"]
            self.skipped = rest.get("skipped_steps", 0)
            self.state.load_state_dict(step, tensors, rest)
        except (RuntimeError, ValueError, KeyError) as error:
            cause = str(error).splitlines()[0]
            raise RunError(
                f"{folder} does not fit this run ({cause}): move it away to start again"
            ) from None

    def _pending_of(self, tensors: dict[str, Tensor]) -> list[StepRecord]:
        """The steps that a checkpoint holds and metrics.jsonl does not."""
        if "pending.step" not in tensors:
            return []
        columns = [tensors[f"pending.{name}"].to(self.device) for name in StepRecord._fields[1:]]
        steps = tensors["pending.step"].tolist()
        rows = zip(steps, *columns, strict=True)
        return [StepRecord(int(step), *values) for step, *values in rows]

    def summarise(self, status: str, **more: Any) -> None:
        """Write summary.json."""
        if not self.first:
            return
        summary: dict[str, Any] = {
            "status": status,
            "step": self.state.step,
            "seconds": round(self.seconds, 3),
            "images": self.state.step * self.config.batch_size,
            "validation_images": len(self.measures.images),
        }
        summary.update(more)
        if self.state.scaler.is_enabled():
            summary["skipped_steps"] = self.skipped
        summary.update(self.about)
        summary["provenance"] = self.provenance
        with writing(self.out):
            runs.write_json(self.out / "summary.json", summary)

    def finish(self) -> None:
        """Write the diffusers pipeline with the EMA weights, a grid of samples, and the summary."""
        from diffusers import DDPMPipeline

        losses = self.measures.validate()["validation_losses"]
        scheduler = pipeline_scheduler(self.state.schedule, self.config.prediction)
        with writing(self.out):
            pipeline = DDPMPipeline(self.measures.ema_model, scheduler)
            pipeline.save_pretrained(self.out / "pipeline")
        samples = self.measures.samples(FINAL_SAMPLES, FINAL_SAMPLING_STEPS)
        with writing(self.out):
            scale = 2 if samples.shape[-1] <= 32 else 1
            save_grid(samples, self.out / "samples.png", scale=scale)
        self.summarise("done", validation_loss=float(losses.mean()))

    def first_failure(self, records: list[StepRecord]) -> StepRecord | None:
        """The first of some steps whose numbers are not finite.

        With a loss scaler a gradient may overflow: the step is skipped and the scale halved. Only a
        gradient that overflows without any scale left is a failure.
        """
        may_skip = self.state.scaler.is_enabled() and self.state.scaler.get_scale() > 1
        are_finite = []
        for record in records:
            numbers = [record.losses, record.loss[None]]
            if not may_skip:
                numbers.append(record.grad_norm[None])
            are_finite.append(torch.cat(numbers).isfinite().all())
        finite = torch.stack(are_finite)
        if bool(finite.all()):
            return None
        return records[int(finite.logical_not().nonzero()[0])]

    def explain_failure(self, record: StepRecord) -> TrainingDiverged:
        """Write failure.json beside the last whole checkpoint; the error to raise."""
        weighting = self.config.weighting
        bins = Bins.uniform(self.config.num_timesteps, self.config.bins)
        is_bad = record.losses.isfinite().logical_not()
        if is_bad.any():
            what, timesteps = "loss", record.timesteps[is_bad]
        elif not record.loss.isfinite():
            what, timesteps = "weighted loss", record.timesteps
        else:
            what, timesteps = "gradient", record.timesteps
        index = int(bins.index(timesteps.cpu())[0])
        low, high = int(bins.edges[index]), int(bins.edges[index + 1]) - 1
        failure = {
            "step": record.step,
            "what": what,
            "weighting": weighting,
            "timesteps": record.timesteps.tolist(),
            "losses": _as_text(record.losses),
            "weights": _as_text(self.state.weighting.weights()),
            "grad_norm": _as_text(record.grad_norm[None]),
        }
        if self.first:
            with writing(self.out):
                runs.write_json(self.out / "failure.json", failure)
        return TrainingDiverged(
            f"{what} is not finite at step {record.step}, first in timestep bin {index} "
            f"({low}..{high}), weighting {weighting!r}; nothing was repaired. "
            f"{self.out}/failure.json has the draws, {self.out}/checkpoint (if any) the last whole "
            "state. Try a lower lr"
        )


def _as_text(values: Tensor) -> list[str]:
    """Numbers as text, because JSON has no NaN."""
    return [str(value) for value in values.tolist()]
