"""dysigma race: weightings against each other, on the same seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, add_command, check_least


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "race",
        run,
        help="train weightings x seeds on common random numbers; goes on where it stopped",
    )
    parser.add_argument(
        "spec",
        type=Path,
        metavar="SPEC",
        help="TOML file, such as data/races/weightings-leaves.toml",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for records.jsonl")
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at once, one CPU thread each (default: 1)"
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="train one after the other in this process: data are read and code is compiled once",
    )
    parser.add_argument("--device", help="instead of the specification's")
    parser.add_argument("--data-root", help="instead of the specification's")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_least(args, jobs=1)
    if args.in_process and args.jobs > 1:
        raise ValueError(
            f"--in-process trains one after the other; got --jobs {args.jobs} beside it"
        )

    from ..lab.race import Race, race

    overrides = {}
    if args.device is not None:
        overrides["device"] = args.device
    if args.data_root is not None:
        overrides["data_root"] = args.data_root
    spec = Race.read(args.spec)
    print(race(spec, args.out, jobs=args.jobs, in_process=args.in_process, overrides=overrides))
