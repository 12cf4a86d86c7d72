"""Timestep samplers: uniform numbers u in, timesteps and 1 / (T p_t) out, by inversion of p_t.

Given the same u, all samplers share their random numbers. A sampler is no weighting: with 1 / (T p_t) as importance=
the expected loss is that of uniform sampling and only its variance differs; without, the objective is weighted by p_t
too. `corrected` says which one the method means.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .bins import Bins
from .checks import check_name, check_timesteps
from .parallel import over_ranks
from .schedule import NoiseSchedule


def _check_positive(name: str, value: float, high: float = math.inf) -> float:
    if not 0 < value <= high or math.isinf(value):
        raise ValueError(f"{name} must be a finite number in (0, {high:g}]; got {value!r}")
    return value


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.special.erfc(-x / math.sqrt(2)) / 2  # torch.special.ndtr is 0 below -9


def _laplace_cdf(x: Tensor) -> Tensor:
    return torch.where(x < 0, x.clamp(max=0).exp() / 2, 1 - (-x.clamp(min=0)).exp() / 2)


def _mass(edges: Tensor, cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """Mass of a symmetric distribution between rising edges (T+1,), each from the tail where numbers are small."""
    low, high = edges[:-1], edges[1:]
    return torch.where(low + high > 0, cdf(-low) - cdf(-high), cdf(high) - cdf(low))


def _noise_edges(log_snr: Tensor) -> Tensor:
    """-log_snr midway between timesteps, open at both ends (T+1,); a last step at SNR = 0 gets what lies beyond."""
    finite = -log_snr[torch.isfinite(log_snr)]
    beyond = (1.5 * finite[-1:] - finite[-2:-1] / 2)[: len(log_snr) - len(finite)]
    inner = (finite[1:] + finite[:-1]) / 2
    return torch.cat([inner.new_tensor([-math.inf]), inner, beyond, inner.new_tensor([math.inf])])


def _logit_normal(log_snr: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit of t / T normal (Esser et al. 2024, for the time of a rectified flow)."""
    edges = torch.linspace(
        0, 1, len(log_snr) + 1, dtype=torch.float64, device=log_snr.device
    ).logit()
    return _mass((edges - mean) / _check_positive("std", std), _normal_cdf)


