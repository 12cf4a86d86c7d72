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
# # 13 · Reuse: your loop, your data, your weighting
#
# > **Claim.** Three lines put any weighting into a training loop that you already have, and nothing in them depends on the network. What they
# > do depend on is the noise level of each sample and the target of the network. Both are one conversion, and both can be checked in
# > a minute by writing the formula out.
#
# **You will be able to**
#
# - add a weighting to a diffusers loop with accelerate, and check it against the formula;
# - find the SNR of any scheduler, flow matching and EDM included, and convert a weight to any target;
# - write a weighting of your own in a file of a few lines, run the laws on it, and train with it by name;
# - put the same three lines into a text-to-image fine-tuning with low-rank adapters.
#
# **You need** the weightings on one scale ([03](03_snr_weightings.ipynb)) and Dy-Sigma ([06](06_dy_sigma_derived.ipynb)). Dy-Sigma here is our
# reconstruction from the abstract of Liu, Ye, Liu and Qin (IJCNN 2024). The loops use `accelerate`.
#
# **Time** reading 30 min · running about 60 s (short run 20 s) on two CPU cores · memory under 1 GB.
#
# **Functions introduced** `NoiseSchedule.from_diffusers`, `NoiseSchedule.flow`, `weighting.at`, `dysigma.testing.check_weighting`,
# `make_weighting("module:function", …)`, `dysigma.conflicts(…, model_kwargs=…)`.

# %%
import json
import math
import tempfile
from contextlib import chdir
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy import integrate
from torch import nn

import dysigma
from dysigma import plots
from dysigma.course.lessons import banner, check, exercise, fast, predict, reveal, watermark
from dysigma.evaluation import evaluation_timesteps
from dysigma.lab.convergence import images_to_threshold, speedup
from dysigma.testing import check_weighting

NOTEBOOK = "13_your_own_loop"
plots.use_style()
banner(NOTEBOOK)
import diffusers
from accelerate import Accelerator

# %% [markdown]
# ## 1 · A loop that is not ours
#
# Say these are your images: 16 × 16, from one colour on the left to another on the right.


# %%
def ramps(count, seed=0):
    """(count, 3, 16, 16) uint8."""
    left, right = torch.randint(
        256, (2, count, 3, 1, 1), generator=torch.Generator().manual_seed(seed)
    )
    return (left + (right - left) * torch.linspace(0, 1, 16)).expand(-1, -1, 16, -1).to(torch.uint8)


images = ramps(512).float() / 127.5 - 1
print(
    f"{len(images)} images {tuple(images.shape[1:])}, from {images.min():.2f} to {images.max():.2f}"
)

# %% [markdown]
# And this is your loop, in the structure of the example scripts of diffusers: accelerate prepares the network, gradients
# are accumulated and clipped. The three marked lines are new. The weighting is not prepared: on several processes it gathers the losses
# itself, and its state is the same on all.


# %%
def any_ramps(draw):
    return images[torch.randint(len(images), (16,), generator=draw)], {}  # no condition


def loop(model, trainable, batch, name, steps):
    """Train in place; returns the weighting and the mean loss of each step."""
    schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
    weighting = dysigma.make_weighting(name, schedule, scheduler.config.prediction_type)  # 1
    optimizer = torch.optim.AdamW(
        [{"params": trainable, "lr": 2e-3}, *weighting.parameter_groups()]
    )  # 2
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    draw, seen = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        clean, condition = batch(draw)
        noise, timesteps = (
            torch.randn(clean.shape, generator=draw),
            torch.randint(1000, (16,), generator=draw),
        )
        with accelerator.accumulate(model):
            output = model(
                scheduler.add_noise(clean, noise, timesteps), timesteps, **condition
            ).sample
            per_sample_mse = F.mse_loss(output, noise, reduction="none").flatten(1).mean(1)
            accelerator.backward(weighting(per_sample_mse, timesteps))  # 3
            optimizer.step()
            optimizer.zero_grad()
        seen.append(float(per_sample_mse.detach().mean()))
    return weighting, seen


