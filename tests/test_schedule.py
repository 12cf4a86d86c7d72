"""Schedules against diffusers, identities of the forward process, and the low-precision bug they rule out."""

import math
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from dysigma.checks import check_timesteps
from dysigma.randomness import generator
from dysigma.schedule import SCHEDULES, NoiseSchedule, canonical_prediction_type, make_schedule
from dysigma.weightings import PREDEFINED, WEIGHTINGS, make_weighting

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, about diffusers
PRESERVING = [name for name in SCHEDULES if name != "flow"]

DIFFUSERS_NAMES = {
    "linear": "linear",
    "scaled-linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}


@pytest.mark.parametrize("name", PRESERVING)
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


@pytest.mark.parametrize("name", PRESERVING)
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


@pytest.mark.parametrize("name", PRESERVING)
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


@pytest.mark.parametrize("name", PRESERVING)
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
            scheduler = getattr(diffusers, name)()
        except (AttributeError, TypeError):  # not exported, or of arguments without defaults
            continue
        if hasattr(scheduler, "config"):  # and no stand-in for a class that needs another package
            yield name, scheduler


def test_every_scheduler_of_diffusers_gives_its_training_levels_or_is_refused_with_a_reason():
    covered, refused = set(), set()
    for name, scheduler in all_schedulers():
        try:
            schedule = NoiseSchedule.from_diffusers(scheduler)
        except ValueError as error:
            assert re.search(f"{name} .*weighting.at", str(error))
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


def test_the_velocity_is_refused_off_the_flow():
    x0, timesteps, schedule = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), LINEAR
    for call in (schedule.target, schedule.to_x0):
        with pytest.raises(ValueError, match="flow_prediction"):
            call(x0, x0, timesteps, "flow")
    with pytest.raises(ValueError, match="flow_prediction"):
        make_weighting("min-snr", schedule, "flow")
    with pytest.raises(ValueError, match="to_x0"):
        schedule.to_velocity(x0, x0, timesteps, "sample")


# ---------------------------------------------------------------- every class of diffusers, to and from

LINEAR = NoiseSchedule.linear(100)
HOLD_BETAS = [
    "CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel",
    "DEISMultistep", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
    "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "RePaint", "SASolver", "TCD", "UniPCMultistep",
]  # fmt: skip
HOLD_FLOWS = [
    "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete", "FlowMatchLCM", "SASolver", "UniPCMultistep",
]  # fmt: skip


def scheduler_class(name):
    found = getattr(diffusers, f"{name}Scheduler", None)
    return found or pytest.skip(f"this diffusers has no {name}Scheduler")


def one_more_schedule(name):
    """Schedules of our own names, those that only some classes of diffusers know, and ones edited by hand."""
    if name in SCHEDULES:
        return make_schedule(name, 100)
    if name == "laplace":
        return NoiseSchedule.from_diffusers(diffusers.DDPMScheduler(1000, beta_schedule="laplace"))
    if name == "exp":
        return NoiseSchedule.from_diffusers(
            diffusers.HeunDiscreteScheduler(100, beta_schedule="exp")
        )
    if name == "zero terminal":
        return NoiseSchedule.linear(100, zero_terminal_snr=True)
    if name == "trained betas":
        betas = torch.linspace(0.001, 0.2, 100).tolist()
        return NoiseSchedule.from_diffusers(diffusers.DDIMScheduler(100, trained_betas=betas))
    return NoiseSchedule.from_diffusers(diffusers.CogVideoXDDIMScheduler(100, snr_shift_scale=2.0))


@pytest.mark.parametrize("name", HOLD_BETAS)
@pytest.mark.parametrize(
    "made", [*PRESERVING, "laplace", "exp", "zero terminal", "trained betas", "shifted SNR"]
)
def test_every_schedule_goes_to_every_class_and_comes_back(made, name):
    schedule = one_more_schedule(made)
    scheduler = schedule.to_diffusers(scheduler_class(name))
    assert type(scheduler) is scheduler_class(name)
    back = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(back.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-3, atol=1e-7)
    assert back.has_zero_terminal_snr == schedule.has_zero_terminal_snr
    if hasattr(scheduler, "sigmas"):
        assert scheduler.sigmas.isfinite().all()


