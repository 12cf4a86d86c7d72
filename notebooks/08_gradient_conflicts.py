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
# # 08 · Measure gradient conflicts, with the noise taken out
#
# > **Claim.** The cosine between the gradients of two timesteps, measured on a batch, is pulled towards 0 by noise, by a factor that can be
# > derived and undone. What is left is real: timesteps do pull against each other. But part of it *must* appear as
# > training succeeds, and whether one sees it depends on which weights of the network one looks at.
#
# **You will be able to**
#
# - predict how far noise shrinks a measured cosine, and say when a measured "orthogonal" means nothing;
# - estimate inner products of gradients without bias, with intervals, and leave undetermined what is undetermined;
# - tell conflict that hurts from conflict that every minimum has;
# - read off which layers conflict, whom a step hurts, and how noisy each timestep's gradient is.
#
# **You need** log-SNR from [01](01_forward_process_and_snr.ipynb) and the training step of [07](07_train_a_compact_ddpm.ipynb). Negative transfer ([02](02_one_network_many_objectives.ipynb)) and
# the weightings of [06](06_dy_sigma_derived.ipynb) say why one asks.
#
# **Time** reading 35 min · running about 80 s (short run 20 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.gradients.conflicts`, `bin_gramian`, `bin_timesteps`, `cosine_matrix`, `dysigma.bins.Bins`,
# `dysigma.convergence.images_to_threshold`, `speedup`.

# %%
import copy
import functools
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas
import torch

from dysigma import plots
from dysigma.bins import Bins
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.data import leaves
from dysigma.exact import LinearDenoiser
from dysigma.gradients import bin_gramian, bin_timesteps, conflicts, cosine_matrix
from dysigma.lab.convergence import images_to_threshold, load_races, speedup
from dysigma.lab.race import Race, race
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule
from dysigma.training import TrainConfig, build, iterate

show = functools.partial(plots.show, notebook="08_gradient_conflicts")
plots.use_style()
banner("08_gradient_conflicts")

# %% [markdown]
# ## 1 · Two arrows
#
# We train small networks on dead leaves, one per seed, and keep each at three moments. The last one twice: the weights as
# they are, and their running average (EMA), which is what one samples from.

# %%
config = TrainConfig(
    data="leaves", image_size=8, model="micro", images=fast(16_000, 3_200), lr=2e-3, device="cpu"
)
data, schedule, seeds = leaves(4096, size=8), NoiseSchedule.linear(1000), range(fast(4, 2))
STAGES = ("before training", "after 50 steps", "end", "end, averaged")


def stages(seed):
    """The state of training at each of STAGES."""
    run = replace(config, seed=seed)
    state = build(run, data)
    kept = [copy.deepcopy(state)]
    for record in iterate(state, data, run):
        kept += [copy.deepcopy(state)] if record.step == 49 else []
    averaged = copy.deepcopy(state)
    averaged.ema.copy_to(averaged.model)
    print(f"network {seed} trained", end=", ", flush=True)
    return dict(zip(STAGES, [*kept, state, averaged], strict=True))


states = [stages(seed) for seed in seeds]
network = states[0]["end, averaged"].model

# %% [markdown]
# One network, its averaged weights, and two timesteps: $t=80$, where images are nearly clean, and $t=700$, where little but noise is left. The
# gradient of each one's loss is an arrow in a space with as many dimensions as there are weights. Two arrows span a plane, so their lengths and the
# angle between them can be drawn. We measure both on 4, 64 and 512 samples, twelve times each, always on fresh ones.


# %%
def gramians(model, cut, timesteps, splits=1):
    """Gramians (S, K, K) of the bins of cut, each from a fresh batch at timesteps(draw) (B,)."""
    made = []
    for draw in (generator(seed, 0, "samples") for seed in range(fast(12, 4))):
        t = timesteps(draw)
        x0 = data.images[torch.randint(len(data.images), t.shape, generator=draw)] / 127.5 - 1
        noise = torch.randn(x0.shape, generator=draw)
        made.append(bin_gramian(model, schedule, x0, noise, t, cut, splits=splits))
    return torch.stack(made)


fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
counts, both = (4, 64, 512), torch.tensor([80, 700])
plain = [
    gramians(network, Bins([0, 400, 1000]), lambda _, n=n: both.repeat_interleave(n))
    for n in counts
]
true = plain[-1].mean(0)
for ax, n, G in zip(axes, counts, plain, strict=True):
    low, high = (G / true).diagonal(dim1=1, dim2=2).sqrt().T
    cosine, best = cosine_matrix(G)[:, 0, 1], cosine_matrix(true)[0, 1]
    for x, y, colour in ((low, 0 * low, "C0"), (high * cosine, high * cosine.arccos().sin(), "C1")):
        ax.quiver(
            0 * x,
            0 * x,
            x,
            y,
            color=colour,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.007,
            alpha=0.6,
        )
    ax.plot([1, 0, best], [0, 0, best.arccos().sin()], color="black", linewidth=2.5)
    title = f"{n} samples: cosine {cosine.mean():.2f}".replace("-", "−")
    ax.set(xlim=(-2.4, 4), ylim=(-0.3, 4.6), aspect="equal", title=title)
show(
    fig,
    "08_arrows",
    title="The gradients of two timesteps, measured over and over",
    caption="Few samples make arrows too long and turn them towards a right angle. Blue: t = 80, laid to the right; orange: t = 700, at the measured angle. Black: all samples of the right panel taken together, drawn with length 1.",
    alt="Three panels: thin blue arrows to the right and a fan of thin orange ones, beside black lines of length 1 to the right and to the upper left. With 4 samples the arrows are two to four times longer than the lines and the orange ones stand near the vertical; with 512 all nearly coincide with the lines.",
)

# %% [markdown]
# The scatter is no surprise. The *drift* is: few samples do not only spread the angle, they move its mean towards a right angle.
#
# ## 2 · Why the naive cosine shrinks
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $g_k,\ \hat g_k$ | `g` | `(P,)` | gradient of the expected loss of bin $k$ of the timesteps; its average over $n$ samples |
# | $C_k$ | `noise_trace` | | covariance of one sample's gradient; only its trace is needed |
# | $G_{ij}=g_i\cdot g_j$ | `gramian` | `(K, K)` | inner products |
# | $c_{ij}$ | `cosine_debiased` | `(K, K)` | $G_{ij}/\sqrt{G_{ii}G_{jj}}$; bins $i$ and $j$ **conflict** if it is negative |
# | $\mathrm{gnr}_k$ | `gnr` | `(K,)` | gradient-to-noise ratio $n\,\lVert g_k\rVert^2/\mathrm{tr}\,C_k$ |
# | $\omega_k$ | `share` | `(K,)` | weight of bin $k$ in the training loss |
#
# Write $\hat g_i=g_i+e_i$ with $\mathbb E\,e_i=0$. If bins draw their samples independently, the errors of two bins are uncorrelated; but no
# error is uncorrelated with itself:
#
# $$\mathbb E[\hat g_i\cdot\hat g_j]=g_i\cdot g_j,\qquad \mathbb E|\hat g_i|^2=|g_i|^2+\frac{\mathrm{tr}\,C_i}{n}=|g_i|^2\,\frac{1+\mathrm{gnr}_i}{\mathrm{gnr}_i}.$$
#
# The numerator of the cosine is right on average, the denominator is too large:
#
# $$\text{naive cosine}\;\approx\;c_{ij}\,\sqrt{\frac{\mathrm{gnr}_i}{1+\mathrm{gnr}_i}}\,\sqrt{\frac{\mathrm{gnr}_j}{1+\mathrm{gnr}_j}} .$$
#
# (Approximately: the mean of a ratio is not the ratio of the means.) If bins *share* images and noise, as scripts do to save time,
# $\mathrm{tr}\,\mathrm{Cov}(e_i,e_j)$ joins the numerator: agreement that comes from the samples.
#
# We test this where gradients, Gramian and noise are known in closed form: a linear denoiser on Gaussian data (notebook [03](03_snr_weightings.ipynb)), ten timesteps, 128 weights, on its way to
# the optimum. With 16 samples each, timesteps 0 and 3 have a true cosine of −0.70 and gradient-to-noise ratios of 3.4 and 0.84. What will the naive cosine read on
# average?

# %%
QUESTION_NAIVE = "True cosine −0.70, gradient-to-noise ratios 3.4 and 0.84: the naive cosine?"
predict(QUESTION_NAIVE, -0.6)

# %%
ten = NoiseSchedule(schedule.alphas_cumprod[50::100])
variances = torch.logspace(0.5, -1, 128, dtype=torch.float64)
toy, equal = LinearDenoiser(ten, variances), torch.ones(10, dtype=torch.float64)
gaussian = torch.randn(50_000, 128, generator=generator(0, 0, "toy")) * variances.sqrt().float()
toy.theta.data = 0.9 * toy.minimiser(equal)
gramian, trace = toy.gramian(toy.theta.detach()), toy.noise_trace(toy.theta.detach())


