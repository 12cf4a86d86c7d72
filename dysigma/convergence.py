"""Images to a threshold, speed-ups and tables of them: what ``dysigma.lab.convergence`` has."""

from .lab.convergence import (
    CLAIMED,
    UNITS,
    Speedup,
    against_claim,
    compare_across,
    holm,
    images_to_threshold,
    levels_at,
    load_races,
    race_curves,
    race_table,
    speedup,
    thresholds_at,
)

__all__ = [
    "CLAIMED",
    "UNITS",
    "Speedup",
    "against_claim",
    "compare_across",
    "holm",
    "images_to_threshold",
    "levels_at",
    "load_races",
    "race_curves",
    "race_table",
    "speedup",
    "thresholds_at",
]
