"""Kept so that ``dysigma.convergence`` stays importable; the code lives in ``dysigma.lab.convergence``."""

from .intervals import holm
from .lab.convergence import (
    Speedup,
    images_to_threshold,
    load_races,
    log_area,
    race_curves,
    race_table,
    speedup,
    thresholds_at,
)

__all__ = [
    "Speedup",
    "holm",
    "images_to_threshold",
    "load_races",
    "log_area",
    "race_curves",
    "race_table",
    "speedup",
    "thresholds_at",
]
