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
# # 02 · One network, many objectives
#
# > **Claim.** Noise levels first help each other and later compete. In a young network, training on one band of noise
# > levels improves all bands. In an older one it improves its own band and makes distant bands worse.
#
# **You will be able to**
#
# - separate the part of a loss that can be learned from the part that cannot;
# - compare one shared network with several specialists fairly, by images *and* by optimizer steps;
# - use the words dominance, Pareto optimal, utopia point and price of sharing for measured losses;
# - measure a matrix of transfer between noise levels, with its control.
#
# **You need** [01](01_forward_process_and_snr.ipynb) (log-SNR, the floor of the loss) and the training loop of
# [00](00_start_here.ipynb).
#
# **Time** reading 25 min · running about 5 min (short run 45 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.bins.Bins`, `dysigma.exact.gaussian_fields`, `dysigma.exact.OptimalDenoiser`,
# `dysigma.pareto.non_dominated`, `dysigma.gradients.negative_transfer`.

# %%
import copy

import matplotlib.pyplot as plt
import pandas as pd
import torch

from dysigma import NoiseSchedule, make_model, plots, sample_losses
from dysigma.bins import Bins
from dysigma.course.lesson import Lesson
from dysigma.data import batch
from dysigma.evaluation import evaluation_timesteps
from dysigma.exact import GaussianField, OptimalDenoiser, field_floor, gaussian_fields
from dysigma.gradients import negative_transfer
from dysigma.pareto import non_dominated
from dysigma.randomness import generator

lesson = Lesson("02_one_network_many_objectives", trains_on="cpu")

# %% [markdown]
# ## Five jobs
#
# A denoiser gets a noisy image and a timestep, and must say what the image was. We cut the 1000 timesteps into five
# bands of 200. Is the job the same in each band? Look at what the network sees, and at the best answer that anyone could
# give. The images of this page are Gaussian random fields. For them the best answer is known exactly.

# %%
schedule = NoiseSchedule.cosine(1000)
bands = Bins.uniform(1000, 5)
NAMES = ["cleanest", "clean", "middle", "noisy", "noisiest"]

middles = torch.tensor([100, 300, 500, 700, 900])
one_image = gaussian_fields(1, size=32, split="test").images.float() / 127.5 - 1
five_times = one_image.expand(5, -1, -1, -1)
noise = torch.randn(five_times.shape, generator=generator(0, 0, "picture"))
seen = schedule.add_noise(five_times, noise, middles)
best_answer = OptimalDenoiser(GaussianField(32), schedule, "sample")(seen, middles)

lesson.gallery(
    {
        "the image": five_times.clamp(-1, 1),
        "what the network sees, cleanest to noisiest band": seen.clamp(-1, 1),
        "the best possible answer": best_answer.clamp(-1, 1),
    },
    "02_five_jobs",
    columns=5,
    pixels=128,
    title="One network, five jobs: from sharpening pixels to guessing the mean",
    caption="One image at the middle timestep of each band. On the left the best answer keeps nearly every pixel. On "
    "the right it keeps only the largest shapes, and at last hardly anything.",
    alt="Three rows of five grey pictures. First row: the same cloud-like image five times. Second row: it drowns in "
    "noise from left to right. Third row: a sharp image on the left becomes blurred, then nearly uniform.",
)

# %% [markdown]
# You should see two different skills. On the left the network must find small errors in single pixels. On the right it
# must guess a blurred image from almost nothing. One network with one set of parameters does both. This page asks
# whether training one skill improves the other skill or harms it.
#
# ## What can be learned: the excess
#
# A loss of 0.3 in one band and 0.01 in another says little. Part of each loss cannot be avoided, because the noise can
# never be told from the image with certainty. That part is the *floor* $L_t^\star$ of page 01. The best denoiser
# $\epsilon^\star$ reaches it. What lies above the floor is the **excess**. Since $\epsilon-\epsilon^\star$ is
# uncorrelated with everything that can be computed from $x_t$, the loss splits into two parts:
#
# $$L_t(\theta)=L_t^\star+\underbrace{\mathbb E\,\lVert\epsilon_\theta-\epsilon^\star\rVert^2}_{\text{excess}} .$$
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $\theta$ | `model` | | the parameters, shared by all timesteps |
# | $L_t^\star$ | `field_floor` | `(T,)` | the loss that no denoiser beats |
# | $\epsilon^\star$ | `best` | `(B, 1, 8, 8)` | the best guess at the noise |
# | | `excess` | `(40,)` | mean of $(\epsilon_\theta-\epsilon^\star)^2$ at 40 timesteps |
#
# We know $\epsilon^\star$ for these data. So we measure the excess directly, on held-out images of 8 × 8 pixels, at eight
# timesteps in each band. All networks are measured on the same noisy images.

