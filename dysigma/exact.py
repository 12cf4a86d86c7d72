"""Problems with known answers, in float64: closed-form losses, gradients, Pareto sets and optimal denoisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .data.dataset import ImageData
from .images import to_uint8
from .randomness import generator
from .schedule import NoiseSchedule, canonical_prediction_type


class LinearDenoiser(nn.Module):
    """Noise predicted as w(t) x_t, coordinate by coordinate, on independent Gaussian data: one objective per timestep.

    w(t) = sum_r features_r(t) theta_r, `degree` orthogonal polynomials of log-SNR: 1 shares one w = theta between all
    timesteps, degree = T gives each its own and the conflict is gone. variances: (d,) of the data; theta: (degree, d).
    Losses are means over coordinates, as in ``objective.sample_losses``: the module itself can be trained and measured.
    They are convex in theta, so the minimisers of weighted sums are the whole Pareto set.
    """

    features: Tensor
    sigma: Tensor
    variance: Tensor

    def __init__(self, schedule: NoiseSchedule, variances: Tensor, degree: int = 1) -> None:
        super().__init__()
        log_snr = schedule.log_snr.cpu()
        if not (
            1 <= degree <= len(log_snr) and torch.isfinite(log_snr).all() and (variances > 0).all()
        ):
            raise ValueError(
                f"need degree in 1..T, finite log-SNR, variances > 0; got {degree}, {log_snr}, {variances}"
            )
        powers = ((log_snr - log_snr.mean()) / log_snr.std())[:, None] ** torch.arange(degree)
        basis, triangle = torch.linalg.qr(powers)
        self.register_buffer("features", basis * triangle.diagonal().sign() * len(log_snr) ** 0.5)
        square = 1 - schedule.alphas_cumprod.cpu()[:, None]
        self.register_buffer("sigma", square.sqrt())
        self.register_buffer("variance", (1 - square) * variances.double() + square)
        self.theta = nn.Parameter(torch.zeros(degree, len(variances), dtype=torch.float64))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return (self.features[timesteps] @ self.theta * x_t.flatten(1)).view_as(x_t)

    def losses(self, theta: Tensor) -> Tensor:
        """The T losses at theta, (T,)."""
        w = self.features @ theta
        return (1 - 2 * w * self.sigma + w**2 * self.variance).mean(1)

    def gradients(self, theta: Tensor) -> Tensor:
        """The Jacobian at theta, (T, theta.numel())."""
        slope = 2 * (self.features @ theta * self.variance - self.sigma) / theta.shape[1]
        return torch.einsum("tr,td->trd", self.features, slope).flatten(1)

    def minimiser(self, weights: Tensor) -> Tensor:
        """The theta that minimises sum_t weights_t L_t, for weights (T,) >= 0, not all 0."""
        normal = torch.einsum(
            "t,td,tr,ts->drs", weights, self.variance, self.features, self.features
        )
        # pinv: with fewer weighted timesteps than features any of many theta will do; take the smallest.
        right = torch.einsum("t,tr->r", weights * self.sigma[:, 0], self.features)
        return (torch.linalg.pinv(normal, hermitian=True) @ right).T

    def gramian(self, theta: Tensor) -> Tensor:
        """Inner products of the gradients at theta, (T, T)."""
        gradients = self.gradients(theta)
        return gradients @ gradients.T

    def front(self, objectives: Tensor, mixes: Tensor) -> Tensor:
        """Points (n, m) of the Pareto front of m averages of the T losses.

        objectives: (m, T), each row the weights of one average; mixes: (n, m), each row a weighting of the averages.
        """
        return torch.stack(
            [objectives @ self.losses(self.minimiser(mix @ objectives)) for mix in mixes]
        )

    def utopia(self, objectives: Tensor) -> Tensor:
        """(m,): the least value of each average, each with a theta of its own; no shared theta reaches all of them."""
        return torch.stack([row @ self.losses(self.minimiser(row)) for row in objectives])

    def irreducible(self) -> Tensor:
        """(T,): the loss of the best w for each timestep on its own, which no denoiser beats on Gaussian data."""
        return (1 - self.sigma**2 / self.variance).mean(1)

    def noise_trace(self, theta: Tensor) -> Tensor:
        """(T,): trace of the covariance of one sample's gradient, from the fourth moments of Gaussians (Isserlis)."""
        w, v = self.features @ theta, self.variance
        spread = 2 * (w * v) ** 2 - 4 * w * v * self.sigma + v + self.sigma**2
        return 4 * spread.sum(1) * self.features.square().sum(1) / theta.shape[1] ** 2


