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
# # 00 · Start here
#
# > **Claim.** A diffusion model is one network with a thousand tasks, one for each noise level. What the network
# > predicts, and how the losses of the tasks are weighted, decides what a short training gives you.
#
# **You will be able to**
#
# - train a small diffusion model in about a minute, and look at its samples while it learns;
# - put a loss weighting into a training loop with three lines;
# - say which part of a difference comes from the network's target and which from the weights;
# - choose your route through the course.
#
# **You need** Python, and PyTorch at the level of writing a training loop. A short test at the end of this page tells
# you whether the course is for you.
#
# **Time** reading 15 min · running about 60 s (short run 20 s) on one CPU core, or on a GPU if there is one ·
# memory under 1 GB.
#
# **Functions introduced** `dysigma.make_weighting`, `dysigma.sample_losses`, `dysigma.evaluation.sample_images`,
# `dysigma.data.shapes`, `dysigma.data.batch`, `dysigma.make_model`.

# %%
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from dysigma import EMA, NoiseSchedule, make_model, make_weighting, sample_losses
from dysigma.course.lesson import Lesson
from dysigma.data import batch, shapes
from dysigma.evaluation import sample_images
from dysigma.images import tile
from dysigma.runs import read_metrics

lesson = Lesson("00_start_here", trains_on="auto")

# %% [markdown]
# ## The same network, the same images, the same number of steps
#
# We trained one small network four times on the same 48,000 images. Each image shows one bright shape: a circle, a
# square, a triangle, a star, a cross, a ring, a heart, a moon, a diamond or a smile. The network, the images and the
# number of steps were the same in all four runs. Two things differed: what the network predicts, and how the losses of
# the noise levels are weighted.
#
# Each block below shows twenty samples of one run. The network was told which shape to draw, in the order of the list
# above. All four runs used the same learning rate, 0.008. It was not tuned for each run, so read the picture as an
# example and not as a fair race.

# %%
RECORD = Path("../data/runs/first-minute")
records = pd.DataFrame(read_metrics(RECORD / "records.jsonl"))
runs_at_one_rate = records[records["lr"] == 0.008].set_index("objective")

LABELS = {
    "noise, plain loss": "predicts the noise, plain loss (DDPM's training)",
    "image, plain loss": "predicts the image, plain loss",
    "image, min-snr": "predicts the image, Min-SNR weights",
    "image, dy-sigma": "predicts the image, Dy-Sigma weights",
}

pictures = {}
for objective, label in LABELS.items():
    stored = np.load(RECORD / runs_at_one_rate.samples[objective])["images"]
    pictures[label] = stored[:20].transpose(0, 3, 1, 2)

lesson.gallery(
    pictures,
    "00_first_minute",
    columns=10,
    title="Same network, same images: on these shapes the target matters, not the "
    "weights",
    caption="Twenty samples of each run, asked for in the same order, from the same "
    "latents.",
    alt="Four blocks of twenty small pictures. The blocks differ in how clearly one "
    "can name the shapes in them.",
)

# %% [markdown]
# How much of that is the *target* (what the network predicts), and how much is the *weights*? The table measures how
# far 500 samples of each run are from the data: the Fréchet distance between the pixels of samples and of training
# images, lower is better. The first two rows differ in the target. The second, third and fourth differ in the weights.
#
# A sceptic asks whether the noise network had a bad learning rate. So the last row has the same training at a quarter of
# the rate.

# %%
runs_at_lower_rate = records[records["lr"] == 0.002].set_index("objective")
distance = runs_at_one_rate.loc[list(LABELS), "distance"]
distance_at_lower_rate = runs_at_lower_rate.loc["noise, plain loss", "distance"]

table = distance.map("{:.0f}".format).to_frame("distance of samples")
table["learning rate"] = 0.008
table.loc["noise, plain loss, lower rate"] = [f"{distance_at_lower_rate:.0f}", 0.002]
lesson.table(table, mark="noise, plain loss", caption="One seed, 48,000 images")