torch.manual_seed(0)
kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
small = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
model, scheduler = diffusers.UNet2DModel(**small, **kinds), diffusers.DDPMScheduler()
weighting, seen = loop(model, list(model.parameters()), any_ramps, "dy-sigma", fast(200, 40))
print(
    f"mean loss of the first ten steps {np.mean(seen[:10]):.2f}, of the last ten {np.mean(seen[-10:]):.2f}"
)
print("dy-sigma's weights at t = 0, 300, 999:", weighting.weights()[[0, 300, 999]].numpy().round(3))

# %% [markdown]
# `weighting(...)` takes one mean squared error per sample, *not reduced over the batch*. If your loss is a sum over pixels, or is averaged
# over the batch already, change that first: this is the commonest mistake, and the shape is checked.
#
# ## 2 · Check it: write the formula out
#
# Do not trust a library with your gradients. With $S=\bar\alpha/(1-\bar\alpha)$ from *their* scheduler, Min-SNR's weight on the $\epsilon$ error is
# $\min(S,5)/S$, here divided by its mean over timesteps. Two gradients of the same network must agree:


# %%
def gradients(model, loss):
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ]
    )


timesteps, noise = torch.tensor([1, 20, 150, 400, 800, 990]), torch.randn(6, 3, 16, 16)
output = model(scheduler.add_noise(images[:6], noise, timesteps), timesteps).sample
losses = F.mse_loss(output, noise, reduction="none").flatten(1).mean(1)

snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
by_hand = snr.clamp(max=5) / snr / (snr.clamp(max=5) / snr).mean()
ours = dysigma.make_weighting("min-snr", dysigma.NoiseSchedule.from_diffusers(scheduler), "epsilon")
mine, theirs = (
    gradients(model, (by_hand[timesteps] * losses).mean()),
    gradients(model, ours(losses, timesteps)),
)
torch.testing.assert_close(
    theirs, mine, rtol=1e-3, atol=1e-6, msg="the three lines must give the formula's gradient"
)
print(f"{len(mine):,} gradients agree; the largest difference is {(mine - theirs).abs().max():.0e}")

# %% [markdown]
# ## 3 · Predict: what does add_noise add?
#
# Most schedulers of diffusers have `add_noise`, and training scripts use it. Take a fresh `DPMSolverMultistepScheduler` and noise an
# image to timestep 0, the cleanest of 1000, where $\sigma=0.01$. What is the standard deviation of the noise that `add_noise` puts there?

# %%
QUESTION = "Noise of add_noise at the cleanest timestep, before the scheduler was told to sample?"
predict(QUESTION, 0.01)

# %%
solver, one, zero = (
    diffusers.DPMSolverMultistepScheduler(),
    torch.ones(1, 1),
    torch.zeros(1, dtype=torch.int64),
)
reveal(QUESTION, round(float(solver.add_noise(0 * one, one, zero)), 4))
ours = float(dysigma.NoiseSchedule.from_diffusers(solver).add_noise(0 * one, one, zero))
assert abs(ours - 0.01) < 1e-3, "the training table must start clean"

