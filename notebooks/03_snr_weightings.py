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
# # 03 · Derive the SNR weightings on one scale
#
# > **Claim.** Min-SNR, P2, soft-min-SNR, EDM and the rest are one-line functions of the log-SNR once all are written as weights on the
# > *same* error. Written that way, three of them turn out to be the same, and the bugs that circulate in training scripts become visible.
#
# **You will be able to**
#
# - convert a loss or a weight between $x_0$-, $\epsilon$- and $v$-prediction, and say why a weight table without its target is meaningless;
# - derive each weighting and write it so that it stays finite where the SNR is 0;
# - compute how many timesteps a weighting really uses, and what that costs in noise;
# - recognise the wrong Min-SNR formulas that sit in published code, and measure what they do.
#
# **You need** [01](01_forward_process_and_snr.ipynb) (log-SNR, the floor of the loss). [00](00_start_here.ipynb) shows the weightings at work.
#
# **Time** reading 35 min · running about 15 s (short run 10 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.weightings.make_weighting`, `log_conversion`, `effective_sample_size`, `share_changed`,
# `dysigma.exact.LinearDenoiser`.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import softplus

from dysigma import plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.exact import GaussianMixture, LinearDenoiser
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule
from dysigma.weightings import effective_sample_size, log_conversion, make_weighting, share_changed

NOTEBOOK = "03_snr_weightings"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · One error, three losses
#
# A network sees $x_t=\alpha x_0+\sigma\epsilon$. Knowing $x_t$, a guess at $x_0$ *is* a guess at $\epsilon$, and at any mixture of them. So one and the
# same guess has three losses, depending on the target we compare with. Here is a denoiser that misses every value of $x_0$ by exactly
# 0.1, a squared error of 0.01.

# %%
schedule = NoiseSchedule.linear(1000)
draw = generator(0, 0, "noise")
timesteps = torch.tensor([20, 100, 258, 500, 900])
x0, noise = torch.randn(5, 4096, generator=draw), torch.randn(5, 4096, generator=draw)
x_t = schedule.add_noise(x0, noise, timesteps)
alpha, sigma = schedule.alpha[timesteps, None], schedule.sigma[timesteps, None]

x0_guess = x0 + 0.1
noise_guess = (x_t - alpha * x0_guess) / sigma  # the same guess, said differently
v_guess = alpha * noise_guess - sigma * x0_guess
guesses = {"sample": x0_guess, "epsilon": noise_guess, "v_prediction": v_guess}

losses = {}
for kind, guess in guesses.items():
    losses[kind] = (guess - schedule.target(x0, noise, timesteps, kind)).square().mean(1)
print(f"{'t':>5s}{'SNR':>10s}{'loss x0':>10s}{'loss eps':>10s}{'loss v':>10s}")
for i, t in enumerate(timesteps):
    snr = schedule.log_snr[t].exp()
    print(
        f"{t:5d}{snr:10.3g}{losses['sample'][i]:10.3g}{losses['epsilon'][i]:10.3g}{losses['v_prediction'][i]:10.3g}"
    )

# %% [markdown]
# **Where the factors come from.** $x_t$ is given, so the guesses obey $x_t=\alpha\hat x_0+\sigma\hat\epsilon$ too. Subtract the true one:
# $\hat\epsilon-\epsilon=-\tfrac{\alpha}{\sigma}(\hat x_0-x_0)$. Put that into $v=\alpha\epsilon-\sigma x_0$:
# $\hat v-v=-\big(\tfrac{\alpha^2}{\sigma}+\sigma\big)(\hat x_0-x_0)=-\tfrac1\sigma(\hat x_0-x_0)$. With $S=\alpha^2/\sigma^2$,
#
# $$L^\epsilon=S\,L^{x},\qquad L^{v}=(1+S)\,L^{x}.$$
#
# A weight moves the other way: $w^xL^x=w^\epsilon L^\epsilon=w^vL^v$. In logarithms, with $\lambda=\ln S$,
#
# $$\ln w^\epsilon=\ln w^x-\lambda,\qquad \ln w^v=\ln w^x-\mathrm{softplus}(\lambda).$$
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $S,\ \lambda$ | `snr`, `log_snr` | `(T,)` | signal-to-noise ratio and its natural logarithm |
# | $L^x, L^\epsilon, L^v$ | `losses` | `(B,)` | mean squared error against $x_0$, $\epsilon$, $v$ |
# | $w^x, w^\epsilon, w^v$ | `weighting.weights()` | `(T,)` | the weight for that loss; the package calls the targets `sample`, `epsilon`, `v_prediction` |
# | $\gamma$ | `gamma` | number | where a weighting changes its mind |


