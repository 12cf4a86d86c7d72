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
# # 05 · Learn the weights, and know beforehand where they will go
#
# > **Claim.** A learnable weighting has a fixed point that you can write down before you train. Two numbers decide how
# > fast it gets there and how much it shakes on the way: its learning rate and its number of bins.
#
# **You will be able to**
#
# - derive uncertainty weighting from a Gaussian likelihood and name its fixed point;
# - say how many steps a learned weight needs, from its learning rate;
# - say how much it fluctuates, from the number of samples that it sees per step;
# - tell a weight that travels from a weight that shakes, in a training run.
#
# **You need** gradient descent and Adam, log-SNR ([01](01_forward_process_and_snr.ipynb)), and the conversion between
# losses of $\epsilon$ and $x_0$ ([03](03_snr_weightings.ipynb)).
#
# **Time** reading 25 min · running about 1 min (short run 20 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `make_weighting("uncertainty" | "loss-balance" | "random")`,
# `dysigma.weightings.fluctuation`, `dysigma.training.train_step`, `dysigma.exact.field_floor`.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from torch import nn

from dysigma import NoiseSchedule, make_sampler, make_weighting
from dysigma.course.lesson import Lesson
from dysigma.evaluation import evaluation_timesteps, validation_losses
from dysigma.exact import field_floor, gaussian_fields
from dysigma.models import EMA
from dysigma.training import TrainConfig, TrainState, train_step
from dysigma.weightings import fluctuation

lesson = Lesson("05_learnable_weightings", trains_on="auto")
device = lesson.device  # a GPU if there is one

# %% [markdown]
# ## A network that weighs its own timesteps
#
# Until now the weights were formulas, chosen before training. Here they are learned while the network trains. The data
# are grey images of 8 × 8 pixels, drawn from a Gaussian with the $1/f^2$ spectrum of natural images. The network
# predicts the noise. All weights start equal.
#
# Guess first. Will the weight move towards the `"clean"` or towards the `"noisy"` timesteps?

# %%
QUESTION_WHERE = "Towards which timesteps does the weight move, 'clean' or 'noisy'?"
lesson.predict(QUESTION_WHERE, None)

# %%
FAST_LR = 0.1  # a high learning rate of the weights, for the runs further below
CLAMP = 10.0  # the logarithm of a learned variance stays within ± CLAMP
SKIP = 1.0  # 1: the network corrects its input; 0: it starts from nothing
is_default = FAST_LR == 0.1 and CLAMP == 10.0 and SKIP == 1.0
is_full = lesson.as_published

STEPS = lesson.fast(700, 200)
EVERY = 10  # steps between two records of the weights

schedule = NoiseSchedule.linear(1000)  # for formulas
schedule_of_runs = NoiseSchedule.linear(1000).to(device)
images = gaussian_fields(8192, size=8).to(device)
held_out = gaussian_fields(256, size=8, split="test").images.to(device)
shown = evaluation_timesteps(1000, 40)

# What the network is told about the noise level: log-SNR and some waves of it.
level = schedule.log_snr.float() / 5
columns = [level]
for frequency in range(1, 5):
    columns.append(torch.sin(frequency * level))
    columns.append(torch.cos(frequency * level))
level_features = torch.stack(columns, dim=1).to(device)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64 + 9, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 64),
        )

    def forward(self, x_t, timesteps):
        inputs = torch.cat([x_t.flatten(1), level_features[timesteps]], dim=1)
        return SKIP * x_t + self.layers(inputs).view_as(x_t)


# %% [markdown]
# The loop below uses the package's `train_step`, a single optimizer step. The weighting has parameters of its own. They
# form a second group of the optimizer, with their own learning rate. `make_run` returns two things: the weights
# along training, and the losses on held-out images at its end.


