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
# # 01 · Describe the forward process by one number per timestep
#
# > **Claim.** A noise schedule is one decreasing curve, the logarithm of the signal-to-noise ratio. Timesteps drawn
# > uniformly are spread very unevenly along that curve, and what a network can possibly achieve changes along it too.
#
# **You will be able to**
#
# - compute `log_snr` from any list of betas without losing digits, and read a schedule from it;
# - say where a schedule spends its timesteps, and check the answer against a closed form;
# - write down the best possible denoiser of a simple data set and the loss that no network can go below;
# - show two bugs that sit in widely used training code: noise that is exactly zero, and a last step that still knows the image.
#
# **You need** basic probability (Gaussians, conditional expectation) and tensors in PyTorch. Nothing from other notebooks;
# [00](00_start_here.ipynb) has the map.
#
# **Time** reading 25 min · running about 20 s (short run 10 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.schedule.NoiseSchedule`, `dysigma.schedule.SCHEDULES`, `dysigma.data.leaves`,
# `dysigma.exact.GaussianMixture`, `dysigma.plots`.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

from dysigma import plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.data import leaves
from dysigma.exact import GaussianMixture
from dysigma.randomness import generator
from dysigma.schedule import SCHEDULES, NoiseSchedule

NOTEBOOK = "01_forward_process_and_snr"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · A picture first
#
# Diffusion training takes an image, adds noise, and asks a network to undo it. How much noise depends on a timestep $t$
# between 0 (almost none) and $T-1$ (almost nothing else). Here are three images of the embedded data set at eight timesteps
# of the schedule that the original DDPM used.

# %%
schedule = NoiseSchedule.linear(1000)
shown = torch.tensor([0, 100, 200, 300, 400, 600, 800, 999])
x0 = leaves(3, size=32).images.float() / 127.5 - 1
noise = torch.randn(x0.shape, generator=generator(0, 0, "noise"))
strip = torch.cat(
    [
        schedule.add_noise(x0[i].expand(8, -1, -1, -1), noise[i].expand(8, -1, -1, -1), shown)
        for i in range(3)
    ]
)

