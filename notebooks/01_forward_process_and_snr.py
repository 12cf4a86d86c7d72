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
# # 01 · The forward process and its signal-to-noise ratio
#
# > **Claim.** A noise schedule is one falling curve: the logarithm of the signal-to-noise ratio. It decides at which noise
# > levels training spends its timesteps. The noise level decides how small the loss can get at best.
#
# **You will be able to**
#
# - compute the log-SNR of a schedule from its betas, without losing digits;
# - say at which noise levels a schedule spends its timesteps;
# - write down the best possible denoiser of a simple data set, and the loss that no network can go below;
# - recognise two faults of widely used code: noise that is exactly zero, and a last step that still knows the image.
#
# **You need** basic probability (Gaussians, conditional expectation) and tensors in PyTorch. [00](00_start_here.ipynb) has
# the map of the course.
#
# **Time** reading 25 min · running about 20 s (short run 12 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.NoiseSchedule`, `dysigma.schedule.make_schedule`, `dysigma.data.leaves`,
# `dysigma.exact.GaussianMixture`.

# %%
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch

from dysigma import NoiseSchedule, plots
from dysigma.course.lesson import Lesson
from dysigma.data import leaves
from dysigma.exact import GaussianMixture
from dysigma.randomness import generator
from dysigma.schedule import make_schedule

lesson = Lesson("01_forward_process_and_snr")

# %% [markdown]
# ## A picture first
#
# Diffusion training takes an image, adds noise, and asks a network to undo it. How much noise is added depends on a
# timestep $t$ between 0 (almost none) and 999 (almost nothing else). Here are three images at eight timesteps of the
# schedule of the original DDPM.

# %%
SCHEDULE = "linear"
is_default = SCHEDULE == "linear"

schedule = make_schedule(SCHEDULE)

# %%
SHOWN = torch.tensor([0, 100, 200, 300, 400, 600, 800, 999])

images = leaves(3, size=32).images.float() / 127.5 - 1
noise = torch.randn(images.shape, generator=generator(0, 0, "noise"))

noised = []
for i in range(3):
    same_image = images[i].expand(8, -1, -1, -1)
    same_noise = noise[i].expand(8, -1, -1, -1)
    noised.append(schedule.add_noise(same_image, same_noise, SHOWN))

# %%
fig, ax = plt.subplots(figsize=(9, 3.9))
plots.image_grid(ax, torch.cat(noised), columns=8)
ax.set_xticks(
    [33 * column + 16 for column in range(8)], labels=[f"t = {t}" for t in SHOWN]
)
lesson.show(
    fig,
    "01_noising_strip",
    title="The image is gone long before the last timestep",
    caption="Three images on their way into noise, linear schedule. The same noise in each row.",
    alt="Three rows of eight pictures. From left to right coloured balls and shards dissolve into coloured noise; in the "
    "right half of each row nothing of them can be recognised.",
)

# %% [markdown]
# You should see large shapes up to about $t=400$, and only noise from $t=600$ on. The last 400 timesteps look all
# alike. So timesteps are a poor scale. The **signal-to-noise ratio** (SNR) is a better one. It is the power of the
# signal divided by the power of the noise.
#
# At the first timestep the SNR is in the thousands, at the last one it is almost 0. At which of the 1000 timesteps is it 1,
# so that signal and noise are equally strong? Write a number in place of `None`, or leave it.

# %%
QUESTION_HALF = "Timestep at which SNR = 1?"
lesson.predict(QUESTION_HALF, None)

