"""What a trained denoiser is worth: losses per timestep with fixed draws, and the ELBO in bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .devices import in_parts_that_fit
from .images import check_bytes, to_real
from .objective import predict, sample_losses
from .randomness import generator

# Samples belong to an evaluation; how they are drawn is a room of its own.
from .sampling import SAMPLERS, check_sampling, sample_images
from .schedule import NoiseSchedule, check_schedule

__all__ = [
    "SAMPLERS",
    "Elbo",
    "check_elbo",
    "check_sampling",
    "elbo",
    "evaluation_timesteps",
    "sample_images",
    "validation_losses",
]


def evaluation_timesteps(num_timesteps: int, count: int) -> Tensor:
    """count int64 timesteps at the midpoints of equal slices of [0, num_timesteps).

    Raises ValueError unless 1 <= count <= num_timesteps.

    >>> evaluation_timesteps(1000, 4)
    tensor([125, 375, 625, 875])
    """
    if not 1 <= count <= num_timesteps:
        raise ValueError(
            f"count must be from 1 to {num_timesteps}, the number of timesteps; got {count}"
        )
    midpoints = torch.arange(count, dtype=torch.float64) + 0.5
    return (midpoints * num_timesteps / count).long()


def _draws(images: Tensor, seed: int, repeats: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x0, noise), `repeats` times: the same images, and fresh noise that seed alone decides."""
    x0 = to_real(images)
    for repeat in range(repeats):
        draw = generator(seed, repeat, "evaluation", images.device)
        yield x0, torch.randn(x0.shape, generator=draw, device=x0.device)


