# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     cell_metadata_filter: tags,-all
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Your own loop
#
# > **Claim.** Three lines put any weighting into a training loop that you already have. A wrong word in them raises no
# > error. One gradient, compared with the formula, finds it in a minute.
#
# **You will be able to**
#
# - add a weighting to a diffusers loop, and prove that it is the formula that you meant;
# - do the same with accelerate, several processes and gradient accumulation;
# - train flow matching and EDM with the same weightings;
# - write a weighting of your own, use your own images, and measure conflicts in your own network.
#
# **You need** the weightings on one scale ([03](03_snr_weightings.ipynb)), and Dy-Sigma ([06](06_dy_sigma_derived.ipynb))
# as an example of a weighting that learns.
#
# **Time** reading 30 min · running about 90 s (short run 20 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `NoiseSchedule.from_diffusers`, `NoiseSchedule.flow`, `weighting.at`,
# `dysigma.testing.examine_weighting`, `dysigma.testing.check_weighting`, `dysigma.load_data`, `dysigma.conflicts`.

# %%
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

import dysigma
from dysigma import NoiseSchedule, make_weighting
from dysigma.course.lesson import Lesson
from dysigma.foreign import FlowNetwork
from dysigma.testing import check_weighting, examine_weighting

lesson = Lesson("13_your_own_loop", trains_on="auto")
device = lesson.device  # a GPU if there is one

# %% [markdown]
# ## One wrong word
#
# Suppose that your network predicts $v$. You want Min-SNR weights. Most functions of this package assume that a network
# predicts the noise, unless you say otherwise. What happens if you forget to say it?

# %%
import diffusers

scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
schedule = NoiseSchedule.from_diffusers(scheduler)

meant = make_weighting("min-snr", schedule, "v_prediction").weights()
forgotten = make_weighting("min-snr", schedule).weights()

elsewhere = float((meant - forgotten).abs().sum() / (2 * 1000))
print(f"{elsewhere:.0%} of the weight lies on other timesteps")

# %%
timesteps = np.arange(1000)
fig, ax = plt.subplots(figsize=(7.6, 3.8))
ax.plot(timesteps, forgotten, color="C3", linewidth=2)
ax.plot(timesteps, meant, color="C0", linewidth=2)
ax.text(600, float(forgotten[600]) + 0.1, "the word forgotten", color="C3")
ax.text(265, float(meant[250]), "as meant", color="C0")
ax.set(xlabel="timestep (clean → noisy)", ylabel="weight on the v error, mean 1")
lesson.show(
    fig,
    "13_one_word",
    title="One word forgotten: nothing fails, and the weight lies elsewhere",
    caption="Min-SNR for a network that predicts v, on the linear schedule of DDPM, "
    "and the same call without the word.",
    alt="Two curves of weights over timesteps. The one that was meant is a hump near "
    "timestep 130 and falls to 0 at the noisy end. The other rises to about 1 and "
    "stays there up to the noisy end.",
)
assert elsewhere > 0.3, "the wrong word must move a large part of the weight"

# %% [markdown]
# You should see two curves. The one *as meant* is a hump: nearly all of its weight lies below timestep 500. The one with *the
# word forgotten* is flat from timestep 130 on. So most of its weight lies on noisy timesteps, which were meant to get nearly
# none. Both weightings run, and no message appears. So this page does two things: it shows the lines, and it shows how
# to *check* them.
#
# ## Three lines
#
# Say these are your images: 16 × 16 pixels, from one colour on the left to another on the right.


