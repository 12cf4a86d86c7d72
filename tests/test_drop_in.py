"""Three lines in other people's loops: networks, schedulers and accelerate as they are, against formulas by hand."""

import argparse
import importlib.util
import os
import re
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

import dysigma
from dysigma.gradients import conflicts

BLOCKS = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}


def unet():
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(**BLOCKS, **kinds), {}


def conditional_unet(channels=3):
    model = diffusers.UNet2DConditionModel(
        **BLOCKS,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return model, {"encoder_hidden_states": torch.randn(6, 3, 8)}


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    torch.nn.init.normal_(model.proj_out_2.weight, std=0.1)
    return model, {"class_labels": torch.randint(10, (6,))}


NETWORKS = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional_unet,
    "DiTTransformer2DModel": dit,
}


def draws(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 8, 8, generator=draw), torch.randn(6, 3, 8, 8, generator=draw)


# How training loops of each family make the network's input and timestep, and what SNR that is, from the scheduler's
# own tables: (x_t, timestep for the network, SNR of the samples, SNR of all levels, our timesteps).


def with_alphas_cumprod(scheduler, x0, noise, timesteps):
    bar = scheduler.alphas_cumprod.double()
    snr = bar / (1 - bar)
    return scheduler.add_noise(x0, noise, timesteps), timesteps, snr[timesteps], snr, timesteps


def with_sigmas(scheduler, x0, noise, timesteps):
    """Euler type: x0 + sigma noise, scaled for the network by 1 / sqrt(sigma^2 + 1)."""
    levels = scheduler.sigmas[:-1].flip(0).double()
    sigma = levels[timesteps].float().view(-1, 1, 1, 1)
    x_t = scheduler.add_noise(x0, noise, timesteps) / (sigma**2 + 1) ** 0.5
    return x_t, timesteps, levels[timesteps] ** -2, levels**-2, timesteps


def with_log_ratio(scheduler, x0, noise, timesteps):
    """DPM-Solver keeps lambda = ln(alpha / sigma). Its add_noise, until told to sample, has the levels upside down."""
    alpha, sigma = (
        table[timesteps].view(-1, 1, 1, 1) for table in (scheduler.alpha_t, scheduler.sigma_t)
    )
    snr = (2 * scheduler.lambda_t.double()).exp()
    return alpha * x0 + sigma * noise, timesteps, snr[timesteps], snr, timesteps


def with_flow(scheduler, x0, noise, timesteps):
    index = scheduler.config.num_train_timesteps - 1 - timesteps
    s, levels = scheduler.sigmas[index].double(), scheduler.sigmas.flip(0).double()
    x_t = scheduler.scale_noise(x0, scheduler.timesteps[index], noise)
    return (
        x_t,
        scheduler.timesteps[index],
        ((1 - s) / s) ** 2,
        ((1 - levels) / levels) ** 2,
        timesteps,
    )


FAMILIES = {
    "DDPM": (diffusers.DDPMScheduler(), with_alphas_cumprod),
    "DDIM": (
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        with_alphas_cumprod,
    ),
    "DPMSolver": (
        diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
        with_log_ratio,
    ),
    "Euler": (diffusers.EulerDiscreteScheduler(), with_sigmas),
    "Flow": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), with_flow),
}
CASES = [
    (f, k)
    for f in ("DDPM", "DDIM", "DPMSolver", "Euler")
    for k in ("epsilon", "sample", "v_prediction")
]
CASES += [("Flow", "flow_prediction"), ("Flow", "sample")]
# Weights on the x0 error by SNR, and how many times larger than that error the one of each target is.
ON_X0 = {
    "min-snr": lambda snr: snr.clamp(max=5),
    "const-x0": torch.ones_like,
    "debiased": torch.sqrt,
}
TIMES = {
    "epsilon": lambda snr: snr,
    "sample": torch.ones_like,
    "v_prediction": lambda snr: 1 + snr,
    "flow_prediction": lambda snr: (1 + snr.sqrt()) ** 2,
}


def target_of(kind, x0, noise, snr):
    alpha, sigma = (
        x.float().view(-1, 1, 1, 1) for x in ((snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt())
    )
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


def gradients_of(model, loss):
    parameters = list(model.parameters())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, **options)])


