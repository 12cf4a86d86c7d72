"""Problems with known answers, in float64: closed-form losses, gradients, Pareto sets and optimal denoisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .data.dataset import ImageData
from .images import to_uint8
from .randomness import generator
from .schedule import NoiseSchedule, canonical_prediction_type
from .weightings.formulas import log_error_factor

ROUNDING_VARIANCE = (2 / 255) ** 2 / 12  # of a uniform error as wide as a grey level in [-1, 1]


class LinearDenoiser(nn.Module):
    """Noise predicted as w(t) x_t, coordinate by coordinate, on independent Gaussian data: one objective per timestep.

    w(t) = sum_r features_r(t) theta_r, `degree` orthogonal polynomials of log-SNR: 1 shares one w = theta between all
    timesteps, degree = T gives each its own and the conflict is gone. variances: (d,) of the data; theta: (degree, d).
    Losses are means over coordinates, as in ``objective.sample_losses``: the module itself can be trained and measured.
    They are convex in theta, so the minimisers of weighted sums are the whole Pareto set.

    Raises ValueError for a degree outside 1..T, a variance that is not positive, and a zero terminal SNR.

    >>> schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.1]))
    >>> denoiser = LinearDenoiser(schedule, torch.ones(2), degree=3)
    >>> theta = denoiser.minimiser(torch.ones(3, dtype=torch.float64))
    >>> denoiser.losses(theta)  # of one w for each timestep: 1 - sigma^2 / Var(x_t)
    tensor([0.9000, 0.5000, 0.1000], dtype=torch.float64)
    """

    features: Tensor
    sigma: Tensor
    variance: Tensor

    def __init__(self, schedule: NoiseSchedule, variances: Tensor, degree: int = 1) -> None:
        super().__init__()
        log_snr = schedule.log_snr.cpu()
        num_timesteps = len(log_snr)
        is_finite = bool(torch.isfinite(log_snr).all())
        if not (1 <= degree <= num_timesteps and is_finite and (variances > 0).all()):
            raise ValueError(
                f"need degree in 1..T, finite log-SNR, variances > 0; got {degree}, {log_snr}, {variances}"
            )
        # Polynomials of the standardised log-SNR, made orthogonal, of mean square 1, positive leading coefficients.
        standardised = (log_snr - log_snr.mean()) / log_snr.std()
        powers = standardised[:, None] ** torch.arange(degree)
        basis, triangle = torch.linalg.qr(powers)
        features = basis * triangle.diagonal().sign() * num_timesteps**0.5
        noise_variance = 1 - schedule.alphas_cumprod.cpu()[:, None]
        variance = (1 - noise_variance) * variances.double() + noise_variance
        self.register_buffer("features", features)  # (T, degree)
        self.register_buffer("sigma", noise_variance.sqrt())  # (T, 1)
        self.register_buffer("variance", variance)  # (T, d), of x_t
        self.theta = nn.Parameter(torch.zeros(degree, len(variances), dtype=torch.float64))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The predicted noise, in the shape of x_t (B, ...)."""
        w = self.features[timesteps] @ self.theta
        return (w * x_t.flatten(1)).view_as(x_t)

    def losses(self, theta: Tensor) -> Tensor:
        """The T losses at theta, (T,): E (noise - w x_t)^2 = 1 - 2 w sigma + w^2 Var(x_t)."""
        w = self.features @ theta
        return (1 - 2 * w * self.sigma + w**2 * self.variance).mean(1)

    def gradients(self, theta: Tensor) -> Tensor:
        """The Jacobian of the losses at theta, (T, theta.numel())."""
        w = self.features @ theta
        slope = 2 * (w * self.variance - self.sigma) / theta.shape[1]
        return torch.einsum("tr,td->trd", self.features, slope).flatten(1)

    def minimiser(self, weights: Tensor) -> Tensor:
        """The theta that minimises sum_t weights_t L_t, for weights (T,) >= 0, not all 0."""
        normal = torch.einsum(
            "t,td,tr,ts->drs", weights, self.variance, self.features, self.features
        )
        right = torch.einsum("t,tr->r", weights * self.sigma[:, 0], self.features)
        # With fewer weighted timesteps than features many theta will do; pinv takes the smallest.
        return (torch.linalg.pinv(normal, hermitian=True) @ right).T

    def gramian(self, theta: Tensor) -> Tensor:
        """Inner products of the gradients at theta, (T, T)."""
        gradients = self.gradients(theta)
        return gradients @ gradients.T

    def front(self, objectives: Tensor, mixes: Tensor) -> Tensor:
        """Points (n, m) of the Pareto front of m averages of the T losses.

        objectives: (m, T), each row the weights of one average; mixes: (n, m), each row a weighting of the averages.
        """
        points = []
        for mix in mixes:
            theta = self.minimiser(mix @ objectives)
            points.append(objectives @ self.losses(theta))
        return torch.stack(points)

    def utopia(self, objectives: Tensor) -> Tensor:
        """(m,): the least value of each average, each with a theta of its own; no shared theta reaches all of them."""
        return torch.stack([row @ self.losses(self.minimiser(row)) for row in objectives])

    def irreducible(self) -> Tensor:
        """(T,): the loss of the best w for each timestep on its own, which no denoiser beats on Gaussian data."""
        return (1 - self.sigma**2 / self.variance).mean(1)

    def noise_trace(self, theta: Tensor) -> Tensor:
        """(T,): trace of the covariance of one sample's gradient, from the fourth moments of Gaussians (Isserlis)."""
        w = self.features @ theta
        variance = self.variance
        spread = 2 * (w * variance) ** 2 - 4 * w * variance * self.sigma + variance + self.sigma**2
        return 4 * spread.sum(1) * self.features.square().sum(1) / theta.shape[1] ** 2


