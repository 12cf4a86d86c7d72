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
# # 07 · Train a compact DDPM and watch every timestep
#
# > **Claim.** A diffusion training step is eight lines. If every draw in it is a function of (seed, step), two loss weightings can be
# > compared on exactly the same images, timesteps and noise, and an interrupted run ends where an uninterrupted one does. The loss per
# > timestep, not the mean loss, shows what a weighting did.
#
# **You will be able to**
#
# - write the training step of a DDPM and check it, number for number, against the package;
# - stop a run, save it, continue it, and prove that nothing was lost;
# - compare two weightings at equal draws, with several seeds and an interval, timestep by timestep;
# - recognise a weighting that starves the clean timesteps, from the loss and from the samples;
# - read a run folder: losses, weights, samples, the diffusers pipeline.
#
# **You need** the forward process ([01](01_forward_process_and_snr.ipynb)); [00](00_start_here.ipynb) has the map.
#
# **Time** reading 25 min · running about 110 s (short run 20 s) on two CPU cores · memory about 1 GB.
#
# **Functions introduced** `dysigma.training.TrainConfig`, `build`, `train_step`, `iterate`, `train`, `dysigma.evaluation.validation_losses`,
# `sample_images`, `elbo`, `dysigma.runs.load_run`.

# %%
import dataclasses
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from dysigma import plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.data import batch
from dysigma.evaluation import elbo, evaluation_timesteps, sample_images, validation_losses
from dysigma.models import count_parameters, make_model
from dysigma.randomness import generator
from dysigma.runs import load_run
from dysigma.schedule import NoiseSchedule
from dysigma.training import TrainConfig, build, iterate, load_split, train

NOTEBOOK = "07_train_a_compact_ddpm"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · The data, and one configuration
#
# *Dead leaves* are occluding shapes with power-law sizes: a classic synthetic model of natural images, drawn in memory, so nothing is
# downloaded; [00](00_start_here.ipynb) shows them, ten classes, each a palette and a shape. A `TrainConfig` is everything a run depends on; amounts are counted in images.

# %%
config = TrainConfig(
    data="leaves", image_size=16, train_images=fast(4096, 1024), model="micro", weighting="const-eps",
    images=fast(16_000, 1_280), batch_size=fast(32, 16), lr=2e-3, warmup_images=fast(1_600, 160), device="cpu",
)  # fmt: skip
data = load_split(config, "train", torch.device("cpu"))
test = load_split(config, "test", torch.device("cpu"))
print(
    f"{len(data):,} images {tuple(data.images.shape[1:])}, one uint8 tensor of {data.images.nbytes / 1e6:.1f} MB"
)
print("classes:", ", ".join(data.class_names))

# %% [markdown]
# ## 2 · Predict before you train
#
# The network predicts the noise, and its loss is the mean squared error: 1 for a network that always answers 0. After this short training,
# how many times larger will the loss be at the clean end ($t\approx 10$) than at the noisy end ($t\approx 990$)?

# %%
QUESTION = "Loss at the clean end over loss at the noisy end?"
predict(QUESTION, 1.0)

# %% [markdown]
# ## 3 · One training step, by hand
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $x_0$ | `x0` | `(B, 3, 16, 16)` | images in [-1, 1] |
# | $t$ | `timesteps` | `(B,)` int64 | one timestep per image, 0 is clean |
# | $\epsilon$ | `noise` | as `x0` | standard normal |
# | $x_t$ | `x_t` | as `x0` | $\alpha_t x_0+\sigma_t\epsilon$ |
# | $L_i$ | `losses` | `(B,)` | mean squared error of each sample, unreduced |
# | $w_t$ | `weights` | `(T,)` | weight of each timestep, mean 1 |
#
# The objective is $\frac1B\sum_i w_{t_i}L_i$ with $L_i=\frac1{d}\lVert\hat\epsilon_\theta(x_{t_i},t_i)-\epsilon_i\rVert^2$. The weighting enters in the last line and nowhere
# else. Every draw comes from a generator made from (seed, step, name of the draw): no hidden state, so step 1000 can be drawn
# without drawing the 999 before it.