# %%
def ramps(count, seed=0):
    """(count, 3, 16, 16) uint8."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.randint(256, (count, 3, 1, 1), generator=draw)
    right = torch.randint(256, (count, 3, 1, 1), generator=draw)
    picture = left + (right - left) * torch.linspace(0, 1, 16)
    return picture.expand(count, 3, 16, 16).to(torch.uint8)


images = ramps(512).float() / 127.5 - 1
print(len(images), "images of", tuple(images.shape[1:]))


# %%
def small_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )


model = small_unet().to(device)

# %% [markdown]
# And this is your loop, as in the examples of diffusers. The three marked lines are new.

# %%
NAME = "dy-sigma"

weighting = make_weighting(NAME, schedule, scheduler.config.prediction_type)  # 1
weighting.to(device)
groups = [
    {"params": model.parameters(), "lr": 2e-3},
    *weighting.parameter_groups(),
]  # 2
optimizer = torch.optim.AdamW(groups)

draw = torch.Generator().manual_seed(0)
curve = []
for _ in range(lesson.fast(300, 30)):
    clean = images[torch.randint(len(images), (16,), generator=draw)].to(device)
    noise = torch.randn(clean.shape, generator=draw).to(device)
    timesteps = torch.randint(1000, (16,), generator=draw).to(device)

    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps)
    output = model(noisy, timesteps).sample
    error_per_image = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
    loss = weighting(error_per_image, timesteps)  # 3

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    curve.append(float(error_per_image.detach().mean()))


def tell_ends(errors):
    """Print the error at both ends of a training, and check that it fell."""
    first = np.mean(errors[:20])
    last = np.mean(errors[-20:])
    print(
        f"mean error of the first twenty steps {first:.2f}, of the last twenty "
        f"{last:.2f}"
    )
    if lesson.fast(True, False):
        assert last < first, "the error must fall"


tell_ends(curve)

# %% [markdown]
# - **Line 1.** The weighting needs the noise levels and the target of the network. Take both from the scheduler: then the word
#   cannot be forgotten. The weighting belongs on the device of the network.
# - **Line 2.** A weighting that learns has parameters. They need a place in the optimizer. For Min-SNR this list is empty, and
#   the line does no harm.
# - **Line 3.** The weighting takes one mean squared error *for each image*. If your loss is a sum over pixels, or already a
#   mean over the batch, change that first. A wrong shape raises an error.
#
# Dy-Sigma has learned its weights together with the network. Compare them with those at the start:

# %%
start = make_weighting(NAME, schedule, "v_prediction").weights()
learned = weighting.weights().cpu()
table = pd.DataFrame(index=pd.Index([10, 130, 300, 600, 900], name="timestep"))
table["at the start"] = start[table.index]
table["now"] = learned[table.index]
lesson.table(table, caption=f"Weights of {NAME}")
if NAME == "dy-sigma":
    assert (learned - start).abs().max() > 0.01, "the weights must have moved"

# %% [markdown]
# The hump at timestep 130 has become lower, and the weights at timesteps 10, 600 and 900 have grown.
#
# ## Check it: write the formula out
#
# Do not trust a library with your gradients. Take the SNR from the diffusers scheduler, $S=\bar\alpha/(1-\bar\alpha)$. Min-SNR puts
# the weight $\min(S,5)$ on the error of $x_0$. The error of $v$ is $S+1$ times as large, so its weight is $\min(S,5)/(S+1)$.
# The package divides weights by their mean over timesteps; so do we. The two gradients of the whole network must agree.


# %%
model = model.cpu()  # the checks of this page are small


def gradient(network, loss):
    parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


bar = scheduler.alphas_cumprod.cpu()  # add_noise moved it to the device
snr = bar / (1 - bar)
by_hand = snr.clamp(max=5) / (snr + 1)
by_hand = by_hand / by_hand.mean()

timesteps = torch.tensor([1, 20, 150, 400, 800, 990])
clean = images[:6]
noise = torch.randn(clean.shape, generator=draw)
target = scheduler.get_velocity(clean, noise, timesteps)
output = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
errors = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

of_formula = gradient(model, (by_hand[timesteps] * errors).mean())
of_library = gradient(
    model, make_weighting("min-snr", schedule, "v_prediction")(errors, timesteps)
)
of_wrong_word = gradient(model, make_weighting("min-snr", schedule)(errors, timesteps))

# %% [markdown]
# How close is the gradient with the forgotten word? Guess the cosine between it and the right one: 1 is the same
# direction, 0 is unrelated.

# %%
QUESTION_WORD = "Cosine between the right gradient and that with the forgotten word?"
lesson.predict(QUESTION_WORD, None)

# %%
torch.testing.assert_close(of_library, of_formula, rtol=1e-3, atol=1e-6)
print(f"right word: {len(of_formula):,} numbers agree with the formula")
cosine = float(F.cosine_similarity(of_wrong_word, of_formula, dim=0))
lesson.reveal(QUESTION_WORD, cosine)
assert not torch.allclose(of_wrong_word, of_formula, rtol=0.1), (
    "the wrong word must be found"
)

# %% [markdown]
# The check finds the wrong word. The cosine is about 0.5, so a small step along the wrong gradient still lowers the loss that
# was meant. That is why a loss curve alone hardly shows the mistake. Put this cell into the tests of your trainer. If you only
# have the weight as a function, `dysigma audit` compares it for you ([04](04_weightings_in_the_wild.ipynb)).
#
# ## Does add_noise add what the weighting assumes?
#
# The weight of a timestep belongs to its noise level. Most schedulers of diffusers have `add_noise`. Take a fresh
# `DPMSolverMultistepScheduler` and noise an image to timestep 0, the cleanest of 1000. There, $\sigma=0.01$. What is the
# standard deviation of the noise that `add_noise` puts there?

# %%
QUESTION_NOISE = (
    "Noise of add_noise at the cleanest timestep, before set_timesteps was called?"
)
lesson.predict(QUESTION_NOISE, None)

# %%
solver = diffusers.DPMSolverMultistepScheduler()
no_image = torch.zeros(1, 1)
unit_noise = torch.ones(1, 1)
cleanest = torch.tensor([0])
added = float(solver.add_noise(no_image, unit_noise, cleanest))
lesson.reveal(QUESTION_NOISE, added)

solver_schedule = NoiseSchedule.from_diffusers(solver)
ours = float(solver_schedule.add_noise(no_image, unit_noise, cleanest))
print(f"schedule.add_noise adds {ours:.3f}")
assert abs(ours - 0.01) < 1e-3, "the training table must start clean"

# %% [markdown]
# Until `set_timesteps` is called, this class keeps its levels in the opposite order of its timesteps (diffusers 0.42). An
# image "noised to timestep 0" is then pure noise. The loss of such a training is finite, and what it learns is wrong.
# `NoiseSchedule` reads the training table, which no call changes. So use `schedule.add_noise(clean, noise, timesteps)`.
#
# ## Several processes, and gradient accumulation
#
# With accelerate, a training runs as several processes. Each has a copy of the network and a share of the batch. accelerate
# averages the gradients of the *network*. Every process also has its own copy of the weighting, and calls it on its own
# losses. Nothing averages the gradients of the learned weights. **Do the copies stay equal?** We shall try it. Four
# rules first:
#
# | what | do | why |
# |---|---|---|
# | network, optimizer, loader | `accelerator.prepare(...)` | as always |
# | weighting | do **not** prepare it, no `DistributedDataParallel` | explained below, after the result |
# | batches | the same number of images in every process | explained below, after the result |
# | checkpoints | `accelerator.register_for_checkpointing(weighting)` | else a resumed run starts with new weights |
#
# With **gradient accumulation**, call the weighting on each part of the batch. Its learned parameters collect gradients as
# those of the network do, and move with the optimizer. Running statistics move at every call; their memory is counted in
# images, so the number of parts hardly matters.
#
# Here is such a script. It works on one process and on several.

# %%
SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from accelerate import Accelerator
import dysigma

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)  # on GPUs: no cpu=True
rank, count = accelerator.process_index, accelerator.num_processes

torch.manual_seed(0)
model = torch.nn.Linear(8, 8)  # stands for a network
schedule = dysigma.NoiseSchedule.linear()
weighting = dysigma.make_weighting("dy-sigma", schedule)
groups = [
    {"params": model.parameters(), "lr": 1e-3},
    *weighting.parameter_groups(lr=0.05),
]
optimizer = torch.optim.AdamW(groups)
model, optimizer = accelerator.prepare(model, optimizer)  # and not the weighting

draw = torch.Generator().manual_seed(1)
for step in range(40):
    clean = torch.randn(16, 8, generator=draw)
    noise = torch.randn(16, 8, generator=draw)
    timesteps = torch.randint(1000, (16,), generator=draw)
    share = slice(rank * 16 // count, (rank + 1) * 16 // count)  # a loader would do this

    noisy = schedule.add_noise(clean, noise, timesteps)
    with accelerator.accumulate(model):
        output = model(noisy[share])
        errors = F.mse_loss(output, noise[share], reduction="none").mean(1)
        accelerator.backward(weighting(errors, timesteps[share]))
        optimizer.step()
        optimizer.zero_grad()

torch.save(weighting.weights(), f"{sys.argv[1]}/weights-{rank}-of-{count}.pt")
"""
temporary = tempfile.TemporaryDirectory()
scratch = Path(temporary.name)
(scratch / "script.py").write_text(SCRIPT)


