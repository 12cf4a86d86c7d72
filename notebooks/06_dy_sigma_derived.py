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
# # 06 · Derive Dy-Sigma: a predefined weighting that learns
#
# > **Claim.** Predefined and learned weights can be combined in several ways. They differ in one line, and that line
# > decides whether the predefined part survives training. One member has a fixed point in closed form.
#
# **This is a reconstruction.** Dy-Sigma was published by Liu, Ye, Liu and Qin (IJCNN 2024). We know its abstract. The
# formula is unknown to us. Everything below is ours, and none of it is "the" Dy-Sigma.
#
# **You will be able to**
#
# - write down combinations of a predefined and a learned weight, and where each ends;
# - solve the anchored one with Lambert's W function;
# - say which of its bounds survive the division by the mean;
# - read a comparison with paired seeds under three metrics.
#
# **You need** uncertainty weighting and its fixed point ([05](05_learnable_weightings.ipynb)), and the predefined
# weightings ([03](03_snr_weightings.ipynb)).
#
# **Time** reading 30 min · running about 40 s (short run 15 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `make_weighting("dy-sigma", variant=…, prior=…, kappa=…)`, `make_sampler("weighting", …)`,
# `dysigma.lab.convergence.load_races`, `dysigma.exact.OptimalDenoiser`.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.special import lambertw

from dysigma import NoiseSchedule, make_sampler, make_weighting, plots
from dysigma.course.lesson import Lesson
from dysigma.evaluation import validation_losses
from dysigma.exact import GaussianField, OptimalDenoiser, field_floor, gaussian_fields
from dysigma.lab.convergence import load_races
from dysigma.lab.race import Race, race
from dysigma.weightings import fluctuation

lesson = Lesson("06_dy_sigma_derived")

# %% [markdown]
# ## The wish
#
# In our words, the abstract says: predefined weightings are stable but not optimal. Learned ones reach better objectives
# but fluctuate. Dy-Sigma combines both through an uncertainty, and converges 3.7 times faster than a constant weighting.
#
# Many formulas fit these words. The most literal one multiplies the loss by the predefined weight $w_t$ inside the
# likelihood of [05](05_learnable_weightings.ipynb):
#
# $$\textbf{inside:}\quad \sum_t w_tL_te^{-s_t}+s_t,\qquad\text{weight }w_te^{-s_t},\qquad s_t=0\text{ at the start}.$$
#
# Train it to the end twice, with Min-SNR and with Const-x0 as the predefined weight, the *prior*. At the noisiest
# timestep the second prior starts with a larger weight. What is the ratio of the two weights at the end?

# %%
QUESTION_PRIOR = "Inside, at the end, noisiest timestep: weight from const-x0 over weight from min-snr?"
lesson.predict(QUESTION_PRIOR, None)

# %%
PRIOR = "min-snr"
KAPPA = 1.0
is_default = PRIOR == "min-snr" and KAPPA == 1.0
is_full = lesson.fast(True, False)

schedule = NoiseSchedule.linear(1000)
every_timestep = torch.arange(1000)
floor = field_floor(
    schedule, "epsilon"
)  # the exact least losses of the Gaussian images of 05


def mean_one(values):
    return values / values.mean()


def prior_weights(name):
    return make_weighting(name, schedule).weights().double()


def settle(losses, **params):
    """A Dy-Sigma weighting trained on losses (1000,) that stay as they are."""
    weighting = make_weighting("dy-sigma", schedule, bins=1000, **params)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.1)
    for _ in range(lesson.fast(400, 250)):
        optimizer.zero_grad()
        weighting(losses.float(), every_timestep).backward()
        optimizer.step()
    return weighting


WIDE = 20.0  # |s| may grow to this; the package stops at 5 unless told otherwise
inside_min_snr = settle(floor, variant="inside", prior="min-snr", clamp=WIDE).weights()
inside_const_x0 = settle(
    floor, variant="inside", prior="const-x0", clamp=WIDE
).weights()

ratio_start = float(prior_weights("const-x0")[-1] / prior_weights("min-snr")[-1])
ratio_end = float(inside_const_x0[-1] / inside_min_snr[-1])
print(f"ratio at the start {ratio_start:.1f}")
lesson.reveal(QUESTION_PRIOR, ratio_end)

