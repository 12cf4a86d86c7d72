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
# # 07 · Train a compact DDPM
#
# > **Claim.** The same cells train a toy on one CPU core and a CIFAR-10 model on a GPU. Watch two things while they run:
# > the loss at each timestep, and samples of the same latents. The mean loss shows neither.
#
# **You will be able to**
#
# - write a training step with Min-SNR weights, and check it against the package;
# - train a model in a run folder, on your GPU if you have one;
# - read a training from its loss by timestep and from samples of fixed latents;
# - compare three weightings at equal images, on the same draws.
#
# **You need** the weights of [03](03_snr_weightings.ipynb). [06](06_dy_sigma_derived.ipynb) says what Dy-Sigma is.
#
# **Time** reading 20 min · running about 80 s (short run 25 s) on one idle CPU core; on a GPU, about
# twice the `MINUTES` that you set · memory about 1 GB.
#
# **Functions introduced** `dysigma.train`, `dysigma.TrainConfig`, `dysigma.load_run`, `dysigma.distances.frechet_distance`.

# %%
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from PIL import Image

from dysigma import NoiseSchedule, TrainConfig, load_run, make_model
from dysigma.course.lesson import Lesson
from dysigma.course.reader import (
    AlongTraining,
    best_run,
    new_run_folder,
    train_and_watch,
)
from dysigma.data import batch, shapes
from dysigma.distances import extract, frechet_distance, load_features, moments
from dysigma.evaluation import sample_images
from dysigma.images import tile
from dysigma.randomness import generator
from dysigma.training import build, iterate, load_split
from dysigma.training.budget import fit_to_minutes
from dysigma.training.precision import low_precision

lesson = Lesson("07_train_a_compact_ddpm", trains_on="auto")
DEVICE = lesson.device

# %% [markdown]
# ## What training gives
#
# First a result. This is the best recorded model of CIFAR-10: one that you trained with this page before, else one from
# a GPU, else one that was trained on a single CPU core. The line below the picture says which.

# %%
RUN_NAME = "cifar10-min-snr"
recorded = best_run(RUN_NAME)
recorded_images = recorded.summary["images"]
recorded_minutes = recorded.summary["seconds"] / 60

fig, ax = plt.subplots(figsize=(6.4, 6.4))
ax.imshow(Image.open(recorded.path / "samples.png"), interpolation="nearest")
ax.axis("off")
lesson.show(
    fig,
    "07_recorded_samples",
    title="Colour and layout, and some objects one may guess",
    caption="Sixty-four samples of a recorded model of CIFAR-10, not selected.",
    alt="A grid of eight by eight small colour pictures. They have the colours, light "
    "and layout of photographs. Few show an object that one can name.",
)
display(
    Markdown(
        f"Run `{recorded.path.name}`: network `{recorded.config['model']}`, weighting "
        f"`{recorded.config['weighting']}`, {recorded_images:,} images, "
        f"{recorded_minutes:.0f} minutes on "
        f"`{recorded.summary['provenance']['device']}`."
    )
)

# %% [markdown]
# For comparison, published models of CIFAR-10 have seen about a hundred million images (Ho et al. 2020: 800,000 steps of 128).

# %%
share_of_ho = recorded_images / (800_000 * 128)
print(f"this record has seen {share_of_ho:.2%} of that")

# %% [markdown]
# ## What you will train, and where
#
# `DEVICE` is your GPU if PyTorch finds one, else the CPU. It decides the data and the sizes, and nothing else.
#
# | | on a GPU | on a CPU |
# |---|---|---|
# | data | CIFAR-10, 32 × 32: fetched once and verified | shapes, 16 × 16: drawn in memory |
# | network | `medium`, 14.7 million parameters | `tiny` |
# | length | as many images as fit in `MINUTES` | a fixed number of images |
#
# Everything else is shared: cosine schedule, a network that predicts $v$, Min-SNR weights. If the images of a step do
# not fit in the memory of your GPU, a warning says so, and they are taken in parts. That changes the result by rounding
# alone. On a small or old GPU, `model="compact"` sees more images in the same time.

