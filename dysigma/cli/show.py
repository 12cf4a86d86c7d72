"""dysigma show"""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, add_command, prepare_figure, read_pairs
from .schedules import add_sampler, add_schedule, read_schedule


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "show",
        run,
        help="preview what a training run weighs: density of timesteps, weights, and their product",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print and draw the density of timesteps, the loss weights and their product, the objective.",
        epilog="example:\n"
        "  dysigma show --weighting min-snr --weighting-params gamma=3 --timestep-sampler logit-normal \\\n"
        "    --schedule scaled-linear --prediction v_prediction --out preview.png",
    )
    parser.add_argument(
        "--weighting", default="const-eps", metavar="NAME", help="(default: const-eps)"
    )
    parser.add_argument("--weighting-params", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--prediction",
        default="epsilon",
        metavar="TARGET",
        help="of the network (default: epsilon)",
    )
    add_sampler(parser)
    add_schedule(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="figure to write")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..auditing import preview
    from ..samplers import make_sampler
    from ..weightings import make_weighting

    if args.out:
        prepare_figure(args.out)
    schedule = read_schedule(args, args.prediction)
    weighting = make_weighting(
        args.weighting, schedule, args.prediction, **read_pairs(args.weighting_params)
    )
    name = args.timestep_sampler or "uniform"
    params = read_pairs(args.sampler_params)
    sampler = make_sampler(name, schedule, weighting=weighting, **params)
    shown = preview(weighting, sampler, schedule)
    print(shown.table())
    print("\nAll columns have mean 1 over the timesteps; the weight is on the network's own error.")
    if weighting.learns:
        print(f"{args.weighting} learns; this is how it starts.")
    if sampler.corrected:
        print(f"{name} is corrected for its density, so that the objective is the weight alone.")
    if args.out:
        from ..plots import preview_figure

        weighting_label = " ".join([args.weighting, *args.weighting_params])
        sampler_label = " ".join([name, *args.sampler_params])
        preview_figure(shown, weighting_label, sampler_label).savefig(args.out, dpi=110)
        print(args.out)