# %%
def conversion(log_snr, target):
    """What to add to ln w on x0 to get ln w on the target."""
    return {"sample": 0 * log_snr, "epsilon": -log_snr, "v_prediction": -softplus(log_snr)}[target]


snr = schedule.log_snr[timesteps].exp().float()
torch.testing.assert_close(losses["epsilon"], snr * losses["sample"], rtol=1e-3, atol=0)
torch.testing.assert_close(losses["v_prediction"], (1 + snr) * losses["sample"], rtol=1e-3, atol=0)
for target in guesses:
    torch.testing.assert_close(
        conversion(schedule.log_snr, target), log_conversion(schedule.log_snr, target)
    )
print("the three losses differ by S and 1 + S; the conversion equals the package's")

# %% [markdown]
# ## 2 · Every weighting in one line
#
# Fix the scale: $\ln w$ **on the $x_0$ error**, as a function of $\lambda$. What do people want from it?
#
# - **const-x0**, $w^x=1$: count every pixel error alike. **const-eps**, $w^x=S$: the plain noise loss of DDPM. **const-v**, $w^x=1+S$.
# - **min-snr**, $w^x=\min(S,\gamma)$: const-eps lets the clean timesteps ($S$ in the thousands) rule the shared weights; const-x0 neglects the details they
#   hold. Take const-eps, but stop raising the weight at $\gamma=5$ (Hang et al. 2023). **max-snr** and **truncated-snr** take the maximum instead:
#   const-eps, but never less than $\gamma$ (1 for truncated), so that an $x_0$-network still learns at the noisy end.
# - **soft-min-snr**, $w^x=\gamma S/(S+\gamma)$: half the harmonic mean of $S$ and $\gamma$, a minimum without the corner.
# - **p2**, $w^x=S/(k+S)^\gamma$: const-eps, damped at large $S$ where only imperceptible detail is left (Choi et al. 2022).
# - **debiased**, $w^x=\sqrt S$: the geometric mean of const-x0 and const-eps.
# - **edm**, $w^x=S+1/\sigma_d^2$: the reciprocal of the error that the best *linear* denoiser makes on data of standard deviation $\sigma_d$; section 5 derives it.
#
# In logarithms a minimum is a minimum, a power is a factor, and a sum is `logaddexp`. No division anywhere, so nothing breaks at $S=0$.

# %%
lam, ln5, ln4 = schedule.log_snr, math.log(5), math.log(4)
log_w = {
    "const-x0": 0 * lam,
    "const-eps": lam,
    "const-v": softplus(lam),
    "truncated-snr": lam.clamp(min=0),
    "min-snr": lam.clamp(max=ln5),
    "max-snr": lam.clamp(min=ln5),
    "soft-min-snr": lam + ln4 - torch.logaddexp(lam, torch.full_like(lam, ln4)),
    "p2": lam - softplus(lam),
    "debiased": lam / 2,
    "edm": torch.logaddexp(lam, torch.full_like(lam, ln4)),
}
for name, mine in log_w.items():
    for target in guesses:
        theirs = make_weighting(name, schedule, target, normalize=False).weights()
        torch.testing.assert_close(
            (mine + conversion(lam, target)).exp().float(), theirs, msg=f"{name} for {target}"
        )
