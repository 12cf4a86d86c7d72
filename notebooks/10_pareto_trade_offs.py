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
# # 10 · Pareto trade-offs: the best that any weighting could do
#
# > **Claim.** A loss weighting chooses a point on a trade-off curve. For a linear denoiser the curve is known exactly: no
# > weighting passes it, and it vanishes when every timestep has parameters of its own. For a DDPM the curve must be measured, by
# > sweeping static weights. In our race none of 19 strategies passes that sweep; one of its own points does, at twice the learning
# > rate.
#
# **You will be able to**
#
# - draw a Pareto front of timestep losses, and say when weighted sums reach all of it;
# - tell "Pareto stationary" from "the trade-off I want", and name the objectives that a claim of optimality is about;
# - measure how far a strategy lies beyond a swept front, with an interval and against the noise of two seeds;
# - use hypervolume without being fooled by its reference point.
#
# **You need** weightings on one scale ([03](03_snr_weightings.ipynb)), the strategies of [06](06_dy_sigma_derived.ipynb),
# gradient conflicts ([08](08_gradient_conflicts.ipynb)).
#
# **Time** reading 35 min · running about 15 s (short run 15 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.exact.LinearDenoiser.front`, `dysigma.pareto.min_norm_weights`, `stationarity`,
# `non_dominated`, `hypervolume`, `knee`, `attainment`, weighting `"split"`.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from dysigma import pareto, plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.distances import extract, frechet_distance, load_features, moments
from dysigma.evaluation import evaluation_timesteps, sample_images, validation_losses
from dysigma.exact import (
    GaussianField,
    LinearDenoiser,
    OptimalDenoiser,
    field_floor,
    field_variances,
    gaussian_fields,
)
from dysigma.lab.convergence import load_races
from dysigma.lab.race import Race, race
from dysigma.schedule import NoiseSchedule
from dysigma.weightings import make_weighting

NOTEBOOK = "10_pareto_trade_offs"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · Every weighting is a point
#
# Take the Gaussian images of notebook 06 and the simplest denoiser: each Fourier mode of $x_t$ times a number $\theta_j$, *the
# same at all 20 noise levels*. Its losses are known without sampling, and the minimiser of any weighted sum is a linear solve. We
# watch two averages, over the ten low-noise and the ten high-noise levels, above the floor that the best denoiser leaves.
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $L_t$ | `denoiser.losses` | `(T,)` | noise loss at level $t$ |
# | $E=(E_1,E_2)$ | `excess` | `(2,)` | mean $L_t-L_t^\star$ over low-noise and over high-noise levels; smaller is better |
# | $\omega=(a,1-a)$ | `mixes` | `(n, 2)` | how the two averages are weighted |
# | $g_k,\ G$ | `jacobian`, `gramian` | `(2, n)`, `(2, 2)` | gradients of the averages, their inner products |
# | $\delta$ | `beyond` | () | logarithmic distance beyond a front; negative is behind it |

# %%
schedule = NoiseSchedule.linear(1000)
levels = NoiseSchedule(schedule.alphas_cumprod[25::50])
halves = torch.stack([torch.arange(20) < 10, torch.arange(20) >= 10]).double() / 10
denoiser = LinearDenoiser(levels, field_variances().flatten())
torch.testing.assert_close(
    denoiser.irreducible(), field_floor(levels), msg="the floor must be that of the images"
)


def excess(theta, model=denoiser):
    return halves @ (model.losses(theta) - model.irreducible())


share = torch.linspace(-8, 8, 401, dtype=torch.float64).sigmoid()
mixes = torch.stack([share, 1 - share], 1)
exact_front = denoiser.front(halves, mixes) - halves @ denoiser.irreducible()
utopia = denoiser.utopia(halves) - halves @ denoiser.irreducible()
assert pareto.non_dominated(exact_front).all(), (
    "every weighting of the two averages must be Pareto optimal"
)

names = ("const-eps", "min-snr", "p2", "debiased", "const-x0")
thetas = {
    name: denoiser.minimiser(make_weighting(name, levels).weights().double()) for name in names
}
thetas["1 / L*"] = denoiser.minimiser(
    1 / denoiser.irreducible()
)  # what uncertainty weighting leads to
landed = {name: excess(theta) for name, theta in thetas.items()}

