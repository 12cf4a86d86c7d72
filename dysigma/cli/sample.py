"""dysigma sample: images of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    Commands,
    add_command,
    add_draw_options,
    check_least,
    draw_samples,
    open_run,
    prepare_output,
)

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "sample",
        run,
        help="draw images from a run as a PNG grid and, if asked, an .npz file",
    )
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="run folder written by dysigma train"
    )
    parser.add_argument("--num-images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument(
        "--sampler", default="ddim", help="ddim, dpm-solver, heun or ddpm (default: ddim)"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="network evaluations per image (default: 50)"
    )
    add_draw_options(parser)
    parser.add_argument(
        "--out", type=Path, help="picture to write (default: RUN/samples-SAMPLER-STEPS.png)"
    )
    parser.add_argument(
        "--npz", type=Path, help="also write the images as an uint8 array (N, H, W, C)"
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_least(args, num_images=1, steps=1, seed=0)

    import numpy

    from ..evaluation import check_sampling
    from ..images import save_grid

    opened = open_run(args.run_folder, args.device)
    check_sampling(opened.schedule, args.sampler, args.steps, args.num_images)
    default = args.run_folder / f"samples-{args.sampler}-{args.steps}.png"
    out = prepare_output(args.out or default, *PICTURES)
    if args.npz:
        prepare_output(args.npz, ".npz")

    network = opened.load_network()
    images = draw_samples(opened, network, args.sampler, args.num_images, args.steps, args.seed)
    if args.npz:
        numpy.savez_compressed(args.npz, images=images.permute(0, 2, 3, 1).cpu().numpy())
    save_grid(images, out, scale=2)
    print(out)
