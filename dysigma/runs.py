"""Run folders: what a training run leaves behind, written so that a crash at any moment loses nothing that was whole.

config.json  metrics.jsonl  summary.json  checkpoint/  pipeline/
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tomllib
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
    with open(aside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically; NaN and infinity are refused with a ValueError."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunError if it is absent or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}): the file is damaged") from None


def read_config(path: Path) -> dict[str, Any]:
    """The table in a .toml file, or the object in a JSON file; ValueError if it cannot be read."""
    kind = "TOML" if path.suffix == ".toml" else "JSON"
    try:
        table = tomllib.loads(path.read_text()) if kind == "TOML" else json.loads(path.read_text())
        if not isinstance(table, dict):
            raise ValueError(f"expected named values, got a {type(table).__name__}")
        return table
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid {kind}: {error}") from None


def provenance() -> dict[str, Any]:
    """Versions, device and commit of this process: what a number needs to be traced back."""
    import diffusers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "dysigma_commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": device,
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


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write step, tensors (as safetensors) and meta (as JSON) to folder; the previous checkpoint goes last of all.

    ``latest.json`` names the tensor file and its SHA-256 and is replaced atomically, so it always names a whole file.
    """
    from safetensors.torch import save

    name = f"state-{step:09d}.safetensors"
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write_atomically(folder / name, content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(folder / "latest.json", {"step": step, "tensors": name, "sha256": digest, "meta": meta})
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors on the CPU, meta) of a checkpoint folder; RunError if it is absent, truncated or altered."""
    from safetensors.torch import load

    latest = read_json(folder / "latest.json")
    path = folder / latest["tensors"]
    if path.parent != folder or not path.is_file():
        raise RunError(f"{folder}/latest.json names {latest['tensors']}, which is not there: the checkpoint is damaged")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != latest["sha256"]:
        raise RunError(f"{path} does not match its SHA-256 in latest.json: the checkpoint is damaged, delete {folder}")
    return latest["step"], load(content), latest["meta"]


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON. In bin_losses NaN, an empty bin, becomes null; anywhere else it is a ValueError."""
    values = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.items()}
    if "bin_losses" in values:
        values["bin_losses"] = [None if v != v else v for v in values["bin_losses"]]
    with open(path, "a") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")


def read_metrics(path: Path, until_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to and with until_step; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if until_step is None or row["step"] <= until_step:
            rows.append(row)
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
        """A diffusers DDPMPipeline with the EMA weights; RunError if the run has not written one."""
        from diffusers import DDPMPipeline

        if not (self.path / "pipeline" / "model_index.json").exists():
            raise RunError(
                f"{self.path} has no pipeline yet (status: {self.summary.get('status')}); let it finish first"
            )
        return DDPMPipeline.from_pretrained(self.path / "pipeline", local_files_only=True)


def load_run(path: str | Path) -> Run:
    """Read a run folder; RunError if it is not one."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise RunError(f"{path} is not a run folder (it has no config.json); dysigma train --out {path} makes one")
    summary = path / "summary.json"
    return Run(path, read_json(path / "config.json"), read_json(summary) if summary.exists() else {})
