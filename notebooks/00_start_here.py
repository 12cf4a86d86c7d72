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
# # 00 · Start here: map, check, and a first minute
#
# > **Claim.** A diffusion model is one network with a thousand jobs, one per noise level, and they compete for it. How the losses
# > of the jobs are weighted decides which of them are learned first. A minute of training on two CPU cores is enough to see it.
#
# **You will be able to**
#
# - choose your route through the collection, and check that your environment can run it;
# - put a loss weighting into a training loop with three lines;
# - read a picture of losses by timestep, and say which jobs a weighting favours and which pay for it.
#
# **You need** Python, and PyTorch at the level of writing a training loop. For the mathematics, [01](01_forward_process_and_snr.ipynb).
#
# **Time** reading 15 min · running about 60 s (short run 15 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.weightings.make_weighting`, `dysigma.objective.sample_losses`, `dysigma.evaluation.validation_losses`,
# `dysigma.data.batch`, `dysigma.models.make_model`, `dysigma.teaching`.

# %%
import matplotlib.pyplot as plt
import torch

from dysigma import plots
from dysigma.course.lessons import (
    banner,
    check,
    check_environment,
    exercise,
    fast,
    predict,
    reveal,
    watermark,
)
from dysigma.data import batch, leaves
from dysigma.evaluation import evaluation_timesteps, validation_losses
from dysigma.models import make_model
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule
from dysigma.weightings import make_weighting

NOTEBOOK = "00_start_here"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## What this is
#
# Training a diffusion model means minimising a *sum* of losses, one for each of $T$ noise levels. That is a multi-objective problem, usually solved by
# picking weights once and never looking again. This collection looks: at fixed weights made from the signal-to-noise ratio, at
# weights that are learned, at the conflicts between gradients, and at **Dy-Sigma**, which combines fixed and learned weights.
#
# About that name: Dy-Sigma was published by Liu, Ye, Liu and Qin at IJCNN 2024. Only the abstract is public. What you find here is an
# **independent reconstruction from that abstract**: a family of formulas that fit its words, each derived and tested. It is not the authors' code, and
# where our results differ from theirs, the difference may lie in our reading.
#
# ## The map
#
# | notebook | question it answers |
# |---|---|
# | 00 Start here | you are here |
# | [01 Forward process and SNR](01_forward_process_and_snr.ipynb) | what is a noise schedule, in one number per timestep? |
# | [02 One network, many objectives](02_one_network_many_objectives.ipynb) | does training one noise level hurt another? |
# | [03 SNR weightings](03_snr_weightings.ipynb) | where do Min-SNR and its relatives come from, and are they right in the wild? |
# | [05 Learnable weightings](05_learnable_weightings.ipynb) | what do learned weights converge to, and why do they fluctuate? |
# | [06 Dy-Sigma derived](06_dy_sigma_derived.ipynb) | which formulas fit the abstract, what does each minimise, and does it help? |
# | [07 Train a compact DDPM](07_train_a_compact_ddpm.ipynb) | a real model, live on dead leaves and recorded on CIFAR-10 |
# | [08 Gradient conflicts](08_gradient_conflicts.ipynb) | do the timesteps really pull apart, once noise is accounted for? |
# | [10 Pareto trade-offs](10_pareto_trade_offs.ipynb) | what is the best any weighting could do? |
# | [12 The convergence race](12_the_convergence_race.ipynb) | is it 3.7 times faster, and than what? |
# | [13 Reuse](13_your_own_loop.ipynb) | your own loop, your own data, your own weighting |
#
# **Three routes.** *The 45-minute tour:* this notebook, sections 1 to 4 of 01, sections 1, 2 and 7 of 03; later 05 and 09. *The full course:* in order; each
# notebook needs the ones before it, says how long it takes, and has exercises with checks. *Only the API:* read the
# cell called "the whole loop" below, and the README.
#
# Every notebook runs on a CPU without a network. Guess before each result (the cells with `predict` keep your guess and compare), and
# change things: nothing you do in a notebook can break the next one.

