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
# # 09 · Acting on conflicts
#
# > **Question.** Noise levels pull against each other. MGDA, UPGrad, PCGrad and CAGrad look at the conflicts before each step.
# > What do they promise, do they keep it in training, and when are they better than the plain sum of losses or Dy-Sigma?
#
# **You will be able to**
#
# - compute from a Gramian what any weighted step does to every loss, to first order;
# - say what MGDA, PCGrad, UPGrad and CAGrad each ask of a step, and what Dy-Sigma does instead;
# - say when acting on conflicts can help, and when a fixed weighting does as well.
#
# **You need** the Gramian and its noise from [08](08_gradient_conflicts.ipynb).
#
# **Time** reading 25 min · running about 100 s (short run 35 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.pareto.min_norm_weights`, `dysigma.pareto.project_psd`, weighting `"gramian"`.

# %%
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torchjd.aggregation import CAGradWeighting, UPGradWeighting

from dysigma import NoiseSchedule, TrainConfig, conflicts, leaves, make_weighting, plots
from dysigma.bins import Bins
from dysigma.course.lesson import Lesson
from dysigma.course.networks import SmallDenoiser
from dysigma.data.dataset import batch
from dysigma.evaluation import evaluation_timesteps, validation_losses
from dysigma.exact import (
    GaussianField,
    LinearDenoiser,
    OptimalDenoiser,
    gaussian_fields,
)
from dysigma.gradients import bin_gramian, bin_timesteps
from dysigma.intervals import t_interval
from dysigma.objective import sample_losses
from dysigma.pareto import min_norm_weights, project_psd
from dysigma.training import build, iterate

lesson = Lesson("09_acting_on_conflicts", trains_on="auto")
device = lesson.device  # a GPU if there is one

# %% [markdown]
# ## Which bins does a plain step make worse?
#
# We train one small network that predicts noise, take its averaged weights, and measure the Gramian $G$ of five bins of
# log-SNR with the noise taken out.

# %%
config = TrainConfig(
    data="leaves",
    image_size=8,
    model="micro",
    images=lesson.fast(9_600, 6_400),
    lr=2e-3,
    device=str(device),
)
is_default = config.lr == 2e-3 and config.images == 9_600 and lesson.as_published
data = leaves(4096, size=8).to(device)
schedule = NoiseSchedule.linear(1000)  # for formulas
schedule_of_runs = NoiseSchedule.linear(1000).to(device)
bins = Bins.equal_log_snr(schedule.log_snr, 5)

state = build(replace(config, seed=0), data)
for _ in iterate(state, data, config):
    pass
state.ema.copy_to(state.model)

report = conflicts(
    state.model,
    data,
    schedule_of_runs,
    bins,
    micro_batches=16,
    batch_per_bin=lesson.fast(32, 16),
    progress=False,
)
gramian = project_psd(report.gramian)
lengths = gramian.diagonal().sqrt()

# %% [markdown]
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $g_i$ | | `(P,)` | gradient of the loss of bin $i$ |
# | $G$ | `gramian` | `(K, K)` | the Gramian, $G_{ij}=g_i\cdot g_j$ |
# | $\omega_i$ | `weights` | `(K,)` | weight of bin $i$ in the step |
# | $\eta$ | `RATE` | | learning rate |
#
# A step with weights $\omega$ moves the network by $-\eta\sum_i\omega_ig_i$. To first order, the loss of bin $j$ then changes by
# $-\eta\,(G\omega)_j$. So **the Gramian is all one needs** to know what a step does. If $(G\omega)_j<0$, bin $j$ gets worse.
#
# We divide by the lengths of the step and of $g_j$. That gives the cosine between the step and the direction that bin
# $j$ would choose for itself: 1 is best for it, below 0 it gets worse.


# %%
def served(weights, matrix):
    """Cosine of the step with each bin's own best direction, (K,)."""
    step_length = (weights @ matrix @ weights).sqrt()
    return matrix @ weights / (step_length * matrix.diagonal().sqrt())


