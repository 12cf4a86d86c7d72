"""Randomness as a function of (seed, step): what makes resuming exact and two weightings see the same draws.

Also the checks of names and timesteps, which all modules share.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, step: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one stream of draws at one step.

    seed: non-negative int of the run; step: non-negative int; stream: what is drawn ("images", "flip", "timesteps",
    "noise", ...). Different streams are independent, so an extra draw in one never shifts another.
    A CPU and a CUDA generator with the same seed give different numbers: draw indices on the CPU, noise on the device.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must be zero or more; got {seed}, {step}")
    words = np.random.SeedSequence((seed, step, zlib.crc32(stream.encode()))).generate_state(1, np.uint64)
    # The top bit goes because torch stores seeds as signed 64-bit integers.
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """values of the CPU on a device; a CUDA device is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def check_name(what: str, name: str, known: Iterable[str], more: str = "", error: type[Exception] = KeyError) -> None:
    """Raise error, with the name that was perhaps meant, all known ones and more, unless name is one of them."""
    if name not in (names := list(known)):
        near = difflib.get_close_matches(str(name), names, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise error(f"unknown {what} {name!r}{meant}; have {names}{more}")


def check_timesteps(timesteps: Tensor, num_timesteps: int, batch: int | None = None) -> None:
    """Raise ValueError unless timesteps is (B,) int64 in [0, num_timesteps), with B == batch if given.

    The range is not checked while torch.compile traces, nor on an accelerator, where it would stall the device.
    """
    if timesteps.ndim != 1 or timesteps.dtype != torch.int64 or (batch is not None and len(timesteps) != batch):
        wanted = "(B,)" if batch is None else f"({batch},)"
        raise ValueError(
            f"timesteps must be {wanted} int64 in [0, {num_timesteps}); "
            f"got shape {tuple(timesteps.shape)}, dtype {timesteps.dtype}"
        )
    if torch.compiler.is_compiling() or timesteps.device.type != "cpu" or timesteps.numel() == 0:
        return
    low, high = int(timesteps.min()), int(timesteps.max())
    if low < 0 or high >= num_timesteps:
        raise ValueError(f"timesteps must lie in [0, {num_timesteps}); got values from {low} to {high}")
