"""Samples at the end of a race: chosen arms trained again with its first seed, and sampled from the same latents.

python data/races/samples.py data/races/race-leaves.toml --out data/runs/race-leaves/samples.png
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dysigma import plots
from dysigma.evaluation import sample_images
from dysigma.lab.race import Race
from dysigma.training import load_split, train

COLUMNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("race", type=Path, help="specification of the race")
    parser.add_argument(
        "--arms", nargs="+", default=["const-x0", "const-eps", "min-snr", "uncertainty", "dy-sigma"]
    )
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG file")
    given = parser.parse_args()
    race = Race.read(given.race)
    planned, cpu = dict(race.entries()), torch.device("cpu")
    plots.use_style()
    fig, axes = plt.subplots(
        len(race.grid), 1, figsize=(6, 0.56 * len(race.grid) * (len(given.arms) + 1.2))
    )
    with tempfile.TemporaryDirectory() as scratch:
        for ax, label in zip(axes.flat, race.grid, strict=True):
            config = planned[label, given.arms[0], race.seeds[0]]
            rows = [load_split(config, "test", cpu).images[:COLUMNS]]
            for arm in given.arms:
                config = planned[label, arm, race.seeds[0]]
                pipe = train(config, Path(scratch) / label / arm, progress=False).pipeline()
                shape, kind = (
                    (COLUMNS, *rows[0].shape[1:]),
                    config.noise_schedule().canonical(config.prediction),
                )
                rows.append(
                    sample_images(pipe.unet, config.noise_schedule(), shape, prediction_type=kind)
                )
                print(label, arm, flush=True)
            plots.image_grid(
                ax,
                torch.cat(rows).numpy(),
                columns=COLUMNS,
                row_labels=["test images", *given.arms],
            )
            ax.set_title(f"{label}: {config.images:,} images, 50 DDIM steps")
    fig.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
