"""Evaluation against quantities known in closed form."""

import itertools
import math

import diffusers
import pytest
import torch
from torch import nn
from toys import GaussianDenoiser

from dysigma import devices, sampling
from dysigma.evaluation import (
    SAMPLERS,
    elbo,
    evaluation_timesteps,
    sample_images,
    validation_losses,
)
from dysigma.models import make_model
from dysigma.sampling import FLOW_SAMPLERS
from dysigma.schedule import NoiseSchedule


def gaussian_images(n, std, seed=0, size=8):
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * std
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def test_validation_losses_equal_the_known_optimum():
    schedule = NoiseSchedule.linear()
    timesteps = evaluation_timesteps(1000, 5)
    losses = validation_losses(
        GaussianDenoiser(schedule, 0.25), gaussian_images(64, 0.25), schedule, timesteps=timesteps
    )
    snr = schedule.log_snr[timesteps].exp()
    torch.testing.assert_close(losses, snr / (snr + 1 / 0.25**2), rtol=0.03, atol=0)


def test_validation_losses_do_not_depend_on_the_batch_size_or_the_mode():
    schedule = NoiseSchedule.cosine()
    model, images, timesteps = (
        GaussianDenoiser(schedule, 0.3),
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
        GaussianDenoiser(schedule, std), gaussian_images(128, std), schedule, timesteps_per_image=50
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
        GaussianDenoiser(schedule, 2 * std),
        gaussian_images(128, std),
        schedule,
        timesteps_per_image=50,
    )
    assert wrong.bits_per_dim > bound.bits_per_dim + 0.05


def test_elbo_is_refused_where_it_does_not_exist():
    schedule = NoiseSchedule.linear(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="zero SNR"):
        elbo(GaussianDenoiser(schedule, 1.0), gaussian_images(2, 0.2), schedule)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_recover_the_deviation_of_gaussian_data(sampler):
    schedule = NoiseSchedule.linear()
    steps = 250
    images = sample_images(
        GaussianDenoiser(schedule, 0.25), schedule, (64, 3, 8, 8), sampler=sampler, num_steps=steps
    )
    deviation = float(images.double().div(127.5).sub(1).std())
    assert math.isclose(deviation, 0.25, rel_tol=0.05), deviation


def test_samples_are_a_function_of_seed_and_image_number():
    schedule = NoiseSchedule.linear()
    model = GaussianDenoiser(schedule, 0.25)
    few = sample_images(model, schedule, (3, 3, 4, 4), num_steps=5, seed=1, batch_size=2)
    many = sample_images(model, schedule, (5, 3, 4, 4), num_steps=5, seed=1)
    assert (few.int() - many[:3].int()).abs().max() <= 1
    assert not torch.equal(many, sample_images(model, schedule, (5, 3, 4, 4), num_steps=5, seed=2))


def test_where_memory_runs_out_fewer_images_are_drawn_at_once():
    schedule = NoiseSchedule.linear(100)
    seen = []

    class Small(GaussianDenoiser):
        """No more than three images at once fit."""

        def forward(self, x, timesteps):
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            seen.append(len(x))
            return super().forward(x, timesteps)

    wanted = sample_images(GaussianDenoiser(schedule, 0.25), schedule, (11, 3, 4, 4), num_steps=2)
    found = sample_images(Small(schedule, 0.25), schedule, (11, 3, 4, 4), num_steps=2)
    assert torch.equal(found, wanted) and set(seen) == {2, 1}

    def full(part):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED" if part.start == 0 else "another fault")

    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        list(devices.in_parts_that_fit(full, 4, 4))
    with pytest.raises(RuntimeError, match="another fault"):
        list(devices.in_parts_that_fit(lambda part: part.start == 0 or full(part), 8, 4))


def test_heun_evaluates_the_network_as_often_as_asked_or_once_less():
    schedule = NoiseSchedule.linear()
    for steps, made in ((7, 7), (8, 7), (1, 1)):
        network = GaussianDenoiser(schedule, 0.25)
        sample_images(network, schedule, (2, 3, 4, 4), sampler="heun", num_steps=steps)
        assert len(network.calls) == made
    assert network.calls == [999]