# %%
of_target = distance["noise, plain loss"] / distance["image, plain loss"]
of_target_at_lower_rate = distance_at_lower_rate / distance["image, plain loss"]
of_min_snr = distance["image, min-snr"] / distance["image, plain loss"]
of_dy_sigma = distance["image, dy-sigma"] / distance["image, plain loss"]
assert of_target > 10, (
    "in this record the target changes the distance more than tenfold"
)
assert of_target_at_lower_rate > 9, "and about as much at a quarter of the rate"
assert 1.04 < of_min_snr < 1.06, "min-snr must be 5 % further from the data"
assert 0.89 < of_dy_sigma < 0.91, "and dy-sigma 10 % nearer"

# %% [markdown]
# The target changes the distance about tenfold, at either rate. Among the networks that predict the image, Min-SNR is 5 %
# further from the data than the plain loss, and Dy-Sigma 10 % nearer. One seed cannot tell so small a difference from
# chance. So compare two weightings only for the same target, and with more than one seed.
# [Page 12](12_the_convergence_race.ipynb) does so on CIFAR-10 and on other data, with five seeds, and says which
# differences are larger than seed noise.
#
# To train these runs again, and at more rates: `data/races/first_minute.py`. On cores shared with other work, a run of the
# record took 8 to 32 minutes.
#
# ## Watch two of them learn
#
# How do the shapes appear? We trained the first and the third of the four networks again. From time to time we stopped,
# and drew samples from the same twenty latents. In each frame, both networks have seen the same images.

# %%
along_noise = np.load(RECORD / "along-noise-plain-loss.npz")
along_image = np.load(RECORD / "along-image-min-snr.npz")

frames = []
for number, seen in enumerate(along_noise["seen"]):
    noise_pictures = along_noise["images"][number].transpose(0, 3, 1, 2)
    image_pictures = along_image["images"][number].transpose(0, 3, 1, 2)
    fig, axes = plt.subplots(2, 1, figsize=(6.6, 3.9), dpi=90)
    axes[0].imshow(tile(noise_pictures, 10), interpolation="nearest")
    axes[0].set_title("predicts the noise, plain loss", loc="left")
    axes[1].imshow(tile(image_pictures, 10), interpolation="nearest")
    axes[1].set_title("predicts the image, Min-SNR", loc="left")
    for ax in axes:
        ax.axis("off")
    fig.suptitle(
        f"Shapes appear sooner if the network predicts the image · {seen:,} images"
    )
    fig.canvas.draw()
    frames.append(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
    plt.close(fig)

lesson.animate(
    frames,
    "00_two_networks_learn",
    title="Shapes appear sooner if the network predicts the image",
    caption="Samples from the same twenty latents while two networks train on the "
    "same images.",
    alt="Two blocks of twenty small pictures that change together. In the lower block "
    "shapes stand out from the background earlier than in the upper one.",
)

# %% [markdown]
# This is one seed and one learning rate again.
#
# ## Your own first minute
#
# Now train one yourself. First the data. `shapes` draws them in memory from a seed; your own folder of pictures or
# CIFAR-10 would come from `dysigma.load_data` in the same form.

# %%
data = shapes(lesson.fast(10_000, 1_000))
data = data.to(lesson.device)  # a GPU if there is one
print(
    len(data),
    "images of",
    tuple(data.images.shape[1:]),
    "in",
    data.num_classes,
    "classes",
)

# %% [markdown]
# **The noise levels.** A schedule says how strong the noise is at each of 1000 timesteps. Timestep 0 is nearly clean,
# timestep 999 nearly pure noise.
#
# **The weights.** The loss at every timestep gets a factor. Min-SNR (Hang et al. 2023) uses
# $\min(\mathrm{SNR}, 5)$ for a network that predicts the image: the signal-to-noise ratio, but never more than 5. All
# weights are divided by their mean. So a weight is 1 on average, and says how much a timestep counts compared with the
# others.

# %%
schedule = NoiseSchedule.cosine(1000)
weighting = make_weighting("min-snr", schedule, prediction_type="sample")

snr = schedule.log_snr.exp()
by_hand = snr.clamp(max=5)
by_hand = (by_hand / by_hand.mean()).float()
torch.testing.assert_close(weighting.weights(), by_hand)

# %% [markdown]
# **The loop.** The network, the schedule and the weighting go to the device of the page: a GPU if PyTorch finds one.
# The first line of output above says which. This is all there is to using a weighting. `sample_losses` returns one loss
# for each image, *not* their mean. `weighting` turns losses and timesteps into the number on which to call `backward`.

# %%
IMAGES = lesson.fast(12_800, 1_280)
BATCH = 32

torch.manual_seed(0)
model = make_model("tiny", image_size=16, num_classes=data.num_classes)
for part in (model, schedule, weighting):
    part.to(lesson.device)
average = EMA(model, half_life=500_000)
optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)


