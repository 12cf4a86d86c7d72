"""Closed forms against autograd, Monte Carlo, quadrature and published identities."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dysigma import pareto
from dysigma.exact import GaussianMixture, LinearDenoiser, OptimalDenoiser
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule

VARIANCES = torch.logspace(1, -2, 16, dtype=torch.float64)


def short_schedule() -> NoiseSchedule:
    """Ten timesteps: the middles of ten equal parts of the DDPM schedule."""
    return NoiseSchedule(NoiseSchedule.linear(1000).alphas_cumprod[50::100])


def draws(denoiser: LinearDenoiser, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = generator(seed, 0, "test")
    shape = (count, denoiser.variance.shape[1])
    return (
        torch.randn(shape, generator=draw, dtype=torch.float64) * VARIANCES.sqrt(),
        torch.randn(shape, generator=draw, dtype=torch.float64),
    )


@pytest.mark.parametrize("degree", [1, 3])
def test_linear_losses_are_those_of_the_objective(degree):
    schedule = short_schedule()
    denoiser = LinearDenoiser(schedule, VARIANCES, degree)
    with torch.no_grad():
        denoiser.theta.copy_(denoiser.minimiser(torch.ones(10).double()) * 0.7)
    x0, noise = draws(denoiser, 20_000)
    exact = denoiser.losses(denoiser.theta)
    for t in range(10):
        losses = sample_losses(denoiser, schedule, x0, noise, torch.full((20_000,), t)).detach()
        assert abs(losses.mean() - exact[t]) < 4 * losses.std() / math.sqrt(20_000)


@pytest.mark.parametrize("degree", [1, 3])
def test_linear_gradients_agree_with_autograd(degree):
    denoiser = LinearDenoiser(short_schedule(), VARIANCES, degree)
    theta = torch.randn(
        denoiser.theta.shape, dtype=torch.float64, generator=generator(0, 0, "test")
    )
    jacobian = torch.autograd.functional.jacobian(denoiser.losses, theta).flatten(1)
    torch.testing.assert_close(denoiser.gradients(theta), jacobian)
    torch.testing.assert_close(denoiser.gramian(theta), jacobian @ jacobian.T)


def test_gradient_noise_has_the_predicted_size():
    schedule, degree = short_schedule(), 2
    denoiser = LinearDenoiser(schedule, VARIANCES, degree)
    theta = denoiser.minimiser(torch.ones(10).double()) * 0.7
    x0, noise = draws(denoiser, 40_000)
    for t in (0, 5, 9):
        x_t = schedule.add_noise(x0, noise, torch.full((len(x0),), t))
        slope = 2 * (denoiser.features[t] @ theta * x_t - noise) * x_t / 16
        gradients = torch.einsum("r,nd->nrd", denoiser.features[t], slope).flatten(1)
        assert gradients.var(0).sum() == pytest.approx(
            float(denoiser.noise_trace(theta)[t]), rel=0.1
        )


def test_capacity_removes_the_trade_off():
    """Excess loss of the equal-weight solution, summed over timesteps and coordinates, for 1, 2, 3, 4, 6 features."""
    totals = []
    for degree in (1, 2, 3, 4, 6, 10):
        denoiser = LinearDenoiser(short_schedule(), VARIANCES, degree)
        theta = denoiser.minimiser(torch.ones(10).double())
        totals.append(16 * float((denoiser.losses(theta) - denoiser.irreducible()).sum()))
    assert totals[:5] == pytest.approx([15.9, 3.59, 1.64, 0.366, 0.033], rel=0.01)
    assert abs(totals[5]) < 1e-12


def test_linear_front():
    """The ends of the low-noise against high-noise front by hand: w = sigma_k / v_k is best for timestep k."""
    denoiser = LinearDenoiser(short_schedule(), VARIANCES)
    ends = torch.zeros(2, 10, dtype=torch.float64)
    ends[0, 0] = ends[1, -1] = 1
    mixes = torch.linspace(0, 1, 41, dtype=torch.float64)
    points = denoiser.front(ends, torch.stack([mixes, 1 - mixes], 1))
    assert bool(pareto.non_dominated(points).all())
    best = denoiser.sigma / denoiser.variance
    low, high = denoiser.losses(best[:1]), denoiser.losses(best[-1:])
    torch.testing.assert_close(points[-1], torch.stack([low[0], low[-1]]))
    torch.testing.assert_close(points[0], torch.stack([high[0], high[-1]]))
    torch.testing.assert_close(denoiser.utopia(ends), denoiser.irreducible()[[0, -1]])


def test_every_point_of_the_pareto_set_is_stationary_and_other_points_are_not():
    denoiser = LinearDenoiser(short_schedule(), VARIANCES, 2)
    weights = torch.rand(10, dtype=torch.float64, generator=generator(0, 0, "test"))
    theta = denoiser.minimiser(weights)
    assert pareto.stationarity(denoiser.gramian(theta)) < 1e-7
    assert pareto.stationarity(denoiser.gramian(torch.zeros_like(theta))) > 0.1
    # Equal weights: the mean cosine of gradients that sum to zero is pinned near -1/(K-1) and neighbours still agree.
    shared = LinearDenoiser(short_schedule(), VARIANCES)
    gramian = shared.gramian(shared.minimiser(torch.ones(10).double()))
    cosine = gramian / torch.outer(gramian.diagonal().sqrt(), gramian.diagonal().sqrt())
    assert float(cosine.diagonal(1).mean()) == pytest.approx(0.81, abs=0.01)
    assert float(cosine.min()) < -0.99


def test_a_zero_terminal_snr_schedule_is_refused():
    schedule = NoiseSchedule.linear(10, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="finite log-SNR"):
        LinearDenoiser(schedule, VARIANCES)
    with pytest.raises(ValueError, match=r"degree in 1\.\.T"):
        LinearDenoiser(short_schedule(), VARIANCES, 11)


def equally_likely(images):
    points = images.flatten(1).double()
    return GaussianMixture(
        points.new_full((len(points),), 1 / len(points)), points, points.new_zeros(len(points))
    )


MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [2.0]]), torch.tensor([0.5, 0.2])
)


def test_mixture_posterior_mean_against_quadrature():
    from scipy.integrate import quad

    def prior(x: float) -> float:
        return (
            0.3 * math.exp(-((x + 1) ** 2) / 0.5) / 0.5
            + 0.7 * math.exp(-((x - 2) ** 2) / 0.08) / 0.2
        )

    for alpha, sigma in ((0.9, 0.4), (0.3, 1.0)):
        for x_t in (-1.0, 0.3, 2.5):

            def joint(
                x: float, x_t: float = x_t, alpha: float = alpha, sigma: float = sigma
            ) -> float:
                return prior(x) * math.exp(-((x_t - alpha * x) ** 2) / (2 * sigma**2))

            mass = quad(joint, -6, 6, points=[-1, 2])[0]
            mean = quad(lambda x, joint=joint: x * joint(x), -6, 6, points=[-1, 2])[0] / mass
            arguments = (
                torch.tensor([[x_t]]).double(),
                torch.tensor([[alpha]]).double(),
                torch.tensor([[sigma]]).double(),
            )
            assert float(MIXTURE.posterior_mean(*arguments)) == pytest.approx(mean, rel=1e-6)
            density = mass / (2 * math.pi * sigma)
            assert float(MIXTURE.log_density(*arguments).exp()) == pytest.approx(density, rel=1e-6)


def test_tweedie():
    """E[noise | x_t] = -sigma times the score of the noised density (Tweedie)."""
    draw = generator(0, 0, "test")
    mixture = GaussianMixture(
        torch.rand(5, generator=draw),
        torch.randn(5, 3, generator=draw),
        torch.rand(5, generator=draw),
    )
    mixture.probabilities /= mixture.probabilities.sum()
    schedule = short_schedule()
    timesteps = torch.arange(10)
    x_t = torch.randn(10, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    square = schedule.alphas_cumprod[:, None]
    density = mixture.log_density(x_t, square.sqrt(), (1 - square).sqrt())
    score = torch.autograd.grad(density.sum(), x_t)[0]
    noise = OptimalDenoiser(mixture, schedule)(x_t, timesteps)
    torch.testing.assert_close(noise, -(1 - square).sqrt() * score, rtol=1e-5, atol=1e-6)


def test_a_single_gaussian_is_solved_by_the_linear_denoiser():
    schedule = short_schedule()
    gaussian = GaussianMixture(torch.ones(1), torch.zeros(1, 16), torch.full((1,), 0.5))
    linear = LinearDenoiser(schedule, torch.full((16,), 0.25), degree=10)
    losses, errors = gaussian.irreducible(schedule)
    assert ((losses - linear.irreducible()).abs() < 4 * errors).all()
    with torch.no_grad():
        linear.theta.copy_(linear.minimiser(torch.ones(10).double()))
    x_t = torch.randn(10, 16, generator=generator(0, 0, "test"))
    torch.testing.assert_close(
        OptimalDenoiser(gaussian, schedule)(x_t, torch.arange(10)),
        linear(x_t, torch.arange(10)).float(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_irreducible_losses_agree_between_prediction_types():
    """Errors in x0, noise and v differ by factors of the SNR alone: epsilon = snr x0, v = (1 + snr) x0."""
    schedule = short_schedule()
    x0_loss = MIXTURE.irreducible(schedule, "sample", num_samples=64)[0]
    snr = schedule.log_snr.exp()
    torch.testing.assert_close(
        MIXTURE.irreducible(schedule, "eps", num_samples=64)[0], snr * x0_loss, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        MIXTURE.irreducible(schedule, "v", num_samples=64)[0],
        (1 + snr) * x0_loss,
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.slow
def test_information_grows_at_half_the_denoising_error():
    """dI/dsnr = mmse/2 (Guo, Shamai, Verdu 2005): over all log-SNR it sums to the data's entropy."""
    points = equally_likely(torch.tensor([[-1.0], [1.0]]))
    log_snr = torch.linspace(8, -8, 400, dtype=torch.float64)
    schedule = NoiseSchedule(torch.sigmoid(log_snr))
    losses, _ = points.irreducible(
        schedule, "epsilon", num_samples=20_000
    )  # = snr mmse, the integrand in log-SNR
    nats = -torch.trapezoid(losses, log_snr) / 2
    assert float(nats) == pytest.approx(math.log(2), rel=0.01)