print(f"{len(log_w)} weightings × 3 targets: all equal to make_weighting")

# %% [markdown]
# The picture needs one unit. We take the noise loss and scale every curve to mean 1, as `normalize=True` does.

# %%
families = {
    "Bounded at the noisy end": ("const-eps", "min-snr", "soft-min-snr", "p2"),
    "Growing without bound": ("const-x0", "debiased", "truncated-snr", "edm"),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
for ax, (title, names) in zip(axes, families.items(), strict=True):
    curves = {name: make_weighting(name, schedule, "epsilon").weights() for name in names}
    plots.weight_curves(ax, schedule.log_snr, curves).set(title=title, ylim=(1e-4, 100))
axes[0].set_ylabel("weight of the noise-prediction loss")
axes[1].set_ylabel("")
plots.show(
    fig,
    "03_weightings",
    title="The static weightings in one unit (linear schedule)",
    caption="Two families. The left one only turns down clean timesteps and suits a noise-predicting network; the right one grows "
    "like 1/SNR, or its root, towards pure noise. Three of the four on the right coincide there.",
    alt="Weights against log-SNR on logarithmic axes. Left: four curves flat at the noisy end; const-eps stays flat, the others fall towards clean. "
    "Right: const-x0 falls in a straight line, debiased half as steeply, edm and truncated-snr follow const-x0 and then level off.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# ## 3 · How many timesteps does a weighting use?
#
# Suppose every timestep's gradient is about as noisy. A weighted mean over a batch then has variance proportional to $\mathbb E[w^2]/(\mathbb E w)^2$. Its
# reciprocal, the **effective sample size**, says which share of the batch does the work:
#
# $$\mathrm{ESS}=\frac{(\sum_t w_t)^2}{T\sum_t w_t^2}\in(0,1].$$
#
# It is 1 for equal weights and $1/T$ if a single timestep has all the weight. Guess it for `const-x0` on a network that predicts noise.

# %%
QUESTION_ESS = "Effective sample size of const-x0 (linear schedule, noise loss)?"
predict(QUESTION_ESS, 0.5)

# %%
schedules = {"linear": schedule, "cosine": NoiseSchedule.cosine(1000)}
print(f"{'weighting':15s}{'ESS linear':>12s}{'cosine':>9s}{'changed, linear':>18s}{'cosine':>9s}")
for name in ("const-eps", "min-snr", "soft-min-snr", "p2", "debiased", "edm", "const-x0"):
    ess, changed = [], []
    for s in schedules.values():
        w = make_weighting(name, s).weights().double()
        ess.append(w.sum() ** 2 / (len(w) * (w * w).sum()))
        assert torch.isclose(ess[-1], effective_sample_size(w)), (
            "the formula must agree with the package"
        )
        changed.append(share_changed(w, torch.ones(1000)))
    print(f"{name:15s}{ess[0]:12.3f}{ess[1]:9.3f}{changed[0]:18.0%}{changed[1]:9.0%}")
reveal(QUESTION_ESS, round(float(ess[0]), 2))

# %% [markdown]
# Two things to take away. Min-SNR changes 13 % of the timesteps of the linear schedule and 26 % of the cosine one: on noise prediction its room to help (or harm) is limited
# from the start. And `const-x0` on a noise-predicting network works with a tenth of every batch, or a thousandth.
#
# Does the formula hold? Draw timesteps, give each a unit of noise, and compare the variance of the weighted mean with that of the plain mean, for five
# seeds. `const-eps` is the baseline; the **negative control** is Min-SNR's weights in shuffled order: ESS does not care *which* timesteps are
# heavy, so it must stay the same.


# %%
def measured_ess(w, seed):
    rng, repeats, batch = np.random.default_rng(seed), fast(20_000, 4_000), 32
    weighted = np.asarray(w)[rng.integers(0, 1000, (repeats, batch))] * rng.standard_normal(
        (repeats, batch)
    )
    return 1 / (batch * weighted.mean(1).var())


shuffled = make_weighting("min-snr", schedule).weights()[
    torch.randperm(1000, generator=generator(0, 0, "shuffle"))
]
cases = {
    name: make_weighting(name, schedule).weights()
    for name in ("const-eps", "min-snr", "p2", "debiased")
}
for name, w in {**cases, "min-snr shuffled": shuffled}.items():
    values = [measured_ess(w, seed) for seed in range(5)]
    mean, half = plots.t_interval(values)
    print(f"{name:17s} measured {mean:.3f} ± {half:.3f}, formula {effective_sample_size(w):.3f}")
    assert abs(mean / effective_sample_size(w) - 1) < 0.06, (
        f"{name}: variance must follow the effective sample size"
    )

# %% [markdown]
# ## 4 · Three names, one weighting
#
# Divide soft-min-SNR by $S$ to get its weight on the noise loss: $\gamma/(S+\gamma)$. Divide by $\gamma$ and compare:
#
# $$\frac{1}{S+\gamma}\;\;\text{(P2 with } k=\gamma,\ \text{exponent } 1),\qquad \frac{\gamma}{S+\gamma}=\frac1{1+e^{\lambda-\ln\gamma}}=\mathrm{sigmoid}(\ln\gamma-\lambda).$$
#
# Soft-min-SNR, P2 with exponent 1, and the sigmoid weighting with bias $\ln\gamma$ are the same function up to a constant. Three papers, three names; an
# ablation that compares them at matching parameters compares nothing.

# %%
gamma = 4.0
soft = make_weighting("soft-min-snr", schedule, gamma=gamma).weights()
torch.testing.assert_close(
    soft, make_weighting("sigmoid", schedule, bias=math.log(gamma)).weights()
)
torch.testing.assert_close(soft, make_weighting("p2", schedule, k=gamma, gamma=1.0).weights())
print("soft-min-snr(γ = 4) = sigmoid(bias = ln 4) = p2(k = 4, γ = 1), all three with mean 1")

# %% [markdown]
# ## 5 · EDM's weight is learned uncertainty, for the simplest data
#
# *Uncertainty weighting* (Kendall et al. 2018) gives each task a learned variance $\varsigma^2$ and minimises $L/\varsigma^2+\ln\varsigma^2$. Set the derivative with respect to
# $\ln\varsigma^2$ to zero: $\varsigma^2=L$, so the task ends up with weight $1/L$. [05](05_learnable_weightings.ipynb) trains such weights. Here we ask what they would be for **white
# Gaussian data** of standard deviation $\sigma_d$. The posterior of $x_0$ is Gaussian, precisions add, and the smallest error is the posterior variance:
#
# $$L^{x,\star}=\Big(S+\frac1{\sigma_d^2}\Big)^{-1}\quad\Longrightarrow\quad w^x=\frac1{L^{x,\star}}=S+\frac{1}{\sigma_d^2},$$
#
# which is exactly the weight EDM uses (Karras et al. 2022). So EDM's weight *is* uncertainty weighting, at the solution for data without structure. Before we measure: on data that are *not*
# Gaussian, say the two points $\pm\sigma_d$ from notebook 01, by which factor does $1/L^\star$ exceed EDM's weight at SNR = 20?

# %%
QUESTION_EDM = "1/L* divided by EDM's weight, two-point data, SNR = 20?"
predict(QUESTION_EDM, 1.0)

# %%
few = NoiseSchedule(schedule.alphas_cumprod[20::40])  # 25 of the 1000 levels
edm = make_weighting("edm", few, "sample", normalize=False, sigma_data=0.5).weights()
one, half_ = torch.tensor([1.0]), torch.tensor([0.5])
kinds = {
    "Gaussian data": GaussianMixture(one, torch.zeros(1, 1), half_),
    "two points (control)": GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-0.5], [0.5]]), torch.zeros(2)
    ),
}
ratio = {}
for name, kind in kinds.items():
    floors = [
        kind.irreducible(few, "sample", num_samples=fast(20_000, 5_000), seed=seed)[0]
        for seed in range(5)
    ]
    ratio[name] = (1 / torch.stack(floors)) / edm
    shown = " ".join(f"{v:8.3g}" for v in ratio[name].mean(0)[[24, 12, 6, 3, 1, 0]])
    print(f"{name:22s} 1/L* over EDM's weight, noisy to clean: {shown}")

