"""Measure which timestep bins conflict, by how much, and how much of it is minibatch noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from ..bins import Bins
from ..randomness import forked_rng, generator
from ..schedule import NoiseSchedule
from ..weightings.base import Weighting
from .batches import (
    BinBatch,
    Images,
    ModelKwargs,
    batch_losses,
    check_count,
    check_request,
    draw_batches,
)
from .estimator import GramianAccumulator, layer_group, sum_over_ranks, without_ranks
from .optimizer import adam_step
from .report import ConflictReport
from .statistics import Tracks, report_statistics

# Stationarity is taken from two halves, and leaving one out of a debiased half needs three.
FEWEST_MICRO_BATCHES = 6


def _mean_log_snr(schedule: NoiseSchedule, bins: Bins) -> Tensor:
    """(K,) the mean over the finite values of each bin."""
    parts = schedule.log_snr.cpu().split(bins.counts.tolist())
    return torch.stack([values[values.isfinite()].mean() for values in parts])


def _loss_weights(weighting: Weighting | None, schedule: NoiseSchedule, kind: str) -> Tensor:
    """(T,) what multiplies the losses; ValueError for a weighting that was made for other losses."""
    if weighting is None:
        return torch.ones_like(schedule.alpha)
    weights = weighting.weights().to(schedule.alpha.device)
    if len(weights) != schedule.num_timesteps or weighting.prediction_type != kind:
        raise ValueError(
            f"the weighting is for {weighting.prediction_type} and {len(weights)} timesteps, the losses for {kind} and "
            f"{schedule.num_timesteps}: make it with this schedule and prediction_type"
        )
    return weights


def _micro_batches_of_rank(model: nn.Module, micro_batches: int) -> range:
    """The micro-batches that this rank measures: all of them, or every W-th of W ranks."""
    if without_ranks(model) is model:
        return range(micro_batches)
    return range(distributed.get_rank(), micro_batches, distributed.get_world_size())


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
    model_kwargs: ModelKwargs = None,
    seed: int = 0,
    progress: bool = True,
) -> ConflictReport:
    """Which timestep bins conflict, from micro_batches * batch_per_bin samples of each bin.

    model: any module called as model(x_t, timesteps, **kwargs), measured in the mode and the autocast it is in.
        Weights may be bfloat16 or float16; it may return a tensor, a tuple, or an output or dict with "sample".
    images: (N, C, H, W) uint8, or float in [-1, 1]; on the device of model and schedule.
    schedule: variance-preserving or a flow. The timesteps given to the model are those of the schedule, 0 the
        cleanest. A network trained with a flow scheduler of diffusers wants T sigma instead: wrap it in
        ``foreign.FlowNetwork``.
    bins: Bins, or how many of equal width in t; at most 64.
    weighting: its weights() multiply the losses.
    optimizer: the Adam that trains the model, for the cosines with its last step and in its metric.
    groups: from a parameter's name to its group.
    paired: bins share images and noise, which spoils the naive cosine alone.
    model_kwargs: tensors with one row per image.

    Costs about micro_batches training steps on bins * batch_per_bin images. Takes memory for 2 K gradients, and for
    micro_batches * K sketches of at most 65,536 float64 numbers. Leaves parameters, .grad, mode and the random state
    alone. Ranks of a DistributedDataParallel model share the micro-batches; each must hold all images.

    Everything that can be checked is checked before the first step. Raises ValueError for gradients that are NaN or
    exactly 0, BatchNorm in train mode, an output unlike the input, fewer than 6 micro_batches, more than 64 bins,
    tensors on two devices; TypeError for a scheduler in place of a schedule.

    >>> from dysigma.exact import LinearDenoiser
    >>> schedule = NoiseSchedule.linear(10)
    >>> model = LinearDenoiser(schedule, torch.ones(4))
    >>> images = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> report = conflicts(model, images, schedule, bins=2, progress=False)
    >>> report.spans(), report.gramian.shape
    (['0-4', '5-9'], torch.Size([2, 2]))
    """
    from tqdm import tqdm

    micro_batches = check_count("micro_batches", micro_batches, FEWEST_MICRO_BATCHES)
    batch_per_bin = check_count("batch_per_bin", batch_per_bin, 1)
    seed = check_count("seed", seed, 0)
    table, cut, kind = check_request(model, images, schedule, bins, prediction_type, model_kwargs)
    weights = _loss_weights(weighting, schedule, kind)

    network = without_ranks(model)
    accumulator = GramianAccumulator(network, cut.num_bins, groups)

    def weighted_mean(batch: BinBatch) -> Tensor:
        losses = batch_losses(network, schedule, batch, kind, model_kwargs)
        return (weights[batch.timesteps] * losses).mean()

    step = None if optimizer is None else adam_step(optimizer, accumulator.parameters)
    tracks = Tracks(micro_batches, accumulator.rows, seed, step)
    bar = tqdm(
        _micro_batches_of_rank(model, micro_batches),
        desc="conflicts",
        unit="micro-batch",
        disable=not progress,
    )
    for m in bar:
        with forked_rng(table.device, generator(seed, m, "dropout").initial_seed()):
            batches = draw_batches(table, cut, batch_per_bin, seed, m, paired)
            bin_losses = (weighted_mean(batch) for batch in batches)
            losses = accumulator.add(bin_losses)
        tracks.keep(m, losses, accumulator.rows)
    sum_over_ranks(model, accumulator.sums, accumulator.own_products, *tracks.tensors())

    settings = {
        "micro_batches": micro_batches,
        "batch_per_bin": batch_per_bin,
        "paired": paired,
        "seed": seed,
        "prediction_type": kind,
        "training": model.training,
    }
    return ConflictReport(
        edges=cut.edges.tolist(),
        log_snr=_mean_log_snr(schedule, cut),
        losses=tracks.losses.mean(0).cpu(),
        settings=settings,
        **report_statistics(accumulator, tracks, batch_per_bin),
    )
