"""Speed as ratios within one run: our step against diffusers + accelerate by hand, and what each weighting adds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import ImageData
from .draws import generator
from .models import make_model
from .runs import provenance, write_json
from .training import TrainConfig, build, load_split, resolve_device, train_step
from .weightings import WEIGHTINGS, make_weighting


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them once, so drift of the machine is shared."""
    for call in contenders.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _hand_written_step(config: TrainConfig, data: ImageData) -> Callable[[], Any]:
    """The same step as a user of diffusers and accelerate writes it, with EMAModel and a DataLoader."""
    import accelerate
    import diffusers
    from diffusers.training_utils import EMAModel

    device = data.images.device
    precision = "bf16" if device.type == "cuda" else "no"
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    x0 = data.images.cpu().float().div(127.5).sub(1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x0), config.batch_size, shuffle=True, drop_last=True
    )
    torch.manual_seed(config.seed)
    model: Any = make_model(config.model, data.images.shape[-1], data.images.shape[1])
    scheduler = diffusers.DDPMScheduler(config.num_timesteps)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    warmup = diffusers.optimization.get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=100)
    model, optimizer, loader, warmup = accelerator.prepare(model, optimizer, loader, warmup)
    model = torch.compile(model) if device.type == "cuda" else model  # as ours is
    ema = EMAModel(model.parameters(), decay=0.999)
    batches = iter(loader)

    def step() -> float:
        nonlocal batches
        images = next(batches, None)
        if images is None:
            batches = iter(loader)
            images = next(batches)
        clean = images[0]
        clean = torch.where(torch.rand(len(clean), 1, 1, 1, device=clean.device) < 0.5, clean.flip(-1), clean)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, config.num_timesteps, (len(clean),), device=clean.device)
        with accelerator.accumulate(model):
            output = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = torch.nn.functional.mse_loss(output.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach().item()

    return step


def _weighting_call(name: str, config: TrainConfig, schedule: Any, device: torch.device) -> Callable[[], Any]:
    """Forward, backward and optimizer step of a weighting alone on given losses; "mean" is plain losses.mean()."""
    weighting = make_weighting(name, schedule, config.prediction).to(device) if name != "mean" else None
    groups = weighting.parameter_groups(None) if weighting is not None else []
    optimizer = torch.optim.AdamW(groups, fused=True) if groups else None
    draw = generator(0, 0, "benchmark")
    timesteps = torch.randint(0, config.num_timesteps, (config.batch_size,), generator=draw).to(device)
    values = torch.rand(config.batch_size, generator=draw).to(device)

    def call() -> Tensor:
        losses = values.clone().requires_grad_()
        loss = losses.mean() if weighting is None else weighting(losses, timesteps)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return call


def benchmark(
    model: str = "tiny",
    image_size: int = 16,
    batch_size: int = 32,
    *,
    rounds: int = 20,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Print and return medians and ratios of one run; writes them as JSON to `out` if given.

    "ratio" of the step is ours / hand-written (below 1: ours is faster), the median over rounds of the ratio within a
    round. "overhead" of a weighting is its seconds over those of losses.mean(), as a share of our step.
    """
    target = resolve_device(device)
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more; got {rounds}")
    count = max(2048, batch_size)
    config = TrainConfig(
        model=model, image_size=image_size, batch_size=batch_size, images=10**9, train_images=count, device=device
    )
    data = load_split(config, "train", target)
    state = build(config, data)
    steps = {
        "dysigma": lambda: train_step(state, data, config),
        "diffusers + accelerate": _hand_written_step(config, data),
    }
    seconds = time_in_turn(steps, rounds, target)
    ours, theirs = (statistics.median(seconds[name]) for name in steps)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"training step, {model} at {image_size}x{image_size}, batch {batch_size}, {target}")
    print(
        f"  ours {1e3 * ours:.1f} ms ({batch_size / ours:,.0f} img/s), by hand {1e3 * theirs:.1f} ms, ratio {ratio:.3f}"
    )

    # "gramian" needs an optional package, and the work of both kinds that need Gramians lies in computing those.
    names = [name for name in WEIGHTINGS if name not in ("gramian", "ugd")]
    calls = {name: _weighting_call(name, config, state.schedule, target) for name in ["mean", *names]}
    times = {name: statistics.median(values) for name, values in time_in_turn(calls, 20 * rounds, target).items()}
    overhead = {name: (times[name] - times["mean"]) / ours for name in names}
    print("overhead of a weighting, share of the training step")
    for name, share in overhead.items():
        print(f"  {name:16s} {100 * share:6.2f} %   {1e6 * (times[name] - times['mean']):6.0f} us")
    result = {
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "seconds_per_step": {name: statistics.median(values) for name, values in seconds.items()},
        "step_ratio": ratio,
        "weighting_overhead": overhead,
        "provenance": provenance(),
    }
    if out is not None:
        write_json(out, result)
    return result