assert ((ratio["Gaussian data"].mean(0) - 1).abs() < 0.05).all(), (
    "on Gaussian data 1/L* must be EDM's weight"
)
at_snr_20 = int((few.log_snr - math.log(20)).abs().argmin())
assert ratio["two points (control)"].mean(0)[at_snr_20] > 1.5, "on structured data it must not be"
reveal(QUESTION_EDM, round(float(ratio["two points (control)"].mean(0)[at_snr_20]), 1))

# %% [markdown]
# The last value stands for infinity: the floor is 0 there. With structure in the data the floor drops much faster as the noise recedes, and uncertainty weighting would pile weight on the clean end far beyond EDM's.
# That gap is what a *learned* weight can add to a *predefined* one, and it is the idea behind combining the two: EDM2 does it, and so does Dy-Sigma as far as its
# abstract tells (what we build in notebook [06](06_dy_sigma_derived.ipynb) is an independent reconstruction from that abstract).
#
# ## 6 · Failures on purpose: the bugs in the wild
#
# None of these is exotic. Each has been in a widely used repository, some for years; the links are in the references.
#
# | | what was written | what it does |
# |---|---|---|
# | B1 | noise added in bfloat16 | several timesteps get no noise at all ([01](01_forward_process_and_snr.ipynb), section 6) |
# | B2 | $v$-weight $\min(1,\gamma/S)+1$, or $\min(S+1,\gamma)/(S+1)$, instead of $\min(S,\gamma)/(S+1)$ | the clean or the noisy end keeps weight it should lose |
# | B3 | $\max(S,\gamma)/S$ instead of $\min$ | raises the noisy end instead of lowering the clean one |
# | B4 | $\min(S,\gamma)/S$ at $S=0$ | 0/0: NaN, and with it the whole batch |
# | B5 | $x_0$-loss multiplied by $S$ | *not* a bug: it is the plain noise loss, as section 1 shows; only undocumented |
#
# At SNR 10,000, the cleanest timestep of the linear schedule, by which factor is the first wrong form of B2 too large?

