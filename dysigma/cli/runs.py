"""dysigma runs: what lies in a folder of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "runs",
        run,
        help="list the runs and races in a folder: state, progress, loss",
        description="One line for each run and race in and below a folder. A finished run shows its validation loss, "
        "the one that dysigma train told at its end; one that goes on shows the weighted loss of its last steps.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..runs.folder import find_runs

    for path, state, progress, last in find_runs(args.folder):
        print(f"{state:12} {progress:32} {path}: {last}")
