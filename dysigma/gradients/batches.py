"""Samples of every timestep bin, and their losses: functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..checks import check_number
from ..data.dataset import ImageData
from ..images import check_pixels, to_real
from ..objective import sample_losses
from ..pareto import MAX_OBJECTIVES
from ..randomness import generator
from ..schedule import NoiseSchedule, check_schedule

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


def check_count(name: str, value: Any, least: int) -> int:
    """value as an int of at least `least`; NumPy and torch integers count. ValueError otherwise."""
    count: int = check_number(name, value, least, int, inclusive=True)
    return count


def image_table(images: Images) -> Tensor:
    """The images as one tensor (N, ...): uint8, or floating in about [-1, 1]. ValueError for anything else."""
    table = images.images if isinstance(images, ImageData) else images
    check_pixels(table)
    return table


def resolve_bins(schedule: NoiseSchedule, bins: int | Bins) -> Bins:
    """The bins, or that many of equal width.

    Raises ValueError for more than ``pareto.MAX_OBJECTIVES``, and unless they end where the schedule does.
    """
    total = schedule.num_timesteps
    if not isinstance(bins, Bins):
        bins = Bins.uniform(total, bins)
    if bins.edges[-1] != total:
        raise ValueError(
            f"need bins that end at the schedule's {total} timesteps; got edges {bins.edges.tolist()}"
        )
    if bins.num_bins > MAX_OBJECTIVES:
        raise ValueError(f"need at most {MAX_OBJECTIVES} bins; got {bins.num_bins}")
    return bins


def check_model(model: nn.Module, schedule: NoiseSchedule, table: Tensor) -> None:
    """Raise unless model and schedule are what their names say and on the device of the images."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_schedule(schedule)
    tensors = [table, schedule.log_snr, *model.parameters()]
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"need images, schedule and model on one device; got {sorted(devices)}: call .to(device)"
        )


def check_model_kwargs(model_kwargs: ModelKwargs, count: int) -> None:
    """ValueError unless every argument is a tensor with one row per image."""
    for name, value in (model_kwargs or {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = f"shape {tuple(value.shape)}"
            raise ValueError(
                f"model_kwargs must be tensors with one row for each of {count} images; {name} has {got}"
            )


def check_request(
    model: nn.Module,
    images: Images,
    schedule: NoiseSchedule,
    bins: int | Bins,
    prediction_type: str,
    model_kwargs: ModelKwargs,
) -> tuple[Tensor, Bins, str]:
    """The images as a tensor, the bins, and the prediction type by its own name, if a measurement can be made of these.

    Raises ValueError or TypeError, in one line, for anything that would fail later.
    """
    table = image_table(images)
    check_model(model, schedule, table)
    check_model_kwargs(model_kwargs, len(table))
    kind = schedule.canonical(prediction_type)
    return table, resolve_bins(schedule, bins), kind


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
        x0 = to_real(x0)
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
    """``sample_losses`` (B,) of one bin; every image keeps its own row of model_kwargs.

    Raises ValueError where a gradient is wanted and the model's output has none.
    """
    device = batch.x0.device
    own = {}
    for name, table in (model_kwargs or {}).items():
        own[name] = table[batch.rows.to(table.device)].to(device)
    losses = sample_losses(
        model, schedule, batch.x0, batch.noise, batch.timesteps, prediction_type, **own
    )
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise ValueError(
            "the model's output does not depend on its parameters: it was detached, or the model calls "
            "torch.no_grad() itself, as one made for inference does"
        )
    return losses