# %%
TEST_IMAGES = lesson.fast(32, 8)
PROBES = evaluation_timesteps(1000, 40)  # eight timesteps in each band

test = gaussian_fields(TEST_IMAGES, split="test")
x0 = (test.images.float() / 127.5 - 1).repeat(40, 1, 1, 1)
timesteps = PROBES.repeat_interleave(TEST_IMAGES)
noise = torch.randn(x0.shape, generator=generator(0, 0, "noise"))
x_t = schedule.add_noise(x0, noise, timesteps)
best = OptimalDenoiser(GaussianField(8), schedule, "epsilon")(x_t, timesteps)


@torch.no_grad()
def excess(model):
    """The loss above the floor at each probe: (40,)."""
    predicted = model.eval()(x_t, timesteps).sample
    squared = (predicted - best).square().mean((1, 2, 3))
    return squared.view(40, TEST_IMAGES).mean(1)


def by_band(values):
    """(..., 40) values at the probes -> (..., 5) means over the bands."""
    return values.unflatten(-1, (5, 8)).mean(-1)


# %%
loss_of_best = (best - noise).square().mean((1, 2, 3)).view(40, TEST_IMAGES).mean(1)
floor = field_floor(schedule)[PROBES].float()

facts = pd.DataFrame(index=pd.Index(NAMES, name="band"))
facts["log-SNR"] = by_band(schedule.log_snr[PROBES])
facts["floor"] = by_band(floor)
facts["loss of the best denoiser"] = by_band(loss_of_best)
lesson.table(facts, caption="The five bands (cosine schedule)")
gap = (by_band(loss_of_best) / by_band(floor) - 1).abs().max()
assert gap < lesson.fast(0.1, 0.4), "the best denoiser must reach the floor"

# %% [markdown]
# The floor of the cleanest band is more than a hundred times that of the noisiest. A small excess disappears in it.
# Without the split, the loss of the cleanest band would hide what the network has learned there.
#
# ## One network or five?
#
# A specialist serves one band only, and has nothing to compromise with. Do five specialists beat one shared network? That
# depends on what we keep equal. Five networks share the work of one, so each gets a fifth of the *images*, or else a
# fifth of the *steps*. A young network needs many steps more than it needs many images. So we try both.
#
# | plan | networks | steps of each | images in a step | images in all |
# |---|---|---|---|---|
# | shared | 1 | 300 | 32 | 9,600 |
# | specialists, fewer steps | 5 | 60 | 32 | 9,600 |
# | specialists, equal steps | 5 | 300 | 6 | 9,000 |
#
# The training loop is that of page 00, for any range of timesteps. The learning rate falls to 0 in a straight line.

# %%
STEPS = lesson.fast(300, 15)
SEEDS = range(lesson.fast(3, 2))
is_default = lesson.fast(STEPS == 300, False)
data = gaussian_fields(8192)