def network_of(scheduler, schedule, kind):
    """What an optimal network of x0 = 1 answers a scheduler at timestep t, at the noise level that t stands for."""

    def answer(x, t):
        t = torch.as_tensor(t).round().long().clamp(0, schedule.num_timesteps - 1).expand(len(x))
        x0 = torch.ones_like(x)
        alpha, sigma = schedule.alpha[t].view(-1, 1), schedule.sigma[t].view(-1, 1)
        noise = (x - alpha * x0) / sigma
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[kind]

    return answer


SAMPLE_WITH = [
    "CogVideoXDDIM", "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
    "KDPM2Discrete", "LMSDiscrete", "TCD", "UniPCMultistep",
]  # fmt: skip


@pytest.mark.parametrize("made", ["sigmoid", "laplace", "zero terminal"])
@pytest.mark.parametrize("name", SAMPLE_WITH)
def test_every_schedule_samples_to_the_end_with_every_class(name, made):
    """With the optimal network of the one image 1, whatever the noise, sampling must end near 1."""
    schedule = one_more_schedule(made)
    scheduler = schedule.to_diffusers(scheduler_class(name), "v_prediction")
    scheduler.set_timesteps(20)
    network = network_of(scheduler, schedule, "v_prediction")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    left = 2 * float(schedule.sigma[0])  # some end at the cleanest level, not at none
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=0.2 + left)


def test_classes_that_cannot_hold_the_levels_are_refused():
    for name in ("EDMEuler", "FlowMatchEulerDiscrete", "IPNDM", "UnCLIP", "CMStochasticIterative"):
        with pytest.raises(ValueError, match="cannot hold the levels"):
            LINEAR.to_diffusers(scheduler_class(name))
    for name in ("DDPM", "EulerDiscrete", "EDMEuler"):
        with pytest.raises(ValueError, match="holds no flow"):
            NoiseSchedule.flow(100).to_diffusers(scheduler_class(name))
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr.*cannot hold"):
        LINEAR.to_diffusers(diffusers.DDIMScheduler, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="epsilon alone"):
        LINEAR.to_diffusers(diffusers.RePaintScheduler, "v_prediction")
    with pytest.raises(TypeError, match="spacing"):
        LINEAR.to_diffusers(diffusers.DDIMScheduler, spacing="trailing")
    for mistaken in (diffusers.DDIMScheduler(), "DDIMScheduler"):
        with pytest.raises(TypeError, match="class"):
            LINEAR.to_diffusers(mistaken)


def test_a_subclass_is_treated_as_its_base():
    class Mine(diffusers.EulerDiscreteScheduler):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    schedule = NoiseSchedule.sigmoid(100, zero_terminal_snr=True)
    scheduler = schedule.to_diffusers(Mine, "v_prediction")
    assert scheduler.sigmas.isfinite().all()
    assert scheduler.config.prediction_type == "v_prediction"
    assert NoiseSchedule.from_diffusers(scheduler).has_zero_terminal_snr


# ---------------------------------------------------------------- the table is the truth


def rescaled_in_place(scheduler):
    """As trainers of the kohya family do it; the config stays."""
    root = scheduler.alphas_cumprod.sqrt()
    bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas = torch.cat([bar[:1], bar[1:] / bar[:-1]])
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = 1 - alphas, alphas, bar
    return scheduler


def set_last(scheduler, value):
    scheduler.alphas_cumprod[-1] = value
    return scheduler


def shift_in_place(scheduler):
    bar = scheduler.alphas_cumprod
    scheduler.alphas_cumprod = bar / (3 - 2 * bar)
    return scheduler