def pairs(matrices):
    """The 45 entries above the diagonal of (..., 10, 10)."""
    return matrices[..., *torch.triu_indices(10, 10, 1)]


gnr, truth = 16 * gramian.diagonal() / trace, pairs(cosine_matrix(gramian))
shrink = (gnr / (1 + gnr)).sqrt()
series = {"truth": truth, "naive, predicted": truth * pairs(shrink * shrink[:, None])}
for kind in ("independent", "shared"):
    options = {
        "micro_batches": 8,
        "batch_per_bin": 2,
        "paired": kind == "shared",
        "progress": False,
    }
    reports = [
        conflicts(toy, gaussian, ten, 10, seed=seed, **options) for seed in range(fast(60, 20))
    ]
    series[f"naive, {kind} samples"] = pairs(torch.stack([report.cosine for report in reports]))
    mean = torch.stack([report.gramian for report in reports]).mean(0)
    series[f"debiased, {kind} samples"] = pairs(cosine_matrix(mean))
    off = (series[f"naive, {kind} samples"].mean(0) - series["naive, predicted"]).abs().max()
    gap = (series[f"debiased, {kind} samples"] - truth).abs().max()
    print(
        f"{kind} samples, largest error: {off:.2f} of the prediction of the naive cosine, {gap:.2f} debiased"
    )
    assert (off < 0.1) == (kind == "independent"), (
        "the formula must hold for independent samples, and only for them"
    )
    assert gap < fast(0.1, 0.2), "the debiased cosine must be the true one"
fig, ax = plt.subplots(figsize=(8, 4.2))
plots.trajectories(
    ax, np.arange(45), {name: values[..., truth.argsort()] for name, values in series.items()}
)
ax.set(xlabel="pair of timesteps, sorted by the truth", ylabel="cosine")
show(
    fig,
    "08_shrink",
    title="Where the truth is known: cosines from 16 samples of each timestep, mean of many repeats",
    caption="Independent samples shrink the naive cosine exactly as predicted. Shared ones bend it upwards and hide conflicts. The debiased estimate finds the truth in both cases.",
    alt="The 45 pairs of timesteps in order of their true cosine, a rising step from −1 to 1. Predicted and measured naive cosines of independent samples coincide, closer to 0 than the truth. The naive curve of shared samples lies above them, near 0 where the truth is −0.5. The two debiased curves coincide with the truth.",
)
reveal(
    QUESTION_NAIVE, float(series["naive, independent samples"].mean(0)[2])
)  # pair 2 is that of timesteps 0 and 3

# %% [markdown]
# ## 3 · The estimator
#
# How does the debiased curve do it? Draw $M$ independent micro-batches with gradients $g_i^m$. A product of *two different* micro-batches has
# independent errors, so its expectation is $g_i\cdot g_j$: for $i\ne j$, for $i=j$, and also if bins share samples *within* a micro-batch. Average over all
# ordered pairs. All products, minus those of a micro-batch with itself, need two running sums:
#
# $$\hat G_{ij}=\frac1{M(M-1)}\sum_{m\ne m'}g_i^m\cdot g_j^{m'}=\frac{S_i\cdot S_j-q_{ij}}{M(M-1)},\qquad S_i=\sum_mg_i^m,\quad q_{ij}=\sum_mg_i^m\cdot g_j^m .$$
#
# This U-statistic streams: $K$ vectors and $K\times K$ numbers, however large $M$ is.

# %%
draw, each_alone = generator(0, 0, "estimator"), Bins.uniform(10, 10)
timesteps = bin_timesteps(each_alone, 16, draw).flatten()  # 16 samples of each timestep
batch = gaussian[:160], torch.randn(160, 128, generator=draw), timesteps
losses = sample_losses(toy, ten, *batch).view(10, 2, 8).mean(1)  # eight micro-batches of two
flat = [
    torch.autograd.grad(loss, toy.theta, retain_graph=True)[0].flatten()
    for loss in losses.T.flatten()
]
g = torch.stack(flat).view(8, 10, -1)