def train_step(step):
    x0, labels, _ = batch(data, seed=0, step=step, batch_size=BATCH)
    timesteps = torch.randint(0, 1000, (BATCH,), device=lesson.device)
    noise = torch.randn_like(x0)
    losses = sample_losses(  # one loss for each image: (B,)
        model, schedule, x0, noise, timesteps, "sample", class_labels=labels
    )
    loss = weighting(losses, timesteps)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    average.update(model, images_seen=(step + 1) * BATCH, batch_size=BATCH)
    return loss.item()


# %% [markdown]
# Samples are drawn with the average of the weights along training, which is less noisy than the last ones.

# %%
averaged_model = copy.deepcopy(model)


def draw_samples(count):
    average.copy_to(averaged_model)
    return sample_images(
        averaged_model,
        schedule,
        (count, 3, 16, 16),
        prediction_type="sample",
        num_steps=25,
    )


# %% [markdown]
# Before it runs, guess. The first loss is that of a network that knows nothing. How many times smaller is the loss at
# the end? Write a number in place of `None`, or leave it.

# %%
QUESTION = "First loss divided by the mean of the last 50 losses?"
lesson.predict(QUESTION, None)

# %%
STEPS = IMAGES // BATCH
loss_curve = []
samples_along = {}
for step in range(STEPS):
    loss_curve.append(train_step(step))
    is_milestone = step + 1 in (STEPS // 8, STEPS // 3, STEPS)
    if is_milestone:
        samples_along[f"after {(step + 1) * BATCH:,} images"] = draw_samples(20)

last_loss = float(np.mean(loss_curve[-50:]))
lesson.reveal(QUESTION, loss_curve[0] / last_loss)

# %%
images_seen = BATCH * np.arange(1, STEPS + 1)
smooth = pd.Series(loss_curve).rolling(25, min_periods=1).mean()

fig, ax = plt.subplots(figsize=(7, 3.4))
ax.plot(images_seen, loss_curve, color="0.8", linewidth=0.7)
ax.plot(images_seen, smooth, color="C0", linewidth=2)
ax.set(xlabel="images trained on", ylabel="weighted loss", yscale="log")
lesson.show(
    fig,
    "00_loss_curve",
    title="The loss falls fast, then slowly",
    caption="Grey: each step. Blue: a running mean of 25 steps. The steps differ "
    "mostly because each draws other timesteps.",
    alt="The weighted loss against images on a logarithmic axis: a steep fall at "
    "first, then a slow one, with noise all along.",
)

# %%
lesson.gallery(
    samples_along,
    "00_samples_along",
    columns=10,
    title="Colour comes first, then shape",
    caption="Samples of the same twenty latents at three moments of your training.",
    alt="Three blocks of twenty small pictures: blurred at first, then coloured "
    "blobs, and in the last block some shapes.",
)

# %% [markdown]
# You should see colours early and shapes later. Colours are decided at high noise, where an image is little more than
# its mean; edges are decided at low noise. Each noise level is a task of its own, all tasks share one network, and the
# weights say how much each task counts. That is the subject of this course.
#
# In a full run the shapes are still rough: this was about a quarter of the training of the picture at the top.

# %%
assert last_loss < loss_curve[0] / 3, "the loss must fall at least to a third"
assert samples_along[f"after {IMAGES:,} images"].shape == (20, 3, 16, 16), (
    "twenty samples"
)

# %% [markdown]
# **Try it yourself.** In the cell that makes `weighting`, first delete the last line, which checks the formula of
# Min-SNR. Then take `"const-x0"` (the plain loss), `"p2"`, or `"dy-sigma"`, which learns while you train. For a
# weighting that learns, give its parameters to the optimizer as well:
# `torch.optim.AdamW([{"params": model.parameters()}, *weighting.parameter_groups()], lr=8e-3)`.
#
# ## The map
#
# | page | question it answers |
# |---|---|
# | 00 Start here | you are here |
# | [01 Forward process and SNR](01_forward_process_and_snr.ipynb) | what is a noise schedule, in one number per timestep? |
# | [02 One network, many objectives](02_one_network_many_objectives.ipynb) | does training one noise level hurt another? |
# | [03 SNR weightings](03_snr_weightings.ipynb) | where do Min-SNR and its relatives come from? |
# | [04 Weightings in the wild](04_weightings_in_the_wild.ipynb) | is the weighting in a trainer what its name claims? |
# | [05 Learnable weightings](05_learnable_weightings.ipynb) | what do learned weights converge to, and why do they fluctuate? |
# | [06 Dy-Sigma derived](06_dy_sigma_derived.ipynb) | which formulas fit the abstract, and what does each minimise? |
# | [07 Train a compact DDPM](07_train_a_compact_ddpm.ipynb) | a real model, on CIFAR-10, on your GPU if you have one |
# | [08 Gradient conflicts](08_gradient_conflicts.ipynb) | do the timesteps pull apart, once noise is accounted for? |
# | [09 Acting on conflicts](09_acting_on_conflicts.ipynb) | can a step spare every noise level? |
# | [10 Pareto trade-offs](10_pareto_trade_offs.ipynb) | what is the best any weighting could do? |
# | [11 Measuring a speed-up](11_measuring_a_speed_up.ipynb) | how does one say "so many times faster" honestly? |
# | [12 The convergence race](12_the_convergence_race.ipynb) | is it 3.7 times faster, and than what? |
# | [13 Your own loop](13_your_own_loop.ipynb) | your own training loop, data and weighting |
# | [14 Text-guided adaptation, and the capstone](14_text_guided_and_capstone.ipynb) | faster at a new task, or everywhere? Then a project of your own |
#
# **Three routes.** *The 45-minute tour:* this page, 01 up to and with “Where do the timesteps go?”, the first two
# sections of 03, then 12. *The full course:* in order; each page says what it needs and how long it takes. *Only the
# package:* the loop above, then 13.
#
# **About the name.** Dy-Sigma was published by Liu, Ye, Liu and Qin at IJCNN 2024. When we last looked, in November 2026,
# we found no more of it than its abstract. What this course contains is an **independent reconstruction from that
# abstract**: a family of formulas that fit its words, each derived and tested. It is not the authors' code. Where our
# results differ from theirs, our reading may be wrong.
#
# ## Exercises
#
# Replace each `...` and run the cell; the check says what is wrong. Solutions are collapsed below. The third exercise
# is the test of what you need for the rest of the course.

# %%
# What the checks of the exercises expect; there is no need to read this cell.
timesteps = torch.tensor([3, 250, 500, 999])
losses_of_batch = torch.tensor([0.1, 0.2, 0.4, 0.9])
weighting = weighting.cpu()  # the numbers of the exercises are small
w = weighting.weights()
weighted_sum = (w[timesteps] * losses_of_batch).sum()
x = torch.linspace(-1, 1, 8 * 3 * 16 * 16).view(8, 3, 16, 16)
y = torch.zeros_like(x)
squared_errors = torch.nn.functional.mse_loss(x, y, reduction="none")

lesson.exercise(
    "0.1",
    expected=5.0,
    mistakes={
        "That is the SNR; the weight is never more than 5.": 20.0,
        "That is the weight for a network that predicts the noise.": 0.25,
    },
)
lesson.exercise(
    "0.2",
    expected=weighting(losses_of_batch, timesteps),
    mistakes={
        "That is the plain mean: no weights yet.": losses_of_batch.mean(),
        "That is a sum; take the mean over the batch.": weighted_sum,
        "Do not divide by the weights of this batch.": weighted_sum
        / w[timesteps].sum(),
    },
)
lesson.exercise(
    "0.3",
    expected=squared_errors.mean((1, 2, 3)),
    mistakes={
        "That is the sum over an image, not the mean.": squared_errors.sum((1, 2, 3)),
        "That is one number for the whole batch.": squared_errors.mean().expand(8),
    },
)

# %% [markdown]
# **0.1** (●○○, 2 min) A timestep has SNR 20. The network predicts the image. What is its Min-SNR weight (γ = 5) before
# the division by the mean?
#
# <details><summary>Hint</summary>
#
# The formula stands above the cell that makes `weighting`.
#
# </details>

# %%
weight_at_snr_20 = ...
lesson.check("0.1", weight_at_snr_20)

# %% [markdown]
# **0.2** (●●○, 5 min) What does `weighting(losses, timesteps)` compute? Get the same number from `losses_of_batch`,
# `timesteps` and `w = weighting.weights()`, which holds one weight for each of the 1000 timesteps.
#
# <details><summary>Hint</summary>
#
# Index the weights with the timesteps of the batch, multiply, and take a mean over the batch.
#
# </details>

# %%
loss = ...
lesson.check("0.2", loss)

# %% [markdown]
# **0.3** (●○○, 5 min) The test. `x` is a batch of 8 images with 3 channels and 16 × 16 pixels, and `y` another. Compute
# the mean squared error of *each* image: a tensor of 8 numbers, in one line of PyTorch.
#
# <details><summary>Hint</summary>
#
# Square the difference, flatten everything but the batch dimension, and take the mean over what you flattened.
#
# </details>

# %%
error_of_each_image = ...
lesson.check("0.3", error_of_each_image)

# %% [markdown]
# ### Solutions

# %% tags=["solution"]
weight_at_snr_20 = min(20.0, 5.0)
lesson.check("0.1", weight_at_snr_20)

# %% tags=["solution"]
loss = (weighting.weights()[timesteps] * losses_of_batch).mean()
lesson.check("0.2", loss)

# %% tags=["solution"]
error_of_each_image = (x - y).square().flatten(1).mean(1)
lesson.check("0.3", error_of_each_image)

# %% [markdown]
# ## What you can now do
#
# You can train a small diffusion model with a weighting of the losses, look at its samples along training, and tell an
# effect of the target from an effect of the weights.
#
# ## Limitations
#
# - One seed, one small network, pictures of ten shapes. The picture at the top shows that objectives differ. Pages 11
#   and 12 ask how much they differ, and how sure one can be.
# - The distance on pixels is not FID. It compares means and covariances of pixels and knows nothing about shapes.
#
# ## References
#
# - Ho, Jain, Abbeel (2020), *Denoising diffusion probabilistic models*: the plain loss on the predicted noise.
# - Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo (2023), *Efficient diffusion training via Min-SNR weighting strategy*:
#   training as a multi-task problem, and the weights used here.
# - Liu, Ye, Liu, Qin (2024), *Dy-Sigma*, IJCNN: the abstract from which this course reconstructs a method.
#
# **Next:** [01, the forward process and SNR](01_forward_process_and_snr.ipynb).

# %%
lesson.end()