# %%
MINUTES = lesson.fast(8, 1)  # of the first and longest run, on a GPU

if DEVICE.type == "cuda":
    settings = {
        "data": "cifar10",
        "model": "medium",
        "batch_size": 512,
        "lr": 1e-3,
        "warmup_images": 250_000,
        "validation_images": 512,
    }
else:
    settings = {
        "data": "shapes",
        "image_size": 16,
        "model": lesson.fast("tiny", "micro"),
        "batch_size": 32,
        "lr": 8e-3,
        "warmup_images": 640,
        "train_images": lesson.fast(6_000, 1_000),
        "images": lesson.fast(7_680, 256),
        "validation_images": lesson.fast(12, 8),
        "validation_timesteps": lesson.fast(20, 10),
    }
config = TrainConfig(
    schedule="cosine",
    prediction="v_prediction",
    weighting="min-snr",
    device=str(DEVICE),
    **settings,
)
# What is asserted below about this one experiment holds for the full toy, as it stands here.
is_default = (config.data, config.model, config.weighting) == (
    "shapes",
    "tiny",
    "min-snr",
)
train_set = load_split(config, "train", DEVICE)
test_set = load_split(config, "test", DEVICE)
print(
    f"{len(train_set):,} images {tuple(train_set.images.shape[1:])} of {config.data} "
    f"on {DEVICE}"
)

# %% [markdown]
# ## One step, by hand
#
# | symbol | in the code | shape | meaning |
# |---|---|---|---|
# | $x_0$ | `x0` | `(B, 3, H, W)` | images in [-1, 1] |
# | $t$ | `timesteps` | `(B,)` | one timestep for each image, 0 is clean |
# | $\epsilon$ | `noise` | as `x0` | standard normal |
# | $\alpha_t$, $\sigma_t$ | `alpha`, `sigma` | `(B, 1, 1, 1)` | of the schedule, $\alpha^2+\sigma^2=1$ |
# | $v$ | `v` | as `x0` | the target, $\alpha_t\epsilon-\sigma_t x_0$ |
# | $L_i$ | `losses` | `(B,)` | mean squared error of each image |
# | $w_t$ | `weights` | `(T,)` | Min-SNR, of mean 1 |
#
# Noise an image, $x_t=\alpha_t x_0+\sigma_t\epsilon$. Let the network predict $v$ from $x_t$. Weight the squared error of
# each image by its timestep:
#
# $$\text{loss}=\frac1B\sum_i w_{t_i}L_i,\qquad w_t\propto\frac{\min(\mathrm{SNR}_t,5)}{\mathrm{SNR}_t+1}.$$
#
# The weighting enters in the last step and nowhere else. All draws come from generators made of (seed, step, name), so
# two runs of one seed see the same images, timesteps and noise.

# %%
SEED = 0
toy_config = TrainConfig(
    data="shapes", image_size=16, train_images=64, model="micro",
    batch_size=16, images=16,
    schedule="cosine", prediction="v_prediction", weighting="min-snr",
    device="cpu",  # a check of numbers by hand
)  # fmt: skip
toy_images = shapes(64)
schedule = NoiseSchedule.cosine()
snr = schedule.log_snr.exp()
weights = snr.clamp(max=5) / (snr + 1)
weights = weights / weights.mean()


def losses_by_hand(model, step, batch_size=16):
    x0, _, _ = batch(toy_images, SEED, step, batch_size)
    uniform = torch.rand(batch_size, generator=generator(SEED, step, "timesteps"))
    timesteps = (uniform * 1000).long()
    noise = torch.randn(x0.shape, generator=generator(SEED, step, "noise"))
    alpha = schedule.alpha[timesteps].view(-1, 1, 1, 1).float()
    sigma = schedule.sigma[timesteps].view(-1, 1, 1, 1).float()

    x_t = alpha * x0 + sigma * noise
    v = alpha * noise - sigma * x0
    predicted = model(x_t, timesteps).sample
    losses = (predicted - v).square().mean((1, 2, 3))  # (B,)
    return losses, timesteps