# %% [markdown]
# ## From many small steps to one big step
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $x_0,\ \epsilon,\ x_t$ | `x0`, `noise`, `x_t` | `(B, C, H, W)` | image in [-1, 1], standard normal noise, their mixture |
# | $t$ | `timesteps` | `(B,)` | 0 is clean, 999 is noise |
# | $\beta_t$ | `betas` | `(T,)` | share of noise that step $t$ adds |
# | $\bar\alpha_t$ | `alphas_cumprod` | `(T,)` | share of signal power that is left at $t$ |
# | $\alpha_t, \sigma_t$ | `alpha`, `sigma` | `(T,)` | factors of signal and noise |
# | $\lambda_t$ | `log_snr` | `(T,)` | natural logarithm of the SNR |
#
# The process is defined by small steps. Step $t$ shrinks what is there a little and adds fresh noise $\epsilon_t$:
#
# $$x_t=\sqrt{1-\beta_t}\,x_{t-1}+\sqrt{\beta_t}\,\epsilon_t .$$
#
# **The signal.** Each step multiplies it by $\sqrt{1-\beta_t}$. After all steps up to $t$ the factor is
# $\alpha_t=\sqrt{\bar\alpha_t}$ with
#
# $$\bar\alpha_t=\prod_{s\le t}(1-\beta_s).$$
#
# **The noise.** A sum of independent Gaussians is Gaussian, and variances add. If $x_0$ has variance 1, each step
# keeps the total variance at $(1-\beta_t)\cdot1+\beta_t=1$. So the noise has the variance that the signal does not
# have:
#
# $$x_t=\alpha_t x_0+\sigma_t\epsilon,\qquad\sigma_t^2=1-\bar\alpha_t .$$
#
# Algebra is one thing. Does a chain of 301 small steps really end where the one big step does? We run it on many copies of
# the number $x_0=1$, in five seeds.

# %%
betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM's linear schedule
COPIES = lesson.fast(20_000, 5_000)
LAST = 300


def mean_and_std_after_small_steps(seed):
    draw = generator(seed, 0, "chain")
    x = torch.ones(COPIES)
    for beta in betas[: LAST + 1].tolist():
        fresh_noise = torch.randn(COPIES, generator=draw)
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * fresh_noise
    return x.mean().item(), x.std().item()


# %%
simulated = pd.DataFrame(
    [mean_and_std_after_small_steps(seed) for seed in range(5)],
    columns=["mean", "standard deviation"],
)
alphas_cumprod = (1 - betas).cumprod(0)
formula = {
    "mean": float(alphas_cumprod[LAST].sqrt()),
    "standard deviation": float((1 - alphas_cumprod[LAST]).sqrt()),
}

chain = pd.DataFrame(columns=["small steps", "± (95 %)", "one big step"])
for name in simulated.columns:
    centre, half_width = plots.t_interval(simulated[name].tolist())
    chain.loc[name] = [centre, half_width, formula[name]]
    tolerance = 5 / math.sqrt(5 * COPIES)
    assert abs(centre - formula[name]) < tolerance, (
        f"the {name} must agree with the formula"
    )
lesson.table(chain, caption="The number 1 after 301 steps", digits=4)

# %% [markdown]
# They agree. So training never walks the chain. It draws $t$ and jumps there in one step: `schedule.add_noise(x0, noise, t)`.
#
# ## Log-SNR, without losing digits
#
# The SNR of a timestep is $\bar\alpha_t/(1-\bar\alpha_t)$. It spans eight orders of magnitude on the linear schedule. So we use its
# logarithm
#
# $$\lambda_t=\ln\bar\alpha_t-\ln(1-\bar\alpha_t).$$
#
# Careful at the clean end: there $\bar\alpha$ is nearly 1, and $1-\bar\alpha$ subtracts two nearly equal numbers. Two functions
# avoid that. `log1p(-b)` is $\ln(1-b)$ and `expm1(a)` is $e^a-1$, both exact for small arguments. With
# $a_t=\ln\bar\alpha_t=\sum_{s\le t}\ln(1-\beta_s)$ we get $1-\bar\alpha_t=-\mathrm{expm1}(a_t)$.

# %%
log_alphas_cumprod = torch.log1p(-betas).cumsum(0)
log_of_noise_power = torch.log(-torch.expm1(log_alphas_cumprod))
by_hand = log_alphas_cumprod - log_of_noise_power

torch.testing.assert_close(
    by_hand, NoiseSchedule.linear(1000).log_snr, rtol=1e-9, atol=1e-9
)
print(f"linear schedule: log-SNR falls from {by_hand[0]:.2f} to {by_hand[-1]:.2f}")

# %% [markdown]
# Everything else follows from $\lambda$: $\bar\alpha=\mathrm{sigmoid}(\lambda)$ and $1-\bar\alpha=\mathrm{sigmoid}(-\lambda)$. And SNR 1 is $\lambda=0$.

# %%
log_snr = schedule.log_snr
torch.testing.assert_close(torch.sigmoid(log_snr), schedule.alphas_cumprod)
torch.testing.assert_close(torch.sigmoid(-log_snr), 1 - schedule.alphas_cumprod)

