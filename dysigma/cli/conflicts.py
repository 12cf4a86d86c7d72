"""dysigma conflicts: which timesteps pull a network in different directions."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..gradients.measure import FEWEST_MICRO_BATCHES
from ..pareto import MAX_OBJECTIVES
from .common import (
    Commands,
    add_command,
    add_draw_options,
    check_least,
    check_writable,
    open_run,
    write_record,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from ..bins import Bins
    from ..data.dataset import ImageData
    from ..schedule import NoiseSchedule
    from ..training.config import TrainConfig
    from ..weightings.base import Weighting

MEASURED = "only networks on pixels that need timesteps, and classes at most, are measured"
IMAGES_FOR_PIPELINE = 1000  # of leaves, if no others are named


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "conflicts",
        run,
        help="which timesteps conflict in a run or a diffusers pipeline, by how much, and how surely",
        description="Gradients of the losses of timestep bins, for a run or a diffusers pipeline on pixels. Writes "
        "conflicts.json and .png and, with --transfer, transfer.json and .png. Costs about --micro-batches training "
        "steps on --bins times --batch-per-bin images.",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="run folder, or local folder of a diffusers pipeline",
    )
    parser.add_argument(
        "--data", help="as of dysigma train (default: the run's own; for a pipeline, leaves)"
    )
    parser.add_argument("--data-root", help="where CIFAR-10 lies, if not where it was in training")
    parser.add_argument("--num-images", type=int, help="use only the first so many training images")
    parser.add_argument(
        "--bins", type=int, default=10, help="how many bins of timesteps (default: 10)"
    )
    parser.add_argument(
        "--binning",
        choices=("timesteps", "log-snr"),
        default="timesteps",
        help="for equal widths in it",
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=16,
        help=f"{FEWEST_MICRO_BATCHES} or more, for shorter intervals (default: 16)",
    )
    parser.add_argument(
        "--batch-per-bin", type=int, default=4, help="images per bin and micro-batch (default: 4)"
    )
    parser.add_argument(
        "--weighting", help="predefined weighting of the losses (default: unweighted)"
    )
    parser.add_argument(
        "--transfer", action="store_true", help="also fine-tune on each bin alone and test on all"
    )
    parser.add_argument(
        "--transfer-steps", type=int, default=50, help="steps of each fine-tuning (default: 50)"
    )
    add_draw_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder (default: PATH/conflicts; for a pipeline, ./conflicts-NAME)",
    )


@dataclass(frozen=True)
class _Measured:
    """A network and what is needed to compute its losses."""

    network: nn.Module  # called with the timesteps of the schedule
    options: Mapping[str, Any]  # the network's own configuration in diffusers
    schedule: NoiseSchedule
    prediction: str
    config: TrainConfig  # says which images


def _is_pipeline(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def _check_parts(path: Path) -> str:
    """The name of a pipeline's network, from its index alone; ValueError if it is of a kind that is not measured."""
    from ..runs.files import read_json

    index = read_json(path / "model_index.json")
    library_of = {
        part: origin[0]
        for part, origin in index.items()
        if isinstance(origin, list)
        and origin[0]  # [None, None] stands for a part that is not there
    }
    for part, library in library_of.items():
        if library.startswith("dysigma."):
            raise ValueError(f"{path} is the pipeline of a run: give the folder of the run itself")
        if library != "diffusers" and "encoder" not in part:
            raise ValueError(
                f"{path} has a {part} of {library}; no code but that of diffusers is run"
            )
    for part in library_of:
        if "vae" in part or "encoder" in part:
            raise ValueError(f"{path} has a {part}, for latents or prompts; {MEASURED}")
    network = "unet" if "unet" in library_of else "transformer"
    if network not in library_of or "scheduler" not in library_of:
        raise ValueError(
            f"{path} must have a unet or transformer, and a scheduler; it has {list(library_of)}"
        )
    return network


def _open_pipeline(path: Path, device: torch.device) -> _Measured:
    """The network of a local diffusers pipeline."""
    from diffusers import DiffusionPipeline

    from ..foreign import FlowNetwork
    from ..schedule import NoiseSchedule
    from ..training.config import TrainConfig

    name = _check_parts(path)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,  # nothing is unpickled
            low_cpu_mem_usage=False,  # to use little wants accelerate
        )
    except Exception as error:  # a damaged file makes the loaders raise almost anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not open as a diffusers pipeline: {reason}") from error
    network = getattr(pipeline, name)
    try:
        schedule = NoiseSchedule.from_diffusers(pipeline.scheduler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}, and dysigma.conflicts in Python") from error
    if "encoder_hidden_states" in inspect.signature(network.forward).parameters:
        raise ValueError(f"{path} needs encoder_hidden_states, as of a prompt; {MEASURED}")
    prediction = pipeline.scheduler.config.get("prediction_type")
    config = TrainConfig(train_images=IMAGES_FOR_PIPELINE)
    options = network.config
    if schedule.is_flow:
        network = FlowNetwork(network, schedule)
        prediction = prediction or "flow_prediction"
    return _Measured(
        network.to(device), options, schedule.to(device), prediction or "epsilon", config
    )


def _open_run(args: argparse.Namespace) -> _Measured:
    opened = open_run(args.path, args.device)
    schedule, config = opened.schedule, opened.config
    _bins_and_weighting(args, schedule, config.prediction)  # before the network, which takes long
    network: Any = opened.load_network()
    return _Measured(network, network.config, schedule, config.prediction, config)


