"""Tables alphas_cumprod, (T,) float64: how the named schedules make them, and when two are the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class NoiseLevels(NamedTuple):
    """The noise levels of a schedule; each field is the argument of NoiseSchedule of that name."""

    alphas_cumprod: Tensor
    config: Mapping[str, Any] | None = None
    is_flow: bool = False
    shift: float = 1.0


def _linear_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64)


def _scaled_linear_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    return _linear_betas(start**0.5, end**0.5, num_timesteps) ** 2


def _sigmoid_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    return _linear_betas(-6, 6, num_timesteps).sigmoid() * (end - start) + start


# By the names of diffusers.
BETAS = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "sigmoid": _sigmoid_betas,
}


def products(betas: Tensor) -> Tensor:
    """alphas_cumprod of betas (T,), as a sum of logarithms: a float64 product would underflow."""
    return torch.log1p(-betas).cumsum(0).exp()


def cosine(num_timesteps: int, offset: float, max_beta: float) -> Tensor:
    """alphas_cumprod as a squared cosine of t, with betas of at most max_beta."""
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=max_beta)
    return products(betas)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) to end at exactly 0 (Lin, Liu, Li, Yang 2024, alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def flow_shares(num_timesteps: int, shift: float) -> Tensor:
    """The shares of noise s (T,) of a rectified flow, (t + 1) / T shifted (Esser et al. 2024)."""
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a finite number > 0; got {shift!r}")
    s = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return shift * s / (1 + (shift - 1) * s)


def flow_alphas_cumprod(s: Tensor) -> Tensor:
    """The variance-preserving alphas_cumprod of the same SNR as x_t = (1 - s) x0 + s noise."""
    return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


def falls(bar: Tensor) -> bool:
    """Whether alphas_cumprod falls strictly, from below 1 to 0 or more."""
    return bool((bar.diff() < 0).all() and bar[0] < 1 and bar[-1] >= 0)


def check_alphas_cumprod(bar: Tensor) -> None:
    """Raise ValueError unless bar is the table of a schedule."""
    if bar.ndim != 1 or len(bar) < 2:
        raise ValueError(f"alphas_cumprod must be (T,) with T >= 2; got shape {tuple(bar.shape)}")
    if not falls(bar):
        raise ValueError(
            f"alphas_cumprod must fall strictly from below 1 to 0 or more; got {len(bar)} "
            f"values from {bar[0]:.6g} to {bar[-1]:.6g}"
        )


def are_same(bar: Tensor, other: Tensor) -> bool:
    """Whether two alphas_cumprod on the CPU agree as well as products in float32 can."""
    if bar.shape != other.shape or not torch.allclose(bar, other, rtol=1e-3, atol=1e-6):
        return False
    return torch.allclose(bar.log(), other.log(), rtol=1e-3, atol=5e-3)