# %%
def make_run(name, seed=0, prediction="epsilon", weighting_lr=None, **params):
    torch.manual_seed(seed)
    network = Denoiser().to(device)
    weighting = make_weighting(name, schedule_of_runs, prediction, **params)

    groups = [{"params": list(network.parameters()), "lr": 2e-3}]
    groups.extend(weighting.parameter_groups(weighting_lr))
    for group in groups:
        group["base_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    sampler = make_sampler("uniform", schedule_of_runs)
    ema = EMA(network, 1e5)
    no_scaler = torch.amp.GradScaler(enabled=False)
    state = TrainState(
        network,
        network,
        ema,
        schedule_of_runs,
        weighting,
        sampler,
        optimizer,
        no_scaler,
    )
    config = TrainConfig(
        batch_size=64,
        seed=seed,
        prediction=prediction,
        warmup_images=1280,
        device=str(device),
    )
    weights = []
    for step in range(STEPS):
        if step % EVERY == 0:
            weights.append(weighting.weights().cpu())
        train_step(state, images, config)
    losses = validation_losses(
        network, held_out, schedule_of_runs, prediction, timesteps=shown
    )
    return torch.stack(weights), losses


first_weights, _ = make_run("uncertainty", clamp=CLAMP)
gained = float(first_weights[-1, 900:].mean() / first_weights[-1, :100].mean())
lesson.reveal(QUESTION_WHERE, "noisy" if gained > 1 else "clean")

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.8))
rows = np.linspace(0, len(first_weights) - 1, 4).astype(int)
for number, row in enumerate(rows):
    shade = plt.cm.viridis(0.75 - 0.25 * number)
    ax.plot(schedule.log_snr, first_weights[row], color=shade, linewidth=2)
    height = first_weights[row, -1] * [0.78, 1.0, 1.0, 1.1][number]  # labels apart
    ax.text(-10.3, height, f"step {row * EVERY}", color=shade, ha="right", va="center")
ax.set(
    yscale="log",
    xlim=(-14, 9.5),
    xlabel="log-SNR (noisy → clean)",
    ylabel="weight, mean 1",
)
lesson.show(
    fig,
    "05_first_look",
    title="Left alone, the weights move to the noisy timesteps, and go on moving",
    caption="Weights of uncertainty weighting at four moments of one training. They "
    "start equal. Each later curve is steeper than the one before.",
    alt="Weight against log-SNR, logarithmic, at four moments. The first curve is "
    "flat at one. Later ones rise on the noisy left and fall on the clean right, more "
    "and more steeply.",
)

# %% [markdown]
# You should see a flat line that tilts further and further. Two questions follow. Why this way? And where would it have
# stopped? Both have exact answers.
#
# ## Where it goes: the minimum of a likelihood
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $L_t$ | `losses` | `(B,)` or `(T,)` | mean squared error at timestep $t$, in the space of the target |
# | $L^\star_t$ | `floor` | `(T,)` | the smallest loss that any network can have there |
# | $s_t$ | `s` | `(T,)` | learned logarithm of a variance |
# | $w_t$ | `weights()` | `(T,)` | what the gradient of $L_t$ is multiplied by; mean 1 over $t$ |
# | $\eta$ | `lr` | number | learning rate of $s$ |
#
# Suppose the network's error at timestep $t$ is Gaussian, with an unknown variance $e^{s_t}$. Its negative
# log-likelihood, averaged over pixels, is
#
# $$\tfrac12\left[L_t\,e^{-s_t}+s_t\right]+\text{const}.$$
#
# This is the *uncertainty weighting* of Kendall, Gal and Cipolla (2018). We minimise it by the network and by $s$
# together, and leave the $\frac12$ out, as it changes no minimum. Its derivatives say everything:
#
# 1. By $s_t$: $\;1-L_te^{-s_t}$. It is zero at $s_t^\star=\ln L_t$.
# 2. Once more by $s_t$: $\;L_te^{-s_t}>0$. So there is one minimum.
# 3. By the network: $\;e^{-s_t}\,\nabla L_t$. So the weight is $e^{-s_t}$, and at the minimum it is $\mathbf{1/L_t}$.
#
# A small loss thus earns a large weight. We check it with constant losses: the floor of our images, which is known
# exactly.

