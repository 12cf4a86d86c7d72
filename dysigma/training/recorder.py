"""From steps to a run folder: metrics, validation, checkpoints, summary."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import runs
from ..bins import Bins
from ..data.dataset import ImageData
from ..distances import extract, frechet_distance, load_features, moments, reference_features
from ..evaluation import evaluation_timesteps, sample_images, validation_losses
from ..gradients.measure import conflicts
from ..images import save_grid
from ..runs.files import RunError
from .config import TrainConfig
from .parallel import _from_first, _ranks
from .parts import _kwargs, build
from .step import (
    StepRecord,
    TrainingDiverged,
    _undefined_is_divergence,
    autocast,
)


class _Recorder:
    """Turns step records into the run folder: metrics, validation, checkpoints, summary. Only the first rank writes."""

    def __init__(self, config: TrainConfig, data: ImageData, test: ImageData, out: Path) -> None:
        self.config, self.state, self.out = config, build(config, data), out
        self.pending: list[StepRecord] = []
        self.seconds, self.since = 0.0, time.perf_counter()
        # Copies, because slices would keep the whole test split in memory.
        self.images = test.images[: config.validation_images].clone()
        labels = test.labels if config.conditional else None
        self.labels = None if labels is None else labels[: config.validation_images].clone()
        self.timesteps = evaluation_timesteps(config.num_timesteps, config.validation_timesteps)
        self.first, ranks = _ranks()[0] == 0, _ranks()[1]
        self.provenance = runs.provenance() | ({"ranks": ranks} if ranks > 1 else {})
        self.ema_model: Any = copy.deepcopy(self.state.model)
        self.reference: Any = None
        if self.first and config.distance_images:
            features = load_features(config.features, self.images.device)
            self.reference = features, moments(reference_features(features, data.originals))

    def log(self, data: ImageData, *, validate: bool, report: bool) -> None:
        """Write one metrics line for the steps since the last one, with a validation and a report of conflicts."""
        if not self.first:
            return self.pending.clear()
        extra = self.validate() | self.distance() if validate else {}
        extra |= self.conflicts(data) if report else {}
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        images = self.state.step * self.config.batch_size
        row: dict[str, Any] = {
            "step": self.state.step,
            "images": images,
            "seconds": round(self.seconds, 3),
        }
        if self.pending:
            names = ("loss", "grad_norm", "losses", "timesteps")
            loss, norm, losses, timesteps = (
                torch.cat([getattr(r, n).view(-1) for r in self.pending]).cpu() for n in names
            )
            weights = self.state.weighting.weights().cpu()
            bins = Bins.uniform(self.config.num_timesteps, self.config.bins)
            row |= {
                "loss": float(loss.mean()),
                "grad_norm": float(norm.mean()),
                "mean_loss": float(losses.mean()),
            }
            row |= {"bin_losses": bins.mean(losses, timesteps)[0]}
            row |= {"bin_weights": bins.mean(weights, torch.arange(len(weights)))[0]}
        runs.append_metrics(self.out / "metrics.jsonl", row | extra)
        self.pending.clear()

    def validate(self) -> dict[str, Any]:
        """Losses of the EMA weights at fixed timesteps, images and noise; TrainingDiverged if they are not finite."""
        self.state.ema.copy_to(self.ema_model)
        fixed: dict[str, Any] = {"timesteps": self.timesteps, "labels": self.labels}
        losses = validation_losses(
            self.ema_model, self.images, self.state.schedule, self.config.prediction, **fixed
        )
        if not losses.isfinite().all():
            raise TrainingDiverged(
                f"validation losses are not finite after step {self.state.step}, weighting {self.config.weighting!r}: "
                f"the averaged weights are broken; nothing was repaired. Try a lower lr, in another folder"
            )
        return {"validation_timesteps": self.timesteps, "validation_losses": losses}

    def distance(self) -> dict[str, Any]:
        """Distance of samples to the training images."""
        if self.reference is None:
            return {}
        features, reference = self.reference
        samples = self.samples(self.config.distance_images, self.config.distance_steps)
        return {"distance": frechet_distance(moments(extract(features, samples)), reference)}

    def samples(self, count: int, steps: int) -> Tensor:
        """Images of the EMA weights as validated, of classes in turn, from one set of latents."""
        shape, kind = (count, *self.images.shape[1:]), self.config.prediction
        return sample_images(
            self.ema_model, self.state.schedule, shape, prediction_type=kind, num_steps=steps
        )

    def conflicts(self, data: ImageData) -> dict[str, Any]:
        """Conflicts of the bins at the EMA weights, rounded, from 16 batches a bin; every call has the same draws."""
        self.state.ema.copy_to(self.ema_model)
        config, aside = (
            self.config,
            {"edges", "log_snr", "settings", "group_names", "group_gramian", "gramian_se"},
        )
        aside |= {
            "cosine",
            "magnitude_similarity",
            "update_cosine",
            "update_cosine_se",
            "cosine_preconditioned",
        }
        options: dict[str, Any] = {
            "prediction_type": config.prediction,
            "batch_per_bin": config.batch_size,
        }
        options |= {
            "model_kwargs": _kwargs(config, data.labels),
            "seed": config.seed,
            "progress": False,
        }
        with (
            autocast(config, data.images.device),
            _undefined_is_divergence(config, self.state.step),
        ):
            report = conflicts(
                self.ema_model, data.images, self.state.schedule, config.bins, **options
            )
        values = {name: value for name, value in report.to_dict().items() if name not in aside}
        return {
            "conflicts": json.loads(
                json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}")
            )
        }

    def save(self, status: str) -> None:
        """Checkpoint, the steps not yet logged included, then summary."""
        if not self.first:
            return
        tensors, rest = self.state.state_dict()
        for name, column in zip(StepRecord._fields, zip(*self.pending, strict=True), strict=False):
            tensors[f"pending.{name}"] = torch.stack([torch.as_tensor(value) for value in column])
        rest |= {"seconds": self.seconds, "config": self.config.to_dict()}
        runs.save_checkpoint(self.out / "checkpoint", self.state.step, tensors, rest)
        self.summarise(status)

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, if there is one; the first rank reads it for all."""
        folder = self.out / "checkpoint"
        there = self.first and any(folder.glob("*.json"))
        found = _from_first(
            runs.load_checkpoint(folder, self.config.to_dict()) if there else None,
            self.images.device,
        )
        if found:
            step, tensors, rest = found
            columns = [
                tensors.get(f"pending.{name}", torch.empty(0)) for name in StepRecord._fields
            ]
            on_device = [column.to(self.images.device) for column in columns[1:]]
            try:
                self.pending = [
                    StepRecord(int(i), *row) for i, *row in zip(columns[0], *on_device, strict=True)
                ]
                self.seconds = rest["seconds"]
                self.state.load_state_dict(step, tensors, rest)
            except (RuntimeError, ValueError, KeyError) as error:
                cause = str(error).splitlines()[0]
                raise RunError(
                    f"{folder} does not fit this run ({cause}): delete it to start again"
                ) from None
        if self.first and (started := runs.load_run(self.out).summary.get("provenance")):
            self.provenance |= {} if started == self.provenance else {"resumed_from": started}

    def summarise(self, status: str, **more: Any) -> None:
        """Write summary.json."""
        if not self.first:
            return
        base = {"status": status, "step": self.state.step, "seconds": round(self.seconds, 3)}
        base |= {
            "images": self.state.step * self.config.batch_size,
            "validation_images": len(self.images),
        }
        runs.write_json(self.out / "summary.json", base | more | {"provenance": self.provenance})

    def finish(self) -> None:
        """Write the diffusers pipeline with the EMA weights, a grid of samples, and the summary."""
        from diffusers import DDPMPipeline

        loss, kind = float(self.validate()["validation_losses"].mean()), self.config.prediction
        # Sampling must start at the last timestep, where a zero-terminal-SNR model learned what pure noise is.
        scheduler = self.state.schedule.to_diffusers(
            prediction_type=kind, timestep_spacing="trailing"
        )
        DDPMPipeline(self.ema_model, scheduler).save_pretrained(self.out / "pipeline")
        samples = self.samples(64, 50)
        save_grid(samples, self.out / "samples.png", scale=2 if samples.shape[-1] <= 32 else 1)
        self.summarise("done", validation_loss=loss)