# %%
QUESTION_BUG = "B2 at SNR = 10,000: wrong weight / right weight?"
predict(QUESTION_BUG, 2.0)

# %%
snr = torch.tensor([1e4, 100.0, 5.0, 1.0, 0.01, 0.0])
right_v = snr.clamp(max=5) / (snr + 1)
forms = {
    "v: min(S,5)/(S+1), right": right_v,
    "v: min(1,5/S) + 1, wrong": (5 / snr).clamp(max=1) + 1,
    "v: min(S+1,5)/(S+1), wrong": (snr + 1).clamp(max=5) / (snr + 1),
    "eps: min(S,5)/S, NaN at 0": snr.clamp(max=5) / snr,
    "eps: max(S,5)/S, wrong": snr.clamp(min=5) / snr,
}
print(f"{'SNR':28s}", *(f"{v:10.4g}" for v in snr))
for name, weights in forms.items():
    print(f"{name:28s}", *(f"{v:10.4g}" for v in weights))
reveal(QUESTION_BUG, round(float(forms["v: min(1,5/S) + 1, wrong"][0] / right_v[0])))

zero = NoiseSchedule.linear(1000, zero_terminal_snr=True)
package = make_weighting("min-snr", zero, "v_prediction", normalize=False).weights()
assert package.isfinite().all() and package[-1] == 0, (
    "with zero terminal SNR the v-weight must end at 0, not at NaN"
)
try:
    make_weighting("min-snr", zero, "epsilon")