half_way = int(log_snr.abs().argmin())
lesson.reveal(QUESTION_HALF, half_way)
if is_default:
    assert half_way == 258, (
        "the linear schedule must reach SNR 1 after a quarter of the way"
    )

# %% [markdown]
# Many people guess the middle. The linear schedule is there after a quarter of the way. The reason: its betas grow
# linearly, so $-\ln\bar\alpha_t$ grows like $t^2$. It reaches about 10 at the end. SNR 1 needs $\bar\alpha=\frac12$, which is only $\ln2\approx0.69$.
# The square root of 0.69/10 is about a quarter.

# %%
at_end = float(-log_alphas_cumprod[-1])
estimate = math.sqrt(math.log(2) / at_end)
print(
    f"-ln(alphas_cumprod) at the end: {at_end:.1f}; estimated share of the way: {estimate:.2f}"
)
assert abs(estimate - 0.258) < 0.02, "the estimate must be near the measured 0.258"

# %% [markdown]
# ## Where do the timesteps go?
#
# Training draws $t$ uniformly. Along $\lambda$ that is not uniform. Where the curve is steep, few timesteps fall on a unit of
# $\lambda$. Where it is flat, many do. The density of timesteps along $\lambda$ is one over the slope:
#
# $$p(\lambda)=\frac1T\,\Big|\frac{\mathrm dt}{\mathrm d\lambda}\Big| .$$
#
# Page [03](03_snr_weightings.ipynb) uses weights that differ from a constant only above SNR 5. Which share of the 1000
# timesteps of the linear schedule lies there?

# %%
QUESTION_ABOVE_5 = "Linear schedule: share of timesteps with SNR above 5 (0 to 1)?"
lesson.predict(QUESTION_ABOVE_5, None)

# %%
NAMES = ["linear", "scaled-linear", "cosine", "sigmoid"]

curves = {name: make_schedule(name).log_snr for name in NAMES}
counts = pd.DataFrame(
    columns=["SNR at t = 0", "SNR > 5, %", "SNR < 1, %", "log-SNR at t = 999"]
)
for name, curve in curves.items():
    above_5 = float((curve > math.log(5)).double().mean())
    below_1 = float((curve < 0).double().mean())
    counts.loc[name] = [
        float(curve[0].exp()),
        100 * above_5,
        100 * below_1,
        float(curve[-1]),
    ]

lesson.reveal(QUESTION_ABOVE_5, counts.loc["linear", "SNR > 5, %"] / 100)
lesson.table(
    counts, caption="Where four schedules spend 1000 timesteps", mark="linear", digits=1
)
assert abs(counts.loc["linear", "SNR > 5, %"] - 13) < 1, (
    "on the linear schedule 13 % lie above 5"
)
assert counts.loc["cosine", "SNR > 5, %"] > 1.9 * counts.loc["linear", "SNR > 5, %"], (
    "twice as many"
)


# %%
def density_over_log_snr(curve):
    slope = torch.gradient(curve)[0]
    return 1 / (1000 * slope.abs())


# %%
PLACES = {  # where a name stands: timestep and log-SNR left, log-SNR and density right
    "linear": (200, -3.6, -10.0, 0.036),
    "scaled-linear": (1020, -5.7, -10.3, 0.118),
    "cosine": (1020, -19.9, 1.6, 0.145),
    "sigmoid": (240, 3.6, 4.2, 0.085),
}

fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
for number, (name, curve) in enumerate(curves.items()):
    colour = f"C{number}"
    left.plot(curve, color=colour, linewidth=2)
    right.plot(curve, density_over_log_snr(curve), color=colour, linewidth=2)
    timestep, height, place, density = PLACES[name]
    left.text(timestep, height, name, color=colour)
    right.text(place, density, name, color=colour)
left.axhline(0, color="0.4", linewidth=1)
right.axvline(0, color="0.4", linewidth=1)
left.text(20, -19.5, "SNR = 1 at the grey lines", color="0.4")
left.set(
    xlabel="timestep (clean → noisy)",
    ylabel="log-SNR",
    xlim=(-40, 1330),
    title="The schedule is one curve",
)
right.set(
    xlabel="log-SNR (noisy → clean)",
    ylabel="density of timesteps",
    xlim=(-13, 11),
    title="Its slope says where timesteps pile up",
)
lesson.show(
    fig,
    "01_schedules",
    title="Uniform in timesteps is not uniform in noise levels",
    caption="Four schedules. The linear one has most of its timesteps at log-SNR below 0, the cosine one as many on either side.",
    alt="Left: four falling curves of log-SNR against timestep; linear falls early, cosine is flat in the middle and drops "
    "at the end. Right: four humps, the density of timesteps over log-SNR; the cosine hump is centred at 0, that of the "
    "linear schedule has a long noisy side.",
)

