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
# > **Question.** One network serves all noise levels. Train it on one band of noise levels alone: do the other bands gain
# > or lose? And is the answer the same for a young network and for an older one?
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
# **Time** reading 25 min · running about 2 min (short run 15 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.bins.Bins`, `dysigma.exact.gaussian_fields`, `dysigma.exact.OptimalDenoiser`,
# `dysigma.pareto.non_dominated`, `dysigma.gradients.negative_transfer`.

# %%
import copy

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display
from torch import nn

from dysigma import NoiseSchedule, plots, sample_losses
from dysigma.bins import Bins
from dysigma.course.lesson import Lesson
from dysigma.data import batch
from dysigma.evaluation import evaluation_timesteps
from dysigma.exact import GaussianField, OptimalDenoiser, field_floor, gaussian_fields
from dysigma.gradients import negative_transfer
from dysigma.pareto import non_dominated
from dysigma.randomness import generator

lesson = Lesson("02_one_network_many_objectives", trains_on="auto")
device = lesson.device  # a GPU if there is one

# %% [markdown]
# ## Five jobs
#
# A denoiser gets a noisy image and a timestep, and must say what the image was. We cut the 1000 timesteps into five
# bands of 200. Is the job the same in each band? Look at what the network sees, and at the best answer that anyone could
# give. The images of this page are Gaussian random fields. For them the best answer is known exactly.

# %%
schedule = NoiseSchedule.cosine(1000).to(device)
bands = Bins.uniform(1000, 5)
NAMES = ["cleanest", "clean", "middle", "noisy", "noisiest"]

middles = torch.tensor([100, 300, 500, 700, 900])
one_image = gaussian_fields(1, size=32, split="test").images.float() / 127.5 - 1
five_times = one_image.to(device).expand(5, -1, -1, -1)
noise = torch.randn(five_times.shape, generator=generator(0, 0, "picture"))
noise = noise.to(device)  # drawn on the CPU, so that it is the same everywhere
seen = schedule.add_noise(five_times, noise, middles)
best_denoiser = OptimalDenoiser(GaussianField(32), schedule, "sample").to(device)
best_answer = best_denoiser(seen, middles)

