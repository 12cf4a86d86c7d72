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
# **Time** reading 20 min · running about 60 s (short run 35 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.pareto.min_norm_weights`, `dysigma.pareto.project_psd`.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torchjd.aggregation import CAGradWeighting, UPGradWeighting

from dysigma import NoiseSchedule, TrainConfig, conflicts, leaves, make_weighting, plots
from dysigma.bins import Bins
from dysigma.course.lesson import Lesson
from dysigma.exact import LinearDenoiser
from dysigma.pareto import min_norm_weights, project_psd
from dysigma.training import build, iterate

lesson = Lesson("09_acting_on_conflicts", trains_on="cpu")

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
    device="cpu",
)
is_default = config.lr == 2e-3 and lesson.fast(config.images == 9_600, False)
data = leaves(4096, size=8)
schedule = NoiseSchedule.linear(1000)
bins = Bins.equal_log_snr(schedule.log_snr, 5)

state = build(replace(config, seed=0), data)
for _ in iterate(state, data, config):
    pass
state.ema.copy_to(state.model)

report = conflicts(
    state.model,
    data,
    schedule,
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
# A later projection can undo an earlier one, so PCGrad promises nothing for more than two objectives. **UPGrad**
# (Quinton and Rey 2024) projects each gradient on the set of directions that raise *no* loss, and adds the results.
# **CAGrad** (Liu et al. 2021) stays near the plain step; a parameter $c$ says how near. Within that distance it
# improves the bin that is served worst. **Dy-Sigma** looks at losses only. It never sees $G$.

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
for repeat in range(lesson.fast(16, 10)):
    small = conflicts(
        state.model,
        data,
        schedule,
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
# sum. "Equal weights" means equal over the ten timesteps. We watch the mean of the losses above their best values, and
# the largest of them.

# %%
ten = NoiseSchedule(schedule.alphas_cumprod[50::100])
variances = torch.logspace(0.5, -1, 128, dtype=torch.float64)
toy = LinearDenoiser(ten, variances)
best = toy.irreducible()


def equal_weights(matrix):
    return torch.ones(len(matrix), dtype=matrix.dtype)


rules = {
    "equal weights": equal_weights,
    "PCGrad": pcgrad,
    "CAGrad": CAGradWeighting(c=0.5),
    "UPGrad": UPGradWeighting(),
    "MGDA": min_norm_weights,
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
        weights = find(toy.gramian(theta))
        if weights.sum() <= 1e-9:
            break  # CAGrad gives zeros where it takes the point for Pareto stationary
        step = RATE * (weights / weights.sum()) @ toy.gradients(theta)
        theta = theta - step.view_as(theta)
        rises += int((toy.losses(theta) > before + 1e-9).any())
    above = toy.losses(theta) - best
    return {
        "mean excess": float(above.mean()),
        "largest excess": float(above.max()),
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
# Two rows are equal: CAGrad ends where equal weights end. With $c<1$ it stays close enough to the plain step to reach a
# minimum of the mean (Liu et al. 2021).
#
# In the last column MGDA is alone: it raises no loss in any step. But its mean excess is the worst. Is it only slow? Give
# equal weights, UPGrad and MGDA ten times as many steps.

# %%
QUESTION_LONGER = (
    "MGDA: mean excess after ten times as many steps, over that of the table?"
)
lesson.predict(QUESTION_LONGER, None)

# %%
ten_times = {}
for rule in ("equal weights", "UPGrad", "MGDA"):
    ten_times[rule] = train_toy(rules[rule], 10 * NUM_STEPS)
longer = pd.DataFrame(ten_times).T
ratio = float(longer.loc["MGDA", "mean excess"] / trained.loc["MGDA", "mean excess"])
lesson.reveal(QUESTION_LONGER, ratio)
lesson.table(longer, caption=f"The exact toy after {10 * NUM_STEPS} steps", mark="MGDA")
if RATE == 20.0:
    assert abs(ratio - 1) < 0.05, "MGDA must have stopped"
    largest = longer["largest excess"]
    assert largest["UPGrad"] < largest["equal weights"] < largest["MGDA"], (
        "order of the largest"
    )
    assert longer["mean excess"].idxmin() == "equal weights", (
        "equal weights: the best mean"
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
# So it does not stop where MGDA stops. After the long training its largest excess is the smallest of the three rules.
# Its mean is higher than that of equal weights.
#
# When does acting on conflicts help, then? If the aim is a mean of losses, a step down that mean is the direct way. A
# rule that looks at conflicts is for another aim: that the worst loss is small, or that *no loss rises*, as when a
# good network is tuned further. The toy shows both: UPGrad has the smallest worst loss, MGDA raises no loss, and both
# have a higher mean than equal weights.
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
# **9.2** (●●○, 8 min) For the same gradients, which share does MGDA give to $g_1$?
#
# <details><summary>Hint</summary>
#
# Minimise $w^2G_{11}+2w(1-w)G_{12}+(1-w)^2G_{22}$ over $w$.
#
# </details>

# %%
# What the checks of the exercises expect; there is no need to read this cell.
lesson.exercise(
    "9.1", expected=[1.0, 1.0], mistakes={"The sign of the part is wrong.": [1.0, -1.0]}
)
lesson.exercise(
    "9.2", expected=2 / 7, mistakes={"That is the share of the second.": 5 / 7}
)

# %%
coefficients = ...  # [number, number]
lesson.check("9.1", coefficients)

# %%
first_share = ...  # a number
lesson.check("9.2", first_share)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
coefficients = [1.0, 0.0 - (-1) / 1]
lesson.check("9.1", coefficients)

# %% tags=["solution"]
first_share = (1 + 1) / (4 + 1 + 2 * 1)  # (G22 - G12) / (G11 + G22 - 2 G12)
lesson.check("9.2", first_share)

# %% [markdown]
# ## What you can now do
#
# - Read from $G\omega$ which bins a step improves, and which it makes worse.
# - Name the promise of a rule, and ask how many samples it needs to keep it.
# - Train with such a rule: `TrainConfig(weighting="gramian", weighting_params={"rule": "upgrad"})`.
#
# ## Limitations
#
# - One network and one Gramian. First order only, and plain gradient steps: Adam takes other ones.
# - The training is of a linear toy with exact gradients. [10](10_pareto_trade_offs.ipynb) has networks.
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
