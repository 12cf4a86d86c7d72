"""dysigma train: its options are the fields of TrainConfig."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command, read_pairs

if TYPE_CHECKING:
    from ..training.config import TrainConfig

# What --help shows under which title, common options first. A field that no title names stands under "other".
GROUPS = {
    "essentials": (
        "data",
        "model",
        "prediction",
        "weighting",
        "weighting_params",
        "images",
        "batch_size",
        "lr",
        "seed",
    ),
    "data": ("data_root", "image_size", "train_images", "conditional", "flip"),
    "objective": ("normalize", "weighting_lr"),
    "schedule and timesteps": (
        "schedule",
        "shift",
        "num_timesteps",
        "zero_terminal_snr",
        "timestep_sampler",
        "sampler_params",
    ),
    "optimisation": (
        "accumulate",
        "weight_decay",
        "warmup_images",
        "cooldown_images",
        "cooldown",
        "grad_clip",
        "ema_half_life",
    ),
    "recording": (
        "bins",
        "log_every",
        "checkpoint_every",
        "validate_every",
        "validate_from",
        "validation_images",
        "validation_timesteps",
        "distance_images",
        "distance_steps",
        "features",
        "conflicts_from",
    ),
    "machine": ("device", "precision", "compile", "threads"),
    "other": (),
}
# `dysigma train --out FOLDER` and nothing else: a first run, which ends in shapes that one can name (page 00). Once one
# of the options that decide what is learned is given, all others have the defaults of --help.
FIRST_RUN: dict[str, Any] = {
    "data": "shapes",
    "image_size": 16,
    "conditional": True,
    "schedule": "cosine",
    "prediction": "sample",
    "weighting": "min-snr",
    "lr": 8e-3,
    "images": 48_000,
}
# Options that a first run may have as well.
BESIDE_FIRST_RUN = {"seed", "device", "precision", "compile", "threads"}
FIRST_RANK = "0"  # torchrun numbers its processes in RANK


def add(commands: Commands) -> None:
    """Add the command and its options."""
    from ..training.config import TrainConfig

    parser = add_command(
        commands,
        "train",
        run,
        help="train a diffusion model into a run folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="dysigma train --out FOLDER [options]",
        description="Train a diffusion model with a loss weighting. The run folder gets config.json, metrics.jsonl,\n"
        "summary.json, checkpoint/, samples.png, and pipeline/, which opens with DDPMPipeline.from_pretrained.\n"
        "The defaults below hold once an option of what is learned is given. With --out alone a first run is trained,\n"
        "with options of its own, which it prints.",
        epilog="examples:\n"
        "  dysigma train --out runs/first                                       a first run: some minutes on a CPU\n"
        "  dysigma train --weighting dy-sigma --weighting-params kappa=0.5 --out runs/second\n"
        "  dysigma train --data cifar10 --model compact --images 20000000 --batch-size 512 --out runs/gpu\n"
        "  dysigma train --resume --out runs/gpu                                go on where it stopped",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="run folder to write (must be new or empty)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --out, as configured; if its images moved, give --data",
    )
    parser.add_argument(
        "--config", type=Path, help="JSON or TOML file with options as below; flags win over it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--minutes",
        type=float,
        help="instead of --images: as many as fit into so many minutes on this machine, measured first",
    )
    parser.add_argument(
        "--log-with", metavar="TRACKER", help="send metrics also to tensorboard, wandb or trackio"
    )

    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for title, names in GROUPS.items():
        if title == "other":
            named = [name for group in GROUPS.values() for name in group]
            names = tuple(name for name in fields if name not in named)
        present = [name for name in names if name in fields]
        if present:
            group = parser.add_argument_group(title)
            for name in present:
                _add_option(group, fields[name])


def _add_option(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    """Add the flag of a field of TrainConfig. Its default is None: a flag that was not given leaves the field alone."""
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"]
    kind = str(field.type).removesuffix(" | None")
    if kind == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    if field.name.endswith("_params"):
        group.add_argument(flag, nargs="+", action="extend", metavar="NAME=VALUE", help=text)
        return
    if field.default is not None:
        text += f" (default: {field.default})"
    convert = {"int": int, "float": float, "str": str}[kind]
    group.add_argument(flag, type=convert, metavar=kind.upper(), help=text)


def _options_given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that flags set."""
    from ..training.config import TrainConfig

    given = {}
    for field in dataclasses.fields(TrainConfig):
        value = getattr(args, field.name)
        if value is None:
            continue
        given[field.name] = read_pairs(value) if field.name.endswith("_params") else value
    return given


def _configuration(args: argparse.Namespace) -> TrainConfig:
    """What a file says, or the run to resume, and the flags over it."""
    from ..runs.files import read_config
    from ..training.config import TrainConfig

    options: dict[str, Any] = {}
    of_the_run = args.out / "config.json"
    if args.config:
        options = read_config(args.config)
    elif args.resume and of_the_run.exists():
        options = read_config(of_the_run)
    given = _options_given(args)
    nothing_said = args.config is None and not args.resume
    if nothing_said and set(given) <= BESIDE_FIRST_RUN:
        options = dict(FIRST_RUN)
        if os.environ.get("RANK", FIRST_RANK) == FIRST_RANK and not args.quiet:
            print(f"a first run: {_first_command(given, args)}")
    options.update(given)
    return TrainConfig.from_dict(options)


def _first_command(given: dict[str, Any], args: argparse.Namespace) -> str:
    """The command line that trains what a first run with these flags trains."""
    options = {**FIRST_RUN, **given}
    if args.minutes is not None:
        del options["images"]
        options["minutes"] = f"{args.minutes:g}"
    options["out"] = args.out
    words = ["dysigma", "train"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            words.append(flag.replace("--", "--no-", 1))
            continue
        words.append(flag)
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def _is_finished(folder: Path) -> bool:
    from ..runs.folder import load_run

    return (folder / "pipeline").exists() and load_run(folder).summary.get("status") == "done"


def _within_minutes(args: argparse.Namespace, config: TrainConfig) -> TrainConfig:
    """The configuration with the number of images that --minutes allow, which it also prints."""
    from ..training.budget import fit_to_minutes
    from ..training.loop import check_folder

    if args.resume:
        raise ValueError("--minutes fix a new run; one that is resumed has its number of images")
    if args.images is not None:
        raise ValueError("give --minutes or --images, not both")
    check_folder(config, args.out, resume=False)
    config = fit_to_minutes(config, args.minutes)
    print(f"{args.minutes:g} minutes take {config.images:,} images here")
    return config


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    config = _configuration(args)
    state = "done"
    if args.resume and _is_finished(args.out):
        state = "finished already (it cannot be extended; train longer in another --out)"

    from ..runs.folder import describe_loss
    from ..training.loop import train

    if args.minutes is not None:
        config = _within_minutes(args, config)
    trained = train(
        config,
        args.out,
        resume=args.resume,
        progress=not args.quiet,
        log_with=args.log_with,
    )
    if os.environ.get("RANK", FIRST_RANK) != FIRST_RANK:
        return
    summary = trained.summary
    loss = describe_loss(
        summary["validation_loss"], config.prediction, summary.get("validation_images")
    )
    print(f"{state}: {summary['images']:,} images, {loss}, {trained.path}")
