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
# # 04 · Weightings in the wild
#
# > **Claim.** The name of a loss weighting is a claim that can be checked in one call. We check six
# > formulas of widely used trainers against the weighting that their option is named after.
#
# **You will be able to**
#
# - compare a loss weight of any trainer with its claim, and read the answer;
# - say why a weight for a network that predicts $v$ must vanish at high noise if the claim is Min-SNR, P2 or debiased;
# - say what a wrong weight does to a trained network, and what one cannot say;
# - tell a mistake from a choice that is contested.
#
# **You need** [03](03_snr_weightings.ipynb): one weighting has a different formula for each target of the network.
#
# **Time** reading 25 min · running about 25 s (short run 20 s) on one CPU core · memory under 1 GB.
#
# **Functions introduced** `dysigma.audit`, `dysigma.exact.field_variances`.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display

import dysigma
from dysigma import NoiseSchedule
from dysigma.course.lesson import Lesson
from dysigma.exact import LinearDenoiser, field_variances
from dysigma.schedule import make_schedule

lesson = Lesson("04_weightings_in_the_wild")

# %% [markdown]
# ## One parenthesis
#
# Min-SNR (Hang et al. 2023) multiplies the squared error of $x_0$ by $\min(S,5)$, where $S$ is the signal-to-noise
# ratio. A network that predicts $v$ has an error that is $S+1$ times larger. Its weight must be divided by the same
# factor:
#
# $$w^v=\frac{\min(S,5)}{S+1}.$$
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $S,\ \lambda$ | `snr`, `log_snr` | `(T,)` | signal-to-noise ratio and its natural logarithm |
# | $w^x, w^\epsilon, w^v$ | | `(T,)` | weight on the squared error of $x_0$, of the noise, of $v$ |
# | $\gamma$ | `GAMMA` | number | the SNR above which Min-SNR stops to grow, here 5 |
#
# In August 2026 five training scripts of [diffusers](https://github.com/huggingface/diffusers/tree/58eb52c/examples)
# took another formula when Min-SNR was switched on for $v$-prediction: $\min(S,5)/S+1$. They add the 1 to the fraction,
# and not to its denominator. As functions:

# %%
GAMMA = 5
SCHEDULE = "scaled-linear"  # Stable Diffusion's
is_default = GAMMA == 5 and SCHEDULE == "scaled-linear"


def claimed(snr):
    return snr.clamp(max=GAMMA) / (snr + 1)


def used(snr):
    return snr.clamp(max=GAMMA) / snr + 1


# %% [markdown]
# We compare them on the noise schedule of Stable Diffusion, with 1000 timesteps. Only the shape counts: the learning
# rate absorbs a factor. So both are divided by their mean. The distance is the **share of the total weight that sits
# elsewhere**: how much weight would have to move to turn the first curve into the second (the *total variation*).
#
# Guess it before you look. 0 means that the two are the same up to a factor, 1 that they have nothing in common.

# %%
QUESTION_SHARE = "Share of the total weight that sits elsewhere (0 to 1)?"
lesson.predict(QUESTION_SHARE, None)

# %%
schedule = make_schedule(SCHEDULE)
snr = schedule.log_snr.exp()

weight_claimed = claimed(snr) / claimed(snr).mean()
weight_used = used(snr) / used(snr).mean()
elsewhere = (weight_used - weight_claimed).abs().mean() / 2

lesson.reveal(QUESTION_SHARE, float(elsewhere))

# %%
timesteps = torch.arange(1000)

fig, ax = plt.subplots(figsize=(7.5, 3.8))
too_much = weight_used > weight_claimed
ax.fill_between(
    timesteps, weight_claimed, weight_used, where=too_much, color="C3", alpha=0.2
)
ax.plot(timesteps, weight_claimed, color="C0", linewidth=2)
ax.plot(timesteps, weight_used, color="C3", linewidth=2)
ax.axhline(1, color="0.4", linewidth=1, linestyle=":")
ax.text(335, 2.0, "claimed: Min-SNR", color="C0")
ax.text(700, 1.12, "used: min(S, 5)/S + 1", color="C3")
ax.text(185, 0.82, "plain v loss (dotted)", color="0.3")
ax.text(
    660, 0.62, f"{elsewhere:.0%} of the weight sits\nwhere it should not", color="C3"
)
ax.set(
    xlabel="timestep (clean → noisy)", ylabel="weight on the error of v", ylim=(0, None)
)
lesson.show(
    fig,
    "04_used_and_claimed",
    title="The option says Min-SNR; the weight is nearly flat",
    caption="Weights on the error of v, of mean 1. Min-SNR has its peak at SNR 5 and gives "
    "little to either end. What was used hardly differs from the dotted line. Shaded: too much weight.",
    alt="Two curves against the timestep. The claimed one rises from zero to above two and falls back to zero. The one "
    "that was used is nearly constant, close to the dotted line at one.",
)

