"""Speed within one run: training steps, ours and others', what a weighting adds to them, a report of conflicts."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import ImageData, batch
from ..devices import fast_kernels, resolve_device
from ..gradients.measure import conflicts
from ..models import make_model
from ..objective import sample_losses
from ..randomness import generator
from ..runs.files import write_json
from ..runs.provenance import provenance
from ..schedule import make_schedule
from ..training.config import TrainConfig
from ..training.parts import build, load_split
from ..training.precision import autocast
from ..training.step import train_step
from ..weightings.registry import WEIGHTINGS, make_weighting

BINS, MICRO_BATCHES = 10, 16  # as conflicts has them by default


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them once, so drift of the machine is shared."""
    for call in contenders.values():
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


def _own_step(config: TrainConfig, data: ImageData, **options: Any) -> Callable[[], Any]:
    """Our training step; options compile the network in another way."""
    state = build(config, data)
    if options:
        state.forward = torch.compile(state.model, fullgraph=True, dynamic=False, **options)  # type: ignore[assignment]
    return lambda: train_step(state, data, config)


def _recipe_step(config: TrainConfig, data: ImageData, low: bool = False) -> Callable[[], Any]:
    """A step of diffusers' train_unconditional.py with EMA and its other defaults, on the same network and images.

    Pictures are decoded already. low: with --mixed_precision bf16, which casts images, noise and schedule too.
    """
    import accelerate
    import diffusers
    import numpy
    from diffusers.training_utils import EMAModel
    from PIL import Image, ImageOps

    device, dtype = data.images.device, torch.bfloat16 if low else torch.float32
    pictures = [Image.fromarray(image) for image in data.images.permute(0, 2, 3, 1).cpu().numpy()]

    def collate(chosen: list[Any]) -> Tensor:
        turned = [
            ImageOps.mirror(picture) if torch.rand(()) < 0.5 else picture for picture in chosen
        ]
        return torch.stack(
            [torch.from_numpy(numpy.array(x)).permute(2, 0, 1).div(127.5).sub(1) for x in turned]
        )

    options: Any = {
        "shuffle": True,
        "collate_fn": collate,
        "drop_last": True,
    }  # all batches of the size that is timed
    loader: Any = torch.utils.data.DataLoader(pictures, config.batch_size, **options)  # type: ignore[arg-type]
    accelerator, model = accelerate.Accelerator(cpu=device.type == "cpu"), _network(config, data)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6
    )
    rate = diffusers.optimization.get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=10**5
    )
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    ema, scheduler = (
        EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True),
        diffusers.DDPMScheduler(),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        clean = next(batches).to(dtype)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device.type, dtype, enabled=low):
            output = model(noisy, timesteps).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach().item()

    return step


def _lucidrains_step(config: TrainConfig, data: ImageData) -> Callable[[], Any]:
    """A step of denoising-diffusion-pytorch's Trainer around the same network, spared its data loading and its EMA."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion

    network = _network(config, data)
    plain, wanted = (
        network.forward,
        {"channels": 3, "out_dim": 3, "forward": lambda x, t, _: plain(x, t).sample},
    )
    for name, value in (
        wanted | {"self_condition": False, "random_or_learned_sinusoidal_cond": False}
    ).items():
        setattr(network, name, value)
    diffusion = GaussianDiffusion(network, image_size=data.images.shape[-1], objective="pred_noise")
    diffusion.to(data.images.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    steps = itertools.count()

    def step() -> float:
        images, _, _ = batch(data, 0, next(steps), config.batch_size)
        loss = diffusion(images.add(1).div(2))
        loss.backward()
        total = loss.item()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _network(config: TrainConfig, data: ImageData) -> Any:
    return make_model(config.model, data.images.shape[-1], data.images.shape[1]).to(
        data.images.device
    )


def _parts(config: TrainConfig, data: ImageData) -> dict[str, Callable[[], Any]]:
    """The parts of our step, each as a call of its own."""
    state, steps = build(config, data), itertools.count()
    train_step(state, data, config)
    draws = batch(data, 0, 0, config.batch_size)[0]
    noise, timesteps = (
        torch.randn_like(draws),
        torch.arange(config.batch_size, device=draws.device) % 1000,
    )

    def losses() -> Tensor:
        with autocast(config, draws.device):
            return sample_losses(
                state.forward, state.schedule, draws, noise, timesteps, config.prediction
            )

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
        state.optimizer.step()

    return {
        "images and noise": lambda: torch.randn_like(
            batch(data, 0, next(steps), config.batch_size)[0]
        ),
        "forward": losses,
        "forward and backward": lambda: losses().mean().backward(),
        "optimizer": update,
        "EMA": lambda: state.ema.update(state.model, 10**6, config.batch_size),
    }


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of one large matrix product, the fastest of ten: bfloat16 on CUDA, else float32."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(time_in_turn({"": lambda: a @ a}, 10, device)[""])


def flops_per_image(preset: str, image_size: int) -> int:
    """FLOP of one image in a training step, 2 for each multiply-add; a backward pass counts as two forward passes."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(preset, image_size).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(
            torch.empty(1, 3, image_size, image_size, device="meta"),
            torch.zeros(1, device="meta").long(),
        )
    return 3 * counter.get_total_flops()