class GaussianMixture:
    """Data from isotropic Gaussians: probabilities (C,), means (C, D), stds (C,), all float64.

    With std 0 it is a set of points; the posterior mean of the training set is the denoiser that has memorised it.
    """

    def __init__(self, probabilities: Tensor, means: Tensor, stds: Tensor) -> None:
        self.probabilities, self.means, self.variances = (
            probabilities.double(),
            means.double(),
            stds.double() ** 2,
        )
        if not probabilities.shape == means.shape[:1] == stds.shape:
            raise ValueError(
                f"need shapes (C,), (C, D), (C,); got {probabilities.shape}, {means.shape}, {stds.shape}"
            )

    def sample(self, count: int, draw: torch.Generator) -> Tensor:
        """(count, D) samples."""
        index = torch.multinomial(self.probabilities, count, replacement=True, generator=draw)
        noise = torch.randn(count, self.means.shape[1], generator=draw, dtype=torch.float64)
        return self.means[index] + self.variances[index, None].sqrt() * noise

    def _log_joint(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = alpha**2 * self.variances + sigma**2
        distance = (
            x_t.square().sum(1, True)
            - 2 * alpha * x_t @ self.means.T
            + alpha**2 * self.means.square().sum(1)
        )
        return (
            self.probabilities.log()
            - (distance / variance + x_t.shape[1] * (2 * math.pi * variance).log()) / 2
        )

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log density (B,) of alpha x0 + sigma noise at x_t (B, D) float64; alpha, sigma (B, 1) or (1, 1)."""
        return self._log_joint(x_t, alpha, sigma).logsumexp(1)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t], the denoiser that nothing beats: (B, D), arguments as in ``log_density``."""
        responsibility = self._log_joint(x_t, alpha, sigma).softmax(1)
        gain = responsibility * alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return (responsibility - alpha * gain) @ self.means + gain.sum(1, keepdim=True) * x_t

    def irreducible(
        self,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        *,
        num_samples: int = 4096,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of the optimal denoiser and its standard error, both (T,); the same draws serve every timestep."""
        draw = generator(seed, 0, "irreducible")
        x0, denoiser, errors = (
            self.sample(num_samples, draw),
            OptimalDenoiser(self, schedule, prediction_type),
            [],
        )
        noise = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
        for t in range(schedule.num_timesteps):
            timesteps = torch.full((num_samples,), t)
            output = denoiser(schedule.add_noise(x0, noise, timesteps), timesteps)
            errors.append(
                (output - schedule.target(x0, noise, timesteps, prediction_type)).square().mean(1)
            )
        losses = torch.stack(errors)
        return losses.mean(1), losses.std(1) / num_samples**0.5


class OptimalDenoiser(nn.Module):
    """The posterior mean of data as a network: forward(x_t (B, ...), timesteps) in the given prediction type."""

    def __init__(
        self,
        data: GaussianMixture | GaussianField,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        self.data, self.schedule = data, schedule
        self.prediction_type = canonical_prediction_type(prediction_type)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        x = x_t.flatten(1).double()
        square = self.schedule.alphas_cumprod[timesteps, None]
        alpha = square.sqrt()
        sigma = (1 - square).sqrt()
        if self.schedule.is_flow:
            x = x * (alpha + sigma)  # to the variance-preserving x_t of the same SNR
        x0 = self.data.posterior_mean(x, alpha, sigma)
        noise = (x - alpha * x0) / sigma
        output = self.schedule.target(x0, noise, timesteps, self.prediction_type)
        return output.to(x_t.dtype).view_as(x_t)


def field_variances(size: int = 8, std: float = 0.25) -> Tensor:
    """Variance of each Fourier mode of ``gaussian_fields``, as ``torch.fft.fft2(norm="ortho")`` orders them.

    (size, size) float64; 1/f^2 like natural images, with that of rounding to grey levels added.
    """
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    power = 1 / (f[:, None] ** 2 + f**2 + (0.5 / size) ** 2)
    return power * (std**2 / power.mean()) + (2 / 255) ** 2 / 12


class GaussianField(nn.Module):
    """The distribution of ``gaussian_fields``, for `OptimalDenoiser`: a Wiener filter in Fourier space."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.variances = nn.Parameter(field_variances(size), requires_grad=False)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] (B, D): each mode times its gain; alpha and sigma (B, 1)."""
        alpha, sigma = alpha[..., None], sigma[..., None]
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return torch.fft.ifft2(
            torch.fft.fft2(x_t.view(-1, *self.variances.shape)) * gain
        ).real.flatten(1)


def gaussian_fields(
    num_images: int, size: int = 8, seed: int = 0, split: str = "train"
) -> ImageData:
    """Stationary Gaussian noise, uint8 (N, 1, size, size), whose best denoiser is known: a Wiener filter.

    Image i is a function of (seed, split, i // 1000, i): more images extend the set.
    """
    scale = field_variances(size).sub((2 / 255) ** 2 / 12).sqrt()
    blocks = []
    for start in range(0, num_images, 1000):
        draw = generator(seed, start // 1000, f"fields {split}")
        white = torch.randn(1000, size, size, generator=draw, dtype=torch.float64)
        blocks.append(
            torch.fft.ifft2(torch.fft.fft2(white, norm="ortho") * scale, norm="ortho").real
        )
    x0 = torch.cat(blocks)[:num_images, None]
    return ImageData(to_uint8(x0), name="gaussian-fields")


def x0_loss_factor(log_snr: Tensor, prediction_type: str) -> Tensor:
    """What turns the squared error of x0 into that of another prediction at the same x_t, for log_snr (T,).

    1 for sample, SNR for epsilon, 1 + SNR for v_prediction, (1 + sqrt(SNR))^2 for flow_prediction: the errors are
    sigma / alpha, 1 / sigma and, on the flow, 1 / s apart (Salimans, Ho 2022, appendix D).

    >>> x0_loss_factor(torch.tensor([0.0]), "v_prediction")
    tensor([2.])
    """
    kind = canonical_prediction_type(prediction_type)
    snr = log_snr.exp()
    if kind == "sample":
        return torch.ones_like(snr)
    if kind == "epsilon":
        return snr
    if kind == "v_prediction":
        return 1 + snr
    return (1 + snr.sqrt()) ** 2


def field_floor(schedule: NoiseSchedule, prediction_type: str = "epsilon", size: int = 8) -> Tensor:
    """The loss of the best denoiser of ``gaussian_fields`` at each timestep, (T,) float64: nothing trained beats it."""
    snr = schedule.log_snr.exp()
    x0_loss = (1 / (snr[:, None] + 1 / field_variances(size).flatten())).mean(1)
    kind = canonical_prediction_type(prediction_type)
    if kind == "sample":
        return x0_loss
    return x0_loss * x0_loss_factor(schedule.log_snr, kind)