S, q = g.sum(0), torch.einsum("mip,mjp->ij", g, g)
streamed = (S @ S.T - q) / (8 * 7)
by_pairs = sum(g[m] @ g[n].T for m in range(8) for n in range(8) if m != n) / 56
torch.testing.assert_close(
    streamed, by_pairs, msg="the streamed sum must be the mean over all pairs"
)
package, naive = (bin_gramian(toy, ten, *batch, each_alone, splits=splits) for splits in (8, 1))
torch.testing.assert_close(
    streamed, package, rtol=1e-4, atol=1e-5, msg="the package must compute the same"
)
torch.testing.assert_close(
    S @ S.T / 64, naive, rtol=1e-4, atol=1e-5, msg="one split must be the naive Gramian"
)
print("naive over true squared norms:", (naive / gramian).diagonal().numpy().round(1))

# %% [markdown]
# **Intervals.** Leave out one micro-batch at a time and see how much the result moves: the jackknife. `conflicts` turns that into 95 % intervals.
# **Undetermined.** $\hat G_{ii}$ estimates a square and may come out negative. If it does not stand out of its own error, the direction of bin $i$ is
# unknown, and its cosines are NaN, hatched in figures. Values a little above 1 happen and stay: clipping would bias the mean.
# Do the intervals hold what they promise?

# %%
low, high = pairs(torch.stack([torch.stack(report.interval()) for report in reports])).unbind(1)
known, holds = ~low.isnan(), (low <= truth) & (truth <= high)
print(
    f"{(~known).float().mean():.0%} undetermined; {(right := holds[known].float().mean()):.0%} of others are right"
)
assert right > 0.9, "intervals of 95 % must hold the truth about as often"

# %% [markdown]
# ## 4 · Conflict is part of success
#
# Training minimises $\sum_k\omega_kL_k$. Where it ends, $\sum_j\omega_jg_j=0$. Multiply by $g_i$:
#
# $$\sum_j\omega_j\,g_i\cdot g_j=0\quad\Longrightarrow\quad\sum_{j\ne i}\omega_jG_{ij}=-\omega_iG_{ii} < 0 .$$
#
# So **at a minimum every bin that still has a gradient conflicts with some other**, with any weights and any network. If all $\omega_k|g_k|$ are
# equal, sum over $i$ as well: the mean cosine of two bins is then $-\frac1{K-1}$, −0.11 for ten. That is the null, not 0. Only capacity enough for every $g_k$ to vanish escapes.

# %%
apart = torch.tensor([j - i for i in range(10) for j in range(i + 1, 10)])
for name, theta in {
    "at the start": 0 * toy.minimiser(equal),
    "at its minimum": toy.minimiser(equal),
}.items():
    cosines = pairs(cosine_matrix(toy.gramian(theta)))
    near, far = cosines[apart == 1].mean(), cosines[apart > 5].mean()
    print(
        f"{name:15s} mean cosine {cosines.mean():+.2f}, neighbours {near:+.2f}, six or more apart {far:+.2f}"
    )
assert (toy.gramian(toy.minimiser(equal)).amin(1) < 0).all(), (
    "at a minimum each bin must conflict with some other"
)

# %% [markdown]
# The same network goes from full agreement to conflict; that is how it gets to the minimum. A falling mean cosine is no evidence of harm. Better
# questions: *who* conflicts, and how much of what the bins ask for cancels,
#
# $$\text{cancelled}=1-\frac{\left|\sum_k\omega_kg_k\right|}{\sum_k\omega_k|g_k|},$$
#
# 0 if all pull in one direction, 1 at a minimum.
#
# **Which bins?** Inside a bin, opposite gradients average out unseen. So a bin should hold noise levels that are alike:

# %%
bins = Bins.equal_log_snr(schedule.log_snr, 10)
for name, cut in {"equal t": Bins.uniform(1000, 10), "equal log-SNR": bins}.items():
    ranges = [
        float(values[0] - values[-1]) for values in schedule.log_snr.split(cut.counts.tolist())
    ]
    print(
        f"{name:14s} a bin spans {min(ranges):.1f} to {max(ranges):.1f} of log-SNR; edges {cut.edges.tolist()}"
    )

# %% [markdown]
# Equal width in $t$ squeezes seven units of log-SNR into the first bin. To ask *which noise levels conflict*, use equal log-SNR, as below; to ask what the
# training loss feels, weigh each bin by its timesteps ($\omega_k$).
#
# ## 5 · A real network
#
# Four networks, four stages. Guess first: of the 45 pairs of bins, which share surely conflicts
# (whole interval below 0) at the end of training, at the averaged weights?

# %%
QUESTION_SURE = "Share of pairs in sure conflict, end of training, averaged weights?"
predict(QUESTION_SURE, 0.1)


