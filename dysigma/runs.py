"""Run folders: what a training run leaves behind, written so that a crash at any moment loses nothing that was whole.

config.json  metrics.jsonl  summary.json  checkpoint/  pipeline/
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import time
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas


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
    kind, module = ("TOML", tomllib) if path.suffix == ".toml" else ("JSON", json)
    try:
        return module.loads(path.read_text())
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


def provenance() -> dict[str, Any]:
    """Versions, device and commit of this process: what a number needs to be traced back."""
    import diffusers

    return {
        "dysigma_commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu_threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" if tracked files differ; None outside git."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _is_free(file: Any, shared: bool = False) -> bool:
    """Lock an open file for this process (shared: for others too) until it is closed; False if another holds it."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError) as error:
        warnings.warn(f"no locks on this system ({error}): let one process alone use {file.name}", stacklevel=4)
    return True


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; RunError if another process holds it.

    The system holds the lock on ``.lock`` for as long as the process lives, so that a killed one leaves none behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        if not any(_is_free(file) for _ in map(time.sleep, (0, 0.2))):  # a listing holds it for a moment
            raise RunError(
                f"{folder} is in use by {path.read_text().strip()}; wait for it, stop it, or choose another --out. The "
                "lock ends with that process, however it ends: a file .lock left over locks nothing"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def differences(saved: dict[str, Any], given: dict[str, Any]) -> str:
    """The fields of two configurations that differ, as text; "" if a run of one may go on as the other."""
    given = json.loads(json.dumps(given))
    keys = [key for key in given if key in saved and saved[key] != given[key] and key not in ("device", "data_root")]
    return ", ".join(f"{key} {saved[key]!r} there, {given[key]!r} here" for key in keys)


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of the JSON of anything else."""
    return hashlib.sha256(value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write step, tensors (as safetensors) and meta (as JSON) to folder; the one before stays, older ones go last.

    ``latest.json`` and ``state-STEP.json`` name the tensor file and its SHA-256 and appear, whole, after it.
    """
    from safetensors.torch import save

    name = f"state-{step:09d}"
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write_atomically(folder / f"{name}.safetensors", content)
    entry = {"step": step, "tensors": f"{name}.safetensors", "sha256": digest(content), "meta": meta}
    for path in (folder / f"{name}.json", folder / "latest.json"):
        write_json(path, entry | {"check": digest(entry)})
    before = max((path.stem for path in folder.glob("state-*.json") if path.stem < name), default=name)
    for old in folder.glob("*state-*.*"):  # also what a process that was killed had not put in place
        if old.stem not in (name, before):
            old.unlink()


def load_checkpoint(
    folder: Path, config: dict[str, Any] | None = None
) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors on the CPU, meta) of the newest checkpoint in folder that is whole.

    One that is truncated, altered or of another run, whose meta["config"] is not config, is named in a warning and the
    one before it taken; RunError if there is none.
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
    raise RunError(f"{problems[0]}, and {folder} has no other: delete it to start again from the first step")


def _read_checkpoint(path: Path, config: dict[str, Any] | None) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load

    entry = read_json(path)
    try:
        check = entry.pop("check", None)  # those of early versions have none
        step, file, meta = int(entry["step"]), path.parent / entry["tensors"], dict(entry["meta"])
        if check not in (None, digest(entry)):
            raise RunError(f"{path} does not match the SHA-256 in it: the checkpoint is damaged")
        if file.parent != path.parent or not file.is_file():
            raise RunError(f"{path} names {file.name}, which is not there: the checkpoint is damaged")
        content = file.read_bytes()
        if digest(content) != entry["sha256"]:
            raise RunError(f"{file} does not match its SHA-256 in {path.name}: the checkpoint is damaged")
        if config and (differing := differences(meta.get("config", {}), config)):
            raise RunError(f"{file} is of another run ({differing})")
        return step, load(content), meta
    except RunError:
        raise
    except Exception as error:  # what was never a checkpoint raises almost anything
        raise RunError(f"{path} is no checkpoint ({error!r:.100}): it is damaged") from None


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON. In bin_losses NaN, an empty bin, becomes null; anywhere else it is a ValueError."""
    values = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.items()}
    if "bin_losses" in values:
        values["bin_losses"] = [None if v != v else v for v in values["bin_losses"]]
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
            raise RunError(f"line {number} of {path} is damaged: {line[:40]!r}; mend it or take it out") from None
    return rows


@dataclass(frozen=True)
class Run:
    """A run folder read back."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def metrics(self) -> pandas.DataFrame:
        """One row per log line: step, images, loss, grad_norm, bin_losses (list of K), weights (list of K), ..."""
        import pandas

        return pandas.DataFrame(read_metrics(self.path / "metrics.jsonl"))

    def pipeline(self) -> Any:
        """A diffusers DDPMPipeline with the EMA weights; RunError if the run has not written one or it is damaged."""
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        folder = self.path / "pipeline"
        if not (folder / "model_index.json").exists():
            raise RunError(f"{self.path} has no pipeline yet (status: {self.summary.get('status')}): let it finish")
        try:
            # Part by part and never from a pickle: nothing is imported because a file names it.
            options = {"use_safetensors": True, "low_cpu_mem_usage": False}  # to use little wants accelerate
            network = UNet2DModel.from_pretrained(folder / "unet", local_files_only=True, **options)
            return DDPMPipeline(network, DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True))
        except Exception as error:  # damaged files raise almost anything
            raise RunError(f"{folder} is damaged ({str(error).splitlines()[0]})") from None


def load_run(path: str | Path) -> Run:
    """Read a run folder; RunError if it is not one."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise RunError(f"{path} is not a run folder (it has no config.json); dysigma runs FOLDER lists those there are")
    summary = path / "summary.json"
    return Run(path, read_config(path / "config.json"), read_config(summary) if summary.exists() else {})


def find_runs(folder: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, state, progress, last line) of each run and race in and below a folder; anything else is passed over.

    State: running, interrupted, finished, failed or damaged, with the damage as last line. Reads text alone: a damaged
    checkpoint shows when the run is resumed. RunError if there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}")
    for path, folders, files in ((Path(at), folders, files) for at, folders, files in os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        try:
            if "race.json" in files:
                race, rows = read_config(path / "race.json"), read_metrics(path / "records.jsonl")
                total = len(race["seeds"]) * len(race["arms"]) * len(race["grid"])
                status, progress = "done" if len(rows) == total else "", f"{len(rows)} of {total} trainings"
                last = " ".join(str(rows[-1][key]) for key in ("grid", "arm", "seed")) if rows else ""
            elif "config.json" in files and {"weighting", "images"} <= read_config(path / "config.json").keys():
                run, rows = load_run(path), read_metrics(path / "metrics.jsonl") or [{"images": 0}]
                status, images = str(run.summary.get("status")), rows[-1]["images"]
                progress = f"{images:,} of {run.config['images']:,} images"
                losses = [f"{row['loss']:.4g}" for row in rows[-1:] if "loss" in row]
                last = ", weighted training loss ".join([run.config["weighting"], *losses])
            else:
                continue
            state = {"done": "finished", "failed": "failed"}.get(status, "interrupted")
            with suppress(OSError), open(path / ".lock") as file:
                state = state if _is_free(file, shared=True) else "running"
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # what a file holds may be anything
            if not {"race.json", "summary.json", "metrics.jsonl"} & {*files}:
                continue
            state, progress, last = "damaged", "", str(error)
        yield path, state, progress, last