def train(model, learning_rates, seed, first=0, last=1000, batch_size=32):
    """One Adam step for each learning rate, on timesteps from first to last - 1."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step, rate in enumerate(learning_rates):
        optimizer.param_groups[0]["lr"] = rate
        images, _, _ = batch(data, seed, step, batch_size)
        uniform = torch.rand(batch_size, generator=generator(seed, step, "timesteps"))
        drawn = first + (uniform * (last - first)).long()
        eps = torch.randn(images.shape, generator=generator(seed, step, "noise"))
        loss = sample_losses(model, schedule, images, eps, drawn, "epsilon").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def new_network(seed):
    torch.manual_seed(seed)
    return make_model("micro", 8, 1)


def falling(steps):
    return torch.linspace(2e-3, 0, steps + 1)[:-1].tolist()


# %% [markdown]
# Guess: in how many of the five bands do the specialists with *fewer* steps end below the shared network? And in how many
# those with *equal* steps?

# %%
FEWER = "Bands of 5 in which specialists are better, with fewer steps?"
EQUAL = "Bands of 5 in which specialists are better, with equal steps?"
lesson.predict(FEWER, None)
lesson.predict(EQUAL, None)


# %%
def train_specialists(seed, steps, batch_size):
    """The excess of five specialists in every band: (5 specialists, 5 bands)."""
    rows = []
    for band in range(5):
        first, last = bands.edges[band], bands.edges[band + 1]
        model = new_network(seed)
        train(model, falling(steps), seed, int(first), int(last), batch_size)
        rows.append(by_band(excess(model)))
    return torch.stack(rows)


shared_networks = [train(new_network(seed), falling(STEPS), seed) for seed in SEEDS]
shared = torch.stack([by_band(excess(model)) for model in shared_networks])

fewer_steps = torch.stack([train_specialists(seed, STEPS // 5, 32) for seed in SEEDS])
equal_steps = torch.stack([train_specialists(seed, STEPS, 6) for seed in SEEDS])

# %%
# Each specialist in its own band: (seeds, 5).
own_fewer = fewer_steps.diagonal(dim1=1, dim2=2)
own_equal = equal_steps.diagonal(dim1=1, dim2=2)

result = pd.DataFrame(index=pd.Index(NAMES, name="band"))
result["shared"] = 1000 * shared.mean(0)
result["specialists, fewer steps"] = 1000 * own_fewer.mean(0)
result["specialists, equal steps"] = 1000 * own_equal.mean(0)
lesson.reveal(FEWER, int((own_fewer.mean(0) < shared.mean(0)).sum()))
lesson.reveal(EQUAL, int((own_equal.mean(0) < shared.mean(0)).sum()))
lesson.table(result, caption=f"Excess × 1000, mean of {len(SEEDS)} seeds", digits=1)

# %%
PLANS = {
    "fewer steps (60 × 32 images)": own_fewer,
    "equal steps (300 × 6 images)": own_equal,
}
places = torch.arange(5)

fig, ax = plt.subplots(figsize=(7.5, 3.8))
for number, (label, values) in enumerate(PLANS.items()):
    ratio = values / shared
    ax.plot(places, ratio.log().mean(0).exp(), color=f"C{number}", marker="o", linewidth=2)
    for of_seed in ratio:
        ax.plot(places, of_seed, color=f"C{number}", marker=".", linewidth=0, alpha=0.6)
    height = float(ratio[:, 4].log().mean().exp())
    ax.text(4.12, height, label.replace(" (", "\n("), color=f"C{number}", va="center", fontsize=9)
ax.axhline(1, color="0.3", linewidth=1)
ax.text(4.12, 1.04, "shared network", color="0.3", va="bottom", fontsize=9)
ax.set_xticks(places, labels=NAMES)
ax.set(xlabel="band", ylabel="excess / excess of shared", xlim=(-0.2, 5.4))
ax.set_yscale("log")
ax.set_yticks([0.5, 1, 2, 4, 8], labels=["0.5", "1", "2", "4", "8"])
ax.minorticks_off()
lesson.show(
    fig,
    "02_specialists",
    title="Do specialists beat one shared network? It depends on what is kept equal",
    caption="Excess of each specialist in its own band, relative to the shared network. Below the line specialists are "
    "better. Lines: geometric mean of the seeds. Dots: single seeds. Images in all are nearly equal in the three plans.",
    alt="Two lines over five bands on a logarithmic axis. The one for fewer steps lies far above one everywhere. The one "
    "for equal steps is near one in the second and third band and below it in the other three.",
)

# %% [markdown]
# With fewer steps the specialists have a larger excess in every band, by a factor of 2 to 6. The reason is the number
# of steps, and not the sharing. With equal steps and about as many images, the specialists have a smaller excess in
# three bands of five. In the remaining two bands theirs is at most 8 % larger. So the first comparison does not show
# that sharing is good, and the second does not show that it is bad. "At equal work" can mean equal images or equal
# steps, and the two lead to different answers. A report that a shared network beats specialists must say what was equal.

# %%
if is_default:
    assert (own_fewer > shared).all(), "with fewer steps the specialists must lose in every band"
    won = own_equal.mean(0) < shared.mean(0)
    assert won.sum() == 3, "with equal steps the specialists must win three bands"
    assert (own_equal.mean(0) < 1.15 * shared.mean(0)).all(), "and nearly tie in the others"

# %% [markdown]
# ## Four words for many losses
#
# Five bands are five objectives. We want to compare networks without choosing weights first. Four words do that:
#
# - Network $a$ **dominates** $b$ if it is nowhere worse and in at least one band better.
# - A network is **Pareto optimal** if no possible network dominates it. To lower one of its losses, another must rise.
# - The **utopia point** collects the best reachable value of each band, each with parameters of its own.
# - The **price of sharing** is the loss of the shared network minus the utopia point.
#
# Here are the shared network and the five specialists with equal steps. A specialist, too, has an excess in every band.


# %%
def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


points = torch.cat([shared.mean(0, keepdim=True), equal_steps.mean(0)])
is_dominated = []
for point in points:
    is_dominated.append(any(dominates(other, point) for other in points))

networks = ["shared"]
for name in NAMES:
    networks.append(f"specialist: {name}")
table = pd.DataFrame((1000 * points).numpy(), index=networks, columns=NAMES)
table["dominated"] = ["yes" if flag else "no" for flag in is_dominated]
lesson.table(table, mark="shared", caption="Excess × 1000 of six networks in five bands", digits=0)

package_agrees = non_dominated(points) == ~torch.tensor(is_dominated)
assert package_agrees.all(), "the definition and the package must agree"

# %% [markdown]
# Far from its own band a specialist is several times worse than the shared network. The shared network is dominated by none
# of the five. That is weak evidence, because in five dimensions few points dominate each other. It does not make the
# shared network Pareto optimal either: after more training, a better network exists. So look at training itself.
#
# ## Transfer: what one band's training does to the others
#
# Take a shared network. Make five copies. Train each copy a little further, on one band alone: 20 Adam steps. Then measure
# all five bands again. We report the change as a share of the excess that was there before:
#
# $$\text{transfer}_{ij}=\frac{\text{excess}_j(\text{copy trained on }i)-\text{excess}_j(\text{before})}{\text{excess}_j(\text{before})}.$$
#
# A value of −0.3 means that 30 % of what was left to learn is gone. A value of +1 means that it has doubled. A positive
# value off the diagonal is **negative transfer**: training on band $i$ harmed band $j$.

# %%
TUNING_RATES = [3e-4] * lesson.fast(20, 3)


def transfer_matrix(network, seed):
    """Row: the band a copy trains on. Column: the relative change of a band's excess."""
    before = by_band(excess(network))
    rows = []
    for band in range(5):
        first, last = bands.edges[band], bands.edges[band + 1]
        tuned = copy.deepcopy(network)
        train(tuned, TUNING_RATES, 1000 + seed, int(first), int(last))
        rows.append(by_band(excess(tuned)) / before - 1)
    return torch.stack(rows)