torch.manual_seed(SEED)
losses, timesteps = losses_by_hand(make_model("micro", 16), step=0)
weighted_loss = (weights[timesteps] * losses).mean()

# %% [markdown]
# Does the package compute the same? It should, to rounding: `iterate` yields one record after each step.

# %%
toy_state = build(toy_config, toy_images)
record = next(iterate(toy_state, toy_images, toy_config))
torch.testing.assert_close(losses, record.losses, rtol=1e-4, atol=1e-6)
torch.testing.assert_close(
    weighted_loss.float(), record.loss.float(), rtol=1e-4, atol=1e-6
)
print(f"by hand {weighted_loss:.5f}, the package {record.loss:.5f}")

# %% [markdown]
# After that: `backward`, a clip of the gradient, a step of AdamW, and one of the average of the weights (EMA). Samples
# are drawn with the average.
#
# ## Train, and watch
#
# We look eight times at the loss on test images, at fixed timesteps and with fixed noise. At four moments we also draw
# ten samples, always from the same latents. So a column of the growing picture shows one sample being learned.
#
# Before you start, a guess. Take the first of the eight looks and the last. By what factor has the loss fallen at the
# *cleanest* timestep? Below the answer you will also find the factor at the noisiest one.

# %%
QUESTION = "Loss at the cleanest timestep: first look divided by last?"
lesson.predict(QUESTION, None)

# %%
if DEVICE.type == "cuda":
    config = fit_to_minutes(
        config, MINUTES
    )  # measures memory and speed, then fixes `images`
    folder = new_run_folder(RUN_NAME)
else:
    folder = (
        Path(tempfile.mkdtemp()) / "toy-min-snr"
    )  # a toy: no other page should find it

# Eight equal parts of whole steps.
eighth = config.num_steps // 8 * config.batch_size
quarter = 2 * eighth
half = 4 * eighth
config = replace(config, images=8 * eighth, validate_every=eighth)
print(f"{config.images:,} images in {config.num_steps:,} steps on {DEVICE}")

# %%
looks_at_samples = [eighth, quarter, half, 8 * eighth]
min_snr_along = AlongTraining(looks_at_samples, count=10, steps=lesson.fast(20, 8))
min_snr_run = train_and_watch(config, folder, min_snr_along, (train_set, test_set))

# %%
rows = {f"after {seen:,} images": row for seen, row in min_snr_along.samples.items()}
lesson.gallery(
    rows,
    "07_samples_along",
    columns=10,
    title="Each column is one latent: colour first, then form",
    caption="Ten latents at four moments of the training above.",
    alt="Four rows of ten pictures. The first row is blurred blobs of colour. Further "
    "down the blobs turn into forms with edges, in much the same colours.",
)

# %% [markdown]
# You should see that in most columns the colour and the place of the object appear early. Form comes later. High noise
# decides the first, low noise the second. Now look at the same training as numbers.

# %%
looks = min_snr_run.metrics.dropna(subset=["validation_losses"])
looks = looks[looks["images"] > 0].set_index("images")
look_timesteps = np.array(looks["validation_timesteps"].iloc[0])
loss_at = {
    seen: np.array(values) for seen, values in looks["validation_losses"].items()
}

fall = loss_at[eighth] / loss_at[8 * eighth]
lesson.reveal(QUESTION, float(fall[0]))
print(f"at the noisiest timestep: {fall[-1]:.3g}; of the mean over timesteps: "
      f"{loss_at[eighth].mean() / loss_at[8 * eighth].mean():.3g}")  # fmt: skip

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for seen, shade in zip([eighth, quarter, half], ["0.78", "0.6", "0.4"], strict=True):
    ax.plot(look_timesteps, loss_at[seen], color=shade, label=f"{seen:,} images")
