"""What is measured along a training, all at the averaged weights and from draws that never change."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch import Tensor, nn

from ..data.dataset import ImageData
from ..distances import (
    FEWEST_IMAGES,
    extract,
    frechet_distance,
    kernel_distance,
    load_features,
    moments,
    reference_features,
)
from ..evaluation import evaluation_timesteps, sample_images, validation_losses
from ..gradients.measure import conflicts
from .config import TrainConfig
from .parts import TrainState, model_kwargs
from .precision import autocast, low_precision
from .step import TrainingDiverged, not_finite_is_divergence

# What a report of conflicts holds beside these would only swell metrics.jsonl.
KEPT_OF_REPORT_NOT = {
    "edges",
    "log_snr",
    "settings",
    "group_names",
    "group_gramian",
    "gramian_se",
    "cosine",
    "magnitude_similarity",
    "update_cosine",
    "update_cosine_se",
    "cosine_preconditioned",
}


class Measures:
    """Validation losses, sample distances and reports of conflicts of a TrainState."""

    def __init__(
        self, config: TrainConfig, state: TrainState, data: ImageData, test: ImageData
    ) -> None:
        self.config, self.state, self.data = config, state, data
        # Copies, because slices would keep the whole test split in memory.
        self.images = test.images[: config.validation_images].clone()
        self.labels: Tensor | None = None
        if config.conditional and test.labels is not None:
            self.labels = test.labels[: config.validation_images].clone()
        self.timesteps = evaluation_timesteps(config.num_timesteps, config.validation_timesteps)
        self.ema_model: nn.Module = copy.deepcopy(state.model)
        self.features: Any = None
        self.reference: Any = None
        self.reference_rows: Any = None

    def prepare_distance(self) -> None:
        """Load the feature network and measure the training images with it; before the first step.

        Raises ValueError where there are too few images for a distance.
        """
        if min(self.config.distance_images, len(self.data.originals)) < 2:
            raise ValueError(
                "a distance needs 2 training images and 2 samples; got "
                f"{len(self.data.originals)} and distance_images {self.config.distance_images}"
            )
        self.features = load_features(self.config.features, self.images.device)
        features = reference_features(self.features, self.data.originals)
        self.reference = moments(features)
        # For KID as many as there are samples, from all over the data, which may be sorted.
        every = max(1, len(features) // self.config.distance_images)
        self.reference_rows = features[::every][: self.config.distance_images].clone()

    def validate(self) -> dict[str, Any]:
        """Losses at fixed timesteps, images and noise; TrainingDiverged if they are not finite."""
        self.state.ema.copy_to(self.ema_model)
        losses = validation_losses(
            self.ema_model,
            self.images,
            self.state.schedule,
            self.config.prediction,
            timesteps=self.timesteps,
            labels=self.labels,
        )
        if not losses.isfinite().all():
            raise TrainingDiverged(
                f"validation losses are not finite after step {self.state.step}, weighting "
                f"{self.config.weighting!r}: the averaged weights are broken; nothing was repaired. "
                "Try a lower lr, in another folder"
            )
        return {"validation_timesteps": self.timesteps, "validation_losses": losses}

    def distance(self) -> dict[str, Any]:
        """Fréchet distance and KID of samples to the training images; nothing unless prepared.

        KID is left out below the FEWEST_IMAGES that it needs.
        """
        if self.reference is None:
            return {}
        samples = self.samples(self.config.distance_images, self.config.distance_steps)
        features = extract(self.features, samples)
        found = {"distance": frechet_distance(moments(features), self.reference)}
        if min(len(features), len(self.reference_rows)) >= FEWEST_IMAGES:
            found["kid"], _ = kernel_distance(features, self.reference_rows)
        return found

    def samples(self, count: int, steps: int) -> Tensor:
        """Images (count, C, H, W) of the weights last validated, of classes in turn, from one set of latents."""
        return sample_images(
            self.ema_model,
            self.state.schedule,
            (count, *self.images.shape[1:]),
            prediction_type=self.config.prediction,
            num_steps=steps,
            precision=low_precision(self.config, self.images.device),
        )

    def conflicts(self) -> dict[str, Any]:
        """Conflicts of the bins, from 16 batches a bin, in four digits; every call has the same draws."""
        self.state.ema.copy_to(self.ema_model)
        config = self.config
        with (
            autocast(config, self.data.images.device),
            not_finite_is_divergence(config, self.state.step),
        ):
            report = conflicts(
                self.ema_model,
                self.data.images,
                self.state.schedule,
                config.bins,
                prediction_type=config.prediction,
                batch_per_bin=config.batch_size,
                model_kwargs=model_kwargs(config, self.data.labels),
                seed=config.seed,
                progress=False,
            )
        values = {k: v for k, v in report.to_dict().items() if k not in KEPT_OF_REPORT_NOT}
        return {"conflicts": json.loads(json.dumps(values), parse_float=_four_digits)}


def _four_digits(text: str) -> float:
    return float(f"{float(text):.4g}")