# %% [markdown]
# You should see that the used weight is close to the dotted line. That line is the plain $v$ loss, with no weighting. A
# user who switched Min-SNR on in these scripts trained almost as if it were off. How close is it?

# %%
from_plain = (weight_used - 1).abs().mean() / 2
claim_from_plain = (weight_claimed - 1).abs().mean() / 2
display(
    Markdown(
        f"From the plain $v$ loss, the used weight differs by **{from_plain:.1%}** of the total "
        f"weight, and the claimed one by {claim_from_plain:.0%}."
    )
)
if is_default:
    assert from_plain < 0.1 * claim_from_plain, (
        "the weight that is used must be nearly flat"
    )

# %% [markdown]
# ## One call that answers
#
# `dysigma.audit` makes this comparison for any function of the SNR. It is told the target of the network and the name
# that the weight claims. Read its answer line by line.

# %%
of_used = dysigma.audit(
    used, schedule, "v_prediction", claims="min-snr", params={"gamma": GAMMA}
)
print(of_used)

# %% [markdown]
# - **The likely mistake** comes from trying a list of slips in the claimed formula: the formula of another target, a 1
#   in the wrong place, max for min, a missing square root, and so on.
# - **More than 10 % off** counts timesteps, after the median ratio of the two weights has been taken out. A factor is no
#   mistake.
# - **What it really is** names the nearest of all named weightings, with fitted parameters, for any target.
# - **As SNR goes to 0** the weight stays at 2. That line will matter most.

# %%
assert abs(of_used.total_variation - float(elsewhere)) < 1e-9, (
    "the audit must agree with us"
)
assert not of_used.agrees and "1 is added" in of_used.diagnosis, (
    "the slip must be named"
)

# %% [markdown]
# ## The census
#
# We read the loss weights of widely used trainers in public copies of August 2026. Here are the formulas that they use
# for $v$-prediction, and the name of the option that turns them on. The formulas are facts about the projects; the
# functions below are ours.


# %%
def diffusers_scripts(snr):
    return snr.clamp(max=GAMMA) / snr + 1


def diffusers_pixart(snr):
    return (snr + 1).clamp(max=GAMMA) / (snr + 1)


def ai_toolkit(snr):
    return snr.clamp(max=GAMMA) / snr


def onetrainer_p2(snr):
    return 1 / (2 + snr)


def onetrainer_debiased(snr):
    return 1 / (1 + snr).sqrt()


def sd_scripts_debiased(snr):
    return 1 / (1 + snr)


# %%
CENSUS = pd.DataFrame(
    [
        ["diffusers, 5 scripts", diffusers_scripts, "min(S, 5)/S + 1", "min-snr"],
        ["diffusers, pixart", diffusers_pixart, "min(S+1, 5)/(S+1)", "min-snr"],
        ["ai-toolkit", ai_toolkit, "min(S, 5)/S", "min-snr"],
        ["OneTrainer, P2", onetrainer_p2, "1/(2+S)", "p2"],
        ["OneTrainer, debiased", onetrainer_debiased, "1/√(1+S)", "debiased"],
        ["sd-scripts, debiased", sd_scripts_debiased, "1/(1+S)", "debiased"],
    ],
    columns=["trainer", "function", "weight on the v error", "claims"],
).set_index("trainer")
PARAMS = {"min-snr": {"gamma": GAMMA}, "p2": {}, "debiased": {}}

# %% [markdown]
# Before the audit, one more guess. At the noisiest timestep, where sampling starts, how many times too large is the
# weight of the worst of the six? Compare the formulas as they stand, without dividing by their means.

# %%
QUESTION_NOISIEST = "Worst ratio of used to claimed weight at the noisiest timestep?"
lesson.predict(QUESTION_NOISIEST, None)

# %%
audits = {}
for trainer, row in CENSUS.iterrows():
    audits[trainer] = dysigma.audit(
        row.function,
        schedule,
        "v_prediction",
        claims=row.claims,
        params=PARAMS[row.claims],
    )