# %% [markdown]
# The right panel is the one to remember. Two schedules differ in *how often* a noise level is trained. **A change of schedule
# is also a change of loss weighting.**
#
# The last drop of the cosine curve is a detail that matters later. Its formula would end at SNR 0. The published schedule
# caps $\beta$ at 0.999, so the last step falls to the very small SNR in the last column of the table.
#
# **A check by formula.** For the cosine schedule $\bar\alpha=\cos^2(\pi u/2)$ with $u=t/T$, up to a small offset. Then
# $\lambda=2\ln\cot(\pi u/2)$, and the derivative gives a closed form, symmetric about 0:
#
# $$p(\lambda)=\frac1{2\pi\cosh(\lambda/2)} .$$

# %%
cosine = curves["cosine"]
closed_form = 1 / (2 * math.pi * torch.cosh(cosine / 2))
relative_error = density_over_log_snr(cosine) / closed_form - 1
in_the_middle = cosine.abs() < 5
largest = float(relative_error[in_the_middle].abs().max())
print(f"cosine, |log-SNR| < 5: table and closed form agree within {largest:.1%}")
assert largest < 0.02, "the table must have the density of the closed form"

# %% [markdown]
# ## The best possible denoiser
#
# How well can any network do? For the simplest data that are not Gaussian we can say it exactly. Let $x_0$ be $+1$ or $-1$, each half
# of the time. The guess with the least squared error is the conditional mean $\mathbb E[x_0\mid x_t]$.
#
# **Step 1.** How much more likely is $+1$ than $-1$ after we saw $x_t$? The ratio of the two Gaussian densities is
#
# $$\frac{p(x_t\mid+1)}{p(x_t\mid-1)}=\exp\frac{(x_t+\alpha)^2-(x_t-\alpha)^2}{2\sigma^2}=\exp\frac{2\alpha x_t}{\sigma^2}.$$
#
# **Step 2.** With $r$ for that ratio, the probabilities are $\frac r{1+r}$ and $\frac1{1+r}$. Their difference is the mean:
#
# $$\mathbb E[x_0\mid x_t]=\frac{r-1}{r+1}=\tanh\frac{\alpha x_t}{\sigma^2}.$$
#
# `GaussianMixture` computes it for any points. With two points it must give the same:

# %%
POINTS = [-1.0, 1.0]
is_two_points = POINTS == [-1.0, 1.0]

count = len(POINTS)
points = GaussianMixture(
    torch.full((count,), 1 / count),  # equally likely
    torch.tensor(POINTS)[:, None],
    torch.zeros(count),  # standard deviation of each
)

# %%
x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
alpha = schedule.alphas_cumprod[half_way].sqrt().view(1, 1)
sigma = (1 - schedule.alphas_cumprod[half_way]).sqrt().view(1, 1)

best_guess = points.posterior_mean(x_t, alpha, sigma)
if is_two_points:
    torch.testing.assert_close(best_guess, torch.tanh(alpha * x_t / sigma**2))
print("x_t at SNR 1:", [f"{value:.0f}" for value in x_t.flatten()])
print("best x0:     ", [f"{value:.2f}" for value in best_guess.flatten()])

# %% [markdown]
# Far from 0 the best denoiser is sure. At 0 it cannot know, and answers 0.
#
# ## The floor of the loss
#
# The error of the best denoiser is the **floor** of the loss. No network goes below it. DDPM trains on the error of the *noise*.
# From $x_t$ and a guess at $x_0$ a guess at the noise follows, with an error that is $\alpha/\sigma$ times as large. Squared, the
# factor is the SNR:
#
# $$L^\epsilon_t=\mathrm{SNR}_t\,L^x_t .$$
#
# A network that always answers "no noise" has a loss of 1. At $t=0$ there is almost no noise, so it is hard to see. What is
# the smallest loss of the predicted noise that any network can reach there, on the data of two points?

