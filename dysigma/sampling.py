"""Samples of a trained denoiser, drawn with the schedulers of diffusers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_name
from .devices import compile_problem, fast_kernels, in_parts_that_fit
from .images import to_uint8
from .objective import predict
from .randomness import generator
from .schedule import NoiseSchedule, check_schedule

# Names of samplers -> schedulers of diffusers, without the word Scheduler.
SAMPLERS = {
    "ddim": "DDIM",
    "dpm-solver": "DPMSolverMultistep",
    "heun": "HeunDiscrete",
    "ddpm": "DDPM",
}

# On a rectified flow. DDIM is Euler's method there: both are exact where x0 and noise stay the same.
FLOW_SAMPLERS = {
    "ddim": "FlowMatchEulerDiscrete",
    "euler": "FlowMatchEulerDiscrete",
    "heun": "FlowMatchHeunDiscrete",
}

# Compiling a network takes a minute, which pays on a GPU from so many images on.
COMPILE_FROM = 20_000

# torch.quantile, which dpm-solver calls, takes no larger tensor.
_LARGEST_QUANTILE = 2**24

# (x_t, timestep) -> what the network predicts
_Denoise = Callable[[Tensor, int], Tensor]


def check_sampling(schedule: NoiseSchedule, sampler: str, num_steps: int, count: int) -> None:
    """Raise what sample_images does for a bad sampler or number, before a network is there.

    >>> check_sampling(NoiseSchedule.linear(), "ddim", num_steps=50, count=16)
    """
    check_schedule(schedule)
    if schedule.is_flow:
        if sampler in SAMPLERS and sampler not in FLOW_SAMPLERS:
            raise ValueError(
                f"{sampler} is for variance-preserving schedules; on a flow choose ddim, which is "
                "Euler's method there, or heun"
            )
        check_name("sampler", sampler, FLOW_SAMPLERS)
    else:
        check_name("sampler", sampler, SAMPLERS)
    if count < 1 or not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(
            f"need 1 image or more and num_steps from 1 to {schedule.num_timesteps}; "
            f"got {count} and {num_steps}"
        )
    divides_by_alpha = sampler in ("dpm-solver", "heun") and not schedule.is_flow
    if divides_by_alpha and schedule.log_snr[-1] == -math.inf:
        raise ValueError(
            f"{sampler} divides by alpha, which is 0 at the last step of this schedule; "
            "use ddim or ddpm"
        )


@torch.no_grad()
def sample_images(
    model: nn.Module,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int, int],
    *,
    prediction_type: str = "epsilon",
    sampler: str = "ddim",
    num_steps: int = 50,
    seed: int = 0,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    compile: bool | None = False,
    precision: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw images with a diffusers scheduler: (N, C, H, W) uint8 on the model's device.

    shape: (N, C, H, W).
    sampler: "ddim" (Song, Meng, Ermon 2021; on a flow, Euler's method), "heun" (Karras et al. 2022,
        second order), "dpm-solver" (DPM-Solver++ 2M; it amplifies the errors that a briefly trained
        network makes at the noisiest timesteps, into saturated colours) or "ddpm" (ancestral; use
        num_steps near T). The last two are not for flows. Predicted images are clipped to [-1, 1].
    num_steps: evaluations of the network for each image, of which heun uses an odd number.
    seed: the latents are a function of (seed, image number).
    labels: (N,), by default the classes in turn of a diffusers network that has classes.
    batch_size: images at a time; by default 256, and 2048 on CUDA. Half as many, and again half,
        where they do not fit in memory. No draw depends on it but those of "ddpm".
    compile: the network, for batches of one size; None does it on CUDA for 20,000 images or
        more, unless the GPU is below compute capability 8 or Triton is missing.
    precision: torch.bfloat16 runs the network under autocast; None as it is.
    On a flow that ends in pure noise, networks that predict the noise start one level later, because
    at SNR 0 they say nothing about the image.
    Raises KeyError for an unknown sampler, ValueError for numbers out of range, for a sampler that
    the path does not have, or for samples that are not finite.
    """
    from tqdm.auto import tqdm

    count = shape[0]
    check_sampling(schedule, sampler, num_steps, count)
    kind = schedule.canonical(prediction_type)
    labels = _labels_in_turn(model, labels, count)
    device = next(model.parameters()).device
    if compile is None:
        compile = _is_worth_compiling(device, count)
    network: Any = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
    size = _batch_size(batch_size, shape, sampler, device)
    path = _FlowPath if schedule.is_flow else _DiffusionPath
    title = f"sampling ({sampler}, {num_steps} steps)"

    def draw(numbers: range) -> Tensor:
        if not compile:  # else the last batch is as large as the others: the surplus is cut off
            numbers = numbers[: count - numbers.start]
        first = numbers.start
        noise = generator(seed, first, "sampler noise", device) if sampler == "ddpm" else None
        kwargs = {}
        if labels is not None:
            places = [number % count for number in numbers]
            kwargs["class_labels"] = labels[places].to(device)
        denoise = functools.partial(_denoise, network, precision, kwargs)
        steps = path(schedule, kind, sampler, num_steps)
        images = steps.run(denoise, _latents(numbers, shape, seed, device), noise)
        if not images.isfinite().all():
            raise ValueError(
                f"{sampler}, {num_steps} steps: values are not finite. Is the network whole?"
            )
        return to_uint8(images)

    was_training = model.training
    model.eval()
    done = []
    with (
        tqdm(total=count, unit="img", desc=title, disable=not progress) as bar,
        fast_kernels(device),
    ):
        for images in in_parts_that_fit(draw, count, size):
            done.append(images)
            bar.update(min(len(images), count - bar.n))
    model.train(was_training)
    return torch.cat(done)[:count]