# %% [markdown]
# ## Is everything installed?

# %%
ready = check_environment()

# %% [markdown]
# ## A first minute
#
# **The data.** *Dead leaves*: overlapping shapes whose sizes follow a power law, so that the images have the statistics of natural
# ones. They are drawn in memory from a seed; ten classes, five palettes times two shapes. CIFAR-10 or your own folder of pictures
# go through the same function, `dysigma.data.load_data`.

# %%
data, test = leaves(fast(2000, 500), size=16), leaves(32, size=16, split="test")
order = (
    torch.cat([torch.where(data.labels == label)[0][:4] for label in range(10)])
    .view(10, 4)
    .T.flatten()
)

fig, ax = plt.subplots(figsize=(8, 3.9))
plots.image_grid(ax, data.images[order], columns=10)
ax.set_xticks(
    [(i + 0.5) * 17 for i in range(10)],
    labels=[name.replace(" ", "\n") for name in data.class_names],
)
plots.show(
    fig,
    "00_leaves",
    title="The embedded data set at 16 × 16 pixels",
    caption="Four images of each of the ten classes, a palette and a shape. Small, but with edges, shading and occlusion: what makes images hard.",
    alt="Four rows of ten small pictures of overlapping shapes. Columns differ in palette (ember, lagoon, moss, orchid, frost) and in shape (discs or shards).",
    notebook=NOTEBOOK,
)

# %% [markdown]
# **The noise levels.** A schedule says how strong the noise is at each of 1000 timesteps. **The weights.** A weighting gives each timestep a
# factor for its loss. Three of them, for a network that predicts the noise ("epsilon"):
#
# - `const-eps`: factor 1 everywhere, the plain loss of DDPM;
# - `min-snr`: $\min(1, 5/\mathrm{SNR})$, which turns down the nearly clean timesteps (Hang et al. 2023);
# - `const-x0`: $1/\mathrm{SNR}$, the same as factor 1 for a network that predicts the image. The literature calls it "Const", which makes it easy to
#   confuse with the first.
#
# All are scaled to mean 1, so that they differ in shape and not in the size of the steps.

# %%
schedule = NoiseSchedule.cosine(1000)
names = ("const-eps", "min-snr", "const-x0")
weights = {name: make_weighting(name, schedule).weights() for name in names}

by_hand = (5 / schedule.log_snr.exp()).clamp(max=1).float()
torch.testing.assert_close(weights["min-snr"], by_hand / by_hand.mean())
for name in names:
    assert abs(weights[name].mean() - 1) < 1e-4, f"{name} must have mean 1"

