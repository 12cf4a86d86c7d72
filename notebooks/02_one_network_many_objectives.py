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
# # 02 · One network, many objectives: measure what noise levels do to each other
#
# > **Claim.** At first, sharing one network between all noise levels is a bargain: what one level teaches serves the others too. Later they
# > compete: a copy trained further on one band of timesteps improves there and gets worse in most others. The loss weights decide who gives way.
#
# **You will be able to**
#
# - compare a shared network with specialised copies, at equal work, band by band and against a known floor;
# - say what dominance, Pareto optimality and the utopia point mean for the losses of one network;
# - measure a matrix of negative transfer, with the controls without which it means little;
# - predict the effect of a small step from inner products of gradients, and say where the prediction stops.
#
# **You need** [01](01_forward_process_and_snr.ipynb) (log-SNR, the floor of the loss) and the training loop of [00](00_start_here.ipynb).
#
# **Time** reading 30 min · running about 100 s (short run 15 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.gradients.negative_transfer`, `dysigma.gradients.conflicts`, `dysigma.pareto.non_dominated`,
# `dysigma.bins.Bins`, `dysigma.exact.gaussian_fields`, `OptimalDenoiser`, `LinearDenoiser`.

# %%
import copy
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from dysigma import plots
from dysigma.bins import Bins
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.data import batch
from dysigma.evaluation import evaluation_timesteps
from dysigma.exact import (
    GaussianField,
    LinearDenoiser,
    OptimalDenoiser,
    field_floor,
    field_variances,
    gaussian_fields,
)
from dysigma.gradients import conflicts, negative_transfer
from dysigma.models import make_model
from dysigma.objective import sample_losses
from dysigma.pareto import non_dominated
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule
from dysigma.weightings import make_weighting

NOTEBOOK = "02_one_network_many_objectives"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · One network or five?
#
# The data are 8 × 8 images of Gaussian noise whose power falls with frequency, as that of photographs does. In Fourier space every mode is a number
# of its own, with known variance $v$, so the best denoiser is known. Of $x_t=\alpha f+\sigma e$, with $f$ the mode of the image and $e$ that of the noise,
#
# $$\mathbb E[e\mid x_t]=\frac{\sigma}{\alpha^2v+\sigma^2}\,x_t .$$
#
# This is the Wiener filter $\epsilon^\star$, and its loss is the floor $L_t^\star$. Since $\epsilon-\epsilon^\star$ is uncorrelated with every function of $x_t$, the loss of any network
# splits in two, and we can measure the part that can be learned alone, without the noise of the other:
#
# $$L_t(\theta)=L_t^\star+\underbrace{\mathbb E\,|\epsilon_\theta-\epsilon^\star|^2}_{\text{excess}} .$$
#
# We cut the 1000 timesteps of a cosine schedule into five bands of 200.

# %%
schedule, bands = NoiseSchedule.cosine(1000), Bins.uniform(1000, 5)
edges, labels = bands.edges.tolist(), ["cleanest", "clean", "middle", "noisy", "noisiest"]
data, test = gaussian_fields(8192), gaussian_fields(fast(64, 16), split="test")
probes = evaluation_timesteps(1000, 40)  # eight in each band
x0, at = (
    (test.images.float() / 127.5 - 1).repeat(40, 1, 1, 1),
    probes.repeat_interleave(len(test.images)),
)
noise = torch.randn(x0.shape, generator=generator(0, 0, "noise"))
x_t = schedule.add_noise(x0, noise, at)


def wiener(x_t, timesteps):
    """The best guess at the noise: each Fourier mode times its gain."""
    bar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    gain = (1 - bar).sqrt() / (bar * field_variances(8) + 1 - bar)
    return torch.fft.ifft2(torch.fft.fft2(x_t.double(), norm="ortho") * gain, norm="ortho").real


def by_band(values):
    """(..., 40) values at the probes -> (..., 5) means over bands."""
    return values.unflatten(-1, (5, 8)).mean(-1)


