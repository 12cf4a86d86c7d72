"""The command line. Bad input ends with one line and code 2."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from .. import __version__
from .audit import _add_audit
from .benchmark import _add_benchmark
from .compare import _add_compare
from .conflicts import _add_conflicts
from .evaluate import _add_evaluate
from .notebooks import _add_notebooks
from .race import _add_race
from .runs import _add_runs
from .sample import _add_sample
from .show import _add_show
from .train import _add_train


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dysigma",
        description="Loss weightings for diffusion training, and analysis of the timestep objectives they trade off. "
        "Start with: dysigma train --out runs/first",
    )
    parser.add_argument("--version", action="version", version=f"dysigma {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = (
        _add_train,
        _add_runs,
        _add_sample,
        _add_evaluate,
        _add_conflicts,
        _add_compare,
        _add_race,
        _add_audit,
        _add_show,
    )
    for add in (*every, _add_notebooks, _add_benchmark):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0 done, 1 the run failed or the audit does not agree, 2 bad input, 130 interrupted.
    """
    args = _parser().parse_args(argv)
    from ..course.pages import NotebookError
    from ..training.step import TrainingDiverged

    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return args.run(args) or 0
    except (TrainingDiverged, NotebookError) as error:
        print(f"dysigma: {error}", file=sys.stderr)
        return 1
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        # str() of a KeyError is the repr of its message. Modules that are missing are those of the extra.
        hint = (
            "; pip install 'dysigma[notebooks]'" if isinstance(error, ModuleNotFoundError) else ""
        )
        print(
            f"dysigma: {error.args[0] if isinstance(error, KeyError) else error}{hint}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ndysigma: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
