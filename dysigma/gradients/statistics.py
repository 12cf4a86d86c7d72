"""From the gradients of micro-batches to the numbers of a conflict report.

Notation: g_m (K, P) are the gradients of the K bins from micro-batch m of M, with expectation g; S = sum_m g_m.

Gramian. ``estimator`` explains the U-statistic G, unbiased for g g' in every entry. The naive Gramian S S' / M^2 is
that of the averaged gradients. Its diagonal is too large by the variance of the average.

Standard errors. Leave out one micro-batch at a time and recompute whatever is wanted: theta_(1) ... theta_(M). The
jackknife (Tukey 1958) estimates the variance of theta as (M - 1) / M sum_m (theta_(m) - mean)^2. For the Gramian, with
S - g_m in place of S,

    G_(m) = (S S' - Q - S g_m' - g_m S' + 2 g_m g_m') / ((M - 1) (M - 2)),    Q = sum_m g_m g_m'.

Cosines c_ij = G_ij / sqrt(G_ii G_jj) are not clipped, so that their noise stays symmetric. A bin whose squared norm
does not stand out of its noise (within the 95 % interval of 0, or negative without some micro-batch) has no direction:
its row and column are NaN, "undetermined".

Gradient-to-noise ratio. v_i = Q_ii / M - G_ii estimates the variance of the gradient of one micro-batch. The average of M has
variance v_i / M, so gnr_i = G_ii / (v_i / M). A batch of B samples has noise v_i b / B, with b samples of the bin in
a micro-batch: it equals the gradient at B = v_i b / G_ii, the noise scale (McCandlish, Kaplan, Amodei 2018).

Stationarity. The shortest convex combination of the gradients has squared norm min_w w' G w. Weights chosen on the same
data that judge them make it too small, and noise in the diagonal makes it too large. Therefore the weights come from
one half of the micro-batches and are judged on the other half, and the other way round; the two values are averaged.
Given the weights the judge is unbiased. A negative value means: not told apart from 0.

Sketches. Leaving out one micro-batch at a time needs all M of them at once. They are kept as sketches g_m R of at most
SKETCH_COLUMNS columns with E[R R'] = I; the Gramian itself is computed from full gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import pareto
from ..intervals import jackknife_se, t_quantile
from ..randomness import generator
from .estimator import GramianAccumulator, cosine_matrix
from .optimizer import AdamStep

SKETCH_COLUMNS = 65_536  # cosines between sketches are within about 0.01 of those between gradients


class Sketcher:
    """Folds rows (K, P) into (K, D) with random signs, which keeps inner products in expectation.

    D is SKETCH_COLUMNS; rows that are no longer are kept as they are.
    """

    def __init__(self, num_parameters: int, seed: int, device: torch.device) -> None:
        draw = generator(seed, 0, "signs")
        bits = torch.randint(2, (num_parameters,), generator=draw, dtype=torch.int8)
        self.signs = (2 * bits - 1).to(device)
        self.columns = min(SKETCH_COLUMNS, num_parameters)

    def __call__(self, rows: Tensor) -> Tensor:
        length = rows.shape[1]
        if length == self.columns:
            return rows
        padding = -length % self.columns
        folded = []
        for row in rows:
            signed = nn.functional.pad(row * self.signs, (0, padding))
            folded.append(signed.view(-1, self.columns).sum(0))
        return torch.stack(folded)


class Tracks:
    """What is kept of every micro-batch, in float64 on the device of the gradients.

    losses: (M, K). sketches: (M, K, D) of the gradients. Given the last step of an optimizer, also along: (M, K), the
    gradients times the direction of that step, and in_metric: (M, K, D), sketches in the metric of the optimizer.
    """

    along: Tensor | None = None
    in_metric: Tensor | None = None

    def __init__(self, micro_batches: int, rows: Tensor, seed: int, step: AdamStep | None) -> None:
        num_bins, num_parameters = rows.shape
        self.step = step
        self.sketch = Sketcher(num_parameters, seed, rows.device)
        self.losses = rows.new_zeros(micro_batches, num_bins, dtype=torch.float64)
        self.sketches = self.losses.new_zeros(micro_batches, num_bins, self.sketch.columns)
        if step is not None:
            self.along = torch.zeros_like(self.losses)
            self.in_metric = torch.zeros_like(self.sketches)

    def keep(self, m: int, losses: Tensor, rows: Tensor) -> None:
        """Keep micro-batch m: losses (K,), gradients (K, P)."""
        self.losses[m] = losses
        self.sketches[m] = self.sketch(rows)
        if self.step is not None and self.along is not None and self.in_metric is not None:
            direction = self.step.direction
            self.along[m] = torch.stack([row.double() @ direction for row in rows])
            self.in_metric[m] = self.sketch(rows * self.step.root_rates)

    def tensors(self) -> list[Tensor]:
        """All that is kept; a micro-batch of another rank is 0."""
        kept = [self.losses, self.sketches, self.along, self.in_metric]
        return [tensor for tensor in kept if tensor is not None]


def leave_one_out(sketches: Tensor) -> Tensor:
    """Debiased Gramians (M, K, K) without each of the micro-batch gradients (M, K, D).

    Their mean is the debiased Gramian of all.
    """
    count = len(sketches)
    own = sketches @ sketches.mT
    with_all = sketches @ sketches.sum(0).T
    all_pairs = with_all.sum(0) - own.sum(0)
    remaining = all_pairs - with_all - with_all.mT + 2 * own
    return (remaining / ((count - 1) * (count - 2))).cpu()


def cross_fitted_stationarity(sketches: Tensor, quantile: float) -> tuple[float, list[float]]:
    """Norm of the min-norm point, weights from one half judged on the other and back; and its interval [low, high]."""
    halves = [leave_one_out(sketches[0::2]), leave_one_out(sketches[1::2])]
    weights = [pareto.min_norm_weights(pareto.project_psd(half.mean(0))) for half in halves]
    first = halves[0] @ weights[1] @ weights[1]
    second = halves[1] @ weights[0] @ weights[0]
    square = (first.mean() + second.mean()) / 2
    error = (jackknife_se(first) ** 2 + jackknife_se(second) ** 2) ** 0.5 / 2
    low = square - quantile * error
    high = square + quantile * error
    ends = torch.stack([square, low, high])
    norm, *interval = (ends.sign() * ends.abs().sqrt()).tolist()
    return norm, interval


def _hidden(values: Tensor, known: Tensor) -> Tensor:
    """values (K,) or (K, K), NaN where a bin is not known."""
    both = known if values.ndim == 1 else known & known[:, None]
    return values.masked_fill(~both, float("nan"))


def _has_direction(gramian: Tensor, errors: Tensor, left_out: Tensor, quantile: float) -> Tensor:
    """(K,) bool: the bins whose squared norm stands out of its noise, whichever micro-batch is left out."""
    significant = gramian.diagonal() > quantile * errors.diagonal()
    always_positive = (left_out.diagonal(dim1=1, dim2=2) > 0).all(0)
    return significant & always_positive


def _magnitude_similarity(squares: Tensor) -> Tensor:
    """2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (Yu et al. 2020)."""
    return 2 * (squares * squares[:, None]).sqrt() / (squares + squares[:, None])


def _pair_statistics(
    cosine: Tensor, errors: Tensor, left_out: Tensor, known: Tensor, quantile: float
) -> dict[str, Any]:
    """Means and rates over the pairs of different bins that both have a direction."""
    pairs = (known & known[:, None]).triu(1)
    num_bins = len(cosine)
    high_ends = cosine + quantile * errors
    return {
        "mean_cosine": float(cosine[pairs].mean()),
        "mean_cosine_se": float(jackknife_se(left_out[:, pairs].mean(1))),
        "conflict_rate": float((cosine[pairs] < 0).double().mean()),
        "sure_conflict_rate": float((high_ends < 0)[pairs].double().mean()),
        "undetermined": num_bins * (num_bins - 1) // 2 - int(pairs.sum()),
        "null_cosine": -1 / max(1, num_bins - 1),
    }


def _optimizer_cosines(
    tracks: Tracks, squares: Tensor, left_squares: Tensor, known: Tensor
) -> dict[str, Tensor]:
    """Cosines with the optimizer's last step and in its metric; nothing if no optimizer was given."""
    if tracks.along is None or tracks.in_metric is None:
        return {}
    along = tracks.along.cpu()
    along_without = (along.sum(0) - along) / (len(along) - 1)
    cosines_without = along_without / left_squares.sqrt()
    gramian_in_metric = leave_one_out(tracks.in_metric).mean(0)
    return {
        "update_cosine": _hidden(along.mean(0) / squares.sqrt(), known),
        "update_cosine_se": _hidden(jackknife_se(cosines_without), known),
        "cosine_preconditioned": _hidden(cosine_matrix(gramian_in_metric), known),
    }