# %%
def step_by_hand(model, optimizer, schedule, step):
    """One step of const-eps on config's data: eight lines of diffusion."""
    x0, _, _ = batch(data, config.seed, step, config.batch_size)
    u = torch.rand(config.batch_size, generator=generator(config.seed, step, "timesteps"))
    timesteps = (u * schedule.num_timesteps).long()
    noise = torch.randn(x0.shape, generator=generator(config.seed, step, "noise"))
    alpha, sigma = (c[timesteps].view(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
    predicted = model(alpha * x0 + sigma * noise, timesteps).sample
    losses = (predicted - noise).square().mean((1, 2, 3))  # (B,)
    losses.mean().backward()  # const-eps: every weight is 1
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * min(1, (step + 1) * config.batch_size / config.warmup_images)
    optimizer.step()
    optimizer.zero_grad()
    return losses.detach()


torch.manual_seed(config.seed)
model = make_model("micro", 16)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
mine = [step_by_hand(model, optimizer, NoiseSchedule.linear(), step) for step in range(3)]

state = build(config, data)
theirs = [record.losses for record, _ in zip(iterate(state, data, config), range(3), strict=False)]
for a, b in zip(mine, theirs, strict=True):
    torch.testing.assert_close(
        a, b, rtol=1e-4, atol=1e-6, msg="the step by hand and the package's must agree"
    )
print(
    f"{count_parameters(model):,} parameters; three steps by hand and three of the package give the same {3 * config.batch_size} losses"
)

# %% [markdown]
# ## 4 · Stop anywhere, lose nothing
#
# `iterate` yields after each *whole* step, so a loop may stop between any two. What is saved is `state.state_dict()`: weights, their average,
# optimizer, weighting, step number. No random state is in it, because there is none. We train 12 steps in one go, and 7 + 5 with a new
# state in between.

# %%
short = dataclasses.replace(config, images=12 * config.batch_size, weighting="dy-sigma")


def parameters(state):
    return torch.cat(
        [p.detach().flatten() for p in [*state.model.parameters(), *state.weighting.parameters()]]
    )


whole = build(short, data)
for _ in iterate(whole, data, short):
    pass

first = build(short, data)
for record in iterate(first, data, short):
    if record.step == 6:
        break
tensors, rest = first.state_dict()
second = build(dataclasses.replace(short), data)
second.load_state_dict(
    first.step, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(rest))
)
for _ in iterate(second, data, short):
    pass

assert torch.equal(parameters(whole), parameters(second)), (
    "resumed and uninterrupted must agree in every bit"
)
print(f"12 steps and 7 + 5 steps end with the same {len(parameters(whole)):,} numbers, bit for bit")

# %% [markdown]
# ## 5 · Two weightings on the same draws
#
# `const-eps` gives every timestep weight 1 on the noise error. `const-x0` gives every timestep weight 1 on the error of $x_0$, which is
# weight $1/\mathrm{SNR}$ on the noise error: almost all of it goes to the noisiest timesteps. The literature calls *both* "Const". They share
# initial weights, images, timesteps and noise, seed by seed; the **negative control** is `const-eps` against itself with the
# images in another order (another seed), which shows how large differences are that mean nothing.
#
# | weighting | weight on the noise error | share of the weight on the noisiest tenth |
# |---|---|---|
# | const-eps | 1 | 10 % |
# | const-x0 | $\propto 1/\mathrm{SNR}$ | printed below |

# %%
timesteps, moments = evaluation_timesteps(1000, 20), fast(5, 2)
seeds, arms = range(fast(3, 2)), ("const-eps", "const-x0")
held_out = test.images[: fast(32, 16)]


def race(weighting, seed):
    """(checkpoints, 20) validation losses of the averaged weights, and the final state."""
    run = dataclasses.replace(config, weighting=weighting, seed=seed)
    state, curve = build(run, data), []
    judge = make_model("micro", 16)
    for record in iterate(state, data, run):
        if state.step % (run.num_steps // moments) == 0:
            assert torch.isfinite(record.loss), "training must stay finite"
            state.ema.copy_to(judge)
            curve.append(validation_losses(judge, held_out, state.schedule, timesteps=timesteps))
    return torch.stack(curve), state


curves, states = {}, {}
for arm in arms:
    for seed in seeds:
        curve, states[arm] = race(arm, seed)
        curves.setdefault(arm, []).append(curve)
    curves[arm] = torch.stack(curves[arm])
weights = states["const-x0"].weighting.weights()
print(
    f"const-x0: {weights[-100:].sum() / weights.sum():.0%} of the weight lies on the noisiest tenth of the timesteps"
)
print(f"done: {len(seeds)} seeds, {config.num_steps} steps of {config.batch_size} each")

# %%
final = {arm: curves[arm][:, -1] for arm in arms}
ends = [final["const-eps"].mean(0)[i] for i in (0, -1)]
reveal(QUESTION, float(ends[0] / ends[1]))
between = (final["const-x0"].log() - final["const-eps"].log()).mean(0)
control = (final["const-eps"][0].log() - final["const-eps"][1].log()).abs()
print(
    f"clean half: const-x0 / const-eps = {between[:10].exp().mean():.2f}; two seeds of const-eps differ by {control[:10].exp().mean():.2f}"
)
print(
    f"noisy tenth: const-x0 / const-eps = {between[-2:].exp().mean():.2f}; two seeds of const-eps differ by {control[-2:].exp().mean():.2f}"
)
assert between[:10].mean() > 2 * control[:10].mean(), (
    "const-x0 must be worse on the clean half by more than seeds differ"
)

# %% [markdown]
# The loss falls with $t$ although no timestep was preferred. At the noisy end $x_t$ *is* almost the noise, and repeating the input is
# a good answer; at the clean end the noise has to be told from the texture of the image.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
plots.loss_by_timestep(left, timesteps, {arm: final[arm].numpy() for arm in arms})
left.set(title="After training, timestep by timestep", ylabel="loss on held-out images")
images = [config.images * (i + 1) // moments for i in range(moments)]
plots.trajectories(right, images, {arm: curves[arm].mean(2).numpy() for arm in arms}, log=True)
right.set(xlabel="images seen", ylabel="mean loss", title="The mean hides where it happens")
plots.show(
    fig,
    "07_two_consts",
    title="Two weightings that are both called Const",
    caption="On the same draws, weight 1 on the x0 error (const-x0) leaves an epsilon network far behind on the clean half, which gets almost no "
    "weight, and wins nothing on the noisy half that seeds could tell apart. Bands: 95 % over seeds.",
    alt="Left: loss against timestep on a logarithmic axis. Both curves fall towards the noisy end; const-x0 lies well above const-eps on the clean half, "
    "and the two bands overlap on the noisy half. Right: mean loss against images seen; const-eps falls faster and ends lower.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# ## 6 · A failure on purpose, seen with the eyes
#
# Samples need every timestep: an early mistake is never undone, and the clean timesteps draw the edges. Both networks start from the same
# latents, in 25 steps of DDIM from diffusers.

# %%
rows = []
for arm in arms:
    judge = make_model("micro", 16)
    states[arm].ema.copy_to(judge)
    rows.append(
        sample_images(judge, states[arm].schedule, (12, 3, 16, 16), num_steps=fast(25, 10), seed=1)
    )
roughness = [float((r.float().diff(dim=-1).abs()).mean()) for r in [test.images[:256], *rows]]
fig, ax = plt.subplots(figsize=(7.5, 2.1))
plots.image_grid(ax, torch.cat([test.images[:12], *rows]), columns=12, row_labels=["real", *arms])
plots.show(
    fig,
    "07_samples",
    title="The same latents through both networks",
    caption="A few hundred steps are far too few for pictures, yet the order is plain: const-eps has turned much of the noise into soft grey blotches, "
    "const-x0 has not removed it at all. The recorded run below shows what eight times as many steps of a larger network give.",
    alt="Three rows of twelve small pictures: real dead leaves, greyish blotchy noise from const-eps, and strong coloured noise pixel by pixel from const-x0.",
    notebook=NOTEBOOK,
)
print(
    "mean step between neighbouring pixels, grey levels: "
    + ", ".join(f"{n} {r:.0f}" for n, r in zip(["real", *arms], roughness, strict=True))
)
bound = elbo(judge, held_out, states["const-x0"].schedule, timesteps_per_image=10)
judge.load_state_dict(states["const-eps"].ema.state)
better = elbo(judge, held_out, states["const-eps"].schedule, timesteps_per_image=10)
print(
    f"ELBO on held-out images, bits/dim (lower is better): const-eps {better.bits_per_dim:.2f}, const-x0 {bound.bits_per_dim:.2f}"
)
assert better.bits_per_dim < bound.bits_per_dim, "the likelihood bound must agree with the eye"

# %% [markdown]
# ## 7 · A run folder
#
# `train` (and `dysigma train` on the command line) does the same, and writes a folder that survives a crash at any moment. A run cut short
# by Ctrl-C prints the command that continues it.

# %%
with tempfile.TemporaryDirectory() as scratch:
    tiny = dataclasses.replace(
        config, images=10 * config.batch_size, validation_images=8, validation_timesteps=10
    )
    run = train(tiny, Path(scratch) / "first", progress=False)
    print(*sorted(p.name for p in run.path.glob("[!.]*")), sep="  ")
    print(
        run.metrics[["step", "images", "mean_loss", "grad_norm"]]
        .dropna()
        .tail(3)
        .round(3)
        .to_string(index=False)
    )
    pipeline = run.pipeline()
assert pipeline.unet.config.sample_size == 16, "the folder must open as a diffusers pipeline"
print(
    type(pipeline).__name__,
    "with",
    type(pipeline.unet).__name__,
    "and",
    type(pipeline.scheduler).__name__,
)

# %% [markdown]
# ## 8 · Recorded: CIFAR-10
#
# The record below was made on a CPU with the `small` preset (1.1 M parameters), so that anybody can make it again; it is a baseline
# of what little compute gives, not a good model. The data are CIFAR-10 (a rebuilt copy, 170 of 60,000 images approximate). **No
# GPU run has been recorded yet**: `data/gpu-backlog.md` lists them with their commands, and their results will appear here.
#
# ```
# dysigma train --data cifar10 --model small --images 128000 --batch-size 32 --lr 1e-3 --warmup-images 6400 \
#     --validate-every 12800 --checkpoint-every 6400 --device cpu --out data/runs/cifar10-cpu-small
# ```

# %%
RECOMPUTE = (
    False  # True: train again, into a new folder: about an hour, and CIFAR-10 must be at hand
)
record = load_run(Path("../data/runs/cifar10-cpu-small"))
if RECOMPUTE:
    record = train(record.config, record.path.with_name("cifar10-cpu-small-again"))
metrics = record.metrics.dropna(subset=["validation_losses"])
grid_t = np.array(metrics.validation_timesteps.iloc[0])
shown = [i for i in (0, 1, 3, len(metrics) - 1) if i < len(metrics)]
seen = record.summary["images"]
print(
    f"{seen:,} images in {record.summary['seconds'] / 60:.0f} min on {record.summary['provenance']['device']}, torch {record.summary['provenance']['torch']}"
)

fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(1.15, 1))
plots.loss_by_timestep(
    left,
    grid_t,
    {f"{metrics.images.iloc[i]:,} images": metrics.validation_losses.iloc[i] for i in shown},
)
left.set(title="CIFAR-10, loss on 64 test images")
right.imshow(Image.open(record.path / "samples.png"))
right.set(xticks=[], yticks=[], title=f"64 samples after {seen:,} images", frame_on=False)
right.grid(False)
plots.show(
    fig,
    "07_cifar10_cpu",
    title="An honest small baseline: CIFAR-10 on a CPU",
    caption="One network, very different speeds: after the first validation the loss at the noisy end still falls several-fold, at the clean "
    "end by about a quarter. The samples have colour, light and layout, and hardly an object.",
    alt="Left: test loss against timestep for four moments of training, each curve below the last and the gap widest at the noisy end. "
    "Right: a grid of 64 painterly colour images without clear objects.",
    notebook=NOTEBOOK,
)
first_loss, last_loss = (
    np.array(metrics.validation_losses.iloc[1]),
    np.array(metrics.validation_losses.iloc[-1]),
)
gain = 1 - last_loss / first_loss
assert gain[-5:].mean() > 2 * gain[:5].mean(), (
    "the noisy end must have improved by more than the clean end, as the caption says"
)
print(
    f"loss from {metrics.images.iloc[1]:,} to {seen:,} images: clean tenth −{gain[:5].mean():.0%}, noisy tenth −{gain[-5:].mean():.0%}"
)

# %% [markdown]
# **Try it yourself.** In section 5 replace `"const-x0"` by `"min-snr"`, `"uncertainty"` or `"dy-sigma"`; give `config` `prediction="sample"` and
# see which of the two Consts is then the bad one (notebook [03](03_snr_weightings.ipynb) says why).
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **7.1** (●○○, 4 min) The average of the weights forgets half of the past in `half_life` images. After a step of `batch_size` images the average
# moves towards the weights by a fraction `a`: $\bar\theta\leftarrow(1-a)\bar\theta+a\theta$. Write `a`.
#
# <details><summary>Hint</summary>
#
# After `half_life / batch_size` steps, $(1-a)$ to that power must be one half.
#
# </details>

# %%
half_life, batch_size = 500_000, 512
exercise(
    "7.1",
    expected=1 - 0.5 ** (batch_size / half_life),
    mistakes={
        "That is what is kept, 1 - a.": 0.5 ** (batch_size / half_life),
        "Close, but that forgets a factor e, not 2, in half_life images.": batch_size / half_life,
        "The exponent is upside down: batch_size is a small part of half_life.": 1
        - 0.5 ** (half_life / batch_size),
    },
)
a = ...
check("7.1", a)

# %% [markdown]
# **7.2** (●●○, 8 min) `losses_eps` are losses of the predicted noise at `timesteps`. Turn them into losses of the $x_0$ that the network implies,
# to see them as the error of an image.
#
# <details><summary>Hint</summary>
#
# $x_0=(x_t-\sigma\epsilon)/\alpha$, so an error in $\epsilon$ is multiplied by $\sigma/\alpha$. The loss is its square; SNR is $\alpha^2/\sigma^2$.
#
# </details>

# %%
losses_eps = final["const-eps"].mean(0)
snr = states["const-eps"].schedule.log_snr[timesteps].exp()
exercise(
    "7.2",
    expected=losses_eps / snr,
    mistakes={
        "Upside down: at the noisy end a small error in the noise is a large one in x0.": losses_eps
        * snr,
        "Errors are multiplied by sigma / alpha, losses by its square.": losses_eps / snr.sqrt(),
        "That is for v: its error is 1 + SNR times that of x0.": losses_eps / (1 + snr),
    },
)
losses_x0 = ...
check("7.2", losses_x0)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
a = 1 - 0.5 ** (batch_size / half_life)
check("7.1", a)
losses_x0 = losses_eps / snr
check("7.2", losses_x0)

# %% [markdown]
# ## What you can now do
#
# - Write and check a training step, and see that a weighting enters in one line of it.
# - Train in a run folder, stop, and go on with nothing lost.
# - Compare weightings on equal draws and judge them timestep by timestep, with a control that shows what seeds alone do.
#
# ## Limitations
#
# - A `micro` network and a minute of training. `const-x0` on an epsilon network is a known bad pair, chosen because the effect is visible at this size.
# - Differences between *good* weightings are much smaller: notebook [06](06_dy_sigma_derived.ipynb) measures some with five paired seeds.
# - The recorded run is one seed at one learning rate, on a CPU.
#
# ## References
#
# - Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239): the training step, and the simple loss (const-eps).
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023, [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): calls weight 1 on x0 Const, and trains it with x0 networks.
# - Kingma, Salimans, Poole, Ho, *Variational Diffusion Models*, 2021, [arXiv:2107.00630](https://arxiv.org/abs/2107.00630): the likelihood bound in section 6.
# - Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364): averages of weights counted in images.
# - Lee, Mumford, Huang, *Occlusion Models for Natural Images*, 2001, [doi:10.1023/A:1011109015675](https://doi.org/10.1023/A:1011109015675): the statistics of dead leaves.
#
# **Next:** [08, gradient conflicts](08_gradient_conflicts.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
