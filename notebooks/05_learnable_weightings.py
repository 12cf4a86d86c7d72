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
# # 05 · Learn the weights, and know beforehand where they will go
#
# > **Claim.** A learnable weighting has a fixed point that you can write down before you train. Uncertainty weighting
# > goes to $1/L_t$; with a network that predicts noise, that is nearly all weight on the noisiest timesteps. How fast it
# > gets there and how much it shakes on the way is set by a learning rate of its own and by its bins.
#
# **You will be able to**
#
# - derive uncertainty weighting from a Gaussian likelihood and name its fixed point;
# - say how many steps a learned weight needs, and how much it fluctuates, from its learning rate and the number of bins;
# - compute the weights of unconstrained gradient descent (UGD) from a Gramian, and check them against a closed form;
# - measure the fluctuation of weights in a training run, with a control that has none.
#
# **You need** gradient descent and Adam, log-SNR ([01](01_forward_process_and_snr.ipynb)), and the conversion between losses of
# $\epsilon$ and $x_0$ ([03](03_snr_weightings.ipynb)).
#
# **Time** reading 30 min · running about 60 s (short run 15 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `dysigma.weightings.make_weighting("uncertainty" | "ugd" | "loss-balance" | "random")`,
# `dysigma.weightings.fluctuation`, `dysigma.weightings.effective_sample_size`, `dysigma.training.train_step`,
# `dysigma.exact.field_floor`.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from dysigma import pareto, plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.evaluation import evaluation_timesteps, validation_losses
from dysigma.exact import field_floor, gaussian_fields
from dysigma.models import EMA
from dysigma.samplers import make_sampler
from dysigma.schedule import NoiseSchedule
from dysigma.training import TrainConfig, TrainState, train_step
from dysigma.weightings import effective_sample_size, fluctuation, make_weighting

NOTEBOOK = "05_learnable_weightings"
plots.use_style()
banner(NOTEBOOK)

# %% [markdown]
# ## 1 · A picture first
#
# Here is a small network on a data set that we understand completely: grey images of 8 × 8 pixels drawn from a Gaussian, with
# the $1/f^2$ spectrum of natural images. The network predicts the noise. Nobody tells it which timesteps matter: the weights
# start equal, and it learns them together with everything else. `train_step` is the package's training step; any
# `nn.Module` that maps `(x_t, timesteps)` to something of the shape of `x_t` will do.


# %%
schedule, shown = NoiseSchedule.linear(1000), evaluation_timesteps(1000, 40)
images, held_out = gaussian_fields(8192, size=8), gaussian_fields(256, size=8, split="test").images
log_snr = schedule.log_snr.float()[:, None] / 5
features = torch.cat(
    [log_snr, *(f(k * log_snr) for k in range(1, 5) for f in (torch.sin, torch.cos))], 1
)


class Denoiser(nn.Sequential):
    """A perceptron that corrects its own input: where there is only noise, the input already is the answer."""

    def forward(self, x_t, timesteps):
        return x_t + super().forward(torch.cat([x_t.flatten(1), features[timesteps]], 1)).view_as(
            x_t
        )


def train(name, seed=0, prediction="epsilon", weighting_lr=None, **params):
    """(R, T) weights every ten steps of training, and the losses (40,) on held-out images at the end."""
    torch.manual_seed(seed)
    net = Denoiser(
        nn.Linear(73, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64)
    )
    weighting, weights = make_weighting(name, schedule, prediction, **params), []
    groups = [
        {"params": list(net.parameters()), "lr": 2e-3},
        *weighting.parameter_groups(weighting_lr),
    ]
    optimizer = torch.optim.AdamW(
        [{**group, "base_lr": group["lr"]} for group in groups], weight_decay=0.0
    )
    state = TrainState(
        net, net, EMA(net, 1e5), schedule, weighting, make_sampler("uniform", schedule), optimizer
    )
    config = TrainConfig(
        batch_size=64, seed=seed, prediction=prediction, warmup_images=1280, device="cpu"
    )
    for step in range(fast(800, 200)):
        weights += [weighting.weights()] if step % 10 == 0 else []
        train_step(state, images, config)
    return torch.stack(weights), validation_losses(
        net, held_out, schedule, prediction, timesteps=shown
    )


