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
# # 03 · SNR weightings, derived
#
# > **Claim.** A loss weight means nothing until you say on which error it acts. Put on the error of $x_0$, the published
# > weightings are one-line functions of the signal-to-noise ratio.
#
# **You will be able to**
#
# - convert a loss or a weight between networks that predict $x_0$, the noise $\epsilon$, or $v$;
# - derive Min-SNR, P2, the sigmoid, debiased, truncated and EDM weightings, and see them on one chart;
# - say in which measure a weight is stated, and why that matters;
# - compute how many timesteps a weighting really uses;
# - predict which noise levels a weighting serves, and check it on a network that is solved exactly.
#
# **You need** [01](01_forward_process_and_snr.ipynb): log-SNR, and the floor of the loss.
#
# **Time** reading 35 min · running about 20 s (short run 12 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.weightings.effective_sample_size`, `dysigma.weightings.share_changed`,
# `dysigma.exact.LinearDenoiser`; all names of `dysigma.make_weighting`.

# %%
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch

from dysigma import NoiseSchedule, make_weighting, plots
from dysigma.course.lesson import Lesson
from dysigma.data import shapes
from dysigma.exact import GaussianMixture, LinearDenoiser, field_variances
from dysigma.randomness import generator
from dysigma.schedule import make_schedule
from dysigma.weightings import effective_sample_size, share_changed

lesson = Lesson("03_snr_weightings")

# %% [markdown]
# ## One mistake, three losses
#
# A network sees a noisy image $x_t=\alpha x_0+\sigma\epsilon$. We may ask it for the image $x_0$, for the noise $\epsilon$, or for
# the mixture $v=\alpha\epsilon-\sigma x_0$. This is its **target**. As $x_t$ is known, an answer to one of the three questions
# also answers the other two.
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $S,\ \lambda$ | `snr`, `log_snr` | `(T,)` | signal-to-noise ratio $\alpha^2/\sigma^2$ and its natural logarithm |
# | $L^x, L^\epsilon, L^v$ | `loss_x0`, `loss_noise`, `loss_v` | `(T,)` | mean squared error of $x_0$, of $\epsilon$, of $v$ |
# | $w^x, w^\epsilon, w^v$ | `on_x0`, `on_noise`, `on_v` | `(T,)` | the weight on each of these errors |
# | $\gamma$ | `GAMMA` | number | the SNR above which Min-SNR stops to grow |
#
# Imagine a network that makes every image a little too bright. It adds 0.1 to each pixel, at every timestep. Its squared
# error of $x_0$ is then 0.01 at every timestep. Now score the same answers as predictions of the *noise*. By which factor
# does that loss differ between timestep 20, which is nearly clean, and timestep 900, which is nearly noise?

# %%
QUESTION_FACTOR = "Noise loss at t = 20 divided by noise loss at t = 900?"
lesson.predict(QUESTION_FACTOR, None)

# %%
SCHEDULE = "linear"
GAMMA = 5.0
is_default = SCHEDULE == "linear" and GAMMA == 5.0

schedule = make_schedule(SCHEDULE)
log_snr = schedule.log_snr
snr = log_snr.exp()
alpha = schedule.alphas_cumprod.sqrt()[:, None]
sigma = (1 - schedule.alphas_cumprod).sqrt()[:, None]

# %% [markdown]
# One image, at all 1000 noise levels, and one answer in three forms:

# %%
x0 = shapes(1).images.flatten().double() / 127.5 - 1
noise = torch.randn(len(x0), generator=generator(0, 0, "noise"), dtype=torch.float64)
v = alpha * noise - sigma * x0
x_t = alpha * x0 + sigma * noise  # (1000, pixels): a row for each timestep

guess_x0 = (x0 + 0.1).expand_as(x_t)
guess_noise = (x_t - alpha * guess_x0) / sigma
guess_v = alpha * guess_noise - sigma * guess_x0

# %%
loss_x0 = (guess_x0 - x0).square().mean(1)
loss_noise = (guess_noise - noise).square().mean(1)
loss_v = (guess_v - v).square().mean(1)

lesson.reveal(QUESTION_FACTOR, float(loss_noise[20] / loss_noise[900]))

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.6))
ax.plot(log_snr, loss_v, color="C2", linewidth=5, alpha=0.35)
ax.plot(log_snr, loss_noise, color="C0", linewidth=2)
ax.plot(log_snr, loss_x0, color="C3", linewidth=2)
ax.text(-2.2, 4e-5, "error of the noise", color="C0")
ax.text(3.2, 0.0028, "error of x0", color="C3")
ax.text(0.2, 0.3, "error of v (wide)", color="C2", ha="right")
ax.set(xlabel="log-SNR (noisy → clean)", ylabel="mean squared error", yscale="log")
lesson.show(
    fig,
    "03_three_losses",
    title="The same answers have three losses",
    caption="Every image is 0.1 too bright, at every noise level. The error of x0 is constant; that of the noise is a "
    "straight line, and that of v follows the larger of the two.",
    alt="Three curves against log-SNR, logarithmic. The x0 error is a horizontal line, the noise error a rising straight "
    "line that crosses it in the middle, and the v error bends from the first to the second.",
)