# %%
def cancelled(report):
    """The share of the bins' weighted gradients that cancels in their sum."""
    left = (share @ report.gramian @ share).clamp(min=0).sqrt()
    return 1 - left / (share @ report.gramian.diagonal().clamp(min=0).sqrt())


def tabulate(names, columns):
    """Print each column's function of a report at these stages: mean over networks, half its 95 % interval."""
    table = {}
    for name in names:
        values = np.array(
            [[float(value(report)) for value in columns.values()] for report in found[name]]
        )
        table[name] = [f"{m:.2f} ± {h:.2f}" for m, h in zip(*plots.t_interval(values), strict=True)]
    print(pandas.DataFrame(table, columns).T.to_string(), "\n")


share, found = bins.counts.double() / 1000, {}  # training draws timesteps uniformly
options = {"bins": bins, "micro_batches": fast(16, 8), "progress": False}
measure = functools.partial(conflicts, images=data, schedule=schedule, **options)
for name, batch in zip(STAGES, (4, 4, fast(16, 8), fast(64, 16)), strict=True):
    moments = [
        (kept[name].model, kept[name].optimizer if kept[name].step else None) for kept in states
    ]
    found[name] = [
        measure(m, batch_per_bin=batch, optimizer=o, seed=k) for k, (m, o) in enumerate(moments)
    ]
mean_cosines = {
    "naive mean cosine": lambda r: pairs(r.cosine).mean(),
    "debiased": lambda r: r.mean_cosine,
}
rates = {
    "sure conflict": lambda r: r.sure_conflict_rate,
    "undetermined": lambda r: r.undetermined / 45,
}
tabulate(STAGES, mean_cosines | rates | {"cancelled": cancelled})
start, last = ([r.sure_conflict_rate for r in found[name]] for name in (STAGES[0], STAGES[-1]))
assert max(start) == 0 and min(last) > fast(0.3, -1), (
    "conflict must be absent at the start and sure at the end"
)
reveal(QUESTION_SURE, float(np.mean(last)))

# %% [markdown]
# Agreement before training, conflict after it, as the theory demands. The surprise is the third line. *The same runs at the same moment*
# show hardly any conflict at the weights as they are. The likely reason: steps at this learning rate are noisy; they throw the network up the walls of
# its valley, and from there nearly all bins point the same way, back down. The average lies near the floor, where they disagree.
# Say which weights you measured.
#
# Now one network as a matrix: left naive, right debiased, from the same samples.

# %%
few, many = measure(network, batch_per_bin=4), found["end, averaged"][0]
fig, axes = plt.subplots(2, 2, figsize=(9.6, 8.4))
labels = [f"{value:.0f}".replace("-", "−") for value in few.log_snr]
for line, report in zip(axes, (few, many), strict=True):
    n = report.settings["micro_batches"] * report.settings["batch_per_bin"]
    for ax, kind, matrix in zip(
        line, ("naive", "debiased"), (report.cosine, report.cosine_debiased), strict=True
    ):
        plots.heatmap(ax, matrix, labels=labels).set(title=f"{kind}, {n} samples of each bin")
        ax.set_xlabel("log-SNR of the bin (clean → noisy)")
show(
    fig,
    "08_matrices",
    title="The same network, measured four times",
    caption="With 64 samples of each bin the naive matrix looks like an answer: neighbours agree, the rest is weak. Debiased, the same samples say that most of it is unknown (hatched). With 1024 both show what was hidden: blocks of noise levels, and the middle one pulls hard against the noisy one.",
    alt="Four 10 by 10 matrices of cosines, log-SNR from 9 to −9. Top left: red near the diagonal, pale blue and red elsewhere. Top right: nine red or pale cells at the clean corner, the rest hatched. Bottom left and right nearly equal: red blocks of clean, middle and noisy bins along the diagonal, strong blue between middle and noisy.",
)

# %% [markdown]
# "Distant timesteps are nearly orthogonal" can thus be a statement about a batch size. **A failure on purpose**: with 4 samples a bin and the naive formula, most
# pairs are nearly orthogonal. A **negative control**: deal the samples of all timesteps to the ten bins in
# turns, so that all have one distribution. All cosines must then be 1, whatever the noise, and conflict must vanish.


# %%
class Dealt(Bins):
    """Ten bins that take the samples in turns, whatever their timesteps."""

    def index(self, timesteps):
        return torch.arange(len(timesteps)) % self.num_bins


def fresh(per_bin):
    return lambda draw: bin_timesteps(bins, per_bin, draw).flatten()