QUESTION_HURT = "Bins (of 5) that a plain step, with equal weights, makes worse?"
lesson.predict(QUESTION_HURT, None)

# %%
equal = torch.full((5,), 1 / 5, dtype=torch.float64)
lesson.reveal(QUESTION_HURT, int((served(equal, gramian) < 0).sum()))

# %% [markdown]
# ## Four rules that look at conflicts, and one that does not
#
# **MGDA** (Désidéri 2012) takes the convex combination of the gradients that is *shortest*. At this point
# $(G\omega)_j\ge\omega^\top G\omega$ for all $j$, so no bin gets worse.

# %%
mgda = min_norm_weights(gramian)
least_gain = (gramian @ mgda).min()
assert least_gain >= 0.99 * (mgda @ gramian @ mgda) - 1e-12, (
    "MGDA must serve every bin alike"
)


# %% [markdown]
# **PCGrad** (Yu et al. 2020) goes through the gradients. From each it removes the part that points against another one,
# if there is such a part. In terms of $G$, the projection of a gradient with coefficients $u$ off gradient $j$ is:


# %%
def project_off(u, j, matrix):
    """Remove from sum_i u_i g_i what points against g_j."""
    inner = matrix[j] @ u
    if inner >= 0:
        return u
    result = u.clone()
    result[j] = result[j] - inner / matrix[j, j]
    return result


def pcgrad(matrix):
    total = torch.zeros(len(matrix), dtype=matrix.dtype)
    for i in range(len(matrix)):
        u = torch.zeros_like(total)
        u[i] = 1
        for j in range(len(matrix)):  # the paper draws the order at random
            if j != i:
                u = project_off(u, j, matrix)
        total = total + u
    return total / len(matrix)


# %% [markdown]
# A later projection can undo an earlier one, so PCGrad promises nothing for more than two objectives.
#
# **UPGrad** (Quinton and Rey 2024) projects each gradient on the set of directions that raise *no* loss, and adds the
# results.
#
# **CAGrad** (Liu et al. 2021) stays near the plain step; a parameter $c$ says how near. Within that distance it
# improves the bin that is served worst.
#
# **Dy-Sigma** looks at losses only. It never sees $G$.

# %%
dy_sigma = make_weighting("dy-sigma", schedule)
timesteps = torch.arange(1000)
bin_losses = report.losses.float()[bins.index(timesteps)]
optimizer = torch.optim.Adam(dy_sigma.parameters(), lr=0.05)
for _ in range(200):  # let its weights settle at the measured losses
    optimizer.zero_grad()
    dy_sigma(bin_losses, timesteps).backward()
    optimizer.step()
mean_weights = bins.mean(dy_sigma.weights().detach(), timesteps)[0].double()
dy_sigma_shares = mean_weights * bins.counts  # a bin counts with its timesteps
dy_sigma_shares = dy_sigma_shares / dy_sigma_shares.sum()

torch.manual_seed(0)
steps = {
    "equal weights": equal,
    "Dy-Sigma": dy_sigma_shares,
    "PCGrad": pcgrad(gramian),
    "CAGrad": CAGradWeighting(c=0.5)(gramian),
    "UPGrad": UPGradWeighting()(gramian),
    "MGDA": mgda,
}
cosines = torch.stack([served(weights, gramian) for weights in steps.values()])

# %%
levels = []
for value in report.log_snr:
    nearest = round(float(value))
    levels.append(f"{nearest}".replace("-", "−"))
fig, ax = plt.subplots(figsize=(6.6, 5.6))
plots.heatmap(ax, cosines, unit="cosine with the bin's own best direction")
ax.set_yticklabels(list(steps))
ax.set_xticklabels(levels)
ax.axhline(2, color="white", linewidth=6)
ax.set(xlabel="log-SNR of the bin (clean → noisy)")
lesson.show(
    fig,
    "09_one_step",
    title="Fixed weights make some bins worse; UPGrad and MGDA make none worse",
    caption="Each row is a step, each column a bin. Red: the bin gets better. Blue: it gets worse. The two upper rows do "
    "not look at conflicts, the four lower ones do.",
    alt="A matrix of cosines, six rules by five bins. The rows of CAGrad, UPGrad and MGDA have no negative value. Equal "
    "weights serve the clean bins and hurt the noisy ones; Dy-Sigma does the opposite.",
)
for name in ("UPGrad", "MGDA"):
    assert served(steps[name], gramian).min() > -1e-3, f"{name} must make no bin worse"

