"""Small files, written so that a crash at any moment loses nothing that was whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says what to do."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file aside, flush it to the disk, then put it in place: readers see the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    with suppress(OSError):  # some systems cannot flush a folder, where the name stands
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically; NaN and infinity are refused with a ValueError."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or of a TOML file if it is called .toml; RunError if it cannot be read."""
    kind = "TOML" if path.suffix == ".toml" else "JSON"
    try:
        text = path.read_text()
        return tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid {kind}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The table in a .toml file, or the object in a JSON file; RunError if it cannot be read."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise RunError(f"{path} must hold named values; got {type(table).__name__}")
    return table


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of the JSON of anything else.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON. In bin_losses NaN, an empty bin, becomes null; anywhere else it is a ValueError."""
    values = {}
    for key, value in row.items():
        values[key] = value.tolist() if isinstance(value, Tensor) else value
    if "bin_losses" in values:
        values["bin_losses"] = [None if math.isnan(v) else v for v in values["bin_losses"]]
    with open(path, "a") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path, until_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to and with until_step; a last line cut short by a crash is left out.

    Raises RunError for any other line that is no row.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"}"):
            break
        try:
            row = dict(json.loads(line))
            if until_step is None or row["step"] <= until_step:
                rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise RunError(
                f"line {number} of {path} is damaged: {line[:40]!r}; mend it or take it out"
            ) from None
    return rows