# %% [markdown]
# You should see one horizontal line, one straight slope, and one curve that bends from the first to the second. So "the
# loss is large at clean timesteps" is not yet a statement about the network. It also depends on the target.
#
# ## Where the factors come from
#
# **Step 1, the noise.** The true pair and the guessed pair both add up to the same $x_t$:
#
# $$\alpha x_0+\sigma\epsilon=x_t,\qquad \alpha\hat x_0+\sigma\hat\epsilon=x_t .$$
#
# Subtract the two equations:
#
# $$\hat\epsilon-\epsilon=-\frac\alpha\sigma\,(\hat x_0-x_0).$$

# %%
error_x0 = guess_x0 - x0
error_noise = guess_noise - noise
torch.testing.assert_close(error_noise, -alpha / sigma * error_x0)

# %% [markdown]
# **Step 2, $v$.** Put this into $v=\alpha\epsilon-\sigma x_0$, and use $\alpha^2+\sigma^2=1$:
#
# $$\hat v-v=-\Big(\frac{\alpha^2}\sigma+\sigma\Big)(\hat x_0-x_0)=-\frac1\sigma\,(\hat x_0-x_0).$$

# %%
error_v = guess_v - v
torch.testing.assert_close(error_v, -1 / sigma * error_x0)

# %% [markdown]
# **Step 3, square.** With $\alpha^2/\sigma^2=S$ and $1/\sigma^2=1+S$ the losses are
#
# $$L^\epsilon=S\,L^x,\qquad L^v=(1+S)\,L^x .$$

# %%
torch.testing.assert_close(loss_noise, snr * loss_x0)
torch.testing.assert_close(loss_v, (1 + snr) * loss_x0)

# %% [markdown]
# **Step 4, weights go the other way.** The product of weight and loss shall be the same for every target:
# $w^xL^x=w^\epsilon L^\epsilon=w^vL^v$. Hence
#
# $$w^\epsilon=\frac{w^x}{S},\qquad w^v=\frac{w^x}{1+S}.$$
#
# Try it on Min-SNR (Hang et al. 2023). Its weight on the error of $x_0$ is $\min(S,\gamma)$.

# %%
on_x0 = snr.clamp(max=GAMMA)
on_noise = on_x0 / snr
on_v = on_x0 / (1 + snr)

torch.testing.assert_close(on_noise * loss_noise, on_x0 * loss_x0)
torch.testing.assert_close(on_v * loss_v, on_x0 * loss_x0)

by_hand = {"sample": on_x0, "epsilon": on_noise, "v_prediction": on_v}
for target, weight in by_hand.items():
    made = make_weighting("min-snr", schedule, target, gamma=GAMMA, normalize=False)
    torch.testing.assert_close(made.weights(), weight.float())

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.4))
ax.plot(log_snr, on_x0 / on_x0.max(), color="C3", linewidth=2)
ax.plot(log_snr, on_noise / on_noise.max(), color="C0", linewidth=2)
ax.plot(log_snr, on_v / on_v.max(), color="C2", linewidth=2)
ax.text(6.5, 1.04, "on the error of x0", color="C3", ha="center")
ax.text(-6, 1.04, "on the error of the noise", color="C0", ha="center")
ax.text(-1.6, 0.3, "on the error of v", color="C2", ha="right")
ax.set(
    xlabel="log-SNR (noisy → clean)",
    ylabel="weight, largest value 1",
    ylim=(0, 1.15),
)
lesson.show(
    fig,
    "03_three_curves",
    title="Three curves, one weighting: Min-SNR",
    caption="The same objective for a network that predicts x0, the noise or v. Each curve is divided by its maximum.",
    alt="Three curves against log-SNR. The one for x0 rises to a plateau on the clean side, the one for the noise "
    "falls from a plateau on the noisy side, and the one for v is a hump between them.",
)

# %% [markdown]
# One rises, one falls, one is a hump. They are one weighting. So a table of weights says nothing without its target.
#
# **From here on every weight is on the error of $x_0$**, unless a sentence says otherwise. The package does the conversion:
# `make_weighting(name, schedule, target)`.
#
# ## Three plain losses, three weightings
#
# "No weighting" is a weighting too. Which one depends on the target:
#
# | training | weight on its own error | weight on the error of $x_0$ | name |
# |---|---|---|---|
# | predict $x_0$, plain loss | 1 | $1$ | `const-x0` |
# | predict the noise, plain loss: DDPM | 1 | $S$ | `const-eps` |
# | predict $v$, plain loss | 1 | $1+S$ | `const-v` |

# %%
plain = {"const-x0": torch.ones_like(snr), "const-eps": snr, "const-v": 1 + snr}
for name, weight in plain.items():
    made = make_weighting(name, schedule, "sample", normalize=False)
    torch.testing.assert_close(made.weights(), weight.float())

clean_over_noisy = float(plain["const-eps"][0] / plain["const-eps"][-1])
print(
    f"const-eps: weight on x0 at the cleanest timestep is {clean_over_noisy:.0e} times the last"
)

# %% [markdown]
# This is the first design question. On the error of $x_0$, the loss of DDPM weighs the cleanest timestep many orders of magnitude
# more than the noisiest. On the error of the noise it weighs all alike. Both sentences describe the same training. Neither
# says which timesteps end up well served. The last section measures that.
#
# ## Min-SNR: follow S, then stop
#
# Hang et al. (2023) start from `const-eps` and stop the growth: $w^x=\min(S,\gamma)$ with $\gamma=5$. At high noise it is
# DDPM's loss. At clean timesteps it is the plain loss on $x_0$, times 5.
#
# Two relatives use the maximum, $w^x=\max(S,\gamma)$. With $\gamma=1$ it is the **truncated SNR** of Salimans and Ho
# (2022). They wanted a network that predicts $x_0$ to keep some weight where $S$ goes to 0. Hang et al. compare with
# `max-snr`, the same with $\gamma=5$.
#
# In logarithms a minimum stays a minimum: $\ln w^x=\min(\lambda,\ln\gamma)$. This form needs no division. The form
# $\min(S,\gamma)/S$ for the noise error divides by $S$, and fails at $S=0$:

