"""What a measurement of conflicts says: its numbers, its table, its sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..intervals import t_quantile
from .batches import spans

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class ConflictReport:
    """What ``conflicts`` measured on K bins; float64 CPU tensors, NaN where the data leave a value undetermined.

    "Debiased" values come from a Gramian that is unbiased in every entry, diagonal included. Standard errors (`_se`)
    are jackknife over the M micro-batches, intervals 95 % (Student t, M - 1 degrees of freedom). Two reports are equal
    only if they are the same object, so that reports can be keys; compare ``to_dict()`` for their values.
    """

    edges: list[int]
    """K + 1 timesteps, as in ``Bins``."""
    log_snr: Tensor
    """(K,) mean over the bin's finite values."""
    losses: Tensor
    """(K,) mean losses, times the weighting if one was given."""
    gramian: Tensor
    """(K, K) debiased inner products of the gradients."""
    gramian_se: Tensor
    """(K, K)"""
    cosine: Tensor
    """(K, K) naive: of the averaged gradients, shrunk by sqrt(gnr / (1 + gnr)) on each side."""
    cosine_debiased: Tensor
    """(K, K) never clipped; NaN if a bin's gradient does not stand out of its noise."""
    cosine_se: Tensor
    """(K, K)"""
    magnitude_similarity: Tensor
    """(K, K) 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (Yu et al. 2020), debiased."""
    gnr: Tensor
    """(K,) |g|^2 over the variance of its estimate from all samples of the report."""
    noise_scale: Tensor
    """(K,) batch size at which the noise equals the gradient (McCandlish et al. 2018)."""
    weights: Tensor
    """(K,) of the min-norm point of the debiased Gramian."""
    stationarity: float
    """Norm of the min-norm point, cross-fitted; negative: not told apart from 0."""
    stationarity_interval: list[float]
    stationarity_naive: float
    """With the noise floor."""
    mean_cosine: float
    """Debiased, over the determined pairs of different bins, as are the next three."""
    mean_cosine_se: float
    conflict_rate: float
    """Share of pairs with cosine < 0."""
    sure_conflict_rate: float
    """Share of pairs with the whole interval below 0."""
    undetermined: int
    """Pairs left out."""
    null_cosine: float
    """-1 / (K - 1): the mean where K gradients of equal norm cancel, as they do at a minimiser."""
    group_names: list[str]
    group_gramian: Tensor
    """(groups, K, K) debiased; sums to gramian."""
    settings: dict[str, Any]
    """micro_batches, batch_per_bin, paired, prediction_type, seed, training (the model's mode)."""
    update_cosine: Tensor | None = None
    """(K,) of the optimizer's last step with minus the gradient; below 0 the bin gets worse."""
    update_cosine_se: Tensor | None = None
    """(K,)"""
    cosine_preconditioned: Tensor | None = None
    """(K, K) debiased, in the metric of the optimizer."""

    def interval(self) -> tuple[Tensor, Tensor]:
        """Low and high ends (K, K) of the intervals of cosine_debiased."""
        half = t_quantile(self.settings["micro_batches"]) * self.cosine_se
        return self.cosine_debiased - half, self.cosine_debiased + half

    def spans(self) -> list[str]:
        """First and last timestep of each bin: ["0-99", "100-199", ...]."""
        return spans(self.edges)

    def table(self) -> DataFrame:
        """A pandas DataFrame with one row per bin."""
        import pandas

        off_diagonal = self.cosine_debiased.clone().fill_diagonal_(float("nan"))
        columns: dict[str, Any] = {
            "first": self.edges[:-1],
            "last": [edge - 1 for edge in self.edges[1:]],
            "log_snr": self.log_snr,
            "losses": self.losses,
            "gnr": self.gnr,
            "noise_scale": self.noise_scale,
            "weights": self.weights,
        }
        if self.update_cosine is not None:
            columns["update_cosine"] = self.update_cosine
        columns["norm"] = self.gramian.diagonal().sqrt()
        columns["mean_cosine"] = off_diagonal.nanmean(1)
        columns["conflicts"] = (off_diagonal < 0).sum(1)
        return pandas.DataFrame({name: np.asarray(column) for name, column in columns.items()})

    def sentences(self) -> list[str]:
        """What the report says, and how surely, for a reader: one to five sentences or short paragraphs."""
        determined = self.cosine_debiased.isfinite().triu(1)
        lines = self._about_pairs(determined) if determined.any() else []
        if self.cosine_debiased.diagonal().isnan().any():
            lines.append(self._about_undetermined(int(determined.sum())))
        return [*lines, self._about_stationarity()]

    def _about_pairs(self, determined: Tensor) -> list[str]:
        cosine = self.cosine_debiased
        low, high = self.interval()
        spans = self.spans()
        pairs = int(determined.sum())
        negative = int((cosine < 0)[determined].sum())
        sure = int((high < 0)[determined].sum())
        naive = float(self.cosine[determined].mean())
        lowest = int(torch.where(determined, cosine, torch.inf).argmin())
        i, j = divmod(lowest, len(spans))
        return [
            f"Mean cosine of {pairs} pairs of bins: {self.mean_cosine:.3f} ± {self.mean_cosine_se:.3f} (standard "
            f"error, {self.settings['micro_batches']} micro-batches). Naive, shrunk by noise: {naive:.3f}. Null, "
            f"gradients that cancel as at a minimiser: {self.null_cosine:.3f}.",
            f"Conflict: {negative} pairs have a negative cosine, {sure} of them for sure (95 % interval below 0; if "
            f"all cosines were 0, chance alone would give about {0.025 * pairs:.1f}).",
            f"Lowest cosine: {cosine[i, j]:.3f} [{low[i, j]:.3f}, {high[i, j]:.3f}], timesteps {spans[i]} and "
            f"{spans[j]}. It was picked as the lowest of {pairs}, so expect a less extreme one in a repeat.",
        ]

    def _about_undetermined(self, determined: int) -> str:
        unknown = self.cosine_debiased.diagonal().isnan().tolist()
        lost = [span for span, missing in zip(self.spans(), unknown, strict=True) if missing]
        return (
            f"Undetermined: {self.undetermined} of {self.undetermined + determined} pairs. The gradient of timesteps "
            f"{', '.join(lost)} does not stand out of its noise: use more micro-batches (now "
            f"{self.settings['micro_batches']}) or a larger batch per bin (now {self.settings['batch_per_bin']})."
        )

    def _about_stationarity(self) -> str:
        low, high = self.stationarity_interval
        longest = float(self.gramian.diagonal().max()) ** 0.5
        verdict = "Not told apart from Pareto stationary"
        if low > 0:
            verdict = "So some step lowers every bin's loss"
        return (
            f"Stationarity: the shortest convex combination of the gradients has norm {self.stationarity:.3g} "
            f"[{low:.3g}, {high:.3g}], the longest gradient {longest:.3g}. {verdict}."
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; NaN becomes None."""
        text = json.dumps(vars(self), default=Tensor.tolist)
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConflictReport:
        """The inverse of to_dict; raises TypeError for fields that are missing or unknown."""
        read = dict(values)
        for name, value in values.items():
            kind = str(cls.__annotations__.get(name))
            if kind == "float" and value is None:
                read[name] = float("nan")
            elif kind.startswith("Tensor") and value is not None:
                read[name] = torch.from_numpy(np.array(value, dtype=np.float64))
        return cls(**read)