ax.plot(
    look_timesteps,
    loss_at[8 * eighth],
    color="C0",
    linewidth=2,
    label=f"{8 * eighth:,} images",
)
ax.set(xlabel="timestep (clean → noisy)", ylabel="test loss on v", yscale="log")
ax.legend()
lesson.show(
    fig,
    "07_loss_by_timestep",
    title="Different timesteps learn at different speeds",
    caption="Loss on test images, with fixed noise, at four moments of the training.",
    alt="Four curves of loss against timestep on a logarithmic axis, later ones "
    "lower. The distance between the curves differs from timestep to timestep.",
)

# %%
late_fall = 1 - loss_at[8 * eighth] / loss_at[half]
display(
    Markdown(
        "From the darkest grey curve to the blue one, the second half of the "
        f"training, the loss fell by **{late_fall[len(late_fall) // 2]:.0%}** in the "
        f"middle and by **{late_fall[-1]:.0%}** at the noisiest timestep."
    )
)

# %% [markdown]
# So the fall at one timestep says little about the fall at another, and the mean loss is one number for all of them. At the
# clean end the network has to tell noise from detail. At the noisy end it has to guess a picture from noise. These are
# different tasks, and they are learned at different speeds.

# %%
assert np.isfinite(loss_at[8 * eighth]).all(), "every loss must be finite"
if is_default:
    assert fall.max() > 1.3 * fall.min(), (
        "timesteps must differ in how much their losses fall"
    )

# %% [markdown]
# ## Two more weightings, on the same draws
#
# Now `const-eps`, the plain loss of Ho et al. 2020 on the noise, and `dy-sigma`, which learns its weights. Each of
# them trains on a quarter of the images. Min-SNR need not be trained again: the learning rate does not decay, so the
# first quarter of the long run is the same as a run of that length. We compare with its second look.

# %%
SHORT = ["const-eps", "dy-sigma"]
along = {"min-snr": min_snr_along}
runs = {"min-snr": min_snr_run}
for name in SHORT:
    short_config = replace(
        config, weighting=name, images=quarter, validate_every=quarter
    )
    short_folder = new_run_folder(folder.name.replace("min-snr", name), folder.parent)
    along[name] = AlongTraining([quarter], count=10, steps=lesson.fast(10, 8))
    runs[name] = train_and_watch(
        short_config, short_folder, along[name], (train_set, test_set), finish=False
    )

# %% [markdown]
# Are the draws really the same? Then the losses of the very first step agree, before any weighting has acted.

# %%
for name in SHORT:
    first_losses = along[name].first_losses
    torch.testing.assert_close(
        first_losses, min_snr_along.first_losses, rtol=1e-2, atol=1e-3
    )
print(f"{len(first_losses)} losses of the first step agree in all three runs")

# %% [markdown]
# Where does `const-eps` fall behind Min-SNR, if it does? [03](03_snr_weightings.ipynb) says how both weigh the error of $v$.

# %%
QUESTION_WHERE = "Where is const-eps worse than min-snr: clean, noisy, or nowhere?"
lesson.predict(QUESTION_WHERE, None)

# %%
ratios = {}
for name in SHORT:
    short_looks = runs[name].metrics.dropna(subset=["validation_losses"])
    last_losses = np.array(short_looks["validation_losses"].iloc[-1])
    ratios[name] = last_losses / loss_at[quarter]

middle = len(look_timesteps) // 2
ends = {
    "clean": ratios["const-eps"][:middle].mean(),
    "noisy": ratios["const-eps"][middle:].mean(),
}
worst_end = max(ends, key=ends.get)
lesson.reveal(QUESTION_WHERE, worst_end if ends[worst_end] > 1 else "nowhere")

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
for name, colour in {"const-eps": "C3", "dy-sigma": "C2"}.items():
    ax.plot(look_timesteps, ratios[name], color=colour, linewidth=2)
    ax.text(1010, ratios[name][-1], name, color=colour, va="bottom")
ax.axhline(1, color="0.4", linewidth=1)
ax.text(1190, 0.99, "min-snr = 1", color="0.3", va="top", ha="right")
ax.set(
    xlabel="timestep (clean → noisy)",
    ylabel="test loss / that of min-snr",
    xlim=(0, 1200),
    xticks=range(0, 1001, 200),
)
if is_default:
    title = "The plain noise loss gains at the clean end, loses elsewhere"