# %% [markdown]
# We do this at three ages of the shared network. Guess for the oldest: a copy trains on the noisiest band. By which share
# does its excess in the band called "clean" change? Mind the sign.

# %%
FAR = "Oldest network, trained on 'noisiest': relative change in 'clean'?"
lesson.predict(FAR, None)

# %%
AGES = [10, lesson.fast(60, 12), STEPS]
networks_at = {STEPS: shared_networks}
for age in AGES[:2]:
    networks_at[age] = [train(new_network(seed), falling(age), seed) for seed in SEEDS]

transfer = {}
for age in AGES:
    matrices = []
    for seed, network in zip(SEEDS, networks_at[age], strict=True):
        matrices.append(transfer_matrix(network, seed))
    transfer[age] = torch.stack(matrices)  # (seeds, 5, 5)

lesson.reveal(FAR, float(transfer[STEPS].mean(0)[4, 1]))

# %%
fig, axes = plt.subplots(1, 3, figsize=(12.5, 4.4), sharey=True)
for ax, age in zip(axes, AGES, strict=True):
    plots.heatmap(ax, transfer[age].mean(0), labels=NAMES, unit="transfer", colorbar=age == STEPS)
    ax.set(title=f"network of {age} steps", xlabel="measured on")
    ax.tick_params(axis="x", labelrotation=30)