def _model_kwargs(labels: Tensor | None, part: Tensor) -> dict[str, Tensor]:
    return {} if labels is None else {"class_labels": labels[part]}


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    images: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    *,
    timesteps: Tensor,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Mean loss at each of the given timesteps over fixed images and fixed noise.

    images: (N, C, H, W) uint8 on the model's device; timesteps: (K,) int64. The loss is the squared
    error in the model's own target space, mean over an image. Every model that is given the same
    images and seed gets the same noise, so differences are paired. Returns (K,) float64 on the CPU.
    """
    from tqdm.auto import tqdm

    check_bytes(images)
    x0, noise = next(_draws(images, seed, 1))
    was_training = model.training
    model.eval()
    totals = torch.zeros(len(timesteps), dtype=torch.float64, device=images.device)
    # Every image at every timestep, in one long list that is cut into batches.
    count = len(images) * len(timesteps)

    def measure(numbers: range) -> int:
        pairs = torch.arange(numbers.start, min(numbers.stop, count), device=images.device)
        image = pairs % len(images)
        position = pairs // len(images)
        losses = sample_losses(
            model,
            schedule,
            x0[image],
            noise[image],
            timesteps.to(images.device)[position],
            prediction_type,
            **_model_kwargs(labels, image),
        )
        totals.index_add_(0, position, losses.double())
        return len(pairs)

    with tqdm(total=count, desc="losses", unit="img", disable=not progress) as bar:
        for done in in_parts_that_fit(measure, count, batch_size):
            bar.update(done)
    model.train(was_training)
    return totals.cpu() / len(images)


class Elbo(NamedTuple):
    """An upper bound on the negative log-likelihood, in bits per dimension, and its terms.

    standard_error is over images, and NaN for a single one.
    """

    bits_per_dim: float
    standard_error: float
    diffusion: float
    prior: float
    reconstruction: float


def check_elbo(
    schedule: NoiseSchedule, prediction_type: str, num_images: int, timesteps_per_image: int
) -> None:
    """Raise what elbo does for a schedule or numbers that allow none, before a network is there."""
    check_schedule(schedule)
    kind = schedule.canonical(prediction_type)
    if kind == "epsilon" and schedule.log_snr[-1] == -math.inf:
        raise ValueError(
            "an epsilon model implies no x0 at zero SNR, hence no ELBO on this schedule; "
            "use v_prediction or sample"
        )
    if num_images < 1 or timesteps_per_image < 1:
        raise ValueError(
            f"an ELBO needs 1 image or more, 1 timestep each; got {num_images}, {timesteps_per_image}"
        )


@torch.no_grad()
def elbo(
    model: nn.Module,
    images: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    *,
    labels: Tensor | None = None,
    timesteps_per_image: int = 100,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Elbo:
    """The discrete-time variational bound of uint8 images under T latents, in bits per dimension.

    The terms are those of Kingma, Salimans, Poole, Ho 2021 (VDM): a sum over t >= 1 of
    (SNR(t-1) - SNR(t)) / 2 * |x0 - x0_hat|^2, a Gaussian prior term at T-1, and a 256-level
    reconstruction term at t = 0. Each image is evaluated at timesteps_per_image timesteps, stratified.
    They are drawn where the terms of typical images are large and divided by that probability, so the
    estimate is unbiased.

    On a rectified flow the latents are those of the variance-preserving schedule of the same SNR,
    divided by alpha + sigma. Neither the divergences between latents nor the SNR depend on such a
    factor, so the bound is the same.

    images: (N, C, H, W) uint8. With one image the standard error is NaN.
    Raises ValueError for epsilon at zero terminal SNR, where x0_hat does not exist.
    """
    check_bytes(images)
    check_elbo(schedule, prediction_type, len(images), timesteps_per_image)
    was_training = model.training
    model.eval()
    diffusion = _diffusion_nats(
        model,
        images,
        schedule,
        prediction_type,
        labels=labels,
        timesteps_per_image=timesteps_per_image,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    model.train(was_training)
    prior = _prior_nats(images, schedule)
    reconstruction = _reconstruction_nats(images, schedule, seed)

    nats_per_bit = images[0].numel() * math.log(2)  # and per dimension
    bits = (diffusion + prior + reconstruction) / nats_per_bit
    standard_error = float(bits.std()) / len(bits) ** 0.5 if len(bits) > 1 else math.nan
    return Elbo(
        bits_per_dim=float(bits.mean()),
        standard_error=standard_error,
        diffusion=float(diffusion.mean() / nats_per_bit),
        prior=float(prior.mean() / nats_per_bit),
        reconstruction=float(reconstruction.mean() / nats_per_bit),
    )


def _diffusion_nats(
    model: nn.Module,
    images: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str,
    *,
    labels: Tensor | None,
    timesteps_per_image: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """The sum over t >= 1, estimated at a few timesteps: nats (N,) float64."""
    from tqdm.auto import tqdm

    device = images.device
    snr = schedule.log_snr.exp().to(device)
    half_gap = 0.5 * (snr[:-1] - snr[1:])
    # The error of the best denoiser of white data with standard deviation 1/2 stands in for the
    # unknown one.
    proposal = half_gap / (snr[1:] + 4)
    proposal = proposal / proposal.sum()
    cumulative = proposal.cumsum(0)

    nats = torch.zeros(len(images), dtype=torch.float64, device=device)
    draws = _draws(images, seed, timesteps_per_image)
    bar = tqdm(draws, "ELBO", timesteps_per_image, disable=not progress)
    for stratum, (x0, noise) in enumerate(bar):
        draw = generator(seed, stratum, "elbo timesteps")
        uniform = torch.rand(len(images), generator=draw, dtype=torch.float64)
        u = (stratum + uniform) / timesteps_per_image
        gap = torch.searchsorted(cumulative, u.to(device)).clamp(max=len(proposal) - 1)
        t = 1 + gap
        factor = half_gap[gap] / proposal[gap] / timesteps_per_image
        work = functools.partial(
            _x0_squares, model, schedule, prediction_type, labels, x0, noise, t
        )
        squares = torch.cat(list(in_parts_that_fit(work, len(images), batch_size)))
        nats += factor * squares
    return nats


def _x0_squares(
    model: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: str,
    labels: Tensor | None,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    numbers: range,
) -> Tensor:
    """|x0_hat - x0|^2 (n,) float64 of the images of some numbers."""
    part = torch.arange(numbers.start, min(numbers.stop, len(x0)), device=x0.device)
    x_t = schedule.add_noise(x0[part], noise[part], t[part])
    output = predict(model, x_t, t[part], **_model_kwargs(labels, part))
    x0_hat = schedule.to_x0(output.float(), x_t, t[part], prediction_type)
    return (x0_hat - x0[part]).double().square().flatten(1).sum(1)


def _prior_nats(images: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL from q(x_T | x0) to a standard normal, per image."""
    bar = schedule.alphas_cumprod[-1].to(images.device)
    squares = to_real(images, torch.float64).square()
    return 0.5 * (bar * squares - bar - torch.log1p(-bar)).flatten(1).sum(1)


def _reconstruction_nats(images: Tensor, schedule: NoiseSchedule, seed: int) -> Tensor:
    """-log p(x0 | latent at t = 0) per image, over 256 grey levels.

    p is a softmax over the levels of the latent's Gaussian likelihood, as in VDM. The latent is
    divided by alpha: x0 + noise / sqrt(SNR).
    """
    device = images.device
    half_snr = 0.5 * schedule.log_snr[0].exp().to(device)
    levels = to_real(torch.arange(256, device=device), torch.float64)
    nats = []
    for index, image in enumerate(images):
        draw = generator(seed, index, "reconstruction", device)
        level = image.long().flatten()
        x0 = levels[level]
        noise = torch.randn(x0.shape, generator=draw, device=device, dtype=torch.float64)
        z = x0 + noise * (2 * half_snr) ** -0.5
        logits = -half_snr * (z[:, None] - levels).square()
        log_likelihood = logits.gather(1, level[:, None])[:, 0] - logits.logsumexp(1)
        nats.append(-log_likelihood.sum())
    return torch.stack(nats)