# %%
floor = field_floor(schedule, "epsilon").float()
every_timestep = torch.arange(1000)


def settle(weighting, losses, steps=600):
    """The weights after training a weighting on losses that stay as they are."""
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        weighting(losses, every_timestep).backward()
        optimizer.step()
    return weighting.weights()


one_for_each = make_weighting(
    "uncertainty", schedule, bins=1000, clamp=15.0, normalize=False
)
learned = settle(one_for_each, floor)
print(
    f"learned weight times loss: from {(learned * floor).min():.4f} to "
    f"{(learned * floor).max():.4f}"
)
torch.testing.assert_close(learned, 1 / floor, rtol=0.02, atol=0)

# %% [markdown]
# The product is 1 everywhere: the weights are $1/L_t$. So "why towards the noisy timesteps" has an answer: there the
# loss of a noise-predicting network is smallest, because its input is nearly the noise that it must predict.
#
# What does the *network* minimise at the fixed point? Put $s^\star$ back in: $L_te^{-s^\star_t}+s_t^\star=1+\ln L_t$. The
# network minimises the sum of the $\ln L_t$, that is the **geometric mean** of the losses.

# %%
s_star = -learned.log()
objective = (floor * torch.exp(-s_star) + s_star).mean()
print(
    f"objective {objective:.4f}, 1 + log of the geometric mean "
    f"{1 + floor.log().mean():.4f}"
)
torch.testing.assert_close(objective, 1 + floor.log().mean(), rtol=1e-3, atol=1e-3)

# %% [markdown]
# A second method reaches the same fixed point. **Loss balance** learns nothing: it keeps a running mean of the loss of
# each bin and takes the inverse. It has no learning rate.

# %%
balance = make_weighting("loss-balance", schedule, bins=1000, normalize=False)
balance(floor, every_timestep)
product = balance.weights() * floor
torch.testing.assert_close(product / product.mean(), torch.ones(1000))
print("loss balance: weight times loss is the same at every timestep")

# %% [markdown]
# ## What a perfect network would be trained on
#
# Our run had not arrived: its losses were above the floor, and $s$ needs time. Suppose it could go on until the network
# is perfect. Which share of all weight would the noisiest tenth of the timesteps have? Equal weights give it 0.1.

# %%
QUESTION_SHARE = (
    "Share of the weight on the noisiest tenth, for a perfect network (0 to 1)?"
)
lesson.predict(QUESTION_SHARE, None)

# %%
perfect = 1 / floor / (1 / floor).mean()
share_perfect = float(perfect[900:].sum() / perfect.sum())
lesson.reveal(QUESTION_SHARE, share_perfect)
if is_full:
    assert 0.8 < share_perfect < 0.86, "a perfect network must leave little to the rest"

# %% [markdown]
# Five sixths. A closed form shows why. Take white Gaussian data of variance $\sigma_d^2$. Their floor on the $x_0$
# error is $1/(S+\sigma_d^{-2})$ with the signal-to-noise ratio $S$. On the noise error it is $S$ times that. Hence
#
# $$\frac1{L^{\epsilon\star}}=\frac{S+\sigma_d^{-2}}{S}=1+\frac1{\sigma_d^2\,S}.$$
#
# This is the weighting of EDM. At high noise it grows like $1/S$, and that is *constant weight on the error of $x_0$*.

# %%
snr = schedule.log_snr.exp()
inverse_floor = 1 + 1 / (0.5**2 * snr)  # standard deviation 0.5
inverse_floor = inverse_floor / inverse_floor.mean()
edm = make_weighting("edm", schedule, "epsilon", sigma_data=0.5).weights()
torch.testing.assert_close(inverse_floor.float(), edm)
print("1 / floor of white data is the weighting of EDM")