else:
    title = "Loss of two weightings, relative to Min-SNR"
lesson.show(
    fig,
    "07_three_weightings",
    title=title,
    caption="Loss on test images relative to Min-SNR, at equal images. Above the "
    "line: worse than Min-SNR. One seed.",
    alt="Two curves of relative loss against timestep and a horizontal line at one "
    "for Min-SNR.",
)

# %% [markdown]
# On the toy you should see `const-eps` below the line at the cleanest timesteps and above it at most others. It gives
# the cleanest timesteps more weight than Min-SNR does, and the others less. Dy-Sigma stays much closer to Min-SNR. For
# CIFAR-10 on a GPU we have no record of this picture yet.

# %%
of_dy_sigma = ratios["dy-sigma"]
display(
    Markdown(
        f"In this run the loss of Dy-Sigma is {of_dy_sigma.min():.2f} to "
        f"{of_dy_sigma.max():.2f} times that of Min-SNR. One run cannot say how much "
        "of that is seed noise."
    )
)
if is_default:
    assert ratios["const-eps"][0] < 1 < ratios["const-eps"][middle:].min(), (
        "const-eps must gain at the clean end and lose at the noisy half"
    )
    distance_from_one = {
        name: np.abs(ratio - 1).max() for name, ratio in ratios.items()
    }
    assert distance_from_one["dy-sigma"] < distance_from_one["const-eps"], (
        "dy-sigma must be closer to min-snr"
    )

# %% [markdown]
# ## Samples: look at many, and measure them
#
# The three networks at equal images, and Min-SNR after four times as many. Each of them draws samples from the same latents. We
# measure how far they are from the training images: the Fréchet distance between features, lower is better. On the CPU the
# features are the pixels. On a GPU we try the network of FID, and fall back to pixels where it cannot be fetched. The
# number of images is the same in each row of the table, because the distance depends on it. A GPU draws 10,000 a row, or
# as many as it draws in half of `MINUTES`.

# %%
try:
    features_name = "fid" if DEVICE.type == "cuda" else "pixels"
    features = load_features(features_name, DEVICE)
except ConnectionError:
    features_name = "pixels"
    features = load_features(features_name, DEVICE)
STEPS = 20  # of DDIM
SAMPLES = lesson.fast(60, 20)  # a row
if DEVICE.type == "cuda":
    trained_per_second = min_snr_run.summary["images"] / min_snr_run.summary["seconds"]
    # A training step on an image takes as long as three evaluations of the network. There are four rows.
    evaluations = 3 * trained_per_second * 60 * MINUTES / 2
    SAMPLES = int(min(10_000, max(60, evaluations / (4 * STEPS))))
reference = moments(extract(features, train_set.images))


def distance_of(images):
    return frechet_distance(moments(extract(features, images)), reference)


# %% [markdown]
# The first row is a yardstick: real test images, as many as there are samples. No model should be much closer.

# %%
networks = {"min-snr, quarter": min_snr_along.networks[quarter]}
for name in SHORT:
    networks[f"{name}, quarter"] = along[name].networks[quarter]
networks["min-snr, all"] = min_snr_along.networks[8 * eighth]

results = pd.DataFrame(
    columns=[f"distance ({features_name})", "ms a sample"], dtype=float
)
results.loc["real test images"] = [distance_of(test_set.images[:SAMPLES]), np.nan]
samples = {}
for label, network in networks.items():
    start = time.perf_counter()
    drawn = sample_images(
        network,
        config.noise_schedule(),
        (SAMPLES, *train_set.images.shape[1:]),
        prediction_type="v_prediction",
        num_steps=STEPS,
        seed=1,
        precision=low_precision(config, DEVICE),
    )
    seconds = time.perf_counter() - start
    samples[label] = drawn.cpu()
    results.loc[label] = [distance_of(drawn), 1000 * seconds / SAMPLES]