of_bins = pd.DataFrame(index=[f"log-SNR {level}" for level in levels])
of_bins["length of the gradient"] = lengths.numpy()
of_bins["loss"] = report.losses.numpy()
of_bins["share of Dy-Sigma"] = dy_sigma_shares.numpy()
lesson.table(of_bins, caption="The five bins: why the two upper rows differ")
if is_default:
    assert (cosines[:2].amin(1) < 0).all(), (
        "both fixed weightings must make a bin worse"
    )
    assert served(steps["CAGrad"], gramian).min() > 0, (
        "CAGrad must make none worse here"
    )
    assert (cosines[0, :2] > cosines[4:, :2].amax(0)).all(), (
        "the price is in the clean columns"
    )
    assert lengths.argmax() == 0 and report.losses.argmin() == 4, (
        "longest clean, smallest noisy"
    )

# %% [markdown]
# The rows of UPGrad and MGDA have no negative value: that is what they promise. CAGrad has none here either, but does
# not promise it. The price is in the two clean columns. A plain step serves those bins best, and UPGrad and MGDA serve
# them less well.
#
# The two upper rows are steps whose weights do not depend on the gradients. Each favours some bins over others. Equal
# weights follow the clean bins, because their gradients are longest. Dy-Sigma gives more weight to the noisy bins,
# whose losses are small. In this step that makes the clean bins worse.
#
# ## Does the promise hold with few samples?
#
# The picture used a well-measured $G$. In training, $G$ comes from a few samples. Give the rules such a $G$, with the noise
# in it (naive) or taken out on average (debiased, [08](08_gradient_conflicts.ipynb)). Take their weights, and ask the
# well-measured $G$ what these really do. In how many repeats does some bin get worse?

# %%
QUESTION_BROKEN = (
    "MGDA from 16 samples a bin, naive: share of repeats in which some bin gets worse?"
)
lesson.predict(QUESTION_BROKEN, None)


# %%
def naive_gramian(small):
    """The Gramian with the noise left in: a report holds its cosines and the ratio to the noise."""
    squares = small.gramian.diagonal()
    noise_squares = (
        squares / small.gnr
    )  # gnr is the debiased squared length over the noise
    naive_lengths = (squares + noise_squares).abs().sqrt()
    return small.cosine * naive_lengths[:, None] * naive_lengths[None, :]


def makes_a_bin_worse(find, noisy):
    """Whether the weights that a rule finds for a noisy Gramian hurt a bin of the true one."""
    usable = project_psd(noisy)
    usable = usable + 1e-9 * usable.diagonal().mean() * torch.eye(5)
    return bool(served(find(usable), gramian).min() < -0.01)


rows = []
for repeat in range(lesson.fast(12, 10)):
    small = conflicts(
        state.model,
        data,
        schedule_of_runs,
        bins,
        micro_batches=8,
        batch_per_bin=2,
        seed=100 + repeat,
        progress=False,
    )
    naive = naive_gramian(small)
    for rule, find in {"MGDA": min_norm_weights, "UPGrad": UPGradWeighting()}.items():
        rows.append([rule, "naive", makes_a_bin_worse(find, naive)])
        rows.append([rule, "debiased", makes_a_bin_worse(find, small.gramian)])

repeats = pd.DataFrame(rows, columns=["rule", "Gramian", "broken"])
table = repeats.pivot_table(index="rule", columns="Gramian", values="broken")
lesson.reveal(QUESTION_BROKEN, float(table.loc["MGDA", "naive"]))
lesson.table(
    table,
    caption="Share of repeats with a bin that gets worse (16 samples a bin)",
    digits=2,
)
if is_default:
    assert table.min().min() > 0.5, "the promise must be broken in most repeats"