def assert_same_step(one, other):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4 * float(other.abs().max()))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gradients_of_the_network_are_those_of_the_formula(family, kind, network):
    torch.manual_seed(0)
    model, kwargs = NETWORKS[network]()
    model.eval()  # no dropout of classes
    (scheduler, recipe), (x0, noise) = FAMILIES[family], draws()
    x_t, time, snr, levels, timesteps = recipe(
        scheduler, x0, noise, torch.tensor([0, 15, 120, 400, 700, 990])
    )
    output = model(x_t, time, **kwargs).sample
    per_sample = (
        F.mse_loss(output, target_of(kind, x0, noise, snr), reduction="none").flatten(1).mean(1)
    )
    schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
    for name, on_x0 in ON_X0.items():
        of_all = on_x0(levels) / TIMES[kind](levels)
        weights = (on_x0(snr) / TIMES[kind](snr) / of_all.mean()).float()
        wanted = gradients_of(model, (weights * per_sample).mean())
        assert wanted.abs().max() > 0
        weighting = dysigma.make_weighting(name, schedule, kind)
        assert_same_step(gradients_of(model, weighting(per_sample, timesteps)), wanted)
        assert_same_step(gradients_of(model, weighting.at(per_sample, snr.log())), wanted)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_sample_losses_are_those_of_the_loop(family, kind):
    torch.manual_seed(0)
    model, _ = unet()
    (scheduler, recipe), (x0, noise) = FAMILIES[family], draws()
    x_t, time, snr, _, timesteps = recipe(
        scheduler, x0, noise, torch.tensor([0, 15, 120, 400, 700, 990])
    )
    wanted = (
        F.mse_loss(model(x_t, time).sample, target_of(kind, x0, noise, snr), reduction="none")
        .flatten(1)
        .mean(1)
    )
    schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
    # A network of a flow is told 1000 s in place of our number of the timestep.
    network = (lambda x, t: model(x, 1000 * schedule.sigma[t])) if schedule.is_flow else model
    losses = dysigma.sample_losses(network, schedule, x0, noise, timesteps, kind)
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-5)


def test_a_flow_gives_every_target_the_same_step():
    """One network for x0, read as a predictor of each target of x_t = (1 - s) x0 + s noise."""
    schedule = dysigma.NoiseSchedule.flow(50)
    torch.manual_seed(0)
    net, (x0, noise), timesteps = (
        torch.nn.Linear(8, 8).double(),
        draws(),
        torch.tensor([2, 9, 20, 30, 40, 48]),
    )
    s = ((timesteps + 1) / 50).double().view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    guess = net(x_t)
    errors = {"sample": guess - x0, "flow_prediction": (x_t - guess) / s - (noise - x0)}
    steps = []
    for kind, error in errors.items():
        weighting = dysigma.make_weighting("min-snr", schedule, kind, normalize=False)
        steps.append(gradients_of(net, weighting(error.square().flatten(1).mean(1), timesteps)))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-9)


def test_dy_sigma_learns_in_a_loop_what_its_formula_says():
    torch.manual_seed(0)
    scheduler, (model, _) = diffusers.DDPMScheduler(), unet()
    schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
    weighting = dysigma.make_weighting("dy-sigma", schedule, "epsilon", kappa=2.0)
    optimizer = torch.optim.SGD(
        [{"params": model.parameters(), "lr": 0.01}, *weighting.parameter_groups(0.5)]
    )
    snr = scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())
    prior = (snr.clamp(max=5) / snr).float()
    prior = prior / prior.mean()
    basis, s, seen = weighting.basis / (1 + 2.0) ** -0.5, torch.zeros(20), torch.zeros(2)
    for step in range(3):
        (x0, noise), timesteps = draws(step), torch.randint(1000, (6,))
        output = model(scheduler.add_noise(x0, noise, timesteps), timesteps).sample
        losses = F.mse_loss(output, noise, reduction="none").flatten(1).mean(1)
        curve = (basis * s).sum(1)  # the log variance of each timestep, linear between 20 bins
        boosted = prior * torch.exp(-curve)
        wanted = gradients_of(model, ((boosted / boosted.mean())[timesteps] * losses).mean())
        optimizer.zero_grad()
        loss = weighting(losses, timesteps)
        assert_same_step(gradients_of(model, loss), wanted)
        loss.backward()
        optimizer.step()
        z = (prior[timesteps] * losses).detach()
        seen = seen * 0.5 ** (6 / 10_000) + torch.tensor([6.0, float(z.sum())])
        slope = 1 - z / (seen[1] / seen[0]) * torch.exp(-curve[timesteps]) + 2.0 * curve[timesteps]
        # By s itself; the package learns s in units of its prior's width, (1 + kappa)^-1/2, hence the factor 1/3.
        s = s - 0.5 / 3 * (slope[:, None] * basis[timesteps]).mean(0)
        torch.testing.assert_close(
            weighting.log_variances(), (basis * s).sum(1), rtol=1e-4, atol=1e-6
        )
    assert s.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, about diffusers
