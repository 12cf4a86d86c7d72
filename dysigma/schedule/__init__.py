"""Noise schedules in terms of one quantity, log_snr, and the forward process x_t = alpha x0 + sigma noise.

There are two paths. On the variance-preserving one alpha^2 + sigma^2 = 1. On the rectified flow
alpha + sigma = 1.

Tables are built in float64 from alphas_cumprod and never change precision. diffusers casts its
table to the dtype of the images, which in bfloat16 gives some timesteps exactly zero noise.
"""

from .named import SCHEDULES, check_schedule, configured_schedule, make_schedule
from .noise import NoiseSchedule
from .predictions import PREDICTION_TYPES, canonical_prediction_type

__all__ = [
    "PREDICTION_TYPES",
    "SCHEDULES",
    "NoiseSchedule",
    "canonical_prediction_type",
    "check_schedule",
    "configured_schedule",
    "make_schedule",
]