def run_script(count):
    """Run the script in `count` processes, as `accelerate launch` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, scratch / "script.py", scratch]
        environment = {**os.environ, **place, **meeting}
        processes.append(subprocess.Popen(command, env=environment))
    for process in processes:
        assert process.wait() == 0, "the script must run"
    return [
        torch.load(scratch / f"weights-{rank}-of-{count}.pt") for rank in range(count)
    ]


# %% [markdown]
# Prediction: after forty steps on two processes, each of which saw half of the images, are the weights in both the same?
# Answer `"equal"`, `"close"` or `"different"`.

# %%
QUESTION_RANKS = "Learned weights in two processes after forty steps?"
lesson.predict(QUESTION_RANKS, None)

# %%
if lesson.fast(True, False):
    (alone,) = run_script(1)
    first_process, second_process = run_script(2)
    assert torch.equal(first_process, second_process), (
        "both must be the same, bit for bit"
    )
    torch.testing.assert_close(first_process, alone, rtol=1e-3, atol=1e-4)
    moved = float((alone - make_weighting("dy-sigma", schedule).weights()).abs().max())
    assert moved > 0.01, "and they must have moved"
    lesson.reveal(QUESTION_RANKS, "equal")
    print(f"and equal to those of one process, which have moved by up to {moved:.2f}")
else:
    print("The short run leaves this out: three processes import PyTorch.")

# %% [markdown]
# In a full run you should see "equal". The two copies agree to the last bit, and with the training of one process on the
# whole batch up to rounding.
#
# The reason is a gather. When a process calls the weighting, the losses of all processes are gathered inside that call. So each
# process computes the same gradient for the learned weights. The third rule follows: the gathered pieces must have one size.
# The second rule follows too: nothing is left to average.
#
# With `accelerate launch --num_processes 2 your_script.py` you need no line of `run_script`.
#
# ## Flow matching
#
# A flow mixes image and noise by a share $r$ of noise, $x_t=(1-r)x_0+r\epsilon$. Its network predicts the velocity
# $u=\epsilon-x_0$. There are no integer timesteps: $r$ is drawn from a continuum. So we need two things.
#
# *The noise level.* The SNR is $S=(1-r)^2/r^2$, so $\lambda=\ln S=2\ln\frac{1-r}r$.
#
# *The conversion.* From $x_0=x_t-ru$, an error of $u$ is $1/r$ times as large as that of $x_0$. With $r=1/(1+\sqrt S)$:
#
# $$L^u=\frac{L^x}{r^2}=(1+\sqrt S)^2\,L^x .$$
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $r$ | `s` | `(B,)` | share of noise |
# | $\lambda$ | `log_snr` | `(B,)` | natural log of the SNR |
# | $L^x,\ L^u$ | `error_x0`, `error_u` | `(B,)` | squared error of one guess, seen as $x_0$ and as $u$ |
#
# `weighting.at(losses, log_snr)` takes the noise level of each image in place of a timestep. The loop:

# %%
flow = NoiseSchedule.flow(1000)
flow_weighting = make_weighting("min-snr", flow, "flow_prediction")
flow_weighting.to(device)
flow_model = small_unet().to(device)
groups = [
    {"params": flow_model.parameters(), "lr": 2e-3},
    *flow_weighting.parameter_groups(),
]
optimizer = torch.optim.AdamW(groups)

flow_curve = []
for _ in range(lesson.fast(300, 20)):
    clean = images[torch.randint(len(images), (16,), generator=draw)].to(device)
    noise = torch.randn(clean.shape, generator=draw).to(device)
    s = torch.rand(16, generator=draw).clamp(1e-3, 1 - 1e-3).to(device)

    share = s.view(-1, 1, 1, 1)
    noisy = (1 - share) * clean + share * noise
    output = flow_model(noisy, 1000 * s).sample
    error_per_image = (
        F.mse_loss(output, noise - clean, reduction="none").flatten(1).mean(1)
    )
    log_snr = 2 * ((1 - s) / s).log()
    loss = flow_weighting.at(error_per_image, log_snr)

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    flow_curve.append(float(error_per_image.detach().mean()))

tell_ends(flow_curve)

# %% [markdown]
# The check needs no network. Take one guess of $x_0$, and convert it to a prediction of $u$. The weighted loss must be the
# same number, from the error of $x_0$ and from the error of $u$. As a negative control, treat $u$ as if it were $v$, whose
# factor is $1+S$.

# %%
clean, eps, guess = torch.randn(3, 5, 64, generator=draw)
s = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
share = s.view(-1, 1)
log_snr = 2 * ((1 - s) / s).log()
x_t = (1 - share) * clean + share * eps

error_x0 = (guess - clean).square().mean(1)
error_u = ((x_t - guess) / share - (eps - clean)).square().mean(1)

on_x0 = make_weighting("min-snr", flow, "sample", normalize=False)
on_u = make_weighting("min-snr", flow, "flow_prediction", normalize=False)
torch.testing.assert_close(
    on_u.at(error_u, log_snr), on_x0.at(error_x0, log_snr), rtol=1e-4, atol=0
)

same_levels = NoiseSchedule(
    flow.alphas_cumprod[:-1]
)  # without the last level, which has no signal
as_v = make_weighting("min-snr", same_levels, "v_prediction", normalize=False)
right = float(on_x0.at(error_x0, log_snr))
wrong = float(as_v.at(error_u, log_snr))
print(f"objective on x0 and on u {right:.3f}; with the factor of v {wrong:.3f}")
assert abs(wrong / right - 1) > 0.1, "the wrong conversion must be found"

# %% [markdown]
# ## EDM
#
# EDM adds noise of any size, $x=x_0+\sigma\epsilon$. The SNR is $1/\sigma^2$, so $\lambda=-2\ln\sigma$. Training draws $\ln\sigma$
# from a normal distribution. The loss is that of a denoiser $D(x)$, an estimate of $x_0$, so the target is `sample`. EDM's
# weight is $\frac{\sigma^2+\sigma_\text{data}^2}{(\sigma\,\sigma_\text{data})^2}=S+1/\sigma_\text{data}^2$. It has a name here too: `edm`.
#
# The schedule holds a thousand levels: the quantiles of the density from which we draw.

# %%
MEAN, SPREAD = -1.2, 1.2  # of ln sigma, from the paper
SIGMA_DATA = 0.5

normal_quantiles = torch.special.ndtri(
    (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
)
log_sigma = MEAN + SPREAD * normal_quantiles  # from clean to noisy
edm = NoiseSchedule((-2 * log_sigma).sigmoid())
edm_weighting = make_weighting("edm", edm, "sample")


def denoise(network, x, sigma):
    """EDM's D(x): scaled so that the network neither sees nor returns large numbers."""
    sigma = sigma.view(-1, 1, 1, 1)
    total = sigma**2 + SIGMA_DATA**2
    output = network(x / total.sqrt(), sigma.flatten().log() / 4).sample
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * output