def test_the_empirical_optimum_returns_training_images():
    images = torch.rand(6, 3, 4, 4, generator=generator(0, 0, "test"))
    schedule = NoiseSchedule.linear(1000)
    model = OptimalDenoiser(equally_likely(images), schedule, "sample")
    noise = torch.randn(images.shape, generator=generator(0, 1, "test"))
    early, late = torch.full((6,), 5), torch.full((6,), 999)
    torch.testing.assert_close(model(schedule.add_noise(images, noise, early), early), images)
    # Almost no signal is left: the posterior falls back on the mean image.
    torch.testing.assert_close(
        model(schedule.add_noise(images, noise, late), late),
        images.mean(0).expand_as(images),
        rtol=0,
        atol=0.05,
    )
    assert copy.deepcopy(model)(noise, early).shape == images.shape


def test_sampling_has_the_moments_of_the_mixture():
    samples = MIXTURE.sample(50_000, generator(0, 0, "test"))
    mean = 0.3 * -1 + 0.7 * 2
    assert float(samples.mean()) == pytest.approx(mean, abs=0.03)
    assert float(samples.var()) == pytest.approx(
        0.3 * (0.25 + 1) + 0.7 * (0.04 + 4) - mean**2, rel=0.02
    )


def test_mixture_shapes_are_checked():
    with pytest.raises(ValueError, match="need shapes"):
        GaussianMixture(torch.ones(2), torch.zeros(3, 1), torch.ones(2))