lesson.table(
    results,
    mark="min-snr, all",
    digits=1,
    caption=f"{SAMPLES:,} images a row, {STEPS} steps of DDIM, trained on {DEVICE}",
)

# %% [markdown]
# Can the eye tell the three weightings apart? Before you scroll: the first three blocks have seen equally many images.

# %%
rows = {}
for name in ["min-snr", *SHORT]:
    rows[f"{name}, {quarter:,} images"] = samples[f"{name}, quarter"][:20]
if is_default:
    title = "After a quarter, the eye cannot tell the three weightings apart"
else:
    title = "The three weightings, after a quarter of the images"
lesson.gallery(
    rows,
    "07_three_samples",
    columns=10,
    title=title,
    caption="Twenty samples of each network, not selected. The same place in each "
    "block has the same latent.",
    alt="Three blocks of two rows of ten pictures, one block for each weighting. "
    "Pictures at the same place are alike.",
)

# %%
if is_default:
    title = "Four times the images do more than any of the three weightings"
else:
    title = "Sixty samples of the longest training"
lesson.gallery(
    {f"min-snr, {config.images:,} images": samples["min-snr, all"][:60]},
    "07_final_samples",
    columns=10,
    title=title,
    caption="Sixty samples of the longest training above, not selected.",
    alt="Six rows of ten pictures. On the toy data, single bright forms with edges "
    "stand before calm dark backgrounds; few of them have a name.",
)

# %% [markdown]
# In one seed, only two things can be read safely: whether four times the images help, and whether a weighting
# fails altogether. On the toy they help, to the eye and in the table.
# [Page 12](12_the_convergence_race.ipynb) compares weightings that are close, with five seeds.

# %%
distances = results.iloc[:, 0].astype(float)
if is_default:
    early = [distances[f"{name}, quarter"] for name in ["min-snr", *SHORT]]
    differences = max(early) - min(early)
    assert min(early) - distances["min-snr, all"] > differences, (
        "more images must help most"
    )

# %% [markdown]
# ## What is left on the disk
#
# `train` has written a run folder. It can be resumed, evaluated and shared.

# %%
listed = sorted(path.name for path in min_snr_run.path.glob("[!.]*"))
print(*listed, sep="  ")
opened = load_run(min_snr_run.path)
print(type(opened.pipeline()).__name__, "with the averaged weights")
if DEVICE.type == "cuda":
    print("your run:", folder)

# %% [markdown]
# | file | holds |
# |---|---|
# | `config.json` | every setting: enough to train it again |
# | `metrics.jsonl` | losses, weights and looks at test images, a line each |
# | `checkpoint/` | all that `--resume` needs |
# | `pipeline/` | a diffusers pipeline, with the averaged weights |
# | `samples.png`, `summary.json` | 64 samples; time, device, versions |
#
# On a GPU your run lies in `runs/course/` of the project. The picture at the top of this page shows it from the next
# time on, and so does every page that calls `best_run`. A toy from a CPU is thrown away. The command line does the same:
#
# ```
# dysigma train --data cifar10 --model medium --schedule cosine --prediction v_prediction --weighting min-snr \
#     --batch-size 512 --lr 1e-3 --warmup-images 250000 --minutes 8 --out runs/course/cifar10-min-snr
# ```
#
# ## The same picture for CIFAR-10
#
# Does a real data set look like the toy? Here is the loss by timestep of the run at the top of the page. Until you train
# your own, it is the record of a CPU. That network predicts the noise, so its loss is high at the clean end.

# %%
recorded_looks = recorded.metrics.dropna(subset=["validation_losses"])
recorded_looks = recorded_looks[recorded_looks["images"] > 0]
recorded_timesteps = np.array(recorded_looks["validation_timesteps"].iloc[0])
first_look = recorded_looks.iloc[0]
last_look = recorded_looks.iloc[-1]
first_loss = np.array(first_look["validation_losses"])
last_loss = np.array(last_look["validation_losses"])

