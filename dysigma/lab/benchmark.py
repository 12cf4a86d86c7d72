"""Speed as ratios within one run: training steps, ours and others', and what else adds to ours."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import ImageData
from ..devices import fast_kernels, resolve_device
from ..gradients.measure import conflicts
from ..images import to_real
from ..models import make_model
from ..objective import OutputLayerGradients
from ..randomness import generator
from ..runs.files import write_json
from ..runs.provenance import provenance
from ..samplers import TIMESTEP_SAMPLERS, make_sampler
from ..schedule import NoiseSchedule
from ..training.config import TrainConfig
from ..training.parts import load_split
from ..weightings.registry import WEIGHTINGS, make_weighting
from .contenders import Maker, Step, contenders, make_network

# As conflicts has them by default.
BINS = 10
MICRO_BATCHES = 16

# The work of these lies in Gramians, which the step computes for them.
ON_GRAMIANS = ("gramian", "ugd")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    calls: dict[str, Step], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Every round runs all of them once, so that all share the drift of the machine.

    >>> order = []
    >>> calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    >>> seconds = time_in_turn(calls, 2, torch.device("cpu"))
    >>> order[2:], len(seconds["a"])  # the first two calls warm up
    (['a', 'b', 'a', 'b'], 2)
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _medians(calls: dict[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    seconds = time_in_turn(calls, rounds, device)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def matmul_peak(device: torch.device) -> float:
    """FLOP per second of one large matrix product, the fastest of ten: bfloat16 on CUDA, else float32."""
    size, dtype = 1024, torch.float32
    if device.type == "cuda":
        size, dtype = 8192, torch.bfloat16
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = time_in_turn({"product": lambda: a @ a}, 10, device)["product"]
    return 2 * size**3 / min(seconds)


def flops_per_image(preset: str, image_size: int) -> int:
    """FLOP of one image in a training step, 2 for each multiply-add.

    A backward pass counts as two forward passes.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(preset, image_size).to("meta")
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    timestep = torch.zeros(1, device="meta", dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(image, timestep)
    return 3 * counter.get_total_flops()


def cuda_peak(call: Step, device: torch.device, before: int | None) -> int | None:
    """Bytes allocated on a CUDA device at the peak of a call, above those before; else None."""
    if before is None:
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _prepare(make: Maker, config: TrainConfig, data: ImageData) -> tuple[Step, int | None]:
    """A contender that has taken its first steps, and its bytes at the peak."""
    device = data.images.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    call = make(config, data)
    call()  # allocates the optimizer's state
    return call, cuda_peak(call, device, before)


def step_costs(
    config: TrainConfig, rounds: int, device: torch.device, peak: float
) -> dict[str, Any]:
    """Print and return what training steps of one batch size cost, ours and others', by name.

    "fails" with the reason; or "seconds" (median), "images_per_second", "flops" per second and its
    "share" of peak, "ratio" of its seconds to ours (median over rounds, where ours runs), and
    "bytes" at the peak (CUDA alone).
    """
    torch.compiler.reset()  # else the ninth network of another size or batch is refused
    data = load_split(config, "train", device)
    calls: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in contenders(device).items():
        try:
            calls[name], peak_bytes = _prepare(make, config, data)
            rows[name] = {"bytes": peak_bytes}
        except Exception as error:  # what cannot run here is part of the result
            calls.pop(name, None)
            rows[name] = {"fails": _reason(error)}
    seconds = time_in_turn(calls, rounds, device)
    flops = flops_per_image(config.model, data.images.shape[-1])
    for name, times in seconds.items():
        median = statistics.median(times)
        speed = config.batch_size / median
        rows[name]["seconds"] = median
        rows[name]["images_per_second"] = speed
        rows[name]["flops"] = speed * flops
        rows[name]["share"] = speed * flops / peak
        if "dysigma" in seconds:
            ratios = [a / b for a, b in zip(times, seconds["dysigma"], strict=True)]
            rows[name]["ratio"] = statistics.median(ratios)
    size = data.images.shape[-1]
    print(f"training step, {config.model} at {size} pixels, batch {config.batch_size}, {device}")
    for name, row in rows.items():
        print(f"  {name:32s} {_step_text(row)}")
    return {"batch_size": config.batch_size, "steps": rows}


def _step_text(row: dict[str, Any]) -> str:
    if "fails" in row:
        return f"fails: {row['fails']}"
    words = [
        f"{1e3 * row['seconds']:9.1f} ms",
        f"{row['images_per_second']:9,.0f} img/s",
        f"{row['flops'] / 1e12:8.3f} TFLOP/s",
        f"{row['share']:5.1%} of a matrix product",
    ]
    if "ratio" in row:
        words.append(f"{row['ratio']:5.2f} x ours")
    if row["bytes"] is not None:
        words.append(f"{row['bytes'] / 2**20:8.0f} MiB")
    return "   ".join(words)


def _weighting_call(
    name: str, config: TrainConfig, schedule: NoiseSchedule, device: torch.device
) -> Step:
    """Forward, backward and optimizer step of a weighting on the losses of a network of one number.

    The weighting is one more group of the network's optimizer, as in a training loop. "mean" is
    plain losses.mean().
    """
    draw = generator(0, 0, "benchmark")
    timesteps = torch.randint(0, config.num_timesteps, (config.batch_size,), generator=draw)
    timesteps = timesteps.to(device)
    values = torch.rand(config.batch_size, generator=draw).to(device)
    network = torch.nn.Parameter(torch.ones((), device=device))
    groups: list[dict[str, Any]] = [{"params": [network]}]
    weighting = None
    if name != "mean":
        weighting = make_weighting(name, schedule, config.prediction).to(device)
        groups += weighting.parameter_groups(None)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)

    def call() -> None:
        losses = network * values
        loss = losses.mean() if weighting is None else weighting(losses, timesteps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def weighting_costs(
    config: TrainConfig, rounds: int, device: torch.device, step: float
) -> dict[str, float]:
    """Print and return what each weighting costs above losses.mean(), as a share of `step` seconds."""
    names = [name for name in WEIGHTINGS if name not in ON_GRAMIANS]
    schedule = config.noise_schedule().to(device)
    calls = {name: _weighting_call(name, config, schedule, device) for name in ["mean", *names]}
    return _overheads("a weighting", calls, "mean", rounds, device, step)


def _sampler_call(
    name: str, config: TrainConfig, schedule: NoiseSchedule, device: torch.device
) -> Step:
    """Timesteps of a batch, and what is learned from its losses or gradient norms.

    The cost of the norms in the output layer, and of the weighting that learns for the sampler
    "weighting", is that of the sampler.
    """
    params: dict[str, Any] = {"variant": "density"} if name == "weighting" else {}
    kind = "dy-sigma" if name == "weighting" else "min-snr"
    weighting = make_weighting(kind, schedule, config.prediction, **params).to(device)
    sampler = make_sampler(name, schedule, weighting=weighting).to(device)
    groups = weighting.parameter_groups(None)
    optimizer = torch.optim.AdamW(groups, fused=True) if groups else None
    draw = generator(0, 0, "benchmark")
    u = torch.rand(config.batch_size, generator=draw).to(device)
    values = torch.rand(config.batch_size, generator=draw).to(device)
    measure = None
    if sampler.observes == "gradient-norms":
        measure = _output_norms(config, device)

    def call() -> None:
        timesteps, importance = sampler(u)
        observed = values if measure is None else measure()
        sampler.update(observed, timesteps)
        if optimizer is not None:
            weighting.observe_gradient_norms(observed, timesteps, importance).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return call


def _output_norms(config: TrainConfig, device: torch.device) -> Callable[[], Tensor]:
    """What a step computes for squared gradient norms in the output layer."""
    size = config.image_size or 16
    output = OutputLayerGradients(make_model(config.model, size).to(device))
    weight = output.layer.weight
    channels_out, channels_in = weight.shape[:2]
    features = torch.randn(config.batch_size, channels_in, size, size, device=device)
    gradient = torch.randn(config.batch_size, channels_out, size, size, device=device)
    return lambda: output.squares(features, gradient)


def sampler_costs(
    config: TrainConfig, rounds: int, device: torch.device, step: float
) -> dict[str, float]:
    """Print and return what each timestep sampler costs above the uniform one, as weighting_costs."""
    schedule = config.noise_schedule().to(device)
    calls = {name: _sampler_call(name, config, schedule, device) for name in TIMESTEP_SAMPLERS}
    return _overheads("a timestep sampler", calls, "uniform", rounds, device, step)


def _overheads(
    what: str,
    calls: dict[str, Step],
    plain: str,
    rounds: int,
    device: torch.device,
    step: float,
) -> dict[str, float]:
    seconds = _medians(calls, rounds, device)
    print(f"overhead of {what}, share of the training step")
    shares = {}
    for name in calls:
        if name != plain:
            over = seconds[name] - seconds[plain]
            shares[name] = over / step
            print(f"  {name:20s} {100 * over / step:6.2f} %   {1e6 * over:6.0f} us")
    return shares


def conflict_costs(
    config: TrainConfig, rounds: int, device: torch.device, step: float
) -> dict[str, Any]:
    """Print and return what a report of conflicts costs beside training steps of `step` seconds.

    "seconds" is the median for one micro-batch of BINS bins, and as many samples in each as make up
    batch_size; "ratio" the training steps on as many samples that take as long.
    """
    data = load_split(config, "train", device)
    model = make_network(config, data)
    schedule = config.noise_schedule().to(device)
    per_bin = -(-config.batch_size // BINS)
    samples = BINS * per_bin
    chosen = torch.arange(samples, device=device) % len(data)
    x0 = to_real(data.images[chosen])
    report = functools.partial(
        conflicts,
        model,
        x0,
        schedule,
        BINS,
        micro_batches=MICRO_BATCHES,
        batch_per_bin=per_bin,
        progress=False,
    )
    seconds = _medians({"report": report}, rounds, device)["report"] / MICRO_BATCHES
    ratio = (seconds / samples) / (step / config.batch_size)
    print(f"gradient conflicts of {BINS} bins, {per_bin} samples of each: ", end="")
    print(f"{ratio:.2f} of our training steps on as many")
    return {
        "bins": BINS,
        "batch_per_bin": per_bin,
        "micro_batches": MICRO_BATCHES,
        "seconds": seconds,
        "ratio": ratio,
    }


IMPORT = """
import time, torch
start = time.perf_counter()
import dysigma
print(time.perf_counter() - start)
"""


def import_seconds() -> float:
    """Print and return the seconds that `import dysigma` takes beyond torch, in fresh processes."""
    found = []
    for _ in range(3):
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(float(done.stdout))
    seconds = statistics.median(found)
    print(f"import dysigma: {seconds:.2f} s beyond torch")
    return seconds


def load_of_machine() -> list[float] | None:
    """Processes that wanted a core over the last 1, 5 and 15 minutes; None where unknown."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _draw(result: dict[str, Any], path: Path) -> None:
    """Images per second of everything that ran, at each batch size."""
    import matplotlib.pyplot as plt

    from .. import plots

    plots.use_style()
    count = len(result["steps"])
    fig, axes = plt.subplots(1, count, squeeze=False, figsize=(5.5 * count, 3))
    for ax, cost in zip(axes[0], result["steps"], strict=True):
        rows = {name: row for name, row in cost["steps"].items() if "fails" not in row}
        bars = ax.barh([*rows], [row["images_per_second"] for row in rows.values()])
        labels = [f"{row['images_per_second']:,.0f}, {row['share']:.0%}" for row in rows.values()]
        ax.bar_label(bars, labels, padding=3)
        ax.set(
            title=f"{result['model']}, batch {cost['batch_size']}",
            xlabel="images/s, % of a matrix product",
        )
        ax.invert_yaxis()
        ax.margins(x=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def benchmark(
    model: str = "tiny",
    image_size: int = 16,
    batch_sizes: Sequence[int] = (32,),
    *,
    rounds: int = 20,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Print and return costs measured in one run; written to `out` as JSON, a figure beside it.

    "steps" has step_costs for each batch size; "weighting_overhead", "sampler_overhead" and
    "conflicts" are for the first batch size at which our step runs; "import_seconds" and "load", of
    the machine before and after. A part that cannot run is "fails" with the reason. `out` is
    written after every part, so that nothing that was measured is lost.
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
    result: dict[str, Any] = {
        "model": model,
        "image_size": image_size,
        "rounds": rounds,
        "provenance": provenance(),
        "load": {"before": load_of_machine()},
        "steps": [],
    }

    def keep() -> None:
        if out is not None:
            write_json(out, result)

    def measure(name: str, part: Callable[[], Any]) -> None:
        torch.compiler.reset()
        try:
            result[name] = part()
        except Exception as error:  # the other parts are measured all the same
            result[name] = {"fails": _reason(error)}
            print(f"{name} fails: {result[name]['fails']}")
        keep()

    with fast_kernels(target):
        peak = matmul_peak(target)
        result["matmul_flops"] = peak
        result["flops_per_image"] = flops_per_image(model, image_size)
        print(f"one matrix product: {peak / 1e12:.3f} TFLOP/s; ", end="")
        print("2 FLOP per multiply-add, forward and backward 3 forward")
        for size in batch_sizes:
            sized = replace(config, batch_size=size)
            result["steps"].append(step_costs(sized, rounds, target, peak))
            keep()
    running = [cost for cost in result["steps"] if "seconds" in cost["steps"]["dysigma"]]
    if running:
        step = running[0]["steps"]["dysigma"]["seconds"]
        sized = replace(config, batch_size=running[0]["batch_size"])
        many = 20 * rounds  # these calls are short
        few = max(1, rounds // 4)
        measure("weighting_overhead", lambda: weighting_costs(sized, many, target, step))
        measure("sampler_overhead", lambda: sampler_costs(sized, many, target, step))
        measure("conflicts", lambda: conflict_costs(sized, few, target, step))
    measure("import_seconds", import_seconds)
    result["load"]["after"] = load_of_machine()
    print(
        f"load of the machine: {result['load']['before']} before, {result['load']['after']} after"
    )
    keep()
    if out is not None:
        _draw(result, out.with_suffix(".png"))
    return result