# %% [markdown]
# **Why weighted sums reach the whole front.** Each $L_t$ is convex in $\theta$. So if two loss vectors are attained, some
# $\theta$ does at least as well as any mixture of them: the set $\{y: y\ge E(\theta)\text{ for some }\theta\}$ is convex. A
# Pareto optimal point lies on its boundary, where a convex set has a supporting line $\omega\cdot y=c$. As the set stretches
# upwards without end, $\omega\ge0$. The point minimises $\omega\cdot E$: it *is* a weighted sum. Conversely, the minimiser of a
# sum with positive weights cannot be improved in one loss for free.
#
# **How far from the front?** Let both excesses of a point grow by a common factor $e^\delta$ until it meets the front: $\delta$
# is its distance beyond the front, negative if they must shrink. It is a multiplicative $\epsilon$-indicator, against a curve
# that joins the points by straight lines in the plane of $\ln E_1,\ln E_2$.


# %%
def beyond(point, front):
    """Shift along (1, 1) that takes the point (2,) to the front (m, 2), in logarithms of the losses."""
    front = np.asarray(front)[pareto.non_dominated(np.asarray(front))]
    front = front[front[:, 0].argsort()]
    front = np.vstack(
        [front[0] + [0, 9], front, front[-1] + [9, 0]]
    )  # worse in one objective is attained as well
    return float(
        np.interp(point[0] - point[1], front[:, 0] - front[:, 1], front.mean(1))
        - (point[0] + point[1]) / 2
    )


def pair(theta):
    """Gradients of the two averages (2, n) and their Gramian (2, 2)."""
    jacobian = halves @ denoiser.gradients(theta)
    return jacobian, jacobian @ jacobian.T


print("            low noise  high noise    beyond   stationarity: 20 levels   2 averages")
for name, theta in thetas.items():
    still = [
        abs(pareto.stationarity(gramian)) for gramian in (denoiser.gramian(theta), pair(theta)[1])
    ]
    distance = beyond(landed[name].log(), exact_front.log())
    print(
        f"{name:12s}{landed[name][0]:9.4f}{landed[name][1]:12.5f}{distance:+10.2%}{still[0]:26.0e}{still[1]:13.0e}"
    )
    assert distance < 1e-4, "no weighting may pass the exact front"
    assert still[0] < 1e-8, (
        "the minimiser of a weighted sum must be Pareto stationary in the losses it sums"
    )

# %% [markdown]
# Only const-eps lies exactly *on* this front. Yet all six are optimal: the first stationarity column is 0. **Optimal for what?**
# Each is a best compromise between twenty losses. A weighting that is uneven *within* a half gives up a little of the half's
# average for a trade-off that our two axes hide.
#
# **Where the argument breaks.** In the Fonseca–Fleming problem, along its Pareto set $s\in[-1,1]$, $f_1=1-e^{-(s-1)^2}$ and
# $f_2=1-e^{-(s+1)^2}$ are not convex, and the middle of the front bulges outwards. A line pushed from below touches it near its
# ends only. Minimising the *maximum* of $\omega_1f_1$ and $\omega_2f_2$ (Tchebycheff) pushes a corner instead, which reaches
# every point; $\mu\ln\sum_ke^{\omega_kf_k/\mu}$ does so with a gradient (Lin et al. 2024).

# %%
s, omega, mu = np.linspace(-1.5, 1.5, 6001), np.linspace(0.001, 0.999, 999), 0.02
f = 1 - np.exp(-np.stack([(s - 1) ** 2, (s + 1) ** 2], 1))
one, two = omega * f[:, :1], (1 - omega) * f[:, 1:]
smooth = mu * np.logaddexp(one / mu, two / mu)
choices = {
    "weighted sum": one + two,
    "Tchebycheff": np.maximum(one, two),
    "smooth Tchebycheff": smooth,
}
fig, (ax, bx) = plt.subplots(1, 2, figsize=(9.5, 4.2))
ax.plot(*exact_front.T, color="0.4", label="exact front")
for i, (name, point) in enumerate(landed.items()):
    ax.plot(*point, plots.MARKERS[i], color=f"C{i}", label=name)