first_look, _ = train("uncertainty")
fig, ax = plt.subplots()
plots.weight_curves(
    ax,
    schedule.log_snr,
    {f"after {10 * i} steps": first_look[i] for i in fast((0, 20, 40, 79), (0, 5, 10, 19))},
)
plots.show(
    fig,
    "05_first_look",
    title="Weights that a network learned for itself",
    caption="Starting from equal weights, uncertainty weighting moves weight towards high noise and away from the clean end, further with every step of training.",
    alt="Weight against log-SNR on a logarithmic axis at four moments of one training run. The first curve is flat at 1. Later ones rise on the noisy left and fall on the clean right, more and more steeply.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# Why there? And would it have stopped? Both have exact answers.
#
# ## 2 · Predict before you compute
#
# One weight is stored as $e^{-s}$, and Adam trains the number $s$, from 0. Suppose the loss of its timestep is a constant 0.03,
# so that $s$ has to reach $\ln 0.03=-3.5$. If $s$ simply joins the network's parameters, at a learning rate of
# $2\cdot10^{-4}$, after how many steps is it there (within 0.05)?

# %%
QUESTION_STEPS = "Steps until s has found a loss of 0.03, at learning rate 2e-4?"
predict(QUESTION_STEPS, 2000)

# %% [markdown]
# ## 3 · From a likelihood to weights
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $L_t$ | `losses` | `(B,)` or `(T,)` | mean squared error at timestep $t$, in the network's own target space |
# | $L^\star_t$ | `floor` | `(T,)` | the least loss that any network can have there |
# | $s_t$ | `s` | `(T,)` | learned logarithm of a variance |
# | $w_t$ | `weights()` | `(T,)` | what the gradient of $L_t$ is multiplied by; mean 1 over $t$ |
# | $\eta$ | `lr` | () | learning rate of $s$ |
# | $g_k,\ G$ | `gramian` | `(K, K)` | gradient of the loss of bin $k$; $G_{kl}=g_k\cdot g_l$ |
#
# Say that the network's error at timestep $t$ is Gaussian with a variance $e^{s_t}$ that we do not know. The negative
# log-likelihood of an error, averaged over pixels, is
#
# $$\tfrac12\left[L_t\,e^{-s_t}+s_t\right]+\text{const}.$$
#
# This is the *uncertainty weighting* of Kendall, Gal and Cipolla. Everything about it follows from two derivatives
# (we drop the ½, which rescales both):
#
# - by $s_t$: $\;1-L_te^{-s_t}$, zero at $s_t^\star=\ln L_t$. The second derivative $L_te^{-s_t}$ is positive: one minimum.
# - by the network: $\;e^{-s_t}\,\nabla L_t$, so $w_t=e^{-s_t}$, which becomes $1/L_t$.
# - put $s^\star$ back in and $1+\ln L_t$ remains: the network minimises $\sum_t\ln L_t$, the **geometric mean** of the losses.


# %%
def likelihood(losses, s):
    return losses * torch.exp(-s) + s


every, floor = torch.arange(1000), field_floor(schedule, "epsilon").float()
s = torch.zeros(1000, requires_grad=True)
likelihood(floor, s).mean().backward()

weighting = make_weighting(
    "uncertainty", schedule, bins=1000, clamp=15.0, normalize=False
)  # one s per timestep
weighting(floor, every).backward()
torch.testing.assert_close(
    weighting.coefficients.grad, s.grad, msg="the package must descend the same objective"
)


def descend(weighting, losses, timesteps, steps):
    """The weights (T,) after training a weighting on constant losses."""
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        weighting(losses, timesteps).backward()
        optimizer.step()
    return weighting.weights()


descend(weighting, floor, every, 600)
torch.testing.assert_close(
    weighting.weights(), 1 / floor, rtol=0.02, atol=0, msg="learned weights must be 1 / L"
)
remains = likelihood(floor, -weighting.weights().log()).mean() - 1
torch.testing.assert_close(
    remains, floor.log().mean(), msg="what remains must be the log of the geometric mean of L"
)
print(
    f"weights learned from constant losses are 1 / L to within {(weighting.weights() * floor - 1).abs().max():.0e}"
)

# %% [markdown]
# So the answer to "why there?" is the curve of losses. We know the least loss of this data set exactly, and it falls towards
# high noise, because there the input is nearly the noise itself. The simplest case has a closed form: white Gaussian data of variance
# $\sigma_d^2$ have $L^{x\star}=1/(\mathrm{SNR}+\sigma_d^{-2})$ and $L^\epsilon=\mathrm{SNR}\,L^x$, hence
#
# $$\frac1{L^{\epsilon\star}}=1+\frac1{\sigma_d^2\,\mathrm{SNR}},$$
#
# the weighting of EDM. At high noise that is proportional to $1/\mathrm{SNR}$: *constant weight on the error of $x_0$*.

# %%
inverse = 1 + 1 / (0.5**2 * schedule.log_snr.exp())  # sigma_d = 0.5
edm = make_weighting("edm", schedule, "epsilon", sigma_data=0.5).weights()
torch.testing.assert_close(
    (inverse / inverse.mean()).float(), edm, msg="1 / L of white data must be EDM"
)
perfect = 1 / floor / (1 / floor).mean()
for label, w in (("white data: EDM", edm), ("these images: 1 / L*", perfect)):
    print(
        f"{label:22s} noisiest tenth {w[900:].mean() / 10:.0%}, effective sample size {effective_sample_size(w):.2f}"
    )

# %% [markdown]
# A network as good as can be would thus be trained on little but the noisiest timesteps. Our run had not arrived there: its losses
# were above the floor, and $s$ needs time.
#
# ## 4 · The learning rate of s is the real hyper-parameter
#
# Adam divides the mean gradient by its root mean square. While a gradient keeps its sign and shrinks, that ratio is at most about 1, so
# **$s$ moves by at most $\eta$ per step** however large the loss. From 0 to $\ln L$ takes at least $|\ln L|/\eta$ steps.


# %%
def adam_steps(loss, lr, tolerance=0.05):
    """Steps until s, started at 0 and trained by Adam on loss e^-s + s, is within tolerance of ln loss."""
    s, mean, square, step = 0.0, 0.0, 0.0, 0
    while abs(s - math.log(loss)) > tolerance:
        step += 1
        gradient = 1 - loss * math.exp(-s)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        s -= lr * mean / (1 - 0.9**step) / (math.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return step


print(f"{'learning rate of s':>20s}{'|ln L| / lr':>14s}{'measured':>12s}")
for lr in (2e-4, 1e-3, 1e-2, 2.5e-2):
    bound, measured = abs(math.log(0.03)) / lr, adam_steps(0.03, lr)
    print(f"{lr:20g}{bound:14.0f}{measured:12d}")
    assert 0.95 * bound < measured < 2 * bound, (
        "s must not outrun Adam's bound, nor lag far behind it"
    )
reveal(QUESTION_STEPS, adam_steps(0.03, 2e-4))

# %% [markdown]
# Until it has arrived, "uncertainty weighting" is some mixture of equal weights and $1/L$. Two papers with the same formula and
# different learning rates have trained with different weights. The package gives $s$ an optimizer group of its own, with
# learning rate 0.01 and no weight decay (`parameter_groups`); ANT's code uses 0.025.
#
# ## 5 · Why bins: noise in s
#
# Losses of single samples scatter. Let $c$ be their coefficient of variation (standard deviation over mean) and $n$ the number of
# samples that an $s$ sees per step. Near its fixed point, write $s=\ln L+\delta$; gradient descent on
# $\tfrac12(Le^{-s}+s)$ becomes
#
# $$\delta\leftarrow\left(1-\tfrac\eta2\right)\delta+\tfrac\eta2\,\xi,\qquad \mathrm{std}(\xi)=\frac{c}{\sqrt n},$$
#
# whose stationary variance $v$ solves $v=(1-\frac\eta2)^2v+\frac{\eta^2}4\frac{c^2}{n}$. For small $\eta$,
#
# $$\mathrm{CV}(e^{-s})\approx\sqrt v\approx c\sqrt{\frac{\eta}{4n}}.$$
#
# We simulate it with losses that are positive and skewed (a gamma distribution), five seeds. The control is $c=0$.


# %%
def simulated_cv(c, lr, n, seed):
    """Coefficient of variation of e^-s over many copies of one s, each seeing n fresh losses per step."""
    rng, s = np.random.default_rng(seed), np.zeros(fast(4000, 1000))
    for _ in range(400):
        loss = rng.gamma(n / c**2, c**2 / n, len(s)) if c else 1.0  # mean 1, CV c / sqrt(n)
        s -= lr / 2 * (1 - loss * np.exp(-s))
    return np.std(np.exp(-s)) / np.mean(np.exp(-s))


print(f"{'samples per step':>18s}{'formula':>12s}{'simulated':>20s}")
for n in (1, 4, 16, 64):
    formula = 0.5 * math.sqrt(0.05 / (4 * n))
    mean, half = plots.t_interval([simulated_cv(0.5, 0.05, n, seed) for seed in range(5)])
    print(f"{n:18d}{formula:12.2%}{mean:12.2%} ± {half:.2%}")
    assert abs(mean / formula - 1) < 0.1, "the simulation must agree with c sqrt(lr / 4n)"
assert simulated_cv(0.0, 0.05, 1, seed=0) < 1e-12, (
    "without noise in the losses, weights must not fluctuate"
)

# %% [markdown]
# One $s$ for each of 1000 timesteps sees 0.06 samples per step of a batch of 64; one for each of 20 bins sees 3.2, fifty times more,
# and fluctuates $\sqrt{50}\approx7$ times less. The package learns $s$ at the centres of 20 bins and interpolates.
# EDM2 goes one step further: $s$ is a sum of fixed random cosines of the noise level with learned coefficients, so that
# every sample informs every timestep. Is either too coarse for the true curve? We feed both the exact losses.

# %%
print(
    f"{'typical error of a weight after':33s}{'600 steps':>12s}{fast('3000', '1200') + ' steps':>15s}"
)
for label, params in (
    ("5 bins", {"bins": 5}),
    ("20 bins", {}),
    ("Fourier, as in EDM2", {"fourier": True}),
):
    weighting = make_weighting("uncertainty", schedule, clamp=15.0, **params)
    stages = [descend(weighting, floor, every, steps) for steps in (600, fast(2400, 600))]
    print(f"{label:30s}" + "".join(f"{(w / perfect).log().std():15.1%}" for w in stages))

# %% [markdown]
# Twenty bins are precise enough, and they get there fast, because each coefficient has its own timesteps. The cosines overlap:
# they represent a smooth curve with no corners, but need many more steps to find it. That is affordable in a run as long as
# EDM2's, and not in a short one.
#
# ## 6 · Two relatives
#
# **Loss balance** skips the learning: keep a running mean of each bin's loss and use its inverse. Same fixed point, no learning rate,
# one half-life instead.
#
# **UGD**, the unconstrained gradient descent of Min-SNR's authors, does not look at losses but at gradients. If a
# step along $-\sum_k \omega_kg_k$ is to help every bin, a good choice is the *shortest* such vector with $\omega_k\ge0,\ \sum \omega_k=1$: by
# Désidéri's theorem no bin gets worse along it (to first order). UGD writes $\omega=\mathrm{softmax}(\beta)$ and descends
#
# $$\left\|\sum_k\omega_kg_k\right\|^2+\rho\sum_k\omega_k^2=\omega^{\!\top}G\omega+\rho\,\omega^{\!\top}\omega .$$
#
# All it needs to know of the gradients is the Gramian $G$. For two of them and $\rho=0$ the answer is a line of algebra:
# $\omega_1=(g_2\!\cdot\!g_2-g_1\!\cdot\!g_2)/\|g_1-g_2\|^2$, if that lies between 0 and 1.

# %%
g = torch.tensor(
    [[3.0, 0.5], [-0.6, 0.8]], dtype=torch.float64
)  # long and short, more than a right angle apart
gramian = g @ g.T
closed = (gramian[1, 1] - gramian[0, 1]) / ((g[0] - g[1]) ** 2).sum()

weighting = make_weighting("ugd", schedule, bins=2, regularization=0.0)
weighting.observe_gramian(gramian)
descend(weighting, torch.ones(2), torch.tensor([0, 999]), 1000)
u = weighting.beta.softmax(0).detach().double()
torch.testing.assert_close(u[0], closed, rtol=1e-3, atol=0, msg="UGD must find the shortest vector")
torch.testing.assert_close(
    pareto.min_norm_weights(gramian)[0], closed, msg="so must the exact solver"
)
assert (gramian @ u > 0).all() and (gramian.sum(1) < 0).any(), (
    "this step must help both bins; the plain sum must not"
)
print(f"shares {u[0]:.3f} and {u[1]:.3f}: the shorter gradient gets more; closed form {closed:.3f}")

balance = make_weighting("loss-balance", schedule, bins=1000, normalize=False)
balance(floor, every)
torch.testing.assert_close(
    balance.weights() * floor / floor.mean(), torch.ones(1000), msg="must be 1 / L"
)

# %% [markdown]
# ## 7 · How much do learned weights fluctuate?
#
# Learned weights have a reputation for being unstable, so we count. Two things make a weight vary during training: it travels, because
# its fixed point is far away and moves as the network improves; and it shakes, because losses are noisy. We take the
# **coefficient of variation over the second half of training** (standard deviation over mean, median over timesteps), once of
# the weight itself and once of the weight divided by its own exponential trend. A third column asks how far apart different *seeds*
# end.
#
# Two arms calibrate the scale. *Predefined* weights (equal ones, `const-eps`) must score 0. *Random* weights, drawn anew at every step (the same
# sequence in every run), are the null: they shake by about 100 %. How much, in per cent, does uncertainty
# weighting with 20 bins shake around its trend?

# %%
QUESTION_SHAKE = "Uncertainty weighting, 20 bins: shaking around the trend, in per cent?"
predict(QUESTION_SHAKE, 20.0)

# %%
ARMS = {
    "predefined": ("const-eps", {}),
    "dy-sigma": ("dy-sigma", {}),
    "loss-balance": ("loss-balance", {}),
    "uncertainty": ("uncertainty", {}),
    "uncertainty, lr 0.1": ("uncertainty", {"weighting_lr": 0.1}),
    "uncertainty, 1000 bins": ("uncertainty", {"bins": 1000}),
    "ugd": ("ugd", {}),
    "random": ("random", {}),
}
seeds, runs = range(fast(5, 2)), {}
for arm, (name, params) in ARMS.items():
    runs[arm] = [train(name, seed, **params) for seed in seeds]
    print(arm, end=", ", flush=True)


# %%
def without_trend(weights):
    """Weights (R, T), each divided by the exponential that fits it best."""
    logs, time = (
        weights.double().log(),
        torch.linspace(-1, 1, len(weights), dtype=torch.float64)[:, None],
    )
    return torch.exp(logs - time * (time * logs).sum(0) / (time**2).sum())


cv = {}
for arm in ARMS:
    half = [weights[len(weights) // 2 :] for weights, _ in runs[arm]]
    sets = {
        "over time": half,
        "around trend": map(without_trend, half),
        "between seeds": [torch.stack(half)[:, -1]],
    }
    cv[arm] = {
        column: [float(fluctuation(w).median()) for w in each] for column, each in sets.items()
    }
print(
    f"{'coefficient of variation':24s}{'over time':>18s}{'around its trend':>20s}{'between seeds':>16s}"
)
for arm, columns in cv.items():
    over, around = (
        "{:9.1%} ± {:5.1%}".format(*plots.t_interval(columns[c]))
        for c in ("over time", "around trend")
    )
    print(f"{arm:24s}{over:>18s}{around:>20s}{columns['between seeds'][0]:16.1%}")
assert max(map(max, cv["predefined"].values())) == 0, "predefined weights must not fluctuate"
assert all(max(c["around trend"]) < 0.5 for arm, c in cv.items() if arm != "random"), (
    "the null must shake most"
)
reveal(QUESTION_SHAKE, 100 * float(np.mean(cv["uncertainty"]["around trend"])))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.4), width_ratios=(1, 1.15))
for i, arm in enumerate(["random", "predefined", "dy-sigma", "uncertainty", "ugd"]):
    one, colour = runs[arm][0][0][:, 900], "0.7" if i == 0 else f"C{i}"
    left.plot(10 * np.arange(len(one)), one, label=arm, color=colour, linestyle=plots.DASHES[i])
left.set(
    yscale="log",
    ylim=(None, 60),
    xlabel="training step",
    ylabel="weight at t = 900",
    title="One weight, one run",
)
left.legend()
for row, column in enumerate(cv["ugd"]):
    mean, half = np.array(
        [
            plots.t_interval(c[column]) if len(c[column]) > 1 else (c[column][0], 0)
            for c in cv.values()
        ]
    ).T
    at, bars = np.arange(len(ARMS)) + 0.22 * (row - 1), np.minimum(half, 0.9 * mean)
    right.errorbar(mean, at, xerr=bars, fmt="os^"[row], color=f"C{row}", capsize=3, label=column)
right.set_xscale("symlog", linthresh=1e-3)
right.set(
    xlim=(-5e-4, 3),
    ylim=(7.6, -0.6),
    xlabel="coefficient of variation",
    title="Second half of training",
)
right.set_yticks(range(len(ARMS)), labels=list(ARMS))
right.legend(loc=(0.03, 0.3), fontsize=8)
plots.show(
    fig,
    "05_fluctuation",
    title="Learned weights travel more than they shake",
    caption="Around their trend, learned weights fluctuate by a few per cent, far below the random null. Most of their variation is travel, which Dy-Sigma's anchor ends early. UGD is the one whose final weights depend on the seed most. Bars: 95 %.",
    alt="Left: weight at timestep 900 against training step; random weights jump over two decades, uncertainty rises steadily, Dy-Sigma rises and settles, UGD dips and returns. Right: coefficients of variation of eight weightings on a logarithmic axis, from exactly 0 for predefined weights to about 1 for random ones.",
    notebook=NOTEBOOK,
)
travel = np.mean(cv["uncertainty"]["over time"])
assert travel > 3 * np.mean(cv["uncertainty"]["around trend"]), (
    "uncertainty must travel more than it shakes"
)
assert np.mean(cv["dy-sigma"]["over time"]) < fast(travel / 3, 1), (
    "the anchor must end the travel (of a full run)"
)

# %% [markdown]
# Read the table line by line.
#
# - **Uncertainty** weighting at the usual learning rate still travels when training ends. At ten times the rate it has arrived, and
#   now shaking is all there is, about twice as much. One $s$ per timestep shakes more than 20 bins, though less than $\sqrt{50}$
#   times more: that factor belongs to gradient descent, and Adam's bounded steps damp rarely seen timesteps.
# - **UGD** looks at the gradients every 50 steps only and shakes no more than the others, but where it ends differs from seed to seed.
#   Gramians from a few samples are noisy; Min-SNR's authors name this as UGD's weakness.
# - **Dy-Sigma** (notebook 06; its start is Min-SNR) is held near a predefined weighting. It varies least of all that learn.
#
# ## 8 · A failure on purpose: the fixed point itself
#
# Now the losses. A network that predicts noise is easy to satisfy at high noise; uncertainty weighting rewards that
# with weight, which lowers the loss there, which earns more weight. Section 3 says where this ends: at $1/L^\star$, close to
# constant weight on $x_0$. We compare with equal weights (`const-eps`), paired by seed, on held-out images.

# %%
HERE = ["uncertainty", "uncertainty, lr 0.1", "loss-balance"]


def ratio(arm, baseline, timesteps=slice(None)):
    """(S, ...) held-out loss over that of the baseline with the same seed."""
    return torch.stack(
        [(a / b)[timesteps] for (_, a), (_, b) in zip(runs[arm], runs[baseline], strict=True)]
    )


fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
final = {f"{arm}, learned": torch.stack([w[-1] for w, _ in runs[arm]]) for arm in HERE[:2]}
final |= {
    "1 / L* of a perfect network": perfect,
    "const-x0": make_weighting("const-x0", schedule).weights(),
}
plots.trajectories(left, schedule.log_snr, final, log=True)
left.set(xlabel="log-SNR (noisy → clean)", ylabel="weight", title="Where the weight goes")
plots.loss_by_timestep(right, shown, {arm: ratio(arm, "predefined") for arm in HERE})
right.axhline(1, color="0.3", linewidth=1)
right.set(ylabel="held-out loss, relative to equal weights", title="What it does to the losses")
plots.show(
    fig,
    "05_taken_over",
    title="With an epsilon network, uncertainty weighting turns into Const-x0 at high noise",
    caption="Once it has arrived (learning rate 0.1; loss-balance, same fixed point), losses at high noise are a tiny fraction of those with equal weights, and losses on the cleaner timesteps are over 1.5 times as high. Bands: 95 % over seeds.",
    alt="Left: weights against log-SNR; the learned curves fall from left to right along the lines of 1 / L* and const-x0. Right: ratio of losses to equal weights against timestep; two arms start above 1.5 at clean timesteps and fall to about 0.01 at noisy ones, the slower one stays just below 1 at the clean end.",
    notebook=NOTEBOOK,
)

# %%
runs["x0 network, equal weights"] = [train("const-x0", seed, "sample") for seed in seeds]
runs["x0 network, uncertainty, lr 0.1"] = [
    train("uncertainty", seed, "sample", weighting_lr=0.1) for seed in seeds
]
parts = {"clean fifth": slice(0, 8), "middle fifth": slice(16, 24), "noisy fifth": slice(32, 40)}
print(f"{'loss relative to equal weights':34s}" + "".join(f"{part:>18s}" for part in parts))
for arm in [*HERE, "x0 network, uncertainty, lr 0.1"]:
    baseline = "x0 network, equal weights" if "x0" in arm else "predefined"
    logs = [
        plots.t_interval(ratio(arm, baseline, part).log().mean(1).numpy())
        for part in parts.values()
    ]
    print(
        f"{arm:34s}"
        + "".join(f"{math.exp(mean):10.3f} ×/÷ {math.exp(half):.2f}" for mean, half in logs)
    )

share = {
    arm: float(np.mean([w[-1, 900:].sum() / w[-1].sum() for w, _ in runs[arm]])) for arm in HERE
}
print(
    "on the noisiest tenth:",
    ", ".join(f"{arm} {value:.0%}" for arm, value in share.items()),
    "of the weight",
)
assert min(share.values()) > fast(0.2, 0.1), "the noisiest tenth must gain weight"
arrived = ratio("uncertainty, lr 0.1", "predefined", parts["clean fifth"]).log().mean(1)
assert (arrived > 0).all(), "at the fixed point, every seed must lose on the clean fifth"

# %% [markdown]
# The same formula helps at one learning rate and harms at another: while $s$ still travels, the weights are a mild preference
# for noise; at the fixed point they are a takeover, and the cleaner timesteps, which decide about detail, pay for it. For a network
# that predicts $x_0$ the fixed point is the same curve. But there, equal weights already are Const-x0: all that learning
# adds is weight at the clean end, and it helps (last line of the table). What a strategy does depends first of all on
# the target of the network.
#
# Whether a shift of losses from one end to the other is good for *samples* is another question (notebook [12](12_the_convergence_race.ipynb)). What we can say
# is that uncertainty weighting has no term that stops it. Notebook 06 adds one.
#
# **Try it yourself.** Set `weighting_lr` to 0.3 and predict both columns of section 7 first. Give `"uncertainty"` a clamp
# (`clamp=2.0`) and see the takeover stop. Replace the network's `x_t +` by `0 * x_t +`: it can no longer pass its input through, and its
# losses at high noise no longer fall so low. What do the weights do?

# %% [markdown]
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **5.1** (●○○, 4 min) A milder rule uses $w_t=e^{-\beta s_t}$ on the network's loss while $s$ is trained as before. Compute its weights
# at the fixed point for $\beta=\frac12$ and the losses `floor`, with mean 1.
#
# <details><summary>Hint</summary>
#
# $s$ does not know about $\beta$: its fixed point is still $\ln L_t$. Insert it, then divide by the mean.
#
# </details>

# %%
exercise(
    "5.1",
    expected=floor**-0.5 / (floor**-0.5).mean(),
    mistakes={
        "That is the full weight, 1 / L: apply beta.": perfect,
        "The sign: a large loss must get the smaller weight.": floor**0.5 / (floor**0.5).mean(),
    },
)
half_way = ...  # (1000,) from floor
check("5.1", half_way)

# %% [markdown]
# **5.2** (●●○, 6 min) Batches of 128, per-sample losses with coefficient of variation $c=1$, gradient descent with $\eta=0.05$ on
# $\tfrac12(Le^{-s}+s)$. How many equal bins can you afford at most if no weight may fluctuate by more than 5 %?
#
# <details><summary>Hint</summary>
#
# With $K$ bins, each sees $n=128/K$ samples per step. Put that into $c\sqrt{\eta/(4n)}\le0.05$, solve for $K$, round down.
#
# </details>

# %%
exercise(
    "5.2",
    expected=25,
    mistakes={
        "The 4 of the formula is missing.": 6,
        "The 4 belongs below the fraction bar: lr / (4 n).": 1,
    },
)
most_bins = ...  # a whole number
check("5.2", most_bins)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
half_way = floor**-0.5 / (floor**-0.5).mean()
check("5.1", half_way)
print(
    f"effective sample size: {effective_sample_size(half_way):.2f}, full weight {effective_sample_size(perfect):.2f}"
)

# %% tags=["solution"]
most_bins = int(4 * 128 * 0.05**2 / 0.05)  # sqrt(lr K / (4 * 128)) <= 0.05
check("5.2", most_bins)
simulated = plots.t_interval([simulated_cv(1.0, 0.05, 128 / most_bins, seed) for seed in range(5)])
print("simulated with that many bins: {:.2%} ± {:.2%}".format(*simulated))

# %% [markdown]
# ## What you can now do
#
# - Write down where a learnable weighting will end, from the losses alone, and check that it did.
# - Choose the learning rate and the number of bins of $s$ from two formulas, and report both.
# - Tell travel from shaking in a weight trajectory, with a control at 0 and a null at 100 %.
# - Recognise the takeover: look at the share of the noisiest timesteps before you look at the loss.
#
# ## Limitations
#
# - One small network, one data set, a few hundred steps. The formulas carry over; the percentages do not.
# - Losses on held-out images say nothing about samples; the geometric mean over timesteps is not a measure of quality.
# - Our UGD is a practical version of the published idea: ten bins, a running mean of Gramians, an update every 50 steps. Min-SNR's authors
#   released no code for theirs.
#
# ## References
#
# - Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics*, 2018,
#   [arXiv:1705.07115](https://arxiv.org/abs/1705.07115): the likelihood of section 3.
# - Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, *Analyzing and Improving the Training Dynamics of Diffusion Models*, 2024,
#   [arXiv:2312.02696](https://arxiv.org/abs/2312.02696): EDM2, uncertainty weighting as a function of the noise level, on top of EDM's weights.
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo, *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): UGD, and why its weights are noisy.
# - Go, Kim, Lee, Lee, Oh, Moon, Choi, *Addressing Negative Transfer in Diffusion Models*, 2023,
#   [arXiv:2306.00354](https://arxiv.org/abs/2306.00354): ANT, uncertainty weighting on a few clusters of timesteps.
# - Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*, 2012,
#   [doi:10.1016/j.crma.2012.03.014](https://doi.org/10.1016/j.crma.2012.03.014): the shortest vector in the hull of the gradients.
# - Lin, Ye, Zhang, Tsang, *Reasonable Effectiveness of Random Weighting*, 2022,
#   [arXiv:2111.10603](https://arxiv.org/abs/2111.10603): random weights as the baseline every learned weighting should meet.
#
# **Next:** [06, Dy-Sigma derived](06_dy_sigma_derived.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