results = CENSUS.drop(columns="function")
for trainer, found in audits.items():
    results.loc[trainer, "timesteps off"] = f"{found.off:.0%}"
    results.loc[trainer, "weight elsewhere"] = f"{found.total_variation:.3f}"
    # The audit takes the median ratio out; `factor` puts it back.
    ratio = found.ratio_at_noisiest * found.factor
    results.loc[trainer, "ratio at t = 999"] = f"{ratio:.0f}"
    results.loc[trainer, "right formula"] = found.right_formula

lesson.reveal(QUESTION_NOISIEST, results["ratio at t = 999"].astype(float).max())
lesson.table(
    results,
    caption="Six weights on the v error against their claims, Stable Diffusion's schedule",
    mark=results["weight elsewhere"].astype(float).idxmax(),
)

# %% [markdown]
# For each of them the audit also says what probably happened:

# %%
for trainer, found in audits.items():
    print(f"{trainer:22} {found.diagnosis}")

# %%
# The census as it was first counted, by other code.
COUNTED = {
    "diffusers, 5 scripts": (0.389, 429),
    "diffusers, pixart": (0.409, 215),
    "ai-toolkit": (0.403, 215),
    "OneTrainer, P2": (0.398, 108),
    "OneTrainer, debiased": (0.274, 15),
    "sd-scripts, debiased": (0.362, 15),
}
for trainer, (variation, ratio) in COUNTED.items():
    found = audits[trainer]
    same_variation = abs(found.total_variation - variation) < 0.02
    same_ratio = abs(found.ratio_at_noisiest * found.factor / ratio - 1) < 0.05
    if is_default:
        assert same_variation and same_ratio, (
            f"{trainer} must come out as it was counted"
        )

# %% [markdown]
# ## All six err in the same direction
#
# Divide each used weight by the claimed one and look along the schedule. What is above the line at 1 has too much weight.

# %%
LABEL_HEIGHT = {
    "diffusers, 5 scripts": 48,
    "diffusers, pixart": 100,
    "ai-toolkit": 70,
    "OneTrainer, P2": 32,
    "OneTrainer, debiased": 5.6,
    "sd-scripts, debiased": 8.4,
}

fig, ax = plt.subplots(figsize=(8.5, 4.2))
for number, (trainer, found) in enumerate(audits.items()):
    ratio = found.weights / found.reference
    colour = f"C{number}"
    ax.plot(timesteps, ratio, color=colour, linewidth=1.8)
    ax.text(1012, LABEL_HEIGHT[trainer], trainer, color=colour, va="center", fontsize=9)
ax.axhline(1, color="0.3", linewidth=1)
ax.text(190, 1.15, "as claimed", color="0.3", fontsize=9)
ax.set(
    xlabel="timestep (clean → noisy)",
    ylabel="used / claimed weight, both of mean 1",
    yscale="log",
    xlim=(0, 1000),
    ylim=(0.01, 150),
)
lesson.show(
    fig,
    "04_ratios",
    title="All six give the noisiest timesteps too much weight",
    caption="Ratio of the used to the claimed weight of each row of the table. All are far above 1 at the noisy "
    "end, and below it over much of the rest. The three Min-SNR rows nearly coincide in the noisy half.",
    alt="Six curves of the ratio of weights against the timestep, logarithmic. All lie below one around timestep 300 and "
    "rise steeply to between six and seventy at the noisiest timestep.",
)

# %%
noisiest_ratios = []
for found in audits.values():
    noisiest_ratios.append(float(found.weights[-1] / found.reference[-1]))
if is_default:
    assert min(noisiest_ratios) > 5 and max(noisiest_ratios) < 100, (
        "each must have several times too much weight at the noisy end"
    )

# %% [markdown]
# Why the same direction? Look at what happens when the SNR $S$ goes to 0. The claimed weight on $x_0$ goes to 0 there:
# Min-SNR and P2 like $S$, debiased like $\sqrt S$. On $v$ it is divided by $S+1$, which goes to 1. So **the right weight
# on $v$ vanishes at high noise.** All six formulas tend to a constant instead. The audit prints both limits.

# %%
for trainer, found in audits.items():
    print(f"{trainer:22} as S goes to 0: {found.at_zero_snr}")
    assert "constant" in found.at_zero_snr, (
        "each wrong weight must stay finite at S = 0"
    )

