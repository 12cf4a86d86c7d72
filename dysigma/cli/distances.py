"""The distance of samples, or of other images, to the training images of a run: what `dysigma evaluate --metric` measures."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distances import FEWEST_IMAGES, Features

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.dataset import ImageData
    from ..training.config import TrainConfig

TITLES = {"pixels": "pixels (not FID)", "fid": "FID"}


@dataclass(frozen=True)
class Metric:
    """Features, and the name under which their distance is told."""

    features: Features
    title: str

    @property
    def key(self) -> str:
        """The title without its remark: the key of the record."""
        return self.title.split()[0]


def load_metric(args: argparse.Namespace, device: torch.device) -> Metric:
    """What --metric and --features name; ValueError if nothing can be measured with it."""
    from ..distances import load_features

    if args.metric is None:
        raise ValueError("choose a --metric: fid, pixels, or a TorchScript file")
    features = load_features(args.metric, device, args.features)
    name = args.metric if args.features else Path(args.metric).stem
    own_title = f"fd_{name.removeprefix('fd_')} (not FID)"
    return Metric(features, TITLES.get(args.metric, own_title))


def prepare_reference(metric: Metric, train: ImageData, count: int | None) -> Tensor:
    """Features of the training images as they were before augmentation; ValueError if they are too few."""
    from ..distances import reference_features

    originals = train.originals[:count]
    if len(originals) < FEWEST_IMAGES:
        raise ValueError(
            f"{train.name} has {len(originals)} training images, and a distance to them wants "
            f"{FEWEST_IMAGES}: leave out --metric"
        )
    return reference_features(metric.features, originals, progress=True)


def report_distance(
    metric: Metric, features: Tensor, reference: Tensor, data: str, what: str
) -> dict[str, Any]:
    """The record of what compare_features finds, also printed as a sentence."""
    from ..distances import compare_features

    found = compare_features(features, reference)
    low, high = found["interval"]
    limit = "fewer than five times as many images as features, so compare it at equal numbers alone"
    if found["limit"] is not None:
        limit_low, limit_high = found["limit_interval"]
        limit = (
            f"without the bias of so few {found['limit']:.2f} [{limit_low:.2f}, {limit_high:.2f}]"
        )
    print(
        f"{metric.title} {found['distance']:.2f} [{low:.2f}, {high:.2f}] of "
        f"{found['images']:,} {what} to {found['reference_images']:,} unaugmented training images of {data}; "
        f"{limit}; KID {found['kid']:.5f} ± {found['kid_standard_error']:.5f}"
    )
    return {
        "metric": metric.title,
        "sha256": metric.features.sha256,
        "data": data,
        "of": what,
        **found,
    }


def _reference_configuration(args: argparse.Namespace) -> TrainConfig:
    """The configuration that names the images of --reference-only: all of them, without labels."""
    from ..runs.folder import load_run
    from ..training.config import TrainConfig

    if (args.run_folder is None) == (args.data is None):
        raise ValueError(
            "--reference-only measures the images of a RUN or of --data: give one of them"
        )
    config = (
        TrainConfig(data=args.data)
        if args.data
        else TrainConfig.from_dict(load_run(args.run_folder).config)
    )
    data_root = args.data_root or config.data_root
    return replace(config, data_root=data_root, train_images=None, conditional=False)


def measure_reference(args: argparse.Namespace) -> None:
    """Distances of held-out training images and of test images to the other training images, at each --samples."""
    import torch

    from ..devices import resolve_device
    from ..distances import reference_features
    from ..randomness import generator
    from ..runs.files import write_json
    from ..runs.provenance import provenance
    from ..training.parts import load_split
    from .common import prepare_output

    config = _reference_configuration(args)
    device = resolve_device(args.device)
    metric = load_metric(args, device)
    out = prepare_output(args.out or Path(f"reference-{metric.key}.json"), ".json")
    train = load_split(config, "train", device)
    test = load_split(config, "test", device)

    # The first of a shuffled order are held out, the others are the reference.
    held_out = max(args.samples)
    order = torch.randperm(len(train.originals), generator=generator(args.seed, 0, "reference"))
    end = held_out + (args.reference_images or len(order))
    shuffled = train.originals[order[:end].to(device)]
    if len(shuffled) < held_out + FEWEST_IMAGES:
        raise ValueError(
            f"{train.name} has {len(shuffled)} training images; --samples holds {held_out} of them out"
        )
    of_train = reference_features(metric.features, shuffled, progress=True)
    of_test = reference_features(metric.features, test.originals[:held_out], progress=True)
    reference = of_train[held_out:]

    rows: list[dict[str, Any]] = []
    for count in args.samples:
        for split, images in (("held-out training", of_train[:held_out]), ("test", of_test)):
            what = f"{split} images"
            row = report_distance(metric, images[:count], reference, train.name, what)
            rows.append({**row, "seed": args.seed, "provenance": provenance()})
            write_json(out, rows)
    print(out)