# %%
edm_weighting.to(device)
edm_model = small_unet().to(device)
groups = [
    {"params": edm_model.parameters(), "lr": 2e-3},
    *edm_weighting.parameter_groups(),
]
optimizer = torch.optim.AdamW(groups)

edm_curve = []
for _ in range(lesson.fast(200, 15)):
    clean = images[torch.randint(len(images), (16,), generator=draw)].to(device)
    sigma = (MEAN + SPREAD * torch.randn(16, generator=draw)).exp().to(device)
    noise = torch.randn(clean.shape, generator=draw).to(device)
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    error_per_image = F.mse_loss(
        denoise(edm_model, noisy, sigma), clean, reduction="none"
    )
    error_per_image = error_per_image.flatten(1).mean(1)
    loss = edm_weighting.at(error_per_image, -2 * sigma.log())

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    edm_curve.append(loss.item())

first = np.mean(edm_curve[:20])
last = np.mean(edm_curve[-20:])
print(f"mean loss of the first twenty steps {first:.3g}, of the last twenty {last:.3g}")
if lesson.fast(True, False):
    assert last < first, "the loss must fall"

# %% [markdown]
# The numbers are small because the weights were divided by their mean, and the cleanest levels have very large ones. Now the
# check by formula. The gradient of the loss in each error is its weight, over the batch size. Without the division by the
# mean (`normalize=False`) it must be the weight of the paper.