right = dysigma.audit(
    claimed, schedule, "v_prediction", claims="min-snr", params={"gamma": GAMMA}
)
print(f"{'right Min-SNR':22} as S goes to 0: {right.at_zero_snr}")
assert "SNR^1" in right.at_zero_snr, "the right weight must vanish like S"

# %% [markdown]
# The first formula has a second place with too much weight, at the very clean end: the blue curve rises there. Its added 1
# stays when $S$ is large, and the right weight $5/(S+1)$ vanishes. These are few timesteps.
#
# A weight that is near 1 everywhere looks healthy, and one that vanishes looks like a bug. That may be one reason why
# such a formula is not noticed for years. The history of the first one is public. The 1 came in September 2023. It was
# reported as wrong in [issue 5654](https://github.com/huggingface/diffusers/issues/5654) and corrected by
# [pull request 6307](https://github.com/huggingface/diffusers/pull/6307) in December 2023, and once more by
# [pull request 8466](https://github.com/huggingface/diffusers/pull/8466) in 2024. Of the 23 example scripts that had Min-SNR in
# August 2026, 17 were right, five still added the 1, and one had the second form of the table.
#
# ## Four right ones, no false alarm
#
# A test that raises an alarm every time is worth nothing. OneTrainer, sd-scripts, unsloth and SimpleTuner compute
# Min-SNR for $v$ correctly. A right weight can be written in many ways. Here are four, one in single precision, one
# three times too large.


# %%
def in_two_steps(snr):
    weight_on_noise = snr.clamp(max=GAMMA) / snr
    return weight_on_noise * snr / (snr + 1)


def in_single_precision(snr):
    return claimed(snr.float())


def three_times_too_large(snr):
    return 3 * torch.minimum(snr, torch.full_like(snr, GAMMA)) / (1 + snr)


# %%
for function in (claimed, in_two_steps, in_single_precision, three_times_too_large):
    answer = dysigma.audit(
        function, schedule, "v_prediction", claims="min-snr", params={"gamma": GAMMA}
    )
    print(
        f"{function.__name__:22} agrees: {answer.agrees}, "
        f"weight elsewhere: {answer.total_variation:.1e}"
    )
    assert answer.agrees and answer.total_variation < 1e-6, "no false alarm is allowed"

# %% [markdown]
# ## What the numbers rest on: the measure
#
# All weights on this page multiply the loss of a timestep that is **drawn uniformly**. Theory often weighs per unit of
# log-SNR $\lambda$ instead: an integral over $\mathrm d\lambda$. The two differ by the slope of the schedule:
#
# $$\int w(\lambda)\,L(\lambda)\,\mathrm d\lambda=\int w(\lambda_t)\,\Big|\frac{\mathrm d\lambda}{\mathrm dt}\Big|\,L(\lambda_t)\,\mathrm dt .$$
#
# Kingma and Gao (2023) state their sigmoid weighting per $\mathrm d\lambda$. What if a trainer uses the same formula per
# timestep?

# %%
log_snr = schedule.log_snr
slope = torch.gradient(log_snr)[0].abs()  # |dλ/dt|
per_log_snr = (
    torch.sigmoid(2 - log_snr) * slope
)  # on the noise error, as the paper means it


def as_the_paper_means_it(timesteps):
    return per_log_snr[timesteps]


measure = dysigma.audit(
    as_the_paper_means_it,
    schedule,
    "epsilon",
    claims="sigmoid",  # the same formula per timestep, as the package defines it
    params={"bias": 2},
    as_="timesteps",
)
display(
    Markdown(
        f"The same sigmoid in the two measures: **{measure.total_variation:.0%}** of the weight sits "
        f"elsewhere. The slope is {float(slope[0] / slope.median()):.0f} times its median at the "
        f"cleanest timestep."
    )
)
if is_default:
    assert 0.05 < measure.total_variation < 0.2, (
        "the measure must matter, less than the mistakes"
    )

# %% [markdown]
# That is less than in any row of the census, and enough to make two tables of weights incomparable. So a weight needs
# three things beside its formula: the target of the network, the measure, and the density that the timesteps are drawn
# from. The density is a weight too: `dysigma show` draws it, the weight, and their product.
#
# ## What a mistake does to a trained network
#
# So far we have compared weights. To see the network, take one whose training can be solved exactly, the linear
# denoiser of [03](03_snr_weightings.ipynb). It predicts the noise in each Fourier mode of Gaussian images as a
# coefficient times the noisy input. The images have the spectrum of photographs, $1/f^2$. The coefficients of all
# timesteps are a polynomial of the log-SNR with `degree` terms: with one term, all timesteps share one coefficient.
#
# A weight on the $v$ error becomes a weight on the noise error, $w^\epsilon=w^v\,(S+1)/S$. Then the minimiser of the
# weighted loss is a linear solve, and its loss at each timestep is known, as is the floor that no network can beat.