# %% [markdown]
# With so few samples the promise is broken in most repeats, by both rules and with both Gramians. A rule that protects every
# bin needs to know every gradient. The debiased Gramian is right on average, but one draw of it is noisy too. So a rule
# that acts on conflicts has to average Gramians over steps, or to use large batches.
#
# ## A short training, without noise
#
# So give the rules their best case: exact gradients. The linear denoiser of [08](08_gradient_conflicts.ipynb) has ten
# timesteps. Each rule gets the same number of steps with the same learning rate, and its weights are divided by their
# sum. "Equal weights" means equal over the ten timesteps: the plain sum of losses, our control. Dy-Sigma's weights are
# those of its fixed point at the losses of the moment ([06](06_dy_sigma_derived.ipynb)). We watch how far the losses are
# above their best values: the mean of this excess, and the largest of the ten.

# %%
ten = NoiseSchedule(schedule.alphas_cumprod[50::100])
variances = torch.logspace(0.5, -1, 128, dtype=torch.float64)
toy = LinearDenoiser(ten, variances)
best = toy.irreducible()


def equal_weights(matrix, losses):
    return torch.ones(len(matrix), dtype=matrix.dtype)


prior_of_ten = make_weighting("min-snr", ten).weights().double()
dy_sigma_of_ten = make_weighting("dy-sigma", ten, bins=10)


def settled_dy_sigma(matrix, losses):
    z = prior_of_ten * losses
    return prior_of_ten * torch.exp(-dy_sigma_of_ten.fixed_point(z / z.mean()))


def looks_at_conflicts(rule):
    """The rule as a function of Gramian and losses, of which it needs the Gramian alone."""

    def find(matrix, losses):
        return rule(matrix)

    return find


rules = {
    "equal weights": equal_weights,
    "Dy-Sigma": settled_dy_sigma,
    "PCGrad": looks_at_conflicts(pcgrad),
    "CAGrad": looks_at_conflicts(CAGradWeighting(c=0.5)),
    "UPGrad": looks_at_conflicts(UPGradWeighting()),
    "MGDA": looks_at_conflicts(min_norm_weights),
}

# %%
NUM_STEPS = lesson.fast(80, 60)
RATE = 20.0


def train_toy(find, num_steps):
    """Mean and largest excess at the end, and the share of steps that raise some loss."""
    theta = torch.zeros(1, 128, dtype=torch.float64)
    rises = 0
    for _ in range(num_steps):
        before = toy.losses(theta)
        weights = find(toy.gramian(theta), before)
        if weights.sum() <= 1e-9:
            break  # CAGrad gives zeros where it takes the point for Pareto stationary
        step = RATE * (weights / weights.sum()) @ toy.gradients(theta)
        theta = theta - step.view_as(theta)
        rises += int((toy.losses(theta) > before + 1e-9).any())
    losses = toy.losses(theta)
    above = losses - best
    return {
        "mean excess": float(above.mean()),
        "largest excess": float(above.max()),
        "geometric mean of losses": float(losses.log().mean().exp()),
        "steps that raise some loss": rises / num_steps,
    }


trained = pd.DataFrame(
    {rule: train_toy(find, NUM_STEPS) for rule, find in rules.items()}
).T
lesson.table(trained, caption=f"The exact toy after {NUM_STEPS} steps", mark="MGDA")
assert trained["largest excess"].max() < 1, (
    "every rule must stay stable at this step size"
)
assert trained.loc["MGDA", "steps that raise some loss"] == 0, "MGDA must raise no loss"

# %% [markdown]
# Two rows agree in the first two columns: CAGrad ends where equal weights end. With $c<1$ it stays close enough to the
# plain step to reach a minimum of the mean (Liu et al. 2021).
#
# In the last column MGDA is alone: it raises no loss in any step. But its mean excess is the worst. Is it only slow? Give
# equal weights, Dy-Sigma, UPGrad and MGDA ten times as many steps.

