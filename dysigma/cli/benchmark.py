"""dysigma benchmark: how fast training steps are."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, add_command, check_least, prepare_output


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "benchmark",
        run,
        help="time training steps, ours and others', each weighting and a conflict report, in one run",
    )
    parser.add_argument("--model", default="tiny", help="network (default: tiny)")
    parser.add_argument("--image-size", type=int, default=16, help="pixels (default: 16)")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[32], help="one or more (default: 32)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="timed rounds; each round runs every contender once (default: 20)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--out", type=Path, help="JSON record to write, with a figure beside it")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_least(args, image_size=1, batch_size=1, rounds=1)

    from ..lab.benchmark import benchmark

    if args.out:
        prepare_output(args.out, ".json")
    benchmark(
        args.model,
        args.image_size,
        args.batch_size,
        rounds=args.rounds,
        device=args.device,
        out=args.out,
    )