axes[0].set_ylabel("trained on")
lesson.show(
    fig,
    "02_transfer",
    title="First every band helps every other; later most of them compete",
    caption="Relative change of the excess in the band of the column, when a copy trains 20 steps on the band of the row. "
    "Blue: it got better. Red: it got worse. Means over seeds.",
    alt="Three signed five by five matrices. In the first every cell is blue. In the second the first row and column turn "
    "red. In the third the diagonal is blue and most other cells are red, the reddest far from the diagonal.",
)

# %% [markdown]
# Read the figure from left to right. In the youngest network all cells are blue: the first things to learn are the
# same at every noise level. In the middle one, training on the cleanest band harms the other four bands, and training
# on any of them harms the cleanest. In the oldest the diagonal is blue and most of the rest is red. How many of the 20
# pairs are clear of seed noise?

# %%
off_diagonal = ~torch.eye(5, dtype=torch.bool)

counts = pd.DataFrame(index=pd.Index(AGES, name="age in steps"))
for age in AGES:
    mean, half_width = plots.t_interval(transfer[age])
    mean = torch.as_tensor(mean)[off_diagonal]
    half_width = torch.as_tensor(half_width)[off_diagonal]
    counts.loc[age, "helped"] = int((mean < 0).sum())
    counts.loc[age, "hurt"] = int((mean > 0).sum())
    counts.loc[age, "surely helped"] = int((mean + half_width < 0).sum())
    counts.loc[age, "surely hurt"] = int((mean - half_width > 0).sum())
lesson.table(
    counts.astype(int), mark=STEPS, caption="Of 20 pairs (surely: 95 % interval excludes 0)"
)

# %%
youngest = transfer[AGES[0]].mean(0)
oldest = transfer[STEPS].mean(0)
assert (youngest < 0).all(), "at first every band must help every other"
if is_default:
    assert (oldest.diagonal() < 0).all(), "a copy must get better at what it trains on"
    assert (oldest[off_diagonal] > 0).sum() > 10, "in the oldest network most pairs must compete"
    assert oldest[4, 1] > oldest[3, 4], "distant bands must suffer more than these neighbours"

# %% [markdown]
# ## Is it specialising, or just more training?
#
# A copy that trains on one band also trains 20 steps *more*. Perhaps anything would improve by that. The control is a
# copy that trains 20 more steps on **all** bands. If its excess falls by the same share, specialising gains nothing. A
# second control is a copy with learning rate 0. It must change nothing at all.

# %%
comparison = pd.DataFrame(columns=NAMES)
for age in (AGES[0], STEPS):
    changes = []
    for seed, network in zip(SEEDS, networks_at[age], strict=True):
        tuned = train(copy.deepcopy(network), TUNING_RATES, 1000 + seed)
        changes.append(by_band(excess(tuned)) / by_band(excess(network)) - 1)
    all_bands = torch.stack(changes).mean(0)
    own_band = transfer[age].mean(0).diagonal()
    comparison.loc[f"{age} steps: own band"] = own_band.numpy()
    comparison.loc[f"{age} steps: all bands"] = all_bands.numpy()
    comparison.loc[f"{age} steps: gain of specialising"] = (own_band - all_bands).numpy()

