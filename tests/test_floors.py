"""Floors on images: against closed forms, another implementation, and the laws that make them bounds."""

from __future__ import annotations

import math

import pytest
import torch

import dysigma
from dysigma.exact import (
    GaussianMixture,
    OptimalDenoiser,
    field_floor,
    gaussian_fields,
)
from dysigma.floors import floor_bounds
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule
from dysigma.weightings.formulas import log_error_factor

LINEAR = NoiseSchedule.linear()
TIMESTEPS = torch.tensor([5, 50, 150, 300, 500, 800, 999])


def test_gaussian_data_are_bracketed_and_reached_where_noise_is_high():
    floor = field_floor(LINEAR)[TIMESTEPS]
    bounds = floor_bounds(gaussian_fields(2000), LINEAR, "epsilon", TIMESTEPS)
    # The best denoiser is linear here. What is left in its bound, below 3 %, is which images were drawn.
    assert (bounds.lower < 1.03 * floor + 3 * bounds.lower_se).all()
    assert (bounds.others > 0.97 * floor - 3 * bounds.others_se).all()
    assert (bounds.linear / floor - 1).abs().max() < 0.03
    torch.testing.assert_close(bounds.lower[3:], floor[3:], rtol=0.1, atol=0)
    torch.testing.assert_close(bounds.upper()[3:], floor[3:], rtol=0.1, atol=0)
    assert bounds.lower[0] < 0.01 * floor[0], "at low noise the images are memorised"


def test_one_image_is_known_at_every_level():
    bounds = floor_bounds(torch.rand(1, 3, 4, 4), LINEAR, "x0", TIMESTEPS, num_samples=4)
    assert (bounds.lower == 0).all() and bounds.upper().isinf().all()


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        (LINEAR, "epsilon"),
        (LINEAR, "sample"),
        (LINEAR, "v_prediction"),
        (NoiseSchedule.flow(), "flow_prediction"),
        (NoiseSchedule.flow(shift=3.0), "sample"),
    ],
)
def test_the_floor_is_the_loss_of_the_best_denoiser_of_the_images(schedule, kind):
    """By another road: the network of ``exact`` that holds the images, run through the objective."""
    images = torch.rand(12, 1, 3, 3, generator=generator(0, 0, "test")) * 2 - 1
    points = images.flatten(1).double()
    mixture = GaussianMixture(torch.full((12,), 1 / 12), points, torch.zeros(12))
    network = OptimalDenoiser(mixture, schedule, kind)
    timesteps = torch.tensor([100, 400, 700, 990])
    bounds = floor_bounds(images, schedule, kind, timesteps, num_samples=4000)
    draw = generator(1, 0, "test")
    for k, t in enumerate(timesteps):
        x0 = images[torch.randint(12, (4000,), generator=draw)].double()
        noise = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
        losses = sample_losses(network, schedule, x0, noise, t.expand(4000), kind).detach()
        error = (losses.var() / 4000 + bounds.lower_se[k] ** 2) ** 0.5
        assert (losses.mean() - bounds.lower[k]).abs() < 4 * error + 1e-6


def test_more_images_raise_the_lower_bound_towards_the_floor():
    every = gaussian_fields(4000)
    means = []
    for count in (4, 20, 100):
        floors = [
            floor_bounds(every.images[i * count : (i + 1) * count], LINEAR, "x0", TIMESTEPS).lower
            for i in range(20)
        ]
        means.append(torch.stack(floors).mean(0))
    assert (means[0] <= means[1] + 1e-9).all() and (means[1] <= means[2] + 1e-9).all()
    assert (means[2] < 1.02 * field_floor(LINEAR, "x0")[TIMESTEPS]).all()


def test_at_zero_snr_the_mean_image_is_left_and_the_noise_is_seen():
    schedule = NoiseSchedule.linear(100, zero_terminal_snr=True)
    images = dysigma.leaves(50, 8)
    last = torch.tensor([99])
    x0 = images.images.float() / 127.5 - 1
    torch.testing.assert_close(
        floor_bounds(images, schedule, "x0", last).lower,
        x0.double().var(0, correction=0).mean()[None],
        rtol=1e-5,
        atol=0,
    )
    assert float(floor_bounds(images, schedule, "epsilon", last).lower) == 0
    assert floor_bounds(images, schedule, "v", last).upper().isfinite().all()


def test_a_floor_of_all_timesteps_serves_the_weighting_of_excess_losses():
    schedule = NoiseSchedule.linear(20)
    floor = floor_bounds(dysigma.leaves(30, 8), schedule, "epsilon", num_samples=8).lower
    weighting = dysigma.make_weighting("dy-sigma", schedule, variant="excess", floor=floor, bins=4)
    timesteps = torch.arange(20)
    loss = weighting(floor[timesteps].float() + 0.1, timesteps)
    assert loss.isfinite()


def test_factors_are_those_of_the_targets():
    """The errors that one error of x0 makes in the other targets, through the schedule's own conversions."""
    for schedule in (LINEAR, NoiseSchedule.flow()):
        timesteps = torch.tensor([100, 500, 900])
        x0, noise, change = torch.randn(3, 3, 4, dtype=torch.float64)
        x_t = schedule.add_noise(x0, noise, timesteps)
        alpha, sigma = (c[timesteps, None].double() for c in (schedule.alpha, schedule.sigma))
        guess = x0 + change
        implied = (x_t - alpha * guess) / sigma
        kinds = ["sample", "epsilon", "v_prediction"] + ["flow_prediction"] * schedule.is_flow
        for kind in kinds:
            right = schedule.target(x0, noise, timesteps, kind)
            wrong = schedule.target(guess, implied, timesteps, kind)
            log_factor = log_error_factor(schedule.log_snr[timesteps], kind, schedule.is_flow)
            expected = log_factor.exp()[:, None] * change.square()
            torch.testing.assert_close((wrong - right).square(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("is_flow", [False, True])
def test_the_factor_of_v_is_1_at_pure_noise(is_flow):
    pure_noise = torch.tensor([-math.inf])
    assert log_error_factor(pure_noise, "v_prediction", is_flow).tolist() == [0.0]


def test_the_floor_of_v_on_a_flow_is_that_of_x0_in_its_units():
    schedule = NoiseSchedule.flow()
    images = torch.randn(8, 1, 4, 4)
    of_x0, of_v = (floor_bounds(images, schedule, kind, TIMESTEPS) for kind in ("x0", "v"))
    s = schedule.sigma[TIMESTEPS].double()
    # v = alpha noise - sigma x0 = (alpha x_t - (alpha^2 + sigma^2) x0) / sigma.
    factor = (((1 - s) ** 2 + s**2) / s) ** 2
    torch.testing.assert_close(of_v.upper(), factor * of_x0.upper(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": 255 * torch.rand(3, 3, 8, 8)}, "127.5"),
        ({"images": torch.zeros(3, 3, 8, 8).long()}, "uint8"),
        ({"images": torch.zeros(3, 3, 8, 8) / 0}, "NaN"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "one or more"),
        ({"timesteps": torch.tensor([1000])}, r"\[0, 1000\)"),
        ({"prediction_type": "flow"}, "flow_prediction"),
        ({"num_samples": 1}, "num_samples"),
    ],
)
def test_bad_requests_are_told(change, words):
    request = {"images": torch.zeros(3, 3, 8, 8), "timesteps": TIMESTEPS, "prediction_type": "x0"}
    request = {**request, **change}
    with pytest.raises(ValueError, match=words):
        floor_bounds(schedule=LINEAR, **request)