# %%
QUESTION_FLOOR = "Smallest possible noise loss at t = 0, two-point data?"
lesson.predict(QUESTION_FLOOR, None)

# %% [markdown]
# We average the error of the best denoiser over many draws, in five seeds and at 40 noise levels from the cleanest to the noisiest. Two comparisons belong to it:
#
# - **Baseline**: the best *linear* denoiser, a number times $x_t$ plus a constant. For data of variance $V$ its noise loss is
#   $\mathrm{SNR}\,V/(1+\mathrm{SNR}\,V)$.
# - **Control**: Gaussian data of the same variance, where the best denoiser *is* linear.

# %%
level_log_snr = torch.linspace(
    float(log_snr[0]), float(log_snr[-1]), 40, dtype=torch.float64
)
levels = NoiseSchedule(level_log_snr.sigmoid())
SAMPLES = lesson.fast(20_000, 5_000)

variance = float(torch.tensor(POINTS).var(correction=0))
gaussian = GaussianMixture(
    torch.tensor([1.0]), torch.tensor([[0.0]]), torch.tensor([math.sqrt(variance)])
)


def floor_in_five_seeds(data, target):
    floors = []
    for seed in range(5):
        mean_loss, _ = data.irreducible(levels, target, num_samples=SAMPLES, seed=seed)
        floors.append(mean_loss)
    return torch.stack(floors)


# %%
floor_of_points = floor_in_five_seeds(points, "epsilon")
floor_of_points_x0 = floor_in_five_seeds(points, "sample")
floor_of_gaussian = floor_in_five_seeds(gaussian, "epsilon")

snr = levels.log_snr.exp()
linear_denoiser = snr * variance / (1 + snr * variance)
lesson.reveal(QUESTION_FLOOR, round(float(floor_of_points.mean(0)[0]), 3))

torch.testing.assert_close(
    floor_of_points, snr * floor_of_points_x0, rtol=2e-3, atol=1e-6
)
assert (floor_of_points.mean(0) < linear_denoiser + 0.02).all(), (
    "no worse than the linear one"
)
beyond_linear = (floor_of_gaussian.mean(0) - linear_denoiser).abs()
assert (beyond_linear < 0.03).all(), "on Gaussian data the linear one must be the best"

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.8))
ax.plot(levels.log_snr, floor_of_gaussian.mean(0), color="C1", linewidth=5, alpha=0.5)
ax.plot(levels.log_snr, linear_denoiser, color="0.2", linewidth=1.3, linestyle="--")
ax.plot(levels.log_snr, floor_of_points.mean(0), color="C0", linewidth=2.2)
ax.text(2.2, 0.72, "Gaussian data (wide),\nbest linear denoiser (dashed)", color="0.2")
ax.text(2.3, 0.12, f"{count} points", color="C0")
ax.set(
    xlabel="log-SNR (noisy → clean)",
    ylabel="smallest noise loss",
    ylim=(-0.03, 1.08),
)
lesson.show(
    fig,
    "01_floors",
    title="Structure in the data lets the floor fall at clean timesteps",
    caption="The loss that no network can go below, mean of five seeds. Gaussian data have no structure beyond their variance.",
    alt="Smallest noise loss against log-SNR. The curves for Gaussian data and for the best linear denoiser coincide and rise "
    "from 0 to 1. The curve for points follows them on the noisy side, peaks near the middle and falls back to 0.",
)

# %% [markdown]
# You should see the curves together on the noisy side and far apart on the clean side. With two points you know $x_0$
# for sure once the noise is small. So you can subtract it, and the noise is known too: the floor is 0. With Gaussian
# data one cannot tell the noise from the signal.
#
# Images lie in between, and their floor differs from timestep to timestep. So the same loss can be far above the floor at
# one timestep and at the floor at another. Then "weight by loss" and "weight by what can still be learned" are
# different ideas. Page [06](06_dy_sigma_derived.ipynb) comes back to this.
#
# ## A fault: noise that is exactly zero
#
# Training scripts often cast images to `bfloat16` *before* they add noise. The library then casts its table of $\bar\alpha$ to
# the type of the images. A bfloat16 number has eight significant bits, and $\bar\alpha$ near 1 needs more. At how many of the 1000
# timesteps of DDPM's schedule does the noise vanish altogether?

# %%
QUESTION_BF16 = "Timesteps of 1000 with exactly zero noise in bfloat16?"
lesson.predict(QUESTION_BF16, None)