except ValueError as refusal:
    print("\nepsilon at SNR 0 is refused:", refusal)

# %% [markdown]
# ## 7 · Who pays? An exact answer
#
# Everything so far was about the weights. What do they do to a trained network? For one small problem there is no need to train: a *linear* denoiser $\hat\epsilon=c(t)\,x_t$, coordinate by coordinate, on independent Gaussian
# coordinates. Every weighted sum of its losses is a quadratic form, so its minimiser is a linear solve, and the floor is known too. `LinearDenoiser` has a knob, its
# `degree`: with 1, all timesteps share one $c$ and must compromise; with $T$, each has its own.
#
# The **baseline** is const-eps. The **negative control** is full degree: if timesteps share nothing, a weighting must not matter at all. We add the wrong $v$-weight of B2,
# converted to the noise loss, beside the right one.

# %%
levels = NoiseSchedule(schedule.alphas_cumprod[12::25])  # 40 levels
variances = torch.tensor([4.0, 1.0, 0.25, 0.06, 0.015])  # a steep spectrum, as images have
s40 = levels.log_snr.exp()
bug_eps = ((5 / s40).clamp(max=1) + 1) * (1 + s40) / s40
arms = {
    name: make_weighting(name, levels).weights().double()
    for name in ("const-eps", "min-snr", "p2", "const-x0")
}
arms["min-snr for v, bug B2"] = bug_eps / bug_eps.mean()

excess, control = {}, {}
for degree, store in ((1, excess), (40, control)):
    denoiser = LinearDenoiser(levels, variances, degree=degree)
    for name, w in arms.items():
        store[name] = denoiser.losses(denoiser.minimiser(w)) - denoiser.irreducible()

worst = max(float(e.abs().max()) for e in control.values())
assert worst < 1e-9, "without sharing, every weighting must reach every floor"
means = {name: float(e.mean()) for name, e in excess.items()}
assert min(means, key=means.get) == "const-eps", (
    "const-eps minimises the mean noise loss by definition"
)
assert (
    excess["min-snr"][0] > excess["const-eps"][0]
    and excess["min-snr"][-1] < excess["const-eps"][-1]
), "min-snr trades clean for noisy"
print(
    f"full degree: largest excess {worst:.0e}. One shared c: mean excess",
    {k: round(v, 3) for k, v in means.items()},
)

