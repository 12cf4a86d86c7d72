"""Samples of every timestep bin, and their losses: functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..data.dataset import ImageData
from ..objective import sample_losses
from ..randomness import generator
from ..schedule import NoiseSchedule

Images = Tensor | ImageData

ModelKwargs = Mapping[str, Tensor] | None


class BinBatch(NamedTuple):
    """The samples of one bin."""

    x0: Tensor  # (B, ...)
    noise: Tensor  # (B, ...)
    timesteps: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64: which of the images these are


def bin_timesteps(bins: Bins, per_bin: int, draw: torch.Generator) -> Tensor:
    """per_bin independent uniform timesteps in every bin: (K, per_bin) int64 on the CPU.

    >>> draw = torch.Generator().manual_seed(0)
    >>> bins = Bins([0, 10, 1000])
    >>> bins.index(bin_timesteps(bins, 3, draw))
    tensor([[0, 0, 0],
            [1, 1, 1]])
    """
    edges = bins.edges.cpu()
    u = torch.rand(bins.num_bins, per_bin, generator=draw, dtype=torch.float64)
    return edges[:-1, None] + (u * edges.diff()[:, None]).long()


def spans(edges: list[int]) -> list[str]:
    """First and last timestep of each bin.

    >>> spans([0, 100, 1000])
    ['0-99', '100-999']
    """
    return [f"{first}-{end - 1}" for first, end in pairwise(edges)]


def image_table(images: Images) -> Tensor:
    """The images as one tensor (N, ...), uint8 or floating."""
    return images.images if isinstance(images, ImageData) else images


def resolve_bins(schedule: NoiseSchedule, bins: int | Bins) -> Bins:
    """The bins, or that many of equal width; ValueError unless they end where the schedule does."""
    if not isinstance(bins, Bins):
        return Bins.uniform(schedule.num_timesteps, bins)
    if bins.edges[-1] != schedule.num_timesteps:
        raise ValueError(
            f"need bins that end at the schedule's {schedule.num_timesteps} timesteps; got edges "
            f"{bins.edges.tolist()}"
        )
    return bins


def check_devices(table: Tensor, schedule: NoiseSchedule, model: nn.Module) -> None:
    """ValueError unless images, schedule and parameters are on one device."""
    tensors = [table, schedule.log_snr, *model.parameters()]
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"need images, schedule and model on one device; got {sorted(devices)}: call .to(device)"
        )


def draw_batches(
    images: Tensor, bins: Bins, per_bin: int, seed: int, step: int, paired: bool
) -> list[BinBatch]:
    """per_bin samples of each bin, a function of (seed, step); paired: all bins share images and noise."""
    draws = 1 if paired else bins.num_bins
    device = images.device
    rows = torch.randint(
        len(images), (draws, per_bin), generator=generator(seed, step, "images")
    ).to(device)
    x0 = images[rows]
    if images.dtype == torch.uint8:
        x0 = x0.float() / 127.5 - 1
    noise = torch.randn(
        x0.shape, generator=generator(seed, step, "noise", device), device=device, dtype=x0.dtype
    )
    timesteps = bin_timesteps(bins, per_bin, generator(seed, step, "timesteps")).to(device)
    batches = []
    for k, own in enumerate(timesteps):
        draw = k % draws
        batches.append(BinBatch(x0[draw], noise[draw], own, rows[draw]))
    return batches


def batch_losses(
    model: nn.Module,
    schedule: NoiseSchedule,
    batch: BinBatch,
    prediction_type: str,
    model_kwargs: ModelKwargs,
) -> Tensor:
    """``sample_losses`` (B,) of one bin; every image keeps its own row of model_kwargs."""
    own = {name: table[batch.rows] for name, table in (model_kwargs or {}).items()}
    return sample_losses(
        model, schedule, batch.x0, batch.noise, batch.timesteps, prediction_type, **own
    )