def test_add_noise_of_a_solver_that_was_never_told_to_sample_is_upside_down():
    """Why with_log_ratio does without it: a note on diffusers, and what NoiseSchedule gives in its place."""
    (x0, noise), timesteps = draws(), torch.tensor([0, 15, 120, 400, 700, 990])
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
    schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
    x_t = schedule.add_noise(x0, noise, timesteps)
    fresh = scheduler.add_noise(x0, noise, timesteps)
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, timesteps), x_t, rtol=1e-3, atol=1e-4)
    if torch.allclose(fresh, x_t, atol=0.1):
        pytest.skip("mended in this diffusers")
    torch.testing.assert_close(
        fresh[0],
        schedule.add_noise(x0[:1], noise[:1], torch.tensor([999]))[0],
        rtol=1e-3,
        atol=1e-3,
    )


# ---------------------------------------------------------------- continuous noise levels


def test_edm_training_as_in_the_paper():
    """Karras et al. 2022: ln sigma normal, D = c_skip x + c_out F, weight (sigma^2 + sd^2) / (sigma sd)^2."""
    torch.manual_seed(0)
    (model, _), (x0, noise), sd = unet(), draws(), 0.5
    sigma = (torch.randn(6) * 1.2 - 1.2).exp()
    x, v = x0 + sigma.view(-1, 1, 1, 1) * noise, (sigma**2 + sd**2).view(-1, 1, 1, 1)
    network = model(x / v**0.5, sigma.log() / 4).sample
    denoised = sd**2 / v * x + sigma.view(-1, 1, 1, 1) * sd / v**0.5 * network
    per_sample = (denoised - x0).square().flatten(1).mean(1)
    wanted = gradients_of(model, ((sigma**2 + sd**2) / (sigma * sd) ** 2 * per_sample).mean())

    # Timesteps at the quantiles of what training draws.
    quantiles = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    schedule = dysigma.NoiseSchedule((-2 * (1.2 * quantiles - 1.2)).sigmoid())
    edm = dysigma.make_weighting("edm", schedule, "sample", normalize=False)
    assert_same_step(gradients_of(model, edm.at(per_sample, -2 * sigma.log())), wanted)
    # On what the network itself must give, that is weight 1.
    target = (x0 - sd**2 / v * x) / (sigma.view(-1, 1, 1, 1) * sd / v**0.5)
    assert_same_step(gradients_of(model, F.mse_loss(network, target)), wanted)
    # So weights have mean 1 over the draws.
    draws_of_training = (torch.randn(100_000) * 1.2 - 1.2).exp()
    learned = dysigma.make_weighting("dy-sigma", schedule, "sample")
    ones = torch.ones(100_000, requires_grad=True)
    learned.at(ones, -2 * draws_of_training.log()).backward()
    assert abs(float(ones.grad.sum()) - 1) < 0.01


def cosmap(log_snr):
    """The weighting of that name in diffusers, on x0: 2 / (pi (1 - 2 s + 2 s^2)) on the velocity, 1 / s^2 of it."""
    s = torch.sigmoid(-log_snr / 2)
    return (2 / torch.pi / (1 - 2 * s + 2 * s**2)).log() - 2 * s.log()


@pytest.mark.parametrize(("scheme", "ours"), [("none", "const-flow"), ("cosmap", cosmap)])
def test_flow_matching_as_in_the_scripts_of_diffusers(scheme, ours):
    torch.manual_seed(0)
    scheduler, (model, kwargs), (x0, noise) = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        dit(),
        draws(),
    )
    model.eval()
    u = compute_density_for_timestep_sampling("logit_normal", 6, logit_mean=0.0, logit_std=1.0)
    index = (u * scheduler.config.num_train_timesteps).long()
    sigmas = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * x0 + sigmas * noise
    output = model(noisy, scheduler.timesteps[index], **kwargs).sample
    theirs = compute_loss_weighting_for_sd3(scheme, sigmas=sigmas)
    wanted = gradients_of(model, (theirs * (output - (noise - x0)) ** 2).flatten(1).mean(1).mean())

    per_sample = F.mse_loss(output, noise - x0, reduction="none").flatten(1).mean(1)
    schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
    weighting = dysigma.make_weighting(ours, schedule, "flow_prediction", normalize=False)
    s = sigmas.flatten()
    assert_same_step(gradients_of(model, weighting.at(per_sample, 2 * ((1 - s) / s).log())), wanted)
    assert_same_step(gradients_of(model, weighting(per_sample, 999 - index)), wanted)


