"""The schedule that a command is about: by name, or from the folder or JSON file of a diffusers scheduler."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..schedule import NoiseSchedule, canonical_prediction_type, make_schedule
from .common import read_pairs


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a schedule."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--schedule",
        metavar="NAME",
        help="noise schedule by name (default: scaled-linear of Stable Diffusion, 1000 timesteps; "
        "for flow_prediction: flow)",
    )
    either.add_argument(
        "--scheduler",
        type=Path,
        metavar="FOLDER_OR_JSON",
        help="schedule of a diffusers scheduler: its folder, its pipeline's, or scheduler_config.json",
    )
    parser.add_argument(
        "--schedule-params",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of --schedule, as num_timesteps=1000 zero_terminal_snr=true, or shift=3 of a flow",
    )


def read_schedule(args: argparse.Namespace, target: str) -> NoiseSchedule:
    """The schedule that they name; by default one that the target is usual on."""
    params = read_pairs(args.schedule_params)
    if args.scheduler is not None:
        if params:
            raise ValueError("--schedule-params belong to --schedule; a scheduler brings its own")
        return NoiseSchedule.from_diffusers(_load_scheduler(args.scheduler))
    is_flow = canonical_prediction_type(target) == "flow_prediction"
    name = args.schedule or ("flow" if is_flow else "scaled-linear")
    return make_schedule(name, **params)


def _load_scheduler(path: Path) -> Any:
    """A diffusers scheduler from its configuration. Nothing but a class of diffusers is made."""
    import diffusers

    places = (path, path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"no scheduler_config.json in {path}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    scheduler = getattr(diffusers, name, None) if isinstance(name, str) else None
    if scheduler is None or not hasattr(scheduler, "from_config"):
        raise ValueError(f"{file} names no scheduler of diffusers: _class_name is {name!r}")
    return scheduler.from_config(config)


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a density of timesteps."""
    parser.add_argument(
        "--timestep-sampler", metavar="NAME", help="density of timesteps (default: uniform)"
    )
    parser.add_argument(
        "--sampler-params", nargs="+", default=[], metavar="NAME=VALUE", help="of the density"
    )
