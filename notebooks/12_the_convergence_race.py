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
# # 12 · The convergence race: is it 3.7 times faster, and than what?
#
# > **Claim.** "So many times faster" hides three choices: the constant that is beaten, the threshold, and the seed. Made afterwards,
# > they yield almost any factor, even for a weighting against itself. Made beforehand, in four primary comparisons: our Dy-Sigma is
# > sooner than one constant where the network predicts $x_0$, by an estimate below 3.7 (above it on a small CIFAR-10, raced later); it is not shown to be sooner than the other
# > where the network predicts the noise (later: unless it aims at the judge); and Min-SNR, which learns nothing, does as well.
#
# **You will be able to**
#
# - compute a speed-up from two curves, with an interval, and say when it is only a bound;
# - show that a threshold and a seed chosen afterwards can make anything look faster;
# - read a registered race: what was asked first, what is secondary, and what was not asked;
# - decide which weighting to start from, for a network that predicts $x_0$ and for one that predicts $\epsilon$.
#
# **You need** both meanings of "Const" from [03](03_snr_weightings.ipynb) and the anchored Dy-Sigma from [06](06_dy_sigma_derived.ipynb).
#
# **Time** reading 30 min · running about 60 s (short run 20 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.convergence.images_to_threshold`, `thresholds_at`, `load_races`, `race_curves`, `race_table`, `holm`,
# `log_area`.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas
import torch

from dysigma import plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.distances import extract, frechet_distance, load_features, moments
from dysigma.evaluation import sample_images
from dysigma.exact import GaussianField, OptimalDenoiser, gaussian_fields
from dysigma.intervals import holm
from dysigma.lab.convergence import (
    images_to_threshold,
    load_races,
    log_area,
    race_curves,
    race_table,
    thresholds_at,
)
from dysigma.lab.race import Race, race
from dysigma.runs import read_config
from dysigma.schedule import NoiseSchedule
from dysigma.training import train
from dysigma.weightings import fluctuation

NOTEBOOK = "12_the_convergence_race"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · The claim, and an older one that can be checked
#
# Dy-Sigma (Liu, Ye, Liu, Qin, IJCNN 2024) is known to us by its abstract. It promises convergence **3.7 times faster than "Const"**, and
# does not say by which metric, to which value, with which network, or over how many seeds. What we race is **our reconstruction**, derived in
# notebook 06. It can fail where theirs does not.
#
# The abstract's words are those of the Min-SNR paper (Hang et al. 2023), which promised 3.4 times. That paper has a table of FID
# along training (U-Net, ImageNet 256). The same weighting appears there twice, each time beside a constant:

# %%
iterations = [200, 400, 600, 800, 1000]  # thousands
x0 = (
    [25.93, 15.41, 11.54, 9.52, 8.33],
    [7.99, 5.34, 4.69, 4.41, 4.28],
)  # FID of Const, then of Min-SNR
noise = [8.55, 5.43, 4.64, 4.35, 4.21], [7.32, 4.98, 4.48, 4.24, 4.14]
for network, (constant, weighted) in {"x0": x0, "ε": noise}.items():
    for fid in constant[1::3]:
        n = [images_to_threshold(iterations, curve, fid) for curve in (constant, weighted)]
        print(
            f"{network}, FID {fid}: {n[0]:.0f}k, {n[1]:.0f}k; R {'>=' if n[1] == 200 else '='} {n[0] / n[1]:.2f}"
        )

# %% [markdown]
# One weighting, one paper: at least 5, or about 1.2. The factor says more about the constant than about Min-SNR.
#
# ## 2 · Two constants, and a ratio
#
# "Const" is weight 1 on the squared error. Of what? Min-SNR means the error of $x_0$. Ordinary training predicts the noise and puts weight 1 on
# the error of $\epsilon$. At signal-to-noise ratio $S$ the second is $S$ times the first, and $S$ runs over many orders of magnitude. So we race
# against both, for networks of both kinds.
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $x_0,\ \epsilon$ | `sample`, `epsilon` | what the network predicts |
# | $\tau$ | `threshold` | a value of the metric, lower is better |
# | $n(\tau)$ | `images_to_threshold` | images seen until the curve is at $\tau$ and **stays** at or below; ∞ if never (*censored*) |
# | $R=n_\text{Const}(\tau)/n_\text{arm}(\tau)$ | `Speedup.ratio` | above 1: the arm is sooner |
# | $[\cdot,\cdot]$ | `low`, `high` | 95 % $t$ interval of the mean of $\ln R$ over paired seeds |
# | ≥, ≤, ? | `bound` | some pair is censored: $R$ is only a bound, or nothing at all |
#
# Between evaluations $\ln$ value is linear in $\ln$ images. Near a threshold the curve falls like $n^{-a}$, and then
#
# $$R=\left(\frac{\text{value of Const}}{\text{value of the arm}}\right)^{1/a}\qquad\text{at equal }n .$$
#
# **A flat curve turns small differences into large factors.** With $a=0.1$, 10 % in value are a factor 2.6, whether they come from the
# weighting or from the seed.