# ---------------------------------------------------------------- accelerate


def forget_accelerate():
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def _fresh_accelerate():
    """Also before: a test of the benchmark may have made an Accelerator in this process."""
    forget_accelerate()
    yield
    forget_accelerate()


LOOPS = [("min-snr", "no"), ("dy-sigma", "no"), ("loss-balance", "no"), ("dy-sigma", "bf16")]
SAMPLES, ACCUMULATED = 48, 2


def samples():
    draw = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, SAMPLES, 3, 8, 8, generator=draw)
    return torch.utils.data.TensorDataset(
        x0, noise, torch.randint(1000, (SAMPLES,), generator=draw)
    )


def parts(name):
    torch.manual_seed(0)
    scheduler, (model, _) = diffusers.DDPMScheduler(), unet()
    weighting = dysigma.make_weighting(name, dysigma.NoiseSchedule.from_diffusers(scheduler))
    groups = [{"params": model.parameters(), "lr": 1e-3}, *weighting.parameter_groups(0.1)]
    return scheduler, model, weighting, torch.optim.AdamW(groups)


def outcome(model, weighting):
    state = [value.flatten().float() for value in weighting.state_dict().values()]
    return torch.cat(
        [torch.cat([p.detach().flatten() for p in model.parameters()]), weighting.weights(), *state]
    )