lesson.gallery(
    {
        "the image": five_times.clamp(-1, 1),
        "what the network sees, cleanest to noisiest band": seen.clamp(-1, 1),
        "the best possible answer": best_answer.clamp(-1, 1),
    },
    "02_five_jobs",
    columns=5,
    pixels=128,
    title="Five jobs: from sharpening pixels to guessing the mean",
    caption="One image at the middle timestep of each band. On the left the best "
    "answer keeps nearly every pixel. On the right it keeps only the largest shapes, "
    "and at last hardly anything.",
    alt="Three rows of five grey pictures. First row: the same cloud-like image five "
    "times. Second row: it drowns in noise from left to right. Third row: a sharp "
    "image on the left becomes blurred, then nearly uniform.",
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

test = gaussian_fields(TEST_IMAGES, split="test").to(device)
x0 = (test.images.float() / 127.5 - 1).repeat(40, 1, 1, 1)
timesteps = PROBES.repeat_interleave(TEST_IMAGES).to(device)
noise = torch.randn(x0.shape, generator=generator(0, 0, "noise")).to(device)
x_t = schedule.add_noise(x0, noise, timesteps)
best_denoiser = OptimalDenoiser(GaussianField(8), schedule, "epsilon").to(device)
best = best_denoiser(x_t, timesteps)


@torch.no_grad()
def excess(model):
    """The loss above the floor at each probe: (40,), on the CPU."""
    predicted = model(x_t, timesteps)
    squared = (predicted - best).square().mean((1, 2, 3))
    return squared.view(40, TEST_IMAGES).mean(1).cpu()


def by_band(values):
    """(..., 40) values at the probes -> (..., 5) means over the bands."""
    return values.unflatten(-1, (5, 8)).mean(-1)


# %%
loss_of_best = (best - noise).square().mean((1, 2, 3)).cpu()
loss_of_best = loss_of_best.view(40, TEST_IMAGES).mean(1)
floor = field_floor(schedule)[PROBES].float().cpu()

facts = pd.DataFrame(index=pd.Index(NAMES, name="band"))
facts["log-SNR"] = by_band(schedule.log_snr[PROBES].cpu())
facts["floor"] = by_band(floor)
facts["loss of the best denoiser"] = by_band(loss_of_best)
lesson.table(facts, caption="The five bands (cosine schedule)")
gap = (by_band(loss_of_best) / by_band(floor) - 1).abs().max()
assert gap < lesson.fast(0.1, 0.4), "the best denoiser must reach the floor"
floors = facts["floor"]
assert TEST_IMAGES < 32 or floors["cleanest"] > 100 * floors["noisiest"], (
    "as the text says"
)

# %% [markdown]
# The floor of the cleanest band is more than a hundred times that of the noisiest. In the loss of the cleanest band most is
# floor. So that loss would hide what the network has learned there, and the excess shows it.
#
# ## One network or five?
#
# A specialist serves one band only, and has nothing to compromise with. Do five specialists beat one shared network? That
# depends on what we keep equal. Five networks share the work of one, so each gets a fifth of the *images*, or else a
# fifth of the *steps*. Early in training, the number of steps matters more than the number of images. So we try both.
#
# - **Shared:** one network, with some number of steps at 32 images each.
# - **Specialists, fewer steps:** five networks. Each gets a fifth of the steps, at 32 images each.
# - **Specialists, equal steps:** five networks. Each gets all the steps, at 6 images each.
#
# The three plans use nearly the same number of images in total. The next cell computes it.

# %%
STEPS = lesson.fast(270, 15)
SEEDS = range(lesson.fast(3, 2))
WIDTH = 32  # channels of the network
data = gaussian_fields(8192).to(device)

# Claims about this experiment are checked for the default settings, in a full run on the CPU.
is_cosine = torch.equal(
    schedule.alphas_cumprod.cpu(), NoiseSchedule.cosine(1000).alphas_cumprod
)
is_full_size = STEPS == 270 and len(SEEDS) == 3 and WIDTH == 32
is_default = is_cosine and is_full_size and lesson.as_published

plans = pd.DataFrame(columns=["networks", "steps of each", "images in a step"])
plans.loc["shared"] = [1, STEPS, 32]
plans.loc["specialists, fewer steps"] = [5, STEPS // 5, 32]
plans.loc["specialists, equal steps"] = [5, STEPS, 6]
plans["images in all"] = plans.prod(axis=1)
lesson.table(plans, caption="Three plans with nearly the same number of images")

# %% [markdown]
# The network is small, so that this page takes a minute or two: four convolutions, and a vector of the timestep that
# shifts their channels.


# %%
class SmallDenoiser(nn.Module):
    """Predicts the noise in images of 8 x 8 pixels."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, -2.6, 16))
        self.of_time = nn.Sequential(
            nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 3 * width)
        )
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x_t, timesteps):
        angles = timesteps[:, None] * self.frequencies
        time = self.of_time(torch.cat([angles.sin(), angles.cos()], 1))
        shift_1, shift_2, shift_3 = time[:, :, None, None].chunk(3, dim=1)
        hidden = nn.functional.silu(self.first(x_t) + shift_1)
        hidden = hidden + nn.functional.silu(self.second(hidden) + shift_2)
        hidden = hidden + nn.functional.silu(self.third(hidden) + shift_3)
        return self.last(hidden)


def new_network(seed):
    torch.manual_seed(seed)
    return SmallDenoiser().to(device)


# %% [markdown]
# The training loop is that of page 00, for any range of timesteps. The learning rate falls to 0 in a straight line.


# %%
def train(model, learning_rates, seed, first=0, last=1000, batch_size=32):
    """One Adam step for each learning rate, on timesteps from first to last - 1."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step, rate in enumerate(learning_rates):
        optimizer.param_groups[0]["lr"] = rate
        images, _, _ = batch(data, seed, step, batch_size)
        uniform = torch.rand(batch_size, generator=generator(seed, step, "timesteps"))
        drawn = first + (uniform * (last - first)).long()
        eps = torch.randn(images.shape, generator=generator(seed, step, "noise"))
        eps = eps.to(device)
        loss = sample_losses(model, schedule, images, eps, drawn, "epsilon").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


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
better_fewer = int((own_fewer.mean(0) < shared.mean(0)).sum())
better_equal = int((own_equal.mean(0) < shared.mean(0)).sum())
lesson.reveal(FEWER, better_fewer)
lesson.reveal(EQUAL, better_equal)
lesson.table(result, caption=f"Excess × 1000, mean of {len(SEEDS)} seeds", digits=1)

# %%
PLANS = {
    f"fewer steps\n({STEPS // 5} × 32 images)": own_fewer,
    f"equal steps\n({STEPS} × 6 images)": own_equal,
}
places = torch.arange(5)

fig, ax = plt.subplots(figsize=(7.5, 3.8))
for number, (label, values) in enumerate(PLANS.items()):
    ratio = values / shared
    ax.plot(
        places, ratio.log().mean(0).exp(), color=f"C{number}", marker="o", linewidth=2
    )
    for of_seed in ratio:
        ax.plot(places, of_seed, color=f"C{number}", marker=".", linewidth=0, alpha=0.6)
    height = float(ratio[:, 4].log().mean().exp())
    ax.text(4.12, height, label, color=f"C{number}", va="center", fontsize=9)
ax.axhline(1, color="0.3", linewidth=1)
ax.text(4.12, 1.04, "shared network", color="0.3", va="bottom", fontsize=9)
ax.set_xticks(places, labels=NAMES)
ax.set(xlabel="band", ylabel="excess / excess of shared", xlim=(-0.2, 5.4))
ax.set_yscale("log")
ax.set_yticks([0.5, 1, 2, 4, 8], labels=["0.5", "1", "2", "4", "8"])
ax.minorticks_off()
if is_default:
    title = "Specialists lose with fewer steps; with equal steps they often win"
    shape = (
        "The one for fewer steps lies far above one everywhere. The one for equal "
        "steps is near one in the second and third band and below it in the other "
        "three."
    )
else:
    title = (
        f"Bands with better specialists: fewer steps {better_fewer} of 5, equal steps "
        f"{better_equal} of 5"
    )
    shape = "Below one, the specialists are better."
lesson.show(
    fig,
    "02_specialists",
    title=title,
    caption="Excess of each specialist in its own band, relative to the shared "
    "network. Below the line specialists are better. Lines: geometric mean of the "
    "seeds. Dots: single seeds. Images in all are nearly equal in the three plans.",
    alt=f"Two lines over five bands on a logarithmic axis. {shape}",
)

# %%
times_fewer = (own_fewer / shared).log().mean(0).exp()
times_equal = (own_equal / shared).log().mean(0).exp()
display(
    Markdown(
        f"With fewer steps, the excess of specialists is {times_fewer.min():.1f} to "
        f"{times_fewer.max():.1f} times that of the shared network. With equal steps, "
        f"it is {times_equal.min():.2f} to {times_equal.max():.2f} times."
    )
)
if is_default:
    assert (own_fewer > shared).all(), (
        "with fewer steps specialists must lose in every band"
    )
    assert (times_equal < 0.85).sum() >= 3, (
        "with equal steps they must win clearly in most bands"
    )
    assert times_equal.max() < 1.15, "and nearly tie in the others"

# %% [markdown]
# This is what the default settings show. (A short run trains too little for it.)
#
# - *Fewer steps.* The specialists lose in every band. The reason is the number of steps, and not the sharing.
# - *Equal steps*, and about as many images. The specialists win clearly in most bands, and nearly tie in the others.
#
# So the first comparison does not show that sharing is good, and the second does not show that it is bad. "At equal work"
# can mean equal images or equal steps, and the two lead to different answers. A report that a shared network beats
# specialists must say what was equal.

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
lesson.table(
    table,
    mark="shared",
    caption="Excess × 1000 of six networks in five bands",
    digits=0,
)

package_agrees = non_dominated(points) == ~torch.tensor(is_dominated)
assert package_agrees.all(), "the definition and the package must agree"
if is_default:
    assert not is_dominated[0], "no specialist may dominate the shared network"
    assert points[1, 4] > 5 * points[0, 4], (
        "the cleanest specialist must be bad at the noisiest"
    )
    assert points[5, 0] > 5 * points[0, 0], "and the other way round"

# %% [markdown]
# Far from its own band a specialist is many times worse than the shared network. None of the five dominates the shared
# network. That is weak evidence, because with five objectives few points dominate each other. It does not make the shared
# network Pareto optimal either: after more training, a better network exists. So look at training itself.
#
# ## Transfer: what one band's training does to the others
#
# Take a shared network. Make five copies. Train each copy a little further, on one band alone: 20 Adam steps. Then measure
# all five bands again. We report the part of the excess that is gone:
#
# $$\text{transfer}_{ij}=\frac{\text{excess}_j(\text{before})-\text{excess}_j(\text{copy trained on }i)}{\text{excess}_j(\text{before})}.$$
#
# A value of 0.3 means that 30 % of what was left to learn is gone. A value of −1 means that the excess has doubled. A
# negative value off the diagonal is **negative transfer**: training on band $i$ harmed band $j$.

# %%
TUNING_RATES = [1e-4] * lesson.fast(20, 3)


def transfer_matrix(network, seed):
    """Row: band a copy trains on. Column: part of a band's excess that is gone."""
    before = by_band(excess(network))
    rows = []
    for band in range(5):
        first, last = bands.edges[band], bands.edges[band + 1]
        tuned = copy.deepcopy(network)
        train(tuned, TUNING_RATES, 1000 + seed, int(first), int(last))
        rows.append(1 - by_band(excess(tuned)) / before)
    return torch.stack(rows)


# %% [markdown]
# We do this at three ages of the shared network. Guess for the oldest: a copy trains on the cleanest band. What is the
# transfer to the band called "noisy"? Mind the sign: negative means harm.

# %%
FAR = "Oldest network: transfer from 'cleanest' to 'noisy'?"
lesson.predict(FAR, None)

# %%
AGES = [5, lesson.fast(60, 10), STEPS]
networks_at = {STEPS: shared_networks}
for age in AGES[:2]:
    networks_at[age] = [train(new_network(seed), falling(age), seed) for seed in SEEDS]

transfer = {}
for age in AGES:
    matrices = []
    for seed, network in zip(SEEDS, networks_at[age], strict=True):
        matrices.append(transfer_matrix(network, seed))
    transfer[age] = torch.stack(matrices)  # (seeds, 5, 5)

lesson.reveal(FAR, float(transfer[STEPS].mean(0)[0, 3]))

# %%
fig, axes = plt.subplots(1, 3, figsize=(12.5, 4.4), sharey=True)
for ax, age in zip(axes, AGES, strict=True):
    of_age = transfer[age].mean(0)
    is_last = age == STEPS
    unit = "part of the excess gone"
    plots.heatmap(ax, of_age, labels=NAMES, limit=0.5, unit=unit, colorbar=is_last)
    ax.set(title=f"network of {age} steps", xlabel="measured on")
    ax.tick_params(axis="x", labelrotation=30)
axes[0].set_ylabel("trained on")
if is_default:
    title = "First every band helps every other; later most of them compete"
    shape = (
        "In the first every cell is red. In the last the diagonal is red and most "
        "other cells are blue, the bluest far from the diagonal."
    )
else:
    title = "Which band's training helps which band, at three ages of the network"
    shape = "Red cells: the band got better. Blue cells: it got worse."
lesson.show(
    fig,
    "02_transfer",
    title=title,
    caption="Part of the excess in the band of the column that is gone, when a copy "
    f"trains {len(TUNING_RATES)} steps on the band of the row. Red: the band got "
    "better. Blue: it got worse. Means over seeds; the colours end at ±0.5.",
    alt=f"Three signed five by five matrices. {shape}",
)

# %% [markdown]
# Read the figure from left to right, with the default settings.
#
# - *Youngest.* All cells are red: the first things to learn are the same at every noise level.
# - *Middle.* There are two camps. Training on the two clean bands makes the two noisy bands worse, and the other way round.
# - *Oldest.* The diagonal is red. Most of the rest is blue, most of all between the clean and the noisy bands.
#
# How many of the 20 pairs are clear of seed noise?

# %%
off_diagonal = ~torch.eye(5, dtype=torch.bool)

counts = pd.DataFrame(index=pd.Index(AGES, name="age in steps"))
for age in AGES:
    mean, half_width = plots.t_interval(transfer[age])
    mean = torch.as_tensor(mean)[off_diagonal]
    half_width = torch.as_tensor(half_width)[off_diagonal]
    counts.loc[age, "helped"] = int((mean > 0).sum())
    counts.loc[age, "hurt"] = int((mean < 0).sum())
    counts.loc[age, "surely helped"] = int((mean - half_width > 0).sum())
    counts.loc[age, "surely hurt"] = int((mean + half_width < 0).sum())
lesson.table(
    counts.astype(int),
    mark=STEPS,
    caption="Of 20 pairs (surely: 95 % interval excludes 0)",
)

# %%
youngest = transfer[AGES[0]].mean(0)
middle_aged = transfer[AGES[1]].mean(0)
oldest = transfer[STEPS].mean(0)
if is_default:
    assert (youngest > 0).all(), "at first every band must help every other"
    for matrix in (middle_aged, oldest):
        assert (matrix.diagonal() > 0).all(), (
            "a copy must get better at what it trains on"
        )
        assert (matrix[:2, 3:] < 0).all(), (
            "training on clean bands must harm noisy ones"
        )
        assert (matrix[3:, :2] < 0).all(), (
            "training on noisy bands must harm clean ones"
        )
    assert (oldest[off_diagonal] < 0).sum() > 10, (
        "in the oldest network most pairs must compete"
    )

# %% [markdown]
# The table says how sure this is. In the middle network most of the harm is clear of seed noise. In the oldest one most
# pairs are hurt in the mean, but few of them for sure: the changes are smaller there, and three seeds are few. So the
# competition is clearest in the middle of this training.
#
# ## Is it specialising, or just more training?
#
# A copy that trains on one band also trains *longer* than the shared network. Perhaps anything would improve by that. The
# control is a copy that trains as many more steps on **all** bands. If the same part of its excess is gone, specialising
# gains nothing. A second control is a copy with learning rate 0. It must change nothing at all.

# %%
comparison = pd.DataFrame(columns=NAMES)
for age in (AGES[0], STEPS):
    changes = []
    for seed, network in zip(SEEDS, networks_at[age], strict=True):
        tuned = train(copy.deepcopy(network), TUNING_RATES, 1000 + seed)
        changes.append(1 - by_band(excess(tuned)) / by_band(excess(network)))
    all_bands = torch.stack(changes).mean(0)
    own_band = transfer[age].mean(0).diagonal()
    comparison.loc[f"{age} steps: own band"] = own_band.numpy()
    comparison.loc[f"{age} steps: all bands"] = all_bands.numpy()
    comparison.loc[f"{age} steps: gain of specialising"] = (
        own_band - all_bands
    ).numpy()

gains = [row for row in comparison.index if "gain" in row]
lesson.table(
    comparison, mark=gains, caption="Part of the excess that is gone", digits=2
)

idle = train(copy.deepcopy(shared_networks[0]), [0.0], seed=0)
assert torch.equal(excess(idle), excess(shared_networks[0])), (
    "a rate of 0 must change nothing"
)
if is_default:
    gain_young = comparison.loc[gains[0]].mean()
    gain_old = comparison.loc[gains[1]].mean()
    assert gain_old > gain_young + 0.05, (
        "specialising must gain more in the older network"
    )

# %% [markdown]
# Read the two rows of gains. In the young network specialising gains little: all bands want nearly the same step. In the
# old one it gains clearly more than the control. The shared network gives up this gain in one band, so that the other bands
# do not get worse. This is a part of the price of sharing.
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
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
    progress=False,
)
print(of_package.sentence())

by_hand = -transfer[STEPS][0] * shared[0]  # back from parts gone to changes of the loss
pairs = torch.stack([by_hand[off_diagonal].double(), of_package.change[off_diagonal]])
correlation = float(torch.corrcoef(pairs)[0, 1])
print(f"correlation with the changes measured by hand, 20 pairs: {correlation:.2f}")
if is_default:
    assert correlation > 0.7, "the package must find the same pattern as we did"

# %% [markdown]
# The package and our measurement by hand agree on which band harms which. Mind that the package reports the *change* of the
# loss: there a positive number is harm.
#
# **Try it yourself.** `STEPS = 120` or `600`: when does the competition start? Or `NoiseSchedule.linear(1000)` in the
# second cell: which bands are now far apart? Or `WIDTH = 8`: does a smaller network compete earlier?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
vectors = torch.tensor(
    [
        [3.0, 2.0, 2.0],
        [1.0, 4.0, 2.0],
        [3.0, 3.0, 2.0],
        [2.0, 2.0, 4.0],
        [1.0, 4.0, 2.0],
    ]
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
        "The sign: the shared loss is the larger, so the price is positive.": loss_alone
        - loss_shared,
    },
)

loss_after = torch.tensor([0.95, 0.38, 0.11])
excess_before = loss_shared - loss_floor
lesson.exercise(
    "2.3",
    expected=(loss_shared - loss_after) / excess_before,
    mistakes={
        "That is a part of the whole loss, floor included.": 1
        - loss_after / loss_shared,
        "That is the change itself; divide it by the excess before.": loss_shared
        - loss_after,
        "The sign: transfer is positive where the excess fell.": (
            loss_after - loss_shared
        )
        / excess_before,
        "Measure the excess from the floor.": (loss_shared - loss_after)
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
# Compute its row of the transfer matrix: the part of the excess that is gone, `(3,)`. Where is negative transfer?
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
row_of_transfer = (loss_shared - loss_after) / (loss_shared - loss_floor)
lesson.check("2.3", row_of_transfer)
print("negative transfer where the value is below 0:", row_of_transfer)

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
# - One data set of 8 × 8 Gaussian fields, one small network, 270 steps, one untuned learning rate, three seeds. When,
# and how strongly, large networks on photographs enter the late stage is not shown here.
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