# %% [markdown]
# So uncertainty weighting would learn EDM's weights, if it had white data and a perfect network.
#
# ## How fast: s takes steps of fixed length
#
# Suppose the loss of a timestep is a constant 0.03, so that $s$ has to go from 0 to $\ln 0.03=-3.5$. Adam trains $s$ with
# the learning rate $2\cdot10^{-4}$ that is usual for a network. After how many steps is it there, within 0.05?

# %%
QUESTION_STEPS = "Steps until s has found a loss of 0.03, at learning rate 2e-4?"
lesson.predict(QUESTION_STEPS, None)


# %%
def adam_steps(loss, lr):
    """Steps of Adam until s, started at 0, is within 0.05 of its fixed point."""
    s = 0.0
    mean = 0.0  # running mean of the gradient
    square = 0.0  # running mean of its square
    steps = 0
    while abs(s - math.log(loss)) > 0.05:
        steps += 1
        gradient = 1 - loss * math.exp(-s)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected_mean = mean / (1 - 0.9**steps)  # both means started at 0
        corrected_square = square / (1 - 0.999**steps)
        s = s - lr * corrected_mean / (math.sqrt(corrected_square) + 1e-8)
    return steps


speed = pd.DataFrame(columns=["|ln L| / lr", "measured steps"])
for lr in [2e-4, 1e-3, 1e-2, 2.5e-2]:
    least = abs(math.log(0.03)) / lr
    measured = adam_steps(0.03, lr)
    speed.loc[f"lr = {lr:g}"] = [least, measured]
    assert 0.95 * least < measured < 2 * least, "s must keep close to Adam's speed"

lesson.reveal(QUESTION_STEPS, float(speed["measured steps"].iloc[0]))
lesson.table(speed, caption="Steps until s has found a loss of 0.03", digits=0)

# %% [markdown]
# Adam divides a running mean of the gradient by the root of a running mean of its square. As long as the gradient keeps
# its sign and shrinks, that ratio is at most about 1. So **$s$ moves by about $\eta$ per step**, however large the loss is, and the way from 0 to
# $\ln L$ takes about $|\ln L|/\eta$ steps.
#
# Until then the weights are somewhere between equal weights and $1/L$. So two papers with the same formula and different
# learning rates have trained with different weights. The package gives $s$ the learning rate 0.01 and no weight decay.
#
# ## How much it shakes: noise and bins
#
# Losses of single samples scatter, and $s$ follows the scatter. Let $c$ be their standard deviation over their mean, and
# $n$ the number of samples that one $s$ sees per step. Near the fixed point write $s=\ln L+\delta$. Gradient descent
# on $\frac12(Le^{-s}+s)$ then reads, to first order,
#
# $$\delta\leftarrow\left(1-\tfrac\eta2\right)\delta+\tfrac\eta2\,\xi,\qquad \text{with noise }\xi\text{ of standard deviation }\frac{c}{\sqrt n}.$$
#
# The variance $v$ of $\delta$ settles where it reproduces itself:
#
# $$v=\left(1-\tfrac\eta2\right)^2v+\tfrac{\eta^2}4\,\tfrac{c^2}{n}.$$
#
# For small $\eta$, $\left(1-\frac\eta2\right)^2$ is nearly $1-\eta$. Then $\eta v=\frac{\eta^2}4\frac{c^2}n$, so $v=\eta c^2/(4n)$. The weight
# $e^{-s}$ fluctuates by
#
# $$\frac{\text{standard deviation}}{\text{mean}}\approx\sqrt v=c\,\sqrt{\frac{\eta}{4n}}.$$
#
# We simulate many copies of one $s$, with losses that are positive and skewed. The last row has no noise in the losses.


