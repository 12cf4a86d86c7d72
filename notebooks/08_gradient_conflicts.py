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
# # 08 · Gradient conflicts: measure them without the noise
#
# > **Question.** Do noise levels pull against each other? The cosine between their gradients should tell. But gradients are
# > measured on batches, and batches are noisy. What does this noise do to the answer, and can it be taken out?
#
# **You will be able to**
#
# - predict what noise does to a measured cosine;
# - estimate inner products of gradients without bias, with intervals;
# - compare a measured conflict with what a minimum demands;
# - say why the answer depends on the weights at which one measures.
#
# **You need** log-SNR from [01](01_forward_process_and_snr.ipynb) and the training step of
# [07](07_train_a_compact_ddpm.ipynb). [02](02_one_network_many_objectives.ipynb) shows why the question matters.
#
# **Time** reading 25 min · running about 80 s (short run 25 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.conflicts`, `dysigma.gradients.bin_gramian`, `bin_timesteps`, `cosine_matrix`.

# %%
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display

from dysigma import NoiseSchedule, TrainConfig, conflicts, leaves, plots
from dysigma.bins import Bins
from dysigma.course.lesson import Lesson
from dysigma.course.reader import best_run
from dysigma.exact import LinearDenoiser
from dysigma.gradients import ConflictReport, bin_gramian, bin_timesteps, cosine_matrix
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.runs import load_run, read_json
from dysigma.training import build, iterate

lesson = Lesson("08_gradient_conflicts", trains_on="auto")

# %% [markdown]
# ## One angle, measured many times
#
# We train two small networks that predict noise, on images of dead leaves. Of each we keep three versions: before
# training, at the end, and the running average of the weights (EMA), from which one would sample.

# %%
config = TrainConfig(
    data="leaves",
    image_size=8,
    model="micro",
    images=lesson.fast(9_600, 3_200),
    lr=2e-3,
    device=str(lesson.device),  # a GPU if there is one
)
is_default = config.lr == 2e-3 and lesson.as_published
data = leaves(4096, size=8).to(lesson.device)
schedule = NoiseSchedule.linear(1000).to(lesson.device)
seeds = range(2)


def train_and_keep(seed):
    """Train one network; return its three versions."""
    run = replace(config, seed=seed)
    state = build(run, data)
    before = copy.deepcopy(state.model)
    for _ in iterate(state, data, run):
        pass
    end = copy.deepcopy(state.model)
    state.ema.copy_to(state.model)
    return {"before training": before, "end": end, "end, averaged": state.model}


versions = [train_and_keep(seed) for seed in seeds]
network = versions[0]["end, averaged"]

# %% [markdown]
# Take one averaged network and two timesteps. At $t=80$ images are nearly clean, at $t=700$ they are nearly noise. The
# loss at each of them has a gradient. Do the two gradients point in the same direction? Their cosine tells: 1 is the
# same direction, −1 the opposite one, 0 a right angle.
#
# We measure the cosine on fresh batches, twelve times (four in a short run), for several batch sizes.

# %%
REPEATS = lesson.fast(12, 4)
both = torch.tensor([80, 700])
two_bins = Bins([0, 400, 1000])  # one bin for each of the two timesteps


def gramian_of_batch(model, timesteps, bins, draw, splits=1):
    """Inner products of the gradients of the bins, from one fresh batch."""
    chosen = torch.randint(len(data.images), timesteps.shape, generator=draw)
    x0 = data.images[chosen] / 127.5 - 1
    noise = torch.randn(x0.shape, generator=draw).to(x0.device)
    found = bin_gramian(model, schedule, x0, noise, timesteps, bins, splits=splits)
    return found.cpu()


def measure_often(samples, splits=1):
    """The 2 x 2 matrix of inner products, from REPEATS fresh batches."""
    timesteps = both.repeat_interleave(samples)
    found = []
    for repeat in range(REPEATS):
        draw = generator(repeat, samples, "samples")
        found.append(gramian_of_batch(network, timesteps, two_bins, draw, splits))
    return torch.stack(found)


sizes = [4, 16, 64, lesson.fast(384, 128)]
measured = {}
for samples in sizes:
    measured[samples] = cosine_matrix(measure_often(samples))[:, 0, 1]

# %%
almost_true = float(measured[sizes[-1]].mean())
display(
    Markdown(
        f"With {sizes[-1]} samples of each timestep, the mean cosine is "
        f"**{almost_true:.2f}**."
    )
)

# %%
QUESTION_FOUR = "And the mean cosine, with 4 samples of each timestep?"
lesson.predict(QUESTION_FOUR, None)

# %%
lesson.reveal(QUESTION_FOUR, float(measured[4].mean()))

