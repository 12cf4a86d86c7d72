"""What a trained denoiser is worth: per-timestep losses with fixed draws, ELBO in bits per dimension, samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_name
from .objective import predict, sample_losses
from .randomness import generator
from .schedule import NoiseSchedule, canonical_prediction_type

SAMPLERS = {
    "ddim": "DDIM",
    "dpm-solver": "DPMSolverMultistep",
    "heun": "HeunDiscrete",
    "ddpm": "DDPM",
}  # of diffusers


def _model_kwargs(labels: Tensor | None) -> dict[str, Tensor]:
    return {} if labels is None else {"class_labels": labels}


def evaluation_timesteps(num_timesteps: int, count: int) -> Tensor:
    """count int64 timesteps at the midpoints of equal slices of [0, num_timesteps)."""
    if not 1 <= count <= num_timesteps:
        raise ValueError(
            f"count must be from 1 to {num_timesteps}, the number of timesteps; got {count}"
        )
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * num_timesteps / count).long()


def _pairs(images: Tensor, seed: int, repeats: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`repeats` times (x0, noise): the same images each time, fresh noise, functions of seed alone."""
    x0 = images.float().div(127.5).sub(1)
    for repeat in range(repeats):
        draw = generator(seed, repeat, "evaluation", images.device)
        yield x0, torch.randn(x0.shape, generator=draw, device=x0.device)


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
    """Mean loss at each of the given timesteps over fixed images and fixed noise: (len(timesteps),) float64, CPU.

    images: (N, C, H, W) uint8 on the model's device. The loss is in the model's own target space; the image and noise
    draws are the same for every model that is given the same images and seed, so differences are paired.
    """
    from tqdm.auto import tqdm

    x0, noise = next(_pairs(images, seed, 1))
    was_training = model.training
    model.eval()
    totals = torch.zeros(len(timesteps), dtype=torch.float64, device=images.device)
    count = len(images) * len(timesteps)
    for start in tqdm(
        range(0, count, batch_size), desc="losses", unit="batch", disable=not progress
    ):
        flat = torch.arange(start, min(start + batch_size, count), device=images.device)
        image, position = flat % len(images), flat // len(images)
        chosen = timesteps.to(images.device)[position]
        kwargs = _model_kwargs(None if labels is None else labels[image])
        losses = sample_losses(
            model, schedule, x0[image], noise[image], chosen, prediction_type, **kwargs
        )
        totals.index_add_(0, position, losses.double())
    model.train(was_training)
    return totals.cpu() / len(images)


class Elbo(NamedTuple):
    """An upper bound on the negative log-likelihood, bits per dimension; its terms; standard error over images."""

    bits_per_dim: float
    standard_error: float
    diffusion: float
    prior: float
    reconstruction: float


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

    Terms as in Kingma, Salimans, Poole, Ho 2021 (VDM): sum over t >= 1 of (SNR(t-1) - SNR(t)) / 2 * |x0 - x0_hat|^2,
    a Gaussian prior term at T-1, and a 256-level reconstruction term at t = 0. Each image is evaluated at
    timesteps_per_image timesteps, stratified, drawn where the terms of typical images are large and divided by that
    probability, so the estimate is unbiased. images: (N, C, H, W) uint8, N >= 2.
    Raises ValueError for epsilon at zero terminal SNR, where x0_hat does not exist.
    """
    from tqdm.auto import tqdm

    if (
        canonical_prediction_type(prediction_type) == "epsilon"
        and schedule.log_snr[-1] == -math.inf
    ):
        raise ValueError(
            "an epsilon model implies no x0 at zero SNR, hence no ELBO on this schedule; use v_prediction"
        )
    if len(images) < 2 or timesteps_per_image < 1:
        raise ValueError(
            f"an ELBO needs 2 images or more, 1 timestep each; got {len(images)}, {timesteps_per_image}"
        )
    device = images.device
    snr = schedule.log_snr.exp().to(device)
    half_gap = 0.5 * (snr[:-1] - snr[1:])
    # The error of the best denoiser of white data with standard deviation 1/2 stands in for the unknown one.
    proposal = half_gap / (snr[1:] + 4)
    proposal = proposal / proposal.sum()
    cumulative = proposal.cumsum(0)
    diffusion = torch.zeros(len(images), dtype=torch.float64, device=device)  # nats per image
    was_training = model.training
    model.eval()
    pairs = tqdm(
        _pairs(images, seed, timesteps_per_image), "ELBO", timesteps_per_image, disable=not progress
    )
    for stratum, (x0, noise) in enumerate(pairs):
        draw = generator(seed, stratum, "elbo timesteps")
        u = (
            stratum + torch.rand(len(images), generator=draw, dtype=torch.float64)
        ) / timesteps_per_image
        t = 1 + torch.searchsorted(cumulative, u.to(device)).clamp(max=len(proposal) - 1)
        factor = half_gap[t - 1] / proposal[t - 1] / timesteps_per_image
        for part in torch.arange(len(images), device=device).split(batch_size):
            x_t = schedule.add_noise(x0[part], noise[part], t[part])
            output = predict(
                model, x_t, t[part], **_model_kwargs(None if labels is None else labels[part])
            )
            error = schedule.to_x0(output.float(), x_t, t[part], prediction_type) - x0[part]
            diffusion[part] += factor[part] * error.double().square().flatten(1).sum(1)
    model.train(was_training)
    prior, reconstruction = (
        _prior_nats(images, schedule),
        _reconstruction_nats(images, schedule, seed),
    )
    scale = images[0].numel() * math.log(2)
    bits = (diffusion + prior + reconstruction) / scale
    terms = (float(term.mean() / scale) for term in (diffusion, prior, reconstruction))
    return Elbo(float(bits.mean()), float(bits.std() / len(bits) ** 0.5), *terms)


def _prior_nats(images: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL from q(x_T | x0) to a standard normal, per image."""
    bar = schedule.alphas_cumprod[-1].to(images.device)
    squares = images.double().div(127.5).sub(1).square()
    return 0.5 * (bar * squares - bar - torch.log1p(-bar)).flatten(1).sum(1)


