"""dysigma evaluate: losses and ELBO of a run, and the distance of its samples to the training images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distances import FEWEST_IMAGES
from .common import (
    Commands,
    OpenRun,
    add_command,
    add_draw_options,
    check_least,
    draw_samples,
    open_run,
    prepare_output,
)
from .distances import load_metric, measure_reference, prepare_reference

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.dataset import ImageData
    from ..training.config import TrainConfig
    from .distances import Metric


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "evaluate",
        run,
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
    parser.add_argument(
        "--floor-images",
        type=int,
        default=0,
        help="also bracket the least reachable loss, from so many training images (default: 0, not)",
    )
    add_draw_options(parser)
    parser.add_argument(
        "--data",
        help="where the images of the run lie now, if they moved; for --reference-only without RUN, "
        "the images to measure: cifar10, an .npz file, ...",
    )
    parser.add_argument("--data-root", help="where CIFAR-10 lies, if not where it was in training")
    parser.add_argument(
        "--out", type=Path, help="JSON (default: RUN/evaluation.json, or ./reference-METRIC.json)"
    )
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


def _check_options(args: argparse.Namespace) -> None:
    if args.features and args.metric in (None, "pixels"):
        raise ValueError("--features belongs to a --metric other than pixels")
    check_least(args, seed=0, reference_images=FEWEST_IMAGES)
    if args.metric:
        check_least(args, samples=FEWEST_IMAGES)
    if args.reference_only:
        return
    if args.run_folder is None:
        raise ValueError("name the run to evaluate, or measure images with --reference-only")
    if len(args.samples) > 1:
        raise ValueError("several numbers of --samples are for --reference-only")
    check_least(args, num_images=1, timesteps=1, elbo_timesteps=1, nfe=1)
    if args.floor_images != 0 and args.floor_images < 4:
        raise ValueError(f"--floor-images is 4 or more, or 0; got {args.floor_images}")


def _images(
    args: argparse.Namespace, opened: OpenRun, config: TrainConfig, split: str
) -> ImageData:
    """The images of a split. Where --data says that they moved, they must be those of the run."""
    from ..training.parts import load_split

    if args.data is None:
        return load_split(config, split, opened.device)

    from ..training.identity import check_images, check_place, identity

    images = load_split(replace(config, data=args.data), split, opened.device)
    recorded = opened.run.summary.get("data")
    if recorded is None:
        check_place(config.data, args.data, args.run_folder)
    elif config.train_images == opened.config.train_images:
        found = identity(images, with_labels=config.conditional)
        check_images(recorded[split], found, f"{split} images of {args.data}", args.run_folder)
    return images


def _losses_and_elbo(
    args: argparse.Namespace,
    opened: OpenRun,
    network: nn.Module,
    test: ImageData,
    timesteps: Tensor,
) -> dict[str, Any]:
    """The record of losses and ELBO on the first test images, also printed."""
    from ..evaluation import validation_losses
    from ..runs.folder import describe_loss
    from ..runs.provenance import provenance

    prediction = opened.config.prediction
    images = test.images[: args.num_images]
    labels = None
    if opened.config.conditional and test.labels is not None:
        labels = test.labels[: args.num_images]

    losses = validation_losses(
        network,
        images,
        opened.schedule,
        prediction,
        timesteps=timesteps,
        labels=labels,
        seed=args.seed,
        progress=True,
    )
    print(describe_loss(float(losses.mean()), prediction, len(images)))
    return {
        "images": len(images),
        "seed": args.seed,
        "prediction": prediction,
        "provenance": provenance(),
        "timesteps": timesteps.tolist(),
        "losses": losses.tolist(),
        "elbo": _elbo(args, opened, network, images, labels),
    }


def _elbo(
    args: argparse.Namespace,
    opened: OpenRun,
    network: nn.Module,
    images: Tensor,
    labels: Tensor | None,
) -> dict[str, float | None] | None:
    """The record of the ELBO, also printed; None, and the reason printed, where there is none."""
    from ..evaluation import check_elbo, elbo

    prediction = opened.config.prediction
    try:
        check_elbo(opened.schedule, prediction, len(images), args.elbo_timesteps)
    except ValueError as error:
        print(f"ELBO: none, {error}")
        return None
    bound = elbo(
        network,
        images,
        opened.schedule,
        prediction,
        timesteps_per_image=args.elbo_timesteps,
        labels=labels,
        seed=args.seed,
        progress=True,
    )
    terms: dict[str, float | None] = {**bound._asdict()}
    spread = f" ± {bound.standard_error:.4f}"
    if len(images) == 1:  # the standard error is over images
        terms["standard_error"] = None
        spread = ""
    print(f"ELBO: at most {bound.bits_per_dim:.4f}{spread} bits/dim")
    return terms


def _gap_to_floor(
    images: ImageData, opened: OpenRun, timesteps: Tensor, losses: list[float], seed: int
) -> dict[str, Any]:
    """The record of bounds of the irreducible loss, from training images; the gap to them is printed."""
    import torch

    from ..floors import floor_bounds

    prediction = opened.config.prediction
    bounds = floor_bounds(
        images, opened.schedule, prediction, timesteps, seed=seed, num_samples=128, progress=True
    )
    lower = bounds.lower
    upper = bounds.upper()
    loss = float(torch.tensor(losses).mean())
    print(
        f"Floor of the mean loss, from {len(images)} training images: between {lower.mean():.4f} and "
        f"{upper.mean():.4f}; so the gap of {loss:.4f} to it is at most {loss - float(lower.mean()):.4f} and at least "
        f"{max(0.0, loss - float(upper.mean())):.4f}"
    )
    return {"images": len(images), "lower": lower.tolist(), "upper": upper.tolist()}


def _distance(
    args: argparse.Namespace,
    opened: OpenRun,
    network: nn.Module,
    metric: Metric,
    reference: Tensor,
    data: str,
) -> dict[str, Any]:
    """The record of the distance of samples, also printed."""
    from ..distances import extract
    from ..runs.provenance import provenance
    from .distances import report_distance

    evaluations = args.nfe
    if args.sampler == "heun" and evaluations % 2 == 0:
        evaluations -= 1  # its first step takes one evaluation, each other two
    samples = draw_samples(opened, network, args.sampler, args.samples[0], args.nfe, args.seed)
    features = extract(metric.features, samples, progress=True)
    what = f"samples ({args.sampler}, {evaluations} evaluations)"
    return {
        **report_distance(metric, features, reference, data, what),
        "sampler": args.sampler,
        "nfe": evaluations,
        "seed": args.seed,
        "provenance": provenance(),
    }


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    _check_options(args)
    if args.reference_only:
        measure_reference(args)
        return

    from ..evaluation import check_sampling, evaluation_timesteps
    from ..runs.files import read_config, write_json

    opened = open_run(args.run_folder, args.device)
    config = replace(opened.config, data_root=args.data_root or opened.config.data_root)
    timesteps = evaluation_timesteps(opened.schedule.num_timesteps, args.timesteps)
    metric = None
    if args.metric:
        check_sampling(opened.schedule, args.sampler, args.nfe, args.samples[0])
        metric = load_metric(args, opened.device)
    out = prepare_output(args.out or args.run_folder / "evaluation.json", ".json")
    distances = read_config(out).get("distances", {}) if out.exists() else {}
    test = _images(args, opened, config, "test")
    if metric:
        train = _images(args, opened, replace(config, train_images=None), "train")
        reference = prepare_reference(metric, train, args.reference_images)

    floor_images = None
    if args.floor_images:
        if config.conditional:
            raise ValueError("--floor-images brackets the loss of networks without classes alone")
        train_config = replace(config, train_images=args.floor_images)
        floor_images = _images(args, opened, train_config, "train")

    network = opened.load_network()
    record = _losses_and_elbo(args, opened, network, test, timesteps)
    if floor_images is not None:
        record["floor"] = _gap_to_floor(
            floor_images, opened, timesteps, record["losses"], args.seed
        )
    if distances:
        record["distances"] = distances
    write_json(out, record)
    if metric:
        # Samples take longest and something may stop them: what was measured so far is written.
        found = _distance(args, opened, network, metric, reference, train.name)
        record["distances"] = {**distances, metric.key: found}
        write_json(out, record)
    print(out)