def _lognormal(log_snr: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln sigma normal, for sigma^2 = 1 / SNR on the levels of the schedule (Karras et al. 2022)."""
    return _mass((_noise_edges(log_snr) / 2 - mean) / _check_positive("std", std), _normal_cdf)


def _laplace(log_snr: Tensor, *, mean: float = 0.0, scale: float = 0.5) -> Tensor:
    """log SNR Laplace around mean, on the levels of the schedule (Hang, Gu 2024)."""
    return _mass((_noise_edges(log_snr) + mean) / _check_positive("scale", scale), _laplace_cdf)


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": lambda log_snr: torch.ones_like(log_snr),
    "logit-normal": _logit_normal,
    "lognormal": _lognormal,
    "laplace": _laplace,
}


class TimestepSampler(nn.Module):
    """sampler(u (B,) in [0, 1)) -> (timesteps (B,) int64, rising in u; importance (B,) float32 = 1 / (T p_t)).

    density: one of DENSITIES, whose methods mean to be used uncorrected. Raises ValueError for u that is not (B,) real.
    """

    corrected = False
    table: Tensor  # (T,) float64

    def __init__(self, schedule: NoiseSchedule, density: str = "uniform", **params: float) -> None:
        super().__init__()
        mass = DENSITIES[density](schedule.log_snr, **params)
        if not bool((mass > 0).all()):
            raise ValueError(
                f"{density} {params} gives {int((mass <= 0).sum())} timesteps no probability; widen it"
            )
        self.num_timesteps = len(mass)
        self.register_buffer("table", mass / mass.sum(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimestepSampler:
        # .half() on an enclosing module must not round probabilities: follow the device, keep the dtype.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def probabilities(self) -> Tensor:
        """p_t now: (T,) float64, positive, summing to 1."""
        return self.table.clone()

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if u.ndim != 1 or not u.is_floating_point():
            raise ValueError(
                f"u must be (B,) real in [0, 1); got shape {tuple(u.shape)}, {u.dtype}"
            )
        p = self.probabilities()
        # Rounding may leave the last sum below the largest u.
        timesteps = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(
            max=self.num_timesteps - 1
        )
        return timesteps, (1 / (self.num_timesteps * p[timesteps])).float()

    def update(self, losses: Tensor, timesteps: Tensor) -> None:
        """Take in per-sample losses (B,) at timesteps (B,), if the sampler adapts."""


class _Stratified(TimestepSampler):
    """Uniform, one timestep in each of B equal parts (Kingma et al. 2021): u[0] shifts a grid, modulo 1.

    Each timestep alone is uniform, so importance is 1; the mean over a batch varies less.
    """

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(
            (u[:1].double() + torch.arange(len(u), device=u.device) / len(u)) % 1.0
        )


class _LossSecondMoment(TimestepSampler):
    """p_t as the root of the mean squared loss, with which the corrected mean varies least (Nichol, Dhariwal 2021).

    They keep the last 10 losses of each timestep; here bins keep running means, of half_life in images. Uniform until
    each bin has seen `warmup` losses, and a share `uniform` remains so. To be updated with the losses whose mean is
    minimised: weighted, if training is. Under DDP every rank must bring the same B.
    """

    corrected = True
    moments: Tensor  # (3, K): how many losses, and running sums of 1 and loss^2
    bin_index: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        bins: int = 100,
        warmup: int = 10,
        uniform: float = 0.001,
        half_life: float = 5e4,
    ) -> None:
        super().__init__(schedule)
        self.bins, self.warmup = Bins.uniform(self.num_timesteps, bins), warmup
        self.uniform, self.half_life = (
            _check_positive("uniform", uniform, 1.0),
            _check_positive("half_life", half_life),
        )
        self.register_buffer("moments", torch.zeros(3, bins))
        self.register_buffer(
            "bin_index", self.bins.index(torch.arange(self.num_timesteps)), persistent=False
        )

    def probabilities(self) -> Tensor:
        """p_t now: (T,) float64, positive, summing to 1."""
        seen, count, squares = self.moments.double()
        root = (squares / count.clamp(min=1e-12)).sqrt()[self.bin_index]
        adapted = (1 - self.uniform) * root / root.sum().clamp(
            min=1e-300
        ) + self.uniform * self.table
        return torch.where((seen >= self.warmup).all() & (root.sum() > 0), adapted, self.table)

    @torch.no_grad()
    def update(self, losses: Tensor, timesteps: Tensor) -> None:
        """Take in per-sample losses (B,) at timesteps (B,), in train() mode alone."""
        check_timesteps(timesteps, self.num_timesteps, len(losses))
        if not self.training:
            return
        losses, steps = over_ranks(losses, timesteps)
        self.moments[1:] *= 0.5 ** (len(losses) / self.half_life)
        one = torch.ones_like(losses)
        self.moments.index_add_(1, self.bin_index[steps.long()], torch.stack([one, one, losses**2]))


TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    **{name: partial(TimestepSampler, density=name) for name in DENSITIES},
    "stratified": _Stratified,
    "loss-second-moment": _LossSecondMoment,
}


def make_sampler(name: str, schedule: NoiseSchedule, **params: Any) -> TimestepSampler:
    """The named timestep sampler for a schedule, on its device.

    Raises KeyError for an unknown name, ValueError for an unknown or bad parameter.
    """
    check_name("timestep sampler", name, TIMESTEP_SAMPLERS)
    signature = inspect.signature(DENSITIES.get(name, TIMESTEP_SAMPLERS[name]))
    names = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    if set(params) - set(names):
        raise ValueError(
            f"sampler {name!r} has no parameter {sorted(set(params) - set(names))}; it has {names}"
        )
    return TIMESTEP_SAMPLERS[name](schedule, **params).to(schedule.log_snr.device)
