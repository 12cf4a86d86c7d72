"""What several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _pairs(items: Sequence[str]) -> dict[str, Any]:
    """["kappa=0.5", "prior=p2"] -> {"kappa": 0.5, "prior": "p2"}; values are read as JSON where they are JSON."""
    pairs = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise ValueError(f"parameters are given as name=value; got {item!r}")
        try:
            pairs[name] = json.loads(value)
        except ValueError:
            pairs[name] = value
    return pairs


def _device_run(path: Path, device: str) -> tuple[Any, Any, Any, Any]:
    """(config, schedule, torch device, function that loads the model with EMA weights, which takes long) of a run."""
    from ..devices import resolve_device
    from ..runs.folder import load_run
    from ..training.config import TrainConfig

    run, target = load_run(path), resolve_device(device)
    config = TrainConfig.from_dict(run.config)
    return (
        config,
        config.noise_schedule().to(target),
        target,
        lambda: run.pipeline().unet.to(target),
    )


def _add_draws(parser: Any) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def _draw(
    args: argparse.Namespace, count: int, steps: int, config: Any, model: Any, schedule: Any
) -> Any:
    """Samples of a run, of its classes in turn."""
    from ..evaluation import sample_images

    size = model.config["sample_size"]
    return sample_images(
        model, schedule, (count, model.config["in_channels"], size, size), prediction_type=config.prediction,
        sampler=args.sampler, num_steps=steps, seed=args.seed,
        compile=count >= 1024 and model.device.type == "cuda", progress=True,
    )  # fmt: skip


def _write(out: Path, name: str, record: dict[str, Any], figure: Any) -> None:
    from ..runs.files import write_json

    write_json(out / f"{name}.json", record)
    figure.savefig(out / f"{name}.png", dpi=110)
    print(f"\n{out / name}.json and .png")