# %%
sigma = torch.tensor([0.02, 0.1, 0.5, 2.0, 10.0])
errors = torch.ones(5, requires_grad=True)
plain_edm = make_weighting("edm", edm, "sample", normalize=False)
plain_edm.at(errors, -2 * sigma.log()).backward()

of_paper = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
torch.testing.assert_close(5 * errors.grad, of_paper, rtol=1e-4, atol=0)
print("weights of the paper:", [round(float(weight), 2) for weight in of_paper])

# %% [markdown]
# Why the quantiles? Weights are scaled to mean 1 over the timesteps of *the schedule*. EDM draws its levels from a
# density. If the schedule holds the quantiles of that density, the mean over what is *drawn* is 1 too. A common factor on
# all weights changes the size of the loss, and with it clipping and the learning rate of SGD. So it is worth a check, here
# with Min-SNR.

# %%
sigma = (MEAN + SPREAD * torch.randn(20_000, generator=draw)).exp()
mean_weight = pd.Series(dtype=float)
for label, levels_of in {
    "quantiles of the draws": edm,
    "linear DDPM schedule": NoiseSchedule.linear(),
}.items():
    ones = torch.ones(len(sigma), requires_grad=True)
    make_weighting("min-snr", levels_of, "sample").at(ones, -2 * sigma.log()).backward()
    mean_weight[label] = float(
        ones.grad.sum()
    )  # the gradient of a loss is its weight / B