def loop_with_accelerate(name, precision, batch_size):
    """As in the training scripts of diffusers; the weighting is not prepared, and nothing else changes."""
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATED, mixed_precision=precision, cpu=True
    )
    scheduler, model, weighting, optimizer = parts(name)
    loader = torch.utils.data.DataLoader(samples(), batch_size=batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x0, noise, timesteps in loader:
        with accelerator.accumulate(model):
            output = model(scheduler.add_noise(x0, noise, timesteps), timesteps).sample
            per_sample_mse = F.mse_loss(output.float(), noise, reduction="none").flatten(1).mean(1)
            loss = weighting(per_sample_mse, timesteps)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return outcome(accelerator.unwrap_model(model), weighting)


def loop_by_hand(name, precision, batch_size):
    scheduler, model, weighting, optimizer = parts(name)
    for i, part in enumerate(torch.arange(SAMPLES).split(batch_size)):
        x0, noise, timesteps = samples()[part]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(scheduler.add_noise(x0, noise, timesteps), timesteps).sample
        losses = (output.float() - noise).square().mean((1, 2, 3))
        (weighting(losses, timesteps) / ACCUMULATED).backward()
        if i % ACCUMULATED == ACCUMULATED - 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return outcome(model, weighting)


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize(("name", "precision"), LOOPS)
def test_a_loop_with_accelerate_is_the_loop_by_hand(name, precision):
    torch.testing.assert_close(
        loop_with_accelerate(name, precision, 8),
        loop_by_hand(name, precision, 8),
        rtol=1e-4,
        atol=1e-5,
    )


def run_rank(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    os.environ |= {"ACCELERATE_USE_CPU": "yes", "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    results = [loop_with_accelerate(name, precision, 4) for name, precision in LOOPS[:3]]
    assert Accelerator(cpu=True).num_processes == 2
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    results += [loop_with_accelerate(name, precision, 4) for name, precision in LOOPS[3:]]
    torch.distributed.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_of_accelerate_do_what_one_does_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (name, precision), first, second in zip(LOOPS, *ranks, strict=True):
        assert torch.equal(first, second)
        whole = loop_by_hand(name, precision, 8)
        loose = precision == "bf16"
        torch.testing.assert_close(
            first, whole, rtol=2e-2 if loose else 1e-3, atol=2e-3 if loose else 1e-4
        )


# ---------------------------------------------------------------- the text-to-image LoRA script of diffusers

RECIPES = (Path(__file__).parent.parent / "notebooks/reference/recipes.md").read_text()
DIFF = re.search(r"```diff\n(.*?)```", RECIPES, re.S)[1]


class LowRank(torch.nn.Module):
    """By hand what peft does, where it is not installed."""

    def __init__(self, base):
        super().__init__()
        self.base, self.up = base, torch.nn.Parameter(torch.zeros(base.out_features, 2))
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def text_to_image_lora(sign, folder, name="dy-sigma", options="", stop=None):
    """Four steps in the structure of the script, with the lines of the recipe's diff of one sign: its LoRA layers."""
    torch.manual_seed(0)
    lines = [line for line in DIFF.splitlines() if line[0] in f" {sign}"]
    at = next(i for i, line in enumerate(lines) if line.startswith(" # in the training loop"))
    before, loop = ("\n".join(line[1:] for line in part) for part in (lines[:at], lines[at:]))
    before = before.replace('"min-snr"', f'"{name}"').replace(
        "prediction_type).to", f"prediction_type{options}).to"
    )

    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, **kinds
    ).requires_grad_(False)
    text_encoder = torch.nn.Embedding(20, 8).requires_grad_(False)
    unet = conditional_unet(channels=4)[0].requires_grad_(False)
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig

        unet.add_adapter(
            LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"])
        )
    else:
        for module in [m for m in unet.modules() if type(m).__name__ == "Attention"]:
            for part in ("to_k", "to_q", "to_v"):
                setattr(module, part, LowRank(getattr(module, part)))
    lora_layers = [p for p in unet.parameters() if p.requires_grad]

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
    noise_scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    images, words = torch.rand(16, 3, 16, 16) * 2 - 1, torch.randint(20, (16, 3))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, words), batch_size=4
    )
    names = {
        "dysigma": dysigma,
        "F": F,
        "torch": torch,
        "accelerator": accelerator,
        "noise_scheduler": noise_scheduler,
    }
    names |= {
        "compute_snr": compute_snr,
        "lora_layers": lora_layers,
        "args": argparse.Namespace(learning_rate=0.1),
    }
    names["optimizer_cls"] = torch.optim.AdamW
    exec(before, names)
    unet, optimizer, loader = accelerator.prepare(unet, names["optimizer"], loader)
    if stop == "resume":
        accelerator.load_state(folder)
    for step, (pixel_values, input_ids) in enumerate(loader):
        latents = vae.encode(pixel_values).latent_dist.mode() * vae.config.scaling_factor
        draw = torch.Generator().manual_seed(step)
        noise, timesteps = (
            torch.randn(latents.shape, generator=draw),
            torch.randint(1000, (4,), generator=draw),
        )
        if step < 2 and stop == "resume":
            continue
        with accelerator.accumulate(unet):
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            names |= {"target": noise, "timesteps": timesteps}
            names["model_pred"] = unet(noisy_latents, timesteps, text_encoder(input_ids)).sample
            exec(loop, names)
            accelerator.gather(names["loss"].repeat(4)).mean()  # as the script logs it
            accelerator.backward(names["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(lora_layers, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step == 1 and stop == "save":
            accelerator.save_state(folder)
    weights = names["weighting"].weights() if sign == "+" else torch.zeros(0)
    return torch.cat([*(p.detach().flatten() for p in lora_layers), weights])


@pytest.mark.usefixtures("_fresh_accelerate")
def test_the_lora_script_with_the_lines_of_the_readme(tmp_path, monkeypatch):
    plain = text_to_image_lora("-", tmp_path)
    assert plain.abs().max() > 0.1
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(
        text_to_image_lora("+", tmp_path, "const-eps")[:-1000], plain, **close
    )
    ours = text_to_image_lora("+", tmp_path, "min-snr", ", normalize=False")[:-1000]
    monkeypatch.setattr(
        f"{__name__}.DIFF", f"{DIFF.split(' # in the')[0]} # in the training loop\n{SNR_GAMMA}"
    )
    torch.testing.assert_close(ours, text_to_image_lora("-", tmp_path), **close)
    assert not torch.allclose(ours, plain, atol=1e-2)


# What the script does with --snr_gamma 5: the mean of min(SNR, 5) / SNR times the error of epsilon.
SNR_GAMMA = """\
-snr = compute_snr(noise_scheduler, timesteps)
-each = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
-loss = (each * snr.clamp(max=5) / snr).mean()
"""


@pytest.mark.usefixtures("_fresh_accelerate")
def test_the_lora_script_resumes_with_the_learned_weights(tmp_path):
    whole = text_to_image_lora("+", tmp_path, stop="save")
    assert whole[-1000:].std() > 0
    torch.testing.assert_close(
        text_to_image_lora("+", tmp_path, stop="resume"), whole, rtol=0, atol=0
    )


# ---------------------------------------------------------------- conflicts of conditional models


def test_conflicts_of_a_model_that_reads_a_prompt():
    torch.manual_seed(0)
    (model, _), schedule = conditional_unet(), dysigma.NoiseSchedule.linear(100)
    images, prompts = torch.randn(20, 3, 8, 8), torch.randn(20, 3, 8)
    options = {
        "micro_batches": 6,
        "batch_per_bin": 2,
        "progress": False,
        "groups": lambda name: name.split(".")[0],
    }
    report = conflicts(
        model, images, schedule, 2, model_kwargs={"encoder_hidden_states": prompts}, **options
    )
    assert report.losses.isfinite().all() and report.gramian.diagonal().gt(0).any()
    other = conflicts(
        model,
        images,
        schedule,
        2,
        model_kwargs={"encoder_hidden_states": prompts.flip(0)},
        **options,
    )
    assert not torch.equal(report.losses, other.losses)  # each image keeps its own prompt
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        conflicts(model, images, schedule, 2, **options)


def test_conflicts_of_a_flow():
    torch.manual_seed(0)
    model, schedule = unet()[0], dysigma.NoiseSchedule.flow(100)
    options = {
        "micro_batches": 6,
        "batch_per_bin": 2,
        "progress": False,
        "prediction_type": "flow_prediction",
    }

    class AsTold(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x_t, timesteps):
            return self.model(x_t, 1000 * schedule.sigma[timesteps])

    report = conflicts(AsTold(), torch.randn(20, 3, 8, 8), schedule, 2, **options)
    assert (
        report.settings["prediction_type"] == "flow_prediction" and report.losses.isfinite().all()
    )


# ---------------------------------------------------------------- the text-guided study and the notebook


@pytest.fixture(scope="module")
def study():
    path = Path(__file__).parent.parent / "data/races/text_guided.py"
    spec = importlib.util.spec_from_file_location("text_guided", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_text_guided_study_trains_on_captions_and_guides(study):
    torch.manual_seed(0)
    data, schedule = dysigma.leaves(40, size=8), dysigma.NoiseSchedule.linear()
    texts = study.captions(data)
    assert texts[0] == "" and len(texts) == 31
    model = study.TextToImage(texts, 8, 12)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    # The caption of a class and template, as the training loop numbers it.
    assert [texts[1 + label * 3] for label in (0, 9)] == ["discs in ember", "shards in frost"]
    x, timesteps, labels = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), torch.tensor([1, 28])
    told, free = model(x, timesteps, labels), model(x, timesteps, torch.zeros(2, dtype=torch.int64))
    assert not torch.allclose(told, free, atol=1e-4)
    for factor, wanted in ((0.0, free), (1.0, told), (3.0, 3 * told - 2 * free)):
        torch.testing.assert_close(
            study.Guided(model, factor)(x, timesteps, labels), wanted, rtol=1e-4, atol=1e-5
        )
    new = study.of_classes(data, study.HELD_OUT, 6)
    assert new.labels.tolist() == [8, 9] * 3
    args = argparse.Namespace(
        lr=1e-3, ema_half_life=1000, batch_size=4, warmup_images=8, test_new=new
    )
    before = [p.clone() for p in model.parameters()]
    judged, curve = study.fit(
        model, new, schedule, "dy-sigma", 1, args, 8, "adapt", checkpoints=(4, 8)
    )
    assert len(curve) == 2 and len(curve[0]) == 20
    assert study.judge_losses(judged, new, schedule).tolist() == curve[-1]
    assert not all(map(torch.equal, before, model.parameters()))


def test_the_job_for_a_gpu_is_a_command_of_the_study(study, monkeypatch):
    jobs = (Path(__file__).parent.parent / "data/gpu-backlog.md").read_text()
    (options,) = re.findall(r"`python data/races/text_guided.py ([^`]*)`", jobs)
    monkeypatch.setattr("sys.argv", ["text_guided.py", *options.split()])
    args = study.parse()
    assert args.data == "cifar10" and args.width % 4 == 0 and args.batch_size <= args.train_new


def test_colours_tell_the_palettes_apart(study):
    data = dysigma.leaves(400, size=8)
    means = torch.stack(
        [study.histograms(data.images[data.labels == k]).mean(0) for k in range(10)]
    ).sqrt()
    nearest = torch.cdist(
        study.histograms(dysigma.leaves(200, size=8, split="test").images).sqrt(), means
    ).argmin(1)
    assert (nearest // 2 == torch.arange(200) % 10 // 2).float().mean() > 0.95