weak, strong = (
    pairs(cosine_matrix(gramians(network, bins, fresh(4)))).abs(),
    pairs(many.cosine_debiased).abs(),
)
print(
    f"4 samples, naive: |cosine| below 0.3 in {(weak < 0.3).double().mean():.0%} of pairs", end="; "
)
print(f"debiased, {n} samples: in {(strong < 0.3).double().mean():.0%}")
dealt = gramians(network, Dealt(bins.edges), fresh(fast(64, 32)), 4)
alike = pairs(dealt).mean(1) / dealt.diagonal(dim1=1, dim2=2).mean(1)
print(
    f"control: mean cosine of bins that are alike {alike.mean():.2f} ± {2.2 * alike.std() / len(alike) ** 0.5:.2f}"
)
assert abs(alike.mean() - 1) < fast(0.2, 0.5), "bins with one distribution must agree"

# %% [markdown]
# ## 6 · How far, how noisy, where, against whom
#
# **How far apart** must noise levels be to conflict? **How noisy** are gradients? `gnr` is proportional to the number of samples $n$, so $n/\mathrm{gnr}$ is the
# number at which noise equals gradient: the *noise scale* (McCandlish et al. 2018). In the training gradient, timesteps are random too. With importance correction, drawing them in
# proportion to the root mean square of their gradients leaves the least variance: how much less? **Where** is the conflict? $G$ is a sum over weights, so it splits into groups
# of layers: their share, then the cosine of the four cleanest with the four noisiest bins. **Against whom** is a step? `optimizer=` gives the cosine of Adam's last step with each
# bin's negative gradient (below 0: one more such step makes it worse), and conflicts in Adam's metric. Bin 0 is the cleanest, 9 the noisiest.


# %%
def training_noise(report):
    """Noise scale of the training gradient; share of its variance that the best timesteps leave."""
    moments = report.gramian.diagonal() * (1 + report.noise_scale)  # one sample's |g|²
    whole = share @ report.gramian @ share
    variance, best = share @ moments - whole, (share @ moments.clamp(min=0).sqrt()) ** 2 - whole
    return variance / whole, best / variance


distance = {
    f"cosine {2 * k} apart": lambda r, k=k: r.cosine_debiased.diagonal(k).nanmean()
    for k in (1, 5, 9)
}
scale = {"noise scale, training": lambda r: training_noise(r)[0]}
scale |= {f"of bin {k}": lambda r, k=k: r.noise_scale[k] for k in (0, 5, 9)}
tabulate(STAGES, distance | scale | {"best timesteps leave": lambda r: training_noise(r)[1]})
far = {
    g: lambda r, k=k: cosine_matrix(r.group_gramian[k])[:4, 6:].nanmean()
    for k, g in enumerate(many.group_names)
}
shares = {
    g: lambda r, k=k: (r.group_gramian[k].diagonal() / r.gramian.diagonal()).mean()
    for k, g in enumerate(far)
}
tabulate(["end, averaged"], shares)
tabulate(["end, averaged"], far)
step = {f"step and bin {k}": lambda r, k=k: r.update_cosine[k] for k in (0, 5, 9)}
adam = {"in Adam's metric": lambda r: (pairs(r.cosine_preconditioned) < 0).double().mean()}
tabulate(STAGES[1:3], step | {"conflicts": lambda r: r.conflict_rate} | adam)

# %% [markdown]
# - *Far is not furthest.* At the averaged weights only neighbours agree, and conflict at 10 units of log-SNR is no weaker than at 18.
# - *Noise takes over.* As gradients shrink, the noise scale of training grows from 5 images to hundreds. Our batches had 32, so a late step
#   is mostly noise: which fits the valley of section 5. The best timesteps would save a fifth of the variance.
# - *The conflict sits at the surface.* First convolution, last block and output carry nine tenths of the squared gradient, and the first convolution surely conflicts. Deep layers have
#   cosines near 0: different features for different noise.
# - *The majority rules.* Early steps serve the noisy bins and make the cleanest one worse. Adam's metric does not change the picture.
#
# ## 7 · Does Dy-Sigma become Pareto stationary sooner?
#
# Dy-Sigma (here our reconstruction, notebook 06) is meant to help convergence of many objectives at once. A point is *Pareto stationary* when some convex combination of the gradients
# vanishes, so $\ell=\min_{\omega}\left|\sum_k\omega_kg_k\right|$ measures the distance (Désidéri 2012). Naively it can never read 0: the diagonal holds noise, and $\omega$ is
# fitted to it. `conflicts` fits $\omega$ on half of the micro-batches and judges it on the other; values that are negative are not told apart from 0.
#
# Recorded with `dysigma race data/races/conflicts-fields.toml --out data/runs/conflicts-fields`, and the same of `conflicts-leaves`: five weightings, two targets, three paired seeds, at the averaged weights at every doubling of the images seen (bins of equal $t$,
# 512 samples each). We count the images until $\ell$ stays below a tenth of its start; lower values drown in noise.
# How many times sooner than its own prior, Min-SNR, does Dy-Sigma get there, with a network that predicts noise?

