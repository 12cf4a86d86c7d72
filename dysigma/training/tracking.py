"""Metrics to an experiment tracker as well, through accelerate; the run folder stays what counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checks import check_name
from .config import TrainConfig

# Name: class in accelerate.tracking.
TRACKERS = {
    "tensorboard": "TensorBoardTracker",
    "wandb": "WandBTracker",
    "trackio": "TrackioTracker",
}
PROJECT = "dysigma"


class Tracker:
    """An open tracker of one run. Raises KeyError for an unknown name, ImportError if it is not installed."""

    def __init__(self, name: str, config: TrainConfig, out: Path) -> None:
        check_name("tracker", name, TRACKERS)
        try:
            from accelerate import tracking

            kind = getattr(tracking, TRACKERS[name])
            options = {"logging_dir": out} if kind.requires_logging_directory else {}
            self._tracker: Any = kind(PROJECT, **options)
            if hasattr(self._tracker, "start"):  # older versions start when made
                self._tracker.start()
        except ImportError as error:
            raise ImportError(
                f"--log-with {name} needs accelerate and {name} ({error}): pip install accelerate {name}"
            ) from error
        values = config.to_dict()
        plain = {key: str(v) if isinstance(v, dict) else v for key, v in values.items()}
        self._tracker.store_init_configuration(plain)

    def log(self, row: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, and the mean of validation losses."""
        numbers = {key: v for key, v in row.items() if isinstance(v, int | float) and key != "step"}
        if "validation_losses" in row:
            numbers["validation_loss"] = float(row["validation_losses"].mean())
        self._tracker.log(numbers, step=row["step"])

    def finish(self) -> None:
        """Send what is left."""
        self._tracker.finish()