# %%
few_snr = torch.tensor([1e4, 5.0, 0.01, 0.0])
print("min(S, 5) / S at SNR 10000, 5, 0.01 and 0:", few_snr.clamp(max=5) / few_snr)

zero_terminal = NoiseSchedule.linear(1000, zero_terminal_snr=True)
for_v = make_weighting(
    "min-snr", zero_terminal, "v_prediction", normalize=False
).weights()
print(
    "weight on v at the last timestep of a schedule that ends at S = 0:",
    float(for_v[-1]),
)
assert for_v.isfinite().all(), "in logarithms nothing breaks at S = 0"
assert for_v[-1] == 0, "Min-SNR has no weight where there is no signal"

# %% [markdown]
# The 0 in the last line is what the formula says. Is it what one wants? Sampling *starts* at that timestep. One position is
# that Min-SNR, converted correctly, gives it no weight. The other is that the first step of every sample must have some
# weight, so another formula is needed for $v$. This is **contested**, and [04](04_weightings_in_the_wild.ipynb) gives both
# sides with links. We have not measured which gives better samples.
#
# ## Soft corners: three more names
#
# Min-SNR has a corner at $S=\gamma$. Three other weightings bend smoothly:
#
# | name | weight on the error of $x_0$ | source |
# |---|---|---|
# | soft Min-SNR | $\gamma S/(S+\gamma)$ | Crowson et al. 2024 |
# | P2 | $S/(k+S)^{p}$ | Choi et al. 2022 |
# | sigmoid | $S\cdot\mathrm{sigmoid}(b-\lambda)$ | Kingma and Gao 2023 |
#
# (Choi et al. call the exponent $\gamma$, too. We call it $p$ here.) Take $\gamma=4$, $k=4$, $p=1$, $b=\ln 4$, and divide each by its mean, since
# the learning rate absorbs a factor. How much do they differ at most, in per cent, over all timesteps?

# %%
QUESTION_SAME = "Largest difference of the three weightings, in per cent?"
lesson.predict(QUESTION_SAME, None)

# %%
SOFT_GAMMA = 4.0
bias = math.log(SOFT_GAMMA)

soft = make_weighting("soft-min-snr", schedule, "sample", gamma=SOFT_GAMMA).weights()
p2 = make_weighting("p2", schedule, "sample", k=SOFT_GAMMA, gamma=1.0).weights()
sigmoid = make_weighting("sigmoid", schedule, "sample", bias=bias).weights()

from_p2 = float((p2 / soft - 1).abs().max())
from_sigmoid = float((sigmoid / soft - 1).abs().max())
largest_difference = round(100 * max(from_p2, from_sigmoid), 3)
lesson.reveal(QUESTION_SAME, largest_difference)
assert largest_difference < 0.01, "the three must be the same function"

# %% [markdown]
# Why? Divide soft Min-SNR by $\gamma$: that is P2 with $k=\gamma$ and $p=1$. And
#
# $$\frac{\gamma}{S+\gamma}=\frac1{1+S/\gamma}=\frac1{1+e^{\lambda-\ln\gamma}}=\mathrm{sigmoid}(\ln\gamma-\lambda).$$
#
# So in this package a comparison of the three at matching parameters compares a weighting with itself. The published
# versions do differ, as the next section shows.
#
# ## The measure: per timestep or per log-SNR
#
# All weights of this course multiply the loss of a timestep that is **drawn uniformly**. P2 and Min-SNR are stated like
# that in their papers. Kingma and Gao state the sigmoid **per unit of log-SNR**: their loss is an integral over
# $\mathrm d\lambda$. The slope of the schedule converts one into the other:
#
# $$\int w^\epsilon(\lambda)\,L^\epsilon\,\mathrm d\lambda=\int w^\epsilon(\lambda_t)\,\Big|\frac{\mathrm d\lambda}{\mathrm dt}\Big|\,L^\epsilon\,\mathrm dt .$$
#
# So per timestep, their weighting is ours times the slope. How different are the two? We count the **share of the
# weight that sits elsewhere**: how much of the total weight (on the noise error) must move to turn the first curve
# into the second. It is 0 if the measure does not matter. What is it on the linear schedule?

# %%
QUESTION_MEASURE = "Share of the weight that sits elsewhere, linear schedule (0 to 1)?"
lesson.predict(QUESTION_MEASURE, None)

# %%
elsewhere = {}
for name in ["linear", "scaled-linear", "cosine"]:
    lam = make_schedule(name).log_snr
    slope = torch.gradient(lam)[0].abs()  # |dλ/dt|
    ours = torch.sigmoid(bias - lam)
    of_paper = ours * slope
    difference = of_paper / of_paper.mean() - ours / ours.mean()
    elsewhere[name] = float(difference.abs().mean() / 2)

lesson.reveal(QUESTION_MEASURE, elsewhere["linear"])
measures = pd.DataFrame({"share that sits elsewhere": elsewhere}).rename_axis(
    "schedule"
)
lesson.table(measures, caption="One formula, stated per timestep and per log-SNR")
assert min(elsewhere.values()) > 0.05, "the measure must matter on all three schedules"
assert max(elsewhere, key=elsewhere.get) == "cosine", "and most on the cosine one"