def report_statistics(
    accumulator: GramianAccumulator, tracks: Tracks, batch_per_bin: int
) -> dict[str, Any]:
    """The fields of a ``ConflictReport`` that follow from gradients; derived at the top of this module."""
    micro_batches = len(tracks.sketches)
    quantile = t_quantile(micro_batches)

    group_gramian = accumulator.debiased(micro_batches).cpu()
    gramian = group_gramian.sum(0)
    naive_gramian = accumulator.products(accumulator.sums).sum(0).cpu() / micro_batches**2
    gramians_without = leave_one_out(tracks.sketches)
    gramian_se = jackknife_se(gramians_without)

    squares = gramian.diagonal()
    left_squares = gramians_without.diagonal(dim1=1, dim2=2)
    known = _has_direction(gramian, gramian_se, gramians_without, quantile)

    cosine = _hidden(cosine_matrix(gramian), known)
    cosines_without = cosine_matrix(gramians_without)
    cosine_se = _hidden(jackknife_se(cosines_without), known)

    own_squares = accumulator.own_products.sum(0).diagonal().cpu()
    variance = own_squares / micro_batches - squares  # of the gradient of one micro-batch
    gnr = squares / variance * micro_batches
    noise_scale = variance * batch_per_bin / squares

    stationarity, interval = cross_fitted_stationarity(tracks.sketches, quantile)
    return {
        "gramian": gramian,
        "gramian_se": gramian_se,
        "cosine": cosine_matrix(naive_gramian),
        "cosine_debiased": cosine,
        "cosine_se": cosine_se,
        "magnitude_similarity": _hidden(_magnitude_similarity(squares), known),
        "gnr": gnr,
        "noise_scale": _hidden(noise_scale, known),
        "weights": pareto.min_norm_weights(pareto.project_psd(gramian)),
        "stationarity": stationarity,
        "stationarity_interval": interval,
        "stationarity_naive": pareto.stationarity(naive_gramian),
        **_pair_statistics(cosine, cosine_se, cosines_without, known, quantile),
        "group_names": accumulator.group_names,
        "group_gramian": group_gramian,
        **_optimizer_cosines(tracks, squares, left_squares, known),
    }
