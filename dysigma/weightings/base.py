"""What every weighting is: weights over timesteps behind ``loss = weighting(losses, timesteps)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..checks import check_number, check_timesteps, find_named
from ..parallel import over_ranks
from ..pareto import project_psd
from ..schedule import NoiseSchedule
from .formulas import PREDEFINED, Name, log_conversion, log_error_factor, log_weight


def _ratio(total: Tensor, count: Tensor, default: Tensor | float) -> Tensor:
    return torch.where(count > 1e-12, total / count.clamp(min=1e-12), default)


def _quadratic(gramian: Tensor, u: Tensor) -> Tensor:
    return (u[:, None] * gramian * u).sum()  # a matrix product would be rounded by autocast


class Setting(NamedTuple):
    """What a weighting is made for: the first argument of every weighting's constructor."""

    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    normalize: bool = True


class Weighting(nn.Module):
    """Base of all weightings: one weight per timestep, on per-sample losses in the model's own target space.

    weighting(losses (B,), timesteps (B,) int64, importance (B,) or None) is the mean of importance w[timesteps] losses,
    with w = weights() as it stood before the call; its gradient in losses is importance w / B. In train() mode the same
    backward gives parameters() their gradient, from detached losses of all ranks; that adds nothing to the value.
    Statistics move in train() mode alone, inside this call, with half-lives in images, so that splitting a batch
    (gradient accumulation) matters little. Numbers stay float32 under autocast, and nothing waits for the device.
    Raises ValueError for losses that are not (B,), timesteps out of range, importance of another shape.

    A subclass of your own gives weights() and, if it learns, update(); parameters and buffers are its whole state.
    ``dysigma.testing.check_weighting`` runs the laws on it.
    """

    needs_gramian = False  # whether the loop must call observe_gramian, every gramian_every steps
    gramian_every = 0
    suggested_lr = 1e-2
    learns = True  # whether the losses change it
    formula: tuple[Name, Mapping[str, Any]] = (
        "const-x0",
        {},
    )  # what of the weight is exact in log_snr, with parameters
    log_snr: Tensor
    log_conversion: Tensor
    gramian: Tensor  # (K, K) positive semi-definite, mean diagonal 1; 0 before the first
    gramian_mean: Tensor  # (K, K) running mean of what was observed, in units of its diagonal
    gramians_seen: Tensor
    bins: Bins
    bin_index: Tensor  # (T,)

    def __init__(self, setting: Setting, bins: int | Bins | None = None) -> None:
        super().__init__()
        log_snr = setting.schedule.log_snr
        self.prediction_type = setting.schedule.canonical(setting.prediction_type)
        self.normalize, self.num_timesteps = setting.normalize, len(log_snr)
        self.register_buffer("log_snr", log_snr.clone(), persistent=False)
        self.is_flow = setting.schedule.is_flow
        conversion = log_conversion(log_snr, self.prediction_type, self.is_flow)
        self.register_buffer("log_conversion", conversion, persistent=False)
        if bins is not None:
            self.bins = (
                Bins(bins.edges)
                if isinstance(bins, Bins)
                else Bins.uniform(self.num_timesteps, bins)
            )
            if int(self.bins.edges[-1]) != self.num_timesteps:
                raise ValueError(
                    f"{bins} do not end where the schedule does, at {self.num_timesteps} timesteps"
                )
            self.register_buffer(
                "bin_index", self.bins.index(torch.arange(self.num_timesteps)), persistent=False
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weighting:
        # .half() on an enclosing module must not round weights or statistics: follow the device, keep the dtype.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def scaled(self, weights: Tensor) -> Tensor:
        """Weights (T,) divided by their mean, if normalize."""
        return weights / weights.mean() if self.normalize else weights

    def from_log(self, log_weights: Tensor) -> Tensor:
        """Weights of log-weights (T,), of mean 1 if normalize."""
        return log_weights.softmax(0) * self.num_timesteps if self.normalize else log_weights.exp()

    def use_formula(self, formula: Name, schedule: NoiseSchedule, **params: Any) -> Tensor:
        """log_weight of the formula, which `at` then computes between timesteps unless it looks at neighbours."""
        table, plain = log_weight(formula, schedule, self.prediction_type, **params), self.formula
        if not 0 < float(self.from_log(table).float().double().norm()) < math.inf:
            raise ValueError(
                f"{formula} {params} gives weights that are all 0 or not finite: normalize, or use less"
            )
        self.formula = formula, params
        if not torch.allclose(self._known(self.log_snr.flip(0)).flip(0), table, rtol=1e-9):
            self.formula = plain
        return table

    def weights(self) -> Tensor:
        """(T,) float32, detached: the gradient weight of each timestep now; mean 1 over timesteps if normalize."""
        raise NotImplementedError

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor | None:
        """Move the statistics, from (B,) of all ranks; return what the parameters minimise, if there are any."""
        return None

    def forward(
        self, losses: Tensor, timesteps: Tensor, importance: Tensor | None = None
    ) -> Tensor:
        self._check(losses, importance)
        check_timesteps(timesteps, self.num_timesteps, len(losses))
        return self._loss(losses, self.weights()[timesteps], timesteps, importance)

    def at(self, losses: Tensor, log_snr: Tensor, importance: Tensor | None = None) -> Tensor:
        """The loss () at noise levels log_snr (B,), for training in continuous time: -2 ln sigma, 2 ln((1 - s) / s).

        Exact in log_snr are predefined weightings (elbo apart), the prior of dy-sigma and the conversion to the target,
        on the scale that has mean 1 over the timesteps. What is learned is interpolated on the schedule, linear in
        log_snr between timesteps and constant beyond, and learns from a sample as from the nearest timestep; so the
        schedule should span the levels drawn. At a timestep's own log_snr all is as in a call with that timestep.
        Raises ValueError for log_snr that is not (B,), NaN, inf (no noise), or -inf (no signal) with epsilon.
        """
        self._check(losses, importance)
        is_checked = log_snr.device.type == "cpu" and not torch.compiler.is_compiling()
        good = log_snr.isfinite() | (log_snr.isneginf() & (self.prediction_type != "epsilon"))
        if (
            log_snr.shape != losses.shape
            or not log_snr.is_floating_point()
            or (is_checked and not bool(good.all()))
        ):
            levels = "finite or -inf" if self.prediction_type != "epsilon" else "finite"
            raise ValueError(f"log_snr must be {tuple(losses.shape)} real, {levels}; got {log_snr}")
        level = log_snr.double()
        right = torch.searchsorted(-self.log_snr, -level).clamp(1, self.num_timesteps - 1)
        high, low = self.log_snr[right - 1], self.log_snr[right]
        share = torch.where(level <= low, 1.0, ((high - level) / (high - low)).clamp(min=0))
        known = self._known(self.log_snr)
        factor = self.weights() / known.exp()
        factor = torch.where(known.isneginf(), factor.roll(1), factor)
        weights = (
            self._known(level).exp() * torch.lerp(factor[right - 1], factor[right], share)
        ).float()
        return self._loss(losses, weights, right - (share < 0.5).long(), importance)

    def _known(self, log_snr: Tensor) -> Tensor:
        """Log of what is exact in log_snr."""
        name, params = self.formula
        function = find_named(name, PREDEFINED, "predefined weighting")
        on_x0 = function(log_snr, **params)
        return on_x0 - log_error_factor(log_snr, self.prediction_type, self.is_flow)

    def _check(self, losses: Tensor, importance: Tensor | None) -> None:
        if losses.ndim != 1 or not losses.is_floating_point():
            raise ValueError(
                f"losses must be (B,) real, one mean squared error per sample; got shape {tuple(losses.shape)}, "
                f"{losses.dtype}. Use F.mse_loss(output, target, reduction='none').flatten(1).mean(1)"
            )
        if importance is not None and importance.shape != losses.shape:
            raise ValueError(
                f"importance must have shape {tuple(losses.shape)}; got {tuple(importance.shape)}"
            )

    def _loss(
        self, losses: Tensor, weights: Tensor, timesteps: Tensor, importance: Tensor | None
    ) -> Tensor:
        importance = (
            torch.ones_like(losses, dtype=torch.float32) if importance is None else importance
        )
        loss = (weights * importance * losses).mean()
        if not (self.training and self.learns):
            return loss
        losses, steps, importance = over_ranks(losses, timesteps, importance)
        objective = self.update(losses, steps.long(), importance)
        return loss if objective is None else loss + (objective - objective.detach())

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Groups to add to an optimizer: own learning rate (default suggested_lr), no weight decay; [] if nothing."""
        parameters = list(self.parameters())
        lr = self.suggested_lr if lr is None else lr
        return [{"params": parameters, "lr": lr, "weight_decay": 0.0}] if parameters else []

    def _expect_gramian(self, gramian_every: int) -> None:
        size = self.bins.num_bins
        self.needs_gramian = True
        self.gramian_every = check_number("gramian_every", gramian_every, kinds=int)
        self.register_buffer("gramian", torch.zeros(size, size))
        self.register_buffer("gramian_mean", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("gramians_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe_gramian(self, gramian: Tensor) -> None:
        """Take in G (K, K), the inner products of the gradients of the mean losses of self.bins; the same on all ranks.

        The losses are unweighted, in the model's own target space. Give a debiased estimate, although it is noisy and
        perhaps indefinite: the last ten or so are averaged, each over the mean of its absolute diagonal, and the
        positive semi-definite matrix nearest to the mean is what weights use, once it is not 0. (Noise in the diagonal
        would survive the mean.) Ignored in eval() mode. Raises ValueError for another shape or entries that are not
        finite.
        """
        if not self.needs_gramian:
            raise ValueError(f"{type(self).__name__} uses no Gramian (needs_gramian is False)")
        size = self.bins.num_bins
        if gramian.shape != (size, size) or not bool(torch.isfinite(gramian).all()):
            raise ValueError(f"gramian must be ({size}, {size}) and finite; got {gramian}")
        if self.training:
            self.gramians_seen += 1
            # Gradients shrink by orders of magnitude in training: as they are, the first would rule the mean.
            unit = gramian.double() / gramian.double().diagonal().abs().mean().clamp(min=1e-30)
            self.gramian_mean.lerp_(unit, (1 / self.gramians_seen.double()).clamp(min=0.1))
            nearest = project_psd(self.gramian_mean)
            if nearest.trace() > 0:
                self._observe(nearest * (size / nearest.trace()))

    def _observe(self, gramian: Tensor) -> None:
        """Keep a positive semi-definite Gramian whose diagonal has mean 1."""
        self.gramian.copy_(gramian)