# %%
variances = field_variances(8, std=0.5).flatten()


def train_exactly(weight_on_v, degree, schedule=schedule):
    snr = schedule.log_snr.exp()
    weight_on_noise = weight_on_v(snr) * (snr + 1) / snr
    denoiser = LinearDenoiser(schedule, variances, degree=degree)
    theta = denoiser.minimiser(weight_on_noise / weight_on_noise.mean())
    return denoiser, theta


def excess_loss(weight_on_v, degree, schedule=schedule):
    denoiser, theta = train_exactly(weight_on_v, degree, schedule)
    return denoiser.losses(theta) - denoiser.irreducible()


def plain(snr):
    return torch.ones_like(snr)


# %%
DEGREE = 1

curves = {
    "as claimed": excess_loss(claimed, DEGREE),
    "as used": excess_loss(used, DEGREE),
    "plain v loss": excess_loss(plain, DEGREE),
}

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.8))
ax.plot(timesteps, curves["plain v loss"], color="0.6", linewidth=5)
ax.plot(timesteps, curves["as used"], color="C3", linewidth=1.6)
ax.plot(timesteps, curves["as claimed"], color="C0", linewidth=2)
ax.text(210, 0.17, "trained as used (thin), on the plain v loss (grey)", color="C3")
ax.text(60, 0.018, "trained as claimed", color="C0")
ax.set(
    xlabel="timestep (clean → noisy)",
    ylabel="noise loss above the floor",
    yscale="log",
    ylim=(2e-6, 0.6),
)
lesson.show(
    fig,
    "04_trained",
    title="The mistake trains the network of the plain v loss",
    caption="Exact minimisers that share one coefficient between all timesteps. The network with the misplaced 1 "
    "nearly coincides with that of the plain v loss: better at high noise than claimed, worse elsewhere.",
    alt="Loss above the floor against the timestep, logarithmic. The curve of the used weight lies on the grey one of "
    "the plain v loss, above the claimed one at clean timesteps and far below it at noisy ones.",
)

# %% [markdown]
# You should see the thin line on the grey one. The used weight trains nearly the same network as no weighting at all. Compared with the
# claim, it is better at the noisy end and worse at the clean end. Here is the ratio of the excess losses, used to
# claimed, for all six rows. Below 1 the mistake made these timesteps *better*.


# %%
def claimed_p2(snr):
    return snr / (snr + 1) ** 2


def claimed_debiased(snr):
    return snr.sqrt() / (snr + 1)


CLAIMED = {"min-snr": claimed, "p2": claimed_p2, "debiased": claimed_debiased}
BANDS = {
    "clean fifth": slice(0, 200),
    "middle fifth": slice(400, 600),
    "noisy fifth": slice(800, 1000),
}

excess_ratios = pd.DataFrame(index=CENSUS.index, columns=list(BANDS), dtype=float)
for trainer, row in CENSUS.iterrows():
    as_used = excess_loss(row.function, DEGREE)
    as_claimed = excess_loss(CLAIMED[row.claims], DEGREE)
    for band, steps in BANDS.items():
        ratio = as_used[steps].mean() / as_claimed[steps].mean()
        excess_ratios.loc[trainer, band] = float(ratio)

lesson.table(
    excess_ratios,
    caption="Excess loss of the network trained as used, over that of the network trained as claimed",
)

# %% [markdown]
# Every mistake makes the noisy fifth better, and the clean and the middle fifth worse. Two controls belong to this. A
# factor on the weight must change nothing. And if the timesteps share nothing, each reaches its own floor, whatever
# the weights are.

# %%
few = NoiseSchedule(schedule.alphas_cumprod[12::25])  # 40 of the levels
alone = excess_loss(used, degree=40, schedule=few)  # as many coefficients as timesteps
right_times_three = excess_loss(three_times_too_large, DEGREE)