# %%
QUESTION_SOONER = "Images to a tenth of the stationarity at the start, min-snr over dy-sigma?"
predict(QUESTION_SOONER, 1.5)

# %%
RECOMPUTE = False  # True: race again, into new folders; hours
BASELINES, tables = ("const-x0", "const-eps", "min-snr"), {}
for name in ("conflicts-fields", "conflicts-leaves"):
    records = Path("../data/runs") / (name + "-again" * RECOMPUTE)
    if RECOMPUTE:
        race(Race.read(Path(f"../data/races/{name}.toml")), records, jobs=2)
    tables |= {
        f"{name[10:]}, {target} network": rows
        for target, rows in load_races(records).groupby("grid")
    }
fig, axes = plt.subplots(2, 2, figsize=(8.4, 5.6), sharex=True, sharey=True)
for ax, (title, rows) in zip(axes.flat, tables.items(), strict=True):
    curves, reached, final = {}, {}, {}
    for row in rows.itertuples():
        images, path = np.array(
            [[report["images"], report["stationarity"]] for report in row.conflicts]
        ).T
        path = np.maximum(path / path[0], 0.005)
        curves.setdefault(row.arm, []).append(path[1:])
        reached.setdefault(row.arm, {})[row.seed] = images_to_threshold(
            images, path, 0.1, slack=0.2
        )
        final.setdefault(row.arm, []).append(np.log(row.validation_losses[-1]))
    plots.trajectories(
        ax, images[1:], {arm: np.array(paths) for arm, paths in curves.items()}, log=True
    )
    ax.set(
        xscale="log",
        ylim=(0.004, 3),
        xlabel="images seen",
        ylabel="stationarity over its start",
        title=title,
    )
    ax.label_outer()
    print(f"{title}: images; times sooner than {', '.join(BASELINES)}; last loss over min-snr")
    for arm, own in reached.items():
        ratios = (speedup(reached[name], own, images[-1]) for name in BASELINES)
        cells = [f"{r.bound}{r.ratio:6.2f} [{r.low:.2f}, {r.high:.2f}]".rjust(22) for r in ratios]
        cells += [f"{np.exp(np.mean(final[arm]) - np.mean(final['min-snr'])):22.2f}"]
        print(f"{arm:12s}{np.exp(np.mean(np.log([*own.values()]))):7.0f} ", *cells)
    if title == "fields, epsilon network":
        reveal(QUESTION_SOONER, speedup(reached["min-snr"], reached["dy-sigma"]).ratio)
show(
    fig,
    "08_stationarity",
    title="The way to Pareto stationarity, noise removed",
    caption="On both data sets: with a network that predicts noise, all arms but const-x0 come down together, Dy-Sigma on top of its prior. With one that predicts x0, const-eps lags behind; the others cannot be told apart. Values below 0.005, not told from 0, are drawn there. Bands: 95 % over three paired seeds.",
    alt="Four panels, stationarity relative to its start against images seen, both logarithmic, five weightings; fields above, leaves below. Left, epsilon networks: all fall from 0.2 to 0.5 at 1000 images to about 0.01 at 32,000; const-x0 falls last. Right, sample networks: const-eps stays highest and ends at 0.08 and 0.03; the four others fall below 0.1 within about 2000 images, with wide bands.",
)

# %% [markdown]
# **Sooner?** Dy-Sigma and its prior come down together: its learned part starts at 0 and has hardly moved when $\ell$ has fallen by nine tenths, after
# 50 (fields) to 80 steps (leaves). Against "Const" everything depends on which. With an ε-network Dy-Sigma takes fewer images than const-x0, but the interval includes 1;
# with an $x_0$-network it is eleven (fields) or four times (leaves) sooner than const-eps, and every other arm is so too. So a suitable weighting is sooner; that *learning* it helps, we do not see.
#
# **Does it matter?** See the last column. With an ε-network const-x0 becomes as stationary as the rest and keeps the largest loss; Dy-Sigma and uncertainty end below Min-SNR without being more
# stationary. $\omega$ may rest on one bin whose gradient has vanished: *one* solved task makes a point Pareto stationary. Stationary means that no step improves everything, not
# that anything is good.
#
# **Try it yourself.** Set `lr=2e-4` where `config` is made: does the gap between raw and averaged weights close?