def test_every_image_has_a_label_of_its_own():
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match=r"label.*5 images.*2"):
        sample_images(
            GaussianDenoiser(schedule, 0.25), schedule, (5, 3, 4, 4), labels=torch.tensor([0, 1])
        )


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

    class Seen(GaussianDenoiser):
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
    velocity = GaussianDenoiser(schedule, 0.25, "v_prediction")
    options = {"prediction_type": "v", "num_steps": 250}
    images = sample_images(velocity, schedule, (64, 3, 8, 8), sampler=sampler, **options)
    assert math.isclose(float(images.double().div(127.5).sub(1).std()), 0.25, rel_tol=0.05)
    for refused in ("dpm-solver", "heun"):
        with pytest.raises(ValueError, match=f"{refused} divides by alpha"):
            sample_images(velocity, schedule, (1, 3, 8, 8), sampler=refused, **options)


def test_a_broken_network_gives_no_black_images():
    class Broken(GaussianDenoiser):
        def forward(self, x_t, timesteps):
            return x_t * float("nan")

    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="not finite"):
        sample_images(Broken(schedule, 1.0), schedule, (1, 3, 8, 8), num_steps=5)


def test_unknown_sampler_shows_the_choices():
    with pytest.raises(KeyError, match="dpm-solver"):
        sample_images(nn.Identity(), NoiseSchedule.linear(), (1, 3, 4, 4), sampler="euler")


