"""Measure which timestep bins conflict, by how much, and how much of it is minibatch noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed, nn

from ..bins import Bins
from ..randomness import generator
from ..schedule import NoiseSchedule, canonical_prediction_type
from ..weightings.base import Weighting
from .estimator import (
    SKETCH_COLUMNS,
    Images,
    Kwargs,
    _Accumulator,
    _all_reduce,
    _draw,
    _fork_rng,
    _inputs,
    _last_step,
    _losses,
    _sketch,
    _statistics,
    _unwrapped,
    layer_group,
)
from .report import ConflictReport


def conflicts(
    model: nn.Module,
    images: Images,
    schedule: NoiseSchedule,
    bins: int | Bins = 10,
    *,
    prediction_type: str = "epsilon",
    micro_batches: int = 16,
    batch_per_bin: int = 4,
    weighting: Weighting | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    groups: Callable[[str], str] = layer_group,
    paired: bool = False,
    model_kwargs: Kwargs = None,
    seed: int = 0,
    progress: bool = True,
) -> ConflictReport:
    """Which timestep bins conflict, from micro_batches * batch_per_bin samples of each bin.

    model: any module called as model(x_t, timesteps, **kwargs), measured in the mode and the autocast it is in. images:
    (N, C, H, W) uint8, or float in [-1, 1]. bins: Bins, or how many of equal width in t. weighting: its weights()
    multiply the losses. optimizer: the Adam that trains the model, for the cosines with its last step and in its
    metric. groups: from a parameter's name to its group. paired: bins share images and noise, which spoils the naive
    cosine alone. model_kwargs: tensors with one row per image.

    Costs about micro_batches training steps on bins * batch_per_bin images, and memory for 2 K gradients. Leaves
    parameters, .grad, mode and the random state alone. Ranks of a DistributedDataParallel model share the
    micro-batches; each must hold all images. Raises ValueError for gradients that are NaN or exactly 0, BatchNorm in
    train mode, an output unlike the input, fewer than 6 micro_batches, tensors on two devices.
    """
    from tqdm import tqdm

    if micro_batches < 6 or batch_per_bin < 1:
        raise ValueError(
            f"need micro_batches >= 6 and batch_per_bin >= 1; got {micro_batches} and {batch_per_bin}"
        )
    kind, (table, cut) = (
        canonical_prediction_type(prediction_type),
        _inputs(images, schedule, bins, model),
    )
    bare = _unwrapped(model)
    gradients = _Accumulator(bare, cut.num_bins, groups)
    rows, size = gradients.rows, (micro_batches, cut.num_bins)
    scale = torch.ones_like(schedule.alpha) if weighting is None else weighting.weights()
    update = None if optimizer is None else _last_step(optimizer, gradients.parameters)
    bits = torch.randint(
        2, rows.shape[1:], generator=generator(seed, 0, "signs"), dtype=torch.int8
    ).to(rows.device)
    losses = rows.new_zeros(size, dtype=torch.float64)
    sketches = losses.new_zeros(*size, min(SKETCH_COLUMNS, rows.shape[1]))
    along, in_metric = (
        torch.zeros_like(x) if update else x.new_zeros(0) for x in (losses, sketches)
    )
    first, stride = (
        (0, 1) if bare is model else (distributed.get_rank(), distributed.get_world_size())
    )
    with _fork_rng(table.device):
        for m in tqdm(
            range(first, micro_batches, stride),
            desc="conflicts",
            unit="micro-batch",
            disable=not progress,
        ):
            torch.manual_seed(generator(seed, m, "dropout").initial_seed())
            parts = _draw(table, cut, batch_per_bin, seed, m, paired)
            each = (
                scale[part[2]] * _losses(bare, schedule, kind, model_kwargs, part) for part in parts
            )
            losses[m] = gradients.add(weighted.mean() for weighted in each)
            sketches[m] = _sketch(rows, bits)
            if update:
                along[m] = torch.stack([row.double() @ update[0] for row in rows])
                in_metric[m] = _sketch(rows * update[1], bits)
    _all_reduce(model, gradients.sums, gradients.own, losses, along, sketches, in_metric)
    log_snr = [v[v.isfinite()].mean() for v in schedule.log_snr.cpu().split(cut.counts.tolist())]
    settings = {
        "micro_batches": micro_batches,
        "batch_per_bin": batch_per_bin,
        "paired": paired,
        "seed": seed,
    }
    return ConflictReport(
        edges=cut.edges.tolist(),
        log_snr=torch.stack(log_snr),
        losses=losses.mean(0).cpu(),
        settings=settings | {"prediction_type": kind, "training": model.training},
        **_statistics(gradients, sketches, batch_per_bin, along.cpu(), in_metric),
    )
