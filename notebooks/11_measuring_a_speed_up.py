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
# # 11 · Measuring a speed-up
#
# > **Claim.** "Three times faster" is a ratio of images at a threshold. It says something only together with the level of
# > the threshold, several paired seeds, an interval, and a metric that is fair to both weightings.
#
# **You will be able to**
#
# - read from two curves how many times fewer images one training needs;
# - choose a threshold beforehand, and say how good the level is at which you compare;
# - give a ratio its interval from a few paired seeds, and keep the runs that never arrive;
# - judge whether a loss can serve as the metric of a comparison of weightings.
#
# **You need** the two weightings `const-x0` and `min-snr` from [03](03_snr_weightings.ipynb), and what a mean, a standard
# error and a logarithm are.
#
# **Time** reading 25 min · running about 60 s (short run 15 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.convergence.images_to_threshold`, `thresholds_at`, `speedup`, `against_claim`,
# `load_races`, `race_curves`.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import optimize, stats

from dysigma import NoiseSchedule, convergence, make_weighting
from dysigma.course.lesson import Lesson
from dysigma.course.networks import SmallDenoiser
from dysigma.data.dataset import batch
from dysigma.distances import extract, frechet_distance, load_features, moments
from dysigma.evaluation import evaluation_timesteps, sample_images, validation_losses
from dysigma.exact import gaussian_fields
from dysigma.lab.race import Race, race
from dysigma.objective import sample_losses

lesson = Lesson("11_measuring_a_speed_up", trains_on="auto")
device = lesson.device  # a GPU if there is one

# %% [markdown]
# ## Two trainings
#
# We train a small network that predicts the image, twice: once with the plain loss on the image (`const-x0`), and once
# with Min-SNR. How many times fewer images does Min-SNR need to get equally far? Guess before you see any curve.

# %%
QUESTION_FEWER = "How many times fewer images does min-snr need than const-x0?"
lesson.predict(QUESTION_FEWER, None)

# %% [markdown]
# The images are Gaussian fields of 8 × 8 pixels, drawn in memory. The network, `SmallDenoiser`, has three layers. It
# is much smaller than a U-Net, so that ten trainings take a minute. Here it predicts the image.

# %%
data = gaussian_fields(4096).to(device)
schedule = NoiseSchedule.linear(1000).to(device)

# %% [markdown]
# Along a training we look at two things. The **distance** is the squared Fréchet distance (Heusel et al. 2017) between 256
# samples and the training images, here on pixels. Lower is better. The **losses** are those of held-out images at 40 timesteps. We look at
# steps 10, 14, 20, 28, 40, …: each time after $\sqrt2$ times as many images.

# %%
pixels = load_features("pixels")
reference = moments(extract(pixels, data.images))
held_out = gaussian_fields(256, split="test").images.to(device)
timesteps_seen = evaluation_timesteps(1000, 40)


def distance_to_data(images):
    return float(frechet_distance(moments(extract(pixels, images)), reference))


def distance_of(model):
    samples = sample_images(
        model, schedule, (256, 1, 8, 8), prediction_type="sample", num_steps=12
    )
    return distance_to_data(samples)


def losses_of(model):
    found = validation_losses(
        model, held_out, schedule, "sample", timesteps=timesteps_seen
    )
    return found.numpy()


# %% [markdown]
# The loop is that of [page 00](00_start_here.ipynb). **The seed sets everything random**: the initial weights, the order
# of the images, the timesteps and the noise. Two trainings with one seed differ in the weighting alone. They are
# *paired*.

# %%
SEEDS = lesson.fast([0, 1, 2, 3, 4], [0, 1, 2])
STEPS = lesson.fast(1280, 320)
BATCH = 32
BUDGET = STEPS * BATCH  # images
LOOKS = [round(10 * 2 ** (k / 2)) for k in range(15)]  # steps