# %% [markdown]
# The two differ on every schedule, most on the cosine one, whose slope is steep at both ends. So **the sigmoid of the paper
# is not P2**. It is P2 times the slope of the schedule. The package's `sigmoid` is per timestep, and says so. A weight needs
# three things beside its formula: the target, the measure, and the density from which timesteps are drawn.
#
# ## A compromise: debiased
#
# On the error of $x_0$, `const-x0` weighs by $1$ and `const-eps` by $S$. Yu et al. (2023) take $w^x=\sqrt S$: the geometric mean
# of the two. On the error of the noise this is $1/\sqrt S$, which grows slowly towards high noise. They call it *debiased*.

# %%
debiased = make_weighting("debiased", schedule, "sample", normalize=False).weights()
geometric_mean = (plain["const-x0"] * plain["const-eps"]).sqrt()
torch.testing.assert_close(debiased, geometric_mean.float())

# %% [markdown]
# ## EDM: the inverse of the smallest error
#
# Here is a different idea. Divide each loss by the smallest value that it can have. Then every timestep ends at 1, and no
# loss is large only because its timestep is hard.
#
# For Gaussian data of standard deviation $\sigma_d$ the smallest error is known. Before $x_t$ is seen, the precision
# (inverse variance) of a pixel is $1/\sigma_d^2$. The observation adds precision $S$. The error that remains is the inverse of
# the sum:
#
# $$L^\star=\frac1{S+1/\sigma_d^2}\quad\Longrightarrow\quad w^x=\frac1{L^\star}=S+\frac1{\sigma_d^2}.$$
#
# This is the weight of EDM (Karras et al. 2022). Learned uncertainty (Kendall et al. 2018) also ends at one over the loss, as
# [05](05_learnable_weightings.ipynb) shows. So EDM's weight is where learning ends, *if the data are Gaussian*.
#
# Images are not. Take the other extreme, pixels that are $+\frac12$ or $-\frac12$. These data have $\sigma_d=\frac12$ as well. By which factor
# does $1/L^\star$ exceed EDM's weight at SNR 20?

# %%
QUESTION_EDM = "1/L* of two-point data divided by EDM's weight, at SNR = 20 exactly?"
lesson.predict(QUESTION_EDM, None)

# %% [markdown]
# For two points the best guess is a $\tanh$ ([01](01_forward_process_and_snr.ipynb)), and its error is an integral over one
# Gaussian number $z$:
#
# $$L^\star=\sigma_d^2\,\Big(1-\mathbb E_z\tanh\big(\sigma_d^2S+\sigma_d\sqrt S\,z\big)\Big).$$

# %%
SIGMA_DATA = 0.5
z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
probability = torch.exp(-(z**2) / 2)
probability = probability / probability.sum()


def floor_of_two_points(at_snr):
    argument = SIGMA_DATA**2 * at_snr + SIGMA_DATA * math.sqrt(at_snr) * z
    return SIGMA_DATA**2 * float((probability * (1 - torch.tanh(argument))).sum())


def edm_weight(at_snr):
    return at_snr + 1 / SIGMA_DATA**2


ratio_at_20 = 1 / floor_of_two_points(20.0) / edm_weight(20.0)
lesson.reveal(QUESTION_EDM, ratio_at_20)
if SIGMA_DATA == 0.5:
    assert abs(ratio_at_20 - 4.33) < 0.01, "at SNR 20 the factor must be 4.33"

# %% [markdown]
# Two checks: the formula against random draws, and `edm` of the package against ours.

# %%
two_points = GaussianMixture(
    torch.tensor([0.5, 0.5]),
    torch.tensor([[-SIGMA_DATA], [SIGMA_DATA]]),
    torch.zeros(2),
)
snr_of_check = torch.tensor([20.0, 1.0], dtype=torch.float64)
levels_of_check = NoiseSchedule(snr_of_check / (1 + snr_of_check))
drawn, standard_error = two_points.irreducible(
    levels_of_check, "sample", num_samples=lesson.fast(200_000, 50_000)
)
for i in range(2):
    by_integral = floor_of_two_points(float(snr_of_check[i]))
    print(
        f"SNR {snr_of_check[i]:g}: drawn {drawn[i]:.5f} ± {2 * standard_error[i]:.5f}",
        end=", ",
    )
    print(f"integral {by_integral:.5f}")
    tolerance = 4 * standard_error[i] + 1e-4
    assert abs(drawn[i] - by_integral) < tolerance, "draws must agree with the integral"

edm = make_weighting("edm", schedule, "sample", sigma_data=SIGMA_DATA, normalize=False)
torch.testing.assert_close(edm.weights(), edm_weight(snr).float())

# %%
snr_axis = torch.logspace(-2, 2, 200, dtype=torch.float64)
inverse_floor = [1 / floor_of_two_points(float(value)) for value in snr_axis]