# %%
from diffusers import DDPMScheduler

every_timestep = torch.arange(1000)
no_image = torch.zeros(1000, 1, 1, 1, dtype=torch.bfloat16)
unit_noise = torch.ones(1000, 1, 1, 1, dtype=torch.bfloat16)

of_script = DDPMScheduler(num_train_timesteps=1000).add_noise(
    no_image, unit_noise, every_timestep
)
of_package = NoiseSchedule.linear(1000).add_noise(no_image, unit_noise, every_timestep)

without_noise = int((of_script == 0).sum())
lesson.reveal(QUESTION_BF16, without_noise)
print(f"different noise levels: {len(of_script.unique())} in bfloat16", end=", ")
print(f"{len(of_package.unique())} in the package ({of_package.dtype})")
assert without_noise > 0, "in bfloat16 some timesteps must lose their noise"
assert not (of_package == 0).any(), "in the package none may"

# %% [markdown]
# At those timesteps the network must find noise in a clean image. That is impossible, and the loss there is about 1. `NoiseSchedule`
# keeps its tables in float32 or better, whatever the type of the images.
#
# ## A fault: the last step still knows the image
#
# Sampling starts from pure noise, so training should end in pure noise. It does not: the SNR of the last timestep is
# small, and not 0. A single pixel does not show the difference. But the *mean* over all pixels averages the noise
# away, and the brightness of the image shines through.
#
# Take the schedule of Stable Diffusion, `scaled-linear`. How strongly does the brightness of $x_{999}$ correlate with that
# of the image? 0 would be no trace, 1 a perfect copy.

# %%
QUESTION_BRIGHTNESS = "Correlation of brightness, image and last timestep (0 to 1)?"
lesson.predict(QUESTION_BRIGHTNESS, None)

# %%
many_images = leaves(lesson.fast(2000, 600), size=16).images.float() / 127.5 - 1
last_timestep = torch.full((len(many_images),), 999)
brightness_before = many_images.mean((1, 2, 3))


def correlation_of_brightness(of_schedule, seed):
    draw = generator(seed, 1, "noise")
    some_noise = torch.randn(many_images.shape, generator=draw)
    noised_images = of_schedule.add_noise(many_images, some_noise, last_timestep)
    both = torch.stack([brightness_before, noised_images.mean((1, 2, 3))])
    return float(torch.corrcoef(both)[0, 1])


# %%
as_published = NoiseSchedule.scaled_linear(1000)
rescaled = NoiseSchedule.scaled_linear(1000, zero_terminal_snr=True)

leak = pd.DataFrame(columns=["correlation", "± (95 %)"])
for name, of_schedule in {
    "as published": as_published,
    "zero terminal SNR": rescaled,
}.items():
    of_seeds = [correlation_of_brightness(of_schedule, seed) for seed in range(5)]
    leak.loc[name] = plots.t_interval(of_seeds)

lesson.reveal(QUESTION_BRIGHTNESS, leak.loc["as published", "correlation"])
lesson.table(leak, caption="Brightness of the image and of the last timestep", digits=2)
assert leak.loc["as published", "correlation"] > 0.1, (
    "as published, the image leaves a trace"
)
assert abs(leak.loc["zero terminal SNR", "correlation"]) < 0.1, (
    "rescaled, it leaves none"
)

# %% [markdown]
# The second row is the control: the same schedule, rescaled so that it ends at SNR 0 (Lin et al. 2024). The trace is gone.
#
# Why does it matter? In training on the first schedule, the network can read the brightness of the image from the last
# timestep. Sampling starts from pure noise, which holds no such brightness. Lin et al. found that such models draw
# images of medium brightness only. Zero terminal SNR has a price: at the last timestep $\epsilon$ *is* the input, and
# predicting it says nothing about $x_0$. Predict $v$ or $x_0$ on such a schedule.
#
# **Try it yourself.** In the second code cell, `SCHEDULE = "cosine"`: look at the strip again. In the cell that makes
# `POINTS`, take `[-1.0, 0.0, 1.0]`: what happens to the floor?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
alpha_400 = schedule.alpha[400]
sigma_400 = schedule.sigma[400]
x0 = images
x_400 = alpha_400 * x0 + sigma_400 * noise
v_400 = alpha_400 * noise - sigma_400 * x0
lesson.exercise(
    "1.1",
    expected=x0,
    mistakes={
        "The sign of the second term is wrong.": alpha_400 * x_400 + sigma_400 * v_400,
        "That is the noise, not x0.": sigma_400 * x_400 + alpha_400 * v_400,
        "That is x_t divided by alpha: it still contains the noise.": x_400 / alpha_400,
    },
)
angle = math.atan(1 / math.sqrt(5))
lesson.exercise(
    "1.2",
    expected=2 / math.pi * angle,
    mistakes={
        "That is the share below 5.": 1 - 2 / math.pi * angle,
        "λ has a factor 2 in front: take the square root of 5.": 2
        / math.pi
        * math.atan(1 / 5),
        "u is a share of the whole: divide the angle by π/2.": angle,
    },
)