# %%
n, a = np.geomspace(1, 1000, 12), 0.1
factor = images_to_threshold(n, n**-a, 0.6) / images_to_threshold(n, n**-a / 1.1, 0.6)
print(f"values fall like n^-{a} and one is 10 % better: {factor:.2f} times faster")
assert np.isclose(factor, 1.1 ** (1 / a)), "R must be the value ratio to the power 1 / a"

# %% [markdown]
# ## 3 · A failure on purpose: choose afterwards
#
# `RECOMPUTE` races again, with the command that made them: `dysigma race data/races/race-fields.toml --out
# data/runs/race-fields` and its two siblings.
#
# Now cheat. Take const-x0, and a *second training of const-x0* with another seed. Nothing is faster than itself: the truth is
# $R=1$. Choose the pair of seeds and the threshold after looking. How many times faster than itself can Const become?

# %%
predict("Const-x0 against itself, seeds and threshold chosen afterwards: largest factor?", 1.5)

# %%
RECOMPUTE = False  # True: race again, into new folders; hours
protocol, folders = read_config(Path("../data/protocol.toml")), []
for entry in protocol["races"]:
    folders.append(Path("..") / (entry["records"] + "-again" * RECOMPUTE))
    if RECOMPUTE:
        race(Race.read(Path("..") / entry["spec"]), folders[-1], jobs=2)
table = load_races(*folders).sort_values("seed", ignore_index=True)  # so that arms pair up
print(
    table.groupby("grid").agg({"arm": "nunique", "seed": "nunique", "images": "count"}).to_string()
)

# %%
own = {"sample": "const-x0", "epsilon": "const-eps"}  # the constant of a network that predicts this


def plain(axis, ticks):  # logarithmic ticks as a person writes them, those within the limits
    inside = [tick for tick in ticks if tick == np.clip(tick, *sorted(axis.get_view_interval()))]
    axis.set_ticks(inside, labels=[f"{tick:g}" for tick in inside])
    axis.set_ticks([], minor=True)


def factors(
    constant, arm, levels
):  # times sooner than Const at each threshold; NaN where one never gets there
    ratios = np.array(
        [images_to_threshold(*constant, at) / images_to_threshold(*arm, at) for at in levels]
    )
    return np.where(np.isfinite(ratios) & (ratios > 0), ratios, np.nan)


distance = race_curves(table[table.grid.str.startswith("fields")], "distance")
const, min_snr, dy = (distance["fields sample", arm] for arm in ("const-x0", "min-snr", "dy-sigma"))
runs = [*const.values(), *min_snr.values(), *dy.values()]
levels = np.geomspace(max(v[-1] for _, v in runs), min(v[0] for _, v in runs) * 0.99, 200)
steep = (
    levels <= thresholds_at(distance, "const-x0", [0.25])["fields sample"][0]
)  # as hard as the protocol asks
chosen = {
    "const-x0, another seed": [
        factors(a, b, levels) for a in const.values() for b in const.values() if a is not b
    ],
    "min-snr, same seed": [factors(const[seed], min_snr[seed], levels) for seed in const],
    "dy-sigma, same seed": [factors(const[seed], dy[seed], levels) for seed in const],
}
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True)
for ax, (name, lines) in zip(axes, chosen.items(), strict=True):
    ax.plot(levels, np.array(lines).T, color="C0", alpha=0.5, linewidth=1)
    ax.hlines([1, 3.7], levels[0], levels[-1], color=["0.3", "C3"], linewidth=1.2)
    ax.axvspan(*levels[steep][[0, -1]], color="0.5", alpha=0.12, linewidth=0)
    ax.set(
        title=name,
        xscale="log",
        yscale="log",
        xlabel="threshold (training goes right)",
        xlim=levels[[-1, 0]],
    )
    plain(ax.xaxis, (0.6, 0.8, 1, 1.5, 2, 3, 4))
