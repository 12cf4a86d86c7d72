"""How low the loss can get on real images: a lower and two upper bounds of the irreducible loss at every noise level.

The floor of x0 prediction is the mean posterior variance L = E[Var(x0 | x_t)]: no denoiser has a smaller loss on the
distribution p of the images. p is known through N images alone, so L can be bracketed but not computed.

Lower bound. The best denoiser of the N images themselves, the empirical distribution q, is their posterior mean

    x0_hat(x_t) = sum_i w_i x_i,    w_i proportional to exp(-|x_t - alpha x_i|^2 / (2 sigma^2)).

Its loss on q is the floor of q. For a fixed denoiser f the loss on q is an unbiased estimate of the loss on p. Take f
the best denoiser of p: E[min_f loss_q(f)] <= E[loss_q(f_p)] = L. So the floor of q is at most L in expectation. It
rises with N (the same argument, with N of N + 1 images), and at low noise it is far below L: there the posterior mean
has memorised the images. It is also what the *training* loss without augmentation cannot go below, in expectation over
noise. Mirrored images, if training mirrors, belong to the images.

Upper bounds. Every denoiser that is fitted on some images and judged on others has, in expectation, at least the loss
L. Two such denoisers: the posterior mean of the other N - 1 images (tight at high noise), and the best linear denoiser
of one half of the images, judged on the other half and the other way round (tight at low noise, where images are
locally Gaussian).

The bounds hold in expectation over independent images. Copies of an image among the others break the first upper bound.
The floor of other prediction types follows with the factor exp(``log_error_factor``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_timesteps
from .data.dataset import ImageData
from .images import check_pixels, to_real
from .randomness import generator
from .schedule import NoiseSchedule, check_schedule
from .weightings.formulas import log_error_factor

SAMPLES_AT_ONCE = 64


class FloorBounds(NamedTuple):
    """Bounds of the irreducible loss in the network's target space, (K,) float64 on the CPU, and their errors.

    The standard errors are of the draws of image and noise; they say nothing about which N images were at hand.
    """

    timesteps: Tensor  # (K,) int64
    lower: Tensor
    lower_se: Tensor
    others: Tensor  # upper bound by the posterior mean of the other images
    others_se: Tensor
    linear: Tensor  # upper bound by the best linear denoiser of the other half

    def upper(self) -> Tensor:
        """The smaller upper bound at each timestep, (K,)."""
        return torch.minimum(self.others, self.linear)


def _as_points(images: Tensor | ImageData) -> Tensor:
    """Images (N, ...) as rows (N, D) float64 in [-1, 1]."""
    table = images.images if isinstance(images, ImageData) else images
    check_pixels(table)
    points = table.flatten(1)
    return to_real(points, torch.float64) if table.dtype == torch.uint8 else points.double()


def _posterior_losses(
    points: Tensor, index: Tensor, noise: Tensor, snrs: Tensor
) -> tuple[Tensor, Tensor]:
    """For x_t made of images index (B,) and noise (B, D) at each SNR of (K,): posterior variances, errors of the others.

    Both are of x0, (K, B), means over coordinates. With x_t = alpha x_k + sigma noise and d_i = x_i - x_k,
    log w_i = -SNR |d_i|^2 / 2 - sqrt(SNR) noise . d_i + constant, which does not cancel where SNR is large.
    """
    own = points[index]
    squares = points.square().sum(1)
    distances = (squares[index, None] + squares - 2 * own @ points.T).clamp(min=0)
    distances.scatter_(1, index[:, None], 0.0)
    along = noise @ points.T - (noise * own).sum(1, keepdim=True)
    variances = []
    errors = []
    for snr in snrs:
        log_weights = -snr * distances / 2 - snr.sqrt() * along
        # The posterior variance, sum_i w_i |d_i|^2 - |sum_i w_i d_i|^2, in place of the squared error: the same mean,
        # and less noise (Rao, Blackwell).
        weights = log_weights.softmax(1)
        offset = weights @ points - own
        variance = (weights * distances).sum(1) - offset.square().sum(1)
        variances.append(variance.clamp(min=0))
        if len(points) == 1:
            errors.append(torch.full_like(variance, torch.inf))
            continue
        log_weights.scatter_(1, index[:, None], -torch.inf)
        error = log_weights.softmax(1) @ points - own
        errors.append(error.square().sum(1))
    dimension = points.shape[1]
    return torch.stack(variances) / dimension, torch.stack(errors) / dimension


def _linear_losses(points: Tensor, snr: Tensor) -> Tensor:
    """(K,) x0 losses of the best linear denoiser of one half of the images on the other half, and back, averaged.

    With the eigenvectors of one half's covariance, variances v, and m the mean squares of the other half along them,
    the gain is g = v snr / (v snr + 1) and the mean over noise of the squared error is (1 - g)^2 m + g^2 / snr.
    """
    losses = []
    halves = (points[0::2], points[1::2])
    for fitted, judged in (halves, halves[::-1]):
        if len(fitted) < 2 or len(judged) < 1:
            return torch.full_like(snr, torch.inf)
        mean = fitted.mean(0)
        centred = fitted - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(fitted))
        # Directions that the half does not span have some variance too. Any choice keeps the bound.
        variances = variances.clamp(min=0) + 0.01 * variances.mean() / (1 + len(fitted) / len(mean))
        squares = ((judged - mean) @ directions).square().mean(0)
        remaining = 1 / (snr[:, None] * variances + 1)  # 1 - g
        noise_share = (1 - remaining) * variances * remaining  # g^2 / snr, finite at snr = 0
        losses.append((remaining.square() * squares + noise_share).mean(1))
    return (losses[0] + losses[1]) / 2


def floor_bounds(
    images: Tensor | ImageData,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    timesteps: Tensor | None = None,
    *,
    num_samples: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> FloorBounds:
    """Bounds of the loss that the best denoiser of these images' distribution has, from the images alone.

    images: (N, ...) uint8, or float in [-1, 1], on any device; taken as independent draws. timesteps: (K,) int64, all
    by default. num_samples: draws of image and noise at each timestep, the same for all. Costs K * num_samples * N * D
    multiplications, and an eigendecomposition of size D. See the top of this module for what is bounded, and how.
    Raises ValueError for timesteps outside the schedule and a prediction type that the path does not have.

    >>> from dysigma.data import leaves
    >>> bounds = floor_bounds(leaves(40, 8), NoiseSchedule.linear(), "x0", torch.tensor([10, 900]))
    >>> bool((bounds.lower <= bounds.upper()).all())
    True
    """
    from tqdm import tqdm

    check_schedule(schedule)
    points = _as_points(images)
    device = points.device
    kind = schedule.canonical(prediction_type)
    if timesteps is None:
        timesteps = torch.arange(schedule.num_timesteps)
    timesteps = timesteps.cpu()
    check_timesteps(timesteps, schedule.num_timesteps)
    if num_samples < 2:
        raise ValueError(f"need num_samples >= 2; got {num_samples}")
    log_snr = schedule.log_snr.cpu()[timesteps]
    snr = log_snr.exp()

    draw = generator(seed, 0, "floor images")
    index = torch.randint(len(points), (num_samples,), generator=draw).to(device)
    draw = generator(seed, 0, "floor noise")
    noise = torch.randn(num_samples, points.shape[1], generator=draw, dtype=torch.float64)
    noise = noise.to(device)

    variances = []
    errors = []
    starts = range(0, num_samples, SAMPLES_AT_ONCE)
    for start in tqdm(starts, desc="floor", unit="batch", disable=not progress):
        batch = slice(start, start + SAMPLES_AT_ONCE)
        variance, error = _posterior_losses(points, index[batch], noise[batch], snr.to(device))
        variances.append(variance.cpu())
        errors.append(error.cpu())
    lower = torch.cat(variances, 1)
    others = torch.cat(errors, 1)
    factor = log_error_factor(log_snr, kind, schedule.is_flow).exp()
    root = num_samples**0.5
    return FloorBounds(
        timesteps=timesteps,
        lower=factor * lower.mean(1),
        lower_se=factor * lower.std(1) / root,
        others=factor * others.mean(1),
        others_se=factor * others.std(1) / root,
        linear=factor * _linear_losses(points, snr.to(device)).cpu(),
    )
