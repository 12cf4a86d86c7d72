"""What routes to the Gramian of timestep bins cost: ours, those of TorchJD, and a retained graph.

    python data/races/conflict_routes.py --model small --image-size 32 --out conflict-routes.json

Prints and writes, by route, "fails" with the reason, or: "seconds" (median) for one batch, "ratio" to a training step
on as many samples (quartiles over rounds), "bytes" at the peak above model and batch, and "error" of the Gramian.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dysigma.bins import Bins
from dysigma.devices import resolve_device
from dysigma.gradients import bin_gramian, bin_timesteps, conflicts
from dysigma.lab.benchmark import BINS, MICRO_BATCHES, cuda_peak, time_in_turn
from dysigma.models import make_model
from dysigma.objective import sample_losses
from dysigma.randomness import forked_rng, generator
from dysigma.runs import provenance, write_json
from dysigma.schedule import make_schedule


def _routes(
    preset: str, image_size: int, per_bin: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Calls that compute the Gramian (K, K) of the bins' mean losses on one batch, each in its own way.

    The first two return none: MICRO_BATCHES forward and backward passes of the mean loss of per_bin samples of each
    bin, and the report of as many such batches. In float32, not compiled.
    """
    with forked_rng("cpu", seed=0):
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
        conflicts(
            model,
            x0,
            schedule,
            bins,
            micro_batches=MICRO_BATCHES,
            batch_per_bin=per_bin,
            progress=False,
        )

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
        "TorchJD autogram, per sample": lambda: (
            autogram(0)(losses()).view(BINS, per_bin, BINS, per_bin).mean((1, 3))
        ),
        "TorchJD autogram, per bin": lambda: autogram(None)(means()),
        "TorchJD jac, bin by bin": jac,
        "retained graph": retained,
    }


def _peak_memory(
    name: str, preset: str, image_size: int, per_bin: int, device: torch.device
) -> int | None:
    """Bytes a route takes at its peak above the model and the batch; None where the system does not tell."""
    status = Path("/proc/self/status")
    _routes("micro", 8, 1, device)[name]()  # late imports, lasting buffers
    call = _routes(preset, image_size, per_bin, device)[name]
    if device.type == "cuda":
        return cuda_peak(call, device, torch.cuda.memory_allocated(device))
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
    with ProcessPoolExecutor(
        1, get_context("spawn")
    ) as fresh:  # with no memory of another route to use again
        return found | {"bytes": fresh.submit(_peak_memory, name, *batch).result()}


def conflict_costs(
    preset: str, image_size: int, per_bin: int, rounds: int, device: torch.device
) -> dict[str, Any]:
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
            quartiles = torch.tensor(ratios, dtype=torch.float64).quantile(
                torch.tensor([0.25, 0.5, 0.75]).double()
            )
            row |= {"seconds": statistics.median(seconds[name]), "ratio": quartiles.tolist()}
            memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:6.0f} MiB"
            print(
                f"  {name:28s} {1e3 * row['seconds']:8.1f} ms   {row['ratio'][1]:6.2f} steps   {memory}"
            )
        else:
            print(f"  {name:28s} fails: {row['fails']}")
    return {
        "bins": BINS,
        "batch_per_bin": per_bin,
        "micro_batches": MICRO_BATCHES,
        "routes": results,
    }


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--batch-per-bin", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sizes = {"model": args.model, "image_size": args.image_size}
    device = resolve_device(args.device)
    found = conflict_costs(args.model, args.image_size, args.batch_per_bin, args.rounds, device)
    write_json(args.out, sizes | found | {"provenance": provenance()})


if __name__ == "__main__":
    main()
