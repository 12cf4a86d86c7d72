"""Weightings without parameters: predefined ones, running means of the losses, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bins import Bins
from ..checks import check_number
from .base import Setting, Weighting, ratio
from .formulas import Name


class Predefined(Weighting):
    """A weight that is a function of log_snr, computed once."""

    learns = False
    table: Tensor  # (T,)

    def __init__(self, formula: Name, setting: Setting, **params: float) -> None:
        super().__init__(setting)
        log_weights = self.use_formula(formula, setting.schedule, **params)
        self.register_buffer("table", self.from_log(log_weights).float(), persistent=False)

    def weights(self) -> Tensor:
        return self.table.clone()


class RandomWeighting(Weighting):
    """Random loss weighting (Lin et al. 2022), the null: softmax of normal draws on the bins, new
    after every call.

    A draw is a hash of (seed, number of calls, bin). It is part of the state and leaves the global
    generator alone. seed: an int >= 0.
    """

    count: Tensor  # () int64: number of calls

    def __init__(self, setting: Setting, *, bins: int | Bins = 20, seed: int = 0) -> None:
        super().__init__(setting, bins)
        self.seed = check_number("seed", seed, inclusive=True, kinds=int)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def weights(self) -> Tensor:
        index = torch.arange(self.bins.num_bins, device=self.count.device)
        start = self.seed * 0x9E3779B1 % 2**32
        bits = (start + self.count * self.bins.num_bins + index) & 0xFFFFFFFF
        # The 32-bit mixer "lowbias32" (Wellons).
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
        bits = bits ^ (bits >> 15)
        uniform = (bits.double() + 0.5) / 2**32
        normal = torch.special.ndtri(uniform)
        shares = normal.softmax(0).float()
        return self.scaled(shares[self.bin_index] * self.bins.num_bins)

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> None:
        self.count += 1


class RunningLosses(Weighting):
    """Base of weights by a rule from running means of the bins' losses; a bin not seen yet counts
    as average.

    strength >= 0: of the rule, 0 for equal weights. half_life: of the running means, in images.
    """

    moments: Tensor  # (3, K): running sums of 1, loss and loss^2
    basis: Tensor  # (T, K)

    def __init__(
        self,
        setting: Setting,
        *,
        strength: float = 1.0,
        bins: int | Bins = 20,
        half_life: float = 10_000.0,
    ) -> None:
        super().__init__(setting, bins)
        self.strength = check_number("strength", strength, inclusive=True)
        self.half_life = check_number("half_life", half_life)
        self.register_buffer("moments", torch.zeros(3, self.bins.num_bins))
        self.register_buffer("basis", self.bins.interpolation(), persistent=False)

    def rule(self, losses: Tensor, deviation: Tensor) -> Tensor:
        """Weights of the bins (K,) from their mean losses (K,) and the standard deviation of all
        losses ().

        Both are in units of the mean of all losses.
        """
        raise NotImplementedError

    def relative_losses(self) -> tuple[Tensor, Tensor]:
        """Running means of the bins (K,) and the standard deviation of all losses (), both in units of
        the mean of all losses."""
        count, total, squares = self.moments
        # The square of a smaller mean would be 0 in float32. Losses that are all 0 are no reason to
        # prefer a bin.
        mean = ratio(total.sum(), count.sum(), 1.0).clamp(min=1e-18)
        is_known = mean > 1e-18
        mean_square = ratio(squares.sum(), count.sum(), 1.0)
        deviation = (mean_square / mean**2 - 1).clamp(min=1e-12).sqrt()
        relative = ratio(total, count, mean) / mean
        return torch.where(is_known, relative, 1.0), deviation

    def weights(self) -> Tensor:
        each = self.rule(*self.relative_losses())
        return self.scaled((self.basis * each).sum(1))

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor | None:
        powers = torch.stack([importance, importance * losses, importance * losses**2])
        self.moments.mul_(0.5 ** (len(losses) / self.half_life))
        self.moments.index_add_(1, self.bin_index[timesteps], powers)
        return None


def without_zeros(losses: Tensor) -> Tensor:
    """Relative losses (K,) of which one takes logarithms or ratios: at least a millionth of the mean.

    A bin whose losses were all exactly 0 has told nothing, as one that was masked, and counts as average.
    """
    return torch.where(losses > 0, losses.clamp(min=1e-6), 1.0)


class LossBalance(RunningLosses):
    """w = loss^-strength; at strength 1, the fixed point of uncertainty weighting put in directly.

    A bin whose losses were all exactly 0 has told nothing, as one that was masked, and counts as
    average. A loss below a millionth of the mean counts as that.
    """

    def rule(self, losses: Tensor, deviation: Tensor) -> Tensor:
        known = without_zeros(losses)
        # Where even that overflows, the largest weight that can be summed.
        weights: Tensor = (known**-self.strength).clamp(max=1e30)
        return weights


class VarianceAware(RunningLosses):
    """w = max(0, 1 + strength (loss - 1) / deviation), after the rule of arXiv 2603.10391.

    There it acts on the samples of a batch; by bins it is a weighting of timesteps.
    """

    def rule(self, losses: Tensor, deviation: Tensor) -> Tensor:
        weights: Tensor = 1 + self.strength * (losses - 1) / deviation
        return weights.relu()