# %%
QUESTION_LONGER = (
    "MGDA: mean excess after ten times as many steps, over that of the table?"
)
lesson.predict(QUESTION_LONGER, None)

# %%
ten_times = {}
for rule in ("equal weights", "Dy-Sigma", "UPGrad", "MGDA"):
    ten_times[rule] = train_toy(rules[rule], 10 * NUM_STEPS)
longer = pd.DataFrame(ten_times).T
ratio = float(longer.loc["MGDA", "mean excess"] / trained.loc["MGDA", "mean excess"])
lesson.reveal(QUESTION_LONGER, ratio)
lesson.table(longer, caption=f"The exact toy after {10 * NUM_STEPS} steps", mark="MGDA")
if RATE == 20.0:
    assert abs(ratio - 1) < 0.05, "MGDA must have stopped"
    assert longer["largest excess"].idxmin() == "UPGrad", "UPGrad: the best worst loss"
    assert longer["mean excess"].idxmin() == "equal weights", (
        "equal weights: the best mean"
    )
    assert longer["geometric mean of losses"].idxmin() == "Dy-Sigma", (
        "Dy-Sigma: the best geometric mean"
    )
    assert longer.loc["UPGrad", "steps that raise some loss"] > 0.5, (
        "UPGrad must raise losses"
    )
    assert trained["mean excess"].idxmax() == "MGDA", (
        "the mean of MGDA must be the worst"
    )

# %% [markdown]
# MGDA is not slow. It has stopped, at a *Pareto stationary point*: from there no small step lowers all losses, so MGDA
# takes none. Such a point need not be a good one. Where MGDA stops depends on where it started.
#
# UPGrad makes the same promise to first order, but its steps are long here, and it raises some loss in most of them.
# So it does not stop where MGDA stops.
#
# Now compare the columns. Each of the other three is best in one of them, and each in the one that it aims at: equal weights in
# the mean, UPGrad in the largest excess, Dy-Sigma in the geometric mean of the losses. Dy-Sigma pays for that in the first two
# columns. So no rule is better without saying at what.
#
# ## A short training of a network
#
# The toy has exact gradients and no noise. Now train a small network, with all that the toy leaves out: Adam, batches of 64
# images, and rules that see a Gramian from 80 samples every tenth step. The package does this with the weighting `gramian`. It
# takes the noise out, averages the last Gramians, and holds the shares of the rule until the next one.
#
# The images are Gaussian fields, for which the best possible loss is known. So we can again watch the excess, in five bins of
# 200 timesteps. The network, `SmallDenoiser`, has three layers. It is so small that we can train it with six rules and three seeds.

# %%
fields = gaussian_fields(4096, size=8).to(device)
test_images = gaussian_fields(512, size=8, split="test").images.to(device)
at = evaluation_timesteps(1000, 40)
best_denoiser = OptimalDenoiser(GaussianField(), schedule_of_runs).to(device)


def losses_of(network):
    return validation_losses(
        network, test_images, schedule_of_runs, "epsilon", timesteps=at
    )


floor = losses_of(best_denoiser)


def excess_of_bins(network):
    """Mean loss above the best possible one, in five bins of 200 timesteps, (5,)."""
    return (losses_of(network) - floor).view(5, 8).mean(1).double().numpy()


# %%
def gramian_of_step(network, weighting, seed, step, draw):
    """The Gramian of the weighting's bins from 16 fresh samples of each, noise taken out."""
    drawn = bin_timesteps(weighting.bins, 16, draw).flatten().to(device)
    images, _, _ = batch(fields, 1000 + seed, step, len(drawn))
    noise = torch.randn(images.shape, generator=draw).to(device)
    return bin_gramian(
        network, schedule_of_runs, images, noise, drawn, weighting.bins, splits=4
    )