@pytest.mark.parametrize(
    ("capability", "triton", "expected"),
    [((9, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)],
)
def test_many_samples_are_compiled_only_where_that_works(monkeypatch, capability, triton, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: triton or None)
    assert sampling._is_worth_compiling(torch.device("cuda"), 20_000) == expected
    assert not sampling._is_worth_compiling(torch.device("cuda"), 19_999)
    assert not sampling._is_worth_compiling(torch.device("cpu"), 20_000)


# --- rectified flows ---------------------------------------------------------------------------------------------------


FLOW_KINDS = ("flow_prediction", "sample", "epsilon", "v_prediction")


def no_zero(schedule):
    """The flow without its last level, at which nothing is left of the image."""
    return NoiseSchedule(schedule.alphas_cumprod[:-1], is_flow=True)


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_validation_losses_on_a_flow_equal_the_known_optimum(kind):
    schedule, std = NoiseSchedule.flow(1000), 0.25
    timesteps = evaluation_timesteps(1000, 5)
    losses = validation_losses(
        GaussianDenoiser(schedule, std, kind),
        gaussian_images(64, std),
        schedule,
        kind,
        timesteps=timesteps,
    )
    s = schedule.sigma[timesteps].double()
    variance = (1 - s) ** 2 * std**2 + s**2
    # x0 given x_t has this variance; the errors of noise and velocity are multiples of that of x0.
    of_x0 = std**2 * s**2 / variance
    velocity = (s + (1 - s) ** 2 / s) if kind == "v_prediction" else 1 / s
    factor = {"sample": 1, "epsilon": (1 - s) / s}.get(kind, velocity)
    torch.testing.assert_close(losses, of_x0 * factor**2, rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_the_elbo_of_a_flow_is_that_of_the_diffusion_with_its_snr(kind):
    """Latents divided by alpha + sigma are others, and the bound is the same."""
    std, images = 0.25, gaussian_images(32, 0.25)
    flow = NoiseSchedule.flow(200, shift=2.0)
    if kind == "epsilon":
        flow = no_zero(flow)
    diffusion = NoiseSchedule(flow.alphas_cumprod)
    on_flow = elbo(GaussianDenoiser(flow, std, kind), images, flow, kind, timesteps_per_image=10)
    same = "epsilon" if kind == "epsilon" else "sample"
    wanted = elbo(
        GaussianDenoiser(diffusion, std, same), images, diffusion, same, timesteps_per_image=10
    )
    for value, other in zip(on_flow, wanted, strict=True):
        assert math.isclose(value, other, rel_tol=1e-4, abs_tol=1e-6)


def test_the_elbo_of_a_flow_is_its_closed_form():
    schedule, std = NoiseSchedule.flow(1000), 0.25
    bound = elbo(
        GaussianDenoiser(schedule, std, "flow_prediction"), gaussian_images(128, std), schedule, "flow",
        timesteps_per_image=50,
    )  # fmt: skip
    snr = schedule.log_snr.exp()
    diffusion = float((0.5 * (snr[:-1] - snr[1:]) / (snr[1:] + std**-2)).sum()) / math.log(2)
    assert abs(bound.diffusion - diffusion) < max(4 * bound.standard_error, 0.02)
    assert bound.prior == 0


def test_the_elbo_of_one_image_has_no_standard_error():
    schedule = NoiseSchedule.linear(100)
    bound = elbo(GaussianDenoiser(schedule, 0.25), gaussian_images(1, 0.25), schedule)
    assert math.isfinite(bound.bits_per_dim) and math.isnan(bound.standard_error)


@pytest.mark.parametrize("kind", FLOW_KINDS)
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samplers_on_a_flow_recover_the_deviation_of_gaussian_data(sampler, kind, shift):
    schedule = NoiseSchedule.flow(1000, shift=shift)
    network = GaussianDenoiser(schedule, 0.25, kind)
    images = sample_images(
        network, schedule, (64, 3, 8, 8), prediction_type=kind, sampler=sampler, num_steps=100
    )
    deviation = float(images.double().div(127.5).sub(1).std())
    assert math.isclose(deviation, 0.25, rel_tol=0.05), deviation
    # What is predicted as noise is no image at the level of pure noise.
    assert network.calls[0] == (998 if kind == "epsilon" else 999)
    assert len(network.calls) == (99 if sampler == "heun" else 100)


def test_euler_on_a_flow_is_ddim_on_the_diffusion_of_the_same_snr():
    flow = no_zero(NoiseSchedule.flow(101))
    diffusion = NoiseSchedule(flow.alphas_cumprod)
    drawn = [
        sample_images(
            GaussianDenoiser(schedule, 0.2, "sample"), schedule, (8, 3, 8, 8), prediction_type="sample", num_steps=20
        )
        for schedule in (flow, diffusion)
    ]  # fmt: skip
    # Their latents differ by alpha + sigma at the last level, which is 1.01.
    assert (drawn[0].int() - drawn[1].int()).abs().max() <= 2


def test_heun_on_a_flow_is_heun():
    schedule, std = NoiseSchedule.flow(40), 0.2
    network = GaussianDenoiser(schedule, std, "flow_prediction")
    found = sample_images(
        network, schedule, (2, 1, 4, 4), prediction_type="flow", sampler="heun", num_steps=9, seed=5
    )
    latents = [sampling.generator(5, i, "latent") for i in range(2)]
    x = torch.stack([torch.randn(1, 4, 4, generator=latent) for latent in latents])

    def velocity(x, t):
        s = schedule.sigma[t]
        x0 = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2) * x
        return (x - x0.clamp(-1, 1)) / s

    levels = [39, 31, 23, 15, 7]
    for t, later in itertools.pairwise(levels):
        step = schedule.sigma[later] - schedule.sigma[t]
        first = velocity(x, t)
        x = x + step * (first + velocity(x + step * first, later)) / 2
    x = x - schedule.sigma[7] * velocity(x, 7)
    wanted = x.add(1).mul(127.5).round().clamp(0, 255)
    assert (found.float() - wanted).abs().max() <= 1


def test_euler_on_a_flow_has_the_levels_of_diffusers_where_every_timestep_is_visited():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(50)
    theirs.set_timesteps(50)
    ours = sampling._FlowPath(NoiseSchedule.flow(50), "flow_prediction", "euler", 50)
    torch.testing.assert_close(ours.scheduler.sigmas, theirs.sigmas)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver"])
def test_samplers_that_a_flow_does_not_have_are_refused(sampler):
    with pytest.raises(ValueError, match=rf"{sampler}.* flow .*ddim.*heun"):
        sample_images(nn.Identity(), NoiseSchedule.flow(), (1, 3, 4, 4), sampler=sampler)


# --- large batches and low precision ------------------------------------------------------------------------------------


def test_the_solver_that_takes_quantiles_gets_no_larger_batches_than_it_can_take(monkeypatch):
    monkeypatch.setattr(sampling, "_LARGEST_QUANTILE", 3 * 4 * 4 * 2 + 5)
    schedule, sizes = NoiseSchedule.linear(), set()

    class Seen(GaussianDenoiser):
        def forward(self, x_t, timesteps):
            sizes.add(len(x_t))
            return super().forward(x_t, timesteps)

    for sampler, wanted in (("dpm-solver", {2, 1}), ("ddim", {5})):
        sizes.clear()
        sample_images(Seen(schedule, 0.25), schedule, (5, 3, 4, 4), sampler=sampler, num_steps=3)
        assert sizes == wanted


def test_precision_is_that_of_the_network_alone():
    schedule, seen = NoiseSchedule.linear(), []

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x_t, timesteps):
            output = self.layer(x_t)
            seen.append((x_t.dtype, output.dtype))
            return output

    network = Linear()
    drawn = [
        sample_images(network, schedule, (2, 3, 4, 4), num_steps=3, precision=precision)
        for precision in (None, torch.bfloat16)
    ]
    assert seen[:3] == [(torch.float32, torch.float32)] * 3
    assert seen[3:] == [(torch.float32, torch.bfloat16)] * 3
    assert (drawn[0].int() - drawn[1].int()).abs().float().mean() < 3