fig, ax = plt.subplots(figsize=(6.4, 3.4))
plots.weight_curves(ax, schedule.log_snr, weights)
ax.set(ylim=(1e-4, 1e4), ylabel="weight of the noise-prediction loss")
plots.show(
    fig,
    "00_weights",
    title="Three weightings of the same losses",
    caption="Min-SNR turns down the clean end and leaves the rest alone. Const-x0 hands nearly everything to the few noisiest timesteps.",
    alt="Weights against log-SNR on logarithmic axes. A flat line for const-eps; min-snr is flat on the left and falls on the right; "
    "const-x0 falls steeply everywhere, from about a thousand at the noisy end to less than a ten-thousandth.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# ## The whole loop
#
# This is all there is to using a weighting. `sample_losses` returns one loss per image, *not* their mean; `weighting` turns losses and
# timesteps into the number to call `backward` on. Every draw is a function of the seed and the step, so two weightings with the same seed see the
# same images, timesteps and noise, and start from the same network: their difference is due to the weights alone.

# %%
STEPS, BATCH = fast(80, 40), fast(24, 16)


def train(name, seed):
    torch.manual_seed(seed)
    model, weighting = make_model("tiny", image_size=16), make_weighting(name, schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        x0, _, _ = batch(data, seed, step, BATCH)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator(seed, step, "timesteps"))
        noise = torch.randn(x0.shape, generator=generator(seed, step, "noise"))
        losses = sample_losses(model, schedule, x0, noise, timesteps, "epsilon")  # (B,)
        loss = weighting(losses, timesteps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


# %% [markdown]
# Before it runs: after training, we measure the noise-prediction loss at ten timesteps on images not trained on. Take the noisiest. What is the loss under `min-snr`,
# divided by the loss under `const-eps`? Below 1 means that `min-snr` is better there.

# %%
QUESTION = "Loss at the noisiest of ten timesteps, min-snr / const-eps?"
predict(QUESTION, 1.0)

# %% [markdown]
# Now train. Besides the three weightings there is a **negative control**, `random`: weights as uneven, but drawn anew in every step, without a direction. If
# the pattern below were an accident of uneven weights, `random` would show it too. Three seeds each.

# %%
arms, seeds, probes = (*names, "random"), range(fast(3, 2)), evaluation_timesteps(1000, 10)
losses = {}
for name in arms:
    models = [train(name, seed) for seed in seeds]
    losses[name] = torch.stack(
        [validation_losses(m, test.images, schedule, timesteps=probes) for m in models]
    )
    print(
        f"{name:10s} loss at t = {', '.join(map(str, probes[::3].tolist()))}:",
        *(f"{v:.3f}" for v in losses[name].mean(0)[::3]),
    )

ratios = {
    name: losses[name] / losses["const-eps"] for name in arms
}  # paired: same seed, same draws
reveal(QUESTION, round(float(ratios["min-snr"].mean(0)[-1]), 2))

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.8))
plots.trajectories(
    ax, probes, {"min-snr": ratios["min-snr"], "random (control)": ratios["random"]}, log=True
)
ax.axhline(1, color="0.3", linewidth=1)
ax.set_yticks([0.8, 0.9, 1, 1.1, 1.2, 1.3], labels=["0.8", "0.9", "1", "1.1", "1.2", "1.3"])
ax.minorticks_off()
ax.set(xlabel="timestep (0 = clean)", ylabel="loss relative to const-eps", ylim=(0.75, 1.4))
plots.show(
    fig,
    "00_first_minute",
    title=f"What Min-SNR gives and what it takes, after {STEPS} steps",
    caption="With the clean timesteps turned down, they come out worse and the noisy ones better, because those get more of the network. "
    f"Random weights, uneven but without direction, help nowhere. Bands: 95 % over {len(seeds)} paired seeds.",
    alt=f"Ratio of losses to const-eps against timestep. The min-snr curve falls from about {ratios['min-snr'].mean(0)[0]:.2f} at the clean end "
    f"through 1 to about {ratios['min-snr'].mean(0)[-1]:.2f} at the noisy end. The control stays above 1 throughout.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# That is the subject of this collection in one picture: no weighting is better everywhere. Is the trade worth it, does a better one
# exist, can a rule find it while training? And where would a model that is trained a thousand times longer end up? Those are questions for the
# other notebooks.
#
# One more thing the numbers show, on purpose: `const-x0` does badly at *every* timestep here, even at the noisy end that it favours. Nearly all its
# weight lies on the very last timestep, most batches do not contain it, and the network learns from almost nothing.

# %%
tilt = ratios["min-snr"][:, -1] / ratios["min-snr"][:, 0]
assert (tilt < 1).all(), "in every seed min-snr must trade the clean end for the noisy end"
assert (losses["const-x0"].mean(0) > losses["const-eps"].mean(0)).all(), (
    "const-x0 must lose everywhere on this network"
)
share = weights["const-x0"].max() / 1000
missing = (1 - 1 / 1000) ** BATCH
print(
    f"const-x0: the last of 1000 timesteps carries {share:.0%} of the weight, and {missing:.0%} of batches do not contain it"
)

# %% [markdown]
# **Try it yourself.** Other names for `arms`: `"p2"`, `"soft-min-snr"`, `"uncertainty"`, `"dy-sigma"` (the last two learn: give the optimizer
# `weighting.parameter_groups()` as well). Another schedule: `NoiseSchedule.linear(1000)`. More `STEPS`: does the trade stay?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **0.1** (●○○, 2 min) A timestep has SNR 20. What is its Min-SNR weight (γ = 5) on the noise-prediction loss, before scaling to mean 1?
#
# <details><summary>Hint</summary>
#
# The formula is in the list of weightings above. It is a number between 0 and 1.
#
# </details>

# %%
exercise(
    "0.1",
    expected=0.25,
    mistakes={
        "That is min(SNR, γ), the weight on the error of the predicted image.": 5.0,
        "That is the maximum of the two; the weight must turn the clean steps down.": 1.0,
        "Upside down.": 4.0,
    },
)
weight_at_snr_20 = ...
check("0.1", weight_at_snr_20)

# %% [markdown]
# **0.2** (●●○, 5 min) What does `weighting(losses, timesteps)` compute? Get the same number from `losses_of_batch`, `timesteps` and
# `weighting.weights()`, which holds one weight for each of the 1000 timesteps.
#
# <details><summary>Hint</summary>
#
# Index the weights with the timesteps of the batch, multiply, and take a mean over the batch.
#
# </details>

# %%
weighting = make_weighting("min-snr", schedule)
timesteps = torch.tensor([3, 250, 500, 999])
losses_of_batch = torch.tensor([0.9, 0.4, 0.2, 0.1])
w = weighting.weights()
exercise(
    "0.2",
    expected=weighting(losses_of_batch, timesteps),
    mistakes={
        "That is the plain mean: no weights yet.": losses_of_batch.mean(),
        "That is a sum; take the mean over the batch.": (w[timesteps] * losses_of_batch).sum(),
        "Weight each loss before averaging, not the average.": w[timesteps].mean()
        * losses_of_batch.mean(),
        "Do not divide by the weights of this batch: a batch of light timesteps must count less.": (
            w[timesteps] * losses_of_batch
        ).sum()
        / w[timesteps].sum(),
    },
)
loss = ...
check("0.2", loss)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
weight_at_snr_20 = min(1, 5 / 20)
check("0.1", weight_at_snr_20)

# %% tags=["solution"]
loss = (weighting.weights()[timesteps] * losses_of_batch).mean()
check("0.2", loss)

# %% [markdown]
# ## What you can now do
#
# - Put any of the weightings into a training loop: make it, call it on per-sample losses and timesteps.
# - Compare two weightings fairly: same seed, same draws, mean weight 1, several seeds, by timestep and against a control.
# - Say why "better than Const" means little until you know which Const.
#
# ## Limitations
#
# - A minute of training a network of 0.1 million parameters says what weightings do *early*. It says nothing about image quality or about
#   the end of training.
# - Losses on the cosine schedule only; on the linear one Min-SNR changes fewer timesteps and less happens.
#
# ## References
#
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023, [arXiv:2303.09556](https://arxiv.org/abs/2303.09556):
#   timesteps as competing tasks, and the weighting used here.
# - Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239): the plain loss.
# - Liu, Ye, Liu, Qin, *Dy-Sigma: A Generalized Accelerated Convergence Strategy for Diffusion Models*, IJCNN 2024: known here
#   from its abstract alone.
# - Lee, Mumford, Huang, *Occlusion Models for Natural Images*, 2001, [doi:10.1023/A:1011109015675](https://doi.org/10.1023/A:1011109015675): dead leaves.
#
# **Next:** [01, describe the forward process by one number per timestep](01_forward_process_and_snr.ipynb).

# %%
watermark()