# %% [markdown]
# Until `set_timesteps` is called, the sampling levels of that class lie in the opposite order to its timesteps (diffusers 0.42), so an image noised
# for timestep 0 is pure noise. A script trained this way shows finite losses and learns the wrong thing. `NoiseSchedule` reads the
# *training* table, which no call to `set_timesteps` changes, and `schedule.add_noise(clean, noise, timesteps)` uses it.
#
# | your loop | `schedule` | `prediction_type` | noise level of a sample |
# |---|---|---|---|
# | DDPM, DDIM, DPM-Solver, PNDM, … | `from_diffusers(scheduler)` | that of its config | its timestep |
# | Euler type: input $x/\alpha = x_0+\sigma\epsilon$ | `from_diffusers(scheduler)` | that of its config | its timestep |
# | flow matching, $x_t=(1-r)x_0+r\epsilon$ | `from_diffusers(scheduler)` | `flow_prediction` | `at(…, 2 ln((1-r)/r))` |
# | EDM, $x=x_0+\sigma\epsilon$, any $\sigma$ | `NoiseSchedule(log_snr.sigmoid())` | `sample`, for $D$ | `at(…, -2 ln σ)` |
#
# ## 4 · Flow matching and other continuous levels
#
# The network of a rectified flow predicts the velocity $u=\epsilon-x_0$. From $x_t=(1-r)x_0+r\epsilon$ follows $x_0=x_t-ru$, so an error in $u$
# is $r$ times as large in $x_0$; and $S=(1-r)^2/r^2$ gives $r=1/(1+\sqrt S)$. Squared:
#
# $$L^{u}=\frac{L^{x}}{r^2}=(1+\sqrt S)^2\,L^{x}\qquad\text{beside}\qquad L^{\epsilon}=S\,L^{x},\quad L^{v}=(1+S)\,L^{x}.$$
#
# A weight on the $x_0$ error is divided by that factor. In logarithms nothing overflows: $2\,\mathrm{softplus}(\lambda/2)$ for $u$, with $\lambda=\ln S$.
# The check uses one guess of $x_0$ and reads it as a prediction of each target.
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $r$ | `s` | `(B,)` | share of noise in a flow |
# | $\lambda$ | `log_snr` | `(B,)` | natural log of SNR |
# | $L^x, L^u$ | `error_x0`, `error_u` | `(B,)` | squared errors of the same guess |

# %%
flow_scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
flow = dysigma.NoiseSchedule.from_diffusers(flow_scheduler)
index = torch.tensor([100, 400, 700, 900, 990])  # of diffusers, from the noisy end
s = flow_scheduler.sigmas[index]
log_snr = 2 * ((1 - s) / s).log()
torch.testing.assert_close(
    log_snr.double(), flow.log_snr[999 - index], rtol=1e-3, atol=1e-3, msg="levels must agree"
)

clean, eps, guess = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
x_t = (1 - s)[:, None] * clean + s[:, None] * eps
error_x0 = (guess - clean).square().mean(1)
error_u = ((x_t - guess) / s[:, None] - (eps - clean)).square().mean(1)
on_x0, on_u = (
    dysigma.make_weighting("min-snr", flow, kind, normalize=False)
    for kind in ("sample", "flow_prediction")
)
right = on_x0.at(error_x0, log_snr)
torch.testing.assert_close(
    on_u.at(error_u, log_snr), right, rtol=1e-3, atol=1e-6, msg="one objective, two targets"
)
as_v = dysigma.NoiseSchedule(flow.alphas_cumprod)  # negative control: taking u for v
wrong = dysigma.make_weighting("min-snr", as_v, "v_prediction", normalize=False).at(
    error_u, log_snr
)
print(f"min-snr objective: {right:.4f} on x0 and on u; with the conversion of v {wrong:.4f}")

# %% [markdown]
# ### Whose mean is 1?
#
# Weights are scaled to mean 1 *over the timesteps of the schedule*. Flow and EDM training draw their levels from a density of their own, often a
# logit-normal or a log-normal. Make the schedule from the quantiles of that density: then weights have mean 1 over what you draw, and
# the bins of a learned weighting see equally many samples.