gains = [row for row in comparison.index if "gain" in row]
lesson.table(comparison, mark=gains, caption="Relative change of the excess", digits=2)

idle = train(copy.deepcopy(shared_networks[0]), [0.0], seed=0)
assert torch.equal(excess(idle), excess(shared_networks[0])), "a rate of 0 must change nothing"
if is_default:
    gain_young = comparison.loc[gains[0]].mean()
    gain_old = comparison.loc[gains[1]].mean()
    assert gain_old < gain_young - 0.05, "specialising must gain more in the older network"

# %% [markdown]
# In the young network specialising gains little or nothing: all bands want the same step. In the old one it lowers the
# excess clearly below that of the control. The shared network gives up this gain in one band so that the other bands
# do not get worse. It is one measured piece of the price of sharing.
#
# ## What this has to do with loss weights
#
# Training minimises one number, $\sum_t w_t L_t(\theta)$. While all bands help each other, the weights $w_t$ hardly
# matter for the direction. Once the bands compete, the weights decide which of them gives way. That is why there is a
# literature on loss weights at all. [Page 03](03_snr_weightings.ipynb) derives the best-known ones, and shows in an
# exact example which noise levels get worse under which weighting. [Page 08](08_gradient_conflicts.ipynb) looks for
# the reason of negative transfer in the gradients.
#
# ## The same on your own network
#
# `negative_transfer` makes the copies and trains them. It needs no floor: it reports the change of the plain loss, in
# percent of the loss before. Here it is for the oldest network of the first seed, with its own random draws.

# %%
of_package = negative_transfer(
    shared_networks[0],
    data,
    schedule,
    bands,
    steps=len(TUNING_RATES),
    batch_size=32,
    samples_per_bin=lesson.fast(128, 32),
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-4),
    progress=False,
)
print(of_package.sentence())

by_hand = transfer[STEPS][0] * shared[0]  # back from shares to changes of the loss
pairs = torch.stack([by_hand[off_diagonal].double(), of_package.change[off_diagonal]])
correlation = float(torch.corrcoef(pairs)[0, 1])
print(f"correlation with the changes measured by hand, 20 pairs: {correlation:.2f}")
if is_default:
    assert correlation > 0.7, "the package must find the same pattern as we did"

# %% [markdown]
# The package and our measurement by hand agree on which band harms which. In percent of the loss the clean bands
# change least, because most of their loss is floor.
#
# **Try it yourself.** `STEPS = 120` or `600`: when does the competition start? Or `NoiseSchedule.linear(1000)` in the
# second cell: which bands are now far apart? Then also set `is_default = False` below `STEPS`, because some checks
# hold for the cosine schedule only.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
vectors = torch.tensor(
    [[3.0, 2.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, 2.0], [2.0, 2.0, 4.0], [1.0, 4.0, 2.0]]
)
lesson.exercise(
    "2.1",
    expected=~non_dominated(vectors),
    mistakes={
        "Those are the others.": non_dominated(vectors),
        "Equal rows do not dominate each other.": [False, True, True, False, True],
        "A smaller sum is not dominance.": [False, False, True, True, False],
    },
)

loss_shared = torch.tensor([0.93, 0.41, 0.10])
loss_alone = torch.tensor([0.92, 0.38, 0.06])
loss_floor = torch.tensor([0.90, 0.35, 0.05])
lesson.exercise(
    "2.2",
    expected=loss_shared - loss_alone,
    mistakes={
        "That is the excess: it is measured from the floor.": loss_shared - loss_floor,
        "The sign: the shared network has the larger loss, so the price is positive.": loss_alone
        - loss_shared,
    },
)

loss_after = torch.tensor([0.95, 0.38, 0.11])
excess_before = loss_shared - loss_floor
lesson.exercise(
    "2.3",
    expected=(loss_after - loss_shared) / excess_before,
    mistakes={
        "That is a share of the whole loss, floor included.": loss_after / loss_shared - 1,
        "That is the change itself; divide it by the excess before.": loss_after - loss_shared,
        "Measure the excess from the floor.": (loss_after - loss_shared)
        / (loss_shared - loss_alone),
    },
)