fig, ax = plt.subplots(figsize=(7.5, 3.6))
ax.plot(snr_axis.log(), edm_weight(snr_axis), color="C0", linewidth=2)
ax.plot(snr_axis.log(), inverse_floor, color="C3", linewidth=2)
ax.axvline(math.log(20), color="0.4", linewidth=1, linestyle=":")
ax.text(math.log(20) - 0.1, 2000, "SNR 20", color="0.3", ha="right")
ax.text(3.1, 14, "EDM's weight", color="C0")
ax.text(2.4, 150, "1/L* of two points", color="C3", ha="right")
ax.set(
    xlabel="log-SNR (noisy → clean)",
    ylabel="weight on the error of x0",
    yscale="log",
    ylim=(2, 5000),
)
lesson.show(
    fig,
    "03_inverse_floor",
    title="Structure in the data makes the ideal weight explode at clean levels",
    caption="One over the smallest reachable error, for Gaussian data (EDM's weight) and for data of two points with the "
    "same standard deviation. They agree at high noise.",
    alt="Two curves against log-SNR, logarithmic. They coincide on the noisy left; on the clean right the one for two "
    "points rises far more steeply than EDM's.",
)

# %% [markdown]
# At high noise all data look Gaussian, and the two curves agree. At clean levels the structure shows: the two points can be
# told apart without doubt, the error vanishes, and its inverse explodes. Images lie in between. That gap is what a
# *learned* weight can add to a *predefined* one. [06](06_dy_sigma_derived.ipynb) combines both.
#
# ## All on one chart
#
# For the chart we change the unit once: the weights are now on the error of the **noise**, where DDPM's loss is a
# horizontal line.

# %%
LOWERING = {  # where each name stands on the chart: log-SNR, weight
    "min-snr": (4.6, 0.12),
    "p2": (0.8, 0.012),
}
RAISING = {
    "const-x0": (-10.3, 350),
    "debiased": (-10.3, 12),
    "edm": (-3.5, 500),
    "truncated-snr": (3.4, 1.6),
}


def draw_family(ax, family):
    ax.axhline(1, color="0.7", linewidth=5)
    for number, (name, place) in enumerate(family.items()):
        weight = make_weighting(name, schedule, "epsilon", normalize=False).weights()
        width = 4 - number  # where two coincide, both show
        ax.plot(log_snr, weight, color=f"C{number}", linewidth=width)
        ax.text(*place, name, color=f"C{number}")
    ax.set(xlabel="log-SNR (noisy → clean)", yscale="log", ylim=(5e-4, 1e5))


# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
draw_family(left, LOWERING)
draw_family(right, RAISING)
left.text(-9.6, 1.8, "const-eps (grey): DDPM's loss", color="0.4")
left.set(ylabel="weight on the error of the noise", title="Lower the clean end only")
right.set(title="Raise the noisy end without bound")
lesson.show(
    fig,
    "03_weightings",
    title="Two families: some lower clean timesteps, the others raise noisy ones",
    caption="Formulas with the defaults of the package, not divided by their mean. The grey line is DDPM's loss, weight 1. "
    "On the noisy side truncated-snr (thin) lies on const-x0.",
    alt="Two panels of weight against log-SNR, logarithmic. Left: min-snr and p2 are flat at one on the noisy side and "
    "fall on the clean side. Right: const-x0, debiased, edm and truncated-snr rise towards the noisy side; edm and "
    "truncated-snr are level at one on the clean side.",
)

# %% [markdown]
# Left: `min-snr` and `p2` are DDPM's loss at high noise and less than it at clean timesteps. Right: the other four raise the
# noisy timesteps, by $1/S$ or by its root. `debiased` and `const-x0` lower the clean ones as well. From left to right no
# curve rises: none of these weightings asks for more clean detail than DDPM's loss does.

# %%
for name in [*LOWERING, *RAISING]:
    weight = make_weighting(name, schedule, "epsilon", normalize=False).weights()
    towards_noise = weight.diff()  # timesteps run from clean to noisy
    assert (towards_noise >= -1e-6).all(), f"{name} must never fall from clean to noisy"

# %% [markdown]
# ## How many timesteps does a weighting use?
#
# A batch of 32 draws 32 timesteps. If a few of them have most of the weight, the gradient is a mean over a few, and noisy.
# Suppose each timestep contributes noise of the same size. The variance of the weighted mean is then proportional to
# $\mathbb E[w^2]$, for weights of mean 1. Its inverse is the **effective sample size** (ESS), the share of the batch that
# does the work:
#
# $$\mathrm{ESS}=\frac{(\sum_t w_t)^2}{T\sum_t w_t^2}.$$
#
# It is 1 for equal weights and $1/T$ if one timestep has all the weight. What is it for `const-x0` on a network that
# predicts the noise?

# %%
QUESTION_ESS = "ESS of const-x0 on the noise loss, linear schedule (0 to 1)?"
lesson.predict(QUESTION_ESS, None)

# %%
NAMES = ["const-eps", "min-snr", "soft-min-snr", "p2", "debiased", "edm", "const-x0"]
linear = NoiseSchedule.linear(1000)
cosine = NoiseSchedule.cosine(1000)
everywhere = torch.ones(1000)

uses = pd.DataFrame()
for name in NAMES:
    weight = make_weighting(name, linear, "epsilon").weights().double()
    ess = weight.sum() ** 2 / (1000 * weight.square().sum())
    torch.testing.assert_close(ess, effective_sample_size(weight))
    on_cosine = make_weighting(name, cosine, "epsilon").weights()
    uses.loc[name, "ESS, linear"] = float(ess)
    uses.loc[name, "ESS, cosine"] = float(effective_sample_size(on_cosine))
    uses.loc[name, "changed by > 1 %"] = float(share_changed(weight, everywhere, 0.01))
    uses.loc[name, "changed by > 10 %"] = float(share_changed(weight, everywhere, 0.10))