fig, ax = plt.subplots(figsize=(7.5, 3.8))
for samples in sizes:
    cosines = measured[samples]
    ax.plot([samples] * REPEATS, cosines, "o", color="C0", alpha=0.35)
    ax.plot(
        [samples],
        [cosines.mean()],
        "_",
        color="black",
        markersize=28,
        markeredgewidth=2.5,
    )
ax.axhline(0, color="0.5", linewidth=1)
ax.text(sizes[-1] * 1.25, 0.03, "right angle", color="0.4", ha="right")
ax.set(
    xscale="log",
    xlabel="samples of each timestep",
    ylabel="measured cosine",
    ylim=(-1, 0.6),
)
ax.set_xticks(sizes, [str(samples) for samples in sizes])
ax.minorticks_off()
lesson.show(
    fig,
    "08_angle",
    title="Few samples make opposed gradients look less opposed",
    caption="Cosine of the gradients at t = 80 and t = 700 of one network, several "
    "fresh batches for each size. Black: their mean. It moves towards 0 as batches "
    "get smaller.",
    alt="Dots of measured cosines against the number of samples. At 4 samples they "
    "scatter about a mean close to zero, at the largest size they lie close together "
    "far below zero.",
)
if is_default:
    assert measured[4].mean() > 0.6 * almost_true, "few samples must shrink the cosine"

# %% [markdown]
# Scatter is what one expects of small batches. But the *mean* moves too. Averaging many such cosines does not help. So
# "distant timesteps are nearly orthogonal" may tell more about a batch size than about a network.
#
# ## What an inner product says
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $L_k$ | `losses` | `(K,)` | mean loss of the timesteps of bin $k$ |
# | $g_k$ | | `(P,)` | gradient of $L_k$; $P$ is the number of weights of the network |
# | $G_{ij}=g_i\cdot g_j$ | `gramian` | `(K, K)` | inner products, the **Gramian** |
# | $c_{ij}$ | `cosine` | `(K, K)` | $G_{ij}/\sqrt{G_{ii}G_{jj}}$ |
#
# Take one small step of length $\eta$ down the gradient of bin $i$. What happens to the loss of bin $j$? To first order,
#
# $$L_j(\theta-\eta g_i)-L_j(\theta)\approx-\eta\,g_i\cdot g_j=-\eta\,G_{ij}.$$
#
# If $G_{ij}<0$, a step for $i$ raises the loss of $j$. Then $i$ and $j$ are in **conflict**.
#
# We check this where everything is known exactly: a linear denoiser on Gaussian data
# ([03](03_snr_weightings.ipynb)). It has ten timesteps and 128 weights, and is most of the way to its optimum.

# %%
ten = NoiseSchedule(schedule.alphas_cumprod[50::100])
variances = torch.logspace(0.5, -1, 128, dtype=torch.float64)
toy = LinearDenoiser(ten, variances)
equal = torch.ones(10, dtype=torch.float64)
theta = 0.9 * toy.minimiser(equal)
toy.theta.data = theta
gramian = toy.gramian(theta)

# %%
eta = 1e-3
step = eta * toy.gradients(theta)[0].view_as(theta)  # for the cleanest timestep
change = toy.losses(theta - step) - toy.losses(theta)
predicted = -eta * gramian[0]

lesson.table(
    pd.DataFrame({"predicted × 10⁶": 1e6 * predicted, "real × 10⁶": 1e6 * change}).T,
    caption="A step for timestep 0 of the toy: change of the ten losses (clean → "
    "noisy)",
    digits=2,
)
torch.testing.assert_close(change, predicted, rtol=0.02, atol=1e-8)

# %% [markdown]
# The first-order prediction is right. The step helps the clean timesteps and raises the losses of the noisy ones. So the
# matrix $G$ is worth knowing. How does one measure it?
#
# ## Why noise shrinks the cosine
#
# A batch gives $\hat g_i=g_i+e_i$, where the error $e_i$ has mean 0. Let the bins draw their samples independently. Then
# the errors of two *different* bins are uncorrelated, and the numerator of the cosine is right on average:
#
# $$\mathbb E[\hat g_i\cdot\hat g_j]=g_i\cdot g_j .$$
#
# But an error is never uncorrelated with itself. The denominator holds the squared lengths, and they are too large:
#
# $$\mathbb E|\hat g_i|^2=|g_i|^2+\mathbb E|e_i|^2 .$$
#
# How much too large is one number, the **gradient-to-noise ratio** $\mathrm{gnr}_i=|g_i|^2/\mathbb E|e_i|^2$. It grows in
# proportion to the number of samples. The cosine that one measures is then about
#
# $$c_{ij}\;\sqrt{\frac{\mathrm{gnr}_i}{1+\mathrm{gnr}_i}}\;\sqrt{\frac{\mathrm{gnr}_j}{1+\mathrm{gnr}_j}} .$$
#
# "About", because the mean of a ratio is not the ratio of the means. In the toy, the noise is known in closed form too:

# %%
SAMPLES = 16
noise = toy.noise_trace(theta) / SAMPLES  # E|e|² of each timestep
gnr = gramian.diagonal() / noise
shrink = (gnr / (1 + gnr)).sqrt()

truth = cosine_matrix(gramian)
naive_predicted = truth * shrink[:, None] * shrink[None, :]
display(
    Markdown(
        f"With {SAMPLES} samples of each, timesteps 0 and 3 have the true cosine "
        f"**{truth[0, 3]:.2f}** and gradient-to-noise ratios of {gnr[0]:.1f} and "
        f"{gnr[3]:.2f}."
    )
)

# %%
QUESTION_NAIVE = (
    "Timesteps 0 and 3: mean of the cosines that batches of this size give?"
)
lesson.predict(QUESTION_NAIVE, None)

# %% [markdown]
# `conflicts` measures a network. Here we let it measure the toy many times, each time on 16 samples of each timestep, in
# eight micro-batches of two.

# %%
gaussian = torch.randn(50_000, 128, generator=generator(0, 0, "toy"))
gaussian = gaussian * variances.sqrt().float()


def measure_toy(paired):
    """Many independent measurements of the toy."""
    reports = []
    for seed in range(lesson.fast(50, 20)):
        report = conflicts(
            toy,
            gaussian,
            ten,
            10,
            micro_batches=8,
            batch_per_bin=2,
            paired=paired,
            seed=seed,
            progress=False,
        )
        reports.append(report)
    return reports


independent = measure_toy(paired=False)
naive = torch.stack([report.cosine for report in independent]).mean(0)

lesson.reveal(QUESTION_NAIVE, float(naive[0, 3]))
off = (naive - naive_predicted).fill_diagonal_(0).abs().max()
print(f"largest error of the formula over all 45 pairs: {off:.2f}")
assert off < lesson.fast(0.1, 0.15), "the formula must predict the naive cosine"

# %% [markdown]
# The formula predicts the measured mean of every pair. So the shrinking is understood. It can be undone.
#
# ## Multiply gradients from different batches
#
# The noise enters through the products of a batch *with itself*. So leave those out. Draw $M$ independent micro-batches,
# and let $g_i^m$ be the gradient of bin $i$ on micro-batch $m$. The errors of two different micro-batches are
# independent, also if $i=j$. So each product with $m\ne m'$ has the right mean, and so has their average:
#
# $$\hat G_{ij}=\frac1{M(M-1)}\sum_{m\ne m'}g_i^m\cdot g_j^{m'} .$$
#
# In code, with the gradients of the toy:

# %%
M = 8
draw = generator(0, 0, "estimator")
each_alone = Bins.uniform(10, 10)
timesteps = bin_timesteps(each_alone, SAMPLES, draw).flatten()
x0 = gaussian[: len(timesteps)]
eps = torch.randn(x0.shape, generator=draw)
losses = sample_losses(toy, ten, x0, eps, timesteps)
losses = losses.view(10, SAMPLES // M, M).mean(1)  # (bin, micro-batch)

rows = []
for loss in losses.T.flatten():
    gradient = torch.autograd.grad(loss, toy.theta, retain_graph=True)[0]
    rows.append(gradient.flatten())
g = torch.stack(rows).view(M, 10, -1)

# %%
products = torch.einsum("mip,njp->mnij", g, g)
different = ~torch.eye(M, dtype=torch.bool)
debiased = products[different].mean(0)
naive_gramian = products.mean((0, 1))

# %% [markdown]
# There is no need to keep $M\times M$ products. All of them, minus those of a micro-batch with itself, need two running
# sums, however many micro-batches there are:
#
# $$\hat G=\frac{SS^\top-Q}{M(M-1)},\qquad S=\sum_m g^m,\quad Q=\sum_m g^m(g^m)^\top .$$

# %%
S = g.sum(0)
Q = torch.einsum("mip,mjp->ij", g, g)
streamed = (S @ S.T - Q) / (M * (M - 1))

batch = (x0, eps, timesteps, each_alone)
torch.testing.assert_close(streamed, debiased)
torch.testing.assert_close(
    streamed, bin_gramian(toy, ten, *batch, splits=M), rtol=1e-4, atol=1e-5
)
torch.testing.assert_close(
    naive_gramian, bin_gramian(toy, ten, *batch, splits=1), rtol=1e-4, atol=1e-5
)

lengths = pd.DataFrame(
    {
        "true": 1000 * gramian.diagonal(),
        "naive": 1000 * naive_gramian.diagonal(),
        "debiased": 1000 * debiased.diagonal(),
    }
).T
lesson.table(
    lengths,
    caption="1000 × squared lengths of the ten gradients, one batch",
    mark="debiased",
    digits=1,
)

# %% [markdown]
# The naive squared lengths are too large where the true ones are small. The debiased ones are right on average. They
# still scatter, and one may come out negative: a square that is estimated as negative says "too few samples".
#
# The idea is not new. With $M=2$ it is how MoDo (Chen et al. 2023) and SDMGrad (Xiao et al. 2023) keep the search for
# weights unbiased: they multiply the gradients of two independent batches. All pairs of $M$ micro-batches waste fewer
# samples.
#
# **Shared samples.** Scripts often give all bins the *same* images and noise, to save time. Then the errors of two bins
# are alike. That adds agreement to the naive cosine which comes from the samples alone. The debiased estimate does not
# mind, because different micro-batches are still independent. All four cases, against the truth:

# %%
shared = measure_toy(paired=True)
above = torch.triu_indices(10, 10, 1)
true_pairs = truth[above[0], above[1]]


def mean_over_repeats(reports, is_debiased):
    """Cosines (45,) of the mean report."""
    if is_debiased:
        mean = cosine_matrix(
            torch.stack([report.gramian for report in reports]).mean(0)
        )
    else:
        mean = torch.stack([report.cosine for report in reports]).mean(0)
    return mean[above[0], above[1]]


panels = {
    "each bin draws its own samples": independent,
    "all bins share images and noise": shared,
}
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
for ax, (title, reports) in zip(axes, panels.items(), strict=True):
    ax.plot([-1, 1], [-1, 1], color="0.6", linewidth=1)
    ax.plot(
        true_pairs, mean_over_repeats(reports, False), "o", color="C3", markersize=5
    )
    ax.plot(true_pairs, mean_over_repeats(reports, True), "o", color="C0", markersize=4)
    ax.text(-0.95, 0.83, "naive", color="C3")
    ax.text(-0.95, 0.68, "debiased", color="C0")
    ax.text(-0.62, -0.95, "measured = true", color="0.4")
    ax.set(title=title, xlabel="true cosine", aspect="equal", xlim=(-1.05, 1.05))
axes[0].set(ylabel="measured cosine, mean of many repeats", ylim=(-1.05, 1.05))
lesson.show(
    fig,
    "08_shrink",
    title="The naive cosine is wrong in two ways; the debiased one lies on the "
    "diagonal",
    caption="Each dot is one pair of timesteps of the toy, 16 samples each. "
    "Independent samples pull the naive cosine towards 0. Shared samples push it up: "
    "some conflicts even look like agreement.",
    alt="Two panels of measured against true cosine with the diagonal. Debiased dots "
    "lie on the diagonal in both. Naive dots lie flatter than the diagonal on the "
    "left, and above it on the right.",
)
for reports in panels.values():
    gap = (mean_over_repeats(reports, True) - true_pairs).abs().max()
    assert gap < lesson.fast(0.1, 0.25), "the debiased cosine must be the true one"

# %% [markdown]
# ## How sure is it?
#
# Leave out one micro-batch at a time and see how much the result moves. This is the **jackknife**; `conflicts` turns it
# into 95 % intervals. A bin whose squared length does not stand out of its own error has no known direction. Its cosines
# are left **undetermined**: NaN, and hatched in figures. Do the intervals hold what they promise?

# %%
inside = []
known = []
for report in independent:
    low, high = report.interval()
    determined = low.isfinite()
    known.append(determined[above[0], above[1]])
    inside.append(((low <= truth) & (truth <= high))[above[0], above[1]])
known = torch.stack(known)
inside = torch.stack(inside)
coverage = inside[known].double().mean()

errors = torch.stack([report.cosine_se for report in independent])
estimates = torch.stack([report.cosine_debiased for report in independent])
estimates[~estimates.isfinite()] = torch.nan
spread = np.nanstd(estimates, axis=0)[above[0], above[1]]
claimed = np.sqrt(np.nanmean(errors**2, axis=0))[above[0], above[1]]
too_wide = float(np.median(claimed / spread))
display(
    Markdown(
        f"{(~known).double().mean():.0%} of the cosines are undetermined. Of the "
        f"others, the intervals hold the truth in **{coverage:.0%}** of cases. The "
        f"standard errors are {too_wide:.1f} times the real spread (median)."
    )
)
assert coverage > 0.92, "intervals of 95 % must hold the truth at least about as often"

# %% [markdown]
# More than the promised 95 %. The intervals err on the safe side: the jackknife tends to overestimate a variance
# (Efron and Stein 1981), most with few micro-batches, and we have eight of two samples. We call a pair in "sure
# conflict" if its whole interval lies below 0. With intervals that are too wide this is said too rarely, and not too
# often.
#
# ## Every minimum has conflict
#
# Suppose that training minimises $\sum_k\omega_kL_k$ and has arrived. Then $\sum_j\omega_jg_j=0$. Multiply by $g_i$:
#
# $$\sum_{j\ne i}\omega_jG_{ij}=-\omega_iG_{ii}<0 .$$
#
# So **at a stationary point of the training loss, every bin with a non-zero gradient has a negative inner product with at
# least one other bin.** This holds for any network and any weights.
#
# How much conflict is that? Weigh each pair by its lengths $a_i=\omega_i|g_i|$. At a stationary point the double sum
# $\sum_{i,j}a_ia_jc_{ij}$ is 0, so the part with $i\ne j$ is $-\sum_ia_i^2$. The weighted mean of the cosines is
#
# $$\bar c=\frac{\sum_{i\ne j}a_ia_jc_{ij}}{\sum_{i\ne j}a_ia_j}=-\frac{\sum_ia_i^2}{(\sum_ia_i)^2-\sum_ia_i^2}\;\le\;-\frac1{K-1}.$$
#
# The last step is the Cauchy–Schwarz inequality, and equality holds if all lengths are equal. For ten bins the bound is
# −0.11. The plain mean of the cosines has no such bound.


# %%
def length_weighted_cosine(gramian, share):
    """The mean cosine of different bins, each pair weighed by its lengths."""
    lengths = share * gramian.diagonal().clamp(min=0).sqrt()
    inner = share @ gramian @ share - (share**2 * gramian.diagonal()).sum()
    return inner / (lengths.sum() ** 2 - (lengths**2).sum())


moments = {
    "at the start": torch.zeros_like(theta),
    "at the minimum": toy.minimiser(equal),
}
toy_means = {}
for name, weights_of_toy in moments.items():
    exact = toy.gramian(weights_of_toy)
    plain = cosine_matrix(exact)[above[0], above[1]].mean()
    toy_means[name] = {
        "plain mean cosine": float(plain),
        "length-weighted": float(length_weighted_cosine(exact, equal)),
        "bins without a conflict": int((exact.amin(1) >= 0).sum()),
    }
lesson.table(
    pd.DataFrame(toy_means).T,
    caption="The toy, exactly",
    mark="at the minimum",
    digits=2,
)
assert toy_means["at the minimum"]["length-weighted"] <= -1 / 9 + 1e-9, (
    "the bound must hold"
)
assert toy_means["at the minimum"]["bins without a conflict"] == 0, (
    "each bin must conflict"
)

# %% [markdown]
# The toy goes from full agreement to conflict, and that is how it gets to its minimum. Its plain mean cosine is positive
# even there: many pairs of short gradients agree. So compare the *length-weighted* mean with the bound. And a falling
# cosine alone is no sign of harm.
#
# ## Real networks
#
# Now the trained networks. Ten bins of equal width in log-SNR, so that each holds noise levels that are alike. Before
# you look: of the 45 pairs, which share is in sure conflict at the averaged weights?

# %%
QUESTION_SURE = "Share of pairs in sure conflict, averaged weights (0 to 1)?"
lesson.predict(QUESTION_SURE, None)

# %%
bins = Bins.equal_log_snr(schedule.log_snr, 10)
share = bins.counts.double() / 1000  # training draws timesteps uniformly
SAMPLES_PER_BATCH = {
    "before training": 4,
    "end": lesson.fast(16, 8),
    "end, averaged": lesson.fast(32, 16),
}


def measure(model, per_bin, seed):
    return conflicts(
        model,
        data,
        schedule,
        bins,
        micro_batches=lesson.fast(16, 8),
        batch_per_bin=per_bin,
        seed=seed,
        progress=False,
    )


reports = {}
for version, per_bin in SAMPLES_PER_BATCH.items():
    reports[version] = []
    for seed in seeds:
        reports[version].append(measure(versions[seed][version], per_bin, seed))

# %%
rows = []
for version, of_networks in reports.items():
    for report in of_networks:
        rows.append(
            {
                "weights": version,
                "naive mean cosine": float(report.cosine[above[0], above[1]].mean()),
                "debiased": report.mean_cosine,
                "length-weighted": float(length_weighted_cosine(report.gramian, share)),
                "sure conflict": report.sure_conflict_rate,
                "undetermined": report.undetermined / 45,
            }
        )
results = pd.DataFrame(rows)
means = results.groupby("weights", sort=False).mean()
lesson.reveal(QUESTION_SURE, float(means.loc["end, averaged", "sure conflict"]))
lesson.table(
    means,
    caption=f"Means over {len(seeds)} networks; the last two columns are shares of "
    "the 45 pairs",
    mark="end, averaged",
    digits=2,
)
if is_default:
    assert means.loc["before training", "sure conflict"] == 0, (
        "no conflict before training"
    )
    assert means.loc["end, averaged", "sure conflict"] > 0.2, (
        "conflict at the averaged weights"
    )
    assert means.loc["end, averaged", "length-weighted"] > -1 / 9, (
        "not at a minimum yet"
    )
    assert (
        means.loc["end", "sure conflict"] < means.loc["end, averaged", "sure conflict"]
    ), "the raw weights of the same runs must show less conflict"

# %% [markdown]
# You should see three things.
#
# - **Before training** all bins agree. The first lessons are the same at every noise level.
# - **At the averaged weights** many pairs are in sure conflict, as theory demands near a minimum. The
#   length-weighted mean is still above the bound of −0.11: these networks are not at a minimum yet.
# - **At the raw weights of the same runs, at the same moment,** there is much less conflict.
#
# A likely reason for the third point: training steps are noisy and keep the raw weights at some distance from the
# minimum. At that distance most bins still agree on the way to it. The averaged weights lie closer to the minimum,
# where the bins disagree. We have not tested this reason. In any case, report at which weights you measured.
#
# One averaged network as a matrix: first from few samples, then from many.

# %%
few = measure(network, 4, seed=0)
many = reports["end, averaged"][0]
few_samples = few.settings["micro_batches"] * 4
many_samples = many.settings["micro_batches"] * many.settings["batch_per_bin"]
labels = [f"{value:.0f}".replace("-", "−") for value in many.log_snr]

fig = plt.figure(figsize=(10.5, 6.4))
grid = fig.add_gridspec(2, 2, width_ratios=[1, 2.15], hspace=0.32, wspace=0.22)
upper_left = fig.add_subplot(grid[0, 0])
lower_left = fig.add_subplot(grid[1, 0])
large = fig.add_subplot(grid[:, 1])
plots.heatmap(upper_left, few.cosine, labels=labels, colorbar=False, numbers=False)
plots.heatmap(
    lower_left, few.cosine_debiased, labels=labels, colorbar=False, numbers=False
)
plots.heatmap(large, many.cosine_debiased, labels=labels, colorbar=False)
upper_left.set_title(f"naive, {few_samples} samples a bin")
lower_left.set_title(f"debiased, the same {few_samples} samples")
large.set_title(f"debiased, {many_samples} samples a bin")
for small in (upper_left, lower_left):
    small.tick_params(labelsize=8)
lower_left.set_xlabel("log-SNR (clean → noisy)")
large.set(xlabel="log-SNR of the bin (clean → noisy)", ylabel="log-SNR of the bin")
lesson.show(
    fig,
    "08_matrices",
    title=f"The naive matrix pales the conflicts, and fills in {few.undetermined} of "
    "45 pairs that are not known",
    caption="Cosines between ten bins of one network. Red agrees, blue conflicts, "
    "hatched is undetermined. Left: one set of samples, read in two ways. Right: many "
    "samples.",
    alt="Three ten by ten matrices of cosines. The upper left one is paler, the lower "
    "left one partly hatched. The large one on the right has strong red blocks and "
    "strong blue cells.",
)

# %%
naive_low = (few.cosine[above[0], above[1]].abs() < 0.3).double().mean()
determined = many.cosine_debiased[above[0], above[1]]
determined = determined[determined.isfinite()]
debiased_low = (determined.abs() < 0.3).double().mean()
noisy_half = many.cosine_debiased[5:, 5:]
display(
    Markdown(
        f"With {few_samples} samples and the naive formula, **{naive_low:.0%}** of "
        "the pairs have a cosine between −0.3 and 0.3. Of the pairs that many "
        f"samples determine, {debiased_low:.0%} do. Their cosines reach from "
        f"{determined.min():.2f} to {determined.max():.2f}. Among the five noisiest "
        f"bins the lowest is {noisy_half[noisy_half.isfinite()].min():.2f}."
    )
)

# %% [markdown]
# Blocks of noise levels agree inside, and are opposed to other blocks. Agreement is not a matter of direct neighbours
# only: a whole block of noisy bins can agree. And the furthest noise levels need not be the most opposed.
#
# **A control that must show nothing.** Deal the samples of all timesteps to ten bins in turns. All ten then have the same
# distribution, and the same true gradient. An unbiased estimate must give a mean cosine of 1.


# %%
class Dealt(Bins):
    """Ten bins that take the samples in turns, whatever their timesteps."""

    def index(self, timesteps):
        return torch.arange(len(timesteps)) % self.num_bins


dealt_bins = Dealt(bins.edges)
ratios = []
for repeat in range(REPEATS):
    draw = generator(repeat, 0, "dealt")
    mixed = torch.randint(0, 1000, (10 * lesson.fast(48, 32),), generator=draw)
    alike = gramian_of_batch(network, mixed, dealt_bins, draw, splits=4)
    ratios.append(
        [float(alike[above[0], above[1]].mean()), float(alike.diagonal().mean())]
    )
between, own = np.mean(ratios, axis=0)
print(
    "bins that are alike: mean inner product over mean squared length = "
    f"{between / own:.2f}"
)
if is_default:
    assert abs(between / own - 1) < 0.4, "bins with one distribution must agree"
of_real_bins = means.loc["end, averaged", "debiased"]
print(f"bins of noise levels, from the table above: mean cosine {of_real_bins:.2f}")

# %% [markdown]
# The result is not exactly 1. The averaged weights have short gradients and much noise, so a mean over a few batches
# still scatters; the check allows 0.6 to 1.4. But the bins of noise levels have a mean cosine that is far from it. So
# what the matrix shows is not an artefact of the estimate.
#
# ## How noisy is a training step?
#
# The gradient-to-noise ratio grows with the number of samples. The number at which gradient and noise are equal is the
# **noise scale** (McCandlish et al. 2018). We compute it for the gradient that training uses, where timesteps are random
# too.


# %%
def training_noise_scale(report):
    """Batch size at which the noise of the training gradient equals the gradient."""
    one_sample = report.gramian.diagonal() * (
        1 + report.noise_scale
    )  # E|g|² of one sample
    squared_gradient = share @ report.gramian @ share
    variance = share @ one_sample - squared_gradient
    return float(variance / squared_gradient)


noise_scales = {}
for version, of_networks in reports.items():
    noise_scales[version] = [training_noise_scale(report) for report in of_networks]
lesson.table(
    pd.DataFrame(noise_scales, [f"network {seed}" for seed in seeds]).T,
    caption="Noise scale of the training gradient, in images (– : undetermined)",
    mark="end",
    digits=1,
)
at_end = noise_scales["end"]
averaged = noise_scales["end, averaged"]
more_gradient = sum(scale < config.batch_size for scale in at_end)
display(
    Markdown(
        f"Gradient and noise are equal at **{min(at_end):.0f} to {max(at_end):.0f} "
        f"images** at the raw weights, and at {min(averaged):.0f} to "
        f"{max(averaged):.0f} images at the averaged ones. The batches of this "
        f"training had {config.batch_size} images. So at its end a step holds more "
        f"gradient than noise in **{more_gradient} of {len(at_end)} networks**."
    )
)

# %% [markdown]
# Read the row `end`, the raw weights, because steps are taken there. If the noise scale is near the size of a batch, a step
# is about half gradient and half noise. The averaged weights have shorter gradients and a larger noise scale, but no step is
# ever taken from them.
#
# ## A real data set, and your own network
#
# The networks above are small, so that a page can measure them well. What of CIFAR-10? If you trained a model on page
# [07](07_train_a_compact_ddpm.ipynb) and measured it with `dysigma conflicts`, this cell shows your report. Otherwise it
# shows the record of a small network that was trained on a CPU.

# %%
run = best_run("cifar10-min-snr")
if not (run.path / "conflicts.json").exists():
    print(
        "not measured yet, so here is the record; to measure yours: dysigma "
        f"conflicts {run.path}"
    )
    run = load_run("../data/runs/cifar10-cpu-small")
measured = read_json(run.path / "conflicts.json")["report"]
report = ConflictReport.from_dict(measured)
naive = report.cosine[above[0], above[1]]
samples = report.settings["micro_batches"] * report.settings["batch_per_bin"]
print(
    f"{samples} samples a bin; naive cosines from {naive.min():.2f} to "
    f"{naive.max():.2f}"
)
print(f"pairs of 45 whose sign is not determined: {report.undetermined}")
if run.path.name == "cifar10-cpu-small":
    assert report.undetermined == 45, "in the record not one pair is determined"
    assert naive.min() < -0.8 and naive.max() > 0.9, (
        "although the naive cosines span nearly all"
    )

# %% [markdown]
# In the record, the naive cosines reach from strong conflict to near agreement. **Not one of them is known.** With so few
# samples a bin, a network that has trained on photographs has gradients that drown in noise. A picture of the naive matrix
# would be a picture of that noise. More samples can decide it: try `--micro-batches 64 --batch-per-bin 64` on a GPU.
#
# The record was made by:
#
# ```
# dysigma train --data cifar10 --model small --images 128000 --warmup-images 6400 --validate-every 12800 \
#     --checkpoint-every 6400 --device cpu --out data/runs/cifar10-cpu-small
# dysigma conflicts data/runs/cifar10-cpu-small --data-root $DATA --micro-batches 24 --batch-per-bin 16
# ```
#
# **Try it yourself.** Set `lr=2e-4` where `config` is made: does the gap between raw and averaged weights close?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **8.1** (●○○, 5 min) Three bins with equal weights, at a minimum of the training loss. The gradients of bins 1 and 2 have
# the lengths 3 and 4, and a right angle between them. So they do not conflict. What is the cosine between the gradients of
# bins 1 and 3?
#
# <details><summary>Hint</summary>
#
# At a minimum the three gradients add up to zero. That determines the third one.
#
# </details>
#
# **8.2** (●●○, 8 min) Two bins have noise scales of 20 and 80 samples. From how many samples of each bin on is the naive
# cosine within 10 % of the truth?
#
# <details><summary>Hint</summary>
#
# The gradient-to-noise ratios are $n/20$ and $n/80$. Put them into the formula for the naive cosine, set the factor to
# 0.9, square it, and solve the quadratic equation for $n$.
#
# </details>

# %%
# What the checks of the exercises expect; there is no need to read this cell.
lesson.exercise(
    "8.1",
    expected=-0.6,
    mistakes={
        "That is the cosine between bins 2 and 3.": -0.8,
        "The third gradient is minus the sum of the other two.": 0.6,
        "That is the inner product; divide it by both lengths.": -9.0,
    },
)
lesson.exercise(
    "8.2",
    expected=441.76,
    mistakes={
        "That shrinks both factors to 0.9.": 720.0,
        "Do not forget the square roots.": 915.73,
    },
    rtol=0.001,
)

# %%
cosine_1_3 = ...  # a number
lesson.check("8.1", cosine_1_3)

# %%
samples_needed = ...  # a number
lesson.check("8.2", samples_needed)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
# g3 = -(g1 + g2), so g1 · g3 = -|g1|² = -9, and |g3|² = 3² + 4² = 25.
cosine_1_3 = -9 / (3 * 5)
lesson.check("8.1", cosine_1_3)

# %% tags=["solution"]
# n² = 0.81 (n + 20) (n + 80), so 0.19 n² - 81 n - 1296 = 0.
samples_needed = (81 + (81**2 + 4 * 0.19 * 1296) ** 0.5) / (2 * 0.19)
lesson.check("8.2", samples_needed)

# %% [markdown]
# ## What you can now do
#
# - Ask of any cosine matrix: how many samples, shared or not, at which weights, with what intervals?
# - Measure your own model: `report = dysigma.conflicts(model, images, schedule)`, then `report.table()`,
#   `report.sentences()`, and per group of layers `report.group_gramian`.
# - Compare conflict with what a minimum demands, instead of with 0.
#
# ## Limitations
#
# - One small architecture, images of 8 × 8 pixels, two networks, unweighted losses. A network with more capacity has
#   shorter gradients, and so less conflict, at its minimum.
# - The weighted cosine of a trained network is compared with a bound that holds at a stationary point. Our networks are
#   near one at best.
# - Cosines are shown only where they are determined. That selects bins with large gradients.
# - Conflict says what an infinitely small step does. It does not say where training ends.
#
# ## References
#
# - Chen, Fernando, Ying, Chen, *Three-Way Trade-Off in Multi-Objective Learning*, 2023,
#   [arXiv:2305.20057](https://arxiv.org/abs/2305.20057): MoDo, products of gradients from two independent batches.
# - Xiao, Ban, Ji, *Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms*, 2023,
#   [arXiv:2305.18409](https://arxiv.org/abs/2305.18409): SDMGrad, with the same product.
# - Go, Kim, Lee, Lee, Oh, Moon, Choi, *Addressing Negative Transfer in Diffusion Models*, 2023,
#   [arXiv:2306.00354](https://arxiv.org/abs/2306.00354): timesteps as tasks; affinity falls with distance.
# - Ma, Ning, Liu, Niu, Zhang, *Decouple-Then-Merge*, 2024, [arXiv:2410.06664](https://arxiv.org/abs/2410.06664): a
#   matrix of cosines of timesteps on CIFAR-10.
# - McCandlish, Kaplan, Amodei, *An Empirical Model of Large-Batch Training*, 2018,
#   [arXiv:1812.06162](https://arxiv.org/abs/1812.06162): the noise scale.
# - Efron, Stein, *The Jackknife Estimate of Variance*, Annals of Statistics 9, 1981,
#   [doi:10.1214/aos/1176345462](https://doi.org/10.1214/aos/1176345462): why it errs upwards.
#
# **Next:** [09, acting on conflicts](09_acting_on_conflicts.ipynb): which step does one take, knowing all this? Back to
# the [map](00_start_here.ipynb).

# %%
lesson.end()