print(f"largest excess without sharing: {float(alone.abs().max()):.0e}")
assert float(alone.abs().max()) < 1e-8, "without sharing no weight must matter"
torch.testing.assert_close(right_times_three, curves["as claimed"])
if is_default and DEGREE == 1:
    assert (excess_ratios["noisy fifth"] < 1).all(), "the noisy fifth must gain"
    assert (excess_ratios["clean fifth"] > 1).all(), "and the clean fifth must lose"
    assert (excess_ratios["middle fifth"] > 1).all(), "and the middle one too"

# %% [markdown]
# ## Does a wrong weight give worse samples?
#
# What do the *samples* of these networks look like? For a linear denoiser this is exact too. DDIM multiplies each
# Fourier mode by a number at every step. So the samples are Gaussian again, and we only have to follow the standard
# deviation of each mode from pure noise to the end.


# %%
def std_of_samples(denoiser, theta):
    coefficients = denoiser.features @ theta  # noise prediction = coefficient * x_t
    alphas = schedule.alphas_cumprod.sqrt()
    sigmas = (1 - schedule.alphas_cumprod).sqrt()
    std = torch.ones(len(variances), dtype=torch.float64)
    for t in reversed(range(1000)):
        noise = coefficients[t] * std
        x0 = (std - sigmas[t] * noise) / alphas[t]
        if t == 0:
            return x0.abs()
        std = alphas[t - 1] * x0 + sigmas[t - 1] * noise


def distance_of_samples(weight_on_v, degree):
    denoiser, theta = train_exactly(weight_on_v, degree)
    difference = std_of_samples(denoiser, theta) - variances.sqrt()
    return float(difference.square().sum() / variances.sum())


# %% [markdown]
# The distance is the Fréchet distance between samples and data, over the variance of the data. It is 0 for perfect
# samples. Now give the network a little more capacity, five coefficients per mode. Guess: by which factor does the
# misplaced 1 change the distance? Below 1 the samples get better.

# %%
QUESTION_SAMPLES = "Distance of samples, as used over as claimed (5 coefficients)?"
lesson.predict(QUESTION_SAMPLES, None)

# %%
DEGREES = lesson.fast([1, 2, 3, 4, 5], [2, 5])

samples = pd.DataFrame(index=pd.Index(DEGREES, name="coefficients"))
for label, weight in {"claimed": claimed, "used": used, "plain v loss": plain}.items():
    samples[label] = [distance_of_samples(weight, degree) for degree in samples.index]
samples["used / claimed"] = samples.used / samples.claimed

lesson.reveal(QUESTION_SAMPLES, float(samples["used / claimed"][5]))
lesson.table(samples, caption="Distance of samples to the data, exact", digits=4)

# %% [markdown]
# The answer depends on the capacity of the network. With one coefficient the mistake changes almost nothing. With two
# it makes the samples worse. With three or more it makes them better, and then the plain $v$ loss is better still. So
# **a wrong formula is not a worse formula.** It is a formula with the wrong name. That has a cost of its own. A user
# who compares "Min-SNR" with the plain loss in such a script compares two nearly equal trainings, and will report that
# Min-SNR does not matter.

# %%
ratios = samples["used / claimed"]
if is_default:
    assert ratios[2] > 1 > ratios[5], (
        "the sign of the effect must depend on the capacity"
    )
    assert samples["plain v loss"][5] < samples["used"][5], (
        "and then the plain loss must be best"
    )

# %% [markdown]
# ## Two questions that are not settled
#
# Not every difference is a mistake of arithmetic. In two cases people disagree about what the right formula is.
#
# **First: $v$ at zero terminal SNR.** Lin et al. (2024) change the schedule so that the last timestep has no signal at
# all, $S=0$, because sampling starts from pure noise. The right Min-SNR weight is 0 there: the step with which every
# sample begins is not trained at all.

# %%
zero = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
zero_snr = zero.log_snr.exp()

shares = pd.DataFrame(columns=["weight at S = 0", "share on the noisiest tenth"])
for label, weight in {
    "min(S, 5)/(S+1), faithful": claimed,
    "min(S+1, 5)/(S+1)": diffusers_pixart,
    "1, plain v loss": plain,
}.items():
    on_zero = weight(zero_snr)
    share = float(on_zero[900:].sum() / on_zero.sum())
    shares.loc[label] = [float(on_zero[-1]), f"{share:.2%}"]

lesson.table(shares, caption="Weights on the v error, zero terminal SNR")
assert claimed(zero_snr)[-1] == 0, (
    "the faithful weight must be 0 where there is no signal"
)

