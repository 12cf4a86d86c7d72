"""The command line. Bad input ends with one line and code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import __version__


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


def _add_train(commands: Any) -> None:
    from .training import TrainConfig

    parser = commands.add_parser(
        "train",
        help="train a diffusion model into a run folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a diffusion model with a loss weighting. The run folder gets config.json, metrics.jsonl,\n"
        "summary.json, checkpoint/, samples.png, and pipeline/, which opens with DDPMPipeline.from_pretrained.",
        epilog="examples:\n"
        "  dysigma train --out runs/first                                       a minute on a CPU\n"
        "  dysigma train --weighting dy-sigma --weighting-params kappa=0.5 --out runs/second\n"
        "  dysigma train --data cifar10 --model compact --images 20000000 --batch-size 512 --out runs/gpu\n"
        "  dysigma train --resume --out runs/gpu                                go on where it stopped",
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder to write (must be new or empty)")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out, as configured")
    parser.add_argument("--config", type=Path, help="JSON or TOML file with options as below; flags win over it")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("configuration")
    for f in dataclasses.fields(TrainConfig):
        default = f.default if f.default is not dataclasses.MISSING else None
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if default is not None and not isinstance(default, bool):
            text += f" (default: {default})"
        if "bool" in str(f.type):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif f.name.endswith("_params"):
            group.add_argument(flag, nargs="+", action="extend", metavar="NAME=VALUE", help=text)
        else:
            kind = int if "int" in str(f.type) else float if "float" in str(f.type) else str
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from .runs import load_run, read_config
    from .training import TrainConfig, train

    given = {k: v for k, v in vars(args).items() if k in TrainConfig.__dataclass_fields__ and v is not None}
    given |= {name: _pairs(given[name]) for name in ("weighting_params", "sampler_params") if name in given}
    base = read_config(args.config) if args.config else {}
    if args.resume and not args.config and (args.out / "config.json").exists():
        base = read_config(args.out / "config.json")
    whole = args.resume and (args.out / "pipeline").exists() and load_run(args.out).summary.get("status") == "done"
    run = train(TrainConfig.from_dict(base | given), args.out, resume=args.resume, progress=not args.quiet)
    if os.environ.get("RANK", "0") == "0":  # of torchrun; the process group has ended
        state = "finished already (it cannot be extended; train longer in another --out)" if whole else "done"
        loss, judges = (run.summary[name] for name in ("validation_loss", "validation_images"))
        print(f"{state}: {run.summary['images']:,} images, EMA loss {loss:.4f} on {judges} test images, {run.path}")


def _device_run(path: Path, device: str) -> tuple[Any, Any, Any, Any]:
    """(config, schedule, torch device, function that loads the model with EMA weights, which takes long) of a run."""
    from .runs import load_run
    from .training import TrainConfig, resolve_device

    run, target = load_run(path), resolve_device(device)
    config = TrainConfig.from_dict(run.config)
    return config, config.noise_schedule().to(target), target, lambda: run.pipeline().unet.to(target)


def _add_runs(commands: Any) -> None:
    parser = commands.add_parser("runs", help="list the runs and races in a folder: state, progress, last line")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.set_defaults(run=_runs)


def _runs(args: argparse.Namespace) -> None:
    from .runs import find_runs

    for path, state, progress, last in find_runs(args.folder):
        print(f"{state:12} {progress:32} {path}: {last}")


def _add_draws(parser: Any) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser("sample", help="draw images from a run as a PNG grid and, if asked, an .npz file")
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder written by dysigma train")
    parser.add_argument("--num-images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--sampler", default="ddim", help="ddim, dpm-solver, heun or ddpm (default: ddim)")
    parser.add_argument("--steps", type=int, default=50, help="network evaluations per image (default: 50)")
    _add_draws(parser)
    parser.add_argument("--out", type=Path, help="PNG to write (default: RUN/samples-SAMPLER-STEPS.png)")
    parser.add_argument("--npz", type=Path, help="also write the images as an uint8 array (N, H, W, C)")
    parser.set_defaults(run=_sample)


def _draw(args: argparse.Namespace, count: int, steps: int, config: Any, model: Any, schedule: Any) -> Any:
    """Samples of a run, of its classes in turn."""
    from .evaluation import sample_images

    size = model.config["sample_size"]
    return sample_images(
        model, schedule, (count, model.config["in_channels"], size, size), prediction_type=config.prediction,
        sampler=args.sampler, num_steps=steps, seed=args.seed,
        compile=count >= 1024 and model.device.type == "cuda", progress=True,
    )  # fmt: skip


def _sample(args: argparse.Namespace) -> None:
    import numpy

    from .evaluation import check_sampling, save_grid

    config, schedule, _, load = _device_run(args.run_folder, args.device)
    check_sampling(schedule, args.sampler, args.steps, args.num_images)
    images = _draw(args, args.num_images, args.steps, config, load(), schedule)
    out = args.out or args.run_folder / f"samples-{args.sampler}-{args.steps}.png"
    save_grid(images, out, scale=2)
    if args.npz:
        numpy.savez_compressed(args.npz, images=images.permute(0, 2, 3, 1).cpu().numpy())
    print(out)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="per-timestep validation losses and ELBO of a run; with --metric also FID or another distance",
        description="Losses and ELBO on test images, and with --metric the Fréchet distance and KID of samples to the "
        "unaugmented training images. Writes RUN/evaluation.json.",
    )
    parser.add_argument("run_folder", type=Path, nargs="?", metavar="RUN", help="run folder written by dysigma train")
    parser.add_argument("--num-images", type=int, default=256, help="test images (default: 256)")
    parser.add_argument("--timesteps", type=int, default=50, help="timesteps of the loss curve (default: 50)")
    parser.add_argument("--elbo-timesteps", type=int, default=50, help="timesteps per image of the ELBO (default: 50)")
    _add_draws(parser)
    parser.add_argument("--data-root", help="where CIFAR-10 lies, if not where it was in training")
    group = parser.add_argument_group("distance of samples")
    group.add_argument("--metric", help="fid, pixels, a TorchScript file, or a name of your own for that in --features")
    group.add_argument("--features", type=Path, help="TorchScript file from uint8 images to (N, D)")
    group.add_argument("--samples", type=int, nargs="+", default=[10_000], help="how many (default: 10000)")
    group.add_argument("--nfe", type=int, default=50, help="network evaluations per sample (default: 50)")
    group.add_argument("--sampler", default="ddim", help="ddim, dpm-solver, heun or ddpm (default: ddim)")
    group.add_argument("--reference-images", type=int, help="only so many training images (default: all exact ones)")
    group.add_argument("--reference-only", action="store_true", help="of held-out training and of test images instead")
    group.add_argument("--data", help="for --reference-only without RUN: cifar10, an .npz file, ...")
    group.add_argument("--out", type=Path, help="JSON (default: RUN/evaluation.json, or ./reference-METRIC.json)")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation import check_sampling, elbo, evaluation_timesteps, validation_losses
    from .runs import provenance, read_config, write_json
    from .training import load_split

    if (args.features and args.metric in (None, "pixels")) or (args.reference_images or 20) < 20:
        raise ValueError("--features belongs to a --metric other than pixels, and --reference-images is 20 or more")
    if args.reference_only:
        return _reference_only(args)
    if args.run_folder is None or args.data or len(args.samples) > 1:
        raise ValueError("name the run to evaluate; --data and several numbers of --samples are for --reference-only")
    if args.num_images < 2 or args.elbo_timesteps < 1:
        raise ValueError(f"need --num-images >= 2, --elbo-timesteps >= 1; got {args.num_images}, {args.elbo_timesteps}")
    config, schedule, device, load = _device_run(args.run_folder, args.device)
    config = replace(config, data_root=args.data_root or config.data_root)
    timesteps = evaluation_timesteps(schedule.num_timesteps, args.timesteps)
    if args.metric:
        check_sampling(schedule, args.sampler, args.nfe, args.samples[0])
        metric = _metric(args, device)
    out, model = args.out or args.run_folder / "evaluation.json", load()
    distances = read_config(out).get("distances", {}) if out.exists() else {}
    if args.metric:
        distances |= _distance(args, metric, config, model, schedule)
    test = load_split(config, "test", device)
    images = test.images[: args.num_images]
    labels = None if not config.conditional or test.labels is None else test.labels[: args.num_images]
    options: dict[str, Any] = {"labels": labels, "seed": args.seed, "progress": True}
    losses = validation_losses(model, images, schedule, config.prediction, timesteps=timesteps, **options)
    bound = elbo(model, images, schedule, config.prediction, timesteps_per_image=args.elbo_timesteps, **options)
    print(f"{config.prediction} loss of the EMA weights on {len(images)} test images: {float(losses.mean()):.5f}")
    print(f"ELBO: at most {bound.bits_per_dim:.4f} ± {bound.standard_error:.4f} bits/dim")
    curve = {"timesteps": timesteps.tolist(), "losses": losses.tolist()}
    about = {"images": len(images), "seed": args.seed, "prediction": config.prediction, "provenance": provenance()}
    write_json(out, about | curve | {"elbo": bound._asdict()} | ({"distances": distances} if distances else {}))
    print(out)


def _metric(args: argparse.Namespace, device: Any) -> tuple[Any, dict[str, Any]]:
    """(features, what the record says of them) of --metric and --features."""
    from .distances import load_features

    if args.metric is None or min(args.samples) < 20:
        raise ValueError(f"choose a --metric, and --samples of 20 or more; got {args.metric} and {args.samples}")
    features = load_features(args.metric, device, args.features)
    name = (args.metric if args.features else Path(args.metric).stem).removeprefix("fd_")
    title = {"pixels": "pixels (not FID)", "fid": "FID"}.get(args.metric, f"fd_{name} (not FID)")
    return features, {"metric": title, "sha256": features.sha256}


def _report_distance(about: dict[str, Any], features: Any, reference: Any, what: str) -> dict[str, Any]:
    """The record of compare_features, also printed as a sentence."""
    from .distances import compare_features
    from .runs import provenance

    found = compare_features(features, reference)
    low, high = found["interval"]
    limit = "fewer than five times as many images as features, so compare it at equal numbers alone"
    if found["limit"] is not None:
        limit = "without the bias of so few {:.2f} [{:.2f}, {:.2f}]".format(found["limit"], *found["limit_interval"])
    print(
        f"{about['metric']} {found['distance']:.2f} [{low:.2f}, {high:.2f}] of {found['images']:,} {what} to "
        f"{found['reference_images']:,} unaugmented training images of {about['data']}; {limit}; "
        f"KID {found['kid']:.5f} ± {found['kid_standard_error']:.5f}"
    )
    return about | {"of": what} | found | {"provenance": provenance()}


def _distance(args: argparse.Namespace, metric: Any, config: Any, model: Any, schedule: Any) -> dict[str, Any]:
    """{name of the metric: record} of samples from a run."""
    from .distances import extract, reference_features
    from .training import load_split

    features, about = metric
    train = load_split(replace(config, train_images=None), "train", model.device)
    reference = reference_features(features, train.originals[: args.reference_images], progress=True)
    samples = _draw(args, args.samples[0], args.nfe, config, model, schedule)
    nfe = args.nfe - (args.sampler == "heun" and args.nfe % 2 == 0)  # what it uses of an even number
    about |= {"data": train.name, "sampler": args.sampler, "nfe": nfe, "seed": args.seed}
    found = extract(features, samples, progress=True)
    what = f"samples ({args.sampler}, {nfe} evaluations)"
    return {about["metric"].split()[0]: _report_distance(about, found, reference, what)}


def _reference_only(args: argparse.Namespace) -> None:
    """Distances of held-out training images and of test images to the other training images, at each --samples."""
    import torch

    from .distances import reference_features
    from .draws import generator
    from .runs import load_run, write_json
    from .training import TrainConfig, load_split, resolve_device

    if (args.run_folder is None) == (args.data is None):
        raise ValueError("--reference-only measures the images of a RUN or of --data: give one of them")
    config = TrainConfig.from_dict(load_run(args.run_folder).config) if args.run_folder else TrainConfig(data=args.data)
    config = replace(config, data_root=args.data_root or config.data_root, train_images=None, conditional=False)
    device, most = resolve_device(args.device), max(args.samples)
    features, about = _metric(args, device)
    train, test = load_split(config, "train", device), load_split(config, "test", device)
    order = torch.randperm(len(train.originals), generator=generator(args.seed, 0, "reference"))
    real = train.originals[order[: most + (args.reference_images or len(order))].to(device)]
    if len(real) < most + 20:
        raise ValueError(f"{train.name} has {len(real)} training images; --samples holds {most} of them out")
    real, held_out = (reference_features(features, images, progress=True) for images in (real, test.originals[:most]))
    about |= {"data": train.name, "seed": args.seed}
    rows = [
        _report_distance(about, images[:count], real[most:], f"{split} images")
        for count in args.samples
        for split, images in (("held-out training", real[:most]), ("test", held_out))
    ]
    out = args.out or Path(f"reference-{about['metric'].split()[0]}.json")
    write_json(out, rows)
    print(out)


def _add_conflicts(commands: Any) -> None:
    parser = commands.add_parser(
        "conflicts",
        help="which timesteps conflict in a run or a diffusers pipeline, by how much, and how surely",
        description="Gradients of the losses of timestep bins, for a run or a diffusers pipeline on pixels. Writes "
        "conflicts.json and .png and, with --transfer, transfer.json and .png. Costs about --micro-batches training "
        "steps on --bins times --batch-per-bin images.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder, or local folder of a diffusers pipeline")
    parser.add_argument("--data", help="as of dysigma train (default: the run's own; for a pipeline, leaves)")
    parser.add_argument("--data-root", help="where CIFAR-10 lies, if not where it was in training")
    parser.add_argument("--num-images", type=int, help="use only the first so many training images")
    parser.add_argument("--bins", type=int, default=10, help="how many bins of timesteps (default: 10)")
    parser.add_argument(
        "--binning", choices=("timesteps", "log-snr"), default="timesteps", help="for equal widths in it"
    )
    parser.add_argument("--micro-batches", type=int, default=16, help="6 or more, for shorter intervals (default: 16)")
    parser.add_argument("--batch-per-bin", type=int, default=4, help="images per bin and micro-batch (default: 4)")
    parser.add_argument("--weighting", help="predefined weighting of the losses (default: unweighted)")
    parser.add_argument("--transfer", action="store_true", help="also fine-tune on each bin alone and test on all")
    parser.add_argument("--transfer-steps", type=int, default=50, help="steps of each fine-tuning (default: 50)")
    _add_draws(parser)
    parser.add_argument("--out", type=Path, help="folder (default: PATH/conflicts; for a pipeline, ./conflicts-NAME)")
    parser.set_defaults(run=_conflicts)


def _pipeline_parts(path: Path) -> tuple[Any, Any, str]:
    """(network, schedule, prediction type) of a diffusers pipeline."""
    import inspect

    from diffusers import DiffusionPipeline

    from .runs import read_json
    from .schedule import NoiseSchedule

    index = read_json(path / "model_index.json")
    parts = [part for part, origin in index.items() if isinstance(origin, list) and origin[0]]
    refused = "only networks on pixels that need timesteps, and classes at most, are measured"
    if other := [part for part in parts if index[part][0] != "diffusers" and "encoder" not in part]:
        raise ValueError(f"{path} has a {other[0]} of {index[other[0]][0]}; no code but that of diffusers is run")
    if other := [part for part in parts if "vae" in part or "encoder" in part]:
        raise ValueError(f"{path} has a {other[0]}, for latents or prompts; {refused}")
    name = "unet" if "unet" in parts else "transformer"
    if not {name, "scheduler"} <= set(parts):
        raise ValueError(f"{path} must have a unet or transformer, and a scheduler; it has {parts}")
    try:
        options = {"use_safetensors": True, "low_cpu_mem_usage": False}  # to use little wants accelerate
        pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:  # a damaged file makes the loaders raise almost anything
        raise ValueError(f"{path} does not open as a diffusers pipeline: {' '.join(str(error).split())}") from error
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
    from .training import load_split

    size, channels = network.config.get("sample_size"), network.config["in_channels"]
    size = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
    config = replace(config, data=args.data, train_images=None) if args.data else config
    config = replace(config, data_root=args.data_root or config.data_root, image_size=size, conditional=False)
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
    from .bins import Bins
    from .gradients import conflicts, negative_transfer
    from .runs import provenance, read_json
    from .training import TrainConfig, resolve_device
    from .weightings import make_weighting

    path, name, run = args.path, args.path.resolve().name, args.path / "config.json"
    foreign = (path / "model_index.json").is_file()
    out = args.out or (Path(f"conflicts-{name}") if foreign else path / "conflicts")
    if not foreign and not (run.is_file() and "weighting" in read_json(run)):
        raise ValueError(
            f"{path} is neither a run folder nor a diffusers pipeline (it has no model_index.json). A network alone "
            "does not say which noise schedule it was trained with"
        )
    if foreign and out.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{out} lies in the pipeline's folder, which is left as it is; choose another --out")
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
        raise ValueError(f"--weighting takes a predefined one; {args.weighting} learns its weights in training")
    bins = Bins.equal_log_snr(schedule.log_snr, args.bins) if args.binning == "log-snr" else args.bins
    common: dict[str, Any] = {"prediction_type": kind, "model_kwargs": kwargs, "seed": args.seed}
    sizes = {"micro_batches": args.micro_batches, "batch_per_bin": args.batch_per_bin}
    report = conflicts(network, data, schedule, bins, weighting=weighting, **sizes, **common)
    spans = [f"{first}-{end - 1}" for first, end in pairwise(report.edges)]
    print(f"{name}: {kind} network, {len(data):,} images of {data.name}, weighting {args.weighting or 'none'}\n")
    print(report.table().to_string(index=False, float_format="{:.3g}".format, na_rep="?"), end="\n\n")
    print(*_conflict_sentences(report, spans), sep="\n")
    cosines = {"naive: of averaged gradients": report.cosine, "debiased; hatched: undetermined": report.cosine_debiased}
    about = {"path": name, "data": data.name, "images": len(data), "provenance": provenance()}
    record = about | {"weighting": args.weighting, "report": report.to_dict()}
    _write(out, "conflicts", record, _draw_matrices(cosines, spans))
    if args.transfer:
        transfer = negative_transfer(network, data, schedule, bins, steps=args.transfer_steps, **common)
        rows = {key: getattr(transfer, key).tolist() for key in ("losses", "change", "change_se")}
        settings = {"edges": transfer.edges, "steps": args.transfer_steps, "seed": args.seed}
        _write(out, "transfer", about | settings | rows, _transfer(transfer, spans))


def _write(out: Path, name: str, record: dict[str, Any], figure: Any) -> None:
    from .runs import write_json

    write_json(out / f"{name}.json", record)
    figure.savefig(out / f"{name}.png", dpi=110)
    print(f"\n{out / name}.json and .png")


def _conflict_sentences(report: Any, spans: Sequence[str]) -> list[str]:
    """What a ConflictReport says, and how surely."""
    import torch

    cosine, (low, high), lines = report.cosine_debiased, report.interval(), []
    known, count = cosine.isfinite().triu(1), report.settings["micro_batches"]
    if pairs := int(known.sum()):
        i, j = divmod(int(torch.where(known, cosine, torch.inf).argmin()), len(spans))
        sure, negative = (int(x[known].sum()) for x in (high < 0, cosine < 0))
        lines = [
            f"Mean cosine of {pairs} pairs of bins: {report.mean_cosine:.3f} ± {report.mean_cosine_se:.3f} (standard "
            f"error, {count} micro-batches). Naive, shrunk by noise: {float(report.cosine[known].mean()):.3f}. Null, "
            f"gradients that cancel as at a minimiser: {report.null_cosine:.3f}.",
            f"Conflict: {negative} pairs have a negative cosine, {sure} of them for sure (95 % interval below 0; if "
            f"all cosines were 0, chance alone would give about {0.025 * pairs:.1f}).",
            f"Lowest cosine: {cosine[i, j]:.3f} [{low[i, j]:.3f}, {high[i, j]:.3f}], timesteps {spans[i]} and "
            f"{spans[j]}. It was picked as the lowest of {pairs}, so expect a less extreme one in a repeat.",
        ]
    if lost := [span for span, missing in zip(spans, cosine.diagonal().isnan(), strict=True) if missing]:
        lines.append(
            f"Undetermined: {report.undetermined} of {report.undetermined + pairs} pairs. The gradient of timesteps "
            f"{', '.join(lost)} does not stand out of its noise: use more --micro-batches (now {count}) or a larger "
            f"--batch-per-bin (now {report.settings['batch_per_bin']})."
        )
    ends, longest = report.stationarity_interval, float(report.gramian.diagonal().max()) ** 0.5
    verdict = "So some step lowers every bin's loss" if ends[0] > 0 else "Not told apart from Pareto stationary"
    return [
        *lines,
        f"Stationarity: the shortest convex combination of the gradients has norm {report.stationarity:.3g} "
        f"[{ends[0]:.3g}, {ends[1]:.3g}], the longest gradient {longest:.3g}. {verdict}.",
    ]


def _draw_matrices(matrices: dict[str, Any], spans: Sequence[str], limit: float = 1, unit: str = "cosine") -> Any:
    """Matrices of bins side by side on one scale."""
    import matplotlib.pyplot as plt

    from . import plots

    plots.use_style()
    side = max(5.6, 0.16 * len(spans))
    fig, axes = plt.subplots(1, len(matrices), figsize=((side + 1) * len(matrices), side), squeeze=False)
    for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        plots.heatmap(ax, matrix, labels=spans, limit=limit, unit=unit)
        ax.tick_params(axis="x", rotation=90)
        ax.set(title=title, xlabel="timesteps", ylabel="timesteps")
    return fig


def _transfer(transfer: Any, spans: Sequence[str]) -> Any:
    """Print what fine-tuning on one bin did to the others, and return its figure."""
    import torch

    # Two standard errors are a 95 % interval for the 64 draws of a bin.
    change, half = (100 * x / transfer.losses for x in (transfer.change, 2 * transfer.change_se))
    rose, fell, others = change > half, change < -half, ~torch.eye(len(spans), dtype=torch.bool)
    i, j = divmod(int(torch.where(others, change, -torch.inf).argmax()), len(spans))
    print(
        f"Transfer: fine-tuning on one bin lowered its own loss for sure in {int(fell.diagonal().sum())} of "
        f"{len(spans)} bins. Of {int(others.sum())} losses of other bins {int(rose[others].sum())} rose and "
        f"{int(fell[others].sum())} fell for sure (95 % intervals of the evaluation; each fine-tuning ran once). "
        f"Most: {spans[i]} changed {spans[j]} by {change[i, j]:+.1f} ± {half[i, j]:.1f} %."
    )
    title, limit = "dots: 95 % interval excludes 0", float(change.abs().max())
    fig = _draw_matrices({title: change}, spans, limit, "change of the loss, %")
    rows, columns = torch.nonzero(rose | fell).T
    fig.axes[0].plot(columns + 0.38, rows - 0.36, "k.", markersize=5)
    fig.axes[0].set(xlabel="loss at timesteps", ylabel="fine-tuned on timesteps")
    return fig


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="finished runs against the first: losses, ELBO, images to its loss; paired by seed, with intervals",
        description="Runs that differ in the seed alone are one arm. Columns: loss, of the last validation; ratio, of "
        "that to the first arm's, geometric mean over timesteps; bits, difference of the ELBO's diffusion term in "
        "bits/dim; reached, in how many seeds the arm gets where the first ends, after reach images, speedup times "
        "sooner; fluctuation of weights; mean losses of the two halves of the timesteps, whether no arm is lower in "
        "both, and in which share of seeds.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two run folders or more, the baseline first")
    parser.add_argument("--out", type=Path, help="folder for compare.json and compare.png")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    from .compare import compare, draw
    from .runs import load_run, provenance

    result = compare([load_run(path) for path in args.runs])
    intervals = "95 % intervals over paired seeds" if len(result.seeds) > 1 else "one seed, so no intervals"
    left_out = len(args.runs) - len(result.seeds) * len(result.table)
    print(f"against {result.table.index[0]}; seeds {', '.join(map(str, result.seeds))}: {intervals}")
    print(f"left out: {left_out} runs of seeds that not all arms have\n" if left_out else "")
    print(result)
    if args.out:
        record = result.to_dict() | {"runs": [path.resolve().name for path in args.runs], "provenance": provenance()}
        _write(args.out, "compare", record, draw(result))


def _add_race(commands: Any) -> None:
    parser = commands.add_parser("race", help="train arms x seeds on common random numbers; goes on where it stopped")
    parser.add_argument("spec", type=Path, metavar="SPEC", help="TOML file, such as data/races/weightings-leaves.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder for records.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, one CPU thread each (default: 1)")
    parser.add_argument("--device", help="instead of the specification's")
    parser.add_argument("--data-root", help="instead of the specification's")
    parser.set_defaults(run=_race)


def _race(args: argparse.Namespace) -> None:
    from .race import Race, race

    if args.jobs < 1:
        raise ValueError(f"--jobs must be positive; got {args.jobs}")
    given = {name: value for name, value in vars(args).items() if name in ("device", "data_root") and value is not None}
    print(race(Race.read(args.spec), args.out, jobs=args.jobs, overrides=given))


def _add_notebooks(commands: Any) -> None:
    parser = commands.add_parser("notebooks", help="execute the notebooks")
    parser.add_argument("names", nargs="*", help="notebooks to run, such as 00 or 06_train (default: all)")
    parser.add_argument("--fast", action="store_true", help="small sizes, in a temporary folder; committed pages stay")
    parser.add_argument("--folder", type=Path, default=Path("notebooks"), help="where they are (default: notebooks)")
    parser.add_argument("--out", type=Path, help="write pages and figures here instead of beside the sources")
    parser.add_argument("--no-solutions", action="store_true", help="leave the solutions out, for a class; needs --out")
    parser.set_defaults(run=_notebooks)


def _notebooks(args: argparse.Namespace) -> None:
    from .notebooks import build, find

    build(find(args.folder, args.names), fast=args.fast, out=args.out, solutions=not args.no_solutions)
    if args.out:
        print(f"executed notebooks and figures: {args.out}")


def _add_benchmark(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark", help="time training steps, ours and others', each weighting and a conflict report, in one run"
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32], help="one or more (default: 32)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; each round runs every contender once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--out", type=Path, help="JSON record to write, with a figure beside it")
    parser.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    from .benchmark import benchmark

    benchmark(args.model, args.image_size, args.batch_size, rounds=args.rounds, device=args.device, out=args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dysigma",
        description="Loss weightings for diffusion training, and analysis of the timestep objectives they trade off. "
        "Start with: dysigma train --out runs/first",
    )
    parser.add_argument("--version", action="version", version=f"dysigma {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = (_add_train, _add_runs, _add_sample, _add_evaluate, _add_conflicts, _add_compare, _add_race)
    for add in (*every, _add_notebooks, _add_benchmark):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(argv)
    from .notebooks import NotebookError
    from .training import TrainingDiverged

    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args.run(args)
    except (TrainingDiverged, NotebookError) as error:
        print(f"dysigma: {error}", file=sys.stderr)
        return 1
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        # str() of a KeyError is the repr of its message. Modules that are missing are those of the extra.
        hint = "; pip install 'dysigma[notebooks]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"dysigma: {error.args[0] if isinstance(error, KeyError) else error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ndysigma: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0
