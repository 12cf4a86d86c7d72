"""Evaluation against quantities known in closed form."""

import math

import pytest
import torch
from torch import nn

from dysigma.evaluation import (
    SAMPLERS,
    elbo,
    evaluation_timesteps,
    sample_images,
    validation_losses,
)
from dysigma.models import make_model
from dysigma.schedule import NoiseSchedule


class Gaussian(nn.Module):
    """Optimal denoiser of pixels ~ N(0, std^2), as an epsilon network."""

    def __init__(self, schedule, std):
        super().__init__()
        self.schedule, self.std, self.dummy = schedule, std, nn.Parameter(torch.zeros(()))

    def forward(self, x_t, timesteps):
        timesteps = timesteps.long()
        alpha, sigma = (
            c[timesteps].view(-1, 1, 1, 1) for c in (self.schedule.alpha, self.schedule.sigma)
        )
        return sigma / (alpha**2 * self.std**2 + sigma**2) * x_t


def gaussian_images(n, std, seed=0, size=8):
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * std
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def test_validation_losses_equal_the_known_optimum():
    schedule = NoiseSchedule.linear()
    timesteps = evaluation_timesteps(1000, 5)
    losses = validation_losses(
        Gaussian(schedule, 0.25), gaussian_images(64, 0.25), schedule, timesteps=timesteps
    )
    snr = schedule.log_snr[timesteps].exp()
    torch.testing.assert_close(losses, snr / (snr + 1 / 0.25**2), rtol=0.03, atol=0)


def test_validation_losses_do_not_depend_on_the_batch_size_or_the_mode():
    schedule = NoiseSchedule.cosine()
    model, images, timesteps = (
        Gaussian(schedule, 0.3),
        gaussian_images(6, 0.3),
        evaluation_timesteps(1000, 7),
    )
    model.train()
    a = validation_losses(model, images, schedule, timesteps=timesteps, batch_size=4)
    assert model.training
    torch.testing.assert_close(
        a, validation_losses(model, images, schedule, timesteps=timesteps, batch_size=100)
    )


def test_elbo_equals_its_closed_form_for_gaussian_pixels_and_bounds_their_entropy():
    schedule, std = NoiseSchedule.linear(), 0.25
    bound = elbo(
        Gaussian(schedule, std), gaussian_images(128, std), schedule, timesteps_per_image=50
    )
    snr = schedule.log_snr.exp()
    diffusion = float((0.5 * (snr[:-1] - snr[1:]) / (snr[1:] + std**-2)).sum()) / math.log(2)
    assert abs(bound.diffusion - diffusion) < max(4 * bound.standard_error, 0.02)
    entropy = math.log2(std * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert bound.bits_per_dim > entropy - 4 * bound.standard_error
    assert math.isclose(
        bound.bits_per_dim, bound.diffusion + bound.prior + bound.reconstruction, rel_tol=1e-9
    )
    wrong = elbo(
        Gaussian(schedule, 2 * std), gaussian_images(128, std), schedule, timesteps_per_image=50
    )
    assert wrong.bits_per_dim > bound.bits_per_dim + 0.05


def test_elbo_is_refused_where_it_does_not_exist():
    schedule = NoiseSchedule.linear(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="zero SNR"):
        elbo(Gaussian(schedule, 1.0), gaussian_images(2, 0.2), schedule)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_recover_the_deviation_of_gaussian_data(sampler):
    schedule = NoiseSchedule.linear()
    steps = 250
    images = sample_images(
        Gaussian(schedule, 0.25), schedule, (64, 3, 8, 8), sampler=sampler, num_steps=steps
    )
    deviation = float(images.double().div(127.5).sub(1).std())
    assert math.isclose(deviation, 0.25, rel_tol=0.05), deviation


def test_samples_are_a_function_of_seed_and_image_number():
    schedule = NoiseSchedule.linear()
    model = Gaussian(schedule, 0.25)
    few = sample_images(model, schedule, (3, 3, 4, 4), num_steps=5, seed=1, batch_size=2)
    many = sample_images(model, schedule, (5, 3, 4, 4), num_steps=5, seed=1)
    assert (few.int() - many[:3].int()).abs().max() <= 1
    assert not torch.equal(many, sample_images(model, schedule, (5, 3, 4, 4), num_steps=5, seed=2))


def test_heun_evaluates_the_network_as_often_as_asked_or_once_less():
    schedule, calls = NoiseSchedule.linear(), []

    class Counted(Gaussian):
        def forward(self, x_t, timesteps):
            calls.append(int(timesteps[0]))
            return super().forward(x_t, timesteps)

    for steps, made in ((7, 7), (8, 7), (1, 1)):
        calls.clear()
        sample_images(
            Counted(schedule, 0.25), schedule, (2, 3, 4, 4), sampler="heun", num_steps=steps
        )
        assert len(calls) == made
    assert calls == [999]


def test_every_image_has_a_label_of_its_own():
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="one label for each of 5 images; got 2"):
        sample_images(Gaussian(schedule, 0.25), schedule, (5, 3, 4, 4), labels=torch.tensor([0, 1]))