# %% [markdown]
# One side says: that is what Min-SNR means on $x_0$, converted. The other side says: the step where sampling starts must
# have some weight. Both positions meet in
# [issue 5 of the authors' repository](https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/issues/5). In diffusers
# the 1 came as an answer to zero terminal SNR, where the formula before it divided by zero
# ([pull request 5096](https://github.com/huggingface/diffusers/pull/5096)), and users still ask
# ([issue 9451](https://github.com/huggingface/diffusers/issues/9451)). A network shares its parameters between timesteps,
# so a step without weight is still trained by its neighbours. We have **not measured** which choice gives better samples.
# The audit can only say that the two differ: with $S=0$ in the schedule it reports an infinite ratio.

# %%
at_zero = dysigma.audit(diffusers_pixart, zero, "v_prediction", claims="min-snr")
print(f"ratio at the noisiest timestep: {at_zero.ratio_at_noisiest}")

# %% [markdown]
# **Second: "debiased" for $v$.** The paper (Yu et al. 2023) weighs the noise error by $1/\sqrt S$. There are three
# answers to what that is for $v$:
#
# | position | weight on the $v$ error | reason |
# |---|---|---|
# | the same objective | $\sqrt S/(S+1)$ | convert the weight, as for any other |
# | OneTrainer | $1/\sqrt{S+1}$ | put $S+1$ in the place of $S$ |
# | sd-scripts | $1/(S+1)$ | [issue 1058](https://github.com/kohya-ss/sd-scripts/issues/1058): the derivation asks for $1/S$ on the noise error, the root only tames its range, and for $v$ the range is small without it |
#
# The third is exactly the plain loss on $x_0$. The audit says so, and that is a fact. Whether it deserves the name is
# a question of what the name means. That is why the audit speaks of a *likely* mistake.

# %%
sd_scripts = audits["sd-scripts, debiased"]
print(sd_scripts.nearest, "off:", sd_scripts.nearest_off)
assert sd_scripts.nearest["name"] == "const-x0", (
    "1 / (S + 1) on v is the plain loss on x0"
)

# %% [markdown]
# ## Audit your own
#
# Put the loss weight of your trainer into a function of the SNR. Then it is one line of Python:
#
# ```python
# print(dysigma.audit(my_weight, schedule, "v_prediction", claims="min-snr", params={"gamma": 5}))
# ```
#
# or one line in a shell, whose exit code is 0 if the weight agrees with its claim and 1 if it does not:
#
# ```
# dysigma audit my_trainer:my_weight --target v_prediction --claims min-snr --params gamma=5
# ```
#
# If your function takes timesteps, sigma or log-SNR, say `as_="timesteps"` (`--as timesteps`). A schedule of diffusers
# comes in by `NoiseSchedule.from_diffusers(scheduler)` (`--scheduler FOLDER`). For other languages there are
# [test vectors](reference/vectors.md).
#
# **Try it yourself.** In the first cell with formulas, take `GAMMA = 1` or `20`, or `SCHEDULE = "cosine"`: which of the
# six rows changes most? In the cell before the third figure, `DEGREE = 2` or `3`: more capacity, less conflict.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks expect; there is no need to read this cell.
soft = dysigma.make_weighting(
    "soft-min-snr", schedule, "v_prediction", normalize=False, gamma=5
)


def mystery(snr):
    return torch.where(snr < 5, 5 / snr, torch.ones_like(snr))


of_mystery = dysigma.audit(mystery, schedule, "epsilon", claims="min-snr")

lesson.exercise(
    "4.1",
    expected=soft.weights(),
    mistakes={
        "That is the weight on the x0 error; convert it to v.": 5 * snr / (snr + 5),
        "That is the weight on the noise error: you divided by S.": 5 / (snr + 5),
        "S + 1 belongs into the conversion only.": 5 / (snr + 6),
    },
)
lesson.exercise(
    "4.2",
    expected="max-snr",
    mistakes={
        "That is what it claims.": "min-snr",
        "Close: it is that one with another parameter, but a simpler name fits.": "truncated-snr",
    },
)
lesson.exercise(
    "4.3",
    expected=of_mystery.total_variation,
    rtol=0.01,
    mistakes={"That is the share of timesteps that are off.": of_mystery.off},
)

# %% [markdown]
# **4.1** (●●○, 5 min) Soft-Min-SNR weighs the $x_0$ error by $\gamma S/(S+\gamma)$. Write it for a network that predicts
# $v$, with $\gamma=5$, as a function of the tensor `snr`, before any division by the mean.
#
# <details><summary>Hint</summary>
#
# By which factor is the error of $v$ larger than that of $x_0$? The weight is divided by it.
#
# </details>