# %% [markdown]
# ## Inside: the prior cancels
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $w_t$ | `prior` | `(T,)` | predefined weight, mean 1 |
# | $L_t,\ L_t^\star$ | `losses`, `floor` | `(T,)` | loss, and the least that any network can reach |
# | $z_t$ | `z` | `(T,)` | $w_tL_t$ over its mean: what $s$ looks at |
# | $s_t,\ s_t^\star$ | `s` | `(T,)` | learned log variance; its fixed point |
# | $\kappa$ | `kappa` | number | how strongly the prior holds |
#
# The derivative by $s_t$ is $1-w_tL_te^{-s_t}$. At the fixed point $e^{-s_t}=1/(w_tL_t)$, so the weight is
# $w_t/(w_tL_t)=1/L_t$. **The prior is gone.** It matters only until $s$ has converged.

# %%
torch.testing.assert_close(
    inside_min_snr.double(), mean_one(1 / floor), rtol=0.02, atol=1e-6
)
torch.testing.assert_close(inside_const_x0, inside_min_snr, rtol=0.02, atol=1e-6)
print("inside ends at 1 / L, from either prior")

# %% [markdown]
# One thing can still hold the weights near the prior: the limit `clamp` on $|s|$. The cells above set it to 20. With the
# package's default of 5, $s$ cannot reach its fixed point everywhere. The table shows what that does to the share of the
# weight on the noisiest tenth of the timesteps:

# %%
prior = prior_weights(PRIOR)
z = mean_one(prior * floor)

clamps = pd.DataFrame(columns=["share on the noisiest tenth, %"])
for clamp in [2.0, 5.0, 20.0]:
    weighting = make_weighting(
        "dy-sigma", schedule, prior=PRIOR, variant="inside", clamp=clamp
    )
    weight = prior * torch.exp(-weighting.fixed_point(z))
    clamps.loc[f"inside, clamp {clamp:g}"] = float(
        100 * weight[900:].sum() / weight.sum()
    )
inverse = 1 / floor
clamps.loc["1 / L"] = float(100 * inverse[900:].sum() / inverse.sum())
lesson.table(
    clamps,
    caption="Where inside ends, for perfect losses",
    mark="inside, clamp 5",
    digits=0,
)
if is_default:
    assert abs(clamps.iloc[1, 0] - 31) < 1, "the default clamp must hold inside back"
    assert abs(clamps.iloc[3, 0] - 83) < 1, "1 / L must put most of the weight there"

# %% [markdown]
# A clamp is a crude remedy: it acts where $s$ is large, and not at all elsewhere.
#
# ## Anchored: uncertainty with a penalty
#
# A smooth remedy is a penalty on $s$. It is small near the prior and grows with the distance from it:
#
# $$\textbf{anchored:}\quad \sum_tz_te^{-s_t}+s_t+\tfrac\kappa2s_t^2,\qquad z_t=\frac{w_tL_t}{\overline{wL}},\qquad\text{weight }w_te^{-s_t}.$$
#
# Is that a Bayesian prior on $s$? Almost. The likelihood of page 05 was $\frac12[Le^{-s}+s]$, and we dropped the ½. So the
# penalty is that of a Gaussian prior on $s_t$ with variance $2/\kappa$, for *one* observation. A Bayesian prior would matter
# less and less as observations accumulate. This penalty stands beside the *mean* over samples, so it always matters as much.
# It is a regulariser.
#
# **The fixed point.** The derivative vanishes at $1+\kappa s=ze^{-s}$. Put $y=s+1/\kappa$. Then $\kappa y=z\,e^{1/\kappa}e^{-y}$,
# so
#
# $$y\,e^y=\frac z\kappa\,e^{1/\kappa}.$$
#
# The function that inverts $ye^y$ is Lambert's $W$. Hence
#
# $$s^\star=W\!\left(\frac z\kappa e^{1/\kappa}\right)-\frac1\kappa .$$


# %%
def anchored(z, kappa):
    argument = z / kappa * math.exp(1 / kappa)
    return torch.as_tensor(lambertw(argument).real) - 1 / kappa


for kappa in [0.25, KAPPA, 4.0]:
    trained = settle(floor, prior=PRIOR, kappa=kappa, clamp=WIDE).weights().double()
    formula = mean_one(prior * torch.exp(-anchored(z, kappa)))
    difference = (trained / formula - 1).abs().max()
    print(
        f"κ = {kappa:g}: largest difference between training and formula {difference:.0e}"
    )
    torch.testing.assert_close(trained, formula, rtol=0.02, atol=1e-6)

# %% [markdown]
# Three consequences:
#
# 1. **Unique.** The second derivative $ze^{-s}+\kappa$ is positive for every $s$.
# 2. **Limits.** $\kappa\to\infty$ gives $s^\star\to0$: the prior. That is our control, where learning must change nothing.
#    $\kappa\to0$ gives $s^\star\to\ln z$: inside.
# 3. **It remembers.** For any other $\kappa$ the final weights depend on the prior.