# %%
fig, ax = plt.subplots(figsize=(7, 4))
shown = {name: e.clamp(min=1e-5) for name, e in excess.items()}
plots.trajectories(ax, levels.log_snr, shown, log=True)
ax.set(xlabel="log-SNR λ (noisy → clean)", ylabel="loss above the floor", ylim=(8e-5, 2))
plots.show(
    fig,
    "03_who_pays",
    title="One shared coefficient: every weighting makes somebody pay",
    caption="The exact minimiser under five weightings, on one problem. Min-SNR and P2 move the compromise towards noise, const-x0 all the way, and the wrong "
    "v-weight lands on top of const-x0. Gains on one side are paid on the other. With a coefficient per timestep all curves are 0.",
    alt="Loss above the floor against log-SNR, logarithmic. Const-eps dips near log-SNR minus 1, min-snr a little further left, p2 near minus 2; left of the dip "
    "p2 is lowest of the three, right of it highest. Const-x0 and the bug coincide: near zero at the noisy end, about 1 at the clean end.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# **Try it yourself.** `degree=2` or `3` in the cell above: more capacity, less conflict. `NoiseSchedule.cosine` in section 1. `gamma=1` or `20` for Min-SNR: where does the dip go?
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **3.1** (●●○, 6 min) The P2 weight (k = 1, exponent 1) for a network that predicts $v$, as a function of `S`, before scaling. Start from the list in section 2.
#
# <details><summary>Hint</summary>
#
# On $x_0$ it is $S/(1+S)$. Section 1 says what a weight on $x_0$ must be divided by to become one on $v$.
#
# </details>

# %%
S = schedule.log_snr.exp()
exercise(
    "3.1",
    expected=make_weighting("p2", schedule, "v_prediction", normalize=False).weights(),
    mistakes={
        "That is the weight on the x0 error; it still has to be converted.": S / (1 + S),
        "That is the weight for a network that predicts the noise: you divided by S.": 1 / (1 + S),
        "You multiplied by 1 + S; a weight is divided by what the loss is multiplied by.": S,
    },
)
p2_for_v = ...
check("3.1", p2_for_v)

# %% [markdown]
# **3.2** (●●○, 8 min) Write the Min-SNR weight (γ = 5) on the *noise* loss as a function of `log_snr` so that it gives 1 where the SNR is 0 (`log_snr` is minus infinity there). The obvious
# `snr.clamp(max=5) / snr` gives NaN.
#
# <details><summary>Hint</summary>
#
# $\min(S,\gamma)/S=\min(1,\gamma/S)$, and $\ln(\gamma/S)=\ln\gamma-\lambda$. Take the minimum before the exponential.
#
# </details>

# %%
log_snr = torch.tensor([9.0, 3.0, 1.0, -2.0, -math.inf])
exercise(
    "3.2",
    expected=torch.tensor([5 * math.exp(-9), 5 * math.exp(-3), 1.0, 1.0, 1.0]),
    mistakes={
        "That is the weight on the x0 error, min(S, 5).": log_snr.exp().clamp(max=5),
        "The maximum, not the minimum: this is bug B3.": (ln5 - log_snr).clamp(min=0).exp(),
    },
)
finite_everywhere = ...
check("3.2", finite_everywhere)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
p2_for_v = S / (1 + S) / (1 + S)
check("3.1", p2_for_v)

# %% tags=["solution"]
finite_everywhere = (ln5 - log_snr).clamp(max=0).exp()
check("3.2", finite_everywhere)

# %% [markdown]
# ## What you can now do
#
# - Read any weighting in a paper or a script, ask "on which error?", and put it on the common scale.
# - Tell names from functions: three of the weightings are one.
# - Say before training how many timesteps a weighting uses and how many it changes on your schedule.
# - Check a training script for five known bugs.
#
# ## Limitations
#
# - The effective sample size assumes gradients of equal size at all timesteps *of the noise loss*. In another unit it is another number.
# - The linear denoiser shows the trade-off at the *end* of training. Weightings also change the speed of getting there, for deep networks
#   perhaps mainly that.
# - Weights here are per uniformly drawn timestep. Papers that write weights against $\mathrm d\lambda$ mean something else; multiply by the density of
#   notebook 01 to compare.
#
# ## References
#
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023, [arXiv:2303.09556](https://arxiv.org/abs/2303.09556).
# - Choi et al., *Perception Prioritized Training of Diffusion Models*, 2022, [arXiv:2204.00227](https://arxiv.org/abs/2204.00227): P2.
# - Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364): EDM.
# - Kingma, Gao, *Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation*, 2023, [arXiv:2303.00848](https://arxiv.org/abs/2303.00848):
#   weights against $\mathrm d\lambda$, and the sigmoid weighting.
# - Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses*, 2018, [arXiv:1705.07115](https://arxiv.org/abs/1705.07115).
# - The bugs: [B1, diffusers pull request 9004](https://github.com/huggingface/diffusers/pull/9004);
#   [B2, diffusers issue 5654](https://github.com/huggingface/diffusers/issues/5654);
#   [B3, denoising-diffusion-pytorch pull request 363](https://github.com/lucidrains/denoising-diffusion-pytorch/pull/363);
#   [B4, Min-SNR pull request 4](https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/pull/4);
#   [B5, diffusers issue 1733](https://github.com/huggingface/diffusers/issues/1733).
#
# **Next:** [04, weightings in the wild](04_weightings_in_the_wild.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