fig, ax = plt.subplots(figsize=(7, 3.6))
ax.plot(
    recorded_timesteps,
    first_loss,
    color="0.6",
    label=f"{first_look['images']:,.0f} images",
)
ax.plot(
    recorded_timesteps,
    last_loss,
    color="C0",
    linewidth=2,
    label=f"{last_look['images']:,.0f} images",
)
ax.set(
    xlabel="timestep (clean → noisy)",
    ylabel=f"test loss ({recorded.config['prediction']})",
    yscale="log",
)
ax.legend()
lesson.show(
    fig,
    "07_cifar10_by_timestep",
    title="On CIFAR-10, too, timesteps learn at different speeds",
    caption="The first and the last look at test images in the recorded run.",
    alt="Two curves of loss against timestep on a logarithmic axis. The later one is "
    "lower by a factor that differs from timestep to timestep.",
)
display(
    Markdown(
        "Between these two looks the loss fell by "
        f"{1 - np.mean(last_loss[:5] / first_loss[:5]):.0%} on the cleanest tenth of "
        f"the timesteps and by {1 - np.mean(last_loss[-5:] / first_loss[-5:]):.0%} on "
        "the noisiest."
    )
)

# %% [markdown]
# The record was made with this command, in about an hour of one core:
#
# ```
# dysigma train --data cifar10 --model small --images 128000 --warmup-images 6400 --validate-every 12800 \
#     --checkpoint-every 6400 --device cpu --out data/runs/cifar10-cpu-small
# ```
#
# **Try it yourself.** Add `"p2"` to `SHORT`. Or change `weighting="min-snr"` to `"const-x0"` in the settings: which end
# of the timesteps gains?
#
# ## A network that you can open
#
# The weights of the recorded run above were not kept. Those of another training on CIFAR-10 are in this repository. It is
# the same network, `small`, on the same images. Three settings differ: it predicts the image, its weights are Min-SNR, and
# its timesteps are drawn by the square root of these weights. One line opens it:

# %%
kept = load_run("../data/runs/cifar10-pictures")
network = kept.pipeline().unet.to(DEVICE)

kept_images = kept.summary["images"]
kept_samples = sample_images(
    network,
    NoiseSchedule.linear().to(DEVICE),
    (16, 3, 32, 32),
    prediction_type=kept.config["prediction"],
    num_steps=25,
)

# %% [markdown]
# Both networks turn the same latents into pictures, so the pictures at the same place belong together. Which of the two has
# seen more images?

# %%
QUESTION_BLOCK = "Which block is from the network that saw more images: 1 or 2?"
lesson.predict(QUESTION_BLOCK, None)