# %%
def simulated_fluctuation(c, n, lr=0.05, seed=0):
    generator = np.random.default_rng(seed)
    s = np.zeros(lesson.fast(4000, 1000))
    for _ in range(400):
        loss = np.ones(len(s))
        if c > 0:
            shape = n / c**2  # a gamma distribution of mean 1 and deviation c / sqrt(n)
            loss = generator.gamma(shape, 1 / shape, len(s))
        s = s - lr / 2 * (1 - loss * np.exp(-s))
    weight = np.exp(-s)
    return weight.std() / weight.mean()


shaking = pd.DataFrame(columns=["formula", "simulated"])
for n in [1, 4, 16, 64]:
    formula = 0.5 * math.sqrt(0.05 / (4 * n))
    measured = simulated_fluctuation(0.5, n)
    shaking.loc[f"c = 0.5, n = {n}"] = [f"{formula:.2%}", f"{measured:.2%}"]
    assert abs(measured / formula - 1) < 0.1, (
        "the simulation must agree with the formula"
    )
without_noise = simulated_fluctuation(0.0, 1)
shaking.loc["c = 0, n = 1"] = ["0.00%", f"{without_noise:.2%}"]
assert without_noise < 1e-12, "without noise in the losses nothing may shake"

lesson.table(
    shaking, caption="Fluctuation of a weight whose s is trained at learning rate 0.05"
)

# %% [markdown]
# Four times more samples halve the fluctuation. That is the reason for **bins**. With one $s$ for each of 1000
# timesteps, a batch of 64 gives each of them 0.064 samples per step. With one $s$ for each of 20 bins, each $s$ gets
# 3.2 samples, fifty times more. The package takes 20 bins and interpolates between their centres.
#
# ## Travel or shaking?
#
# Now real training. Two things make a weight vary. It **travels**, because its fixed point is far away and moves as the
# network improves. And it **shakes**, because losses are noisy. One number for both would confuse them, so we take two,
# over the second half of training, as medians over timesteps:
#
# - *over time*: standard deviation over mean of the weight;
# - *around its trend*: the same after dividing by the exponential curve that fits the weight best.
#
# Two controls calibrate them. Predefined weights must score 0. Random weights, drawn anew at each step, mark the upper
# end of the scale. How much, in per cent, does uncertainty weighting with 20 bins shake around its trend?

# %%
QUESTION_SHAKE = (
    "Uncertainty weighting, 20 bins: fluctuation around its trend, in per cent?"
)
lesson.predict(QUESTION_SHAKE, None)

# %%
high_lr = f"uncertainty, lr {FAST_LR:g}"
RUNS = {
    "predefined": ("const-eps", {}),
    "dy-sigma": ("dy-sigma", {}),
    "loss balance": ("loss-balance", {}),
    "uncertainty": ("uncertainty", {"clamp": CLAMP}),
    high_lr: ("uncertainty", {"clamp": CLAMP, "weighting_lr": FAST_LR}),
    "uncertainty, 1000 bins": ("uncertainty", {"clamp": CLAMP, "bins": 1000}),
    "random": ("random", {}),
}
SEEDS = range(lesson.fast(2, 1))

runs = {}
for label, (name, params) in RUNS.items():
    runs[label] = [make_run(name, seed, **params) for seed in SEEDS]


# %%
def without_trend(weights):
    """Weights (R, T), each column divided by the exponential that fits it best."""
    log_weights = weights.double().log()
    time = torch.linspace(-1, 1, len(weights), dtype=torch.float64)[:, None]
    slope = (time * log_weights).sum(0) / (time**2).sum()
    return torch.exp(log_weights - time * slope)