# %%
quantiles = torch.special.ndtri(
    (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
)  # of a standard normal
edm_levels = (1.2 * quantiles - 1.2).exp()  # ln sigma ~ N(-1.2, 1.2^2), clean to noisy
edm = dysigma.NoiseSchedule((-2 * edm_levels.log()).sigmoid())
drawn = (1.2 * torch.randn(20_000, generator=torch.Generator().manual_seed(1)) - 1.2).exp()
for label, levels in (
    ("quantiles of the draws", edm),
    ("a linear DDPM schedule", dysigma.NoiseSchedule.linear()),
):
    ones = torch.ones(len(drawn), requires_grad=True)
    dysigma.make_weighting("min-snr", levels, "sample").at(ones, -2 * drawn.log()).backward()
    mean = float(ones.grad.sum())
    print(f"min-snr on {label}: mean weight over the draws {mean:.3f}")
    assert (abs(mean - 1) < 0.02) == (levels is edm), (
        "only quantiles make the mean of the drawn weights 1"
    )

# %% [markdown]
# A factor common to all weights is a learning rate in disguise. At levels between timesteps, `at` computes predefined weights from their
# formula and reads learned ones by interpolation; its docstring says which part is which.

# %% [markdown]
# ## 5 · A weighting of your own
#
# A predefined one is a function of `log_snr` that returns the *log* of the weight on the $x_0$ error. A learned one is a subclass of `Weighting` with
# `weights()` and `update()`; parameters and buffers are its state. This is a user's whole file:

# %%
OWN = """
import torch
from dysigma import Weighting

def gentle(log_snr, *, power=0.5):
    return power * log_snr - torch.nn.functional.softplus(log_snr - 3)  # S^power / (1 + S / e^3)

class Harder(Weighting):  # more where the loss is larger
    def __init__(self, setting, *, bins=20):
        super().__init__(setting, bins)
        self.register_buffer("sums", torch.ones(2, bins))
    def weights(self):
        return self.scaled((self.sums[1] / self.sums[0])[self.bin_index])
    def update(self, losses, timesteps, importance):
        new = torch.stack([importance, importance * losses])
        self.sums.mul_(0.95).index_add_(1, self.bin_index[timesteps], new)

class Forgetful(Harder):
    calls = 0  # a count that no checkpoint sees
    def update(self, losses, timesteps, importance):
        self.calls += 1
        super().update(losses / self.calls, timesteps, importance)
"""
scratch = Path((temporary := tempfile.TemporaryDirectory()).name)
(scratch / "my_weightings.py").write_text(OWN)
with chdir(scratch):  # a module in the working folder is found by name
    check_weighting("my_weightings:gentle")
    check_weighting("my_weightings:Harder", bins=10)
    try:
        check_weighting("my_weightings:Forgetful")
    except AssertionError as broken:
        message = str(broken).split(": ")[0]
print("gentle and Harder keep the laws;", message)
assert "state_dict() is the whole state" in message, "a state outside the buffers must be caught"

# %% [markdown]
# The failure is on purpose, and typical: `Forgetful` trains well until the day it is resumed. The laws also cover the gradient, `eval()`, the
# order of samples (under DDP ranks come one after the other), importance, low precision, levels between timesteps, and host syncs.
#
# By name it goes everywhere: `dysigma train --weighting my_weightings:Harder --weighting-params bins=10 …`, or as Dy-Sigma's prior. The name
# is looked up by importing the module, so use it for code that you would run.

# %%
np.savez(scratch / "ramps.npz", images=ramps(600).permute(0, 2, 3, 1).numpy())
own = {
    "data": str(scratch / "ramps.npz"),
    "weighting": "my_weightings:Harder",
    "weighting_params": {"bins": 10},
}
config = dysigma.TrainConfig(
    model="micro", images=fast(6_400, 1_280), warmup_images=320, device="cpu", **own
)
with chdir(scratch):
    run = dysigma.train(config, scratch / "run", progress=False, finish=False)
    dysigma.make_weighting("dy-sigma", dysigma.NoiseSchedule.linear(), prior="my_weightings:gentle")
bins = run.metrics.bin_weights.dropna().iloc[-1]
print("Harder: weights of the ten bins at the end", np.round(bins, 2))
assert max(bins) > 1.05 * min(bins), "the weighting must have an effect"

# %% [markdown]
# ## 6 · Text-to-image with low-rank adapters
#
# The setting of the paper's abstract: a text-guided model, adapted to a task. The scripts of diffusers for this have a fixed structure: freeze the
# base model, add low-rank adapters to the attention, optimise only those, encode the captions, add noise, predict, compare. We build
# it in miniature: a model that reads captions such as "ember discs" by cross-attention, adapters by hand, and the loop of section 1.


# %%
class LowRank(nn.Module):
    """A frozen linear layer plus a trainable one of rank r, which starts at zero (Hu et al. 2021)."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


leaves = dysigma.leaves(2000, size=16)
words = sorted({word for name in leaves.class_names for word in name.split()})
tokens = torch.tensor([[words.index(word) for word in name.split()] for name in leaves.class_names])
blocks = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "in_channels": 3, "out_channels": 3, "cross_attention_dim": 16, "attention_head_dim": 8,
}  # fmt: skip
embed, unet = nn.Embedding(len(words), 16), diffusers.UNet2DConditionModel(**small, **blocks)
frost, known = (
    leaves.labels >= 8,
    leaves.labels < 8,
)  # "frost discs" and "frost shards" are held out


def captioned(chosen, draw):
    """A batch of the chosen leaves with the embeddings of their captions."""
    pick = chosen.nonzero().flatten()[torch.randint(int(chosen.sum()), (16,), generator=draw)]
    return leaves.images[pick].float() / 127.5 - 1, {
        "encoder_hidden_states": embed(tokens[leaves.labels[pick]])
    }


# %%
loop(
    unet,
    [*unet.parameters(), *embed.parameters()],
    lambda draw: captioned(known, draw),
    "const-eps",
    fast(250, 40),
)
unet.requires_grad_(False)
for module in [m for m in unet.modules() if type(m).__name__ == "Attention"]:
    for part in ("to_q", "to_k", "to_v"):
        setattr(module, part, LowRank(getattr(module, part)))
adapters = [p for p in unet.parameters() if p.requires_grad]
frozen = [p for p in unet.parameters() if not p.requires_grad]
before = [p.clone() for p in frozen]
loop(unet, adapters, lambda draw: captioned(frost, draw), "dy-sigma", fast(150, 20))
assert all(map(torch.equal, before, frozen)), "what is frozen must stay as it is, bit for bit"
assert all(p.abs().max() > 0 for p in adapters), "every adapter must have moved from zero"
sizes = [sum(p.numel() for p in group) for group in (adapters, frozen)]
print(f"{sizes[0]:,} parameters trained, {sizes[1]:,} frozen")

# %% [markdown]
# In the full script the same lines go in the same places: 1 after the scheduler is loaded, 2 where the optimizer gets the LoRA parameters, 3 in place
# of the mean ([as a diff](../README.md#in-your-own-training-loop)). If it already applies `--snr_gamma`, remove that: two weightings multiply. If it resumes,
# add `accelerator.register_for_checkpointing(weighting)`, or what was learned is lost.
#
# Conditional models can be analysed too: `model_kwargs` holds one row per image. Here only the adapters require a gradient, so only their conflicts
# are measured. To read the cosines: four gradients that cancel, as they do at a minimiser, have mean cosine $-1/3$.

# %%
rows = {"encoder_hidden_states": embed(tokens[leaves.labels[frost]]).detach()}
schedule = dysigma.NoiseSchedule.from_diffusers(scheduler)
report = dysigma.conflicts(
    unet, leaves.images[frost], schedule, 4, model_kwargs=rows, micro_batches=40, progress=False
)
print(
    report.table()[["first", "last", "losses", "gnr", "mean_cosine"]]
    .round(3)
    .to_string(index=False)
)

# %% [markdown]
# ## 7 · Recorded: adapting a text-to-image model to a palette it has not seen
#
# Does a weighting speed up the adaptation of a text-guided model? This is what the abstract says of Dy-Sigma, 3.7 times against "Const".
# `data/races/text_guided.py` asks it at the scale of a CPU: 0.14 million parameters, captions in three templates, a tenth of them dropped for
# classifier-free guidance. For each seed one model learns eight classes of leaves with const-eps; then every arm fine-tunes a copy on the two classes
# of the palette *frost*, all on the same draws, predicting $\epsilon$, at one learning rate. Judges, as in 05: the geometric mean of held-out losses
# over timesteps, and the diffusion term of the bits per dimension. The column *old* is a control: the loss on the eight old classes after the adaptation,
# over that before. A speed-up counts images to the loss below which the baseline stays from 20 or 40 % of its images on. Five seeds were planned; the
# budget of 20 minutes ended after four.

# %%
QUESTION_SPEED = "Images of const-eps over images of dy-sigma, to the loss of const-eps after 40 % of the adaptation?"
predict(QUESTION_SPEED, 3.7)

# %%
folder, at = Path("../data/runs/text-guided"), evaluation_timesteps(1000, 20)
rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
settings = json.loads((folder / "config.json").read_text())
arms, seen = settings["arms"], np.array(settings["checkpoints"])
minus_log_snr = -dysigma.NoiseSchedule.linear().log_snr[at].numpy()
of_arm = {
    arm: [row for row in rows if row["arm"] == arm] for arm in arms
}  # in the order of the seeds
losses = {
    arm: np.array([row["losses"] for row in of_arm[arm]]) for arm in arms
}  # (seeds, checkpoints, timesteps)
curves = {arm: np.exp(np.log(x).mean(2)) for arm, x in losses.items()}
bits = {
    arm: integrate.trapezoid(x[:, -1], minus_log_snr) / 2 / math.log(2) for arm, x in losses.items()
}


def paired(v):
    """Mean of values (seeds,) with its 95 % interval (Student t)."""
    mean, half = plots.t_interval(v)
    return np.array([mean, mean - half, mean + half])


def sooner(arm, baseline, share=0.4):
    """Speed-up of an arm to the loss below which the baseline stays from that share of its images on."""
    level = float(np.median(curves[baseline][:, seen >= share * seen[-1]].max(1)))
    reached = [
        dict(enumerate(images_to_threshold(seen, c, level) for c in curves[name]))
        for name in (baseline, arm)
    ]
    return speedup(*reached, seen[-1])


print(
    f"{len(of_arm['min-snr'])} paired seeds, {seen[-1]:,} images; against const-eps, with 95 % intervals"
)
for arm in arms[1:]:
    ratio, more = curves[arm][:, -1] / curves["const-eps"][:, -1], bits[arm] - bits["const-eps"]
    old = np.exp(
        np.mean([np.log(row["old_after"]) - np.log(row["before"]["old"]) for row in of_arm[arm]])
    )
    print(
        f"{arm:>11}: loss {np.exp(paired(np.log(ratio))).round(2)}, bits {paired(more).round(3)}, old {old:.2f}"
    )
tests = [
    ("min-snr", "const-eps", 0.4),
    ("uncertainty", "const-eps", 0.4),
    ("const-x0", "const-eps", 0.4),
]
for arm, baseline, share in [
    *tests,
    *(("dy-sigma", b, part) for b in ("const-eps", "min-snr") for part in (0.2, 0.4)),
]:
    s = sooner(arm, baseline, share)
    interval = f"[{s.low:.2f}, {s.high:.2f}]"
    never = f"{s.censored_arm} seeds never get there" if s.censored_arm else ""
    print(
        f"speed-up of {arm:>11} over {baseline:>9}, {share:.0%}: {s.bound} {s.ratio:.2f}",
        never or interval,
    )
reveal(QUESTION_SPEED, round(sooner("dy-sigma", "const-eps").ratio, 2))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
plots.trajectories(left, seen, curves, log=True)
left.set(
    xscale="log",
    xlabel="images of frost seen",
    ylabel="geometric mean of losses",
    title="Along the adaptation",
)
by_timestep = {arm: x[:, -1] / losses["const-eps"][:, -1] for arm, x in losses.items()}
plots.loss_by_timestep(right, at, by_timestep)
right.set(ylabel="loss / that of const-eps", title="At the end, timestep by timestep")
right.get_legend().remove()
plots.show(
    fig,
    "13_text_guided",
    title="Adapting a text-to-image model to a palette it has not seen",
    caption="By the mean over timesteps dy-sigma comes first, then min-snr, then uncertainty; const-x0 is worse than const-eps. The right panel says where: on the noisy half, paid for at the clean end. Bands: 95 % over four paired seeds.",
    alt="Left: geometric mean of losses against images seen, both logarithmic; five curves, dy-sigma lowest, const-x0 highest. Right: loss relative to const-eps against timestep; dy-sigma and min-snr are above 1 at the cleanest timesteps and fall to about half on the noisy side; const-x0 starts far above 1 and ends below it.",
    notebook=NOTEBOOK,
)

# %% [markdown]
# Read it with the second judge and the control beside it.
#
# - By the mean over timesteps, Dy-Sigma reaches the loss of const-eps with 2.4 times fewer images, and that of Min-SNR, its prior, with 1.2 times fewer. In
#   bits per dimension const-eps is ahead of both. Uncertainty weighting lies between by the first judge, and is level with const-eps by the second.
# - Which "Const"? Against const-x0 any factor could be claimed: three of its four seeds never reach that loss.
# - *The control*: the loss on the old palettes, of which no image is seen in this phase, falls too, most with Dy-Sigma. So a good part of the gain is
#   not adaptation. The model was pretrained with const-eps, briefly, and had unfinished work at the noisy timesteps. Whether the gain remains
#   after a long pretraining is a question for a GPU.
#
# Samples of the first seed, discs above and shards below, guidance 3. Dy-Sigma has the palette and no shapes yet:
#
# ![Two rows of sixteen small blotchy samples in the greys and pale blues of frost, without clear shapes](../data/runs/text-guided/samples-dy-sigma.png)
#
# Const-x0, which starves the clean timesteps of an ε network, leaves the noise in:
#
# ![Two rows of sixteen small samples of coloured noise, pixel by pixel](../data/runs/text-guided/samples-const-x0.png)

# %% [markdown]
# ## 8 · Capstone
#
# Take a training loop that you did not find here, and images of your own. Ask one question of the form *does weighting A beat weighting B, by which
# judge?* Answer it in a notebook that runs from top to bottom. Half a day to a day.
#
# | what | 0 points | 1 point | 2 points |
# |---|---|---|---|
# | conversion | not checked | weights compared with a formula | gradients agree with the formula, and a wrong conversion is shown to fail |
# | baselines | one arm | the plain loss | the plain loss, Const on $x_0$, and the prior of what you propose |
# | seeds | one | three | three or more, paired on the same draws, with an interval |
# | judges | training loss | one held-out loss | per timestep and a second, different judge; both named before the run |
# | your weighting | none | it runs | derived in a paragraph, passes `check_weighting`, used by name |
# | analysis | none | a table of weights | conflicts with intervals, or "undetermined" said where it is |
# | honesty | claims beyond the numbers | limits listed | a result against your expectation reported, and what would change your mind |
#
# Of 14 points, 10 is a pass; a 0 in the first row caps the sum at 7, because nothing after it can be trusted.

# %% [markdown]
# **Try it yourself.** In section 1 another name: `"min-snr"`, `"uncertainty"`, or your own of section 5.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.
#
# **13.1** (●○○, 3 min) Your script draws EDM noise levels $\sigma$ for $x=x_0+\sigma\epsilon$. What is `log_snr` for `weighting.at`?
#
# <details><summary>Hint</summary>
#
# SNR is the square of the factor of the signal over the square of the factor of the noise; log is natural.
#
# </details>

# %%
sigma = torch.tensor([0.002, 0.5, 80.0])
wrong = {
    "SNR has squares: that is half of it.": -sigma.log(),
    "That is noise over signal.": 2 * sigma.log(),
}
exercise("13.1", expected=-2 * sigma.log(), mistakes=wrong)
log_snr_edm = ...
check("13.1", log_snr_edm)

# %% [markdown]
# **13.2** (●●○, 8 min) A flow-matching script multiplies the squared error of the velocity by $\frac2{\pi(1-2r+2r^2)}$. Write this as a weighting of your own: the
# *log* of the weight on the $x_0$ error, as a function of `log_snr`. The check calls it at the levels below.
#
# <details><summary>Hint</summary>
#
# First $r$ from `log_snr`: $\sqrt S=(1-r)/r$, so $r$ is a sigmoid of $-\lambda/2$. Then a weight on the $u$ error is a weight $1/r^2$ times as large on
# the $x_0$ error.
#
# </details>

# %%
at = torch.linspace(-6, 6, 13)
share = torch.sigmoid(-at / 2)
on_u = (2 / math.pi / (1 - 2 * share + 2 * share**2)).log()
wrong = {
    "That is the log-weight on the velocity: divide the weight by s^2.": on_u,
    "The conversion goes the other way: a small error in x0 is a large one in u.": on_u
    + 2 * share.log(),
    "That is the weight, not its log.": on_u.exp() / share**2,
}
exercise("13.2", expected=on_u - 2 * share.log(), mistakes=wrong)
cosmap = ...  # lambda log_snr: ...
check("13.2", cosmap if cosmap is ... else cosmap(at))

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
log_snr_edm = -2 * sigma.log()
check("13.1", log_snr_edm)


def cosmap(log_snr):
    s = torch.sigmoid(-log_snr / 2)
    return (2 / math.pi / (1 - 2 * s + 2 * s**2)).log() - 2 * s.log()


check("13.2", cosmap(at))
check_weighting(cosmap)

# %% [markdown]
# ## What you can now do
#
# - Put a weighting into a loop with three lines, and prove with one gradient that it is the formula you meant.
# - Name the noise level and the target of a diffusion, Euler-type, flow or EDM loop, and give all of them one weighting.
# - Write a weighting in a file of your own, check its laws, and train with it by name.
# - Adapt a conditional model with the same lines, and measure the conflicts between its timesteps.
#
# ## Limitations
#
# - Loops in miniature: section 6 shows structure, not quality, and the LoRA is written by hand where the full script uses `peft`.
# - The recorded study has one model size, one learning rate for all arms, four seeds, 16 × 16 images and eleven words; its intervals are of seeds alone.
#   The 40 % of its speed-up was chosen when the first arms had been seen, so it is no registered result; 20 % stands beside it.
# - `at` reads learned weights between timesteps by interpolation; a schedule that does not span the levels drawn uses its end values.
# - Flow matching and EDM are tested by gradients against their formulas; no model of either kind was trained for long.
#
# ## References
#
# - Liu, Ye, Liu, Qin, *Dy-Sigma: A Generalized Accelerated Convergence Strategy for Diffusion Models*, IJCNN 2024: the abstract sets the scene of section 7.
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023, [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): the weighting of sections 2 to 4, on $x_0$.
# - Liu, Gong, Liu, *Flow Straight and Fast*, 2023, [arXiv:2209.03003](https://arxiv.org/abs/2209.03003): the rectified flow, whose velocity is the target.
# - Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*, 2024, [arXiv:2403.03206](https://arxiv.org/abs/2403.03206): levels drawn from a logit-normal, and the shift.
# - Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364): continuous levels and their density.
# - Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685): the adapters of section 6.
# - Ho, Salimans, *Classifier-Free Diffusion Guidance*, 2022, [arXiv:2207.12598](https://arxiv.org/abs/2207.12598): why a tenth of the captions is dropped.
#
# **Next:** [14, text-guided adaptation and the capstone](14_text_guided_and_capstone.ipynb). Back to the [map](00_start_here.ipynb).

# %%
watermark()
