"""One training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ..data.dataset import ImageData, batch
from ..devices import to_device
from ..gradients import bin_gramian, bin_timesteps
from ..objective import sample_losses
from ..parallel import over_ranks
from ..randomness import generator
from ..runs.files import RunError
from .config import TrainConfig
from .parallel import _average, _ranks, _share
from .parts import TrainState, _kwargs


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the message names step, timestep bin and weighting."""


@contextmanager
def _undefined_is_divergence(config: TrainConfig, step: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
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


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """The context in which networks run: bfloat16, or what they are in."""
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def _step_gramian(state: TrainState, data: ImageData, config: TrainConfig) -> Tensor:
    """Debiased Gramian of the bin losses at this step, on images and noise of its own: at least 4 samples a bin."""
    bins, step, device = state.weighting.bins, state.step, data.images.device
    per_bin = max(4, config.batch_size // bins.num_bins)
    drawn = bin_timesteps(bins, per_bin, generator(config.seed, step, "gramian timesteps"))
    timesteps = to_device(drawn.flatten(), device)
    # Another seed gives another order of the images than training has at this step.
    x0, labels, _ = batch(data, config.seed + 2**32, step, len(timesteps), flip=config.flip)
    noise = torch.randn(
        x0.shape, generator=generator(config.seed, step, "gramian noise", device), device=device
    )
    options: dict[str, Any] = {"prediction_type": config.prediction, "splits": 4}
    options["model_kwargs"] = _kwargs(config, labels)
    with autocast(config, device), _undefined_is_divergence(config, step):
        gramian = bin_gramian(state.model, state.schedule, x0, noise, timesteps, bins, **options)
    if (
        _ranks()[1] > 1
    ):  # each has computed it whole; rounding may differ, the weights that follow must not
        distributed.broadcast(gramian, 0)
    return gramian


def train_step(state: TrainState, data: ImageData, config: TrainConfig) -> StepRecord:
    """One optimizer step on batch_size images; a function of (state, data, config) alone.

    No number crosses to the host. When it returns, the step is whole: weights, EMA, weighting and counter agree. Under
    torch.distributed every rank draws the whole batch, works on its share and returns the record of the whole.
    """
    seed, step, device = config.seed, state.step, data.images.device
    x0, labels, _ = batch(data, seed, step, config.batch_size, flip=config.flip)
    u = torch.rand(config.batch_size, generator=generator(seed, step, "timesteps"))
    timesteps, importance = state.sampler(to_device(u, device))
    noise = torch.randn(x0.shape, generator=generator(seed, step, "noise", device), device=device)
    kwargs = _kwargs(config, labels)
    weights = state.weighting.weights()[timesteps]
    if state.weighting.needs_gramian and step % state.weighting.gramian_every == 0:
        state.weighting.observe_gramian(_step_gramian(state, data, config))

    warmup = min(1.0, (step + 1) * config.batch_size / max(1, config.warmup_images))
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * warmup
    state.optimizer.zero_grad(set_to_none=True)
    losses, total = [], torch.zeros((), device=device)
    share = _share(config, device)
    for part in share:
        draws = x0[part], noise[part], timesteps[part]
        part_kwargs = {key: value[part] for key, value in kwargs.items()}
        with autocast(config, device):
            part_losses = sample_losses(
                state.forward, state.schedule, *draws, config.prediction, **part_kwargs
            )
        correction = importance[part] if state.sampler.corrected else None
        loss = state.weighting(part_losses, timesteps[part], correction) / config.accumulate
        loss.backward()
        losses.append(over_ranks(part_losses)[0])
        total += loss.detach()
    total, every = _average(total, state.optimizer), torch.cat(losses)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.model, state.step * config.batch_size, config.batch_size)
    share = share.flatten()
    state.sampler.update((weights * every)[share], timesteps[share])
    return StepRecord(step, timesteps, every, total, grad_norm)


def check_compiled(state: TrainState, data: ImageData, config: TrainConfig) -> None:
    """Refuse generated code whose gradient is not that of the network itself; bfloat16 alone makes 1 to 3 %."""
    part, device, found = _share(config, data.images.device)[0], data.images.device, []
    images, labels, _ = batch(data, config.seed, 0, config.batch_size)
    x0, kwargs = images[part], _kwargs(config, labels if labels is None else labels[part])
    noise = torch.randn(
        x0.shape, generator=generator(config.seed, 0, "compiled", device), device=device
    )
    timesteps = torch.linspace(0, config.num_timesteps - 1, len(x0), device=device).long()
    for network in (state.model, state.forward):
        with autocast(config, device):
            loss = sample_losses(
                network, state.schedule, x0, noise, timesteps, config.prediction, **kwargs
            ).mean()
        found.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(state.model.parameters()))]
            )
        )
    error = float((found[1] - found[0]).norm() / found[0].norm())
    if not error < 0.1:
        raise RunError(
            f"compiled, the network has gradients that are {error:.0%} off what they are without torch.compile "
            f"(torch {torch.__version__}, {device}): train with --no-compile"
        )


def iterate(state: TrainState, data: ImageData, config: TrainConfig) -> Iterator[StepRecord]:
    """Train to config.num_steps, yielding after each whole step: the caller may stop at any time."""
    while state.step < config.num_steps:
        yield train_step(state, data, config)