plain(axes[0].yaxis, (0.03, 0.1, 0.3, 1, 3.7, 10, 30, 100, 300))
axes[0].set_ylabel("times faster than const-x0")
spans = [f"{np.nanmin(lines):.2g} to {np.nanmax(lines):.3g}" for lines in chosen.values()]
null = np.array(chosen["const-x0, another seed"])
calm = f"{np.nanmin(null[:, steep]):.2g} to {np.nanmax(null[:, steep]):.2g}"
plots.show(
    fig,
    "12_any_factor",
    title="Thresholds and seeds chosen afterwards give almost any factor",
    caption=f"A line per pair of trainings; distance of samples, x0 network. Const against itself, where the truth is 1, spans {spans[0]}, and {calm} even where the protocol looks (grey). Min-snr against Const spans {spans[1]}, dy-sigma {spans[2]}. Red: the 3.7 of the abstract.",
    alt=f"Three panels of thin lines: times faster against the threshold, both logarithmic, with lines at 1 and 3.7. Left, const-x0 against itself: symmetric about 1, from {spans[0]}, wide at easy thresholds. Middle and right, min-snr and dy-sigma against const-x0, nearly alike: falling from {spans[1].split()[-1]} through 3.7 to about 2.",
    notebook=NOTEBOOK,
)
reveal(
    "Const-x0 against itself, seeds and threshold chosen afterwards: largest factor?",
    float(np.nanmax(null)),
)
assert np.nanmax(null) > 3.7, "a choice made afterwards must find a factor where there is none"

# %% [markdown]
# So a factor from one seed and one threshold is worth nothing until we know when they were chosen.
#
# ## 4 · The protocol
#
# `data/protocol.toml` was committed before the first record. It fixes arms, seeds, thresholds (by a rule, since nobody knew the levels),
# four primary comparisons, and the words that each outcome gets.

# %%
analysis = protocol["analysis"]
print(
    protocol["question"]["primary"],
    f"Thresholds: after {analysis['threshold_fractions']} of Const's budget.",
)
said = {
    key: analysis[key] for key in ("crossing", "estimate", "censoring", "multiplicity")
} | protocol["success"]
print(
    *(f"{key}: {words}" for key, words in said.items()),
    *protocol["amendments"]["entries"],
    sep="\n",
)

# %% [markdown]
# ## 5 · Can the records be trusted? And can the metric?
#
# First we train the first stretch of two arms again, on the same seed, and compare with the record. Second, a
# control for the distance: the **best possible denoiser** of Gaussian fields (notebook 06) goes through the same sampler.

# %%
spec, stretch = Race.read(Path("..") / protocol["races"][0]["spec"]), fast(1792, 640)
planned, recorded = dict(spec.entries()), table.set_index(["grid", "arm", "seed"])
with tempfile.TemporaryDirectory() as scratch:
    for key in [("fields sample", arm, spec.seeds[0]) for arm in ("const-x0", "dy-sigma")]:
        run = train(
            replace(planned[key], images=stretch),
            Path(scratch) / key[1],
            progress=False,
            finish=False,
        )
        last, row = run.metrics.dropna(subset="distance").iloc[-1], recorded.loc[key]
        got, at = [last.distance, *last.validation_losses], row.images.index(stretch)
        known = [row.distances[at], *row.validation_losses[at]]
        print(f"{key[1]}: distance {got[0]:.3f} after {stretch} images, recorded {known[0]:.3f}")
        np.testing.assert_allclose(got, known, rtol=0.05, err_msg="the record must be reproducible")

pixels, linear = load_features("pixels"), NoiseSchedule.linear(1000)
training = moments(extract(pixels, gaussian_fields(spec.base["train_images"], size=8).images))
shape, steps = (spec.base["distance_images"], 1, 8, 8), spec.base["distance_steps"]
drawn = [
    sample_images(OptimalDenoiser(GaussianField(), linear), linear, shape, num_steps=n)
    for n in (100, steps)
]
ideal, best = (frechet_distance(moments(extract(pixels, images)), training) for images in drawn)
print(
    f"best denoiser: distance {ideal:.2f} with 100 sampling steps, {best:.2f} with {steps}, as in the race"
)
assert best > 2 * ideal, "twelve steps must cost more than everything else"

# %% [markdown]
# With the race's few sampling steps even the best denoiser is far from the data: an error of the *sampler*. A network below it is not better; its errors and the
# sampler's cancel. The protocol did not foresee this. We keep its metric, mark the control in the figure, and show bits beside it.
#
# ## 6 · The curves, and the four primary comparisons

# %%
MAIN = ("const-x0", "const-eps", "min-snr", "uncertainty", "dy-sigma", "dy-sigma tuned")
PANELS = [
    (f"{k} {to}", m)
    for to in own
    for k, m in (("fields", "distance"), ("fields", "bits"), ("leaves", "bits"))
]
fractions, baselines = analysis["threshold_fractions"], analysis["baselines"]


def said(row):  # R with its interval, or as the bound that it is
    whole = f"{row.ratio:.2f}" + f" [{row.low:.2f}, {row.high:.2f}]" * (row.pairs > 1)
    return {"=": whole, "?": "?"}.get(row.bound, f"{row.bound} {row.ratio:.2f}")


