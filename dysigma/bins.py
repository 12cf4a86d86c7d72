"""Contiguous bins of timesteps: per-bin means, the way back from bin values to timesteps, samples of all ranks."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import check_timesteps


def _check_num_bins(num_bins: int, num_timesteps: int) -> int:
    """num_bins as an int; integers of NumPy and torch are integers too."""
    try:
        number = 0 if isinstance(num_bins, bool) else operator.index(num_bins)
    except TypeError:
        number = 0
    if not 1 <= number <= num_timesteps:
        raise ValueError(
            f"bins must be an int in [1, {num_timesteps}], the number of timesteps; got {num_bins!r}"
        )
    return number


class Bins(nn.Module):
    """K contiguous, non-empty bins of the timesteps 0 .. T-1.

    edges: (K+1,) int64 from 0 to T, strictly increasing; bin k holds edges[k] <= t < edges[k+1]. Raises ValueError for
    anything else: an empty bin has no mean, and a gradient of zero there would look like a solved objective.
    """

    edges: Tensor

    def __init__(self, edges: Tensor | Sequence[int]) -> None:
        super().__init__()
        table = torch.as_tensor(edges).detach().to("cpu")
        bad = table.ndim != 1 or len(table) < 2 or table.dtype != torch.int64
        if bad or table[0] != 0 or not bool((table.diff() > 0).all()):
            raise ValueError(
                f"edges must be int64, start at 0 and increase strictly up to T; got {table.tolist()} ({table.dtype}). "
                "Two equal edges make an empty bin: use fewer bins"
            )
        self.register_buffer("edges", table, persistent=False)

    @classmethod
    def uniform(cls, num_timesteps: int, num_bins: int) -> Bins:
        """num_bins bins of equal width in t, to within one timestep.

        >>> Bins.uniform(10, 3).edges
        tensor([ 0,  3,  6, 10])
        """
        num_bins = _check_num_bins(num_bins, num_timesteps)
        return cls(torch.arange(num_bins + 1) * num_timesteps // num_bins)

    @classmethod
    def equal_mass(cls, values: Tensor, num_bins: int) -> Bins:
        """Bins with nearly equal sums of values (T,), which are finite, non-negative and not all zero.

        Every bin holds a timestep at least, so one that outweighs a bin's share makes its neighbours' bins lighter.
        """
        values = values.detach().to("cpu", torch.float64)
        is_mass = torch.isfinite(values) & (values >= 0)
        if values.ndim != 1 or not bool(is_mass.all()) or not values.sum() > 0:
            raise ValueError(
                f"values must be (T,), finite, >= 0 and not all 0; got shape {tuple(values.shape)}"
            )
        num_bins = _check_num_bins(num_bins, len(values))
        total = values.cumsum(0)
        k = torch.arange(num_bins + 1)
        # A timestep lies below an edge if at least half of its own mass does.
        edges = torch.searchsorted(total - values / 2, k / num_bins * total[-1])
        edges[-1] = len(values)
        # Edge k lies at k at least, as every bin before it holds a timestep, and leaves one to each after.
        spare = (edges - k).cummax(0).values
        spare = torch.minimum(spare, len(values) - k[-1])
        return cls(spare + k)

    @classmethod
    def equal_log_snr(cls, log_snr: Tensor, num_bins: int) -> Bins:
        """Bins of nearly equal width in log SNR, for log_snr (T,) decreasing; a step at -inf joins the last bin."""
        finite = log_snr[torch.isfinite(log_snr)]
        widths = -torch.gradient(finite)[0]
        beyond = widths.new_zeros(len(log_snr) - len(finite))
        return cls.equal_mass(torch.cat([widths, beyond]), num_bins)

    @property
    def num_bins(self) -> int:
        """K."""
        return len(self.edges) - 1

    @property
    def counts(self) -> Tensor:
        """(K,) int64: how many timesteps each bin holds."""
        return self.edges.diff()

    @property
    def centers(self) -> Tensor:
        """(K,) float64: the mean timestep of each bin."""
        return (self.edges[1:] + self.edges[:-1] - 1).double() / 2

    def index(self, timesteps: Tensor) -> Tensor:
        """The bin of each timestep: (B,) int64 to (B,) int64."""
        return torch.bucketize(timesteps, self.edges[1:-1], right=True)

    def mean(self, values: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of values (B,) in each bin, (K,), NaN where no sample fell; and the counts, (K,) int64."""
        check_timesteps(timesteps, int(self.edges[-1]), len(values))
        index = self.index(timesteps)
        counts = torch.bincount(index, minlength=self.num_bins)
        sums = values.new_zeros(self.num_bins).index_add(0, index, values)
        return sums / counts, counts

    def interpolation(self) -> Tensor:
        """(T, K) float32, rows summing to 1: from bin values to timesteps, linear between centres, constant outside."""
        t = torch.arange(int(self.edges[-1]), device=self.edges.device)[:, None]
        # How far t has come from each centre to the next one, (T, K-1); bin k holds what it reached and
        # did not pass on.
        passed = ((t - self.centers[:-1]) / self.centers.diff()).clamp(0, 1)
        reached = torch.cat([torch.ones_like(t), passed], 1)
        passed_on = torch.cat([passed, torch.zeros_like(t)], 1)
        return (reached - passed_on).float()