def _images(measured: _Measured, args: argparse.Namespace) -> tuple[ImageData, bool]:
    """The images that a network takes, and whether it is conditioned on their classes."""
    from ..training.parts import load_split

    options = measured.options
    channels = options["in_channels"]
    if channels not in (1, 3):
        raise ValueError(
            f"{args.path} takes {channels} channels, and images have 1 or 3: networks on latents are "
            "not measured"
        )
    size = options.get("sample_size")  # a side, (height, width), or None where it takes any
    config = replace(
        measured.config,
        data_root=args.data_root or measured.config.data_root,
        conditional=False,
    )
    if args.data:
        config = replace(config, data=args.data, train_images=None)
    if args.num_images is not None:
        config = replace(config, train_images=args.num_images)
    data = load_split(
        config,
        "train",
        measured.schedule.log_snr.device,
        size=tuple(size) if isinstance(size, list) else size,
        channels=channels,
    )
    classes = options.get("num_class_embeds") or options.get("num_embeds_ada_norm")
    if classes and not 1 <= (data.num_classes or 0) <= classes:
        raise ValueError(
            f"{args.path} is conditioned on {classes} classes; {data.name} has {data.num_classes or 'none'}"
        )
    return data, bool(classes)


def _bins_and_weighting(
    args: argparse.Namespace, schedule: NoiseSchedule, prediction: str
) -> tuple[Bins, Weighting | None]:
    """What --bins, --binning and --weighting ask for; ValueError or KeyError if the schedule has none such."""
    from ..bins import Bins
    from ..weightings.registry import make_weighting

    if args.binning == "log-snr":
        bins = Bins.equal_log_snr(schedule.log_snr, args.bins)
    else:
        bins = Bins.uniform(schedule.num_timesteps, args.bins)
    if args.weighting is None:
        return bins, None
    weighting = make_weighting(args.weighting, schedule, prediction)
    if weighting.learns:
        raise ValueError(
            f"--weighting takes a predefined one; {args.weighting} learns its weights in training"
        )
    return bins, weighting


def _output(args: argparse.Namespace) -> Path:
    """The folder to write; ValueError unless PATH is a run or a pipeline whose own folder stays as it is."""
    from ..runs.files import read_json

    path: Path = args.path
    if not _is_pipeline(path):
        config = path / "config.json"
        if not (config.is_file() and "weighting" in read_json(config)):
            raise ValueError(
                f"{path} is neither a run folder nor a diffusers pipeline (it has no model_index.json). "
                "A network alone does not say which noise schedule it was trained with"
            )
        return args.out or path / "conflicts"
    out: Path = args.out or Path(f"conflicts-{path.resolve().name}")
    if out.resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"{out} lies in the pipeline's folder, which is left as it is; choose another --out"
        )
    return out


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if not 2 <= args.bins <= MAX_OBJECTIVES:
        raise ValueError(f"--bins must be from 2 to {MAX_OBJECTIVES}; got {args.bins}")
    check_least(args, micro_batches=FEWEST_MICRO_BATCHES, batch_per_bin=1, num_images=1, seed=0)
    check_least(args, transfer_steps=1)
    out = check_writable(_output(args))

    from ..devices import resolve_device
    from ..gradients.measure import conflicts
    from ..gradients.transfer import negative_transfer
    from ..plots import conflict_matrices, transfer_matrix
    from ..runs.provenance import provenance

    if _is_pipeline(args.path):
        measured = _open_pipeline(args.path, resolve_device(args.device))
    else:
        measured = _open_run(args)
    network, schedule = measured.network, measured.schedule
    bins, weighting = _bins_and_weighting(args, schedule, measured.prediction)
    data, is_conditional = _images(measured, args)
    common: dict[str, Any] = {
        "prediction_type": measured.prediction,
        "model_kwargs": {"class_labels": data.labels} if is_conditional else {},
        "seed": args.seed,
    }
    report = conflicts(
        network,
        data,
        schedule,
        bins,
        weighting=weighting,
        micro_batches=args.micro_batches,
        batch_per_bin=args.batch_per_bin,
        **common,
    )
    name = args.path.resolve().name
    print(
        f"{name}: {measured.prediction} network, {len(data):,} images of {data.name}, "
        f"weighting {args.weighting or 'none'}\n"
    )
    table = report.table().to_string(index=False, float_format="{:.3g}".format, na_rep="?")
    print(f"{table}\n")
    print(*report.sentences(), sep="\n")
    about = {
        "path": name,
        "data": data.name,
        "images": len(data),
        "provenance": provenance(),
    }
    record = {**about, "weighting": args.weighting, "report": report.to_dict()}
    write_record(out, "conflicts", record, conflict_matrices(report))
    if not args.transfer:
        return

    transfer = negative_transfer(network, data, schedule, bins, steps=args.transfer_steps, **common)
    print(transfer.sentence())
    record = {
        **about,
        "edges": transfer.edges,
        "steps": args.transfer_steps,
        "seed": args.seed,
        "losses": transfer.losses.tolist(),
        "change": transfer.change.tolist(),
        "change_se": transfer.change_se.tolist(),
    }
    write_record(out, "transfer", record, transfer_matrix(transfer))