lesson.reveal(QUESTION_ESS, float(uses.loc["const-x0", "ESS, linear"]))
lesson.table(
    uses,
    caption="Shares of the 1000 timesteps, weights on the noise error (last two columns: linear schedule)",
    mark="const-x0",
)

# %% [markdown]
# The first two columns say how many timesteps do the work. `const-x0` on a noise network works with a small part of every
# batch on the linear schedule. On the cosine one it works with a single timestep: the last one, where the schedule's cap on $\beta$ makes the
# SNR extremely small.
#
# The last two columns say how many timesteps have a weight other than the plain loss, after a common factor is taken
# out. They need a **tolerance**. Min-SNR gives nearly the same share at both tolerances, because it has a corner. Soft
# Min-SNR gives very different shares: it differs from the plain loss by a little almost everywhere, and by more than
# 10 % on a third of the timesteps.

# %%
soft_row = uses.loc["soft-min-snr"]
assert soft_row["changed by > 1 %"] > 0.85, "at 1 % most timesteps count as changed"
assert 0.25 < soft_row["changed by > 10 %"] < 0.40, "at 10 % a third does"
min_snr_row = uses.loc["min-snr"]
assert min_snr_row["changed by > 1 %"] - min_snr_row["changed by > 10 %"] < 0.02, (
    "a corner"
)
assert uses.loc["const-x0", "ESS, cosine"] < 0.002, "one timestep in a thousand"

# %% [markdown]
# Does the formula predict the noise of a mean? We draw batches, give each timestep a unit of noise, and measure the
# variance. The last row is a control: Min-SNR's weights in shuffled order. ESS does not care *which* timesteps are heavy.

# %%
BATCH = 32
REPEATS = lesson.fast(20_000, 6_000)


def measured_ess(weight, seed):
    draw = generator(seed, 0, "ess")
    drawn_timesteps = torch.randint(0, 1000, (REPEATS, BATCH), generator=draw)
    unit_noise = torch.randn(REPEATS, BATCH, generator=draw)
    weighted_means = (weight[drawn_timesteps] * unit_noise).mean(1)
    return float(1 / (BATCH * weighted_means.var()))


# %%
tested = {}
for name in ["min-snr", "p2", "debiased"]:
    tested[name] = make_weighting(name, linear, "epsilon").weights()
order = torch.randperm(1000, generator=generator(0, 0, "shuffle"))
tested["min-snr, shuffled"] = tested["min-snr"][order]

comparison = pd.DataFrame(columns=["measured", "± (95 %)", "formula"])
for name, weight in tested.items():
    of_seeds = [measured_ess(weight, seed) for seed in range(5)]
    mean, half_width = plots.t_interval(of_seeds)
    comparison.loc[name] = [mean, half_width, float(effective_sample_size(weight))]
lesson.table(comparison, caption="Effective sample size, measured in five seeds")

error = (comparison["measured"] / comparison["formula"] - 1).abs()
assert error.max() < 0.06, "the variance must follow the effective sample size"

# %% [markdown]
# The measured values agree with the formula. Keep the assumption in mind: every timestep contributes noise of the same
# size to the gradient of the noise loss. In a real network timesteps differ, and [08](08_gradient_conflicts.ipynb)
# measures the noise of gradients.
#
# ## Which noise levels does a weighting serve?
#
# So far we looked at weights. What do they do to a network? We take one that can be solved exactly. It predicts the noise
# in each Fourier mode of an image as *one coefficient* times the noisy input. All timesteps share this coefficient, so they
# must compromise. The images are Gaussian with the spectrum of photographs. The minimiser of the weighted loss is then a
# linear solve, and the floor of each timestep is known.
#
# `const-eps` gives all timesteps the same weight on the noise error. Which end is served worse? Guess the ratio: excess
# loss (loss above the floor) of the cleanest fifth of the timesteps, divided by that of the noisiest fifth.

# %%
QUESTION_SERVED = (
    "const-eps: excess loss of the cleanest fifth over the noisiest fifth?"
)
lesson.predict(QUESTION_SERVED, None)

# %%
DEGREE = 1

variances = field_variances(8, std=0.5).flatten()
denoiser = LinearDenoiser(schedule, variances, degree=DEGREE)


def excess_after_training(weight_on_noise):
    theta = denoiser.minimiser(weight_on_noise.double())
    return denoiser.losses(theta) - denoiser.irreducible()


# %%
wrong_for_v = snr.clamp(max=GAMMA) / snr + 1  # a 1 in the wrong place, see page 04

weights = {}
for name in ["const-eps", "min-snr", "p2", "const-v", "const-x0"]:
    weights[name] = make_weighting(name, schedule, "epsilon").weights()
weights["wrong Min-SNR for v"] = wrong_for_v * (1 + snr) / snr

excess = {}
for name, weight in weights.items():
    excess[name] = excess_after_training(weight / weight.mean())

clean = slice(0, 200)
noisy = slice(800, 1000)
served = pd.DataFrame(columns=["cleanest fifth", "noisiest fifth", "all timesteps"])
for name, losses in excess.items():
    served.loc[name] = [
        float(losses[clean].mean()),
        float(losses[noisy].mean()),
        float(losses.mean()),
    ]

of_const_eps = served.loc["const-eps"]
lesson.reveal(
    QUESTION_SERVED, of_const_eps["cleanest fifth"] / of_const_eps["noisiest fifth"]
)
lesson.table(
    served,
    caption="Excess loss of the exact minimisers, one shared coefficient",
    mark="const-eps",
    digits=4,
)

