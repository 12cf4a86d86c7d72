"""Training: one configuration, one step, one loop that yields whole steps, and a run folder that can be resumed."""

from .compiled import check_compiled
from .config import TrainConfig
from .loop import train
from .parts import TrainState, build, load_split, make_parts
from .precision import autocast
from .step import StepRecord, TrainingDiverged, iterate, train_step

__all__ = [
    "StepRecord",
    "TrainConfig",
    "TrainState",
    "TrainingDiverged",
    "autocast",
    "build",
    "check_compiled",
    "iterate",
    "load_split",
    "make_parts",
    "train",
    "train_step",
]