# %%
strong = settle(floor, prior=PRIOR, kappa=1e6).weights().double()
torch.testing.assert_close(strong, prior, rtol=1e-3, atol=1e-6)
weak = mean_one(prior * torch.exp(-anchored(z, 0.01)))
if is_default:
    torch.testing.assert_close(weak, mean_one(1 / floor), rtol=0.15, atol=1e-6)
print("κ = 1e6 is the prior; κ = 0.01 is nearly 1 / L")

# %%
fig, ax = plt.subplots(figsize=(7.5, 4))
ax.plot(schedule.log_snr, prior, color="0.3", linewidth=2)
ax.text(1.8, 1.3, f"prior: {PRIOR}", color="0.3")
LABEL_SHIFT = {4.0: 0.8, 1.0: 1.15, 0.25: 1.0}  # keeps the labels apart
for number, kappa in enumerate([4.0, 1.0, 0.25]):
    weight = mean_one(prior * torch.exp(-anchored(z, kappa)))
    colour = f"C{number}"
    ax.plot(schedule.log_snr, weight, color=colour, linewidth=2)
    height = weight[-1] * LABEL_SHIFT[kappa]
    ax.text(-10.3, height, f"κ = {kappa:g}", color=colour, ha="right", va="center")
ax.plot(schedule.log_snr, mean_one(1 / floor), color="C3", linewidth=2)
ax.text(
    -10.3,
    mean_one(1 / floor)[-1],
    "learned alone: 1 / L",
    color="C3",
    ha="right",
    va="center",
)
ax.set(
    yscale="log",
    xlim=(-18, 9.5),
    xlabel="log-SNR (noisy → clean)",
    ylabel="weight on the noise error, mean 1",
)
lesson.show(
    fig,
    "06_between",
    title="κ moves the final weights from the predefined to the learned ones",
    caption="Weights at the fixed point, for perfect losses. The large κ stays near the prior; the small "
    "one approaches 1 / L.",
    alt="Weights against log-SNR, logarithmic. Min-SNR is flat on the noisy left. One over L is a steep falling line. "
    "Three anchored curves lie between them in the order of kappa.",
)

# %% [markdown]
# ## What holds after the division by the mean
#
# $W$ is never negative here, so $s^\star\ge-1/\kappa$. A weight $we^{-s}$ is raised by at most $e^{1/\kappa}$, even if its loss is 0.
# For $\kappa=1$ that is 2.72. But the package then divides all weights by their mean. That mean falls when large weights are
# lowered, and a smaller divisor raises the small weights. Take losses that are the same at all timesteps, and the prior
# Const-x0 on the cosine schedule. By which factor, at most, does a weight grow *after* the division?

# %%
QUESTION_RAISE = (
    "Largest raise of a weight of mean 1: κ = 1, prior const-x0, cosine schedule?"
)
lesson.predict(QUESTION_RAISE, None)

# %%
raises = pd.DataFrame(columns=["before dividing by the mean", "weights of mean 1"])
cosine = NoiseSchedule.cosine(1000)
for name in ["const-x0", "debiased", "min-snr"]:
    start = make_weighting(name, cosine).weights().double()
    factor = torch.exp(-anchored(mean_one(start), 1.0))
    end = mean_one(start * factor)
    raises.loc[name] = [float(factor.max()), float((end / start).max())]

lesson.reveal(QUESTION_RAISE, float(raises.iloc[0, 1]))
lesson.table(
    raises, caption="Largest raise at κ = 1, equal losses; e = 2.72", mark="const-x0"
)
assert raises.iloc[:, 0].max() < math.e + 1e-6, (
    "the bound must hold before the division"
)
assert raises.iloc[0, 1] > 100 * math.e, "and fail by far after it"

# %% [markdown]
# So the bound $e^{1/\kappa}$ belongs to `normalize=False`. Const-x0 has nearly all its weight on a few timesteps. When
# those are lowered, dividing by the mean raises all others. And the bound is one-sided in any case: nothing
# limits how far a weight may be *lowered*, except the clamp. With the default prior Min-SNR the two columns are close.
#
# ## The family
#
# Other members keep the prior in other ways. All start at the prior. Two of them need a word. **Excess** looks at
# $L_t-L_t^\star$ instead of $L_t$, because the floor cannot be learned. **Tilt** gives *more* weight to large losses; all
# others give less.
#
# | variant | what $s$ minimises | weight | ends at (up to a factor) |
# |---|---|---|---|
# | inside | $ze^{-s}+s$ | $we^{-s}$ | $1/L$ |
# | outside | $w(Le^{-s}+s)$ | $we^{-s}$ | $w/L$ |
# | tempered | $w(Le^{-s}+s)$, $s$ as in outside | $we^{-s/(1+\kappa)}$ | $wL^{-1/(1+\kappa)}$ |
# | anchored | $ze^{-s}+s+\frac\kappa2s^2$ | $we^{-s}$ | $we^{-s^\star}$, Lambert |
# | excess | the same with $L-L^\star$ in $z$ | $we^{-s}$ | $we^{-s^\star}$, Lambert |
# | tilt | $ze^{-s}+s$ | $we^{+s/(1+\kappa)}$ | $w\,(wL)^{1/(1+\kappa)}$ |
#
# A seventh, *conflict*, also looks at gradients. An eighth, *density*, has a section of its own at the end. Every line of the
# table can be checked by training $s$. We use losses that do not change:

# %%
losses = (
    floor + 0.3 * floor.sqrt()
)  # some learnable part, of another shape than the floor
z_losses = mean_one(prior * losses)
z_excess = mean_one(prior * (losses - floor))

ends_at = {
    "inside": 1 / losses,
    "outside": prior / losses,
    "tempered": prior * losses**-0.5,
    "anchored": prior * torch.exp(-anchored(z_losses, 1.0)),
    "excess": prior * torch.exp(-anchored(z_excess, 1.0)),
    "tilt": prior * z_losses**0.5,
}
for variant, expected in ends_at.items():
    params = {"floor": floor.tolist()} if variant == "excess" else {}
    trained = settle(
        losses, variant=variant, prior=PRIOR, clamp=WIDE, **params
    ).weights()
    off = (trained.double() / mean_one(expected) - 1).abs().mean()
    print(f"{variant:9} weights off by {off:.1%} on average")
    if is_default:
        assert off < 0.05, f"{variant} must end where the table says"

# %% [markdown]
# ## Watch it learn
#
# Now $s$ follows a network that improves. We take losses that fall from 1 to the floor as training goes on, the same for
# both weightings. `uncertainty` starts with equal weights, Dy-Sigma with its prior.

# %%
FRAMES = lesson.fast(24, 6)
STEPS_A_FRAME = lesson.fast(25, 25)


def along_training(name, **params):
    weighting = make_weighting(name, schedule, **params)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=weighting.suggested_lr)
    frames = []
    for step in range(FRAMES * STEPS_A_FRAME):
        if step % STEPS_A_FRAME == 0:
            frames.append(weighting.weights())
        losses = floor + (1 - floor) * math.exp(-step / 60)
        optimizer.zero_grad()
        weighting(losses.float(), every_timestep).backward()
        optimizer.step()
    return frames


of_uncertainty = along_training("uncertainty")
of_dy_sigma = along_training("dy-sigma", prior=PRIOR, kappa=KAPPA)