def test_a_network_that_has_classes_draws_them_in_turn_unless_told():
    network, schedule = make_model("micro", 8, num_classes=3), NoiseSchedule.linear()
    turn, one = (torch.tensor(labels) for labels in ([0, 1, 2, 0, 1], [1] * 5))
    drawn = [
        sample_images(network, schedule, (5, 3, 8, 8), num_steps=2, labels=labels)
        for labels in (None, turn, one)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert [torch.equal(a, b) for a, b in zip(drawn[1], drawn[2], strict=True)] == [
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_compiled_network_gives_the_same_samples_from_batches_of_one_size(sampler, monkeypatch):
    schedule, sizes = NoiseSchedule.cosine(), []

    class Seen(Gaussian):
        def forward(self, x_t, timesteps):
            sizes.append(len(x_t))
            return super().forward(x_t, timesteps)

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph, dynamic: model)
    few = {"num_steps": 4, "sampler": sampler, "batch_size": 3}
    plain = sample_images(Seen(schedule, 0.25), schedule, (4, 3, 4, 4), **few)
    assert set(sizes) == {3, 1}
    sizes.clear()
    compiled = sample_images(Seen(schedule, 0.25), schedule, (4, 3, 4, 4), compile=True, **few)
    assert set(sizes) == {3} and torch.equal(plain[:3], compiled[:3])
    if sampler != "ddpm":  # whose noise is of the whole batch
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_zero_terminal_snr_schedule_is_sampled_or_refused(sampler):
    schedule = NoiseSchedule.linear(zero_terminal_snr=True)
    model = Gaussian(schedule, 0.25)
    velocity = nn.Module()
    velocity.dummy = nn.Parameter(torch.zeros(()))

    def forward(x_t, timesteps):
        alpha, sigma = (
            c[timesteps.long()].view(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma)
        )
        noise = model(x_t, timesteps)
        return alpha * noise - sigma * (alpha * 0.25**2 / (alpha**2 * 0.25**2 + sigma**2) * x_t)

    velocity.forward = forward
    options = {"prediction_type": "v", "num_steps": 250}
    images = sample_images(velocity, schedule, (64, 3, 8, 8), sampler=sampler, **options)
    assert math.isclose(float(images.double().div(127.5).sub(1).std()), 0.25, rel_tol=0.05)
    for refused in ("dpm-solver", "heun"):
        with pytest.raises(ValueError, match=f"{refused} divides by alpha"):
            sample_images(velocity, schedule, (1, 3, 8, 8), sampler=refused, **options)


def test_a_broken_network_gives_no_black_images():
    class Broken(Gaussian):
        def forward(self, x_t, timesteps):
            return x_t * float("nan")

    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="not finite"):
        sample_images(Broken(schedule, 1.0), schedule, (1, 3, 8, 8), num_steps=5)


def test_unknown_sampler_shows_the_choices():
    with pytest.raises(KeyError, match="dpm-solver"):
        sample_images(nn.Identity(), NoiseSchedule.linear(), (1, 3, 4, 4), sampler="euler")
