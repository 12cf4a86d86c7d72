"""dysigma notebooks: execute the pages of the course."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from .common import Commands, add_command, check_least, check_writable


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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--hosted",
        type=Path,
        metavar="DIR",
        help="do not execute: write copies for hosted GPUs here, with a set-up cell at the top",
    )
    parser.add_argument(
        "--repository",
        metavar="URL",
        help="what that cell clones (default: where this checkout's origin lies)",
    )
    instead.add_argument(
        "--slides",
        type=Path,
        metavar="DIR",
        help="do not execute: write slides of the executed pages here, for a class",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="notebooks at once, one CPU thread each (default: 2)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_least(args, jobs=1)

    from ..course.pages import build, find, write_hosted
    from ..course.slides import write_slides

    sources = find(args.folder, args.names)
    if args.hosted is not None:
        repository = args.repository or _address_of_origin(args.folder)
        written = write_hosted(sources, args.hosted, repository)
        print(f"{len(written)} pages that begin by cloning {repository}: {args.hosted}")
        return
    if args.slides is not None:
        written = write_slides(sources, check_writable(args.slides))
        print(f"slides of {len(written)} pages, to open in a browser: {args.slides}")
        return
    build(
        sources,
        fast=args.fast,
        out=args.out,
        solutions=not args.no_solutions,
        jobs=args.jobs,
    )
    if args.out:
        print(f"executed notebooks and figures: {args.out}")


def _address_of_origin(folder: Path) -> str:
    """The address from which this checkout was cloned; ValueError if there is none on the web."""
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        address = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        address = ""
    if "://" not in address or "@" in address:
        raise ValueError(
            "a hosted machine must clone this project from somewhere: give its public address "
            "with --repository https://..."
        )
    return address