# %% [markdown]
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **8.1** (●○○, 5 min) Two bins, $M=4$ micro-batches, paired samples. The sums are $|S_1|^2=40$, $|S_2|^2=24$, $S_1\cdot S_2=-12$ and
# $q_{11}=22$, $q_{22}=12$, $q_{12}=2$. What is the debiased cosine?
#
# <details><summary>Hint</summary>
#
# Subtract $q$ from all three products, not only from the squares, and divide by $M(M-1)$, which then cancels.
#
# </details>

# %%
diagnosis = {
    "That is the naive cosine.": -12 / 960**0.5,
    "q belongs in the numerator too.": -12 / 216**0.5,
}
exercise("8.1", expected=-14 / 216**0.5, mistakes=diagnosis)
debiased_cosine = ...  # a number
check("8.1", debiased_cosine)

# %% [markdown]
# **8.2** (●●○, 8 min) Two bins have noise scales 20 and 80. From how many samples of each bin on is the naive cosine within 10 % of the truth?
#
# <details><summary>Hint</summary>
#
# $\mathrm{gnr}=n/20$ and $n/80$. Put them into the shrink factor of section 2, set it to 0.9, square, and solve the quadratic equation for $n$.
#
# </details>

# %%
wrong = {"That shrinks both factors to 0.9.": 720.0, "Do not forget the square roots.": 915.73}
exercise("8.2", expected=441.76, mistakes=wrong, rtol=0.001)
samples = ...  # a number
check("8.2", samples)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
debiased_cosine = (-12 - 2) / ((40 - 22) * (24 - 12)) ** 0.5
check("8.1", debiased_cosine)

# %% tags=["solution"]
samples = (81 + (81**2 + 4 * 0.19 * 1296) ** 0.5) / (2 * 0.19)  # n² = 0.81 (n + 20)(n + 80)
check("8.2", samples)

# %% [markdown]
# ## What you can now do
#
# - Ask of any cosine matrix: how many samples, shared or not, at which weights, with what intervals?
# - Measure your own model with two lines: `report = dysigma.conflicts(model, images, schedule)`, `print(report.table())`.
# - Judge conflict against what a minimum demands, by layers, and by the step taken.
#
# ## Limitations
#
# - One small architecture, 8 × 8 images, unweighted losses in sections 5 and 6. More capacity means less conflict at the minimum.
# - Conflict says what an infinitesimal step does, not where training ends; [10](10_pareto_trade_offs.ipynb) looks at the trade-off itself.
# - Showing cosines only where they are determined selects large gradients.
# - Section 7: three seeds, one learning rate; most arms reach a tenth within its warm-up.
#
# ## References
#
# - Go, Kim, Lee, Lee, Oh, Moon, Choi, *Addressing Negative Transfer in Diffusion Models*, 2023, [arXiv:2306.00354](https://arxiv.org/abs/2306.00354): gradients of
#   timesteps as tasks; affinity falls with distance.
# - Ma, Ning, Liu, Niu, Zhang, *Decouple-Then-Merge*, 2024, [arXiv:2410.06664](https://arxiv.org/abs/2410.06664): a cosine matrix on CIFAR-10, and
#   a critical point of the sum that is none of its parts (section 4).
# - McCandlish, Kaplan, Amodei, *An Empirical Model of Large-Batch Training*, 2018, [arXiv:1812.06162](https://arxiv.org/abs/1812.06162): the noise scale.
# - Liu, Vicente, *The stochastic multi-gradient algorithm for multi-objective optimization*, 2019, [arXiv:1907.04472](https://arxiv.org/abs/1907.04472): multi-gradient
#   directions are biased though each gradient is not.
# - Yu, Kumar, Gupta, Levine, Hausman, Finn, *Gradient Surgery for Multi-Task Learning*, 2020, [arXiv:2001.06782](https://arxiv.org/abs/2001.06782): when conflict hurts;
#   PCGrad acts on naive cosines.
# - Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*, 2012,
#   [doi:10.1016/j.crma.2012.03.014](https://doi.org/10.1016/j.crma.2012.03.014): Pareto stationarity and the min-norm point.
#
# **Next:** [10, Pareto trade-offs](10_pareto_trade_offs.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