def compare(
    rows, metric, rule, baseline=None
):  # every arm against baseline (or rule), where `rule` sets thresholds
    levels = thresholds_at(race_curves(rows, metric), rule, fractions)
    found = race_table(rows, metric, levels, baseline or rule)
    fraction = found.groupby(["grid", "arm"]).cumcount().map(dict(enumerate(fractions)))
    found = found.assign(
        metric=metric, rule=rule, fraction=fraction, said=[said(row) for row in found.itertuples()]
    )
    return found.set_index(["grid", "metric", "rule", "fraction", "arm"])


asked = [
    (table[table.grid.str.startswith(kind)], name)
    for kind, part in analysis["metrics"].items()
    for name in part
]
curves = {
    (*key, metric): runs
    for rows, metric in asked
    for key, runs in race_curves(rows, metric).items()
}
results = pandas.concat(
    [compare(rows, metric, rule) for rows, metric in asked for rule in baselines]
).sort_index()
prior = pandas.concat(
    [compare(rows, metric, rule, "min-snr") for rows, metric in asked for rule in baselines]
)
prior = prior.xs("dy-sigma", level="arm").sort_index()

fig, axes = plt.subplots(2, 3, figsize=(10, 6.4), sharex=True)
for ax, (label, metric) in zip(axes.flat, PANELS, strict=True):
    series = {arm: [v[1:] for _, v in curves[label, arm, metric].values()] for arm in MAIN}
    plots.trajectories(
        ax, curves[label, "dy-sigma", metric][spec.seeds[0]][0][1:], series, log=True
    )
    ax.axhline(
        results.threshold[label, metric, own[label.split()[1]], 0.5].iloc[0],
        color="0.3",
        linewidth=1,
    )
    ax.axhline(best if metric == "distance" else np.nan, color="C3", linewidth=1, linestyle=":")
    ax.set(xscale="log", xlabel="images seen" * ("epsilon" in label), title=f"{label}: {metric}")
    plain(ax.xaxis, (300, 1000, 3000, 10000))
    plain(ax.yaxis, (0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50))
    ax.get_legend().remove()
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)


def lead(
    label, metric, arm
):  # ln value of dy-sigma over that of an arm, at every evaluation, mean over seeds
    pairs = zip(
        curves[label, "dy-sigma", metric].values(), curves[label, arm, metric].values(), strict=True
    )
    return np.mean([np.log(mine[1:] / other[1:]) for (_, mine), (_, other) in pairs], axis=0)