best = wiener(x_t, at)
best_loss = by_band((best - noise).square().mean((1, 2, 3)).unflatten(0, (40, -1)).mean(1))
floor = by_band(field_floor(schedule)[probes])
torch.testing.assert_close(
    best_loss, floor, rtol=0.1, atol=0, msg="the Wiener filter must reach the floor"
)
theirs = OptimalDenoiser(GaussianField(), schedule)(x_t, at).double()
torch.testing.assert_close(
    theirs, best, rtol=1e-4, atol=1e-4, msg="the package's best denoiser must be this filter"
)
print("band       ", *(f"{name:>9s}" for name in labels))
print("log-SNR    ", *(f"{v:9.1f}" for v in by_band(schedule.log_snr[probes])))
print("floor      ", *(f"{v:9.4f}" for v in floor))

# %% [markdown]
# The loop is that of notebook 00, for any range of timesteps; the learning rate fades to 0. Two ways to spend the same work:
#
# - **shared** (the baseline): one network, 300 steps on all timesteps;
# - **specialists**: five networks of the same size, 60 steps each, each on its own band. Each sees as many images of its band as the shared network does.


# %%
def untrained(seed):
    torch.manual_seed(seed)
    return make_model("micro", 8, 1)


def fading(steps):
    return torch.linspace(2e-3, 0, steps + 1)[:-1].tolist()