def _is_worth_compiling(device: torch.device, count: int) -> bool:
    """Whether so many images repay the minute of compiling, on a device where that works."""
    is_usable = device.type == "cuda" and compile_problem(device) is None
    return is_usable and count >= COMPILE_FROM


def _labels_in_turn(model: nn.Module, labels: Tensor | None, count: int) -> Tensor | None:
    classes = getattr(getattr(model, "config", None), "num_class_embeds", None)
    if labels is None and classes:
        return torch.arange(count) % classes
    if labels is not None and len(labels) != count:
        raise ValueError(f"need one label for each of {count} images; got {len(labels)}")
    return labels


def _batch_size(
    wanted: int | None, shape: Sequence[int], sampler: str, device: torch.device
) -> int:
    size = wanted or (2048 if device.type == "cuda" else 256)
    if sampler == "dpm-solver":
        size = min(size, max(1, _LARGEST_QUANTILE // math.prod(shape[1:])))
    return min(size, shape[0])


def _latents(numbers: range, shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Gaussian latents, each a function of the seed and the number of the image alone."""
    draws = [generator(seed, number, "latent", device) for number in numbers]
    return torch.stack([torch.randn(shape[1:], generator=draw, device=device) for draw in draws])


def _denoise(
    network: Any, precision: torch.dtype | None, kwargs: dict[str, Tensor], x: Tensor, t: int
) -> Tensor:
    """The network's output (B, C, H, W) float32 at timestep t."""
    timesteps = torch.full((len(x),), t, device=x.device)
    lower = torch.autocast(x.device.type, precision) if precision else nullcontext()
    with lower:
        return predict(network, x, timesteps, **kwargs).float()


class _DiffusionPath:
    """Steps along a variance-preserving schedule, as a scheduler of diffusers makes them."""

    def __init__(self, schedule: NoiseSchedule, kind: str, sampler: str, num_steps: int) -> None:
        import diffusers

        options: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": True}
        if sampler == "dpm-solver":  # which clips to [-1, 1] by another name
            del options["clip_sample"]
            options["thresholding"] = True
            options["dynamic_thresholding_ratio"] = 1.0
            options["sample_max_value"] = 1.0
        scheduler_class = getattr(diffusers, f"{SAMPLERS[sampler]}Scheduler")
        self.scheduler = schedule.to_diffusers(scheduler_class, kind, **options)
        self.scheduler.set_timesteps(_levels(sampler, num_steps))

    def run(self, denoise: _Denoise, x: Tensor, noise: torch.Generator | None) -> Tensor:
        """From Gaussian latents to images in about [-1, 1]."""
        scheduler = self.scheduler
        options = {} if noise is None else {"generator": noise}
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:  # on the host, where diffusers looks them up
            output = denoise(scheduler.scale_model_input(x, t), int(t))
            x = scheduler.step(output, t, x, **options).prev_sample
        return x


class _FlowPath:
    """Steps along a rectified flow, as a scheduler of diffusers makes them from velocities.

    diffusers takes its levels between the largest and the smallest, evenly spaced. Ours are those of
    timesteps evenly spaced, because a network here is called with the number of its timestep.
    """

    def __init__(self, schedule: NoiseSchedule, kind: str, sampler: str, num_steps: int) -> None:
        import diffusers

        self.schedule = schedule
        self.kind = kind
        scheduler_class = getattr(diffusers, f"{FLOW_SAMPLERS[sampler]}Scheduler")
        self.scheduler = scheduler_class(num_train_timesteps=schedule.num_timesteps)
        total = schedule.num_timesteps
        # (x_t - sigma noise) / alpha is no image where alpha is 0: start one level later.
        if kind == "epsilon" and schedule.log_snr[-1] == -math.inf:
            total -= 1
        count = min(_levels(sampler, num_steps), total)
        spaced = torch.arange(count, dtype=torch.float64) * total / count
        timesteps = (total - spaced).round().long() - 1  # "trailing", as on the other path
        sigmas = schedule.sigma.cpu()[timesteps]
        if sampler == "heun":  # each level but the first is visited twice
            timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
            repeated = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), torch.zeros(1)])
            self.scheduler.set_timesteps(count)
            self.scheduler.sigmas = repeated
            self.scheduler.timesteps = repeated[:-1] * schedule.num_timesteps
        else:
            self.scheduler.set_timesteps(sigmas=sigmas.tolist())
        self.timesteps = timesteps.tolist()

    def run(self, denoise: _Denoise, x: Tensor, noise: torch.Generator | None) -> Tensor:
        """From Gaussian latents to images in about [-1, 1]."""
        for t, level in zip(self.timesteps, self.scheduler.timesteps, strict=True):
            velocity = self._velocity(denoise(x, t), x, t)
            x = self.scheduler.step(velocity, level, x).prev_sample
        return x

    def _velocity(self, output: Tensor, x: Tensor, t: int) -> Tensor:
        """noise - x0 = (x_t - x0) / sigma, with the predicted x0 clipped to the range of images."""
        timesteps = torch.full((len(x),), t, device=x.device)
        x0 = self.schedule.to_x0(output, x, timesteps, self.kind).clamp(-1, 1)
        return (x - x0) / self.schedule.sigma[t]


def _levels(sampler: str, num_steps: int) -> int:
    """Levels to visit: heun evaluates the network twice at each but the first."""
    return (num_steps + 1) // 2 if sampler == "heun" else num_steps