ax.plot(*utopia, "*", color="black", markersize=11, label="utopia: a denoiser per half")
ax.set(
    yscale="log",
    xlim=(0.058, 0.126),
    xlabel="low-noise excess loss",
    ylabel="high-noise excess loss",
)
bx.plot(*f[np.abs(s) <= 1].T, color="0.4", label="Fonseca–Fleming front")
for i, (label, values) in enumerate(choices.items()):
    reached = f[values.argmin(0)]
    bx.plot(
        *(reached[::37] + 0.04 * i).T, plots.MARKERS[i], color=f"C{i}", markersize=4.5, label=label
    )
    widest = np.diff(np.sort(reached[:, 0])).max()
    print(f"{label:18s} 999 weights, widest gap in f1: {widest:.3f}")
    assert (widest > 0.9) == (label == "weighted sum"), (
        "only the weighted sum may leave out the middle"
    )
bx.set(xlabel="$f_1$", ylabel="$f_2$")
for each, place in ((ax, "upper right"), (bx, "lower left")):
    each.legend(loc=place)
plots.show(
    fig,
    "10_exact_fronts",
    title="A front that weighted sums reach, and one that they do not",
    caption="Left: linear denoiser, exact. The weightings choose trade-offs that differ by a factor of 100 in high-noise loss, and none passes the front. Right: where the front bulges outwards, no weighted sum finds its middle; both Tchebycheff forms do (27 of 999 weights each, the sets shifted apart for the eye).",
    alt="Left: a falling curve in the plane of low-noise and high-noise excess loss. Const-eps, min-snr, p2 and debiased lie on it from the middle to the lower right end, const-x0 and 1 / L* just behind that end; a star marks utopia at the lower left. Right: a front that bulges away from the origin, circles of weighted sums at its two ends only, squares and triangles of the Tchebycheff forms all along it.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# ## 2 · The price of sharing, and how capacity removes it
#
# Let the numbers vary with the noise level: $\theta_j(t)=\sum_r\phi_r(t)\,\theta_{rj}$ with `degree` polynomials of log-SNR. The
# *price of sharing* is what one denoiser loses, at best, against one per half:
#
# $$\min_\theta(E_1+E_2)-\min_\theta E_1-\min_\theta E_2.$$
#
# With 20 polynomials it is 0, since each level has parameters of its own. What happens on the way, from degree 1 to 2?

# %%
QUESTION_PRICE = "Price of sharing at degree 2 over that at degree 1?"
predict(QUESTION_PRICE, 0.3)

# %%
(fig, ax), prices = plt.subplots(figsize=(6.4, 4.4)), {}
for i, degree in enumerate((1, 2, 3, 4, 6, 20)):
    model = LinearDenoiser(levels, field_variances().flatten(), degree)
    least = halves @ model.irreducible()
    points, ideal = model.front(halves, mixes) - least, model.utopia(halves) - least
    prices[degree] = float(points[200].sum() - ideal.sum())  # mix 200 is (1/2, 1/2)
    print(
        f"degree {degree:2d}: two specialists {float(ideal.sum()):8.1e}, price of sharing {prices[degree]:8.1e}"
    )
    style = {"color": f"C{i}", "marker": plots.MARKERS[i], "linestyle": plots.DASHES[i % 5]}
    ax.plot(*points.T, markevery=50, markersize=4, label=f"degree {degree}", **style)
    ax.plot(*ideal, markersize=9, markerfacecolor="none", **style)
assert abs(prices[20]) < 1e-15, "a denoiser with parameters for each level must not pay for sharing"
assert prices[2] > prices[1] > prices[3], "the price must rise before it falls"
reveal(QUESTION_PRICE, prices[2] / prices[1])
ax.set(
    xlim=(-0.003, 0.15),
    ylim=(-0.002, 0.05),
    xlabel="low-noise excess loss",
    ylabel="high-noise excess loss",
)
ax.legend(title="open: its utopia")
plots.show(
    fig,
    "10_capacity",
    title="With capacity the front collapses",
    caption="Exact. As the shared denoiser gains features, its front shrinks into the corner where both losses are at their floors; at degree 20 it is the corner and nothing is left to trade.",
    alt="Falling curves in the plane of low- and high-noise excess loss, for degrees 1, 2, 3, 4 and 6, each closer to the origin, with open markers for their utopia points near the horizontal axis. Degree 20 is a single point at the origin.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# The price is not monotone: at degree 2 the specialists have become good and the shared denoiser not yet. A front between
# timesteps is a statement about a *network*, not about diffusion: capacity moves it, a weighting can only move along it.
#
# ## 3 · Stationary, but where?
#
# With two gradients, some mixture $\lambda g_1+(1-\lambda)g_2$ is shortest. Put the derivative of its squared length to 0:
#
# $$\lambda=\mathrm{clip}\!\left(\frac{G_{22}-G_{12}}{G_{11}+G_{22}-2G_{12}},\,0,\,1\right).$$
#
# If the shortest has length 0, no direction improves both losses: the point is *Pareto stationary*, and $(\lambda,1-\lambda)$ is
# the weighting whose minimiser it is. If not, minus the shortest mixture improves both. **MGDA** (Désidéri 2012) follows it.
# Where does it end?


# %%
draw, step = (
    torch.Generator().manual_seed(0),
    32 / (halves @ denoiser.variance).max(),
)  # one over the largest curvature
for scale in (0, 0.5, 1, 1.5, 2, 3):
    theta = scale * torch.rand(1, 64, generator=draw, dtype=torch.float64)
    jacobian, gramian = pair(theta)
    (g11, g12), (_, g22) = gramian
    by_hand = ((g22 - g12) / (g11 + g22 - 2 * g12)).clamp(0, 1)
    assert abs(pareto.min_norm_weights(gramian)[0] - by_hand) < 1e-12, (
        "the package must agree with the closed form"
    )
    assert pareto.stationarity(gramian) > 1e-3, "off the front the shortest mixture must not vanish"
    for _ in range(fast(1000, 600)):
        theta = theta - step * (pareto.min_norm_weights(gramian) @ jacobian).view_as(theta)
        jacobian, gramian = pair(theta)
    end, found = excess(theta), pareto.min_norm_weights(gramian)
    print(
        f"MGDA from U(0, {scale:3.1f}): ends at {end[0]:.3f}, {end[1]:.5f}; low-noise weight {found[0]:.2f}"
    )
    assert abs(beyond(end.log(), exact_front.log())) < 1e-3, "MGDA must end on the front"
for mix in mixes[100:301:25]:
    found = pareto.min_norm_weights(pair(denoiser.minimiser(mix @ halves))[1])
    torch.testing.assert_close(
        found, mix, rtol=1e-6, atol=1e-6, msg="on the front they must be the weights of the sum"
    )

# %% [markdown]
# Six starts, six trade-offs, and each is Pareto stationary. From $\theta=0$ the low-noise half is left with no weight at all:
# once $G_{12}\ge G_{22}$, the shortest mixture is the shorter gradient alone. "Reaches Pareto stationarity" is a claim about
# convergence. It does not say which compromise was reached, or whether it is a good one.
#
# ## 4 · The DDPM: sweep first, judge second
#
# A network's losses are convex in its *outputs*, not in its parameters, so nothing guarantees section 1 for a DDPM; Hu et al.
# (2023) prove that weighted sums miss balanced points even for linear multi-task models that are too small. So we measure.
#
# Xin et al. (2022) found, for language and vision, that no specialised multi-task method went past the front of *tuned static
# weights*; Kurin et al. (2022), that regularised plain sums match them. The honest baseline is a sweep.
#
# `data/races/front-fields.toml` specifies one: a small U-Net that predicts noise on the Gaussian images, weight `split` with
# ratio $R$ between the low-noise half of the timesteps ($t<500$) and the high-noise half; $R=1$ is const-eps. Part of it also
# runs at half and twice the learning rate. Beside it, on the same seeds, every other strategy of `WEIGHTINGS` (`dy-sigma` is our
# reconstruction, notebook 06). The floor is the Wiener filter on the same images and noise, as in 05. `dysigma race
# data/races/front-fields.toml --out data/runs/front-fields` computes it.


# %%
RECOMPUTE = False  # True: race again, into a new folder
spec = Race.read(Path("../data/races/front-fields.toml"))
folder = Path("../data/runs") / ("front-fields-again" if RECOMPUTE else "front-fields")
table = load_races(race(spec, folder, jobs=2).parent if RECOMPUTE else folder)
at = evaluation_timesteps(1000, spec.base["validation_timesteps"])
held_out = gaussian_fields(10_000, size=8, split="test").images[: spec.base["validation_images"]]
wiener = OptimalDenoiser(GaussianField(), schedule)
best = validation_losses(wiener, held_out, schedule, "epsilon", timesteps=at)

swept = {
    arm: float(arm.split()[1]) for arm in spec.arms if arm.startswith("split") and "lr" not in arm
}
tuned = [arm for arm in spec.arms if arm.startswith("split") and arm not in swept]
strategies = [arm for arm in spec.arms if arm not in (*swept, *tuned)]
print(
    f"{len(table)} runs: {len(swept)} ratios, {len(tuned)} more learning rates, {len(strategies)} strategies"
)

# %% [markdown]
# How many of the strategies end up beyond the swept front, with a 95 % interval of the distance that excludes 0?

# %%
QUESTION_BEYOND = "Strategies beyond the swept front?"
predict(QUESTION_BEYOND, 5)


# %%
def distances(arm, rivals):
    """For each seed, beyond the front of the same seed's rivals; nothing is its own rival."""
    return [
        beyond(points[arm][i], [points[rival][i] for rival in rivals if rival != arm])
        for i in seeds
    ]


final, seeds = (
    torch.tensor(table.validation_losses.tolist(), dtype=torch.float64)[:, -1] - best,
    range(len(spec.seeds)),
)
table["low"], table["high"] = (
    final[:, part].mean(1).log().numpy() for part in (at < 500, at >= 500)
)
assert table[["low", "high"]].notna().all(axis=None), "no network may beat the Wiener filter"
points = {
    arm: rows.sort_values("seed")[["low", "high"]].to_numpy() for arm, rows in table.groupby("arm")
}
fronts = [np.array([points[arm][i] for arm in swept]) for i in seeds]
plain, hard = (
    {arm: plots.t_interval(distances(arm, rivals)) for arm in points}
    for rivals in (swept, [*swept, *tuned])
)
past = [arm for arm in strategies if plain[arm][0] > plain[arm][1]]
behind = [arm for arm in strategies if plain[arm][0] < -plain[arm][1]]
reveal(QUESTION_BEYOND, len(past))
print(f"behind, with a 95 % interval: {len(behind)} of {len(strategies)}, {', '.join(behind)}")
more = plots.t_interval(points["split 64"] - points["split 1"])
one, many = (final[[name == arm for name in table.arm]].mean(0) for arm in ("split 1", "split 64"))
print(
    "split 64 over split 1:",
    ", ".join(f"t = {t}: {r:.2f}" for t, r in zip(at[::3], (many / one)[::3], strict=True)),
)
assert not past and max(hard[arm][0] for arm in strategies) < 0, (
    "the text says that no strategy is beyond a front"
)
assert more[0][0] > more[1][0], (
    "more weight on the low-noise half must raise its loss, as the text says"
)
assert max(plain[arm] for arm in tuned) > max(plain[arm] for arm in strategies), (
    "learning rate before strategy"
)

# %%
looks = {arm: {"fmt": "*" if arm in tuned else ".", "color": "0.3"} for arm in [*swept, *tuned]}
for i, arm in enumerate(strategies):
    style = {
        "fmt": plots.MARKERS[i % 10],
        "color": f"C{i % 10}",
        "fillstyle": ("none", "full")[i < 10],
    }
    looks[arm] = style | {"label": arm}
fig, (ax, bx) = plt.subplots(1, 2, figsize=(10.5, 7.4), width_ratios=(5, 4))
x, attained = pareto.attainment(fronts)
ax.plot(x, attained.T, drawstyle="steps-post", color="0.6", linewidth=1)
for row, (arm, look) in enumerate(looks.items()):
    middle, half = plots.t_interval(points[arm])
    ax.errorbar(*middle, half[1], half[0], elinewidth=0.6, **look)
    bx.errorbar(plain[arm][0], -row, xerr=plain[arm][1], **look)
    bx.plot(hard[arm][0], -row, "|", color="0", markersize=9)
    if arm in swept:
        ax.text(*middle, f"{swept[arm]:g}  ", ha="right", va=("top", "bottom")[row % 2])
ax.set(xlabel="ln of low-noise excess loss", ylabel="ln of high-noise excess loss")
bx.axvline(0, color="0.3", linewidth=1)
bx.set_yticks(-np.arange(len(looks)), labels=list(looks))
bx.set(xlabel="distance beyond the swept front, δ (right is better)")
plots.show(
    fig,
    "10_ddpm_front",
    title="No strategy passes the swept static weights",
    caption="Left: static weights (dots, with their ratio R; grey steps: the front that three, two and one of the three seeds reach), the same at half and twice the learning rate (stars), and strategies, marked as on the right. Right: distance beyond the sweep of the same seed; a swept ratio is judged by the others. Black ticks: against the front of all three learning rates. Bars: 95 % over three seeds.",
    alt="Left: low- against high-noise excess loss in logarithms. Dots for ratios from 64 to 1 run down on the left; those from 1 to 0.001 bend to the right along the bottom. Most strategies lie above and to the right of them; a star, ratio 0.06 at twice the learning rate, lies below. Right: a row per arm with its distance and bar. Strategies lie left of zero, except uncertainty and loss-balance, whose bars reach across it, and gramian, at zero.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# **What happened?** No strategy is beyond the sweep, and fifteen of nineteen are behind it. `uncertainty` and `loss-balance`,
# which both weigh by about $1/L$, have means of +0.14 and +0.10, and three seeds do not decide. Four things to see:
#
# - *The learning rate can take a point further beyond the front than any strategy gets.* `split 0.06` gains 0.36 ± 0.10 at twice the rate and loses
#   as much at half: the common rate was tuned on other arms. Against the front of all three rates no strategy has even a positive
#   mean. That is Xin et al.'s warning: an under-tuned baseline flatters the method.
# - *More weight can hurt the half that gets it.* At $R=64$ the low-noise loss is 1.2 times that at $R=1$: the cleanest timesteps
#   gain, those near the border lose more, as if they had learned from the other side. So ratios above 1 are off the front.
#   Specialists at their optimum, as in section 1, cannot lose.
# - *Optimal for what?* Min-SNR is behind by 0.40 ± 0.04 in plain noise loss, which the cleanest timesteps dominate; it turns
#   those down on purpose.
# - `gramian` (UPGrad) ends exactly where `split 1` does: its running mean of Gramians was ruled by the first ones, whose
#   gradients all agree. (The package now scales each.)
#
# ## 5 · Is it beyond, or is it noise?
#
# Two runs with the *same* weighting and different seeds never end at the same point, so some will lie beyond some front by luck.
# **Negative control:** judge the inner points of the sweep themselves, against the sweep of *another* seed, and against that of
# their own seed without them.

# %%
inner = list(swept)[1:-1]
control = {
    "another seed's front": [beyond(points[arm][i], fronts[i - 1]) for arm in inner for i in seeds]
}
control["own seed's front"] = [value for arm in inner for value in distances(arm, swept)]
for label, values in control.items():
    print(
        f"{label:22s}{np.mean(np.array(values) > 0):5.0%} beyond; δ {np.mean(values):+.3f}, SD {np.std(values):.3f}"
    )

# %% [markdown]
# A third of the points lie beyond another seed's front, with an SD of 0.095: a single run beyond a single front is no
# improvement. Leaving points out shows what straight lines across gaps hide: `split 0.25` is 0.19 ± 0.11 beyond its line. Gaps of
# the full sweep are half as wide, so about a quarter of this remains.
#
# **Hypervolume** puts a set into one number: the area between it and a reference point that is worse than everything. We take it
# in logarithms, where equal ratios count alike, with the reference 10 % beyond the componentwise worst of all runs: for a
# strategy alone, and what it *adds* to the sweep of its seed.

# %%
reference = np.concatenate(list(points.values())).max(0) + math.log(1.1)
whole = [pareto.hypervolume(front, reference) for front in fronts]
print(
    "the sweep: {:.2f} ± {:.2f}; knee: {}\n".format(
        *plots.t_interval(whole), list(swept)[pareto.knee(np.mean(fronts, 0))]
    )
)
print(f"{'':24s}E low   E high{'beyond':>12s}{'alone':>18s}{'adds':>18s}")
for arm in sorted(points, key=plain.get)[::-1]:
    alone = plots.t_interval([pareto.hypervolume(points[arm][i : i + 1], reference) for i in seeds])
    joined = [pareto.hypervolume(np.vstack([fronts[i], points[arm][i]]), reference) for i in seeds]
    values = (
        *np.exp(points[arm].mean(0)),
        *plain[arm],
        *alone,
        *plots.t_interval(np.subtract(joined, whole)),
    )
    print(
        f"{arm:22s}"
        + "{:8.4f}{:9.5f}{:+10.3f} ± {:.3f}{:10.2f} ± {:.2f}{:+10.3f} ± {:.3f}".format(*values)
    )

# %% [markdown]
# **Failure on purpose: the reference decides.** Rank the strategies by their own hypervolume: as above, in plain losses, and with
# the reference at the nadir of the sweep (the worst of each objective *on the front*), another common choice.

# %%
nadir = np.max([front[pareto.non_dominated(front)].max(0) for front in fronts], 0)
views = {"worst run, ln": (reference, np.array), "worst run, plain": (np.exp(reference), np.exp)}
for label, (corner, scale) in (views | {"nadir, ln": (nadir, np.array)}).items():
    alone = {
        arm: np.mean([pareto.hypervolume(scale(p[None]), corner) for p in points[arm]])
        for arm in strategies
    }
    print(f"{label:17s}", " > ".join(sorted(strategies, key=alone.get)[:-11:-1]))

# %% [markdown]
# `split 0.06` at twice the learning rate has as much hypervolume alone as the whole sweep. As for the ranking: `uncertainty` is
# third, eighth and second; const-eps (here `gramian`) fifth, second and tenth. Plain losses hardly see the high-noise half, whose
# numbers are small; the nadir cuts off what lies beside the front. State the reference, show the points.
#
# ## 6 · The loss front is not the quality front
#
# Every point of a front is "Pareto optimal". Are all of them good? For each run the record has the squared Fréchet distance
# between 1,024 samples (DDIM, 20 steps) and the training images, on pixels, a true 2-Wasserstein distance for Gaussian data. And
# the best possible denoiser is at hand: the Wiener filter, with excess 0. How much closer does *it* come, with the same sampler,
# than the network trained at $R=1$?

# %%
QUESTION_QUALITY = "Distance of samples at R = 1 over that of the perfect denoiser's?"
predict(QUESTION_QUALITY, 4.0)

# %%
quality = {
    arm: plots.t_interval(np.log(rows.distances.str[-1].astype(float)))
    for arm, rows in table.groupby("arm")
}
pixels, shape = load_features("pixels"), (spec.base["distance_images"], 1, 8, 8)
real = moments(extract(pixels, gaussian_fields(spec.base["train_images"]).images))
limits = {"held-out images": gaussian_fields(shape[0], split="test").images}
limits |= {
    f"Wiener filter, {n} steps": sample_images(wiener, schedule, shape, num_steps=n)
    for n in (20, 100)
}
limits = {
    label: frechet_distance(moments(extract(pixels, images)), real)
    for label, images in limits.items()
}
print(", ".join(f"{label}: {value:.3f}" for label, value in limits.items()))
reveal(QUESTION_QUALITY, float(np.exp(quality["split 1"][0]) / list(limits.values())[1]))

fig, ax = plt.subplots(figsize=(8.5, 4.8))
for arm, look in looks.items():
    ax.errorbar(points[arm].mean(0) @ [-1, 1], *quality[arm], elinewidth=0.6, **look)
trade = [points[arm].mean(0) @ [-1, 1] for arm in swept]
ax.plot(trade, [quality[arm][0] for arm in swept], color="0.3", label="swept static weights")
for (label, value), style in zip(limits.items(), plots.DASHES[1:4], strict=True):
    ax.axhline(math.log(value), color="0.5", linewidth=1, linestyle=style, label=label)
ax.set(
    xlabel="trade-off: ln of high- over low-noise excess loss",
    ylabel="ln of squared Fréchet distance",
)
fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
plots.show(
    fig,
    "10_quality",
    title="The loss front is not the quality front",
    caption="Between ratios 0.016 and 16 samples are about as close to the data as those of the perfect denoiser with the same 20 steps. At the high-noise end of the front, where const-x0, const-v, truncated-snr, max-snr and edm lie as well, they are 15 to 20 times further. Stars: other learning rates. Bars: 95 % over three seeds.",
    alt="Squared Fréchet distance against trade-off, both in logarithms. The line of swept weights is high on the left, falls to a plateau at the dotted line of the Wiener filter with 20 steps, and rises at its right end. Five strategies lie at the top left, debiased on the slope, ugd high on the right, the others on the plateau. Lines for held-out images and for the Wiener filter with 100 steps lie far below.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# The perfect denoiser's samples are no closer! Twenty DDIM steps cost more than the network's excess loss; with 100 steps the
# filter comes near as many held-out images. So on a plateau from $R=0.016$ to 16, where $E_2$ changes 14-fold, three seeds show
# no difference between samples. Yet at $R=0.001$, on the same front, they are some twenty times as far away as at the knee
# ($R=0.06$), for about a tenth less $E_2$. **Pareto optimal does not mean good**; which trade-off is wanted must be decided
# outside the front.
#
# **Try it yourself.** Split the timesteps elsewhere: change 500 to 250 where `table["low"]` is made. The sweep is no longer the
# front of *these* two objectives. Which strategies pass it, and why is that no contradiction?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong.
#
# **10.1** (●○○, 4 min) By hand: the hypervolume of the points (1, 3), (2, 2), (4, 1) with reference (5, 4).
#
# <details><summary>Hint</summary>
#
# Draw the three boxes. Sweep from left to right and count what each point adds below the ones before it.
#
# </details>

# %%
exercise("10.1", expected=8, mistakes={"The boxes overlap: count shared area once.": 13})
area = ...  # a number
check("10.1", area)

# %% [markdown]
# **10.2** (●●○, 5 min) A linear denoiser, `mystery`, was trained to convergence on $aE_1+(1-a)E_2$. Find $a$ from its parameters
# alone.
#
# <details><summary>Hint</summary>
#
# Section 3: on the front, what are the min-norm weights of the two gradients? `pair` gives their Gramian.
#
# </details>

# %%
mystery = denoiser.minimiser(mixes[230] @ halves)
exercise(
    "10.2",
    expected=mixes[230, 0],
    mistakes={"That is the share of the high-noise half.": mixes[230, 1]},
)
share_found = ...  # a number
check("10.2", share_found)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
area = (5 - 1) * (4 - 3) + (5 - 2) * (3 - 2) + (5 - 4) * (2 - 1)
check("10.1", area)

# %% tags=["solution"]
share_found = pareto.min_norm_weights(pair(mystery)[1])[0]
check("10.2", share_found)

# %% [markdown]
# ## What you can now do
#
# - Sweep two static weights, draw the front over seeds, and place any method against it.
# - Say for which objectives something is optimal, and why stationarity does not choose a trade-off.
# - Distrust a hypervolume without a reference point, and an improvement without a second seed.
#
# ## Limitations
#
# - Two objectives out of a thousand: a strategy may be better in a trade-off that these axes do not show.
# - One small network, one data set, one budget; a front after finite training is a front of *optimisation*, not only of capacity.
# - Three seeds give wide intervals, and of 19 uncorrected ones some may miss.
# - Learning rates were varied at four ratios and for no strategy: at a rate of its own a strategy may move as far as `split 0.06`
#   did.
#
# ## References
#
# - Xin, Ghorbani, Gilmer, Garg, Firat, *Do Current Multi-Task Optimization Methods in Deep Learning Even Help?*, NeurIPS 2022,
#   [proceedings](https://papers.neurips.cc/paper_files/paper/2022/hash/580c4ec4738ff61d5862a122cdf139b6-Abstract-Conference.html):
#   the swept front as the baseline.
# - Kurin, De Palma, Kostrikov, Whiteson, Kumar, *In Defense of the Unitary Scalarization for Deep Multi-Task Learning*, 2022,
#   [arXiv:2201.04122](https://arxiv.org/abs/2201.04122): plain sums, regularised, match specialised optimisers.
# - Hu, Xian, Wu, Fan, Yin, Zhao, *Revisiting Scalarization in Multi-Task Learning: A Theoretical Perspective*, 2023,
#   [arXiv:2308.13985](https://arxiv.org/abs/2308.13985): where weighted sums cannot reach, even for linear models.
# - Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*, 2012,
#   [doi:10.1016/j.crma.2012.03.014](https://doi.org/10.1016/j.crma.2012.03.014): the min-norm point and stationarity.
# - Lin, Zhang, Yang, Liu, Wang, Zhang, *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*, 2024,
#   [arXiv:2402.19078](https://arxiv.org/abs/2402.19078): reaches bulging fronts with gradients.
#
# **Next:** [12, the convergence race](12_the_convergence_race.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
