"""The first picture of the course: one network, the same images, four objectives.

    python data/races/first_minute.py --out data/runs/first-minute

Each objective is trained at three learning rates; a record says how far its samples are from the
data, and 40 samples of each are kept. Call it again to go on where it stopped. An idle core needs
about three minutes for each of the fifteen trainings.

    python data/races/first_minute.py --along --out data/runs/first-minute

trains two of them again at the highest rate, on the first 24,000 of these images, and keeps what the
same 20 latents become along the way.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch

import dysigma
from dysigma.course.reader import AlongTraining, train_and_watch
from dysigma.distances import extract, frechet_distance, load_features, moments
from dysigma.evaluation import sample_images
from dysigma.runs import append_metrics, provenance, read_metrics, write_json

OBJECTIVES = {
    "noise, plain loss": {"prediction": "epsilon", "weighting": "const-eps"},
    "image, plain loss": {"prediction": "sample", "weighting": "const-x0"},
    "image, min-snr": {"prediction": "sample", "weighting": "min-snr"},
    "image, dy-sigma": {"prediction": "sample", "weighting": "dy-sigma"},
    "noise, min-snr": {"prediction": "epsilon", "weighting": "min-snr"},
}
RATES = (8e-3, 4e-3, 2e-3)
SHARED = {
    "data": "shapes",
    "image_size": 16,
    "conditional": True,
    "model": "tiny",
    "schedule": "cosine",
    "images": 48_000,
    "batch_size": 32,
    "warmup_images": 3_200,
    "validate_every": 12_000,
    "checkpoint_every": 48_000,
    "device": "cpu",
}
# For the animation: two objectives, and the numbers of images seen at which to draw.
ANIMATED = ("noise, plain loss", "image, min-snr")
MOMENTS = (320, 640, 1280, 1920, 2560, 3840, 5120, 7680, 10240, 12800, 15360, 19200, 24000)
SHOWN = 20
JUDGED = 500  # samples whose distance to the data is measured
KEPT = 40  # samples in the record


def file_name(words: str) -> str:
    """Words as part of the name of a file."""
    return words.replace(", ", "-").replace(" ", "-")


def draw_along(label: str, out: Path) -> None:
    """Train one objective; write what the same latents become, (moments, SHOWN, H, W, 3), and when."""
    fields = {**SHARED, **OBJECTIVES[label], "lr": RATES[0], "images": MOMENTS[-1]}
    config = dysigma.TrainConfig.from_dict(fields)
    folder = out / f"entry-{file_name(label)}"
    shutil.rmtree(folder, ignore_errors=True)
    along = AlongTraining(MOMENTS, count=SHOWN)
    train_and_watch(config, folder, along, finish=False)
    pictures = torch.stack([*along.samples.values()]).permute(0, 1, 3, 4, 2)
    np.savez_compressed(
        out / f"along-{file_name(label)}.npz", images=pictures.numpy(), seen=[*along.samples]
    )
    shutil.rmtree(folder)


def train_one(label: str, rate: float, out: Path, images: int) -> dict[str, object]:
    """Train one objective at one rate; returns its record and writes its samples."""
    fields = {**SHARED, **OBJECTIVES[label], "lr": rate, "images": images}
    config = dysigma.TrainConfig.from_dict(fields)
    folder = out / "entry"
    shutil.rmtree(folder, ignore_errors=True)
    run = dysigma.train(config, folder, progress=False)

    pipeline = run.pipeline()
    samples = sample_images(
        pipeline.unet,
        config.noise_schedule(),
        (JUDGED, 3, 16, 16),
        prediction_type=config.prediction,
        num_steps=25,
    )
    features = load_features("pixels")
    reference = moments(extract(features, dysigma.load_data("shapes", size=16).images))
    distance = frechet_distance(moments(extract(features, samples)), reference)

    name = file_name(f"{label} {rate:g}")
    np.savez_compressed(out / f"{name}.npz", images=samples[:KEPT].permute(0, 2, 3, 1).numpy())
    losses = [row["mean_loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(folder)
    return {
        "objective": label,
        "lr": rate,
        "images": images,
        "distance": distance,
        "samples": f"{name}.npz",
        "seconds": run.summary["seconds"],
        "last_mean_loss": losses[-1],
    }


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=SHARED["images"])
    parser.add_argument("--along", nargs="*", help="only what is drawn along the way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.along is not None:
        for label in arguments.along or ANIMATED:
            draw_along(label, out)
        return
    records = out / "records.jsonl"
    done = {(row["objective"], row["lr"]) for row in read_metrics(records)}
    for rate in RATES:
        for label in OBJECTIVES:
            if (label, rate) not in done:
                append_metrics(records, train_one(label, rate, out, arguments.images))
                write_json(out / "provenance.json", {"config": SHARED, **provenance()})
                print(label, rate, flush=True)


if __name__ == "__main__":
    main()