def train_once(weighting_name, seed):
    """One training: a row for each look."""
    torch.manual_seed(seed)
    model = SmallDenoiser(schedule, width=128).to(device)
    weighting = make_weighting(weighting_name, schedule, prediction_type="sample")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rows = []
    for step in range(1, STEPS + 1):
        x0, _, _ = batch(data, seed, step, BATCH)
        # Drawn on the CPU, so that they are the same on every device.
        timesteps = torch.randint(0, 1000, (BATCH,)).to(device)
        noise = torch.randn(x0.shape).to(device)
        losses = sample_losses(model, schedule, x0, noise, timesteps, "sample")
        loss = weighting(losses, timesteps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in LOOKS:
            distance = distance_of(model)
            rows.append((step * BATCH, distance, losses_of(model)))
    return pd.DataFrame(rows, columns=["images", "distance", "losses"])


runs = {}
for name in ["const-x0", "min-snr"]:
    for seed in SEEDS:
        runs[name, seed] = train_once(name, seed)

# %% [markdown]
# Here are the two trainings of seed 0.

# %%
COLOURS = {"const-x0": "C0", "min-snr": "C1"}
fig, ax = plt.subplots(figsize=(7, 3.8))
for name, colour in COLOURS.items():
    run = runs[name, 0]
    ax.plot(run["images"], run["distance"], color=colour, marker="o", markersize=4)
    last = run.iloc[-1]
    ax.text(last["images"] * 1.05, last["distance"], name, color=colour, va="center")
ax.set(
    xscale="log",
    yscale="log",
    xlim=(280, BUDGET * 2.4),
    xlabel="images trained on",
    ylabel="distance of samples (lower is better)",
)
ax.set_yticks([0.7, 1, 1.5, 2, 3, 4], labels=["0.7", "1", "1.5", "2", "3", "4"])
ax.set_yticks([], minor=True)
lesson.show(
    fig,
    "11_two_curves",
    title="Min-SNR is ahead; how far ahead depends on the level",
    caption="Distance of samples to the data along two trainings of one seed. A speed-up is a horizontal distance "
    "between the two curves.",
    alt="Two falling curves on logarithmic axes. The curve of const-x0 is flat near three for the first few thousand "
    "images. The curve of min-snr falls earlier, with a bump, and ends lower.",
)

# %% [markdown]
# Draw a horizontal line through the picture. It meets the curve of Min-SNR first and the curve of `const-x0` later. On
# this logarithmic axis the horizontal distance between the two points is the logarithm of the speed-up. At another height
# the distance is different. So first we have to choose the line.
#
# ## A threshold, and its level
#
# Take the level that the baseline, `const-x0`, **holds during the second half of its training**: the worst distance that
# it shows from half of its budget on, as a median over the seeds. This rule uses no curve of Min-SNR, so it can be
# written down before Min-SNR is trained.

# %%
FRACTION = 0.5  # of the budget
is_default = FRACTION == 0.5 and lesson.as_published

held = []
for seed in SEEDS:
    run = runs["const-x0", seed]
    late = run[run["images"] >= FRACTION * BUDGET]
    held.append(late["distance"].max())
threshold = float(np.median(held))

# %% [markdown]
# This number alone says little. We have to compare it with the distances of an untrained network and of real images. Such a
# table belongs beside every speed-up.

# %%
ends = {}
for name in COLOURS:
    ends[name] = np.mean([runs[name, seed]["distance"].iloc[-1] for seed in SEEDS])
torch.manual_seed(0)
levels = pd.Series(
    {
        "untrained network": distance_of(SmallDenoiser(schedule, width=128).to(device)),
        "threshold": threshold,
        "const-x0, end (mean over seeds)": ends["const-x0"],
        "min-snr, end (mean over seeds)": ends["min-snr"],
        "256 held-out images": distance_to_data(held_out),
    }
).to_frame("distance")
lesson.table(levels, caption="What the distances mean", mark="threshold", digits=2)
if is_default:
    ordered = levels["distance"].tolist()
    assert ordered == sorted(ordered, reverse=True), (
        "the threshold lies between start and ends"
    )

# %% [markdown]
# The threshold is well below the untrained network, and far above real images. Samples at this level are poor. So we
# measure the speed of the *early* part of a training, and we must say so.
#
# ## Images to the threshold
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $\tau$ | `threshold` | a level of the metric; lower is better |
# | $n(\tau)$ | `const_images`, `min_snr_images` | images until the curve is at $\tau$ or below and stays there |
# | $B$ | `BUDGET` | images of the whole training |
# | $R=n_\text{const}/n_\text{min-snr}$ | `ratios` | above 1: Min-SNR needs fewer images |
#
# A curve can cross a line, come back, and cross it again. We want the crossing after which it **stays**. So we look for the
# last look above the line. Between that look and the next one the curve is taken as straight in the logarithms, as in the
# picture.


# %%
def images_by_hand(images, values, level):
    """Images until the curve is at the level and stays there; infinite if it never does."""
    looks_above = np.flatnonzero(values > level)
    if len(looks_above) == 0:
        return float(images[0])
    before = looks_above[-1]
    if before == len(values) - 1:
        return math.inf
    after = before + 1
    part_of_way = np.log(values[before] / level) / np.log(
        values[before] / values[after]
    )
    log_images = np.interp(part_of_way, [0, 1], np.log([images[before], images[after]]))
    return float(np.exp(log_images))


def curve(name, seed):
    run = runs[name, seed]
    return run["images"].to_numpy(), run["distance"].to_numpy()


# %% [markdown]
# The package has the same function. Do they agree, at the threshold and at other levels?

# %%
for level in [threshold, 1.2 * threshold, 0.9 * threshold]:
    for name, seed in runs:
        by_hand = images_by_hand(*curve(name, seed), level)
        by_package = convergence.images_to_threshold(*curve(name, seed), level)
        np.testing.assert_allclose(by_hand, by_package, rtol=1e-9)

const_images = np.array(
    [images_by_hand(*curve("const-x0", seed), threshold) for seed in SEEDS]
)
min_snr_images = np.array(
    [images_by_hand(*curve("min-snr", seed), threshold) for seed in SEEDS]
)
ratios = const_images / min_snr_images
lesson.reveal(QUESTION_FEWER, float(ratios[0]))

# %% [markdown]
# That is the answer of seed 0, at this threshold, for this network.
#
# ## Why one seed is not enough
#
# The same for every seed. Beside it stands an easier threshold: the level that `const-x0` holds from a *tenth* of its
# budget on.

# %%
all_runs = {("fields", name): {} for name in COLOURS}
for name, seed in runs:
    all_runs["fields", name][seed] = curve(name, seed)
(easy_threshold,) = convergence.thresholds_at(all_runs, "const-x0", [0.1])["fields"]
(same_threshold,) = convergence.thresholds_at(all_runs, "const-x0", [FRACTION])[
    "fields"
]
assert math.isclose(same_threshold, threshold, rel_tol=1e-9), (
    "the rule by hand and the package"
)

easy_ratios = []
for seed in SEEDS:
    const_easy = images_by_hand(*curve("const-x0", seed), easy_threshold)
    min_snr_easy = images_by_hand(*curve("min-snr", seed), easy_threshold)
    easy_ratios.append(const_easy / min_snr_easy)

by_seed = pd.DataFrame(
    {
        "const-x0, images": const_images,
        "min-snr, images": min_snr_images,
        f"R at {threshold:.2f}": ratios,
        f"R at {easy_threshold:.2f}": easy_ratios,
    },
    index=[f"seed {seed}" for seed in SEEDS],
)
by_seed = by_seed.astype({"const-x0, images": int, "min-snr, images": int})
lesson.table(by_seed, caption="One row is one pair of trainings", digits=1)

# %%
spread = ratios.max() / ratios.min()
easy_spread = max(easy_ratios) / min(easy_ratios)
print(
    f"largest R over smallest: {spread:.1f}; at the easier threshold: {easy_spread:.1f}"
)
print(
    f"easier threshold over the untrained distance: {easy_threshold / levels['distance'].iloc[0]:.2f}"
)
if is_default:
    assert spread > 1.2, "seeds must differ"
    assert np.mean(np.log(easy_ratios)) < np.mean(np.log(ratios)) - np.log(1.5), (
        "the easier threshold must give a smaller ratio"
    )

# %% [markdown]
# Each row is an honest measurement, and a paper could print any of them. The differences between the rows are seed noise.
#
# The two columns of $R$ differ as well: at the easier level, the same curves give about half the ratio. And the easier level
# is not far from where an untrained network is. What happens still closer to it?
#
# ## A training compared with itself
#
# Look again at the picture. `const-x0` begins with a plateau, on which the distance hardly moves. There a small
# difference in height is a large difference in images.
#
# To see how large, compare `const-x0` **with itself**, one seed against another. Nothing is faster than itself: the true
# ratio is 1. We take five trainings of a small U-Net from the record of the next page, on the same data, and every pair
# of seeds.

# %%
RECOMPUTE = False  # True: race again, into a new folder; hours
folder = Path("../data/runs/race-fields")
if RECOMPUTE:
    folder = folder.with_name("race-fields-again")
    race(Race.read(Path("../data/races/race-fields.toml")), folder)
recorded_races = convergence.load_races(folder)
recorded = convergence.race_curves(recorded_races, "distance")
const_recorded = recorded["fields sample", "const-x0"]

# %%
QUESTION_ITSELF = "Const-x0 against itself, best seeds and threshold: largest factor?"
lesson.predict(QUESTION_ITSELF, None)

# %%
untrained = float(np.median([distances[0] for _, distances in const_recorded.values()]))
best_end = min(distances[-1] for _, distances in const_recorded.values())
PLATEAU = 2 / 3  # distances above this share of the untrained one count as plateau

possible_levels = np.geomspace(0.95 * untrained, best_end, 150)
largest_factor = []
for level in possible_levels:
    needed = []
    for images, distances in const_recorded.values():
        found = convergence.images_to_threshold(images, distances, level)
        if 0 < found < math.inf:
            needed.append(found)
    largest_factor.append(max(needed) / min(needed))
largest_factor = np.array(largest_factor)
on_plateau = possible_levels > PLATEAU * untrained

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
ax.axvspan(PLATEAU * untrained, possible_levels[0], color="0.88", linewidth=0)
ax.plot(possible_levels, largest_factor, color="C3", linewidth=2)
ax.axhline(1, color="0.3", linewidth=1)
ax.text(
    0.62,
    1.06,
    "the truth: nothing is faster than itself",
    color="0.3",
    fontsize=9,
    ha="right",
)
ax.text(
    0.93 * untrained, 6.5, "plateau:\nhardly\ntrained", ha="left", va="top", fontsize=9
)
ax.set(
    xscale="log",
    yscale="log",
    xlim=(possible_levels[0], possible_levels[-1]),
    ylim=(0.9, 80),
    xlabel="threshold: distance of samples (training goes right)",
    ylabel="largest factor between two seeds",
)
ax.set_xticks([3, 2, 1.5, 1, 0.7], labels=["3", "2", "1.5", "1", "0.7"])
ax.set_xticks([], minor=True)
ax.set_yticks([1, 2, 5, 10, 30], labels=["1", "2", "5", "10", "30"])
ax.set_yticks([], minor=True)
lesson.show(
    fig,
    "11_against_itself",
    title="On the plateau, a training is many times faster than itself",
    caption="Const-x0 against const-x0 with another seed, a small U-Net, five seeds: the largest ratio of images over all "
    "pairs, at each threshold.",
    alt="A curve of the largest factor against the threshold, both logarithmic. On the left, in a grey region, it "
    "reaches more than thirty. To the right of the region it stays between one and two.",
)

# %%
factor_on_plateau = float(largest_factor[on_plateau].max())
factor_beyond = float(largest_factor[~on_plateau].max())
lesson.reveal(QUESTION_ITSELF, factor_on_plateau)
print(
    f"beyond the plateau, at distances below {PLATEAU * untrained:.1f}: {factor_beyond:.1f}"
)
if not RECOMPUTE and PLATEAU == 2 / 3:
    assert factor_on_plateau > 20, "the plateau must give a large factor"
    assert factor_beyond < 2, "beyond the plateau the factor must be small"

# %% [markdown]
# So seed noise alone gives a factor of tens **on the plateau, and only there**. Beyond it, the largest factor between two
# seeds of one weighting is below 2. That much noise remains, and it is the reason for several seeds and an interval.
#
# Two rules follow. Choose a threshold beyond the plateau. And state the level beside the speed-up, so that a reader can check
# that it lies beyond the plateau.
#
# ## An interval, from paired seeds
#
# A ratio of 2 and a ratio of ½ are equally far from 1. So we average $\ln R$, not $R$. The mean of the five $\ln R$ gets
# the usual 95 % interval of Student's $t$, and the exponential turns it back into a ratio.

# %%
log_ratios = np.log(ratios)
mean = log_ratios.mean()
standard_error = log_ratios.std(ddof=1) / np.sqrt(len(SEEDS))
half_width = stats.t.ppf(0.975, len(SEEDS) - 1) * standard_error

by_hand = np.exp([mean, mean - half_width, mean + half_width])
print("R = {:.2f} [{:.2f}, {:.2f}]".format(*by_hand))

# %% [markdown]
# The package takes the images by seed, as two dictionaries, and should give the same.

# %%
const_by_seed = dict(zip(SEEDS, const_images, strict=True))
min_snr_by_seed = dict(zip(SEEDS, min_snr_images, strict=True))
found = convergence.speedup(const_by_seed, min_snr_by_seed, budget=BUDGET)
np.testing.assert_allclose([found.ratio, found.low, found.high], by_hand, rtol=1e-9)
if is_default:
    assert found.low > 1, "Min-SNR must be shown to need fewer images"

# %% [markdown]
# **Did the pairing help?** Two runs with one seed see the same images and the same noise. If these decide how fast a run is,
# both runs of a pair are fast or both are slow. Then the difference of their logarithms varies less from seed to seed. Without
# pairs, the variances of the two logarithms add up.

# %%
variance_of_each = np.log(const_images).var(ddof=1) + np.log(min_snr_images).var(ddof=1)
unpaired_error = np.sqrt(variance_of_each / len(SEEDS))
print(f"correlation over seeds {found.correlation:.2f}")
print(
    f"standard error of ln R: paired {standard_error:.3f}, unpaired {unpaired_error:.3f}"
)
if is_default:
    assert found.correlation < 0.3, "the text says that pairing bought nothing here"

# %% [markdown]
# A positive correlation would make the paired error smaller than the unpaired one. In our run the correlation is slightly
# negative, which five seeds cannot tell from 0, and the paired error is not smaller. So we see no gain from pairing at this threshold. Pairing also
# has a small price: the interval uses four degrees of freedom, where two separate groups of five would have up to eight. One
# cannot know beforehand whether it helps. So we always pair, and print the correlation.
#
# ## Runs that never arrive
#
# Suppose that we had trained for fewer images. Then some of the `const-x0` runs would not have reached the threshold.
# Such a run is **censored**: we know that it needs *more* than the budget $B$, and not how many more. Here we have the
# complete runs. So we can pretend that some were cut short, treat them in three ways, and compare with the complete result.

# %%
SMALL_BUDGET = float(np.quantile(const_images, 0.6))
arrived = const_images <= SMALL_BUDGET
print(
    f"budget {SMALL_BUDGET:,.0f} images: {(~arrived).sum()} of {len(SEEDS)} are censored"
)

# %% [markdown]
# 1. **Leave them out.** Only the fast trainings of the baseline remain.
# 2. **Put the budget in their place.** These runs need more images than that, so the ratio is only a lower bound.
# 3. **Keep what is known.** For a censored pair we know that $\ln R>\ln B-\ln n_\text{min-snr}$.
#
# The third way is a likelihood (Tobin 1958). Assume that $\ln R$ is normal over seeds. A complete pair contributes the density
# at its value. A censored pair contributes the probability to lie above its bound. The likelihood is the product of these. We
# take the mean and the standard deviation that maximise it.

# %%
log_bounds = np.log(SMALL_BUDGET) - np.log(min_snr_images[~arrived])


def negative_log_likelihood(parameters):
    mean, log_deviation = parameters
    deviation = np.exp(log_deviation)
    of_arrived = stats.norm.logpdf(log_ratios[arrived], mean, deviation).sum()
    of_censored = stats.norm.logsf(log_bounds, mean, deviation).sum()
    return -(of_arrived + of_censored)


start = [log_ratios[arrived].mean(), np.log(log_ratios[arrived].std())]
best = optimize.minimize(negative_log_likelihood, start, method="Nelder-Mead")
kept_by_hand = float(np.exp(best.x[0]))

# %% [markdown]
# In the package, a censored run is one that needs infinitely many images. `speedup` returns the bound of the second way
# as `ratio`, and the third way as `estimate`, with an interval from the same likelihood.

# %%
small_const = {}
for seed, images in const_by_seed.items():
    small_const[seed] = images if images <= SMALL_BUDGET else math.inf
censored = convergence.speedup(small_const, min_snr_by_seed, budget=SMALL_BUDGET)
np.testing.assert_allclose(censored.estimate, kept_by_hand, rtol=2e-3)

with_budget = np.minimum(const_images, SMALL_BUDGET) / min_snr_images
np.testing.assert_allclose(
    censored.ratio, np.exp(np.log(with_budget).mean()), rtol=1e-9
)
assert censored.bound == ">=", (
    "with the budget in their place the ratio is a lower bound"
)

left_out = np.exp(log_ratios[arrived].mean())
ways = pd.DataFrame(columns=["R", "low", "high"], dtype=float)
ways.loc["1. left out"] = [left_out, math.nan, math.nan]
ways.loc["2. budget in their place (≥)"] = [censored.ratio, censored.low, censored.high]
ways.loc["3. kept as bounds"] = [
    censored.estimate,
    censored.estimate_low,
    censored.estimate_high,
]
ways.loc["all trained to the end"] = [found.ratio, found.low, found.high]
lesson.table(
    ways,
    caption="Censored runs, three ways, and the truth",
    mark="3. kept as bounds",
    digits=2,
)

# %%
if is_default:
    truth = found.ratio
    assert left_out < censored.ratio < truth, "two ways must come out too low"
    assert censored.estimate_low < truth < censored.estimate_high, (
        "the interval must hold it"
    )
    assert censored.estimate_high / censored.estimate_low > found.high / found.low, (
        "the interval must be wider than that of complete runs"
    )

# %% [markdown]
# Compare with the last row. Leaving the slow runs out gives the smallest ratio: it makes the baseline look faster than it
# is. The second row is a correct bound. It is close here, because the small budget ends shortly before those runs arrive. A
# smaller budget would have given a smaller bound: such a number says as much about the budget as about the weighting.
#
# The third row is an estimate, and its interval says how little is known: it is wider than with all runs to the end,
# and it contains their ratio. So the package gives an estimate and its interval beside every bound.
#
# ## Compatible, below, above
#
# A paper claims a factor of 3.7. We measured an interval. Three answers are possible:
#
# - **compatible**: the interval contains 3.7;
# - **below**, or **above**: it lies wholly on that side.
#
# The interval decides, and not the point estimate alone. An estimate of 3.8 with an interval from 2 to 6 does not confirm
# 3.7. It is compatible with 2.5 and with 5 as well. The next table has the network of this page, and the U-Net of the record
# at three thresholds: what `const-x0` holds from a quarter, a half and four fifths of its budget on.

# %%
recorded_levels = convergence.levels_at(recorded, "const-x0", [0.25, 0.5, 0.8])
recorded_table = convergence.race_table(
    recorded_races, "distance", recorded_levels, "const-x0"
)
is_min_snr = (recorded_table["arm"] == "min-snr") & (
    recorded_table["grid"] == "fields sample"
)

columns = ["threshold", "R", "low", "high", "against 3.7"]
answers = pd.DataFrame(columns=columns)
word = convergence.against_claim(found.low, found.high, 3.7)
answers.loc["this page"] = [threshold, found.ratio, found.low, found.high, word]
for _, row in recorded_table[is_min_snr].iterrows():
    word = convergence.against_claim(row["estimate_low"], row["estimate_high"], 3.7)
    answers.loc[f"U-Net, {row['level']}"] = [
        row["threshold"],
        row["estimate"],
        row["estimate_low"],
        row["estimate_high"],
        word,
    ]
lesson.table(
    answers,
    caption="Min-SNR against const-x0, by distance",
    mark="U-Net, fraction 0.5",
    digits=2,
)
if is_default and not RECOMPUTE:
    assert answers["against 3.7"].tolist() == [
        "above",
        "compatible",
        "below",
        "below",
    ], "the words of the table"

# %% [markdown]
# All three words occur, for one pair of weightings and one data set. The ratio depends on the network and on the level.
# There is no such thing as *the* speed-up of Min-SNR.
#
# ## Would a loss do as the metric?
#
# So far the metric was the distance of samples. It would be simpler to compare losses. Which? Both trainings average the
# *same* errors of the image, over timesteps. `const-x0` minimises the plain mean. Min-SNR minimises a weighted one. Each
# of the two means can serve as a metric.
#
# Take the plain mean of the held-out losses, and the threshold by the same rule. By distance, Min-SNR gets to its
# threshold with every seed.

# %%
QUESTION_LOSS = (
    f"By the plain mean loss: with how many of {len(SEEDS)} seeds does min-snr arrive?"
)
lesson.predict(QUESTION_LOSS, None)

# %%
min_snr_weights = make_weighting(
    "min-snr", schedule, prediction_type="sample"
).weights()
weights_seen = min_snr_weights.cpu()[timesteps_seen].numpy()


def metric_curves(values_of):
    """Curves of a metric for all runs; values_of turns a run into one value a look."""
    curves = {("fields", name): {} for name in COLOURS}
    for (name, seed), run in runs.items():
        curves["fields", name][seed] = (run["images"].to_numpy(), values_of(run))
    return curves


def distances(run):
    return run["distance"].to_numpy()


def plain_mean(run):
    return np.stack(run["losses"]).mean(1)


def weighted_mean(run):
    return (weights_seen * np.stack(run["losses"])).mean(1)


metrics = {
    "plain mean loss: const-x0 trains on it": plain_mean,
    "distance of samples: neither does": distances,
    "weighted mean loss: min-snr trains on it": weighted_mean,
}

# %%
arrivals = {}
by_metric = pd.DataFrame(columns=["threshold", "min-snr arrives", "R", "low", "high"])
for label, values_of in metrics.items():
    curves = metric_curves(values_of)
    (level,) = convergence.thresholds_at(curves, "const-x0", [FRACTION])["fields"]
    needed = {"const-x0": {}, "min-snr": {}}
    for name in needed:
        for seed, (images, values) in curves["fields", name].items():
            needed[name][seed] = convergence.images_to_threshold(images, values, level)
    compared = convergence.speedup(needed["const-x0"], needed["min-snr"], budget=BUDGET)
    arrivals[label] = len(SEEDS) - compared.censored_arm
    by_metric.loc[label] = [
        level,
        f"{arrivals[label]} of {len(SEEDS)}",
        compared.estimate,
        compared.estimate_low,
        compared.estimate_high,
    ]
arrived_by_plain_mean = arrivals["plain mean loss: const-x0 trains on it"]
lesson.reveal(QUESTION_LOSS, arrived_by_plain_mean)
lesson.table(
    by_metric,
    caption="One pair of weightings, three metrics",
    mark="distance of samples: neither does",
    digits=3,
)
if is_default:
    assert arrived_by_plain_mean == 0, "min-snr must never reach the loss of const-x0"
    assert by_metric["low"].iloc[2] > 1, "min-snr must be shown faster by its own loss"

# %% [markdown]
# By the plain mean, on which `const-x0` trains, Min-SNR arrives with no seed. By the weighted mean, on which Min-SNR trains,
# Min-SNR needs several times fewer images. Each weighting is ahead by the mean that it minimises. Neither metric is wrong. But each
# asks which training minimises one particular mean faster, and one of the two trainings minimises exactly that mean.
#
# Where is Min-SNR worse? Compare the losses at the end of training by noise level.

# %%
end_losses = {}
for name in COLOURS:
    last_losses = [runs[name, seed]["losses"].iloc[-1] for seed in SEEDS]
    end_losses[name] = np.mean(last_losses, axis=0)
tenths = {
    "cleanest tenth": slice(0, 4),
    "middle tenth": slice(18, 22),
    "noisiest tenth": slice(36, 40),
}
by_level = pd.DataFrame(columns=list(COLOURS), dtype=float)
for label, part in tenths.items():
    by_level.loc[label] = [end_losses[name][part].mean() for name in COLOURS]
by_level["ratio"] = by_level["min-snr"] / by_level["const-x0"]
lesson.table(
    by_level,
    caption="Loss on the image at the end, mean over seeds",
    mark="noisiest tenth",
)
if is_default:
    assert by_level["ratio"].iloc[0] < 0.85, "min-snr must be better at the clean end"
    assert by_level["ratio"].iloc[-1] > 2, "min-snr must be worse at the noisy end"
    assert by_level["const-x0"].is_monotonic_increasing, (
        "errors must grow with the noise"
    )

# %% [markdown]
# Min-SNR gives the noisiest timesteps almost no weight, and is worse there. It is better at the clean end. The two trainings
# differ most at the noisiest timesteps, the marked row. So these timesteps decide the comparison by the plain mean. The
# distance of samples depends on the whole chain of timesteps, and neither training minimises it. So it is the metric of this
# page, and one of the metrics of page 12. The choice of a metric can decide which method comes first. Dehghani et al. (2021)
# show this for whole benchmarks.
#
# ## A protocol
#
# What the page did, as a list to copy. Write it down **before** the first training of the new weighting:
#
# 1. the baseline, its target and its learning rate;
# 2. a metric that neither weighting trains on;
# 3. the rule for the threshold, beyond the plateau, and its absolute level once it is known;
# 4. at least five seeds, paired; the interval of $\ln R$; what happens to runs that never arrive;
# 5. the words for the result.
#
# **Try it yourself.** Set `FRACTION = 0.25` and run all cells below it: how does the ratio change, and why? Or set
# `PLATEAU = 0.8`: how large is the factor that the grey region then misses?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **11.1** (●○○, 4 min) A curve has the value 4 after 1,000 images and 1 after 16,000. At how many images is it at 2, if
# it is straight in the logarithms?
#
# <details><summary>Hint</summary>
#
# From 4 to 2 is half of the way from 4 to 1 in the logarithm. So take half of the way in the logarithm of images.
#
# </details>
#
# **11.2** (●●○, 6 min) Three pairs of trainings need 800 and 400, 900 and 300, 600 and 300 images. Give $R$ and the lower end
# of its 95 % interval, as `[R, low]`.
#
# <details><summary>Hint</summary>
#
# The mean of the three $\ln R$, minus `stats.t.ppf(0.975, 2)` standard errors, and then the exponential.
#
# </details>
#
# **11.3** (●●○, 4 min) A baseline is censored at 10,000 images. The other run needed 2,500. Which share of the baseline's
# images does the other run need? Give the smallest and the largest share that are possible, as `[low, high]`.
#
# <details><summary>Hint</summary>
#
# The share is $1/R$. The baseline needs more than 10,000 images, and nobody knows how many more.
#
# </details>

# %%
# What the checks of the exercises expect; there is no need to read this cell.
exercise_pairs = convergence.speedup({1: 800, 2: 900, 3: 600}, {1: 400, 2: 300, 3: 300})
lesson.exercise(
    "11.1",
    expected=4000.0,
    mistakes={"That is straight in the values, not in their logarithms.": 11_000.0},
)
lesson.exercise(
    "11.2",
    expected=[exercise_pairs.ratio, exercise_pairs.low],
    rtol=2e-3,
    mistakes={"Average the logarithms, not the ratios.": [7 / 3, exercise_pairs.low]},
)
lesson.exercise(
    "11.3",
    expected=[0.0, 0.25],
    mistakes={
        "The baseline needs more images, not fewer: the share can only be smaller.": [
            0.25,
            1.0,
        ],
        "That is R; the share is its inverse.": [0.0, 4.0],
    },
)

# %%
images_at_two = ...  # a number
lesson.check("11.1", images_at_two)

# %%
ratio_and_low = ...  # [R, low]
lesson.check("11.2", ratio_and_low)

# %%
shares = ...  # [low, high]
lesson.check("11.3", shares)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
images_at_two = math.sqrt(1000 * 16_000)
lesson.check("11.1", images_at_two)

# %% tags=["solution"]
three_logs = np.log([800 / 400, 900 / 300, 600 / 300])
three_error = three_logs.std(ddof=1) / np.sqrt(3)
lowest = three_logs.mean() - stats.t.ppf(0.975, 2) * three_error
ratio_and_low = np.exp([three_logs.mean(), lowest])
lesson.check("11.2", ratio_and_low)

# %% tags=["solution"]
shares = [0.0, 2_500 / 10_000]  # R is above 4, and has no upper bound
lesson.check("11.3", shares)

# %% [markdown]
# ## What you can now do
#
# - Turn two curves into a ratio with an interval, in ten lines, or with `images_to_threshold` and `speedup`.
# - Ask of any "times faster": at which level, over how many seeds, and does one of the methods train on the metric?
# - Write the protocol of your own comparison before it runs.
#
# ## Limitations
#
# - A network of three layers, images of 8 × 8 pixels, one learning rate. Its ratio says nothing about other networks: the
#   table above has a U-Net on the same data with other ratios.
# - Five seeds. An exact sign test over five pairs cannot go below $p=0.06$, so the interval relies on the assumption that $\ln R$
#   is roughly normal over seeds.
# - The likelihood assumes that a censored run tells us its bound and nothing else.
# - The distance has errors of its own, from 256 samples and 12 sampling steps. They are the same kind of error in both runs.
#
# ## References
#
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo, *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): Min-SNR, and a "3.4 times faster" of this kind.
# - Tobin, *Estimation of Relationships for Limited Dependent Variables*, Econometrica 26, 1958,
#   [doi:10.2307/1907382](https://doi.org/10.2307/1907382): a likelihood with values of which only a bound is known.
# - Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, *GANs Trained by a Two Time-Scale Update Rule*, 2017,
#   [arXiv:1706.08500](https://arxiv.org/abs/1706.08500): the Fréchet distance between sets of images.
# - Dehghani, Tay, Gritsenko, Zhao, Houlsby, Diaz, Metzler, Vinyals, *The Benchmark Lottery*, 2021,
#   [arXiv:2107.07002](https://arxiv.org/abs/2107.07002): how the choice of a benchmark chooses the winner.
#
# **Next:** [12, the convergence race](12_the_convergence_race.ipynb), which applies this protocol. Back to the
# [map](00_start_here.ipynb).

# %%
lesson.end()