def train_network(network, name, params, seed, num_steps, lr):
    """Train in place. With one seed, every rule sees the same images, timesteps and noise."""
    weighting = make_weighting(name, schedule_of_runs, **params)
    groups = [{"params": network.parameters(), "lr": lr}]
    optimizer = torch.optim.Adam(groups + weighting.parameter_groups())
    draw = torch.Generator().manual_seed(seed)
    draw_for_gramian = torch.Generator().manual_seed(1000 + seed)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / num_steps)
        if weighting.needs_gramian and step % weighting.gramian_every == 0:
            gramian_now = gramian_of_step(
                network, weighting, seed, step, draw_for_gramian
            )
            weighting.observe_gramian(gramian_now)
        images, _, _ = batch(fields, seed, step, 64)
        timesteps = torch.randint(1000, (64,), generator=draw).to(device)
        noise = torch.randn(images.shape, generator=draw).to(device)
        losses = sample_losses(
            network, schedule_of_runs, images, noise, timesteps, "epsilon"
        )
        optimizer.zero_grad()
        weighting(losses, timesteps).backward()
        optimizer.step()
    return network


# %% [markdown]
# Two starting points. The **young** network is untrained. The **older** one has had 2,000 steps with the plain sum. From each,
# every rule trains a copy for a short time. The control is the plain sum, trained for the same time.
#
# MGDA promises that no bin gets worse. In how many of the five bins does the older network end *above* its start with MGDA?

# %%
QUESTION_WORSE = "Older network, MGDA: bins (of 5) that end worse than they began?"
lesson.predict(QUESTION_WORSE, None)

# %%
GRAMIAN = {"bins": 5, "gramian_every": 10}
TRAINED_WITH = {
    "plain sum": ("const-eps", {}),
    "Dy-Sigma": ("dy-sigma", {}),
    "PCGrad": ("gramian", {**GRAMIAN, "rule": "pcgrad"}),
    "CAGrad": ("gramian", {**GRAMIAN, "rule": "cagrad"}),
    "UPGrad": ("gramian", {**GRAMIAN, "rule": "upgrad"}),
    "MGDA": ("gramian", {**GRAMIAN, "rule": "mgda"}),
}
SEEDS = range(lesson.fast(3, 2))
SHORT = lesson.fast(120, 30)  # steps

torch.manual_seed(0)
young = SmallDenoiser(schedule, width=64).to(device)
older = train_network(
    copy.deepcopy(young), "const-eps", {}, 99, lesson.fast(2000, 200), 3e-3
)
starts = {"young": (young, 3e-3), "older": (older, 1e-3)}

ended = {}  # (age, rule) to excess of the bins over that at the start, (seeds, 5)
means = {}  # (age, rule) to mean excess, (seeds,)
for age, (start, lr) in starts.items():
    before = excess_of_bins(start)
    for rule, (name, params) in TRAINED_WITH.items():
        excesses = []
        for seed in SEEDS:
            tuned = train_network(copy.deepcopy(start), name, params, seed, SHORT, lr)
            excesses.append(excess_of_bins(tuned))
        ended[age, rule] = np.array(excesses) / before
        means[age, rule] = np.mean(excesses, axis=1)


# %%
def table_of(age):
    rows = {}
    for rule in TRAINED_WITH:
        of_bins = np.exp(np.log(ended[age, rule]).mean(0))
        row = {f"bin {number}": value for number, value in enumerate(of_bins, 1)}
        log_ratios = np.log(means[age, rule] / means[age, "plain sum"])
        mean, half = t_interval(log_ratios)
        low, middle, high = np.exp([mean - half, mean, mean + half])
        row["mean / plain sum"] = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        rows[rule] = row
    rows["plain sum"]["mean / plain sum"] = "1"
    return pd.DataFrame(rows).T


of_older = table_of("older")
columns = [f"bin {number}" for number in range(1, 6)]
lesson.reveal(QUESTION_WORSE, int((of_older.loc["MGDA", columns] > 1).sum()))
for age in starts:
    lesson.table(
        table_of(age),
        caption=f"{age.capitalize()} network: excess of each bin, end over start (clean → noisy), {len(SEEDS)} seeds",
        mark="plain sum",
        digits=2,
    )

