"""Randomness as a function of (seed, step): what makes resuming exact and two weightings see the same draws."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def forked_rng(device: torch.device | str, seed: int | None = None) -> Iterator[None]:
    """Leave the random state as it was, whatever is drawn inside; with a seed, start from it.

    Only the global generators of the CPU and of `device` are saved, seeded and restored. ``torch.manual_seed`` would
    seed those of all CUDA devices, also where only the state of the CPU is put back.

    >>> before = torch.get_rng_state()
    >>> with forked_rng("cpu", seed=0):
    ...     first = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
