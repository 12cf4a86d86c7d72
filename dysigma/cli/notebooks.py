"""dysigma notebooks: execute the pages of the course."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import add_command

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "notebooks", run, help="execute the notebooks")
    parser.add_argument(
        "names", nargs="*", help="notebooks to run, such as 00 or 06_train (default: all)"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="small sizes, in a temporary folder; committed pages stay",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("notebooks"), help="where they are (default: notebooks)"
    )
    parser.add_argument(
        "--out", type=Path, help="write pages and figures here instead of beside the sources"
    )
    parser.add_argument(
        "--no-solutions",
        action="store_true",
        help="leave the solutions out, for a class; needs --out",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="notebooks at once, one CPU thread each (default: 2)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..course.pages import build, find

    build(
        find(args.folder, args.names),
        fast=args.fast,
        out=args.out,
        solutions=not args.no_solutions,
        jobs=args.jobs,
    )
    if args.out:
        print(f"executed notebooks and figures: {args.out}")
