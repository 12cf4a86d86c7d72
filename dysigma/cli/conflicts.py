"""dysigma conflicts"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..plots import conflict_matrices, transfer_matrix
from .common import _add_draws, _device_run, _write


def _add_conflicts(commands: Any) -> None:
    parser = commands.add_parser(
        "conflicts",
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
        help="6 or more, for shorter intervals (default: 16)",
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
    _add_draws(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder (default: PATH/conflicts; for a pipeline, ./conflicts-NAME)",
    )
    parser.set_defaults(run=_conflicts)


def _pipeline_parts(path: Path) -> tuple[Any, Any, str]:
    """(network, schedule, prediction type) of a diffusers pipeline."""
    import inspect

    from diffusers import DiffusionPipeline

    from ..runs.files import read_json
    from ..schedule import NoiseSchedule

    index = read_json(path / "model_index.json")
    parts = [part for part, origin in index.items() if isinstance(origin, list) and origin[0]]
    refused = "only networks on pixels that need timesteps, and classes at most, are measured"
    if other := [part for part in parts if index[part][0] != "diffusers" and "encoder" not in part]:
        raise ValueError(
            f"{path} has a {other[0]} of {index[other[0]][0]}; no code but that of diffusers is run"
        )
    if other := [part for part in parts if "vae" in part or "encoder" in part]:
        raise ValueError(f"{path} has a {other[0]}, for latents or prompts; {refused}")
    name = "unet" if "unet" in parts else "transformer"
    if not {name, "scheduler"} <= set(parts):
        raise ValueError(f"{path} must have a unet or transformer, and a scheduler; it has {parts}")
    try:
        options = {
            "use_safetensors": True,
            "low_cpu_mem_usage": False,
        }  # to use little wants accelerate
        pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:  # a damaged file makes the loaders raise almost anything
        raise ValueError(
            f"{path} does not open as a diffusers pipeline: {' '.join(str(error).split())}"
        ) from error
    network, scheduler = getattr(pipeline, name), pipeline.scheduler
    schedule = NoiseSchedule.from_diffusers(scheduler)
    if schedule.is_flow:
        raise ValueError(
            f"{path} is trained by flow matching; its network is called with noise levels, which are not measured here"
        )
    if "encoder_hidden_states" in inspect.signature(network.forward).parameters:
        raise ValueError(f"{path} needs encoder_hidden_states, as of a prompt; {refused}")
    return network, schedule, scheduler.config.get("prediction_type", "epsilon")


def _images_for(network: Any, config: Any, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(ImageData that the network takes, its model_kwargs)."""
    from ..training.parts import load_split

    size, channels = network.config.get("sample_size"), network.config["in_channels"]
    size = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
    config = replace(config, data=args.data, train_images=None) if args.data else config
    config = replace(
        config, data_root=args.data_root or config.data_root, image_size=size, conditional=False
    )
    config = config if args.num_images is None else replace(config, train_images=args.num_images)
    data = load_split(config, "train", network.device)
    if data.images.shape[1] != channels:
        raise ValueError(
            f"{args.path} takes {channels} channels, and {data.name} has {data.images.shape[1]}: choose another "
            "--data; networks on latents are not measured"
        )
    classes = network.config.get("num_class_embeds") or network.config.get("num_embeds_ada_norm")
    if classes and not 1 <= (data.num_classes or 0) <= classes:
        raise ValueError(
            f"{args.path} is conditioned on {classes} classes; {data.name} has {data.num_classes or 'none'}"
        )
    return data, {"class_labels": data.labels} if classes else {}


def _conflicts(args: argparse.Namespace) -> None:
    from ..bins import Bins
    from ..devices import resolve_device
    from ..gradients.measure import conflicts
    from ..gradients.transfer import negative_transfer
    from ..runs.files import read_json
    from ..runs.provenance import provenance
    from ..training.config import TrainConfig
    from ..weightings.registry import make_weighting

    path, name, run = args.path, args.path.resolve().name, args.path / "config.json"
    foreign = (path / "model_index.json").is_file()
    out = args.out or (Path(f"conflicts-{name}") if foreign else path / "conflicts")
    if not foreign and not (run.is_file() and "weighting" in read_json(run)):
        raise ValueError(
            f"{path} is neither a run folder nor a diffusers pipeline (it has no model_index.json). A network alone "
            "does not say which noise schedule it was trained with"
        )
    if foreign and out.resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"{out} lies in the pipeline's folder, which is left as it is; choose another --out"
        )
    if not 2 <= args.bins <= 64:
        raise ValueError(f"--bins must be from 2 to 64; got {args.bins}")
    if foreign:
        config, device = TrainConfig(train_images=1000), resolve_device(args.device)
        network, schedule, kind = _pipeline_parts(path)
        network, schedule = network.to(device), schedule.to(device)
    else:
        config, schedule, _, load = _device_run(path, args.device)
        kind, network = config.prediction, load()
    data, kwargs = _images_for(network, config, args)
    weighting = make_weighting(args.weighting, schedule, kind) if args.weighting else None
    if weighting is not None and weighting.learns:
        raise ValueError(
            f"--weighting takes a predefined one; {args.weighting} learns its weights in training"
        )
    bins = (
        Bins.equal_log_snr(schedule.log_snr, args.bins) if args.binning == "log-snr" else args.bins
    )
    common: dict[str, Any] = {"prediction_type": kind, "model_kwargs": kwargs, "seed": args.seed}
    sizes = {"micro_batches": args.micro_batches, "batch_per_bin": args.batch_per_bin}
    report = conflicts(network, data, schedule, bins, weighting=weighting, **sizes, **common)
    print(
        f"{name}: {kind} network, {len(data):,} images of {data.name}, weighting {args.weighting or 'none'}\n"
    )
    print(
        report.table().to_string(index=False, float_format="{:.3g}".format, na_rep="?"), end="\n\n"
    )
    print(*report.sentences(), sep="\n")
    about = {"path": name, "data": data.name, "images": len(data), "provenance": provenance()}
    record = about | {"weighting": args.weighting, "report": report.to_dict()}
    _write(out, "conflicts", record, conflict_matrices(report))
    if args.transfer:
        transfer = negative_transfer(
            network, data, schedule, bins, steps=args.transfer_steps, **common
        )
        rows = {key: getattr(transfer, key).tolist() for key in ("losses", "change", "change_se")}
        settings = {"edges": transfer.edges, "steps": args.transfer_steps, "seed": args.seed}
        print(transfer.sentence())
        _write(out, "transfer", about | settings | rows, transfer_matrix(transfer))