lesson.table(
    mean_weight.to_frame("mean weight over 20,000 draws"),
    caption="Min-SNR, EDM's noise levels",
    mark="quantiles of the draws",
)
assert abs(mean_weight.iloc[0] - 1) < 0.02, "with the quantiles the mean must be 1"
assert mean_weight.iloc[1] > 3, "with another schedule it is not"

# %% [markdown]
# With the quantiles of the draws the mean weight is 1. With the linear DDPM schedule it is more than 3, so the loss would be
# more than three times as large.
#
# All three loops in short:
#
# | your loop | schedule | target | noise level of an image |
# |---|---|---|---|
# | DDPM, DDIM, DPM-Solver, … | `from_diffusers(scheduler)` | that of its config | its timestep |
# | flow, $x_t=(1-r)x_0+r\epsilon$ | `flow()` or `from_diffusers(scheduler)` | `flow_prediction` | `at(…, 2 ln((1-r)/r))` |
# | EDM, $x=x_0+\sigma\epsilon$ | `NoiseSchedule(log_snr.sigmoid())` | `sample` | `at(…, -2 ln σ)` |
#
# ## A weighting of your own
#
# A weighting is one function of `log_snr`. It returns the *logarithm* of the weight on the $x_0$ error. The package does the
# rest: the conversion to your target, the mean, the levels between timesteps. This one is the root of the SNR, and falls
# again beyond $\lambda=3$:


# %%
def gentle(log_snr, power=0.5):
    """S^power / (1 + S / e^3)"""
    return power * log_snr - F.softplus(log_snr - 3)


print(check_weighting(gentle, power=0.5))

# %% [markdown]
# These are the laws that every weighting of the package keeps, tried on all targets. `check_weighting` raises an error if
# one is broken. They say that it *works*, not that it is the formula you had in mind: that is the check further up.
#
# A weighting that learns is a class with a state, and there more can go wrong. Here is a common mistake. It counts its
# calls in a plain Python number, which no checkpoint sees.


# %%
class Forgetful(dysigma.Weighting):
    """Equal weights at first, then more and more on the noisy timesteps."""

    def __init__(self, setting):
        super().__init__(setting)
        self.calls = 0
        ramp = torch.linspace(0, 1, self.num_timesteps)
        self.register_buffer("ramp", ramp, persistent=False)

    def weights(self):
        progress = min(1.0, self.calls / 100)
        return self.scaled(1 + progress * self.ramp)

    def update(self, losses, timesteps, importance):
        self.calls += 1


of_forgetful = examine_weighting(Forgetful)
broken = [verdict.law for verdict in of_forgetful.broken]
print("broken:", *broken)
assert broken == ["state_dict() is the whole state"], (
    "a state outside the buffers must be found"
)

# %% [markdown]
# It trains well until it is resumed from a checkpoint: then it counts from 0 again. The cure is a buffer:
# `self.register_buffer("calls", torch.zeros(()))`.
#
# ## Your own data
#
# `load_data` takes a folder of pictures or an `.npz` file. In a folder, the names of subfolders become classes. In an
# `.npz`, `images` are `(N, H, W, 3)` bytes. Every tenth image is held out for testing, if there are no test images.

# %%
pictures = ramps(60).permute(0, 2, 3, 1).numpy()

