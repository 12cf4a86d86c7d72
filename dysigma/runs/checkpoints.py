"""Checkpoints that are whole or refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import RunError, digest, read_json, write_atomically, write_json

# Where a run goes on, and on which copy of its images, may change. The images themselves may not:
# dysigma.training.identity compares them.
MAY_DIFFER = ("device", "data", "data_root", "threads")


def differences(saved: dict[str, Any], given: dict[str, Any]) -> str:
    """The fields of two configurations that differ, as text; "" if a run of one may go on as the other.

    >>> differences({"seed": 0, "device": "cpu"}, {"seed": 1, "device": "cuda", "new": 3})
    'seed 0 there, 1 here'
    """
    given = json.loads(json.dumps(given))
    found = []
    for key, value in given.items():
        if key in saved and saved[key] != value and key not in MAY_DIFFER:
            found.append(f"{key} {saved[key]!r} there, {value!r} here")
    return ", ".join(found)


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write step, tensors (as safetensors) and meta (as JSON) to folder; the one before stays, older ones go last.

    ``latest.json`` and ``state-STEP.json`` name the tensor file and its SHA-256 and appear, whole,
    after it.
    """
    from safetensors.torch import save

    name = f"state-{step:09d}"
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write_atomically(folder / f"{name}.safetensors", content)
    entry: dict[str, Any] = {
        "step": step,
        "tensors": f"{name}.safetensors",
        "sha256": digest(content),
        "meta": meta,
    }
    entry["check"] = digest(entry)
    write_json(folder / f"{name}.json", entry)
    write_json(folder / "latest.json", entry)

    earlier = [path.stem for path in folder.glob("state-*.json") if path.stem < name]
    kept = {name, max(earlier, default=name)}
    # The pattern also matches what a process that was killed had not put in place.
    for old in folder.glob("*state-*.*"):
        if old.stem not in kept:
            old.unlink()


def load_checkpoint(
    folder: Path, config: dict[str, Any] | None = None
) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors on the CPU, meta) of the newest checkpoint in folder that is whole.

    One that is truncated, altered or of another run, whose meta["config"] is not config, is named
    in a warning and the one before it taken; RunError if there is none.
    """
    problems = []
    for path in (folder / "latest.json", *sorted(folder.glob("state-*.json"), reverse=True)):
        try:
            found = _read_checkpoint(path, config)
        except RunError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}. Taken instead: {path}, of step {found[0]}", stacklevel=2)
        return found
    raise RunError(
        f"{problems[0]}, and {folder} has no other: move it away to start again from the first step"
    )


def _read_checkpoint(
    path: Path, config: dict[str, Any] | None
) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load

    entry = read_json(path)
    try:
        check = entry.pop("check", None)  # those of early versions have none
        step, file, meta = int(entry["step"]), path.parent / entry["tensors"], dict(entry["meta"])
        if check not in (None, digest(entry)):
            raise RunError(f"{path} does not match the SHA-256 in it: the checkpoint is damaged")
        if file.parent != path.parent or not file.is_file():
            raise RunError(
                f"{path} names {file.name}, which is not there: the checkpoint is damaged"
            )
        content = file.read_bytes()
        if digest(content) != entry["sha256"]:
            raise RunError(
                f"{file} does not match its SHA-256 in {path.name}: the checkpoint is damaged"
            )
        if config and (differing := differences(meta.get("config", {}), config)):
            raise RunError(f"{file} is of another run ({differing})")
        return step, load(content), meta
    except RunError:
        raise
    except Exception as error:  # what was never a checkpoint raises almost anything
        raise RunError(f"{path} is no checkpoint ({error!r:.100}): it is damaged") from None