gap = max(abs(lead(*panel, "min-snr")).max() for panel in PANELS)
assert [panel for panel in PANELS if lead(*panel, own[panel[0].split()[1]]).mean() < 0] == PANELS[
    :3
], "the upper row"
plots.show(
    fig,
    "12_curves",
    title="Distance and bits per dimension against images seen",
    caption=f"Sample networks predict x0, epsilon networks the noise. Averaged along training, dy-sigma is ahead of the network's own constant in every panel above and in none below. It stays within {100 * np.expm1(gap):.0f} % of its prior min-snr everywhere. Where the network predicts the noise, const-x0 stalls or gets worse again. Solid line: the primary threshold; dotted: the best denoiser with the race's sampler; bands: 95 % over paired seeds.",
    alt="Six panels of six curves with bands, both axes logarithmic. Sample networks, upper row: min-snr, dy-sigma and dy-sigma tuned fall first and side by side, then const-eps, last const-x0 and uncertainty, close together. Epsilon networks, lower row: all curves fall together except const-x0, which levels off far above them and on fields rises; at the end const-eps is lowest in bits.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# Now the four primary comparisons. The first is the nearest to the abstract: const-x0, a
# network that predicts $x_0$, judged by samples. Guess its $R$.

# %%
predict("Dy-Sigma against const-x0, sample network, fields, distance: R?", 3.7)


# %%
def verdict(row, p):  # the protocol's words for one primary comparison
    if row.bound != "=":
        return (
            "no statement" if row.bound == "?" else "a bound"
        ) + ", without interval or p: not shown to be sooner"
    sooner, claimed = (
        row.low > 1 and p < 0.05,
        row.name[2] == "const-x0" and row.ratio >= 3.7 and row.low > 1,
    )
    place = "lies below" if row.high < 3.7 else "contains" if row.low <= 3.7 else "lies above"
    return f"{'' if sooner else 'not '}sooner; {'' if claimed else 'not '}as claimed; the interval {place} 3.7"


keys = [
    (which["grid"], which["metric"], which["baseline"], 0.5, "dy-sigma")
    for which in protocol["primary"]
]
primary = results.loc[keys].assign(p_holm=lambda rows: holm(rows.p))
primary = primary.assign(verdict=[verdict(row, row.p_holm) for _, row in primary.iterrows()])
for key, r in primary.iterrows():
    print(f"{', '.join(key[:3])}: R {r.said}, p {r.p:.2g}, Holm {r.p_holm:.2g}\n    {r.verdict}")
    print(f"    never there: {r.censored_baseline} and {r.censored_arm} of {r.pairs}; ", end="")
    print(f"correlation {r.correlation:.2f}; detectable R {r.detectable:.2f}")
reveal(
    "Dy-Sigma against const-x0, sample network, fields, distance: R?", float(primary.ratio.iloc[0])
)

# %% [markdown]
# *Detectable* is the smallest $R$ that so many seeds find four times out of five. In words:
#
# - Against const-x0, where the network predicts $x_0$, Dy-Sigma is sooner on both data sets; both estimates lie below the claim. On fields the interval
#   excludes 3.7.
# - Against const-eps, where the network predicts the noise, it is not shown to be sooner. On leaves it is later, by how much is only
#   bounded. On fields the threshold lies below the best denoiser: no statement.
#
# ## 7 · Every arm, both constants, both networks

# %%
arms, half = [*spec.arms], results.xs(0.5, level="fraction")


def dots(
    ax, label, metric
):  # R at the middle threshold, against both constants; primary ones have a black edge
    for (baseline, arm), row in half.loc[label, metric].iterrows():
        i, key = baselines.index(baseline), (label, metric, baseline, 0.5, arm)
        at, mark = (
            arms.index(arm) + (0.17, -0.17)[i],
            {"=": "os"[i], ">=": ">", "<=": "<", "?": "$?$"}[row.bound],
        )
        ax.hlines(at, row.low, row.high, color=f"C{i}", linewidth=1.4)
        x, edge = (
            np.nan_to_num(row.ratio, nan=0.15),
            "k" if key in primary.index and row.bound != "?" else "none",
        )
        ax.plot(
            x,
            at,
            marker=mark,
            color=f"C{i}",
            markersize=7,
            markeredgecolor=edge,
            markeredgewidth=1.5,
        )


fig, axes = plt.subplots(2, 3, figsize=(10, 7.4), sharex=True, sharey=True)
for ax, (label, metric) in zip(axes.flat, PANELS, strict=True):
    dots(ax, label, metric)
    ax.vlines(
        [1, 3.7], -0.5, len(arms) - 0.5, color=["0.3", "C3"], linestyles=["-", "--"], linewidth=1.2
    )
    ax.set(xscale="log", xlim=(0.12, 40), ylim=(-0.5, len(arms) - 0.5), title=f"{label}: {metric}")
    plain(ax.xaxis, (0.25, 0.5, 1, 2, 3.7, 10, 30))
axes[0, 0].set_yticks(range(len(arms)), labels=arms)
marks = [
    plt.Line2D([], [], marker="os"[i], color=f"C{i}", label=f"against {name}")
    for i, name in enumerate(baselines)
]
fig.legend(
    handles=marks, loc="outside upper center", ncols=2, title="R: times fewer images than Const"
)
counts = [
    sum(primary.verdict.str.contains(word))
    for word in ("^sooner", "; as claimed", "lies below", "contains")
]
gained = (prior.loc[[key[:4] for key in primary.index]].low > 1).sum()
assert counts == [2, 0, 1, 1] and gained == 0, (
    "the words of section 6 and the claim must be what the records say"
)
plots.show(
    fig,
    "12_race",
    title="How many times fewer images than Const?",
    caption=f"Against Const, dy-sigma is sooner in {counts[0]} of the four primary comparisons (black edge) and as claimed in {counts[1]}: in {counts[2]} the interval lies below 3.7, in {counts[3]} it contains 3.7. Against its own prior, min-snr, it is sooner in {gained}. {'; '.join(', '.join(key[:3]) + ': ' + row.said for key, row in primary.iterrows())}. Middle threshold; dashed: 3.7; bars: 95 % over {primary.pairs.max()} paired seeds; triangles: bounds; ?: no statement.",
    alt="Six panels with ten arms as rows and R on a logarithmic axis, lines at 1 and 3.7. Sample networks: all arms with min-snr or dy-sigma lie between 1.5 and 5 against both constants, uncertainty near 1 or below, ugd below. Epsilon networks: against const-x0 every arm, const-eps too, is a bound above 3.7; against const-eps nearly every arm is a bound near one half, or a question mark.",
    notebook=NOTEBOOK,
)
print(
    "R of dy-sigma, by threshold fraction:\n\n"
    + results.xs("dy-sigma", level="arm").said.unstack().to_string()
)
flat = results.reset_index().assign(predicts=lambda rows: rows.grid.str.split().str[-1])
mine = flat[flat.rule == flat.predicts.map(own)]
every = mine[mine.fraction == 0.5].pivot(index=["grid", "arm"], columns="metric", values="said")
print(
    "\nR of every arm against the network's own constant, 0.5:\n\n" + every.fillna("").to_string()
)

# %% [markdown]
# **The wrong constant loses to everybody.** By distance on fields, with an ε-network, every arm beats const-x0 by more than 3.7, plain const-eps too. With an
# $x_0$-network, judged by validation loss, every arm beats const-eps by far more, plain const-x0 too.
#
# **The abstract's number does appear**: with $x_0$-networks against const-x0, at thresholds other than the primary one. The first table below
# lists where. Min-SNR, which learns nothing, has it in the same places. The second
# table counts them beside all $R<1$.
#
# Not registered, but a sceptic asks: how much of the factor is the prior's? So Dy-Sigma against Min-SNR, at the same thresholds.

# %%
wrong = (
    half.ratio["fields epsilon", "distance", "const-x0"],
    half.ratio["fields sample", "validation", "const-eps"],
)
assert min(ratio.min() for ratio in wrong) > 3.7, (
    "against the wrong constant everything is fast, the right one too"
)
spots = flat.query(
    "rule == 'const-x0' and predicts == 'sample' and ratio >= 3.7 and arm in ('dy-sigma', 'min-snr')"
)
spots = spots.pivot(index=["grid", "metric", "fraction"], columns="arm", values="said")
assert spots.notna().all(axis=None), (
    "wherever dy-sigma reaches 3.7 against const-x0, min-snr must, and the reverse"
)
print(f"R >= 3.7 against const-x0, sample networks:\n\n{spots.to_string()}\n")
flat["high"], flat["low"] = (
    (flat.ratio >= 3.7) & (flat.bound != "<="),
    (flat.ratio < 1) & (flat.bound != ">="),
)
tally = (
    flat.groupby(["arm", "predicts", "rule"])[["high", "low"]]
    .sum()
    .astype(str)
    .agg(", ".join, axis=1)
)
print(f"number of R >= 3.7, and of R < 1:\n\n{tally.unstack([1, 2]).fillna('').to_string()}")
print("\nR of dy-sigma against min-snr:\n\n" + prior.said.unstack().to_string())

# %% [markdown]
# By distance and bits, with $x_0$-networks, learning adds nothing to Min-SNR on the linear schedule, perhaps costs a few per cent; on the cosine
# schedule it gains as little. By validation loss it adds more: that is what it is fitted to (notebook 06).
#
# ## 8 · Who pays, and do the weights fluctuate?
#
# A ratio of times hides which timesteps gained. Below: losses at the end over those of the own constant; fluctuation of the weights;
# whole curves, without a threshold.


# %%
def ratio(logs):  # geometric mean over seeds, and the factor to either end of its 95 % interval
    return "{:.2f} ×/÷ {:.2f}".format(*map(np.exp, plots.t_interval(logs)))


bands = {
    "cleanest tenth": slice(0, 4),
    "middle tenth": slice(18, 22),
    "noisiest tenth": slice(36, 40),
}
ends = {
    key: np.log([v[-1] for v in rows.validation_losses])
    for key, rows in table.groupby(["grid", "arm"])
}
over = {
    key: end - ends[key[0], own[key[0].split()[-1]]]
    for key, end in ends.items()
    if key[1] in MAIN[2:]
}
paid = {
    key: [ratio(logs[:, band].mean(1)) for band in bands.values()] for key, logs in over.items()
}
print(
    "loss at the end over that of the own constant:\n\n"
    + pandas.DataFrame(paid, index=bands).T.to_string()
)
cv = [100 * float(fluctuation(torch.tensor(w)[len(w) // 2 :]).median()) for w in table.bin_weights]
shaking = table.assign(cv=cv).pivot_table(index="arm", columns="grid", values="cv")
print(
    "\nfluctuation of the weights, second half, %:\n\n"
    + shaking[shaking.max(axis=1) > 0].round(1).to_string()
)
assert not (shaking.loc["dy-sigma"] > shaking.loc[["uncertainty", "ugd"]].min()).any(), (
    "dy-sigma must be steadier"
)
area = {key: np.array([log_area(*run) for run in runs.values()]) for key, runs in curves.items()}
print(
    "\nwhole curve, no threshold: value of dy-sigma over that of the own constant, mean over ln images"
)
for label, _, metric in [key for key in area if key[1] == "dy-sigma"]:
    print(
        f"{label}, {metric}: {ratio(area[label, 'dy-sigma', metric] - area[label, own[label.split()[-1]], metric])}"
    )

# %% [markdown]
# An $x_0$-network pays at high noise for the clean end; an ε-network the other way round. Dy-Sigma's weights fluctuate less than those of
# uncertainty weighting and far less than those of UGD: this part of the abstract holds for our reconstruction.
#
# ## 9 · What did not work
#
# Before the protocol, a screening on one other seed tried seventeen arms, to register one as "tuned". One seed only
# finds what is far behind.

# %%
screening = load_races(Path("../data/runs/screening-fields"))
tried = [
    compare(screening, metric, rule).loc[grid]
    for metric in ("distance", "bits")
    for grid, rule in own.items()
]
tried = pandas.concat(tried).xs(0.5, level="fraction").sort_index()
ranking = tried.said.unstack([0, 1]).sort_values(("distance", "const-x0"), ascending=False)
print(f"R at the middle threshold, ONE seed:\n\n{ranking.to_string()}")

# %% [markdown]
# Far behind by distance: an $x_0$-network with the prior const-eps. Of no use: weights fitted to learnable loss (`excess`), or
# another strength of the anchor. What seems to help needs no
# learning: stratified timesteps, and the smoother prior. On fresh seeds the tuned arm kept its place on fields only.
#
# ## 10 · Photographs: a small CIFAR-10
#
# `data/protocol-cifar10-cpu.toml` registers what a CPU can do with CIFAR-10 (rebuilt copy, 170 of 60,000 images
# approximate): 16 × 16, a tiny network, 40,000 images, a learning rate for each arm, bits from $t=4$ to 996. In the
# first race training *broke* in one seed of most arms: the rates came from runs a third as long. By the rule
# that is no statement. The others, at half the rates, were registered before they ran: a repeat; samples (Fréchet distance, features of a small
# classifier; not FID; means at the end below the tables); networks for the noise; and for those the best of a screening of Dy-Sigmas that aim at
# the judge: the ELBO's weights as prior, timesteps drawn where the weighted loss varies (*sampled*).

# %%
small = read_config(Path("../data/protocol-cifar10-cpu.toml"))
for r in (
    small["races"][0],
    small["repeat"],
    *small["distance"]["races"],
    small["repeat_epsilon"],
    small["improved"],
):
    photos = load_races(Path("..") / r["records"]).sort_values("seed", ignore_index=True)
    rule, judges = (
        own[photos.grid[0].split()[-1]],
        ["distance"] if "distances" in photos else ["bits", "validation"],
    )
    rivals = sorted({rule, "min-snr", "elbo sampled"} & {*photos.arm})
    rows = [
        compare(photos, judge, rule, rival).assign(against=rival)
        for judge in judges
        for rival in rivals
    ]
    shown = pandas.concat(rows).xs(0.5, level="fraction").set_index("against", append=True).said
    last = (
        photos.distances.str[-1].groupby(photos.arm).mean().round(1).to_dict()
        if "distances" in photos
        else ""
    )
    print(
        f"\n{r['records']}:\n\n{shown.unstack(['metric', 'against']).fillna('').to_string()}\n{last}"
    )

# %% [markdown]
# **Networks for $x_0$**: the abstract's number appears, in bits, $R$ = 4.78 [3.54, 6.47], and by samples, 3.78 [2.23, 6.41]; both *sooner; as claimed; the interval
# contains 3.7*. Without learning, Min-SNR has 5.01 and 3.34, and by samples ends ahead (6.7 against 7.6). By validation loss Dy-Sigma beats it: 1.31.
#
# **Networks for the noise**: in bits no usual arm gets where const-eps is (Dy-Sigma ≤ 0.49). By samples ≥ 0.88: not shown to be sooner. **What wins** aims at the judge:
# in bits the arm of the screening has $R$ = 1.52 [1.39, 1.66], *sooner*. Its prior, so sampled, has 1.60 without learning, const-eps so sampled 1.22.
# Other timesteps pay: 0.74 by validation loss, ≤ 0.50 without learning.
#
# ## 11 · What should a reader use?
#
# Count, per arm, over the races of sections 3 to 9, against the network's own constant. *Sooner* and *later* are after Holm's
# correction; bounds have no $p$.

# %%
sooner, later = (mine.bound == ">=") & (mine.ratio > 1), (mine.bound == "<=") & (mine.ratio < 1)
cases = [(mine.p_holm < 0.05) & (mine.ratio > 1), mine.p_holm < 0.05, sooner, later]
outcome = np.select(cases, ["sooner", "later", "sooner, a bound", "later, a bound"], "open")
outcome = pandas.Series(outcome, mine.index, name="")
bits = (mine.metric == "bits") & (mine.predicts == "epsilon")
assert not outcome[bits].str.startswith("sooner").any(), (
    "in bits, nothing may be sooner than const-eps with ε"
)
print(pandas.crosstab([mine.predicts, mine.arm], outcome).to_string())

# %% [markdown]
# - **Your network predicts $x_0$**: take Min-SNR or `sigmoid`, with stratified timesteps. By distance and bits Dy-Sigma adds little.
# - **It predicts the noise**: if likelihood counts, sample timesteps with `loss-second-moment`, under const-eps or `elbo`; learning adds nothing. By samples,
#   bounds without $p$ point to Dy-Sigma on the cosine schedule and to nothing on the linear one. If every noise level counts alike, Dy-Sigma is
#   sooner, and sooner than Min-SNR.
# - **You want learned weights anyway**: anchored Dy-Sigma is the steadiest of those raced. Avoid UGD at this scale.
# - **You read "times faster than Const"**: ask which, and whether a fixed weighting gains the same.
#
# **Try it yourself.** Set `a` to 0.05 and to 0.5 in section 2: for which curves is a speed-up worth reporting?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **12.1** (●○○, 4 min) Late in training a metric falls like $n^{-0.25}$. At equal images, an arm's value is 20 % below that of Const, that is
# 0.8 times as large. How many times faster is it?
#
# <details><summary>Hint</summary>
#
# The formula of section 2: the ratio of values, Const over arm, to the power $1/a$.
#
# </details>

# %%
wrong = {
    "That is the ratio of values, not of images.": 1.25,
    "Turned round.": 0.8**4,
    "To the power a.": 1.25**0.25,
}
exercise("12.1", expected=1.25**4, mistakes=wrong)
times_faster = ...  # a number
check("12.1", times_faster)

# %% [markdown]
# **12.2** (●●○, 6 min) Cheat for Min-SNR, which nobody calls 3.7 times faster: choose the *lowest* threshold in `levels` at which it looks at least 3.7
# times as fast as const-x0, with any one seed (distance, $x_0$-network). The curves are `const[seed]` and `min_snr[seed]`.
#
# <details><summary>Hint</summary>
#
# `factors(const[seed], min_snr[seed], levels) >= 3.7` marks thresholds, one array per seed; combine the arrays with "or".
#
# </details>

# %%
looks = np.any([factors(const[seed], min_snr[seed], levels) >= 3.7 for seed in const], axis=0)
exercise(
    "12.2", expected=levels[looks].min(), mistakes={"That is the highest.": levels[looks].max()}
)
chosen_threshold = ...  # use factors, const, min_snr, levels
check("12.2", chosen_threshold)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
times_faster = (1 / 0.8) ** (1 / 0.25)
check("12.1", times_faster)

# %% tags=["solution"]
chosen_threshold = min(
    at for at in levels if any(factors(const[k], min_snr[k], [at]) >= 3.7 for k in const)
)
check("12.2", chosen_threshold)

# %% [markdown]
# ## What you can now do
#
# - Ask of any "times faster": than which constant, at which threshold, chosen when, over how many seeds, with what interval?
# - Compare your own arms: write a specification like `data/races/race-fields.toml`, run `dysigma race`, and read it with
#   `load_races`, `thresholds_at` and `race_table`.
# - Re-create every number above with `dysigma notebooks 12`, and the records themselves with `RECOMPUTE = True`.
#
# ## Limitations
#
# - A reconstruction. That our formula is or is not 3.7 times faster says little about the authors' formula, data and network.
# - Tiny networks, images of 8 × 8 and 16 × 16, 20,000 or 40,000 of them, minutes on a CPU. No CIFAR-10 at scale, FID or GPU.
#   Whether factors grow or shrink with scale is not known.
# - Bits of fields and leaves are integrated from t = 12 to 987; on fields that leaves out more than half.
# - One learning rate for all arms (CIFAR-10: one each), from a coarse grid with one seed.
#
# ## References
#
# - Liu, Ye, Liu, Qin, *Dy-Sigma: A Generalized Accelerated Convergence Strategy for Diffusion Models*, IJCNN 2024: known to us by its abstract.
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo, *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): "Const", the 3.4 times, and the table of section 1.
# - Holm, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of Statistics 6, 1979: what to do with many $p$-values.
# - Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, *GANs Trained by a Two Time-Scale Update Rule*, 2017,
#   [arXiv:1706.08500](https://arxiv.org/abs/1706.08500): the Fréchet distance between sets of images; on Inception features it is the FID.
# - Chong, Forsyth, *Effectively Unbiased FID and Inception Score and Where to Find Them*, 2019,
#   [arXiv:1911.07023](https://arxiv.org/abs/1911.07023): why such a distance depends on the number of samples and on the model.
# - Kingma, Salimans, Poole, Ho, *Variational Diffusion Models*, 2021, [arXiv:2107.00630](https://arxiv.org/abs/2107.00630): bits per
#   dimension as an integral of losses over log-SNR.
#
# **Next:** [13, reuse](13_your_own_loop.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
