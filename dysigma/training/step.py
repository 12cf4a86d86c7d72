"""One training step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from ..checks import NotFiniteError
from ..data.dataset import ImageData, batch
from ..devices import to_device
from ..gradients import bin_gramian, bin_timesteps
from ..objective import OutputLayerGradients, sample_losses
from ..parallel import over_ranks
from ..randomness import generator
from .config import TrainConfig
from .parallel import average_over_ranks, rank_and_count, share_of_batch
from .parts import TrainState, model_kwargs
from .precision import autocast

GRAMIAN_SAMPLES_PER_BIN = 4  # at least; its debiased estimate splits them into as many parts


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the message names step, timestep bin and weighting."""


@contextmanager
def not_finite_is_divergence(config: TrainConfig, step: int) -> Iterator[None]:
    """Turn NotFiniteError into TrainingDiverged; every other error passes as it is."""
    try:
        yield
    except NotFiniteError as error:
        raise TrainingDiverged(
            f"at step {step}, weighting {config.weighting!r}: {error}. Try a lower lr"
        ) from None


class StepRecord(NamedTuple):
    """What one whole step did; detached tensors on the device of training."""

    step: int  # of the step just done, from 0
    timesteps: Tensor  # (B,)
    losses: Tensor  # (B,) unweighted
    loss: Tensor  # () what was minimised
    grad_norm: Tensor  # () before clipping


class _Batch(NamedTuple):
    """What a step draws."""

    x0: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    importance: Tensor  # (B,)
    kwargs: dict[str, Tensor]  # of the network: class labels (B,), if it is conditional


def _draw_batch(state: TrainState, data: ImageData, config: TrainConfig) -> _Batch:
    seed, step, device = config.seed, state.step, data.images.device
    x0, labels, _ = batch(data, seed, step, config.batch_size, flip=config.flip)
    u = torch.rand(config.batch_size, generator=generator(seed, step, "timesteps"))
    timesteps, importance = state.sampler(to_device(u, device))
    noise = torch.randn(x0.shape, generator=generator(seed, step, "noise", device), device=device)
    return _Batch(x0, noise, timesteps, importance, model_kwargs(config, labels))


def _backward(
    state: TrainState, drawn: _Batch, share: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Add up the gradients of this rank's share of a batch, part by part.

    Returns the losses (B,) of all ranks, their squared gradient norms (B,) in the output layer if
    the sampler or the weighting observes those, and what was minimised here, ().
    """
    device = drawn.x0.device
    output = None
    if "gradient-norms" in (state.sampler.observes, state.weighting.observes):
        output = OutputLayerGradients(state.model)
    losses = []
    norms = []
    total = torch.zeros((), device=device)
    for part in share:
        part_kwargs = {name: value[part] for name, value in drawn.kwargs.items()}
        with output or nullcontext():
            with autocast(config, device):
                part_losses = sample_losses(
                    state.forward,
                    state.schedule,
                    drawn.x0[part],
                    drawn.noise[part],
                    drawn.timesteps[part],
                    config.prediction,
                    **part_kwargs,
                )
            if output is not None:
                part_losses.retain_grad()
            correction = drawn.importance[part] if state.sampler.corrected else None
            weighted = state.weighting(part_losses, drawn.timesteps[part], correction)
            loss = weighted / config.accumulate
            state.scaler.scale(loss).backward()
        if output is not None:
            norms.append(over_ranks(output.squared_norms(part_losses))[0])
        losses.append(over_ranks(part_losses)[0])
        total += loss.detach()
    return torch.cat(losses), torch.cat(norms) if norms else None, total


def train_step(state: TrainState, data: ImageData, config: TrainConfig) -> StepRecord:
    """One optimizer step on batch_size images; a function of (state, data, config) alone.

    No number crosses to the host. When it returns, the step is whole: weights, EMA, weighting and
    counter agree. Under torch.distributed every rank draws the whole batch, works on its share and
    returns the record of the whole.
    """
    step, sampler, weighting = state.step, state.sampler, state.weighting
    drawn = _draw_batch(state, data, config)
    timesteps = drawn.timesteps
    weights = None
    if sampler.observes != "nothing":  # it adapts, to weights as they are before this step
        weights = weighting.weights()[timesteps]
    if weighting.needs_gramian and step % weighting.gramian_every == 0:
        weighting.observe_gramian(_step_gramian(state, data, config))

    factor = config.learning_rate_factor(step)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    state.optimizer.zero_grad(set_to_none=True)
    share = share_of_batch(config, data.images.device)
    losses, norms, total = _backward(state, drawn, share, config)
    if norms is not None and weighting.observes == "gradient-norms":
        objective = weighting.observe_gradient_norms(norms, timesteps, drawn.importance)
        state.scaler.scale(objective).backward()
    total = average_over_ranks(total, state.trained_parameters)

    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.model_parameters, config.grad_clip)
    state.scaler.step(state.optimizer)  # float16 skips a step whose gradient overflowed
    state.scaler.update()
    state.step += 1
    state.ema.update(state.model, state.step * config.batch_size, config.batch_size)
    if weights is not None:
        observed = weights * losses
        if sampler.observes == "gradient-norms" and norms is not None:
            observed = weights.square() * norms
        mine = share.flatten()
        sampler.update(observed[mine], timesteps[mine])
    return StepRecord(step, timesteps, losses, total, grad_norm)


def _step_gramian(state: TrainState, data: ImageData, config: TrainConfig) -> Tensor:
    """Debiased Gramian (K, K) of the bin losses at this step, on images and noise of its own."""
    bins, step, device = state.weighting.bins, state.step, data.images.device
    per_bin = max(GRAMIAN_SAMPLES_PER_BIN, config.batch_size // bins.num_bins)
    drawn = bin_timesteps(bins, per_bin, generator(config.seed, step, "gramian timesteps"))
    timesteps = to_device(drawn.flatten(), device)
    # Another seed gives another order of the images than training has at this step.
    x0, labels, _ = batch(data, config.seed + 2**32, step, len(timesteps), flip=config.flip)
    draw = generator(config.seed, step, "gramian noise", device)
    noise = torch.randn(x0.shape, generator=draw, device=device)
    with autocast(config, device), not_finite_is_divergence(config, step):
        gramian = bin_gramian(
            state.model,
            state.schedule,
            x0,
            noise,
            timesteps,
            bins,
            prediction_type=config.prediction,
            splits=GRAMIAN_SAMPLES_PER_BIN,
            model_kwargs=model_kwargs(config, labels),
        )
    # Each rank has computed it whole. Rounding may differ; the weights that follow must not.
    if rank_and_count()[1] > 1:
        distributed.broadcast(gramian, 0)
    return gramian


def iterate(state: TrainState, data: ImageData, config: TrainConfig) -> Iterator[StepRecord]:
    """Train to config.num_steps, yielding after each whole step: the caller may stop at any time.

    The step is dysigma.training.train_step as it is then: replace that name to change or watch it.
    """
    package = sys.modules["dysigma.training"]
    while state.step < config.num_steps:
        yield package.train_step(state, data, config)
