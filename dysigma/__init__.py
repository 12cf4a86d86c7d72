"""dysigma: loss weightings for diffusion training, and the analysis of the timestep objectives they trade off.

With an independent reconstruction of Dy-Sigma from its abstract (Liu, Ye, Liu, Qin, IJCNN 2024).
"""

from typing import TYPE_CHECKING, Any

from . import pareto
from .auditing import Audit, audit
from .bins import Bins
from .data import ImageData, batch, leaves, load_data
from .gradients import ConflictReport, conflicts
from .models import EMA, make_model
from .objective import sample_losses
from .runs import Run, load_run
from .samplers import TIMESTEP_SAMPLERS, make_sampler
from .schedule import SCHEDULES, NoiseSchedule, make_schedule
from .weightings import WEIGHTINGS, Weighting, make_weighting

if TYPE_CHECKING:
    from .training import TrainConfig, TrainingDiverged, train

__version__ = "0.1.0"
__all__ = [
    "EMA", "SCHEDULES", "TIMESTEP_SAMPLERS", "WEIGHTINGS", "Audit", "Bins", "ConflictReport", "ImageData", "NoiseSchedule",
    "Run", "TrainConfig", "TrainingDiverged", "Weighting", "audit", "batch", "conflicts", "leaves", "load_data", "load_run",
    "make_model", "make_sampler", "make_schedule", "make_weighting", "pareto", "sample_losses", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # The training module costs more to import than everything else here, and analyses do without it.
    if name in ("TrainConfig", "TrainingDiverged", "train"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module 'dysigma' has no attribute {name!r}")
