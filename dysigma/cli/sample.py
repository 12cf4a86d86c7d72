"""dysigma sample"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import _add_draws, _device_run, _draw


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample", help="draw images from a run as a PNG grid and, if asked, an .npz file"
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
    _add_draws(parser)
    parser.add_argument(
        "--out", type=Path, help="PNG to write (default: RUN/samples-SAMPLER-STEPS.png)"
    )
    parser.add_argument(
        "--npz", type=Path, help="also write the images as an uint8 array (N, H, W, C)"
    )
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> None:
    import numpy

    from ..evaluation import check_sampling
    from ..images import save_grid

    config, schedule, _, load = _device_run(args.run_folder, args.device)
    check_sampling(schedule, args.sampler, args.steps, args.num_images)
    images = _draw(args, args.num_images, args.steps, config, load(), schedule)
    out = args.out or args.run_folder / f"samples-{args.sampler}-{args.steps}.png"
    save_grid(images, out, scale=2)
    if args.npz:
        numpy.savez_compressed(args.npz, images=images.permute(0, 2, 3, 1).cpu().numpy())
    print(out)