# %% [markdown]
# **2.1** (●○○, 4 min) Five networks with three losses each, smaller is better: (3, 2, 2), (1, 4, 2), (3, 3, 2),
# (2, 2, 4), (1, 4, 2). Which are dominated by another one? Answer with a list of five `True` or `False`, by hand.
#
# <details><summary>Hint</summary>
#
# Compare two at a time. The dominating one must be at least as good in all three numbers, and better in one.
#
# </details>

# %%
dominated = ...
lesson.check("2.1", dominated)

# %% [markdown]
# **2.2** (●○○, 3 min) In three bands a shared network has the losses `loss_shared`. Networks that train on one band only,
# to the end, reach `loss_alone`. The floor is `loss_floor`. What is the price of sharing in each band, `(3,)`?
#
# <details><summary>Hint</summary>
#
# The utopia point is what *this network* could reach in each band, and not the floor.
#
# </details>

# %%
price = ...
lesson.check("2.2", price)

# %% [markdown]
# **2.3** (●●○, 5 min) A copy of the shared network of 2.2 trains on the second band alone, and has the losses `loss_after`.
# Compute its row of the transfer matrix: the change as a share of the excess before, `(3,)`. Where is negative transfer?
#
# <details><summary>Hint</summary>
#
# The floor is the same before and after, so the change of the excess is the change of the loss.
#
# </details>

# %%
row_of_transfer = ...
lesson.check("2.3", row_of_transfer)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
# The third is no better than the first anywhere and worse in the second number. Equal rows do not count.
dominated = [False, False, True, False, False]
lesson.check("2.1", dominated)

# %% tags=["solution"]
price = loss_shared - loss_alone
lesson.check("2.2", price)

# %% tags=["solution"]
row_of_transfer = (loss_after - loss_shared) / (loss_shared - loss_floor)
lesson.check("2.3", row_of_transfer)
print("negative transfer in the bands with a positive value:", row_of_transfer.tolist())

# %% [markdown]
# ## What you can now do
#
# - Split a loss into floor and excess, and compare networks by the excess.
# - Ask "what was kept equal?" when someone compares one network with several.
# - Name dominance, Pareto optimality, the utopia point and the price of sharing in a table of losses.
# - Measure transfer between bands of noise levels, next to a control that trains on everything.
#
# ## Limitations
#
# - One data set of 8 × 8 Gaussian fields, one small network, 300 steps, one untuned learning rate, three seeds. When, and
#   how strongly, large networks on photographs enter the late stage is not shown here.
# - Equal steps with 6 images a step means noisier steps. No comparison of one network with five is equal in all respects,
#   and none of ours lets the specialists train to the end.
# - Transfer is measured by 20 steps on one band with nothing else in the batch. Part of it is forgetting, which joint
#   training would prevent.
# - "Surely" is said of each pair alone. Of 60 pairs a few may be wrong.
#
# ## References
#
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo (2023), *Efficient diffusion training via Min-SNR weighting strategy*,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): treats diffusion training as multi-task learning.
# - Go et al. (2023), *Addressing negative transfer in diffusion models*,
#   [arXiv:2306.00354](https://arxiv.org/abs/2306.00354): affinity between denoising tasks falls as noise levels move apart.
# - Ma et al. (2024), *Decouple-then-merge*, [arXiv:2410.06664](https://arxiv.org/abs/2410.06664): fine-tunes a copy for
#   each range of timesteps, then merges the copies.
# - Fifty et al. (2021), *Efficiently identifying task groupings for multi-task learning*,
#   [arXiv:2109.04617](https://arxiv.org/abs/2109.04617): measures how a step on one task changes another task's loss.
# - Sener, Koltun (2018), *Multi-task learning as multi-objective optimization*,
#   [arXiv:1810.04650](https://arxiv.org/abs/1810.04650): the words of this page, for the losses of one network.
#
# **Next:** [03, SNR weightings](03_snr_weightings.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