def step_costs(
    config: TrainConfig, rounds: int, device: torch.device, peak: float
) -> dict[str, Any]:
    """Print and return what training steps of one batch size cost, ours and others', by name.

    "fails" with the reason, or "seconds" (median), "images_per_second", "flops" per second and its "share" of peak,
    "ratio" of its seconds to ours (median over rounds), "bytes" at the peak (CUDA alone). "parts" has the seconds of
    the parts of ours.
    """
    torch.compiler.reset()  # else the ninth network of another size or batch is refused
    data = load_split(config, "train", device)
    makers: dict[str, Any] = {"dysigma": _own_step, "diffusers recipe": _recipe_step}
    makers |= {"diffusers recipe, bf16": functools.partial(_recipe_step, low=True)}
    makers |= {"denoising-diffusion-pytorch": _lucidrains_step}
    if device.type == "cuda":
        makers["dysigma, CUDA graphs"] = functools.partial(_own_step, mode="reduce-overhead")
    flops, calls = flops_per_image(config.model, data.images.shape[-1]), {}
    results: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
            call = make(config, data)
            call()  # allocates the optimizer's state
            calls[name], results[name] = call, {"bytes": cuda_peak(call, device, before)}
        except Exception as error:  # what cannot run here is part of the result
            if name == "dysigma":
                raise ValueError(
                    f"our step fails with batch size {config.batch_size}: {error}"
                ) from error
            results[name] = {"fails": f"{type(error).__name__}: {error}".partition("\n")[0]}
    seconds = time_in_turn(calls, rounds, device)
    print(
        f"training step, {config.model} at {data.images.shape[-1]} pixels, batch {config.batch_size}, {device}"
    )
    for name, row in results.items():
        if name not in seconds:
            print(f"  {name:28s} fails: {row['fails']}")
            continue
        time_, pairs = (
            statistics.median(seconds[name]),
            zip(seconds[name], seconds["dysigma"], strict=True),
        )
        speed = config.batch_size / time_
        row |= {
            "seconds": time_,
            "images_per_second": speed,
            "flops": speed * flops,
            "share": speed * flops / peak,
        }
        row |= {"ratio": statistics.median(a / b for a, b in pairs)}
        memory = "" if row["bytes"] is None else f"   {row['bytes'] / 2**20:8.0f} MiB"
        print(
            f"  {name:28s} {1e3 * time_:9.1f} ms   {speed:9,.0f} img/s   {speed * flops / 1e12:8.3f} TFLOP/s   "
            f"{row['share']:5.1%} of a matrix product   {row['ratio']:5.2f} x ours{memory}"
        )
    parts = {
        k: statistics.median(v)
        for k, v in time_in_turn(_parts(config, data), rounds, device).items()
    }
    print(
        "  parts of ours: "
        + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in parts.items())
    )
    return {"batch_size": config.batch_size, "steps": results, "parts": parts}


def cuda_peak(call: Callable[[], Any], device: torch.device, before: int | None) -> int | None:
    """Bytes allocated on a CUDA device at the peak of a call, above those before; None elsewhere."""
    if before is None:
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _weighting_call(
    name: str, config: TrainConfig, schedule: Any, device: torch.device
) -> Callable[[], Any]:
    """Forward, backward and optimizer step of a weighting alone on given losses; "mean" is plain losses.mean()."""
    weighting = (
        make_weighting(name, schedule, config.prediction).to(device) if name != "mean" else None
    )
    groups = weighting.parameter_groups(None) if weighting is not None else []
    optimizer = torch.optim.AdamW(groups, fused=True) if groups else None
    draw = generator(0, 0, "benchmark")
    timesteps = torch.randint(0, config.num_timesteps, (config.batch_size,), generator=draw).to(
        device
    )
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