def train(model, rates, seed, first=0, last=1000, weighting=None):
    """One Adam step per learning rate, on timesteps from first to last - 1."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        images, _, _ = batch(data, seed, step, 32)
        u = torch.rand(32, generator=generator(seed, step, "timesteps"))
        timesteps = first + (u * (last - first)).long()
        eps = torch.randn(images.shape, generator=generator(seed, step, "noise"))
        losses = sample_losses(model.train(), schedule, images, eps, timesteps, "epsilon")
        loss = losses.mean() if weighting is None else weighting(losses, timesteps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def excess(model):
    """The loss above the floor at each probe, (40,)."""
    return (
        (model.eval()(x_t, at).sample - best)
        .square()
        .mean((1, 2, 3))
        .unflatten(0, (40, -1))
        .mean(1)
    )


def show_ratio(name, ratio):
    """Print geometric means over seeds, and the factor by which their 95 % intervals reach up and down."""
    middle, half = map(np.exp, plots.t_interval(ratio.log()))
    print(
        f"{name}:",
        ", ".join(f"{k} {m:.2f} ×/÷ {h:.2f}" for k, m, h in zip(labels, middle, half, strict=True)),
    )


# %% [markdown]
# A specialist has nothing to compromise with.

# %%
QUESTION_TEAM = "Bands (of 5) in which the specialists end lower than the shared network?"
predict(QUESTION_TEAM, 5)

# %%
STEPS, seeds = fast(300, 50), range(fast(5, 2))
shared = [train(untrained(seed), fading(STEPS), seed) for seed in seeds]
loss = (
    sample_losses(shared[0], schedule, x0, noise, at, "epsilon")
    .detach()
    .unflatten(0, (40, -1))
    .mean(1)
)
gap = by_band(loss) - best_loss - by_band(excess(shared[0]))
assert gap.abs().max() < fast(0.01, 0.05), (
    "the loss must be floor plus excess, up to the noise of these draws"
)

ours = torch.stack([excess(model) for model in shared])  # (seeds, 40)
parts = [
    [train(untrained(s), fading(STEPS // 5), s, *edges[k : k + 2]) for k in range(5)] for s in seeds
]
team = torch.stack(
    [torch.stack([excess(model) for model in models]) for models in parts]
)  # (seeds, network, 40)
own = by_band(team).diagonal(dim1=1, dim2=2)  # each specialist in its own band
print("excess × 1000", *(f"{name:>10s}" for name in labels))
print("shared       ", *(f"{1e3 * v:10.1f}" for v in by_band(ours).mean(0)))
print("specialists  ", *(f"{1e3 * v:10.1f}" for v in own.mean(0)))
show_ratio("specialists / shared", own / by_band(ours))
reveal(QUESTION_TEAM, int((own.mean(0) < by_band(ours).mean(0)).sum()))

# %% [markdown]
# At equal work the team loses in every band, by a factor of 2 to 6. Most of what a young denoiser must learn (copy the noise through, shrink the high
# frequencies, read the timestep) is the same everywhere, and the shared network learns it from all 300 steps. That does not say that the jobs agree
# *in the end*. For that question we need words.
#
# ## 2 · Words for many objectives
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $\theta$ | `model` | | the parameters, shared by all timesteps |
# | $L_t,\ L_k$ | `losses` | `(T,)`, `(K,)` | loss at a timestep; mean over band $k$ |
# | $L_k^\star$ | `floor` | `(K,)` | what no denoiser beats (notebook 01) |
# | $w_t$ | `weighting.weights()` | `(T,)` | loss weights; training minimises $\sum_tw_tL_t(\theta)$ |
# | $L_k^\circ$ | | `(K,)` | utopia point, $\min_\theta L_k(\theta)$, each $k$ with a $\theta$ of its own |
# | $g_k,\ G_{ij}$ | `report.gramian` | `(K, K)` | gradient of $L_k$; $G_{ij}=g_i\cdot g_j$ |
#
# Training a diffusion model has $T$ objectives and one $\theta$; the sum with weights $w$ turns them into one number. Without weights we can still say this much:
#
# - $a$ **dominates** $b$ if it is no worse in any objective and better in at least one.
# - $\theta$ is **Pareto optimal** if nothing dominates it: whoever wants one loss lower must let another rise.
# - The **utopia point** $L^\circ$ collects the best of every objective. It is seldom reached by one $\theta$, and never lies below the floor.
# - The **price of sharing** is what the shared network pays: $L_k(\theta)-L_k^\circ$.
#
# The six networks are six points in five dimensions: a specialist, too, has a loss in every band.


# %%
def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


points = torch.cat([by_band(ours).mean(0)[None], by_band(team).mean(0)])  # (6, 5)
mine = torch.tensor([not any(dominates(other, point) for other in points) for point in points])
assert torch.equal(mine, non_dominated(points)), "the definition and the package must agree"
print(f"{'excess × 1000':22s}", *(f"{name:>9s}" for name in labels))
for name, point, kept in zip(
    ["shared", *(f"trained on {k}" for k in labels)], points, mine, strict=True
):
    print(f"{name:22s}", *(f"{1e3 * v:9.1f}" for v in point), "" if kept else "  dominated")
assert points.min() > 0, "no network may lie below the floor"

# %% [markdown]
# The shared network dominates all five. That does not make it Pareto optimal: it is not dominated *by these*, and some more steps on all bands give one
# that dominates it (section 3).
#
# ## 3 · Negative transfer, measured
#
# So train the shared network further, on one band alone, and watch the others. `negative_transfer` makes five copies, gives each 20 Adam steps on its band, and returns the
# change of every band's loss, on draws fixed beforehand. We divide by the excess the band had: −0.3 means that 30 % of what was left to learn is gone, +1 that it has
# doubled. Above 0, off the diagonal, is **negative transfer**.
#
# We do this at three ages: after 10 steps, 60, and 300. At the last one, take a copy that trains on the noisiest band. What becomes of
# its excess in the band called "clean"?

# %%
QUESTION_FAR = (
    "Oldest network, a copy tuned on 'noisiest': change of the excess in 'clean', as a share of it?"
)
predict(QUESTION_FAR, -0.1)

# %%
RATE, TUNE = 3e-4, fast(20, 6)
tune = partial(
    negative_transfer,
    images=data,
    schedule=schedule,
    bins=bands,
    samples_per_bin=fast(128, 32),
    progress=False,
)
adam = partial(torch.optim.Adam, lr=RATE, fused=True)
ages = {f"{n} steps": n for n in (10, fast(60, 25), STEPS)}
networks, change, control = {}, {}, {}
for age, steps in ages.items():
    networks[age] = (
        shared
        if steps == STEPS
        else [train(untrained(seed), fading(steps), seed) for seed in seeds]
    )
    rows, all_bands = [], []
    for seed, network in zip(seeds, networks[age], strict=True):
        before = by_band(excess(network))
        result = tune(network, steps=TUNE, batch_size=32, optimizer=adam, seed=1000 + seed)
        rows.append(result.change / before)
        tuned = train(copy.deepcopy(network), [RATE] * TUNE, 1000 + seed)
        all_bands.append(by_band(excess(tuned)) / before - 1)
    change[age], control[age] = (
        torch.stack(rows),
        torch.stack(all_bands),
    )  # (seeds, 5, 5), (seeds, 5)

early, *_, late = ages
for age in ages:
    assert (change[age].mean(0).diagonal() < 0).all(), (
        f"{age}: a copy must get better at what it trains on"
    )
assert (change[early].mean(0) < 0).all(), "at first, training on any band must help every other"
reveal(QUESTION_FAR, float(change[late].mean(0)[4, 1]))

# %%
fig, axes = plt.subplots(1, 3, figsize=(12.5, 4.1), sharey=True)
for ax, (age, values) in zip(axes, change.items(), strict=True):
    mean, half = plots.t_interval(values)
    last = ax is axes[-1]
    plots.heatmap(ax, mean, labels=labels, unit="change / excess before", colorbar=last)
    plots.mark_cells(ax, abs(mean) < half, filled=False)
    ax.set(title=f"after {age}", xlabel="measured on", ylabel="trained on" if ax is axes[0] else "")
    ax.tick_params(axis="x", labelrotation=30)
plots.show(
    fig,
    "02_transfer",
    title="What training on one band does to the others",
    caption="Change of the excess in the column's band when a copy trains on the row's band alone. Means over five seeds; a circle marks a 95 % interval that contains 0. After 10 steps every band helps every other. After 60 the cleanest band and the rest work against each other. After 300 only two pairs of neighbours on the noisy side still help, and the excess of a distant band grows by up to three quarters.",
    alt="Three signed 5 by 5 matrices, trained on by measured on. After 10 steps all entries are negative, about -0.2 to -0.36. After 60 steps the first row and the first column are positive except on the diagonal, the rest negative. After 300 steps the diagonal is negative and most other entries are positive, up to 0.76, except between the noisy and noisiest bands and around the middle.",
    notebook=NOTEBOOK,
)

off = ~torch.eye(5, dtype=torch.bool)
for age in ages:
    mean, half = (each[off.numpy()] for each in plots.t_interval(change[age]))
    helps, hurts = int((mean + half < 0).sum()), int((mean - half > 0).sum())
    print(f"{age}: of 20 pairs {helps} help, {hurts} hurt; widest interval ± {half.max():.2f}")
idle = tune(shared[0], steps=1, batch_size=32, optimizer=partial(torch.optim.SGD, lr=0.0))
assert (idle.change == 0).all(), "the null, a copy with learning rate 0, must not change"

# %% [markdown]
# - **After 10 steps** all 20 pairs help. The first lesson is the same at every noise level.
# - **After 60** the cleanest band has parted from the rest: what it learns hurts all others, and three of the four hurt it. Those four still help each other (one pair
#   cannot be told apart from 0).
# - **After 300** 15 of 20 pairs hurt. What still helps is next door and noisy. The matrix is not symmetric: `noisiest` costs `clean` three quarters
#   of its excess, `clean` costs `noisiest` about a third.
#
# Negative transfer has an age.
#
# ### The control
#
# A copy gets better in its own band: because it specialises, or because it trained 20 steps more? The control trains a copy on all bands for as many
# steps; at the last age also for five times as many, which is the work of all five specialised copies together.

# %%
longer = [
    train(copy.deepcopy(net), [RATE] * (5 * TUNE), 1000 + seed)
    for seed, net in zip(seeds, shared, strict=True)
]
after = torch.stack([by_band(excess(net)) for net in longer]) / by_band(ours) - 1
own = {age: change[age].diagonal(dim1=1, dim2=2) for age in ages}
table = {
    f"{early}: own band": own[early],
    "  all bands": control[early],
    "  difference": own[early] - control[early],
}
table |= {
    f"{late}: own band": own[late],
    "  all bands ": control[late],
    "  difference ": own[late] - control[late],
}
table |= {"  all bands, five times": after, "  own minus that": own[late] - after}
print(f"{'change / excess':24s}", *(f"{name:>14s}" for name in labels))
for name, values in table.items():
    print(
        f"{name:24s}",
        *(f"{m:+7.2f} ± {h:.2f}" for m, h in zip(*plots.t_interval(values), strict=True)),
    )
assert (own[late] - control[late]).mean() < (own[early] - control[early]).mean(), (
    "the gain from specialising must grow"
)

# %% [markdown]
# Early, specialising gains next to nothing over the control. Late it gains 14 to 31 % of the excess, while the control with as many steps stands still. Even at
# equal total work the copies end lower in four bands, though only the noisiest by much, and level in the middle. Compare section 1: five networks lose when
# they start from nothing, and win, by a little, when they start from a shared one. That is the price of sharing *from here on*.
#
# ## 4 · Why: inner products of gradients
#
# Take one small step of plain gradient descent on band $i$, and expand the loss of band $j$ to first order:
#
# $$L_j(\theta-\eta g_i)-L_j(\theta)=-\eta\,g_i\cdot g_j+O(\eta^2)=-\eta\,G_{ij}+O(\eta^2).$$
#
# A negative $G_{ij}$ is a **conflict**: a step for $i$ is a step against $j$. The diagonal is $-\eta|g_i|^2$ and cannot be positive. `conflicts` estimates $G$, corrected for
# minibatch noise; how, and why it must be corrected, is the subject of notebook [08](08_gradient_conflicts.ipynb). `report.lookahead(lr)` is the prediction, relative to the loss. We
# compare it with one real SGD step on 256 images of a band, and with a step a thousand times as large. Last: does the sign of the cosine give that of the 20 *Adam* steps in section 3?

# %%
SGD_RATE, SIZE, cosines = 1e-3, fast(256, 64), {}


def agreement(x, y):
    """Slope through 0, and correlation."""
    return float((x * y).sum() / (x * x).sum()), float(np.corrcoef(x.flatten(), y.flatten())[0, 1])


for age in (early, late):
    rows, cosines[age] = [], []
    for seed, network in zip(seeds, networks[age], strict=True):
        report = conflicts(
            network, data, schedule, bands, batch_per_bin=SIZE // 8, seed=seed, progress=False
        )
        guess, rates = report.lookahead(SGD_RATE) * report.losses, (SGD_RATE, 1000 * SGD_RATE)
        step, leap = (
            tune(
                network,
                steps=1,
                batch_size=SIZE,
                seed=seed,
                optimizer=partial(torch.optim.SGD, lr=rate),
            )
            for rate in rates
        )
        # The step has minibatch noise of its own, about as large as that of the prediction: hence the 2.
        error = (step.change_se**2 + 2 * (SGD_RATE * report.gramian_se) ** 2).sqrt()
        inside = float(((step.change - guess).abs() < 2 * error).double().mean())
        worse = float((leap.change.diagonal() > 0).double().mean())
        rows.append((*agreement(guess, step.change), inside, worse))
        cosines[age].append(report.cosine_debiased)
    shown = [f"{m:.2f} ± {h:.2f}" for m, h in zip(*plots.t_interval(rows), strict=True)]
    print(
        "{}: slope {}, correlation {}, within 2 SE {}; step × 1000, own band worse {}".format(
            age, *shown
        )
    )
    cosine, moved = torch.stack(cosines[age]).nanmean(0)[off], change[age].mean(0)[off]
    right, hurt = int((cosine * moved < 0).sum()), int((moved > 0).sum())
    print(
        f"    Adam: the cosine's sign is right for {right} of 20 pairs, and {hurt} are hurt; mean {cosine.mean():+.2f}"
    )

# %% [markdown]
# Early the prediction is as good as exact. Late it scatters, because gradients have become small and their noise has not; nearly all entries still lie within two standard
# errors. The large step shows the limit: by first order it cannot hurt its own band, and it does. And the sign of a cosine says little about 20 late steps of
# Adam: guessing "hurts" for every pair is right almost as often.
#
# A warning to take along. At a minimum of $\sum_kw_kL_k$ the weighted gradients add up to 0, so $\sum_jw_jG_{ij}=0$ for every $i$: whoever still has a gradient conflicts with
# somebody. Conflict late in training is what a compromise looks like from inside. It does not show that the compromise is bad.
#
# ## 5 · The price falls with capacity
#
# Is the fight about capacity or about time? In one small problem the end of training is a linear solve. `LinearDenoiser` predicts
# $\hat\epsilon=c(t)\,x_t$ in every Fourier mode, with $c$ a polynomial of the log-SNR. Its `degree` counts the coefficients: with 1, all of 40 timesteps share
# a single number; with 40, each has its own. The utopia point is the floor, for any degree.

# %%
levels, equal = (
    NoiseSchedule(schedule.alphas_cumprod[12::25]),
    torch.ones(40, dtype=torch.float64) / 40,
)
prices = {}
for degree in (1, 2, 3, 4, 6, 10, 20, 40):
    linear = LinearDenoiser(levels, field_variances(8).flatten(), degree)
    prices[degree] = float((linear.losses(linear.minimiser(equal)) - linear.irreducible()).mean())
print(
    "mean price of sharing by degree:",
    ", ".join(f"{degree}: {max(p, 0):.1g}" for degree, p in prices.items()),
)
assert all(np.diff(list(prices.values())) < 1e-12), "more capacity must never cost"
assert abs(prices[40]) < 1e-9, "with nothing shared there is no price"

# %% [markdown]
# At the end of training, on this problem, the trade-off exists because capacity is finite, and ten coefficients all but remove it. Notebook [10](10_pareto_trade_offs.ipynb) draws the
# whole front. The networks above, after 300 steps, are still far from any end: their fight is over the *next step* as much as over capacity.
#
# ## 6 · The weight decides who wins
#
# Back to networks. The same 300 steps with the same draws, once with weight 1 for every timestep (`const-eps`), once with Min-SNR's weights from
# notebook 00, which turn the clean end down. Prediction for the cleanest band?

# %%
QUESTION_WEIGHT = "Excess in the cleanest band, min-snr / const-eps?"
predict(QUESTION_WEIGHT, 1.2)

# %%
weighting = make_weighting("min-snr", schedule)
theirs = torch.stack(
    [excess(train(untrained(seed), fading(STEPS), seed, weighting=weighting)) for seed in seeds]
)
ratio = by_band(theirs) / by_band(ours)
reveal(QUESTION_WEIGHT, float(ratio.mean(0)[0]))
show_ratio("min-snr / const-eps", ratio)
for a, b in zip(by_band(ours), by_band(theirs), strict=True):
    assert non_dominated(torch.stack([a, b])).all(), "neither weighting may dominate the other"
pairs = [(a, b) for i, a in enumerate(by_band(ours)) for b in by_band(ours)[:i]]
tied = sum(bool(non_dominated(torch.stack(pair)).all()) for pair in pairs)
print(f"control: of {len(pairs)} pairs of seeds of const-eps alone, neither dominates in {tied}")

# %%
fig, ax = plt.subplots()
plots.trajectories(ax, probes, {"min-snr": theirs / ours}, log=True)
ax.axhline(1, color="0.3", linewidth=1, label="const-eps")
ax.set(xlabel="timestep (0 = clean)", ylabel="excess relative to const-eps")
ax.set_yticks([0.5, 0.7, 1, 1.5, 2, 3], labels=["0.5", "0.7", "1", "1.5", "2", "3"])
ax.minorticks_off()
ax.legend()
plots.show(
    fig,
    "02_who_wins",
    title="Two weightings, one budget: nobody wins everywhere",
    caption="Min-SNR pays at the clean end, up to 2.7 times the excess, and gains 14 to 19 % in the three noisier bands. Same start, images, timesteps and noise; band: 95 % over five paired seeds.",
    alt="Excess of min-snr relative to const-eps against timestep, logarithmic. It rises from 2.3 to 2.7, falls steeply, crosses 1 near timestep 290 and stays near 0.85 from timestep 450 on.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# Neither weighting dominates, in any seed. But look at the control: two runs of *one* weighting, with different seeds, are often incomparable as well. In five
# dimensions a little noise is enough. "Neither dominates" is weak evidence for a trade-off; intervals that exclude 1 on both sides are strong evidence.
#
# **Try it yourself.** `STEPS = 1000` (a few minutes): how many pairs hurt then? `NoiseSchedule.linear(1000)` in section 1: which bands are neighbours now?
# SGD in section 3.

# %% [markdown]
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **2.1** (●○○, 4 min) Five networks, three losses each, all minimised. Which are dominated by another one? Answer with a list of five `True` or `False`, by hand.
#
# <details><summary>Hint</summary>
#
# Compare two rows at a time. The dominating row must be at least as good in all three columns, and better in one.
#
# </details>

# %%
vectors = torch.tensor(
    [[3.0, 2.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, 2.0], [2.0, 2.0, 4.0], [1.0, 4.0, 2.0]]
)
kept = non_dominated(vectors)
wrong = {
    "Those are the others.": kept,
    "Equal rows do not dominate each other.": [False, True, True, False, True],
}
wrong["A smaller sum is not dominance."] = [False, False, True, True, False]
exercise("2.1", expected=~kept, mistakes=wrong)
dominated = ...
check("2.1", dominated)

# %% [markdown]
# **2.2** (●●○, 8 min) A linear denoiser of degree 1, and two objectives: the mean loss of its 20 clean timesteps and that of its 20 noisy ones. What is the price of sharing, for
# both objectives, `(2,)`, if it is trained with equal weights? Use `linear.losses`, `linear.minimiser` and `linear.utopia(halves)`.
#
# <details><summary>Hint</summary>
#
# The two losses are `halves @ linear.losses(theta)`. The utopia point, not the floor, is what each half could have reached *with this network*.
#
# </details>

# %%
linear = LinearDenoiser(levels, field_variances(8).flatten(), degree=1)
halves = torch.block_diag(torch.ones(1, 20), torch.ones(1, 20)).double() / 20  # (2, 40)
paid = halves @ linear.losses(linear.minimiser(equal))
from_floor = paid - halves @ linear.irreducible()
wrong = {
    "Those are losses.": paid,
    "That is measured from the floor, not from the utopia point.": from_floor,
}
exercise("2.2", expected=paid - linear.utopia(halves), mistakes=wrong)
price = ...
check("2.2", price)

# %% [markdown]
# **2.3** (●●○, 4 min) The gradients of two bands have norms 2 and 3 and cosine −0.3. By how much does the loss of the second change when SGD takes
# one step of size 0.01 on the first? To first order, with its sign.
#
# <details><summary>Hint</summary>
#
# Section 4: minus the step size times the inner product. The inner product is the cosine times both norms.
#
# </details>

# %%
wrong = {"The sign: a step goes against the gradient.": -0.018, "That leaves out the norms.": 0.003}
exercise("2.3", expected=0.018, mistakes=wrong)
change_of_second = ...
check("2.3", change_of_second)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
# Row 2 is no better than row 0 anywhere and worse in the second column. Rows 1 and 4 are equal.
dominated = [False, False, True, False, False]
check("2.1", dominated)

# %% tags=["solution"]
theta = linear.minimiser(equal)
price = halves @ linear.losses(theta) - linear.utopia(halves)
check("2.2", price)
print("price for the clean half and for the noisy half:", [round(v, 4) for v in price.tolist()])

# %% tags=["solution"]
change_of_second = -0.01 * (-0.3 * 2 * 3)
check("2.3", change_of_second)

# %% [markdown]
# ## What you can now do
#
# - Put a number on sharing: shared against specialised copies, at equal work, above a floor.
# - Apply dominance, Pareto optimality, utopia point and price of sharing to measured losses, and distrust "not dominated" when there are many objectives.
# - Measure negative transfer on your own network with `negative_transfer`, with a control that trains on everything, at more than one age.
# - Read $-\eta\,g_i\cdot g_j$ as the first-order effect of band $i$ on band $j$, and know that it is about small steps of plain gradient descent.
#
# ## Limitations
#
# - One data set of 8 × 8 Gaussian fields, one network of 41,609 parameters, 300 steps, one learning rate, one cut into five bands. Nothing here says when, or how
#   strongly, large networks on images enter the late stage.
# - Transfer is measured by a finite tune: 20 Adam steps, no other band in the batch. Part of what it shows is forgetting that joint training would have prevented.
# - Shared and specialists got the same untuned learning rate. At much longer training specialists must win or tie; we did not go there.
# - Intervals are per pair; of 60 entries a few may miss the truth.
#
# ## References
#
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023, [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): traces slow
#   convergence in part to conflicting directions between timesteps, and treats diffusion training as multi-task learning.
# - Go et al., *Addressing Negative Transfer in Diffusion Models* (ANT), 2023, [arXiv:2306.00354](https://arxiv.org/abs/2306.00354): affinity between
#   denoising tasks falls as noise levels move apart, and negative transfer occurs.
# - Ma et al., *Decouple-Then-Merge*, 2024, [arXiv:2410.06664](https://arxiv.org/abs/2410.06664): fine-tunes a copy per range of timesteps, then merges the copies.
# - Fifty et al., *Efficiently Identifying Task Groupings for Multi-Task Learning*, 2021, [arXiv:2109.04617](https://arxiv.org/abs/2109.04617): how one task's gradient step
#   changes another task's loss, used to choose which tasks to train together.
# - Sener, Koltun, *Multi-Task Learning as Multi-Objective Optimization*, 2018, [arXiv:1810.04650](https://arxiv.org/abs/1810.04650): why a weighted sum hides a choice.
# - Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*, 2012,
#   [doi:10.1016/j.crma.2012.03.014](https://doi.org/10.1016/j.crma.2012.03.014): a step that helps all objectives at once, while there is one.
#
# **Next:** [03, the SNR weightings](03_snr_weightings.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