class GaussianMixture:
    """Data from isotropic Gaussians: probabilities (C,), means (C, D), stds (C,), all float64.

    With std 0 it is a set of points; the posterior mean of the training set is the denoiser that has memorised it.

    >>> two = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    >>> half = torch.full((1, 1), 0.5**0.5, dtype=torch.float64)
    >>> two.posterior_mean(half, half, half)  # tanh(alpha x_t / sigma^2)
    tensor([[0.7616]], dtype=torch.float64)
    """

    def __init__(self, probabilities: Tensor, means: Tensor, stds: Tensor) -> None:
        if not probabilities.shape == means.shape[:1] == stds.shape:
            raise ValueError(
                f"need shapes (C,), (C, D), (C,); got {probabilities.shape}, {means.shape}, {stds.shape}"
            )
        self.probabilities = probabilities.double()
        self.means = means.double()
        self.variances = stds.double() ** 2

    def sample(self, count: int, draw: torch.Generator) -> Tensor:
        """(count, D) samples."""
        index = torch.multinomial(self.probabilities, count, replacement=True, generator=draw)
        noise = torch.randn(count, self.means.shape[1], generator=draw, dtype=torch.float64)
        return self.means[index] + self.variances[index, None].sqrt() * noise

    def _log_joint(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log of probability times Gaussian density of each component, (B, C)."""
        variance = alpha**2 * self.variances + sigma**2
        products = alpha * x_t @ self.means.T
        squares = alpha**2 * self.means.square().sum(1)
        distance = x_t.square().sum(1, True) - 2 * products + squares
        volume = x_t.shape[1] * (2 * math.pi * variance).log()
        return self.probabilities.log() - (distance / variance + volume) / 2

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
        x0 = self.sample(num_samples, draw)
        noise = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
        denoiser = OptimalDenoiser(self, schedule, prediction_type)
        losses = []
        for t in range(schedule.num_timesteps):
            timesteps = torch.full((num_samples,), t)
            output = denoiser(schedule.add_noise(x0, noise, timesteps), timesteps)
            target = schedule.target(x0, noise, timesteps, prediction_type)
            losses.append((output - target).square().mean(1))
        every = torch.stack(losses)
        return every.mean(1), every.std(1) / num_samples**0.5


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
    frequency = torch.fft.fftfreq(size, dtype=torch.float64)
    lowest = 0.5 / size  # keeps the power of the mean finite
    power = 1 / (frequency[:, None] ** 2 + frequency**2 + lowest**2)
    return power * (std**2 / power.mean()) + ROUNDING_VARIANCE


class GaussianField(nn.Module):
    """The distribution of ``gaussian_fields``, for `OptimalDenoiser`: a Wiener filter in Fourier space."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.variances = nn.Parameter(field_variances(size), requires_grad=False)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] (B, D): each mode times its gain; alpha and sigma (B, 1)."""
        alpha = alpha[..., None]
        sigma = sigma[..., None]
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        modes = torch.fft.fft2(x_t.view(-1, *self.variances.shape))
        return torch.fft.ifft2(modes * gain).real.flatten(1)


def gaussian_fields(
    num_images: int, size: int = 8, seed: int = 0, split: str = "train"
) -> ImageData:
    """Stationary Gaussian noise, uint8 (N, 1, size, size), whose best denoiser is known: a Wiener filter.

    Image i is a function of (seed, split, i // 1000, i): more images extend the set.
    """
    scale = field_variances(size).sub(ROUNDING_VARIANCE).sqrt()
    blocks = []
    for start in range(0, num_images, 1000):
        draw = generator(seed, start // 1000, f"fields {split}")
        white = torch.randn(1000, size, size, generator=draw, dtype=torch.float64)
        modes = torch.fft.fft2(white, norm="ortho") * scale
        blocks.append(torch.fft.ifft2(modes, norm="ortho").real)
    x0 = torch.cat(blocks)[:num_images, None]
    return ImageData(to_uint8(x0), name="gaussian-fields")


def field_floor(schedule: NoiseSchedule, prediction_type: str = "epsilon", size: int = 8) -> Tensor:
    """The loss of the best denoiser of ``gaussian_fields`` at each timestep, (T,) float64: nothing trained beats it."""
    snr = schedule.log_snr.exp()
    variances = field_variances(size).flatten().to(snr.device)
    x0_loss = (1 / (snr[:, None] + 1 / variances)).mean(1)
    return x0_loss * log_error_factor(schedule.log_snr, prediction_type, schedule.is_flow).exp()