# %%
fig, ax = plt.subplots(figsize=(8, 4.2))
ax.plot(log_snr, excess["const-x0"], color="0.75", linewidth=7)
ax.plot(log_snr, excess["const-v"], color="C2", linewidth=3)
ax.plot(log_snr, excess["wrong Min-SNR for v"], color="k", linewidth=1, linestyle="--")
ax.plot(log_snr, excess["p2"], color="C1", linewidth=2)
ax.plot(log_snr, excess["min-snr"], color="C3", linewidth=2)
ax.plot(log_snr, excess["const-eps"], color="C0", linewidth=2)
ax.text(-10, 0.0135, "const-eps", color="C0")
ax.text(-10, 0.0056, "min-snr", color="C3")
ax.text(-10, 0.0020, "p2", color="C1")
ax.text(
    -4.0,
    3.2e-4,
    "const-v, and const-x0 (grey)\nand a wrong Min-SNR (dashed)",
    color="C2",
    ha="right",
)
ax.set(
    xlabel="log-SNR (noisy → clean)",
    ylabel="noise loss above the floor",
    yscale="log",
    ylim=(1e-4, 0.5),
)
lesson.show(
    fig,
    "03_who_is_served",
    title="A weighting moves the compromise between clean and noisy; it does not end it",
    caption="Loss above the floor of the network that minimises each weighted loss exactly. All timesteps share one "
    "coefficient per Fourier mode. The lowest curve on the noisy side is the highest on the clean side.",
    alt="Loss above the floor against log-SNR, logarithmic. On the noisy left const-eps is highest, then min-snr, then p2; "
    "const-v, const-x0 and the wrong formula are one curve far below. On the clean right the order is reversed.",
)

# %% [markdown]
# Read the table and the figure together.
#
# - **Under `const-eps` the clean timesteps are served worse than the noisy ones.** Yet on the error of $x_0$ its weight is
#   largest at the clean end, and no other weighting of the table serves the clean ones better. Equal weights on the noise
#   error do not give equal service. One reason is the number of noisy timesteps: on the linear schedule three quarters of
#   the timesteps have an SNR below 1, and the sum counts each of them.
# - **Min-SNR and P2 go further in the same direction.** They lower the weight of clean timesteps, and the noisy ones gain.
# - **The mean over all timesteps is least for `const-eps`.** It must be: the mean noise loss is what it minimises. So the
#   mean noise loss cannot say which weighting is better.
# - **`const-v`, `const-x0` and the dashed curve coincide.** The dashed one is a formula from public trainers, $\min(S,\gamma)/S+1$ for
#   $v$, which is meant to be Min-SNR. It trains the network of the plain $v$ loss. [04](04_weightings_in_the_wild.ipynb) is about such formulas.

# %%
assert served["all timesteps"].idxmin() == "const-eps", (
    "it minimises the mean noise loss"
)

if is_default and DEGREE == 1:
    means = served["all timesteps"]
    wrong_to_plain_v = means["wrong Min-SNR for v"] / means["const-v"]
    x0_to_plain_v = means["const-x0"] / means["const-v"]
    assert 0.7 < (snr < 1).double().mean() < 0.8, (
        "three quarters of the timesteps are noisy"
    )
    assert of_const_eps["cleanest fifth"] > 5 * of_const_eps["noisiest fifth"], (
        "clean is worst"
    )
    assert abs(wrong_to_plain_v - 1) < 0.01, (
        "the wrong formula must train the plain v network"
    )
    assert abs(x0_to_plain_v - 1) < 0.01, "const-x0 must be close to it as well"
    assert served["noisiest fifth"]["p2"] < served["noisiest fifth"]["min-snr"], (
        "p2 goes further"
    )
    assert served["cleanest fifth"]["p2"] > served["cleanest fifth"]["min-snr"], (
        "and costs more"
    )

# %% [markdown]
# **Control.** Give each timestep its own coefficient. Nothing is shared, nothing must be compromised, and no weighting may
# matter. We use 40 of the levels.

# %%
few_levels = NoiseSchedule(schedule.alphas_cumprod[12::25])
alone = LinearDenoiser(few_levels, variances, degree=40)
for name in ["const-eps", "min-snr", "p2"]:
    weight = make_weighting(name, few_levels, "epsilon").weights().double()
    excess_alone = alone.losses(alone.minimiser(weight)) - alone.irreducible()
    largest = float(excess_alone.abs().max())
    print(f"{name}: largest excess without sharing {largest:.0e}")
    assert largest < 1e-8, "without sharing no weighting must matter"

# %% [markdown]
# So a weighting is an answer to a shortage: of capacity, as here, or of training time. Real networks share far more than one
# coefficient and are never trained to the end. Whether a weighting helps them is a matter of experiments
# ([12](12_the_convergence_race.ipynb)).
#
# **Try it yourself.** `SCHEDULE = "cosine"`, or `GAMMA = 1.0` or `20.0`, in the third code cell: what happens to the hump of Min-SNR?
# `DEGREE = 2` or `3`, above the last table: more capacity, less conflict. `SIGMA_DATA = 1.0`: where do EDM's weight and
# $1/L^\star$ part?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
p2_made = make_weighting("p2", schedule, "v_prediction", normalize=False)
lesson.exercise(
    "3.1",
    expected=p2_made.weights(),
    mistakes={
        "That is the weight on the x0 error; it still has to be converted.": snr
        / (1 + snr),
        "That is the weight on the noise error: you divided by S.": 1 / (1 + snr),
        "A weight is divided by what the loss is multiplied by.": snr,
    },
)
lesson.exercise(
    "3.2",
    expected=math.log(9),
    mistakes={
        "That is k itself; the bias is on the scale of log-SNR.": 9.0,
        "The sign is wrong: a larger k keeps more weight on clean timesteps.": -math.log(
            9
        ),
    },
)
exercise_log_snr = torch.tensor([9.0, 3.0, 1.0, -2.0, -math.inf])
lesson.exercise(
    "3.3",
    expected=torch.tensor([5 * math.exp(-9), 5 * math.exp(-3), 1.0, 1.0, 1.0]),
    mistakes={
        "That is the weight on the x0 error, min(S, 5).": exercise_log_snr.exp().clamp(
            max=5
        ),
        "That takes the maximum.": (math.log(5) - exercise_log_snr).clamp(min=0).exp(),
    },
)