fig, ax = plt.subplots(figsize=(8, 3.2))
plots.image_grid(ax, strip, columns=8)
ax.set_xticks(
    [(i + 0.5) * 33 for i in range(8)],
    labels=[f"t = {t}\nλ = {schedule.log_snr[t]:.1f}" for t in shown],
)
plots.show(
    fig,
    "01_noising_strip",
    title="Three images on their way into noise (linear schedule)",
    caption="Half-way through the timesteps the images are already gone: at t = 400 only large shapes are left, at t = 600 nothing is.",
    alt="Three rows of eight small images. From left to right each dissolves into coloured noise; from the fifth column on little is recognisable.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# ## 2 · Predict before you compute
#
# The **signal-to-noise ratio** is the power of the signal divided by the power of the noise. At $t=0$ it is in the thousands, at
# the end it is nearly 0. At which of the 1000 timesteps is it 1, signal and noise equally strong? Change the number, then go on.

# %%
QUESTION = "Timestep at which SNR = 1 (linear schedule)?"
predict(QUESTION, 500)

# %% [markdown]
# ## 3 · From betas to log-SNR
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $x_0,\ \epsilon,\ x_t$ | `x0`, `noise`, `x_t` | `(B, C, H, W)` | image in [-1, 1], standard normal noise, their mixture |
# | $t$ | `timesteps` | `(B,)` int64 | 0 is clean, $T-1$ is noise |
# | $\beta_t$ | `betas` | `(T,)` | variance added in step $t$ |
# | $\bar\alpha_t$ | `alphas_cumprod` | `(T,)` | share of signal power left |
# | $\alpha_t, \sigma_t$ | `schedule.alpha`, `.sigma` | `(T,)` | factors of signal and noise |
# | $\lambda_t$ | `schedule.log_snr` | `(T,)` | natural logarithm of the signal-to-noise ratio |
#
# One step keeps a share $1-\beta_t$ of the variance of what was there and fills up with fresh noise:
# $x_t=\sqrt{1-\beta_t}\,x_{t-1}+\sqrt{\beta_t}\,\epsilon_t$. Two such steps in a row are one larger step, because a sum of independent
# Gaussians is a Gaussian and variances add. After all steps up to $t$,
#
# $$x_t=\alpha_t x_0+\sigma_t\epsilon,\qquad \alpha_t^2=\bar\alpha_t=\prod_{s\le t}(1-\beta_s),\qquad \sigma_t^2=1-\bar\alpha_t .$$
#
# So the signal-to-noise ratio is $\bar\alpha_t/(1-\bar\alpha_t)$. It spans eight orders of magnitude, which is why we work with its
# logarithm, and why we get there without ever subtracting nearly equal numbers:
#
# $$\ln\bar\alpha_t=\sum_{s\le t}\ln(1-\beta_s),\qquad \lambda_t=\ln\bar\alpha_t-\ln(1-\bar\alpha_t)=\ln\bar\alpha_t-\ln\!\big(-\mathrm{expm1}(\ln\bar\alpha_t)\big).$$
#
# Everything else follows from $\lambda$: $\bar\alpha=\mathrm{sigmoid}(\lambda)$ and $1-\bar\alpha=\mathrm{sigmoid}(-\lambda)$. The variance stays 1 for data of
# variance 1, and going from $s$ to $t$ after going from 0 to $s$ is the same as going from 0 to $t$. The cell checks all of it.


# %%
def log_snr_of(betas):
    """(T,) betas in float64 -> (T,) log-SNR."""
    log_alphas_cumprod = torch.log1p(-betas).cumsum(0)
    return log_alphas_cumprod - torch.log(-torch.expm1(log_alphas_cumprod))


betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
mine = log_snr_of(betas)
torch.testing.assert_close(mine, schedule.log_snr, rtol=1e-9, atol=1e-9)
print(f"log-SNR from {mine[0]:.2f} down to {mine[-1]:.2f}; equal to the package's table")

bar = torch.sigmoid(schedule.log_snr)
assert torch.allclose(bar, schedule.alphas_cumprod), "the log-SNR must give alphas_cumprod back"
power = schedule.alpha**2 + schedule.sigma**2
assert torch.allclose(power, torch.ones(1000)), (
    "signal and noise power must add up to 1 at every timestep"
)

s, t = 200, 700
kept = bar[t] / bar[s]  # share of power that survives from s to t
in_two_steps = kept * (1 - bar[s]) + (1 - kept)
assert torch.isclose(in_two_steps, 1 - bar[t]), "two steps in a row must add as much noise as one"
print(
    f"noise variance at t = {t}: {1 - bar[t]:.4f} in one step, {in_two_steps:.4f} by way of s = {s}"
)

# %% [markdown]
# Algebra is one thing; does the chain of a thousand small steps really end where the one big step does? We run it on many
# copies of the number $x_0=1$ and compare mean and standard deviation, for five seeds, with the formula.

# %%
copies, checkpoint = fast(20_000, 4_000), 300
means, stds = [], []
for seed in range(5):
    draw = generator(seed, 0, "chain")
    x = torch.ones(copies)
    for beta in betas[: checkpoint + 1].tolist():
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(copies, generator=draw)
    means.append(x.mean().item())
    stds.append(x.std().item())

for name, values, exact in (
    ("mean", means, schedule.alpha[300]),
    ("std", stds, schedule.sigma[300]),
):
    mean, half = plots.t_interval(values)  # over the seeds, 95 %
    print(
        f"{name} after {checkpoint} steps: {mean:.4f} ± {half:.4f} simulated, {exact:.4f} by the formula"
    )
    assert abs(mean - exact) < 5 / math.sqrt(5 * copies), (
        f"the simulated {name} must agree with the formula"
    )

# %% [markdown]
# Now the prediction. Most people place SNR = 1 near the middle. The linear schedule gets there after a quarter of the way,
# because the *logarithm* of $\bar\alpha$ is what falls quadratically, and $\bar\alpha=\frac12$ needs only $\ln 2$ of it.

# %%
half_way = int(schedule.log_snr.abs().argmin())
reveal(QUESTION, half_way)

# %% [markdown]
# ## 4 · Where do the timesteps go?
#
# Training draws $t$ uniformly. Along the axis that matters to the network, $\lambda$, that is a density
# $p(\lambda)=-\,\mathrm{d}u/\mathrm{d}\lambda$ with $u=t/T$: steep stretches of the curve get few draws, flat ones many. For the cosine schedule,
# $\bar\alpha=\cos^2(\pi u/2)$, so $\lambda=2\ln\cot(\pi u/2)$ and
#
# $$p(\lambda)=\frac{\sin(\pi u)}{2\pi}=\frac{1}{2\pi}\,\mathrm{sech}\frac{\lambda}{2},$$
#
# symmetric about $\lambda=0$. The others have no closed form; we differentiate their tables.


# %%
def density_over_log_snr(schedule):
    """(T,) log-SNR -> the density of uniformly drawn timesteps along it."""
    return -1 / (schedule.num_timesteps * torch.gradient(schedule.log_snr)[0])


schedules = {name: make(1000) for name, make in SCHEDULES.items() if name != "flow"}
densities = {name: density_over_log_snr(schedule) for name, schedule in schedules.items()}

middle = schedules["cosine"].log_snr.abs() < 5
closed_form = 1 / (2 * math.pi * torch.cosh(schedules["cosine"].log_snr / 2))
error = (densities["cosine"] / closed_form - 1)[middle].abs().max()
assert error < 0.02, "the cosine schedule must have the density sech(λ/2) / 2π"
print(f"cosine: table and closed form agree within {error:.1%} for |λ| < 5")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
plots.trajectories(left, np.arange(1000), {name: s.log_snr for name, s in schedules.items()})
left.axhline(0, color="0.4", linewidth=0.8)
left.set(xlabel="timestep (0 = clean)", ylabel="log-SNR λ", title="The schedule is one curve")
for i, (name, s) in enumerate(schedules.items()):
    marks = {"marker": plots.MARKERS[i], "markevery": (i * 30, 120), "markersize": 4.5}
    right.plot(s.log_snr, densities[name], label=name, linestyle=plots.DASHES[i], **marks)
right.axvline(0, color="0.4", linewidth=0.8)
right.set(
    xlabel="log-SNR λ (noisy → clean)",
    ylabel="density of timesteps",
    xlim=(-13, 11),
    title="Uniform in t is not uniform in λ",
)
plots.show(
    fig,
    "01_schedules",
    title="Four schedules and where they spend their timesteps",
    caption="Uniform timesteps pile up at different noise levels: the linear schedule gives most of them to log-SNR below 0, the cosine "
    "schedule is symmetric. A change of schedule is therefore also a change of loss weighting.",
    alt="Left: four falling curves of log-SNR against timestep; linear and sigmoid fall early, cosine is straighter. "
    "Right: four humps, the density of timesteps over log-SNR; the cosine hump is centred at 0, the linear hump sits left of it.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# The same as numbers. Keep the second and third column in mind: notebook [03](03_snr_weightings.ipynb) multiplies losses by functions of the SNR, and how
# much such a weighting can change depends on how many timesteps lie where it changes anything.

# %%
print(
    f"{'schedule':14s}{'SNR at t = 0':>14s}{'SNR > 5':>10s}{'SNR < 1':>10s}{'SNR at t = 999':>17s}"
)
for name, s in schedules.items():
    snr = s.log_snr.exp()
    print(
        f"{name:14s}{snr[0]:14.0f}{(snr > 5).double().mean():10.0%}{(snr < 1).double().mean():10.0%}{snr[-1]:17.1e}"
    )

# %% [markdown]
# ## 5 · What can a network do at best?
#
# Take the simplest data set that is not Gaussian: $x_0$ is $+1$ or $-1$, each half of the time. The best guess at $x_0$, in squared
# error, is its conditional mean, and Bayes' rule gives it in closed form. The likelihood ratio of the two values at $x_t$ is
# $\exp\!\big(-\tfrac{(x_t-\alpha)^2-(x_t+\alpha)^2}{2\sigma^2}\big)=\exp(2\alpha x_t/\sigma^2)$, hence
#
# $$\mathbb E[x_0\mid x_t]=\tanh\frac{\alpha_t x_t}{\sigma_t^2}.$$
#
# No network does better. Its error is the **floor** of the loss at that timestep. The floor of the noise prediction follows from
# that of $x_0$: the two errors differ by the factor $\alpha/\sigma$, so the losses differ by the factor SNR,
# $L^\epsilon_t=\mathrm{SNR}_t\,L^{x}_t$.

# %%
two_points = GaussianMixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.zeros(2)
)
x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
a, b = bar[half_way].sqrt().view(1, 1), (1 - bar[half_way]).sqrt().view(1, 1)
torch.testing.assert_close(torch.tanh(a * x_t / b**2), two_points.posterior_mean(x_t, a, b))
print("x_t      ", *(f"{v:6.1f}" for v in x_t.flatten()))
print("best x0  ", *(f"{v:6.2f}" for v in two_points.posterior_mean(x_t, a, b).flatten()))

# %% [markdown]
# Second prediction. The loss is the mean squared error of the predicted *noise*. A network that always answers 0 gets 1. Almost
# without noise, at $t=0$, what is the smallest loss that any network can reach on this data set?

# %%
QUESTION_FLOOR = "Smallest noise-prediction loss at t = 0, two-point data?"
predict(QUESTION_FLOOR, 1.0)

# %% [markdown]
# We compute the floor by averaging the exact denoiser's error over many draws, for several seeds. Two comparisons keep us
# honest. The **baseline** is the best *linear* denoiser, $\hat\epsilon=\sigma_t x_t$ for data of variance 1, whose loss is
# $\mathrm{SNR}/(1+\mathrm{SNR})$ whatever the data. The **negative control** is Gaussian data, on which nothing can beat the linear one.

# %%
grid = NoiseSchedule(schedule.alphas_cumprod[::25])  # forty of the thousand noise levels
gaussian = GaussianMixture(torch.tensor([1.0]), torch.tensor([[0.0]]), torch.tensor([1.0]))
samples, seeds = fast(20_000, 4_000), range(5)


def floors(data, prediction_type):
    """(seeds, T) smallest reachable losses, by Monte Carlo with the exact denoiser."""
    return torch.stack(
        [
            data.irreducible(grid, prediction_type, num_samples=samples, seed=seed)[0]
            for seed in seeds
        ]
    )


snr = grid.log_snr.exp()
linear = snr / (1 + snr)
points_eps, points_x0, gaussian_eps = (
    floors(two_points, "epsilon"),
    floors(two_points, "sample"),
    floors(gaussian, "epsilon"),
)

torch.testing.assert_close(
    points_eps, snr * points_x0, rtol=2e-3, atol=1e-6, msg="L_epsilon must be SNR times L_x0"
)
assert (points_eps.mean(0) < linear + 0.02).all(), (
    "the exact denoiser must nowhere lose to the linear one"
)
assert ((gaussian_eps.mean(0) - linear).abs() < 0.03).all(), (
    "on Gaussian data the linear denoiser must be the best"
)
reveal(QUESTION_FLOOR, round(float(points_eps.mean(0)[0]), 3))

# %%
fig, ax = plt.subplots()
curves = {
    "two points: exact floor": points_eps,
    "Gaussian data: exact floor": gaussian_eps,
    "best linear denoiser": linear,
}
plots.trajectories(ax, grid.log_snr, curves)
ax.set(xlabel="log-SNR λ (noisy → clean)", ylabel="loss of the predicted noise", ylim=(-0.03, 1.05))
plots.show(
    fig,
    "01_floors",
    title="The loss that no network can go below",
    caption="With structure in the data (two points) the floor is 0 at both ends and highest in between; with none (Gaussian) the "
    "linear denoiser is already optimal and the floor rises to 1. Bands: 95 % over five seeds.",
    alt="Noise-prediction loss against log-SNR. The exact floor for two-point data rises from 0, peaks just under 0.5 near log-SNR 0.4 and falls "
    "back to 0. The floor for Gaussian data coincides with the best linear denoiser and rises to 1.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# At the clean end the two-point data give the noise away completely: you know $x_0$ exactly, so you can subtract it. Gaussian data give
# nothing away. Images lie in between, and their floor differs from timestep to timestep. A loss of 0.02 may be
# hopelessly far from the floor at one timestep and below reach at another, which is why "weight by loss" and "weight by what can
# still be learned" are different ideas. Notebook [06](06_dy_sigma_derived.ipynb) comes back to this.

# %% [markdown]
# ## 6 · A failure on purpose: noise that is exactly zero
#
# A common training script casts the images to bfloat16 before it adds noise, and the library then casts its table
# $\bar\alpha_t$ to the dtype of the images. bfloat16 keeps eight bits of mantissa, and $\bar\alpha_t$ near 1 needs more. How many of
# the 1000 timesteps lose their noise altogether?

# %%
QUESTION_BF16 = "Timesteps of 1000 with exactly zero noise in bfloat16?"
predict(QUESTION_BF16, 0)

# %%
from diffusers import DDPMScheduler

every = torch.arange(1000)
image = torch.full((1000, 1, 1, 1), 0.5)
unit = torch.ones(1000, 1, 1, 1)
as_in_the_script = DDPMScheduler(num_train_timesteps=1000).add_noise(
    image.bfloat16() * 0, unit.bfloat16(), every
)
ours = schedule.add_noise(image.bfloat16() * 0, unit.bfloat16(), every)
silent = int((as_in_the_script == 0).sum())
reveal(QUESTION_BF16, silent)
print(
    f"distinct noise levels left: {len(as_in_the_script.unique())} of 1000 in bfloat16, {len(ours.unique())} here ({ours.dtype})"
)
assert not (ours == 0).any(), "no timestep of this package may be without noise"

# %% [markdown]
# At those steps the network is asked to find noise in a clean image: an impossible task with loss about 1, at the very timesteps
# that some weightings favour. `NoiseSchedule` keeps its tables in float32 or better whatever the dtype around it.
#
# ## 7 · A second one: the last step still knows the image
#
# Sampling starts from pure noise, so training should end in pure noise. It does not: SNR at the last step is small, not 0. One pixel
# tells you nothing about the image then, but the *average* over many pixels removes noise, and brightness shines through. The schedule of Stable
# Diffusion (`scaled-linear`) shows it well. We correlate the brightness of an image with that of its $x_{T-1}$; the negative control is
# the same schedule rescaled to end at SNR 0.

# %%
images = leaves(fast(2000, 500), size=16).images.float() / 127.5 - 1
last = torch.full((len(images),), 999)
for label, zero in (("as published", False), ("zero terminal SNR", True)):
    s = NoiseSchedule.scaled_linear(1000, zero_terminal_snr=zero)
    correlations = []
    for seed in range(5):
        x_last = s.add_noise(
            images, torch.randn(images.shape, generator=generator(seed, 1, "noise")), last
        )
        brightness = torch.stack([images.mean((1, 2, 3)), x_last.mean((1, 2, 3))])
        correlations.append(float(torch.corrcoef(brightness)[0, 1]))
    mean, half = plots.t_interval(correlations)
    print(f"{label:18s} correlation of brightness before and after: {mean:+.2f} ± {half:.2f}")
    assert (abs(mean) < 0.1) == zero, (
        "only the rescaled schedule may end without a trace of the image"
    )

# %% [markdown]
# A model trained on the first schedule learns to read the brightness off its starting noise, and then always draws images of medium
# brightness, because real starting noise has none to read. With zero terminal SNR the last step is honest, at a price: predicting
# $\epsilon$ there is trivial (it *is* $x_{T-1}$) and says nothing about $x_0$. Use `v_prediction` or `sample` on such a schedule.
#
# **Try it yourself.** Change `two_points` to three points, or give the points a small width (`stds`), and watch the clean end of the floor.
# Change `NoiseSchedule.linear` to `.cosine` in the second code cell and look at the strip again.

# %% [markdown]
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **1.1** (●○○, 3 min) The network of this exercise predicts $v=\alpha\epsilon-\sigma x_0$. Given $x_t$ and $v$, recover $x_0$ in one line.
#
# <details><summary>Hint</summary>
#
# Write down $\alpha x_t$ and $\sigma v$ in terms of $x_0$ and $\epsilon$, and use $\alpha^2+\sigma^2=1$.
#
# </details>

# %%
alpha, sigma = schedule.alpha[400], schedule.sigma[400]
x_t = alpha * x0 + sigma * noise
v = alpha * noise - sigma * x0
exercise(
    "1.1",
    expected=x0,
    mistakes={
        "The sign of the second term is wrong.": alpha * x_t + sigma * v,
        "That is the noise, not x0.": sigma * x_t + alpha * v,
        "That is x_t divided by alpha: it still contains the noise.": x_t / alpha,
    },
)
x0_again = ...  # from x_t, v, alpha and sigma
check("1.1", x0_again)

# %% [markdown]
# **1.2** (●●○, 8 min) Which share of uniformly drawn timesteps of a *cosine* schedule has a signal-to-noise ratio above 5? Answer with a
# formula for $u$ (no table): solve $2\ln\cot(\pi u/2)=\ln 5$.
#
# <details><summary>Hint</summary>
#
# $\cot(\pi u/2)=\sqrt5$, and $\cot$ is $1/\tan$. Timesteps *before* $u$ have the larger ratio.
#
# </details>

# %%
exercise(
    "1.2",
    expected=2 / math.pi * math.atan(1 / math.sqrt(5)),
    mistakes={
        "That is the share below 5.": 1 - 2 / math.pi * math.atan(1 / math.sqrt(5)),
        "The logarithm has a factor 2 in front: take the square root of 5.": 2
        / math.pi
        * math.atan(1 / 5),
        "u is a share of the whole: divide the angle by π/2.": math.atan(1 / math.sqrt(5)),
    },
)
share = ...  # with math.atan, math.sqrt and math.pi
check("1.2", share)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
# alpha x_t = alpha² x0 + alpha sigma noise, and sigma v = alpha sigma noise - sigma² x0: the noise cancels in the difference.
x0_again = alpha * x_t - sigma * v
check("1.1", x0_again)

# %% tags=["solution"]
share = 2 / math.pi * math.atan(1 / math.sqrt(5))
check("1.2", share)
print(
    f"formula {share:.1%}, table of 1000 steps {(schedules['cosine'].log_snr > math.log(5)).double().mean():.1%}"
)

# %% [markdown]
# ## What you can now do
#
# - Turn any list of betas, or any diffusers scheduler (`NoiseSchedule.from_diffusers`), into `log_snr` and reason on that one axis.
# - Say how many timesteps a schedule spends where, and recognise a change of schedule as a change of weighting.
# - Compute the floor of the loss on data you understand completely, and use it to judge a network.
# - Spot two silent faults: a noise table in low precision, and a last step that is not noise.
#
# ## Limitations
#
# - Only variance-preserving schedules with discrete timesteps. Flow matching and EDM use other axes; in log-SNR they are the same story,
#   and notebook [13](13_your_own_loop.ipynb) converts them.
# - The floors are those of one-dimensional toys. For images the floor is unknown, which is part of the difficulty of this field.
# - The size of the brightness leak depends on the image size and the data; the numbers above are for 16 × 16 dead leaves.
#
# ## References
#
# - Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239): the linear
#   schedule and the training loop everybody starts from.
# - Nichol, Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, 2021, [arXiv:2102.09672](https://arxiv.org/abs/2102.09672): the cosine schedule.
# - Kingma, Salimans, Poole, Ho, *Variational Diffusion Models*, 2021, [arXiv:2107.00630](https://arxiv.org/abs/2107.00630): log-SNR as
#   the one variable of the forward process.
# - Salimans, Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, 2022, [arXiv:2202.00512](https://arxiv.org/abs/2202.00512): v-prediction.
# - Lin, Liu, Li, Yang, *Common Diffusion Noise Schedules and Sample Steps are Flawed*, 2024,
#   [arXiv:2305.08891](https://arxiv.org/abs/2305.08891): zero terminal SNR, and the brightness leak at full size.
#
# **Next:** [02, one network, many objectives](02_one_network_many_objectives.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
