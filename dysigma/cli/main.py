"""The command line: finds the command, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import __version__
from . import (
    audit,
    benchmark,
    compare,
    conflicts,
    evaluate,
    notebooks,
    race,
    runs,
    sample,
    show,
    train,
)

# In the order in which --help lists them.
COMMANDS = (
    train,
    runs,
    sample,
    evaluate,
    conflicts,
    compare,
    race,
    audit,
    show,
    notebooks,
    benchmark,
)
PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = tuple(
    Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")
)

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; args.run is the function of the one that was named."""
    parser = argparse.ArgumentParser(
        prog="dysigma",
        description="Loss weightings for diffusion training, and analysis of the timestep objectives they trade off. "
        "Start with: dysigma train --out runs/first",
    )
    parser.add_argument("--version", action="version", version=f"dysigma {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _is_foreign(filename: str) -> bool:
    """Whether a file is neither of this package nor installed: code of the user's own."""
    if filename.startswith("<"):  # made by a program, as dataclasses do
        return False
    path = Path(filename).resolve()
    return not any(path.is_relative_to(folder) for folder in (PACKAGE, *INSTALLED))


def _words_of_foreign_code(error: BaseException) -> str | None:
    """Where and how code of the user's own failed, or None where it took no part."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if _is_foreign(frame.filename)
    ]
    if not frames:
        return None
    last = frames[-1]
    name = Path(last.filename).name
    message = " ".join(str(error).split())
    return f"{name}, line {last.lineno}: {type(error).__name__}: {message}"


def _words_of(error: Exception) -> str:
    """The message of an error, on one line where it has one."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() of a KeyError is the repr of its message
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install 'dysigma[notebooks]'"
    return str(error)


def _explain(error: Exception) -> int | None:
    """Print one line about an error that the user can mend and return the exit code; None for any other error."""
    # What is raised there is imported here: --help must not wait for it.
    from ..course.pages import NotebookError
    from ..devices import is_out_of_memory
    from ..training.step import TrainingDiverged

    if isinstance(error, TrainingDiverged | NotebookError):
        print(f"dysigma: {error}", file=sys.stderr)
        return FAILED
    if is_out_of_memory(error):
        reason = _words_of(error).splitlines()[0]
        print(
            f"dysigma: {reason} Take a smaller batch or network, end what else uses the GPU, or use --device cpu",
            file=sys.stderr,
        )
        return FAILED
    if words := _words_of_foreign_code(error):
        print(f"dysigma: {words} (--debug prints the traceback)", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, ValueError | KeyError | TypeError | OSError | ImportError):
        print(f"dysigma: {_words_of(error)}", file=sys.stderr)
        return BAD_INPUT
    return None


def _on_sigterm(action: Any) -> None:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, action)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings of this package as its errors are shown; those of others as Python does."""
    as_python_does = warnings.formatwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if PACKAGE in Path(filename).parents and category is UserWarning:
            return f"dysigma: {message}\n"
        return as_python_does(message, category, filename, lineno, line)

    warnings.formatwarning = show
    try:
        yield
    finally:
        warnings.formatwarning = as_python_does


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 bad input, 130 interrupted.

    1 says that a run failed, or, of audit, that the function is not what it claims to be. With
    --debug every error passes through, so that Python prints its traceback.
    """
    args = make_parser().parse_args(argv)
    _on_sigterm(signal.default_int_handler)
    try:
        with _warnings_in_one_line():
            code: int | None = args.run(args)
    except KeyboardInterrupt as stop:
        print(f"\ndysigma: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        # torchrun stops the ranks that are left when one is lost. They end anyway, and first say why.
        _on_sigterm(signal.SIG_IGN)
        code = _explain(error)
        _on_sigterm(signal.default_int_handler)
        if code is None:
            raise
    return code or DONE
