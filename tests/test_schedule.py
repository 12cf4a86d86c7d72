"""Schedules against diffusers, identities of the forward process, and the low-precision bug they rule out."""

import math
import re

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from dysigma.checks import check_timesteps
from dysigma.randomness import generator
from dysigma.schedule import SCHEDULES, NoiseSchedule, canonical_prediction_type, make_schedule
from dysigma.weightings import make_weighting

DIFFUSERS_NAMES = {
    "linear": "linear",
    "scaled-linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_equal_those_of_diffusers(name):
    schedule = make_schedule(name)
    options = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled-linear" else {}
    theirs = diffusers.DDPMScheduler(1000, beta_schedule=DIFFUSERS_NAMES[name], **options)
    torch.testing.assert_close(
        schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-9
    )
    timesteps = torch.tensor([0, 1, 250, 500, 998])
    torch.testing.assert_close(
        schedule.log_snr[timesteps].exp(),
        compute_snr(theirs, timesteps).double(),
        rtol=1e-3,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_ends_above_zero_unless_asked_and_is_no_part_of_a_checkpoint(name):
    schedule = SCHEDULES[name](50)
    assert schedule.alphas_cumprod[-1] > 0 and not schedule.state_dict()


def test_log_snr_matches_a_hand_computation():
    schedule = NoiseSchedule(torch.tensor([0.8, 0.5, 0.1]))
    torch.testing.assert_close(
        schedule.log_snr,
        torch.tensor([math.log(4), 0.0, -math.log(9)], dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_equals_diffusers(name):
    schedule = make_schedule(name)
    theirs = schedule.to_diffusers()
    x0, noise = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(0, 1000, 125)
    torch.testing.assert_close(
        schedule.add_noise(x0, noise, timesteps),
        theirs.add_noise(x0, noise, timesteps),
        rtol=1e-3,
        atol=1e-5,
    )
    velocity = theirs.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(
        schedule.target(x0, noise, timesteps, "v"), velocity, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_prediction_type_recovers_x0(name, zero_terminal_snr):
    schedule = make_schedule(name, 100, zero_terminal_snr=zero_terminal_snr)
    x0, noise = torch.randn(2, 100, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    timesteps = torch.arange(100)
    x_t = schedule.add_noise(x0, noise, timesteps)
    for kind in ("sample", "v_prediction"):
        torch.testing.assert_close(
            schedule.to_x0(schedule.target(x0, noise, timesteps, kind), x_t, timesteps, kind),
            x0,
            rtol=1e-4,
            atol=1e-5,
        )
    keep = schedule.alpha > 0.01
    back = schedule.to_x0(noise[keep], x_t[keep], timesteps[keep], "epsilon")
    torch.testing.assert_close(back, x0[keep], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_ends_at_exactly_zero_and_keeps_the_start(name):
    plain, rescaled = make_schedule(name), make_schedule(name, zero_terminal_snr=True)
    assert rescaled.log_snr[-1] == -torch.inf and torch.isfinite(rescaled.log_snr[:-1]).all()
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])
    assert (rescaled.log_snr.diff() < 0).all()


def test_zero_terminal_snr_agrees_with_diffusers():
    theirs = diffusers.DDPMScheduler(1000, rescale_betas_zero_snr=True)
    ours = NoiseSchedule.linear(zero_terminal_snr=True)
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-8
    )
    assert NoiseSchedule.from_diffusers(theirs).log_snr[-1] == -torch.inf


@pytest.mark.parametrize(
    "scheduler_class",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_round_trip_through_diffusers(scheduler_class, zero_terminal_snr):
    schedule = NoiseSchedule.linear(200, zero_terminal_snr=zero_terminal_snr)
    back = NoiseSchedule.from_diffusers(schedule.to_diffusers(getattr(diffusers, scheduler_class)))
    torch.testing.assert_close(back.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4, atol=1e-7)


def all_schedulers():
    """Every scheduler of diffusers that can be made without arguments."""
    names = {name for names in diffusers.schedulers._import_structure.values() for name in names}
    for name in sorted(name for name in names if name.endswith("Scheduler")):
        try:
            yield name, getattr(diffusers, name)()
        except (AttributeError, TypeError):  # not exported, or of arguments without defaults
            continue


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, about diffusers
def test_every_scheduler_of_diffusers_gives_its_training_levels_or_is_refused_with_a_reason():
    covered, refused = set(), set()
    for name, scheduler in all_schedulers():
        try:
            schedule = NoiseSchedule.from_diffusers(scheduler)
        except ValueError as error:
            assert re.search(f"{name} has no alphas_cumprod.*weighting.at", str(error))
            refused.add(name)
            continue
        covered.add(name)
        if schedule.is_flow:
            sigmas = scheduler.sigmas[:1000].flip(0)
            torch.testing.assert_close(schedule.sigma, sigmas.float(), rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double())
    assert {
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "CogVideoXDDIMScheduler",
        "FlowMatchHeunDiscreteScheduler",
    } < covered
    assert {"EDMEulerScheduler", "ScoreSdeVeScheduler", "DDPMWuerstchenScheduler"} < refused
    assert len(covered) > 20


FLOWS = ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "FlowMapEulerDiscrete"]


@pytest.mark.parametrize("name", [name for name in FLOWS if hasattr(diffusers, f"{name}Scheduler")])
def test_the_levels_of_a_flow_do_not_depend_on_how_it_last_sampled(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")(200, shift=3.0)
    sigmas = scheduler.sigmas[:200].flip(0).float()
    scheduler.set_timesteps(7)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(schedule.sigma, sigmas, rtol=1e-4, atol=1e-6)
    assert schedule.log_snr[-1] == -torch.inf
    s = sigmas[:-1].double()
    torch.testing.assert_close(schedule.log_snr[:-1], 2 * ((1 - s) / s).log(), rtol=1e-4, atol=1e-4)


def test_flow_sigmas_of_a_sampler_and_dynamic_shifts():
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        schedule = NoiseSchedule.from_diffusers(getattr(diffusers, name)(100, **config))
        torch.testing.assert_close(schedule.sigma, NoiseSchedule.flow(100, shift=3.0).sigma)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(100, shift=3.0, use_dynamic_shifting=True)
    torch.testing.assert_close(NoiseSchedule.from_diffusers(dynamic).sigma, dynamic.sigmas.flip(0))
    with pytest.raises(ValueError, match="no plain flow matching"):
        NoiseSchedule.from_diffusers(
            diffusers.FlowMatchEulerDiscreteScheduler(100, invert_sigmas=True)
        )


def test_a_flow_noises_and_predicts_as_in_diffusers():
    scheduler, schedule = (
        diffusers.FlowMatchEulerDiscreteScheduler(100, shift=2.0),
        NoiseSchedule.flow(100, shift=2.0),
    )
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 1, 30, 60, 99])  # theirs, from the noisy end
    timesteps = 99 - index
    x_t = schedule.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(
        x_t, scheduler.scale_noise(x0, scheduler.timesteps[index], noise), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        100 * schedule.sigma[timesteps], scheduler.timesteps[index], rtol=1e-4, atol=1e-4
    )
    for kind, target in {"flow": noise - x0, "sample": x0, "epsilon": noise}.items():
        torch.testing.assert_close(schedule.target(x0, noise, timesteps, kind), target)
        back = schedule.to_x0(target, x_t, timesteps, kind)
        keep = slice(1, None) if kind == "epsilon" else slice(None)  # x_T is the noise alone
        torch.testing.assert_close(back[keep], x0[keep], rtol=1e-3, atol=1e-3)


def test_a_target_of_the_other_path_is_refused():
    x0, timesteps = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for schedule, kind in ((NoiseSchedule.linear(10), "flow"), (NoiseSchedule.flow(10), "v")):
        for call in (schedule.target, schedule.to_x0):
            with pytest.raises(
                ValueError, match=r"has no (flow|v)_prediction: noise - x0 is flow_prediction"
            ):
                call(x0, x0, timesteps, kind)
        with pytest.raises(ValueError, match="has no"):
            make_weighting("min-snr", schedule, kind)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        NoiseSchedule.flow(10).to_diffusers()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedulers_of_euler_type_have_the_same_table_and_scale_their_input():
    for name in (
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "LMSDiscrete",
        "KDPM2Discrete",
    ):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        schedule = NoiseSchedule.from_diffusers(scheduler)
        x0, noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        timesteps = torch.tensor([0, 200, 600, 999])
        scaled = scheduler.add_noise(x0, noise, timesteps) * schedule.alpha[timesteps].view(
            -1, 1, 1, 1
        )
        torch.testing.assert_close(
            scaled, schedule.add_noise(x0, noise, timesteps), rtol=1e-3, atol=1e-4
        )


def test_a_table_that_betas_do_not_make_comes_back():
    theirs = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    schedule = NoiseSchedule.from_diffusers(theirs)
    torch.testing.assert_close(
        schedule.to_diffusers().alphas_cumprod.double(),
        theirs.alphas_cumprod.double(),
        rtol=1e-3,
        atol=1e-6,
    )
    assert (
        schedule.config is None and NoiseSchedule.from_diffusers(diffusers.DDPMScheduler()).config
    )
    betas = diffusers.DDPMScheduler(50, trained_betas=[0.05] * 50, rescale_betas_zero_snr=True)
    torch.testing.assert_close(
        NoiseSchedule.from_diffusers(betas).alphas_cumprod, betas.alphas_cumprod.double()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_timestep_gets_zero_noise_in_low_precision(name, dtype):
    schedule = make_schedule(name).to(dtype)
    x0 = torch.zeros(1000, 1, dtype=dtype)
    noise = torch.ones(1000, 1, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        sigma = schedule.add_noise(x0, noise, torch.arange(1000)).flatten()
    assert sigma.dtype == torch.float32
    assert (sigma > 0).all() and len(sigma.unique()) == 1000
    # The control: the same call in diffusers, with images in the low precision, loses the noise of some timesteps.
    theirs = schedule.to_diffusers().add_noise(x0, noise, torch.arange(1000)).flatten()
    if dtype == torch.bfloat16:
        assert (theirs == 0).any()


def test_moving_a_module_never_changes_the_precision_of_its_schedule():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), NoiseSchedule.cosine(50)).half()
    assert module[0].weight.dtype == torch.float16 and module[1].log_snr.dtype == torch.float64
    assert module.to("meta")[1].log_snr.device.type == "meta"


@pytest.mark.parametrize(
    "table",
    [
        [0.9, 0.95],
        [1.0, 0.5],
        [0.5, -0.1],
        [0.9, 0.0, 0.0],
        [[0.9, 0.5]],
        [0.5],
        [0.9, float("nan")],
    ],
)
def test_tables_that_are_no_schedule_are_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod must"):
        NoiseSchedule(torch.tensor(table))


@pytest.mark.parametrize(
    "timesteps",
    [
        torch.tensor([0.5]),
        torch.tensor([[1]]),
        torch.tensor([100]),
        torch.tensor([-1]),
        torch.tensor([1, 2]),
    ],
)
def test_bad_timesteps_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must"):
        check_timesteps(timesteps, 100, batch=1)


def test_unknown_names_show_the_choices():
    with pytest.raises(KeyError, match="cosine"):
        make_schedule("cosin")
    with pytest.raises(ValueError, match="v_prediction"):
        canonical_prediction_type("velocity")


def test_draws_depend_on_every_argument_and_on_nothing_else():
    def draw(*args):
        return torch.rand(4, generator=generator(*args))

    torch.testing.assert_close(draw(3, 7, "noise"), draw(3, 7, "noise"), rtol=0, atol=0)
    for other in [(4, 7, "noise"), (3, 8, "noise"), (3, 7, "timesteps")]:
        assert not torch.equal(draw(3, 7, "noise"), draw(*other))
