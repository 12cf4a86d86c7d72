"""Weightings without parameters: predefined ones, running means of the losses, and random ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..bins import Bins
from ..checks import check_number
from .base import Setting, Weighting, _ratio
from .formulas import Name


class _Fixed(Weighting):
    learns = False
    table: Tensor

    def __init__(self, formula: Name, setting: Setting, **params: float) -> None:
        super().__init__(setting)
        table = self.from_log(self.use_formula(formula, setting.schedule, **params)).float()
        self.register_buffer("table", table, persistent=False)

    def weights(self) -> Tensor:
        return self.table.clone()


class _Random(Weighting):
    """Random loss weighting (Lin et al. 2022), the null: softmax of normal draws on the bins, new after every call.

    A draw is a hash of (seed, number of calls, bin): part of the state, and no business of the global generator.
    """

    count: Tensor

    def __init__(self, setting: Setting, *, bins: int | Bins = 20, seed: int = 0) -> None:
        super().__init__(setting, bins)
        self.seed = check_number("seed", seed, low=-1, kinds=int)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def weights(self) -> Tensor:
        index = torch.arange(self.bins.num_bins, device=self.count.device)
        x = (self.seed * 0x9E3779B1 % 2**32 + self.count * self.bins.num_bins + index) & 0xFFFFFFFF
        for shift, factor in (
            (16, 0x21F0AAAD),
            (15, 0x735A2D97),
        ):  # the 32-bit mixer "lowbias32" (Wellons)
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        normal = torch.special.ndtri(((x ^ (x >> 15)).double() + 0.5) / 2**32)
        return self.scaled(normal.softmax(0).float()[self.bin_index] * self.bins.num_bins)

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> None:
        self.count += 1


def _loss_balance(losses: Tensor, deviation: Tensor, strength: float) -> Tensor:
    return losses**-strength


def _variance_aware(losses: Tensor, deviation: Tensor, strength: float) -> Tensor:
    return (1 + strength * (losses - 1) / deviation).relu()


class _Adaptive(Weighting):
    """Weights by a rule from running means of the bins' losses over their mean; a bin not seen yet counts as average.

    loss-balance: loss^-strength; at strength 1, the fixed point of uncertainty weighting put in directly.
    variance-aware: max(0, 1 + strength (loss - 1) / standard deviation over samples), after the rule of arXiv
    2603.10391, which acts on the samples of a batch; by bins it is a weighting of timesteps.
    """

    moments: Tensor  # (3, K): running sums of 1, loss and loss^2
    basis: Tensor

    def __init__(
        self,
        rule: Callable[[Tensor, Tensor, float], Tensor],
        setting: Setting,
        *,
        strength: float = 1.0,
        bins: int | Bins = 20,
        half_life: float = 10_000.0,
    ) -> None:
        super().__init__(setting, bins)
        self.rule, self.strength = rule, check_number("strength", strength)
        self.half_life = check_number("half_life", half_life)
        self.register_buffer("moments", torch.zeros(3, self.bins.num_bins))
        self.register_buffer("basis", self.bins.interpolation(), persistent=False)

    def weights(self) -> Tensor:
        count, total, squares = self.moments
        mean = _ratio(total.sum(), count.sum(), 1.0)
        deviation = (_ratio(squares.sum(), count.sum(), 1.0) / mean**2 - 1).clamp(min=1e-12).sqrt()
        each = self.rule(_ratio(total, count, mean) / mean, deviation, self.strength)
        return self.scaled((self.basis * each).sum(1))

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> None:
        powers = torch.stack([importance, importance * losses, importance * losses**2])
        self.moments.mul_(0.5 ** (len(losses) / self.half_life)).index_add_(
            1, self.bin_index[timesteps], powers
        )