def conflict_costs(
    config: TrainConfig, rounds: int, device: torch.device, step: float
) -> dict[str, Any]:
    """Print and return what a report of conflicts costs beside our training steps, of `step` seconds each.

    "seconds" is the median for one micro-batch of BINS bins, and as many samples in each as make up batch_size; "ratio"
    the training steps on as many samples that take as long.
    """
    data, per_bin = load_split(config, "train", device), -(-config.batch_size // BINS)
    model, schedule = _network(config, data), config.noise_schedule().to(device)
    x0 = (
        data.images[torch.arange(BINS * per_bin, device=device) % len(data)]
        .float()
        .div(127.5)
        .sub(1)
    )
    options: dict[str, Any] = {
        "micro_batches": MICRO_BATCHES,
        "batch_per_bin": per_bin,
        "progress": False,
    }
    calls = {"": lambda: conflicts(model, x0, schedule, BINS, **options)}
    seconds = statistics.median(time_in_turn(calls, rounds, device)[""]) / MICRO_BATCHES
    ratio = seconds / step * config.batch_size / (BINS * per_bin)
    print(
        f"gradient conflicts of {BINS} bins, {per_bin} samples of each: {ratio:.2f} of our training steps on as many"
    )
    return {
        "bins": BINS,
        "batch_per_bin": per_bin,
        "micro_batches": MICRO_BATCHES,
        "seconds": seconds,
        "ratio": ratio,
    }


def weighting_costs(
    config: TrainConfig, rounds: int, device: torch.device, step: float
) -> dict[str, float]:
    """Print and return the seconds of each weighting above those of losses.mean(), as a share of `step` seconds."""
    # "gramian" needs an optional package, and the work of both kinds that need Gramians lies in computing those.
    names = [name for name in WEIGHTINGS if name not in ("gramian", "ugd")]
    schedule = make_schedule(config.schedule, config.num_timesteps).to(device)
    calls = {name: _weighting_call(name, config, schedule, device) for name in ["mean", *names]}
    times = {
        name: statistics.median(values)
        for name, values in time_in_turn(calls, rounds, device).items()
    }
    print("overhead of a weighting, share of the training step")
    for name in names:
        over = times[name] - times["mean"]
        print(f"  {name:16s} {100 * over / step:6.2f} %   {1e6 * over:6.0f} us")
    return {name: (times[name] - times["mean"]) / step for name in names}


def _draw(result: dict[str, Any], path: Path) -> None:
    """Images per second of everything that ran, at each batch size."""
    import matplotlib.pyplot as plt

    from .. import plots

    plots.use_style()
    fig, axes = plt.subplots(
        1, len(result["steps"]), squeeze=False, figsize=(5.5 * len(result["steps"]), 3)
    )
    for ax, cost in zip(axes[0], result["steps"], strict=True):
        rows = {name: row for name, row in cost["steps"].items() if "fails" not in row}
        bars = ax.barh(list(rows), [row["images_per_second"] for row in rows.values()])
        ax.bar_label(
            bars,
            [f"{row['images_per_second']:,.0f}, {row['share']:.0%}" for row in rows.values()],
            padding=3,
        )
        ax.set(
            title=f"{result['model']}, batch {cost['batch_size']}",
            xlabel="images/s, % of a matrix product",
        )
        ax.invert_yaxis()
        ax.margins(x=0.3)
    fig.savefig(path, dpi=110)


def benchmark(
    model: str = "tiny",
    image_size: int = 16,
    batch_sizes: Sequence[int] = (32,),
    *,
    rounds: int = 20,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Print and return costs measured in one run; writes them as JSON to `out`, and a figure beside it, if given.

    "steps" has step_costs for each batch size; "weighting_overhead" is what weighting_costs returns and "conflicts"
    what conflict_costs returns for the first.
    """
    target = resolve_device(device)
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(
            f"rounds and batch_sizes must be 1 or more; got {rounds}, {[*batch_sizes]}"
        )
    count = max(2048, *batch_sizes)
    config = TrainConfig(
        model=model, image_size=image_size, images=count, train_images=count, device=device
    )
    with fast_kernels(target):
        peak = matmul_peak(target)
        print(
            f"one matrix product: {peak / 1e12:.3f} TFLOP/s; 2 FLOP per multiply-add, forward and backward 3 forward"
        )
        costs = [
            step_costs(replace(config, batch_size=size), rounds, target, peak)
            for size in batch_sizes
        ]
    step, config = (
        costs[0]["steps"]["dysigma"]["seconds"],
        replace(config, batch_size=batch_sizes[0]),
    )
    result: dict[str, Any] = {
        "model": model,
        "image_size": image_size,
        "rounds": rounds,
        "matmul_flops": peak,
    }
    result |= {"flops_per_image": flops_per_image(model, image_size), "steps": costs}
    result["weighting_overhead"] = weighting_costs(config, 20 * rounds, target, step)
    result["conflicts"] = conflict_costs(config, max(1, rounds // 4), target, step)
    result["provenance"] = provenance()
    if out is not None:
        write_json(out, result)
        _draw(result, out.with_suffix(".png"))
    return result
