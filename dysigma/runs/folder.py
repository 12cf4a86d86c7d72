"""Run folders read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import RunError, read_config, read_metrics
from .locks import _is_free

if TYPE_CHECKING:
    import pandas


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
            raise RunError(
                f"{self.path} has no pipeline yet (status: {self.summary.get('status')}): let it finish"
            )
        try:
            # Part by part and never from a pickle: nothing is imported because a file names it.
            options = {
                "use_safetensors": True,
                "low_cpu_mem_usage": False,
            }  # to use little wants accelerate
            network = UNet2DModel.from_pretrained(folder / "unet", local_files_only=True, **options)
            return DDPMPipeline(
                network, DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
            )
        except Exception as error:  # damaged files raise almost anything
            raise RunError(f"{folder} is damaged ({str(error).splitlines()[0]})") from None


def load_run(path: str | Path) -> Run:
    """Read a run folder; RunError if it is not one."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise RunError(
            f"{path} is not a run folder (it has no config.json); dysigma runs FOLDER lists those there are"
        )
    summary = path / "summary.json"
    return Run(
        path, read_config(path / "config.json"), read_config(summary) if summary.exists() else {}
    )


def find_runs(folder: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, state, progress, last line) of each run and race in and below a folder; anything else is passed over.

    State: running, interrupted, finished, failed or damaged, with the damage as last line. Reads text alone: a damaged
    checkpoint shows when the run is resumed. RunError if there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}")
    for path, folders, files in (
        (Path(at), folders, files) for at, folders, files in os.walk(folder)
    ):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        try:
            if "race.json" in files:
                race, rows = read_config(path / "race.json"), read_metrics(path / "records.jsonl")
                total = len(race["seeds"]) * len(race["arms"]) * len(race["grid"])
                status, progress = (
                    "done" if len(rows) == total else "",
                    f"{len(rows)} of {total} trainings",
                )
                last = (
                    " ".join(str(rows[-1][key]) for key in ("grid", "arm", "seed")) if rows else ""
                )
            elif (
                "config.json" in files
                and {"weighting", "images"} <= read_config(path / "config.json").keys()
            ):
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
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:  # what a file holds may be anything
            if not {"race.json", "summary.json", "metrics.jsonl"} & {*files}:
                continue
            state, progress, last = "damaged", "", str(error)
        yield path, state, progress, last