EDITED = {
    "rescaled linear": lambda: rescaled_in_place(diffusers.DDPMScheduler()),
    "rescaled cosine": lambda: rescaled_in_place(
        diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    ),
    "rescaled betas": lambda: rescaled_in_place(
        diffusers.DDPMScheduler(50, trained_betas=[0.02 + 0.001 * i for i in range(50)])
    ),
    "a last level near 0": lambda: set_last(diffusers.DDPMScheduler(), 4.897e-8),
    "a cosine ending at 0": lambda: set_last(
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), 0.0
    ),
    "a shifted SNR": lambda: shift_in_place(diffusers.DPMSolverMultistepScheduler()),
    "zero SNR by flag, undone by hand": lambda: set_last(
        diffusers.DDPMScheduler(rescale_betas_zero_snr=True), 1e-9
    ),
}


@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize("back_as", ["DDPM", "DDIM", "EulerDiscrete", "HeunDiscrete"])
def test_a_table_edited_in_place_is_read_and_given_back(name, back_as):
    scheduler = EDITED[name]()
    schedule = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(
        schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=0, atol=0
    )
    given = schedule.to_diffusers(scheduler_class(back_as))
    back = NoiseSchedule.from_diffusers(given)
    torch.testing.assert_close(back.log_snr, schedule.log_snr, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled-linear", "sigmoid", "cosine"])
def test_ten_thousand_timesteps_whose_products_underflow(name, zero_terminal_snr):
    ends = {} if name == "cosine" else {"beta_start": 1e-4, "beta_end": 0.04}
    schedule = make_schedule(name, 10_000, zero_terminal_snr=zero_terminal_snr, **ends)
    assert (schedule.log_snr.diff() < 0).all()
    for back_as in ("DDPM", "DDIM"):
        scheduler = schedule.to_diffusers(scheduler_class(back_as))
        if name in ("linear", "sigmoid") and not zero_terminal_snr:
            assert scheduler.alphas_cumprod[-1] == 0  # lost in the float32 table, not in its betas
        back = NoiseSchedule.from_diffusers(scheduler)
        assert back.has_zero_terminal_snr == zero_terminal_snr
        inner = slice(10, -1)
        torch.testing.assert_close(
            back.log_snr[inner], schedule.log_snr[inner], rtol=1e-3, atol=1e-2
        )


# Configurations of published pipelines: class, arguments, first and last sigma / alpha of training.
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PUBLISHED = {
    "SD 1.5": ("PNDM", {**STABLE_DIFFUSION, "skip_prk_steps": True, "steps_offset": 1}),
    "SD 2.1": ("DDIM", {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}),
    "SDXL": ("EulerDiscrete", {**STABLE_DIFFUSION, "timestep_spacing": "leading"}),
    "SDXL Turbo": ("EulerAncestralDiscrete", {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}),
    "LCM": ("LCM", {**STABLE_DIFFUSION, "original_inference_steps": 50}),
    "TCD": ("TCD", STABLE_DIFFUSION),
    "KDPM2": ("KDPM2Discrete", STABLE_DIFFUSION),
    "DEIS": ("DEISMultistep", STABLE_DIFFUSION),
    "UniPC": ("UniPCMultistep", STABLE_DIFFUSION),
    "Heun": ("HeunDiscrete", STABLE_DIFFUSION),
    "SASolver": ("SASolver", STABLE_DIFFUSION),
    "Karras sigmas": ("DPMSolverMultistep", {**STABLE_DIFFUSION, "use_karras_sigmas": True}),
    "PixArt": ("DPMSolverMultistep", {"beta_schedule": "linear"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_before_and_after_sampling(name):
    class_name, options = PUBLISHED[name]
    scheduler = scheduler_class(class_name)(**options)
    ours = NoiseSchedule.scaled_linear() if "beta_end" in options else NoiseSchedule.linear()
    for _ in range(2):
        schedule = NoiseSchedule.from_diffusers(scheduler)
        torch.testing.assert_close(schedule.log_snr, ours.log_snr, rtol=1e-3, atol=1e-3)
        scheduler.set_timesteps(8)


@pytest.mark.parametrize(
    ("name", "options", "shift"),
    [
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, 3.0),  # SD3
        ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_dynamic_shifting": True}, 1.0),  # Flux
        (
            "FlowMatchEulerDiscrete",
            {"shift_terminal": 0.1, "use_dynamic_shifting": True},
            1.0,
        ),  # LTX
        ("UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 5.0}, 5.0),  # Wan
        ("DPMSolverMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0}, 3.0),  # SANA
    ],
)
def test_published_flows_are_read_before_and_after_sampling(name, options, shift):
    scheduler = (
        scheduler_class(name)(prediction_type="flow_prediction", **options)
        if ("use_flow_sigmas" in options)
        else scheduler_class(name)(**options)
    )
    for _ in range(2):
        schedule = NoiseSchedule.from_diffusers(scheduler)
        assert schedule.is_flow and schedule.shift == shift
        torch.testing.assert_close(schedule.sigma, NoiseSchedule.flow(shift=shift).sigma)
        dynamic = {"mu": 1.0} if options.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(8, **dynamic)


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.tolist, torch.Tensor.double])
def test_a_table_of_another_type_is_the_table(kind):
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    wanted = NoiseSchedule.from_diffusers(scheduler).alphas_cumprod
    scheduler.alphas_cumprod = kind(scheduler.alphas_cumprod)
    scheduler.betas = kind(scheduler.betas)
    assert torch.equal(NoiseSchedule.from_diffusers(scheduler).alphas_cumprod, wanted)


def test_levels_of_a_flow_edited_in_place_are_read():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(100)
    scheduler.sigmas = scheduler.sigmas**2
    schedule = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(schedule.sigma, scheduler.sigmas.flip(0), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="no shift of s"):
        schedule.to_diffusers()


CONTINUOUS = {
    "SVD": ("EulerDiscrete", {"timestep_type": "continuous", "sigma_max": 700.0}),
    "Playground": ("EDMDPMSolverMultistep", {}),
    "EDM": ("EDMEuler", {}),
    "VE": ("ScoreSdeVe", {}),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuum_of_levels_is_refused_with_the_way(name):
    class_name, options = CONTINUOUS[name]
    with pytest.raises(ValueError, match=r"levels.*weighting\.at"):
        NoiseSchedule.from_diffusers(scheduler_class(class_name)(**options))


@pytest.mark.parametrize(
    ("mistaken", "word"),
    [
        (diffusers.DDPMScheduler, "class"),
        (diffusers.DDPMScheduler().config, "config"),
        ({"beta_schedule": "linear"}, "config"),
        ("some/model", "subfolder"),
        (None, "NoneType"),
        (torch.linspace(0.9, 0.1, 10), "Tensor"),
        (torch.nn.Linear(1, 1), "Linear"),
        (type("Pipeline", (), {"scheduler": diffusers.DDPMScheduler()})(), "scheduler"),
    ],
)
def test_what_is_no_scheduler_is_told_so(mistaken, word):
    with pytest.raises(TypeError, match=word) as told:
        NoiseSchedule.from_diffusers(mistaken)
    assert "EDM" not in str(told.value) and "\n" not in str(told.value)


# ---------------------------------------------------------------- flows

KINDS = ("sample", "epsilon", "v_prediction", "flow_prediction")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", HOLD_FLOWS)
def test_a_flow_goes_to_flow_schedulers_and_comes_back(name, shift):
    schedule = make_schedule("flow", 100, shift=shift)
    scheduler = schedule.to_diffusers(scheduler_class(name))
    back = NoiseSchedule.from_diffusers(scheduler)
    assert back.is_flow and back.shift == shift
    torch.testing.assert_close(back.log_snr, schedule.log_snr)


def test_a_flow_has_the_levels_of_diffusers_for_every_shift():
    for shift in (0.5, 1.0, 3.0):
        schedule = make_schedule("flow", 50, shift=shift)
        theirs = schedule.to_diffusers()
        assert isinstance(theirs, diffusers.FlowMatchEulerDiscreteScheduler)
        torch.testing.assert_close(schedule.sigma, theirs.sigmas.flip(0), rtol=1e-5, atol=1e-7)
        assert torch.equal(schedule.timestep_of(theirs.timesteps / 50), torch.arange(49, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_target_of_a_flow_gives_x0_and_velocity(kind):
    schedule = make_schedule("flow", 40, shift=2.0)
    x0, noise = torch.randn(2, 39, 2, 3, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(39)  # the last one is noise alone
    x_t = schedule.add_noise(x0, noise, timesteps)
    target = schedule.target(x0, noise, timesteps, kind)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(schedule.to_x0(target, x_t, timesteps, kind), x0, **close)
    velocity = schedule.to_velocity(target, x_t, timesteps, kind)
    torch.testing.assert_close(velocity, noise - x0, **close)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_networks_of_all_targets_on_a_flow_have_one_objective(kind):
    """The gradient of min-snr by a network of any target is that of min(SNR, 5) |x0 error|^2, by hand."""
    schedule = make_schedule("flow", 30, shift=2.0)
    x0, noise = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).double()
    timesteps = torch.arange(30)
    s = schedule.sigma.double()[:, None]
    a = 1 - s
    x_t = a * x0 + s * noise
    net = torch.nn.Linear(5, 5).double()
    guess = net(x_t)
    output = {
        "sample": guess,
        "flow_prediction": (x_t - guess) / s,
        "v_prediction": (a * x_t - (a**2 + s**2) * guess) / s,
    }[kind]
    per_sample = (output - schedule.target(x0, noise, timesteps, kind)).square().mean(1)
    weighting = make_weighting("min-snr", schedule, kind, normalize=False)
    snr = (a / s) ** 2
    wanted = (snr.clamp(max=5) * (guess - x0).square()).mean()
    (expected,) = torch.autograd.grad(wanted, net.weight, retain_graph=True)
    (found,) = torch.autograd.grad(weighting(per_sample, timesteps), net.weight, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    inner = timesteps[:-1]
    at = weighting.at(per_sample[:-1], schedule.log_snr[:-1])
    torch.testing.assert_close(at, weighting(per_sample[:-1], inner), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_epsilon_on_a_flow_has_no_weight_where_there_is_no_signal(name, shift):
    """The last level of a flow is pure noise; everywhere else a noise network has the weights it should."""
    schedule = make_schedule("flow", 40, shift=shift)
    weighting = make_weighting(name, schedule, "epsilon")
    weights = weighting.weights()
    assert weights.isfinite().all() and (weights[:-1] >= 0).all()
    torch.testing.assert_close(weights.double().mean(), torch.tensor(1.0).double())
    if name in PREDEFINED:
        assert weights[-1] == 0
        on_x0 = make_weighting(name, schedule, "sample").weights()[:-1].double()
        ratio = weights[:-1].double() * schedule.log_snr[:-1].exp() / on_x0
        inside = on_x0 > 0
        torch.testing.assert_close(ratio[inside] / ratio[0], torch.ones_like(ratio[inside]))
    # A step learns, also at that level, and nothing becomes infinite.
    losses = torch.rand(40, requires_grad=True)
    loss = weighting(losses, torch.arange(40))
    loss.backward()
    assert losses.grad.isfinite().all() and weighting.weights().isfinite().all()


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_a_flow_matching_scheduler_is_not_told_another_target(kind):
    schedule = make_schedule("flow", 10)
    with pytest.raises(ValueError, match="to_velocity"):
        schedule.to_diffusers(prediction_type=kind)
    if kind != "v_prediction":
        scheduler = schedule.to_diffusers(diffusers.DPMSolverMultistepScheduler, kind)
        assert scheduler.config.prediction_type == kind and scheduler.config.use_flow_sigmas


def test_bad_flows_and_parameters_are_refused():
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift"):
            make_schedule("flow", shift=shift)
    with pytest.raises(ValueError, match="shift"):
        make_schedule("cosine", shift=2.0)
    assert make_schedule("flow", 10, zero_terminal_snr=True).is_flow


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
@pytest.mark.parametrize("name", PRESERVING)
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
