"""Randomness as a function of (seed, step): what makes resuming exact and two weightings see the same draws."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator(
    seed: int, step: int, stream: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one stream of draws at one step.

    seed: non-negative int of the run; step: non-negative int; stream: what is drawn ("images", "flip", "timesteps",
    "noise", ...). Different streams are independent, so an extra draw in one never shifts another.
    A CPU and a CUDA generator with the same seed give different numbers: draw indices on the CPU, noise on the device.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must be zero or more; got {seed}, {step}")
    words = np.random.SeedSequence((seed, step, zlib.crc32(stream.encode()))).generate_state(
        1, np.uint64
    )
    # The top bit goes because torch stores seeds as signed 64-bit integers.
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))
