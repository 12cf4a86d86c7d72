"""What a measurement of conflicts says: its numbers, its table, its sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..intervals import t_quantile


@dataclass(frozen=True)
class ConflictReport:
    """What ``conflicts`` measured on K bins; float64 CPU tensors, NaN where the data leave a value undetermined.

    Debiased means from a Gramian unbiased in every entry, diagonal included; standard errors (`_se`) are jackknife over
    the M micro-batches, intervals 95 % (Student t, M - 1 degrees of freedom).
    """

    edges: list[int]  # K + 1 timesteps, as in Bins
    log_snr: Tensor  # (K,) mean over the bin's finite values
    losses: Tensor  # (K,) times the weighting, if one was given
    gramian: Tensor  # (K, K) debiased
    gramian_se: Tensor  # (K, K)
    cosine: Tensor  # (K, K) naive: of the averaged gradients, shrunk by sqrt(gnr / (1 + gnr)) on each side
    cosine_debiased: (
        Tensor  # (K, K) never clipped; NaN if a bin's gradient does not stand out of its noise
    )
    cosine_se: Tensor  # (K, K)
    magnitude_similarity: (
        Tensor  # (K, K) 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (Yu et al. 2020), debiased
    )
    gnr: Tensor  # (K,) |g|^2 over the variance of its estimate from all samples of the report
    noise_scale: (
        Tensor  # (K,) batch size at which the noise equals the gradient (McCandlish et al. 2018)
    )
    weights: Tensor  # (K,) of the min-norm point of the debiased Gramian
    stationarity: (
        float  # norm of the min-norm point, cross-fitted; negative: indistinguishable from 0
    )
    stationarity_interval: list[float]
    stationarity_naive: float  # with the noise floor
    mean_cosine: (
        float  # debiased, over the determined pairs of different bins, as are the next four
    )
    mean_cosine_se: float
    conflict_rate: float  # share of pairs with cosine < 0
    sure_conflict_rate: float  # share of pairs with the whole interval < 0
    undetermined: int  # pairs left out
    null_cosine: float  # -1 / (K - 1): the mean where K gradients of equal norm cancel, as they do at a minimiser
    group_names: list[str]
    group_gramian: Tensor  # (groups, K, K) debiased; sums to gramian
    settings: dict[
        str, Any
    ]  # micro_batches, batch_per_bin, paired, prediction_type, seed, training (the model's mode)
    update_cosine: Tensor | None = (
        None  # (K,) of the optimizer's step and minus the gradient; < 0: the bin gets worse
    )
    update_cosine_se: Tensor | None = None  # (K,)
    cosine_preconditioned: Tensor | None = None  # (K, K) debiased, in the metric of the optimizer

    def interval(self) -> tuple[Tensor, Tensor]:
        """Low and high ends (K, K) of the intervals of cosine_debiased."""
        half = t_quantile(self.settings["micro_batches"]) * self.cosine_se
        return self.cosine_debiased - half, self.cosine_debiased + half

    def lookahead(self, lr: float) -> Tensor:
        """(K, K): to first order, the relative change of loss j by an SGD step of size lr on bin i."""
        return -lr * self.gramian / self.losses

    def table(self) -> Any:
        """A pandas DataFrame with one row per bin."""
        import pandas

        off = self.cosine_debiased.clone().fill_diagonal_(float("nan"))
        columns: dict[str, Any] = {
            "first": self.edges[:-1],
            "last": [edge - 1 for edge in self.edges[1:]],
        }
        names = ("log_snr", "losses", "gnr", "noise_scale", "weights", "update_cosine")
        columns |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        columns |= {"norm": self.gramian.diagonal().sqrt(), "mean_cosine": off.nanmean(1)}
        columns["conflicts"] = (off < 0).sum(1)
        return pandas.DataFrame({name: np.asarray(column) for name, column in columns.items()})

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


def _conflict_sentences(report: Any, spans: Sequence[str]) -> list[str]:
    """What a ConflictReport says, and how surely."""
    import torch

    cosine, (low, high), lines = report.cosine_debiased, report.interval(), []
    known, count = cosine.isfinite().triu(1), report.settings["micro_batches"]
    if pairs := int(known.sum()):
        i, j = divmod(int(torch.where(known, cosine, torch.inf).argmin()), len(spans))
        sure, negative = (int(x[known].sum()) for x in (high < 0, cosine < 0))
        lines = [
            f"Mean cosine of {pairs} pairs of bins: {report.mean_cosine:.3f} ± {report.mean_cosine_se:.3f} (standard "
            f"error, {count} micro-batches). Naive, shrunk by noise: {float(report.cosine[known].mean()):.3f}. Null, "
            f"gradients that cancel as at a minimiser: {report.null_cosine:.3f}.",
            f"Conflict: {negative} pairs have a negative cosine, {sure} of them for sure (95 % interval below 0; if "
            f"all cosines were 0, chance alone would give about {0.025 * pairs:.1f}).",
            f"Lowest cosine: {cosine[i, j]:.3f} [{low[i, j]:.3f}, {high[i, j]:.3f}], timesteps {spans[i]} and "
            f"{spans[j]}. It was picked as the lowest of {pairs}, so expect a less extreme one in a repeat.",
        ]
    if lost := [
        span for span, missing in zip(spans, cosine.diagonal().isnan(), strict=True) if missing
    ]:
        lines.append(
            f"Undetermined: {report.undetermined} of {report.undetermined + pairs} pairs. The gradient of timesteps "
            f"{', '.join(lost)} does not stand out of its noise: use more --micro-batches (now {count}) or a larger "
            f"--batch-per-bin (now {report.settings['batch_per_bin']})."
        )
    ends, longest = report.stationarity_interval, float(report.gramian.diagonal().max()) ** 0.5
    verdict = (
        "So some step lowers every bin's loss"
        if ends[0] > 0
        else "Not told apart from Pareto stationary"
    )
    return [
        *lines,
        f"Stationarity: the shortest convex combination of the gradients has norm {report.stationarity:.3g} "
        f"[{ends[0]:.3g}, {ends[1]:.3g}], the longest gradient {longest:.3g}. {verdict}.",
    ]