# %% [markdown]
# **1.1** (●○○, 3 min) A network may also predict the mixture $v=\alpha\epsilon-\sigma x_0$. Given `x_400`, `v_400`, `alpha_400` and
# `sigma_400`, recover $x_0$ in one line.
#
# <details><summary>Hint</summary>
#
# Write down $\alpha x_t$ and $\sigma v$ in terms of $x_0$ and $\epsilon$, and use $\alpha^2+\sigma^2=1$.
#
# </details>

# %%
x0_again = ...
lesson.check("1.1", x0_again)

# %% [markdown]
# **1.2** (●●○, 8 min) Which share of the timesteps of a *cosine* schedule has an SNR above 5? Answer with a formula and no
# table: solve $2\ln\cot(\pi u/2)=\ln5$ for $u$. Use `math.atan`, `math.sqrt` and `math.pi`.
#
# <details><summary>Hint</summary>
#
# $\cot(\pi u/2)=\sqrt5$, and $\cot$ is $1/\tan$. Timesteps *before* $u$ have the larger SNR.
#
# </details>

# %%
share = ...
lesson.check("1.2", share)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
# αx_t = α²x0 + ασε and σv = ασε - σ²x0: in the difference the noise cancels.
x0_again = alpha_400 * x_400 - sigma_400 * v_400
lesson.check("1.1", x0_again)

# %% tags=["solution"]
share = 2 / math.pi * math.atan(1 / math.sqrt(5))
lesson.check("1.2", share)
print(f"formula {100 * share:.1f} %, table {counts.loc['cosine', 'SNR > 5, %']:.1f} %")

# %% [markdown]
# ## What you can now do
#
# You can turn any list of betas, or any scheduler of diffusers (`NoiseSchedule.from_diffusers`), into a log-SNR curve. You can read
# from it where timesteps pile up. You know what the floor of a loss is, and two silent faults to look for in a script.
#
# ## Limitations
#
# - Only variance-preserving schedules with discrete timesteps. Flow matching and EDM have other axes; in log-SNR they are
#   the same story, and page [13](13_your_own_loop.ipynb) converts them.
# - The floors are those of data in one dimension. For images the floor is not known.
# - How strongly brightness leaks depends on the size of the images and on the data. The table holds for 16 × 16 dead
#   leaves.
#
# ## References
#
# - Ho, Jain, Abbeel (2020), *Denoising diffusion probabilistic models*,
#   [arXiv:2006.11239](https://arxiv.org/abs/2006.11239): the linear schedule and the loss on the noise.
# - Nichol, Dhariwal (2021), *Improved denoising diffusion probabilistic models*,
#   [arXiv:2102.09672](https://arxiv.org/abs/2102.09672): the cosine schedule and its cap.
# - Kingma, Salimans, Poole, Ho (2021), *Variational diffusion models*,
#   [arXiv:2107.00630](https://arxiv.org/abs/2107.00630): log-SNR as the one variable of the process.
# - Salimans, Ho (2022), *Progressive distillation for fast sampling of diffusion models*,
#   [arXiv:2202.00512](https://arxiv.org/abs/2202.00512): $v$.
# - Lin, Liu, Li, Yang (2024), *Common diffusion noise schedules and sample steps are flawed*,
#   [arXiv:2305.08891](https://arxiv.org/abs/2305.08891): zero terminal SNR.
# - The table in low precision: [diffusers pull request 9004](https://github.com/huggingface/diffusers/pull/9004).
#
# **Next:** [02, one network, many objectives](02_one_network_many_objectives.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
