"""dysigma evaluate"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .common import _add_draws, _device_run, _draw


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="per-timestep validation losses and ELBO of a run; with --metric also FID or another distance",
        description="Losses and ELBO on test images, and with --metric the Fréchet distance and KID of samples to the "
        "unaugmented training images. Writes RUN/evaluation.json.",
    )
    parser.add_argument(
        "run_folder",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="run folder written by dysigma train",
    )
    parser.add_argument("--num-images", type=int, default=256, help="test images (default: 256)")
    parser.add_argument(
        "--timesteps", type=int, default=50, help="timesteps of the loss curve (default: 50)"
    )
    parser.add_argument(
        "--elbo-timesteps",
        type=int,
        default=50,
        help="timesteps per image of the ELBO (default: 50)",
    )
    _add_draws(parser)
    parser.add_argument("--data-root", help="where CIFAR-10 lies, if not where it was in training")
    group = parser.add_argument_group("distance of samples")
    group.add_argument(
        "--metric",
        help="fid, pixels, a TorchScript file, or a name of your own for that in --features",
    )
    group.add_argument("--features", type=Path, help="TorchScript file from uint8 images to (N, D)")
    group.add_argument(
        "--samples", type=int, nargs="+", default=[10_000], help="how many (default: 10000)"
    )
    group.add_argument(
        "--nfe", type=int, default=50, help="network evaluations per sample (default: 50)"
    )
    group.add_argument(
        "--sampler", default="ddim", help="ddim, dpm-solver, heun or ddpm (default: ddim)"
    )
    group.add_argument(
        "--reference-images",
        type=int,
        help="only so many training images (default: all exact ones)",
    )
    group.add_argument(
        "--reference-only",
        action="store_true",
        help="of held-out training and of test images instead",
    )
    group.add_argument(
        "--data", help="for --reference-only without RUN: cifar10, an .npz file, ..."
    )
    group.add_argument(
        "--out", type=Path, help="JSON (default: RUN/evaluation.json, or ./reference-METRIC.json)"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from ..evaluation import check_sampling, elbo, evaluation_timesteps, validation_losses
    from ..runs.files import read_config, write_json
    from ..runs.provenance import provenance
    from ..training.parts import load_split

    if (args.features and args.metric in (None, "pixels")) or (args.reference_images or 20) < 20:
        raise ValueError(
            "--features belongs to a --metric other than pixels, and --reference-images is 20 or more"
        )
    if args.reference_only:
        return _reference_only(args)
    if args.run_folder is None or args.data or len(args.samples) > 1:
        raise ValueError(
            "name the run to evaluate; --data and several numbers of --samples are for --reference-only"
        )
    if args.num_images < 2 or args.elbo_timesteps < 1:
        raise ValueError(
            f"need --num-images >= 2, --elbo-timesteps >= 1; got {args.num_images}, {args.elbo_timesteps}"
        )
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
    labels = (
        None if not config.conditional or test.labels is None else test.labels[: args.num_images]
    )
    options: dict[str, Any] = {"labels": labels, "seed": args.seed, "progress": True}
    losses = validation_losses(
        model, images, schedule, config.prediction, timesteps=timesteps, **options
    )
    bound = elbo(
        model,
        images,
        schedule,
        config.prediction,
        timesteps_per_image=args.elbo_timesteps,
        **options,
    )
    print(
        f"{config.prediction} loss of the EMA weights on {len(images)} test images: {float(losses.mean()):.5f}"
    )
    print(f"ELBO: at most {bound.bits_per_dim:.4f} ± {bound.standard_error:.4f} bits/dim")
    curve = {"timesteps": timesteps.tolist(), "losses": losses.tolist()}
    about = {
        "images": len(images),
        "seed": args.seed,
        "prediction": config.prediction,
        "provenance": provenance(),
    }
    write_json(
        out,
        about | curve | {"elbo": bound._asdict()} | ({"distances": distances} if distances else {}),
    )
    print(out)


def _metric(args: argparse.Namespace, device: Any) -> tuple[Any, dict[str, Any]]:
    """(features, what the record says of them) of --metric and --features."""
    from ..distances import load_features

    if args.metric is None or min(args.samples) < 20:
        raise ValueError(
            f"choose a --metric, and --samples of 20 or more; got {args.metric} and {args.samples}"
        )
    features = load_features(args.metric, device, args.features)
    name = (args.metric if args.features else Path(args.metric).stem).removeprefix("fd_")
    title = {"pixels": "pixels (not FID)", "fid": "FID"}.get(args.metric, f"fd_{name} (not FID)")
    return features, {"metric": title, "sha256": features.sha256}


def _report_distance(
    about: dict[str, Any], features: Any, reference: Any, what: str
) -> dict[str, Any]:
    """The record of compare_features, also printed as a sentence."""
    from ..distances import compare_features
    from ..runs.provenance import provenance

    found = compare_features(features, reference)
    low, high = found["interval"]
    limit = "fewer than five times as many images as features, so compare it at equal numbers alone"
    if found["limit"] is not None:
        limit = "without the bias of so few {:.2f} [{:.2f}, {:.2f}]".format(
            found["limit"], *found["limit_interval"]
        )
    print(
        f"{about['metric']} {found['distance']:.2f} [{low:.2f}, {high:.2f}] of {found['images']:,} {what} to "
        f"{found['reference_images']:,} unaugmented training images of {about['data']}; {limit}; "
        f"KID {found['kid']:.5f} ± {found['kid_standard_error']:.5f}"
    )
    return about | {"of": what} | found | {"provenance": provenance()}


def _distance(
    args: argparse.Namespace, metric: Any, config: Any, model: Any, schedule: Any
) -> dict[str, Any]:
    """{name of the metric: record} of samples from a run."""
    from ..distances import extract, reference_features
    from ..training.parts import load_split

    features, about = metric
    train = load_split(replace(config, train_images=None), "train", model.device)
    reference = reference_features(
        features, train.originals[: args.reference_images], progress=True
    )
    samples = _draw(args, args.samples[0], args.nfe, config, model, schedule)
    nfe = args.nfe - (
        args.sampler == "heun" and args.nfe % 2 == 0
    )  # what it uses of an even number
    about |= {"data": train.name, "sampler": args.sampler, "nfe": nfe, "seed": args.seed}
    found = extract(features, samples, progress=True)
    what = f"samples ({args.sampler}, {nfe} evaluations)"
    return {about["metric"].split()[0]: _report_distance(about, found, reference, what)}


def _reference_only(args: argparse.Namespace) -> None:
    """Distances of held-out training images and of test images to the other training images, at each --samples."""
    import torch

    from ..devices import resolve_device
    from ..distances import reference_features
    from ..randomness import generator
    from ..runs.files import write_json
    from ..runs.folder import load_run
    from ..training.config import TrainConfig
    from ..training.parts import load_split

    if (args.run_folder is None) == (args.data is None):
        raise ValueError(
            "--reference-only measures the images of a RUN or of --data: give one of them"
        )
    config = (
        TrainConfig.from_dict(load_run(args.run_folder).config)
        if args.run_folder
        else TrainConfig(data=args.data)
    )
    config = replace(
        config, data_root=args.data_root or config.data_root, train_images=None, conditional=False
    )
    device, most = resolve_device(args.device), max(args.samples)
    features, about = _metric(args, device)
    train, test = load_split(config, "train", device), load_split(config, "test", device)
    order = torch.randperm(len(train.originals), generator=generator(args.seed, 0, "reference"))
    real = train.originals[order[: most + (args.reference_images or len(order))].to(device)]
    if len(real) < most + 20:
        raise ValueError(
            f"{train.name} has {len(real)} training images; --samples holds {most} of them out"
        )
    real, held_out = (
        reference_features(features, images, progress=True)
        for images in (real, test.originals[:most])
    )
    about |= {"data": train.name, "seed": args.seed}
    rows = [
        _report_distance(about, images[:count], real[most:], f"{split} images")
        for count in args.samples
        for split, images in (("held-out training", real[:most]), ("test", held_out))
    ]
    out = args.out or Path(f"reference-{about['metric'].split()[0]}.json")
    write_json(out, rows)
    print(out)