# %%
plain = load_run("../data/runs/cifar10-cpu-small")
plain_grid = Image.open(plain.path / "samples.png")
plain_part = plain_grid.crop((0, 0, plain_grid.width, plain_grid.height // 4))

fig, axes = plt.subplots(2, 1, figsize=(7.6, 4.8))
axes[0].imshow(plain_part, interpolation="nearest")
axes[0].set_title("1: predicts the noise, plain loss", loc="left")
axes[1].imshow(tile(kept_samples.cpu(), 8), interpolation="nearest")
axes[1].set_title("2: predicts the image, Min-SNR", loc="left")
for ax in axes:
    ax.axis("off")
lesson.show(
    fig,
    "07_two_networks",
    title="Predicting the image gives clearer pictures from fewer images",
    caption="Samples of two networks of one kind from the same latents, not selected.",
    alt="Two blocks of small pictures. Those of the second block have stronger "
    "colours and clearer edges; layout and colours of pictures at the same place "
    "agree.",
)
lesson.reveal(QUESTION_BLOCK, 1)

# %%
evaluation = json.loads((kept.path / "evaluation.json").read_text())
measured = evaluation["distances"]["fd_cifar10-classifier"]
display(
    Markdown(
        f"Block 1 has seen {plain.summary['images']:,} images, block 2 "
        f"{kept_images:,}. The distance of {measured['images']} samples of block 2 to "
        f"the training images is {measured['distance']:.1f}, on the features of our "
        "own small classifier. Lower is better, and it is not FID."
    )
)

# %% [markdown]
# This is one seed each, and the learning rates differ too. So it shows what a target and a weighting may change, and does
# not measure it. Page 12 does, on smaller images.
#
# The card of this network, `data/runs/cifar10-pictures/README.md`, says how it was trained and measured, and what it is
# not for.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below.

# %%
# What the checks of the exercises expect; there is no need to read this cell.
half_life = 500_000
images_per_step = 512
kept = 0.5 ** (images_per_step / half_life)
losses_v = torch.linspace(0.3, 0.05, 1000, dtype=torch.float64)

lesson.exercise(
    "7.1",
    expected=1 - kept,
    mistakes={
        "That is what is kept, 1 - a.": kept,
        "Close, but that forgets a factor e, not 2.": images_per_step / half_life,
    },
)
lesson.exercise(
    "7.2",
    expected=losses_v / (snr + 1),
    mistakes={
        "Upside down: at the noisy end an error in v is one in x0.": losses_v
        * (snr + 1),
        "That is the conversion from the loss on the noise.": losses_v / snr,
        "Errors are divided by the root of SNR + 1, losses by its square.": losses_v
        / (snr + 1).sqrt(),
    },
)

# %% [markdown]
# **7.1** (●○○, 4 min) The average of the weights forgets half of the past in `half_life` images. After a step of
# `images_per_step` images it moves towards the weights by a fraction $a$: $\bar\theta\leftarrow(1-a)\bar\theta+a\theta$.
# What is $a$?
#
# <details><summary>Hint</summary>
#
# After `half_life / images_per_step` steps, $(1-a)$ to that power must be one half.
#
# </details>

# %%
a = ...
lesson.check("7.1", a)

# %% [markdown]
# **7.2** (●●○, 8 min) `losses_v` are losses on $v$ at all 1000 timesteps, and `snr` is there too. Turn them into losses
# on $x_0$, to see them as errors of an image.
#
# <details><summary>Hint</summary>
#
# A network that predicts $v$ implies $x_0=\alpha x_t-\sigma v$. So an error of $v$ is multiplied by $\sigma$. Write
# $\sigma^2$ with the SNR, using $\alpha^2+\sigma^2=1$.
#
# </details>

# %%
losses_x0 = ...
lesson.check("7.2", losses_x0)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
a = 1 - 0.5 ** (images_per_step / half_life)
lesson.check("7.1", a)

# %% tags=["solution"]
losses_x0 = losses_v / (snr + 1)
lesson.check("7.2", losses_x0)

# %% [markdown]
# ## What you can now do
#
# You can train a diffusion model in a run folder, on whatever device you have. You can look into a training while it
# runs, timestep by timestep and latent by latent, and compare weightings on the same draws.
#
# ## Limitations
#
# - One seed, one learning rate for all weightings. The comparison shows how to look, not which weighting is best.
# - The page as published was executed on a machine that was busy with other work. So the minutes and the milliseconds that
#   it prints are several times those of an idle core.
# - The toy learns ten shapes, and the distance on pixels knows nothing of shapes. It is not FID.
# - The recorded model was trained on a CPU. The GPU cells were checked without a GPU, and no result of a GPU is recorded
#   yet.
#
# ## References
#
# - Ho, Jain, Abbeel (2020), *Denoising diffusion probabilistic models*, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239):
#   the training step and the plain loss on the noise.
# - Salimans, Ho (2022), *Progressive distillation for fast sampling of diffusion models*,
#   [arXiv:2202.00512](https://arxiv.org/abs/2202.00512): predicting $v$.
# - Hang et al. (2023), *Efficient diffusion training via Min-SNR weighting strategy*,
#   [arXiv:2303.09556](https://arxiv.org/abs/2303.09556): the weights used here.
# - Krizhevsky (2009), *Learning multiple layers of features from tiny images*: CIFAR-10.
#
# **Next:** [08, gradient conflicts](08_gradient_conflicts.ipynb). Back to the [map](00_start_here.ipynb).

# %%
lesson.end()
