"""dysigma runs"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def _add_runs(commands: Any) -> None:
    parser = commands.add_parser(
        "runs", help="list the runs and races in a folder: state, progress, last line"
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.set_defaults(run=_runs)


def _runs(args: argparse.Namespace) -> None:
    from ..runs.folder import find_runs

    for path, state, progress, last in find_runs(args.folder):
        print(f"{state:12} {progress:32} {path}: {last}")