folder = scratch / "pictures"
for number, picture in enumerate(pictures):
    is_dark = picture.mean() < 128
    kind = folder / ("dark" if is_dark else "bright")
    kind.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(kind / f"{number:02}.png")

np.savez(scratch / "pictures.npz", images=pictures)

from_folder = dysigma.load_data(folder)
from_file = dysigma.load_data(scratch / "pictures.npz")
print("folder:", tuple(from_folder.images.shape), from_folder.class_names)
print("npz:   ", tuple(from_file.images.shape), from_file.class_names)
assert len(from_folder) == len(from_file) == 54, "every tenth is held out"

# %% [markdown]
# `dysigma.train` needs no loop of your own. It takes data and weighting by their names. The name of a function in a file of
# yours is `module:function`. The same works in a shell: `dysigma train --data pictures --weighting my_weightings:gentle --out
# run`. The module is imported, so name only code that you would run.

# %%
OWN = """
import torch.nn.functional as F

def gentle(log_snr, power=0.5):
    return power * log_snr - F.softplus(log_snr - 3)
"""
(scratch / "my_weightings.py").write_text(OWN)

with chdir(scratch):  # a module in the working folder is found by its name
    config = dysigma.TrainConfig(
        data="pictures",
        weighting="my_weightings:gentle",
        prediction="sample",
        model="micro",
        images=lesson.fast(3_200, 320),
        warmup_images=160,
        device=str(device),
    )
    run = dysigma.train(config, scratch / "run", progress=False, finish=False)
losses = run.metrics[
    "validation_losses"
].dropna()  # at several noise levels, untrained first
before = np.mean(losses.iloc[0])
after = np.mean(losses.iloc[-1])
print(f"mean validation loss {before:.3f} before training, {after:.3f} after")
assert after < before, "the loss must fall"

# %% [markdown]
# ## Which noise levels of your network conflict?
#
# The network of the first loop was trained outside this package. `conflicts` needs three things: the network, images and
# the schedule. Here it measures the gradients of four bins of timesteps, and takes the noise of minibatches out
# ([08](08_gradient_conflicts.ipynb)).

# %%
report = dysigma.conflicts(
    model,
    images,
    schedule,
    bins=4,
    prediction_type="v_prediction",
    micro_batches=lesson.fast(32, 6),
    progress=False,
)
print(*report.sentences(), sep="\n\n")

# %%
spans = report.spans()
cosines = pd.DataFrame(report.cosine_debiased.numpy(), index=spans, columns=spans)
standard_errors = pd.DataFrame(report.cosine_se.numpy(), index=spans, columns=spans)
shown = cosines.round(2).astype(str) + " ± " + standard_errors.round(2).astype(str)
shown = shown.where(cosines.notna(), "undetermined")
for span in spans:
    shown.loc[span, span] = ""
lesson.table(
    shown,
    caption="Cosines between the gradients of bins of timesteps, with standard errors",
)
if NAME == "dy-sigma" and len(spans) == 4 and lesson.as_published:
    assert report.sure_conflict_rate == 0, "in our run, no pair must conflict"
    assert cosines.iloc[0, -1] == cosines.min().min(), "the two ends must agree least"

# %% [markdown]
# Read a cell with its standard error. A cosine below zero by more than two of them is a conflict. In our full run there is
# none: bins that are close agree, and the cleanest and the noisiest bin are nearly unrelated. In a short run some cells
# may say *undetermined*. Then the gradient of a bin does not stand out of its noise: use more `micro_batches`.
#
# Two more options. For a network with conditions, `model_kwargs={"class_labels": labels}` holds one row for each image.
# If you train only some parameters (adapters, say), only those that require a gradient are measured. A network that was
# trained with a flow scheduler of diffusers goes in as `FlowNetwork(network, schedule)`, because it is told the level and not
# the timestep:

# %%
flow_report = dysigma.conflicts(
    FlowNetwork(flow_model.cpu(), flow),
    images,
    flow,
    bins=4,
    prediction_type="flow_prediction",
    micro_batches=lesson.fast(32, 6),
    progress=False,
)
print(flow_report.sentences()[0])
if lesson.fast(True, False):
    assert flow_report.mean_cosine > report.mean_cosine, (
        "the bins of the flow must agree better"
    )