# %% [markdown]
# **3.1** (●●○, 6 min) Write the P2 weight ($k=1$, $p=1$) for a network that predicts $v$, as a function of the tensor `snr`,
# before any division by the mean.
#
# <details><summary>Hint</summary>
#
# Take the row of P2 in the table of soft corners. By which factor is the error of $v$ larger than that of $x_0$?
#
# </details>

# %%
p2_for_v = ...
lesson.check("3.1", p2_for_v)

# %% [markdown]
# **3.2** (●○○, 3 min) A paper uses P2 with $k=9$ and $p=1$. Your trainer has the sigmoid weighting per timestep, and nothing
# else. Which bias $b$ do you give it?
#
# <details><summary>Hint</summary>
#
# The section on soft corners writes $\gamma/(S+\gamma)$ as a sigmoid.
#
# </details>

# %%
bias_for_k_9 = ...
lesson.check("3.2", bias_for_k_9)

# %% [markdown]
# **3.3** (●●○, 8 min) The tensor `exercise_log_snr` holds values of $\lambda$. The last one is $-\infty$: no signal. Compute the Min-SNR
# weight on the *noise* error ($\gamma=5$) from it, so that the last value is 1 and not NaN.
#
# <details><summary>Hint</summary>
#
# $\min(S,\gamma)/S=\min(1,\gamma/S)$, and $\ln(\gamma/S)=\ln\gamma-\lambda$. Take the minimum before the exponential.
#
# </details>

# %%
finite_everywhere = ...
lesson.check("3.3", finite_everywhere)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
p2_on_x0 = snr / (1 + snr)
p2_for_v = p2_on_x0 / (1 + snr)
lesson.check("3.1", p2_for_v)

# %% tags=["solution"]
bias_for_k_9 = math.log(9)
lesson.check("3.2", bias_for_k_9)

# %% tags=["solution"]
log_ratio = math.log(5) - exercise_log_snr
finite_everywhere = log_ratio.clamp(max=0).exp()
lesson.check("3.3", finite_everywhere)

# %% [markdown]
# ## What you can now do
#
# You can take a weighting from a paper or a script, ask on which error and in which measure it acts, and put it on a common
# scale. You know which names stand for the same function. Before training, you can say how many timesteps a weighting uses,
# and which ones it will serve.
#
# ## Limitations
#
# - The effective sample size assumes equal noise of the noise loss at all timesteps. On another error it is another number.
# - The linear network shows the compromise at the *end* of training. Weightings also change the speed of getting there.
# - All weights here are for uniformly drawn timesteps. A sampler that prefers some of them is a weighting too.
# - EDM also draws its levels from a density of its own. Only its weight is treated here.
#
# ## References
#
# - Ho, Jain, Abbeel (2020), *Denoising diffusion probabilistic models*, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239): `const-eps`.
# - Salimans, Ho (2022), *Progressive distillation for fast sampling of diffusion models*,
#   [arXiv:2202.00512](https://arxiv.org/abs/2202.00512): $v$, `const-v` ("SNR + 1") and truncated SNR.
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo (2023), *Efficient diffusion training via Min-SNR weighting strategy*,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556).
# - Choi, Lee, Shin, Kim, Kim, Yoon (2022), *Perception prioritized training of diffusion models*,
#   [arXiv:2204.00227](https://arxiv.org/abs/2204.00227): P2.
# - Crowson, Baumann, Birch, Abraham, Kaplan, Shippole (2024), *Scalable high-resolution pixel-space image synthesis with
#   hourglass diffusion transformers*, [arXiv:2401.11605](https://arxiv.org/abs/2401.11605): soft Min-SNR.
# - Kingma, Gao (2023), *Understanding diffusion objectives as the ELBO with simple data augmentation*,
#   [arXiv:2303.00848](https://arxiv.org/abs/2303.00848): the sigmoid, per log-SNR.
# - Yu, Shen, Huang, H. Li, Zhao and others (2023), *Debias the training of diffusion models*,
#   [arXiv:2310.08442](https://arxiv.org/abs/2310.08442): debiased. A later version has the title *Unmasking bias in diffusion
#   model training*.
# - Karras, Aittala, Aila, Laine (2022), *Elucidating the design space of diffusion-based generative models*,
#   [arXiv:2206.00364](https://arxiv.org/abs/2206.00364): EDM.
# - Kendall, Gal, Cipolla (2018), *Multi-task learning using uncertainty to weigh losses*,
#   [arXiv:1705.07115](https://arxiv.org/abs/1705.07115).
#
# **Next:** [04, weightings in the wild](04_weightings_in_the_wild.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
