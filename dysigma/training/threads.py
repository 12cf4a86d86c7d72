"""How many CPU threads a training uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..data.dataset import ImageData
from .config import TrainConfig

# Beside another busy process a second thread makes these up to 20 times slower, and alone hardly faster.
SMALL_NETWORKS = ("micro", "tiny")
SMALL_IMAGES = 16


def number_of_threads(config: TrainConfig, data: ImageData, recorded: int | None = None) -> int:
    """As the configuration says, else as the run began, else one for small work and torch's choice.

    recorded: the number of an earlier part of the run, which a resumed one needs to repeat sums bit
    for bit. It is not taken beyond the cores of this machine.
    """
    if config.threads is not None:
        return config.threads
    if recorded is not None:
        return min(recorded, os.cpu_count() or 1)
    is_small = config.model in SMALL_NETWORKS and data.images.shape[-1] <= SMALL_IMAGES
    if is_small and data.images.device.type == "cpu":
        return 1
    return torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many CPU threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
