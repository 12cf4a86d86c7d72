"""Speed as ratios within one run: training steps, what a weighting adds to them, what a report of conflicts costs."""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bins import Bins
from .data import ImageData
from .draws import generator
from .gradients import bin_gramian, bin_timesteps, conflicts
from .models import make_model
from .objective import sample_losses
from .runs import provenance, write_json
from .schedule import make_schedule
from .training import TrainConfig, build, load_split, resolve_device, train_step
from .weightings import WEIGHTINGS, make_weighting

BINS, MICRO_BATCHES = 10, 16  # as conflicts has them by default


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
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


def _routes(preset: str, image_size: int, per_bin: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Calls that compute the Gramian (K, K) of the bins' mean losses on one batch, each in its own way.

    The first two return none: MICRO_BATCHES forward and backward passes of the mean loss of per_bin samples of each
    bin, and the report of as many such batches. In float32, not compiled.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(preset, image_size).to(device)
    schedule, bins = make_schedule("cosine").to(device), Bins.uniform(1000, BINS).to(device)
    draw, parameters = generator(0, 0, "benchmark"), list(model.parameters())
    timesteps = bin_timesteps(bins, per_bin, draw).flatten().to(device)
    x0, noise = torch.randn(2, len(timesteps), 3, image_size, image_size, generator=draw).to(device)
    losses = functools.partial(sample_losses, model, schedule, x0, noise, timesteps)

    def steps() -> None:
        for _ in range(MICRO_BATCHES):
            model.zero_grad()
            losses().mean().backward()

    def report() -> None:
        conflicts(model, x0, schedule, bins, micro_batches=MICRO_BATCHES, batch_per_bin=per_bin, progress=False)

    def means() -> Tensor:
        return losses().view(BINS, per_bin).mean(1)

    @functools.cache
    def autogram(batch_dim: int | None) -> Callable[[Tensor], Tensor]:
        from torchjd.autogram import Engine

        return Engine(model, batch_dim=batch_dim).compute_gramian

    def gramian(jacobians: Iterable[Tensor]) -> Tensor:
        blocks = (jacobian.flatten(1).double() for jacobian in jacobians)
        return torch.stack([block @ block.T for block in blocks]).sum(0)

    def jac() -> Tensor:
        from torchjd import autojac

        return gramian(autojac.jac(means(), parameters, parallel_chunk_size=1))

    def retained() -> Tensor:
        rows = [torch.autograd.grad(mean, parameters, retain_graph=True) for mean in means()]
        return gramian(map(torch.stack, zip(*rows, strict=True)))

    return {
        "training steps": steps,
        "conflicts": report,
        "bin_gramian": lambda: bin_gramian(model, schedule, x0, noise, timesteps, bins, splits=1),
        "TorchJD autogram, per sample": lambda: autogram(0)(losses()).view(BINS, per_bin, BINS, per_bin).mean((1, 3)),
        "TorchJD autogram, per bin": lambda: autogram(None)(means()),
        "TorchJD jac, bin by bin": jac,
        "retained graph": retained,
    }


def _peak_memory(name: str, preset: str, image_size: int, per_bin: int, device: torch.device) -> int | None:
    """Bytes a route takes at its peak above the model and the batch; None where the system does not tell."""
    status = Path("/proc/self/status")
    _routes("micro", 8, 1, device)[name]()  # late imports, lasting buffers
    call = _routes(preset, image_size, per_bin, device)[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not status.exists():
        return None
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    call()
    # Not ru_maxrss of getrusage: on Linux a process inherits that from its parent.
    return 1024 * (int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) - before)


def _measure(name: str, call: Callable[[], Any], expected: Tensor, *batch: Any) -> dict[str, Any]:
    """The error of a route's Gramian, and its memory; ValueError for a Gramian unlike the expected one."""
    found: dict[str, Any] = {}
    gramian = call()
    if gramian is not None:
        found["error"] = float((gramian - expected).abs().max() / expected.abs().max())
        if not found["error"] < 0.01:  # 1e-6 in float32, more where a GPU convolves in TF32
            raise ValueError(f"its Gramian differs by {found['error']:.1%} of the largest entry")
    if expected.is_cuda:
        return found | {"bytes": _peak_memory(name, *batch)}
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # with no memory of another route to use again
        return found | {"bytes": fresh.submit(_peak_memory, name, *batch).result()}


def conflict_costs(preset: str, image_size: int, per_bin: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Print and return what a report of conflicts costs beside training steps and other routes to its Gramians.

    In "routes", "fails" with the reason, or: "seconds" for per_bin samples of each bin (median), "ratio" to a training
    step on as many (quartiles over the rounds), "bytes" at the peak above model and batch, and "error" of the Gramian:
    its largest difference from bin_gramian's as a share of the largest entry.
    """
    batch, calls, results = (preset, image_size, per_bin, device), {}, {}
    expected = _routes(*batch)["bin_gramian"]()
    for name in _routes(*batch):
        call = _routes(*batch)[name]  # a model for each, because autogram leaves hooks in it
        try:
            calls[name], results[name] = call, _measure(name, call, expected, *batch)
        except Exception as error:  # what a route cannot do is part of the result
            results[name] = {"fails": f"{type(error).__name__}: {error}".partition("\n")[0]}
    seconds = time_in_turn(calls, rounds, device)
    for name in ("training steps", "conflicts"):
        seconds[name] = [total / MICRO_BATCHES for total in seconds[name]]
    print(f"gradient conflicts of {BINS} bins, {per_bin} samples of each")
    for name, row in results.items():
        if name in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds["training steps"], strict=True)]
            quartiles = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
            row |= {"seconds": statistics.median(seconds[name]), "ratio": quartiles.tolist()}
            memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:6.0f} MiB"
            print(f"  {name:28s} {1e3 * row['seconds']:8.1f} ms   {row['ratio'][1]:6.2f} steps   {memory}")
        else:
            print(f"  {name:28s} fails: {row['fails']}")
    return {"bins": BINS, "batch_per_bin": per_bin, "micro_batches": MICRO_BATCHES, "routes": results}


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
    "conflicts" is what conflict_costs returns for batch_size samples, rounded up to as many in each bin.
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
        "conflicts": conflict_costs(model, image_size, -(-batch_size // BINS), max(1, rounds // 4), target),
        "provenance": provenance(),
    }
    if out is not None:
        write_json(out, result)
    return result