frames = []
for number in range(FRAMES):
    fig, ax = plt.subplots(figsize=(6.4, 3.8), dpi=90)
    ax.plot(
        schedule.log_snr, prior, color="0.6", linewidth=1.5, label=f"prior ({PRIOR})"
    )
    ax.plot(
        schedule.log_snr,
        of_uncertainty[number],
        color="C3",
        linewidth=2,
        label="uncertainty",
    )
    ax.plot(
        schedule.log_snr, of_dy_sigma[number], color="C0", linewidth=2, label="dy-sigma"
    )
    ax.set(
        yscale="log",
        ylim=(2e-4, 30),
        xlabel="log-SNR (noisy → clean)",
        ylabel="weight, mean 1",
    )
    ax.set_title(
        f"Uncertainty travels far, Dy-Sigma stays nearer · step {number * STEPS_A_FRAME}"
    )
    ax.legend(loc="lower left")
    fig.canvas.draw()
    frames.append(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
    plt.close(fig)

lesson.animate(
    frames,
    "06_weights_along",
    title="Uncertainty travels far, Dy-Sigma stays nearer to its prior",
    caption="Weights of both along the same falling losses. The picture is the last moment.",
    alt="Weights against log-SNR, logarithmic. In the last frame the curve of uncertainty falls steeply from the noisy "
    "left to the clean right, and the curve of Dy-Sigma stays much nearer to the grey one of its prior.",
)

# %%
moved_uncertainty = (of_uncertainty[-1] / of_uncertainty[0]).log().abs().mean()
moved_dy_sigma = (of_dy_sigma[-1] / of_dy_sigma[0]).log().abs().mean()
print(
    f"mean change of the log-weight: {moved_uncertainty:.2f} and {moved_dy_sigma:.2f}"
)
if is_default and is_full:
    assert moved_dy_sigma < moved_uncertainty / 2, "the anchored weights must move less"

# %% [markdown]
# On average, in logarithms, the weights of Dy-Sigma (blue) moved less than half as far as those of uncertainty (red). The
# penalty holds the blue curve nearer to the grey one. The red curve has no reason to stop before $1/L$.
#
# ## A recorded comparison, three metrics
#
# `data/races/weightings-fields.toml` describes a race: a small U-Net on Gaussian images, five paired seeds, 32,000 images. It is
# recorded, and `RECOMPUTE = True` repeats it. Here we read networks that predict the *noise*. Three metrics:
#
# - **total loss**: geometric mean, over timesteps, of the loss over that of Min-SNR with the same seed;
# - **excess loss**: the same for the loss *above the floor*. The floor is that of the same held-out images with the
#   same noise, from the best possible denoiser, so the difference is paired;
# - **likelihood**: $\frac12\int L^\epsilon\,\mathrm d\lambda$ in bits per dimension, minus that of Min-SNR.
#
# Guess again. By total loss, the anchored Dy-Sigma is 13 % better than its prior. By how many per cent does its
# *excess* loss change on the **cleanest** fifth of the timesteps? Negative is better.

# %%
QUESTION_CLEAN = (
    "Dy-Sigma against Min-SNR, excess loss on the cleanest fifth: change in per cent?"
)
lesson.predict(QUESTION_CLEAN, None)

# %%
RECOMPUTE = False  # True: race again, into a new folder, about an hour

folder = Path("../data/runs/weightings-fields")
if RECOMPUTE:
    folder = Path("../data/runs/weightings-fields-again")
    race(Race.read(Path("../data/races/weightings-fields.toml")), folder, jobs=2)
everything = load_races(folder)
record = everything[everything.grid == "epsilon"].sort_values("seed")
at = torch.tensor(record.validation_timesteps.iloc[0])
test_images = gaussian_fields(10_000, size=8, split="test").images[:128]
best_denoiser = OptimalDenoiser(GaussianField(), schedule)
paired_floor = validation_losses(
    best_denoiser, test_images, schedule, "epsilon", timesteps=at
)

final = {}
for name, of_name in record.groupby("arm"):
    final[name] = torch.tensor(
        np.array([losses[-1] for losses in of_name.validation_losses])
    )
for losses_of_name in final.values():
    assert (losses_of_name > paired_floor).all(), (
        "no network may beat the best denoiser"
    )

# %%
SHOWN = [
    "const-eps",
    "const-x0",
    "min-snr",
    "uncertainty",
    "dy-sigma",
    "dy-sigma kappa 4",
]
SHOWN += ["dy-sigma inside", "dy-sigma excess"]
recorded_log_snr = schedule.log_snr[at]


def with_interval(of_seeds, as_ratio):
    centre, half = plots.t_interval(of_seeds.tolist())
    if as_ratio:
        return f"{math.exp(centre):.3f} ×/÷ {math.exp(half):.2f}"
    return f"{centre:+.3f} ± {half:.3f}"


reference = final["min-snr"]
reference_excess = (reference - paired_floor).log()
rows = {}
clean_ratios = {}
for name in SHOWN:
    total = (final[name] / reference).log().mean(1)
    log_excess = (final[name] - paired_floor).log() - reference_excess
    difference = final[name] - reference
    bits = torch.trapezoid(difference, -recorded_log_snr) / 2 / math.log(2)
    clean_ratios[name] = math.exp(log_excess[:, :8].mean())
    rows[name] = {
        "total loss": with_interval(total, True),
        "excess loss": with_interval(log_excess.mean(1), True),
        "excess, clean": clean_ratios[name],
        "excess, middle": math.exp(log_excess[:, 16:24].mean()),
        "excess, noisy": math.exp(log_excess[:, 32:].mean()),
        "bits/dim": with_interval(bits, False),
    }
rows["min-snr"]["total loss"] = "1"
rows["min-snr"]["excess loss"] = "1"
rows["min-snr"]["bits/dim"] = "0"

lesson.reveal(QUESTION_CLEAN, 100 * (clean_ratios["dy-sigma"] - 1))
lesson.table(
    pd.DataFrame(rows).T,
    caption="Noise networks, relative to Min-SNR with the same seed; 95 % intervals, five seeds. "
    "Columns of the fifths: point estimates",
    mark="dy-sigma",
)
assert rows["dy-sigma"]["excess, middle"] < 0.9, "the middle must gain"
assert rows["dy-sigma"]["excess, noisy"] < 0.9, "and high noise too"
total_of_dy_sigma = (final["dy-sigma"] / reference).log().mean().exp()
assert abs(total_of_dy_sigma - 0.87) < 0.01, "by total loss it must be 13 % better"
assert clean_ratios["dy-sigma"] > 1.1, "the clean fifth must get worse"
assert clean_ratios["uncertainty"] > clean_ratios["dy-sigma"], (
    "and more without the anchor"
)

# %%
bits_of = {}
for name, losses_of_name in final.items():
    bits_of[name] = float(
        torch.trapezoid(losses_of_name.mean(0), -recorded_log_snr) / 2 / math.log(2)
    )
levels = f"const-eps {bits_of['const-eps']:.3f}, min-snr {bits_of['min-snr']:.3f}"
print(
    f"diffusion term of the likelihood, bits/dim: {levels}, dy-sigma {bits_of['dy-sigma']:.3f}"
)

covered = float(recorded_log_snr[0] - recorded_log_snr[-1])
whole = float(schedule.log_snr[0] - schedule.log_snr[-1])
print(
    f"the integral covers log-SNR {recorded_log_snr[-1]:.1f} to {recorded_log_snr[0]:.1f} of "
    f"{schedule.log_snr[-1]:.1f} to {schedule.log_snr[0]:.1f}: {covered / whole:.0%} of the range"
)
assert bits_of["const-eps"] == min(bits_of.values()), (
    "the plain noise loss must be best"
)

# %% [markdown]
# Read it metric by metric.
#
# - **Total loss** favours the two without an anchor, because *inside* and *uncertainty* minimise it directly. It
#   also hides the clean timesteps. There the floor is most of the loss, and no training lowers the floor.
# - **Excess loss** shows them. Dy-Sigma is better than Min-SNR in the middle and at high noise, and worse at the clean
#   end. Inside and uncertainty are worse still at the clean end. Over all timesteps their intervals contain 1, so they
#   are not shown to beat Min-SNR.
# - **Likelihood** is best for **const-eps**, the plain noise loss. Dy-Sigma is worse than const-eps. This integral
#   leaves out the clean end of the range, as the last line says, and weightings differ most there.
#
# So no weighting is the best under all three metrics. One variant, *excess*, is slightly better than Min-SNR under
# each of them, by a few per cent. We used this race to choose the default, so its seeds are not an independent test.
# It also does not look at samples. [12](12_the_convergence_race.ipynb) does.
#
# What about the promise of *stable* weights? As in [05](05_learnable_weightings.ipynb) we separate travel from shaking. From
# the logarithms of the recorded weights of ten bins, over the second half of training, we take out a straight line.


# %%
def varies_by(target, name):
    """Fluctuation over time and around the trend, in per cent, mean of the runs."""
    over_time = []
    around_trend = []
    for weights in everything[
        (everything.grid == target) & (everything.arm == name)
    ].bin_weights:
        second_half = np.array(weights)[len(weights) // 2 :]
        over_time.append(float(fluctuation(torch.tensor(second_half)).median()))
        log_weights = np.log(second_half)
        time = np.arange(len(log_weights))
        slope, start = np.polyfit(time, log_weights, 1)
        rest = log_weights - np.outer(time, slope) - start
        around_trend.append(np.median(rest.std(axis=0, ddof=2)))
    return [100 * np.mean(over_time), 100 * np.mean(around_trend)]


stability = pd.DataFrame(columns=["over time, %", "around its trend, %"])
for target, network in {"epsilon": "noise network", "sample": "x0 network"}.items():
    for name in ["uncertainty", "dy-sigma"]:
        stability.loc[f"{network}, {name}"] = varies_by(target, name)
lesson.table(
    stability, caption="Fluctuation of the recorded weights, second half", digits=1
)
travel = stability["over time, %"]
assert travel.iloc[1] < travel.iloc[0] / 2, (
    "the anchor must halve the travel (noise network)"
)
assert travel.iloc[3] < travel.iloc[2] / 2, (
    "the anchor must halve the travel (x0 network)"
)
assert stability.iloc[:, 1].max() < 5, (
    "around the trend all must vary by a few per cent at most"
)

# %% [markdown]
# Most of the difference is travel, and the anchor makes it much shorter. Around the trend all vary by a few per cent
# at most, and Dy-Sigma by less. Part of this remaining variation is still travel, along a curve that is not a straight
# line. So "learned weights fluctuate" is mostly "learned weights have not arrived".
#
# ## Another use of s: how often to draw each timestep
#
# All variants above change the *objective*. There is another place for a learned quantity. Keep the objective
# $\frac1T\sum_tw_tL_t$ as it is, and learn **how often each timestep is drawn**. If timestep $t$ is drawn with probability $p_t$,
# its loss is multiplied by the importance $1/(Tp_t)$. Then the mean does not depend on $p$:
#
# $$\mathbb E_{t\sim p}\left[\frac{w_tL_t}{Tp_t}\right]=\sum_tp_t\,\frac{w_tL_t}{Tp_t}=\frac1T\sum_tw_tL_t .$$
#
# What does depend on $p$ is the noise of the gradient. With $m_t$ the mean squared norm of the gradient of one sample, its
# second moment is
#
# $$S(p)=\frac1{T^2}\sum_t\frac{w_t^2m_t}{p_t}.$$
#
# By the inequality of Cauchy and Schwarz, $S(p)\ge\left(\frac1T\sum_tw_t\sqrt{m_t}\right)^2$, with equality at
# $p_t\propto w_t\sqrt{m_t}$.
#
# **The density variant** puts the anchored $s$ there. Let $q_t$ estimate $m_t$, and let $s$ minimise
# $ze^{-s}+s+\frac\kappa2s^2$ with $z_t\propto w_tq_t$ of mean 1. The weights stay the prior's, and
#
# $$\hat p_t\propto\sqrt{w_t}\;e^{s_t/2},\qquad p_t=(1-u)\,\hat p_t+\frac uT .$$
#
# The exponent is $+s/2$, not $-s$: a timestep with a large gradient is drawn more often. For $\kappa\to0$, $e^{s}=z$ and $\hat p\propto w\sqrt q$, the
# optimum if $q\propto m$. For $\kappa\to\infty$, $\hat p\propto\sqrt w$, which learns nothing. The part $u/T$ bounds the importance by
# $1/u$.
#
# An example with an invented $m_t=L_t^{3/2}$ and the $x_0$ loss. Uniform sampling has $S=1$. What is $S$ when
# timesteps are drawn by $\sqrt w$, with nothing learned?

# %%
QUESTION_DENSITY = "S of drawing timesteps by √w, relative to uniform?"
lesson.predict(QUESTION_DENSITY, None)

# %%
UNIFORM_PART = 0.1

weight_x0 = make_weighting("min-snr", schedule, "sample").weights().double()
loss_x0 = field_floor(schedule, "sample")
squared_norm = loss_x0**1.5


def mixed(density):
    density = density / density.sum()
    return (1 - UNIFORM_PART) * density + UNIFORM_PART / 1000


def second_moment(density):
    return float((weight_x0**2 * squared_norm / density).sum()) / 1000**2


def density_variant(kappa):
    s = anchored(mean_one(weight_x0 * squared_norm), kappa)
    return mixed(weight_x0.sqrt() * torch.exp(s / 2))


uniform = torch.full((1000,), 1 / 1000, dtype=torch.float64)
densities = {
    "uniform": uniform,
    "√w, nothing learned": mixed(weight_x0.sqrt()),
    "density, κ = 1": density_variant(1.0),
    "density, κ = 0.1": density_variant(0.1),
    "the optimum, w √m": weight_x0
    * squared_norm.sqrt()
    / (weight_x0 * squared_norm.sqrt()).sum(),
}
moments = pd.DataFrame(
    columns=["S / S of uniform", "largest importance", "objective / uniform's"]
)
objective = float((weight_x0 * loss_x0).mean())
for name, density in densities.items():
    importance = 1 / (1000 * density)
    mean = float((density * importance * weight_x0 * loss_x0).sum())
    relative = second_moment(density) / second_moment(uniform)
    moments.loc[name] = [relative, float(importance.max()), mean / objective]

lesson.reveal(QUESTION_DENSITY, float(moments.iloc[1, 0]))
lesson.table(
    moments,
    caption="Noise of the gradient for five densities (invented m)",
    mark="density, κ = 1",
)

assert (moments.iloc[:, 2] - 1).abs().max() < 1e-9, (
    "the objective must not depend on the density"
)
assert moments.iloc[1:4, 1].max() <= 1 / UNIFORM_PART + 1e-9, (
    "importance must be at most 1 / u"
)
assert moments.iloc[4, 0] <= moments.iloc[:, 0].min() + 1e-12, (
    "nothing may beat the optimum"
)
torch.testing.assert_close(
    density_variant(1e6), densities["√w, nothing learned"], rtol=1e-3, atol=0
)

# %% [markdown]
# The last column is 1 in every row: the objective is untouched.
#
# The package has this variant. Its weights are those of the prior to the last bit, and before it has learned anything
# it draws by $\sqrt w$. It learns from the gradients of the network's last layer, so it needs a training run, and this
# page has none.

# %%
of_package = make_weighting("dy-sigma", schedule, "sample", variant="density")
sampler = make_sampler(
    "weighting", schedule, weighting=of_package, uniform=UNIFORM_PART
)

plain_weights = make_weighting("min-snr", schedule, "sample").weights()
assert torch.equal(of_package.weights(), plain_weights), (
    "the weights must be those of the prior"
)
torch.testing.assert_close(
    sampler.probabilities(), densities["√w, nothing learned"], rtol=1e-4, atol=0
)
print("weights: those of min-snr; density at the start: √w")

# %% [markdown]
# Most of the gain comes with $\sqrt w$ already, which needs no learning. So $\sqrt w$ is the baseline that a learned density must beat. Whether less noise becomes faster
# training is a question for a race, not for this table.
#
# **Try it yourself.** In the cell below the first prediction: `PRIOR = "const-eps"` or `"const-x0"` (which figures change?),
# `KAPPA = 0.5`. In the cell below the last prediction: `UNIFORM_PART = 0.5`.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
lesson.exercise(
    "6.1",
    expected=3 * math.e,
    mistakes={
        "That is variant inside, without the penalty on s.": math.e,
        "The sign of s is wrong.": 3 / math.e,
    },
)
a_little = torch.tensor([1.0, 1.0001], dtype=torch.float64)
s_of_a_little = anchored(a_little, 3.0)
lesson.exercise(
    "6.2",
    expected=float((s_of_a_little[1] - s_of_a_little[0]) / math.log(1.0001)),
    mistakes={
        "That is variant inside, where nothing holds s.": 1.0,
        "On the right-hand side s changes too: the product has two derivatives.": 1 / 3,
        "The weight is lowered where the loss is large: check the sign of a.": -1 / 4,
    },
    rtol=1e-3,
)

# %% [markdown]
# **6.1** (●○○, 4 min) At which relative loss $z$ does the anchored variant with $\kappa=2$ lower a weight to exactly $1/e$ of
# its prior, before the division by the mean?
#
# <details><summary>Hint</summary>
#
# The factor on the weight is $e^{-s}$, so $s=1$. Put that into the condition of the fixed point.
#
# </details>

# %%
z_needed = ...
lesson.check("6.1", z_needed)

# %% [markdown]
# **6.2** (●●○, 8 min) Is the anchored variant a power of the loss in disguise? Near the prior, where $z$ is close to 1, it
# weighs a timestep like $w\,z^{-a}$. What is $a$ for $\kappa=3$?
#
# <details><summary>Hint</summary>
#
# $a$ is the derivative of $s^\star$ by $\ln z$ at $z=1$. Take the derivative of the condition $1+\kappa s=ze^{-s}$ on both sides.
# On the right-hand side both $z$ and $s$ change.
#
# </details>

# %%
power = ...
lesson.check("6.2", power)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
z_needed = (1 + 2 * 1) * math.exp(1)
lesson.check("6.1", z_needed)

# %% tags=["solution"]
# κ ds/dln z = z e^{-s} (1 - ds/dln z). At z = 1, s = 0 and z e^{-s} = 1, so ds/dln z = 1 / (1 + κ).
# That is the power of variant tempered: the two agree near the prior, and part far from it.
power = 1 / (1 + 3)
lesson.check("6.2", power)

# %% [markdown]
# ## What you can now do
#
# You can say of a combined weighting what it minimises, where it ends, and whether its prior survives. You know which
# bound holds for which normalisation. And you ask under which metric a weighting is better before you believe a factor.
#
# ## Limitations
#
# - A reconstruction. If the paper's formula becomes known, compare it with the table of the family first.
# - One small network, one data set, one learning rate in the race; losses, not samples. The intervals are not corrected
#   for the number of comparisons.
# - The fixed points are for constant losses. In training $s$ follows noisy ones, in bins.
# - The density section is exact for an invented $m_t$. That of a real network must be measured.
#
# ## References
#
# - Liu, Ye, Liu, Qin (2024), *Dy-Sigma: A generalized accelerated convergence strategy for diffusion models*, IJCNN:
#   known to us by its abstract.
# - Hang et al. (2023), *Efficient diffusion training via Min-SNR weighting strategy*,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): the default prior.
# - Kendall, Gal, Cipolla (2018), *Multi-task learning using uncertainty to weigh losses*,
#   [arXiv:1705.07115](https://arxiv.org/abs/1705.07115): the likelihood.
# - Karras et al. (2024), *Analyzing and improving the training dynamics of diffusion models*,
#   [arXiv:2312.02696](https://arxiv.org/abs/2312.02696): EDM2 has the form of inside, with EDM's weights as prior.
# - Corless, Gonnet, Hare, Jeffrey, Knuth (1996), *On the Lambert W function*,
#   [doi:10.1007/BF02124750](https://doi.org/10.1007/BF02124750).
#
# **Next:** [07, train a compact DDPM](07_train_a_compact_ddpm.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