# %% [markdown]
# For the flow network the mean cosine is much nearer to 1: its four bins agree better than those of the first network.
#
# **Try it yourself.** In the first loop, set `NAME = "uncertainty"` or `"p2"`. In the cell of `gentle`, call the check with
# `power=0.2` or `power=1.0`. In the conflicts of the first network, set `bins=6`.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks of the exercises expect; there is no need to read this cell.
sigma = torch.tensor([0.002, 0.5, 80.0])
lesson.exercise(
    "13.1",
    expected=-2 * sigma.log(),
    mistakes={
        "SNR has squares: that is half of it.": -sigma.log(),
        "That is noise over signal.": 2 * sigma.log(),
    },
)
at = torch.linspace(-6, 6, 13)
share_of_noise = torch.sigmoid(-at / 2)
on_velocity = (2 / torch.pi / (1 - 2 * share_of_noise + 2 * share_of_noise**2)).log()
lesson.exercise(
    "13.2",
    expected=on_velocity - 2 * share_of_noise.log(),
    mistakes={
        "That is the log-weight on the velocity: divide the weight by r^2.": on_velocity,
        "The other way: a small error of x0 is a large one of u.": on_velocity
        + 2 * share_of_noise.log(),
        "That is the weight, not its logarithm.": on_velocity.exp() / share_of_noise**2,
    },
)

# %% [markdown]
# **13.1** (●○○, 3 min) Your script draws EDM noise levels `sigma` for $x=x_0+\sigma\epsilon$. What is `log_snr` for
# `weighting.at`?
#
# <details><summary>Hint</summary>
#
# The SNR is the square of the factor of the signal over the square of the factor of the noise. The logarithm is natural.
#
# </details>

# %%
log_snr_edm = ...
lesson.check("13.1", log_snr_edm)

# %% [markdown]
# **13.2** (●●○, 8 min) A flow-matching script multiplies the squared error of the velocity by $\frac2{\pi(1-2r+2r^2)}$. Write
# this as a weighting of your own: the *logarithm* of the weight on the $x_0$ error, as a function of `log_snr`. Call it
# with the levels `at`. Afterwards you can run the laws on it.
#
# <details><summary>Hint</summary>
#
# First $r$ from `log_snr`: $\sqrt S=(1-r)/r$, so $r$ is a sigmoid of $-\lambda/2$. A weight on the error of $u$ is a weight
# $1/r^2$ times as large on the error of $x_0$.
#
# </details>

# %%
log_weight_at = ...  # the function, called with at
lesson.check("13.2", log_weight_at)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
log_snr_edm = -2 * sigma.log()
lesson.check("13.1", log_snr_edm)


# %% tags=["solution"]
def cosmap(log_snr):
    r = torch.sigmoid(-log_snr / 2)
    on_u = 2 / torch.pi / (1 - 2 * r + 2 * r**2)
    return (on_u / r**2).log()


log_weight_at = cosmap(at)
lesson.check("13.2", log_weight_at)

# %% [markdown]
# ## What you can now do
#
# - Put a weighting into a loop with three lines, and prove with one gradient that it is the formula you meant.
# - Say which part synchronises what when a training has several processes.
# - Name the noise level and the target of a DDPM, flow or EDM loop, and give all of them one weighting.
# - Write a weighting, check its laws, train on your own pictures, and measure conflicts in your own network.
#
# ## Limitations
#
# - Loops in miniature: they show structure, not quality. No flow or EDM network was trained for long here.
# - Between timesteps, predefined weights are computed from their formula (`elbo` apart). Learned ones are interpolated, and
#   beyond the ends of the schedule they stay constant. So the schedule should span the levels that you draw.
# - What this page says about diffusers' `DPMSolverMultistepScheduler` was observed in version 0.42.
# - Two processes were run here on CPUs, with accelerate's plain data parallelism. DeepSpeed and FSDP were not tried.
#
# ## References
#
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): the weighting of the checks.
# - Liu, Gong, Liu, *Flow Straight and Fast*, 2022, [arXiv:2209.03003](https://arxiv.org/abs/2209.03003): the rectified
#   flow.
# - Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*, 2024,
#   [arXiv:2403.03206](https://arxiv.org/abs/2403.03206): the weight of exercise 13.2.
# - Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022,
#   [arXiv:2206.00364](https://arxiv.org/abs/2206.00364): EDM, and the density of its levels.
#
# **Next:** [14, text-guided adaptation and the capstone](14_text_guided_and_capstone.ipynb). Back to the
# [map](00_start_here.ipynb).

# %%
lesson.end()
