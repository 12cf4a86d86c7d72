"""dysigma race"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def _add_race(commands: Any) -> None:
    parser = commands.add_parser(
        "race", help="train arms x seeds on common random numbers; goes on where it stopped"
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
    parser.add_argument("--device", help="instead of the specification's")
    parser.add_argument("--data-root", help="instead of the specification's")
    parser.set_defaults(run=_race)


def _race(args: argparse.Namespace) -> None:
    from ..lab.race import Race, race

    if args.jobs < 1:
        raise ValueError(f"--jobs must be positive; got {args.jobs}")
    given = {
        name: value
        for name, value in vars(args).items()
        if name in ("device", "data_root") and value is not None
    }
    print(race(Race.read(args.spec), args.out, jobs=args.jobs, overrides=given))