rows = {}
for label, runs_of_label in runs.items():
    over_time = []
    around_trend = []
    for weights, _ in runs_of_label:
        second_half = weights[len(weights) // 2 :]
        over_time.append(float(fluctuation(second_half).median()))
        around_trend.append(float(fluctuation(without_trend(second_half)).median()))
    rows[label] = {
        "over time, %": 100 * np.mean(over_time),
        "around its trend, %": 100 * np.mean(around_trend),
    }
varies = pd.DataFrame(rows).T

lesson.reveal(QUESTION_SHAKE, float(varies.loc["uncertainty", "around its trend, %"]))
lesson.table(
    varies,
    caption="Fluctuation of weights in the second half of training, mean of "
    f"{len(SEEDS)} runs",
    mark="uncertainty",
    digits=2,
)

# %%
fig, ax = plt.subplots(figsize=(8, 3.8))
steps = EVERY * np.arange(len(first_weights))
COLOURS = {
    "random": "0.8",
    "predefined": "0.4",
    "uncertainty": "C3",
    "dy-sigma": "C0",
    high_lr: "C1",
}
for label, colour in COLOURS.items():
    weights, _ = runs[label][0]
    ax.plot(steps, weights[:, 900], color=colour, linewidth=1.8)
    height = 0.4 if label == "random" else weights[-1, 900]  # labels apart
    ax.text(steps[-1] * 1.01, height, label, color=colour, va="center")
ax.set(
    yscale="log",
    ylim=(0.05, 30),
    xlim=(0, steps[-1] * 1.25),
    xlabel="training step",
    ylabel="weight at timestep 900",
)
lesson.show(
    fig,
    "05_fluctuation",
    title="Learned weights travel; only random ones shake a lot",
    caption="One weight in one run of five weightings. At the high learning rate it "
    "arrives early and then wobbles. Dy-Sigma, the subject of the next page, starts "
    "elsewhere and stays near its start.",
    alt="Weight at timestep 900 against the training step, logarithmic. The random "
    "one jumps up and down, the predefined one is flat, uncertainty rises "
    "steadily, at high learning rate it rises fast and wobbles, and Dy-Sigma changes "
    "little.",
)

# %%
assert varies.loc["predefined"].max() == 0, "predefined weights must not fluctuate"
if is_default and is_full:
    trend = varies["around its trend, %"]
    travel = varies["over time, %"]
    assert trend.drop("random").max() < trend["random"] / 2, (
        "random weights must shake most"
    )
    assert travel["uncertainty"] > 3 * trend["uncertainty"], (
        "it must travel more than it shakes"
    )
    assert trend[high_lr] > trend["uncertainty"], "a higher rate must shake more"
    assert trend["uncertainty, 1000 bins"] > trend["uncertainty"], (
        "fewer samples must shake more"
    )

# %% [markdown]
# You should see, in the marked row, that uncertainty weighting varies much more over time than around its trend. Most of
# what looks like instability is travel. A higher learning rate ends the travel and shakes more. One $s$ per timestep
# shakes more than 20 bins, but less than the formula's $\sqrt{50}$ times. The formula is for gradient descent, and we trained
# with Adam.
#
# ## When the fixed point takes over
#
# What do learned weights do to the losses? A noise-predicting network has small losses at high noise. Small losses get
# large weights. Large weights lower these losses further, and then the weights grow again. We compare held-out losses
# with those of equal weights, pair by pair with the same seed.

# %%
LEARNED = ["uncertainty", high_lr, "loss balance"]
FIFTHS = {
    "clean fifth": slice(0, 8),
    "middle fifth": slice(16, 24),
    "noisy fifth": slice(32, 40),
}


def mean_log_ratio(label, baseline):
    """(40,) log of the loss over that of the baseline of its seed, mean of seeds."""
    logs = []
    for (_, losses), (_, reference) in zip(runs[label], runs[baseline], strict=True):
        logs.append((losses / reference).log())
    return torch.stack(logs).mean(0)


runs["x0: equal weights"] = [make_run("const-x0", seed, "sample") for seed in SEEDS]
on_x0 = f"x0: {high_lr}"
runs[on_x0] = [
    make_run("uncertainty", seed, "sample", weighting_lr=FAST_LR, clamp=CLAMP)
    for seed in SEEDS
]

effect = pd.DataFrame(
    columns=["share of weight on the noisiest tenth, %", *FIFTHS], dtype=float
)
for label in [*LEARNED, on_x0]:
    baseline = "x0: equal weights" if label == on_x0 else "predefined"
    shares = []
    for weights, _ in runs[label]:
        shares.append(100 * float(weights[-1, 900:].sum() / weights[-1].sum()))
    row = [np.mean(shares)]
    log_ratio = mean_log_ratio(label, baseline)
    for steps_of_fifth in FIFTHS.values():
        row.append(math.exp(log_ratio[steps_of_fifth].mean()))
    effect.loc[label] = row

lesson.table(
    effect,
    caption="Held-out loss over that of equal weights with the same seed (below 1 is "
    "better)",
    mark=high_lr,
    digits=2,
)

# %%
share_fast = effect.loc[high_lr].iloc[0]
fig, ax = plt.subplots(figsize=(8, 3.8))
for label, colour in {"uncertainty": "C3", high_lr: "C1", "loss balance": "C2"}.items():
    ratio = mean_log_ratio(label, "predefined").exp()
    dashes = "--" if label == "loss balance" else "-"
    ax.plot(shown, ratio, color=colour, linewidth=2, linestyle=dashes, label=label)
ax.axhline(1, color="0.3", linewidth=1)
ax.text(990, 1.08, "equal weights", color="0.3", ha="right")
ax.legend(loc="lower left")
ax.set(
    yscale="log",
    xlabel="timestep (clean → noisy)",
    ylabel="loss / loss with equal weights",
)
lesson.show(
    fig,
    "05_taken_over",
    title=f"With {share_fast:.0f} % of the weight on the noisiest tenth, clean "
    "timesteps get worse",
    caption="Held-out losses relative to equal weights, geometric mean of the seeds. "
    "Once the learned weights have arrived, high noise gains a large factor and the "
    "clean side gets worse. Two curves nearly coincide: they have the same fixed "
    "point.",
    alt="Ratio of losses against the timestep, logarithmic. Two curves start above "
    "one at the clean end and fall far below it at the noisy end. A third, with "
    "slower weights, stays closer to one at the clean end.",
)

# %%
if is_default and is_full:
    assert share_fast > 20, "the noisiest tenth must gain weight"
    assert share_fast < 100 * share_perfect, (
        "and must not have reached the share of a perfect network"
    )
    assert effect.loc[high_lr, "clean fifth"] > 1.2, "the clean fifth must get worse"
    slow_clean = effect.loc["uncertainty", "clean fifth"]
    assert slow_clean < effect.loc[high_lr, "clean fifth"], (
        "the slower weights must cost less"
    )
    assert effect.loc[on_x0, "clean fifth"] < 1, "with an x0 network it must gain there"

display(
    Markdown(
        f"The noisiest tenth has **{effect.iloc[0, 0]:.0f} %, {effect.iloc[1, 0]:.0f} "
        f"% and {effect.iloc[2, 0]:.0f} %** of the weight in the first three rows. A "
        f"perfect network would give it {share_perfect:.0%}. So the runs are on their "
        "way, and not yet there."
    )
)

# %% [markdown]
# After 700 steps, the same formula is mild at one learning rate and takes over at another. The last row has the same formula and another
# target. A network that predicts $x_0$ starts with constant weight on the $x_0$ error, which is already heavy at high noise.
# Learning then adds weight at the clean end, and the losses there fall. So the effect of this strategy depends
# on the target.
#
# Losses rise at the noisy end and fall at the clean end. Is this good for *samples*? Losses cannot tell.
# [12](12_the_convergence_race.ipynb) looks at samples. What we can say: before its fixed point, only the clamp limits
# this movement. [06](06_dy_sigma_derived.ipynb) adds a term that does.
#
# **Try it yourself.** In the first long code cell: `FAST_LR = 0.3` (more shaking; predict the table first), `CLAMP = 2.0` (the takeover
# stops early), or `SKIP = 0.0` (the network can no longer pass its input through; where do the weights go now?).
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
_root = floor**-0.5
lesson.exercise(
    "5.1",
    expected=_root / _root.mean(),
    mistakes={
        "That is the full weight, 1 / L: apply the exponent.": perfect,
        "The sign: a large loss must get the smaller weight.": 1
        / _root
        / (1 / _root).mean(),
    },
)
lesson.exercise(
    "5.2",
    expected=25,
    mistakes={
        "The 4 of the formula is missing.": 6,
        "The 4 belongs below the fraction bar: lr / (4 n).": 1,
    },
)

# %% [markdown]
# **5.1** (●○○, 4 min) A milder rule multiplies the loss by $e^{-s_t/2}$, while $s$ is trained as before. Compute its weights
# at the fixed point for the losses `floor`, with mean 1.
#
# <details><summary>Hint</summary>
#
# The fixed point of $s$ is still $\ln L_t$. Insert it, then divide by the mean.
#
# </details>

# %%
half_way = ...
lesson.check("5.1", half_way)

# %% [markdown]
# **5.2** (●●○, 6 min) Batches of 128, losses with $c=1$, gradient descent with $\eta=0.05$ on $\frac12(Le^{-s}+s)$. How many
# equal bins can you afford at most if no weight may fluctuate by more than 5 %?
#
# <details><summary>Hint</summary>
#
# With $K$ bins, each sees $n=128/K$ samples per step. Put that into the formula, solve for $K$, round down.
#
# </details>

# %%
most_bins = ...
lesson.check("5.2", most_bins)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
half_way = floor**-0.5
half_way = half_way / half_way.mean()
lesson.check("5.1", half_way)

# %% tags=["solution"]
most_bins = int(4 * 128 * 0.05**2 / 0.05)  # sqrt(0.05 K / (4 * 128)) <= 0.05
lesson.check("5.2", most_bins)
print(
    f"simulated with that many bins: {simulated_fluctuation(1.0, 128 / most_bins):.2%}"
)

# %% [markdown]
# ## What you can now do
#
# You can write down where a learnable weighting will end, from the losses alone. Two formulas tell you
# roughly what the learning rate and the number of bins do. You can tell travel from shaking. And you look at the share of the noisiest
# timesteps before you look at the loss.
#
# ## Limitations
#
# - One small network, one data set, some hundred steps, two seeds. The percentages do not carry over.
# - The formula for shaking is for gradient descent with noise that is independent from step to step.
# - Held-out losses say nothing about samples.
# - Weightings that look at *gradients* (MGDA and its relatives) are not on this page.
#   [09](09_acting_on_conflicts.ipynb) treats them.
#
# ## References
#
# - Kendall, Gal, Cipolla (2018), *Multi-task learning using uncertainty to weigh losses for scene geometry and
#   semantics*, [arXiv:1705.07115](https://arxiv.org/abs/1705.07115).
# - Karras, Aittala, Aila, Laine (2022), *Elucidating the design space of diffusion-based generative models*,
#   [arXiv:2206.00364](https://arxiv.org/abs/2206.00364): EDM's weighting.
# - Karras, Aittala, Lehtinen, Hellsten, Aila, Laine (2024), *Analyzing and improving the training dynamics of diffusion
#   models*, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696): EDM2 learns an uncertainty as a smooth function of the
#   noise level, on top of EDM's weights.
# - Go, Kim, Lee, Lee, Oh, Moon, Choi (2023), *Addressing negative transfer in diffusion models*,
#   [arXiv:2306.00354](https://arxiv.org/abs/2306.00354): uncertainty weighting on clusters of timesteps.
# - Lin, Ye, Zhang, Tsang (2022), *Reasonable effectiveness of random weighting*,
#   [arXiv:2111.10603](https://arxiv.org/abs/2111.10603): random weights as a baseline.
#
# **Next:** [06, Dy-Sigma derived](06_dy_sigma_derived.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