# %%
COLOURS = {
    "plain sum": "black",
    "PCGrad": "0.55",
    "UPGrad": "0.75",
    "Dy-Sigma": "C3",
    "CAGrad": "C1",
    "MGDA": "C0",
}
fig, ax = plt.subplots(figsize=(7.5, 4.2))
ax.axhline(1, color="0.3", linewidth=1, linestyle=":")
for rule, colour in COLOURS.items():
    of_bins = of_older.loc[rule, columns].astype(float)
    ax.plot(range(1, 6), of_bins, "o-", color=colour, label=rule)
ax.text(0.85, 0.995, "as at the start", color="0.3", ha="left", va="top")
ax.set_xticks(range(1, 6), ["1: clean", "2", "3", "4", "5: noisy"])
ax.set(xlabel="bin of 200 timesteps", ylabel="excess loss, end over start")
ax.legend(loc="upper right")
harmful = [rule for rule in COLOURS if of_older.loc[rule, "bin 1"] > 1.02]
lesson.show(
    fig,
    "09_short_training",
    title=f"Older network: {', '.join(harmful)} make clean bins worse"
    if harmful
    else "Older network: excess of each bin after a short training",
    caption=f"Geometric means over {len(SEEDS)} seeds. Below the dotted line a bin got better. Black: the plain sum, the control.",
    alt="Excess loss at the end over that at the start, for five bins and six rules. The plain sum, PCGrad and UPGrad lie within "
    "a per cent of 1 in all bins. Dy-Sigma, CAGrad and MGDA lie above 1 in the two clean bins and below 1 in the three noisy ones.",
)
if is_default:
    of_young = table_of("young")
    for rule in ("PCGrad", "UPGrad"):
        gap = of_young.loc[rule, columns] / of_young.loc["plain sum", columns] - 1
        assert gap.abs().max() < 0.05, f"{rule} must do what the plain sum does"
    best_mean = min(float(np.log(means["older", rule]).mean()) for rule in TRAINED_WITH)
    of_plain = float(np.log(means["older", "plain sum"]).mean())
    assert best_mean > of_plain - 0.03, "no rule may be far below the plain sum"
    noisy_bins = of_older.loc[harmful, columns[2:]].astype(float)
    assert harmful == ["Dy-Sigma", "CAGrad", "MGDA"], "the three rules of the text"
    assert noisy_bins.min(axis=None) > 0.9 and noisy_bins.max(axis=None) < 0.96, (
        "the noisy bins must fall by a twentieth to a tenth"
    )

# %% [markdown]
# *Young network.* All rules lower all bins. In the mean, PCGrad, UPGrad and Dy-Sigma end where the plain sum ends. In the mean, CAGrad and
# MGDA learn less in the same time: their excess is higher than that of the plain sum, and both intervals lie above 1. In the
# cleanest bin CAGrad learns a little more.
#
# *Older network.* For the plain sum nothing is left to gain in so short a time: no bin moves by more than about a per cent. PCGrad
# and UPGrad do the same. Dy-Sigma, CAGrad and MGDA lower the three noisy bins by a twentieth to a tenth, and make the two clean ones
# *worse*. Dy-Sigma is meant to lower the noisy bins: it gives their small losses more weight. CAGrad makes the same trade. MGDA
# does not keep its promise here. Few samples for a Gramian are one possible cause; Adam, and shares that are held for ten steps,
# are others. In the mean over the bins, none of the other five rules is below the plain sum by more than seed noise.
#
# ## When does it help?
#
# | aim | what to take | where we saw it |
# |---|---|---|
# | a low mean of the losses | the plain sum | toy; network: no rule was better |
# | a low worst loss | UPGrad, if gradients are exact | toy only |
# | no loss may rise | MGDA, if gradients are exact | toy only; with few samples MGDA broke it |
# | low *relative* losses, noisy bins too | Dy-Sigma | toy: geometric mean; network: noisy bins, and clean ones pay |
#
# So acting on conflicts helps if the aim is not a mean, and if the Gramian is known well. In our short training of a network with
# noisy Gramians no rule was better than the plain sum. Whether large batches or a long training change that, we have not
# measured. [10](10_pareto_trade_offs.ipynb) compares at the end of longer trainings.
#
# **Try it yourself.** Set `RATE = 2.0`: does UPGrad still raise losses in the first table?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **9.1** (●○○, 5 min) Two gradients with $G_{11}=4$, $G_{22}=1$, $G_{12}=-1$. What does PCGrad make of $g_1$? Give the
# coefficients of $g_1$ and $g_2$.
#
# <details><summary>Hint</summary>
#
# Subtract $G_{12}/G_{22}$ times $g_2$.
#
# </details>
#
# **9.2** (●●○, 8 min) Keep the two lengths, $G_{11}=4$ and $G_{22}=1$, and let the gradients agree more and more. From which
# $G_{12}$ on does MGDA ignore $g_1$ altogether?
#
# <details><summary>Hint</summary>
#
# MGDA minimises $w^2G_{11}+2w(1-w)G_{12}+(1-w)^2G_{22}$ over $0\le w\le1$. It takes $w=0$ if the slope there is not negative.
#
# </details>