def _reconstruction_nats(images: Tensor, schedule: NoiseSchedule, seed: int) -> Tensor:
    """-log p(x0 | latent at t = 0) per image: a softmax over 256 grey levels of the latent's Gaussian likelihood."""
    device = images.device
    half_snr = 0.5 * schedule.log_snr[0].exp().to(device)
    levels = torch.arange(256, device=device, dtype=torch.float64).div(127.5).sub(1)
    nats = []
    for index, image in enumerate(images):
        draw = generator(seed, index, "reconstruction", device)
        x0 = levels[image.long()].flatten()
        z = (
            x0
            + torch.randn(x0.shape, generator=draw, device=device, dtype=torch.float64)
            * (2 * half_snr) ** -0.5
        )
        logits = -half_snr * (z[:, None] - levels).square()
        nats.append(
            (logits.logsumexp(1) - logits.gather(1, image.long().flatten()[:, None])[:, 0]).sum()
        )
    return torch.stack(nats)


def check_sampling(schedule: NoiseSchedule, sampler: str, num_steps: int, count: int) -> None:
    """Raises what sample_images does for a bad sampler or number, before a network is there."""
    check_name("sampler", sampler, SAMPLERS)
    if count < 1 or not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(
            f"need 1 image or more and num_steps from 1 to {schedule.num_timesteps}; got {count} and {num_steps}"
        )
    if sampler in ("dpm-solver", "heun") and schedule.log_snr[-1] == -math.inf:
        raise ValueError(
            f"{sampler} divides by alpha, which is 0 at the last step of this schedule; use ddim or ddpm"
        )


@torch.no_grad()
def sample_images(
    model: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int, int],
    *,
    prediction_type: str = "epsilon",
    sampler: str = "ddim",
    num_steps: int = 50,
    seed: int = 0,
    labels: Tensor | None = None,
    batch_size: int = 256,
    compile: bool = False,
    progress: bool = False,
) -> Tensor:
    """Draw images with a diffusers sampler: (N, C, H, W) uint8 on the model's device.

    shape: (N, C, H, W); sampler: "ddim", "dpm-solver" (DPM-Solver++ 2M; it amplifies the errors that a briefly trained
    network makes at the noisiest timesteps, into saturated colours), "heun" (Karras et al. 2022, second order) or
    "ddpm" (ancestral; use num_steps near T). num_steps: evaluations of the network for each image, of which heun uses
    an odd number. labels: (N,), by default the classes in turn of a diffusers network that has classes. compile: the
    network, for batches of one size. The latents are a function of (seed, image number).
    Raises KeyError for an unknown sampler, ValueError for numbers out of range or samples that are not finite.
    """
    check_sampling(schedule, sampler, num_steps, shape[0])
    if labels is None and (
        classes := getattr(getattr(model, "config", None), "num_class_embeds", None)
    ):
        labels = torch.arange(shape[0]) % classes
    if labels is not None and len(labels) != shape[0]:
        raise ValueError(f"need one label for each of {shape[0]} images; got {len(labels)}")
    import diffusers
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"timestep_spacing": "trailing"}
    if sampler == "dpm-solver":
        # The others clip the predicted x0 to [-1, 1]; this is the same by another name.
        options |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": 1.0,
            "sample_max_value": 1.0,
        }
    else:
        options |= {"clip_sample": True}
    kind = getattr(diffusers, f"{SAMPLERS[sampler]}Scheduler")
    scheduler = schedule.to_diffusers(kind, prediction_type, **options)
    device, size = next(model.parameters()).device, min(batch_size, shape[0])
    was_training = model.training
    model.eval()
    network: Any = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
    done = []
    with tqdm(
        total=shape[0],
        unit="img",
        desc=f"sampling ({sampler}, {num_steps} steps)",
        disable=not progress,
    ) as bar:
        for first in range(0, shape[0], size):
            # A compiled network gets a last batch as large as the others: more than was asked for, cut off below.
            numbers = range(first, first + size if compile else min(first + size, shape[0]))
            latents = [generator(seed, i, "latent", device) for i in numbers]
            x = torch.stack(
                [torch.randn(shape[1:], generator=latent, device=device) for latent in latents]
            )
            kwargs = _model_kwargs(
                None if labels is None else labels.to(device)[[i % shape[0] for i in numbers]]
            )
            extra = (
                {"generator": generator(seed, first, "sampler noise", device)}
                if sampler == "ddpm"
                else {}
            )
            scheduler.set_timesteps((num_steps + 1) // 2 if sampler == "heun" else num_steps)
            x = x * scheduler.init_noise_sigma
            for t in scheduler.timesteps:  # on the host, where diffusers looks them up
                timesteps = torch.full((len(x),), int(t), device=device)
                output = predict(
                    network, scheduler.scale_model_input(x, t), timesteps, **kwargs
                ).float()
                x = scheduler.step(output, t, x, **extra).prev_sample
            if not x.isfinite().all():
                raise ValueError(
                    f"{sampler}, {num_steps} steps: values are not finite. Is the network whole?"
                )
            done.append(x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
            bar.update(min(size, shape[0] - first))
    model.train(was_training)
    return torch.cat(done)[: shape[0]]