# %%
soft_on_v = ...
lesson.check("4.1", soft_on_v)

# %% [markdown]
# **4.2** (●○○, 3 min) The function `mystery(snr)` is the weight on the *noise* error that a well-known implementation
# used from 2023 to 2026. It claimed to be Min-SNR. Which named weighting is it really? Answer with its name as a string.
#
# <details><summary>Hint</summary>
#
# `dysigma.audit` needs the target, here `"epsilon"`. Look at "what it really is".
#
# </details>

# %%
real_name = ...
lesson.check("4.2", real_name)

# %% [markdown]
# **4.3** (●●○, 5 min) Which share of its total weight sits elsewhere, compared with Min-SNR on the noise error? Compute
# it by hand, as at the top of the page, or read it from an audit.
#
# <details><summary>Hint</summary>
#
# By hand: the right weight is `snr.clamp(max=5) / snr`. Divide both by their means first.
#
# </details>

# %%
share_elsewhere = ...
lesson.check("4.3", share_elsewhere)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
soft_on_v = 5 * snr / (snr + 5) / (snr + 1)
lesson.check("4.1", soft_on_v)

# %% tags=["solution"]
real_name = dysigma.audit(mystery, schedule, "epsilon", claims="min-snr").nearest[
    "name"
]
lesson.check("4.2", real_name)

# %% tags=["solution"]
right_weight = snr.clamp(max=5) / snr
mystery_weight = mystery(snr)
right_share = right_weight / right_weight.sum()
mystery_share = mystery_weight / mystery_weight.sum()
share_elsewhere = (right_share - mystery_share).abs().sum() / 2
lesson.check("4.3", share_elsewhere)

# %% [markdown]
# ## What you can now do
#
# You can check in one line whether a loss weight is what its name says. You know the question to ask of any weight: on
# the error of which target, in which measure, under which density of timesteps? And you know that "wrong" is a statement
# about the name, not about the samples.
#
# ## Limitations
#
# - The projects were read once, in August 2026, in stored public copies. They may have changed since. Links lead to the
#   commits or threads that were read.
# - Formulas are audited, not whole programs. Both debiased implementations also cut the SNR off at 1000. We left that
#   out, as it touches only the cleanest timesteps.
# - The networks of this page are linear, their data are Gaussian, and they are trained to the end. How a mistake
#   changes the *speed* of training, or a real image model, is not measured here.
# - The percentages belong to the schedule of Stable Diffusion. On another one they differ.
#
# ## References
#
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo (2023), *Efficient diffusion training via Min-SNR weighting strategy*,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556).
# - Choi, Lee, Shin, Kim, Kim, Yoon (2022), *Perception prioritized training of diffusion models*,
#   [arXiv:2204.00227](https://arxiv.org/abs/2204.00227): P2.
# - Yu et al. (2023), *Debias the training of diffusion models*, [arXiv:2310.08442](https://arxiv.org/abs/2310.08442).
# - Lin, Liu, Li, Yang (2024), *Common diffusion noise schedules and sample steps are flawed*,
#   [arXiv:2305.08891](https://arxiv.org/abs/2305.08891): zero terminal SNR.
# - Kingma, Gao (2023), *Understanding diffusion objectives as the ELBO with simple data augmentation*,
#   [arXiv:2303.00848](https://arxiv.org/abs/2303.00848): weights per log-SNR.
# - The trainers, at the commits that were read: [diffusers](https://github.com/huggingface/diffusers/tree/58eb52c)
#   (`train_dreambooth_lora_sdxl`, the two advanced LoRA scripts, two of `scheduled_huber_loss_training`; `pixart`),
#   [ai-toolkit](https://github.com/ostris/ai-toolkit/tree/27a03a9),
#   [OneTrainer](https://github.com/Nerogar/OneTrainer/tree/23df383),
#   [sd-scripts](https://github.com/kohya-ss/sd-scripts/tree/48d368f),
#   [SimpleTuner](https://github.com/bghira/SimpleTuner/tree/bc8e6ab),
#   [unsloth](https://github.com/unslothai/unsloth/tree/015bdef).
# - Exercise 4.2: [denoising-diffusion-pytorch, pull request 363](https://github.com/lucidrains/denoising-diffusion-pytorch/pull/363).
#
# **Next:** [05, learnable weightings](05_learnable_weightings.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