# %%
# What the checks of the exercises expect; there is no need to read this cell.
lesson.exercise(
    "9.1", expected=[1.0, 1.0], mistakes={"The sign of the part is wrong.": [1.0, -1.0]}
)
lesson.exercise(
    "9.2",
    expected=1.0,
    mistakes={
        "At a right angle MGDA still gives a share of 1/5 to the first.": 0.0,
        "That is where the second would be ignored, and it is too long to happen.": 4.0,
        "That is where the cosine is 1: the two could not agree more.": 2.0,
    },
)

# %%
coefficients = ...  # [number, number]
lesson.check("9.1", coefficients)

# %%
least_agreement = ...  # a number
lesson.check("9.2", least_agreement)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
coefficients = [1.0, 0.0 - (-1) / 1]
lesson.check("9.1", coefficients)

# %% tags=["solution"]
# The slope at w = 0 is 2 (G12 - G22). So MGDA ignores the longer gradient where G12 >= G22: in direction
# of the shorter one, it already serves the longer one at least as well.
least_agreement = 1.0
lesson.check("9.2", least_agreement)

# %% [markdown]
# ## What you can now do
#
# - Read from $G\omega$ which bins a step improves, and which it makes worse.
# - Name the promise of a rule, and ask how many samples it needs to keep it.
# - Train with such a rule: `TrainConfig(weighting="gramian", weighting_params={"rule": "upgrad"})`.
#
# ## Limitations
#
# - In the first two sections: one network and one Gramian, first order only, and plain gradient steps. Adam takes other ones.
# - In the short training of a network: three layers, 8 × 8 pixels, 120 steps, three seeds, one learning rate for each of the
#   two networks, and 80 samples for a Gramian. All seeds start from the same young and the same older network, so the intervals
#   say nothing about other networks.
# - PCGrad of the package draws its order at random, as in the paper. The one written here does not.
#
# ## References
#
# - Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*, 2012,
#   [doi:10.1016/j.crma.2012.03.014](https://doi.org/10.1016/j.crma.2012.03.014).
# - Yu, Kumar, Gupta, Levine, Hausman, Finn, *Gradient Surgery for Multi-Task Learning*, 2020,
#   [arXiv:2001.06782](https://arxiv.org/abs/2001.06782): PCGrad.
# - Liu, Liu, Jin, Stone, Liu, *Conflict-Averse Gradient Descent for Multi-task Learning*, 2021,
#   [arXiv:2110.14048](https://arxiv.org/abs/2110.14048): CAGrad.
# - Quinton, Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024,
#   [arXiv:2406.16232](https://arxiv.org/abs/2406.16232): UPGrad, and the library TorchJD.
# - Chen, Fernando, Ying, Chen, 2023, [arXiv:2305.20057](https://arxiv.org/abs/2305.20057), and Xiao, Ban, Ji, 2023,
#   [arXiv:2305.18409](https://arxiv.org/abs/2305.18409): MoDo and SDMGrad, rules that stay unbiased under noise.
#
# **Next:** [10, Pareto trade-offs](10_pareto_trade_offs.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
