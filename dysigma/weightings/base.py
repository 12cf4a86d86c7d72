"""What every weighting is: weights over timesteps behind ``loss = weighting(losses,
timesteps)``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..bins import Bins
from ..checks import check_number, check_timesteps, find_named
from ..devices import KeepsPrecision
from ..parallel import over_ranks
from ..pareto import project_psd
from ..schedule import NoiseSchedule
from .formulas import PREDEFINED, Name, log_conversion, log_error_factor, log_weight

# Beyond this a loss is an overflow in the making: its square would leave the range of float32.
LARGEST_LOSS = 1e15
# No table of a variance-preserving path or a flow reaches this log_snr in float64: they end at 37.
LARGEST_LOG_SNR = 50.0


def ratio(total: Tensor, count: Tensor, default: Tensor | float) -> Tensor:
    """total / count, or default where nothing was counted."""
    return torch.where(count > 1e-12, total / count.clamp(min=1e-12), default)


def torchjd_class(module: str, name: str, user: str) -> Any:
    """A class of TorchJD, which is an extra; ImportError says what to install.

    user: which weighting wants it, for the message.
    """
    try:
        importlib.import_module("torchjd")
        return getattr(importlib.import_module(f"torchjd.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"weighting {user}: {error}. pip install 'dysigma[moo]'") from error


def quadratic(gramian: Tensor, u: Tensor) -> Tensor:
    """u' G u as a sum, because autocast would round a matrix product."""
    return (u[:, None] * gramian * u).sum()


def is_of_levels_alone(function: Callable[[Tensor], Tensor], levels: Tensor) -> bool:
    """Whether function (n,) to (n,) gives each level a value that depends on no other level.

    It is tried on the levels in other company: reversed, every second one, each twice, with points
    between and beyond, and alone. A function that looks at neighbours, means, ranks or the number
    of levels gives itself away in one of these, or raises. Random ones do too.

    >>> levels = torch.linspace(3, -3, 20, dtype=torch.float64)
    >>> is_of_levels_alone(torch.sin, levels), is_of_levels_alone(lambda x: x - x.mean(), levels)
    (True, False)
    """
    count = len(levels)
    wanted = function(levels)

    def agrees(found: Tensor, expected: Tensor) -> bool:
        return found.shape == expected.shape and torch.allclose(
            found, expected, rtol=0, atol=tolerance
        )

    tolerance = 1e-9 if wanted.dtype == torch.float64 else 1e-5
    forward = torch.arange(count, device=levels.device)
    chosen = [forward.flip(0), forward[::2], forward[1::2], forward.repeat_interleave(2)]
    chosen += [forward[i : i + 1] for i in {0, 1, count // 3, count // 2, count - 2, count - 1}]
    try:
        for index in chosen:
            if not agrees(function(levels[index]), wanted[index]):
                return False
        finite = levels[levels.isfinite()]
        between = (finite[1:] + finite[:-1]) / 2
        beyond = torch.stack([finite[0] + 1, finite[-1] - 1])
        found = function(torch.cat([between, levels, beyond]))
        return agrees(found[len(between) : len(between) + count], wanted)
    except Exception:  # it wants the whole schedule
        return False


class Setting(NamedTuple):
    """What a weighting is made for: the first argument of every weighting's constructor."""

    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    normalize: bool = True


class Weighting(KeepsPrecision):
    """Base of all weightings: one weight per timestep, on per-sample losses in the model's own
    target space.

    weighting(losses (B,), timesteps (B,) int64, importance (B,) or None) is the mean of importance
    w[timesteps] losses, with w = weights() as it stood before the call; its gradient in losses is
    importance w / B. In train() mode the same backward gives parameters() their gradient, from
    detached losses of all ranks; that adds nothing to the value. Statistics move in train() mode
    alone, inside this call, with half-lives in images, so that splitting a batch (gradient
    accumulation) matters little. Numbers stay float32 under autocast, and nothing waits for the
    device. Raises ValueError for losses that are not (B,), timesteps out of range, importance of
    another shape.

    A sample whose loss or importance is not finite (or beyond 1e15) makes the returned loss what it
    makes it, so that a GradScaler or a guard of your own sees it and skips the step. Nothing is
    learned from that sample: update() gets it with loss 0 and importance 0. A loss of exactly 0 is
    a loss; to leave a sample out give it the importance 0.

    A subclass of your own gives weights() and, if it learns, update(); parameters and buffers are
    its whole state. ``dysigma.testing.check_weighting`` runs the laws on it.

    >>> from dysigma import NoiseSchedule, make_weighting
    >>> make_weighting("min-snr", NoiseSchedule.linear(), gamma=3)
    min-snr(gamma=3, target=epsilon)
    """

    name: str = ""  # as make_weighting was asked for it
    params: Mapping[str, Any]  # all parameters by name, as make_weighting used them
    needs_gramian: bool = (
        False  # whether the loop must call observe_gramian, every gramian_every steps
    )
    gramian_every: int = 0
    # What the weighting learns from: "losses", in the call itself, or "gradient-norms", of which
    # the loop must tell by observe_gradient_norms after each backward.
    observes: str = "losses"
    suggested_lr: float = 1e-2
    learns: ClassVar[bool] = True  # whether the losses change it
    # What of the weight is exact at every log_snr, and its parameters.
    formula: tuple[Name, Mapping[str, Any]] = ("const-x0", {})
    log_snr: Tensor  # (T,) float64
    log_conversion: Tensor  # (T,) float64
    gramian: Tensor  # (K, K) positive semi-definite, mean diagonal 1; 0 before the first
    gramian_mean: Tensor  # (K, K) running mean of what was observed, in units of its diagonal
    gramians_seen: Tensor
    bins: Bins
    bin_index: Tensor  # (T,)

    def __init__(self, setting: Setting, bins: int | Bins | None = None) -> None:
        super().__init__()
        if not isinstance(setting, Setting):
            raise TypeError(
                f"the first argument of {type(self).__name__} must be a Setting(schedule, prediction_type); "
                f"got {type(setting).__name__}"
            )
        log_snr = setting.schedule.log_snr
        self.prediction_type = setting.schedule.canonical(setting.prediction_type)
        self.normalize = setting.normalize
        self.num_timesteps = len(log_snr)
        self.is_flow = setting.schedule.is_flow
        conversion = log_conversion(log_snr, self.prediction_type, self.is_flow)
        self.register_buffer("log_snr", log_snr.clone(), persistent=False)
        self.register_buffer("log_conversion", conversion, persistent=False)
        if bins is not None:
            self._set_bins(bins)

    def _set_bins(self, bins: int | Bins) -> None:
        if isinstance(bins, Bins):
            self.bins = Bins(bins.edges)
        else:
            self.bins = Bins.uniform(self.num_timesteps, bins)
        if int(self.bins.edges[-1]) != self.num_timesteps:
            raise ValueError(
                f"{bins} do not end where the schedule does, at {self.num_timesteps} timesteps"
            )
        bin_index = self.bins.index(torch.arange(self.num_timesteps))
        self.register_buffer("bin_index", bin_index, persistent=False)

    def __repr__(self) -> str:
        parts = [f"{key}={_shown(value)}" for key, value in getattr(self, "params", {}).items()]
        parts.append(f"target={self.prediction_type}")
        if not self.normalize:
            parts.append("normalize=False")
        return f"{self.name or type(self).__name__}({', '.join(parts)})"

    # ------------------------------------------------------------ for subclasses

    def weights(self) -> Tensor:
        """(T,) float32, detached: the gradient weight of each timestep now; mean 1 over timesteps
        if normalize."""
        raise NotImplementedError

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor | None:
        """Move the statistics, from (B,) of all ranks; return what the parameters minimise, if
        there are any."""
        return None

    def scaled(self, weights: Tensor) -> Tensor:
        """Weights (T,) divided by their mean, if normalize."""
        return weights / weights.mean() if self.normalize else weights

    def from_log(self, log_weights: Tensor) -> Tensor:
        """Weights of log-weights (T,), of mean 1 if normalize."""
        return log_weights.softmax(0) * self.num_timesteps if self.normalize else log_weights.exp()

    def use_formula(self, formula: Name, schedule: NoiseSchedule, **params: Any) -> Tensor:
        """log_weight of the formula, (T,) float64.

        `at` computes it between timesteps too, if its value at a level depends on that level alone;
        else `at` interpolates the table.
        """
        table = log_weight(formula, schedule, self.prediction_type, **params)
        norm = float(self.from_log(table).float().double().norm())
        if not 0 < norm < math.inf:
            raise ValueError(
                f"{formula} {params} gives weights that are all 0 or not finite: normalize, or use less"
            )
        function = find_named(formula, PREDEFINED, "predefined weighting")
        if is_of_levels_alone(lambda levels: function(levels, **params), schedule.log_snr):
            self.formula = formula, params
        return table

    def density(self) -> Tensor | None:
        """Masses (T,) float64 by which this weighting wants timesteps drawn with importance, now.

        None: it leaves the density to the sampler. Else the sampler "weighting" reads it.
        """
        return None

    def observe_gradient_norms(
        self, squared_norms: Tensor, timesteps: Tensor, importance: Tensor
    ) -> Tensor:
        """What the parameters minimise, () with gradient, from squared gradient norms (B,).

        Only of weightings whose `observes` is "gradient-norms"; the others raise ValueError.
        """
        raise ValueError(
            f"{self!r} learns from losses: only dy-sigma with variant='density' takes gradient norms"
        )

    # ------------------------------------------------------------ the loss

    def forward(
        self, losses: Tensor, timesteps: Tensor, importance: Tensor | None = None
    ) -> Tensor:
        self._check(losses, importance)
        check_timesteps(timesteps, self.num_timesteps, len(losses))
        timesteps = timesteps.to(losses.device)
        return self._loss(losses, self.weights()[timesteps], timesteps, importance)

    def at(self, losses: Tensor, log_snr: Tensor, importance: Tensor | None = None) -> Tensor:
        """The loss () at noise levels log_snr (B,), for training in continuous time: -2 ln sigma, 2
        ln((1 - s) / s).

        Exact in log_snr are predefined weightings (elbo apart), the prior of dy-sigma, your own
        formulas of which each value depends on its level alone, and the conversion to the target,
        all on the scale that has mean 1 over the timesteps. The rest, so all that is learned, is
        interpolated on the schedule, linear in log_snr between timesteps and constant beyond, and
        learns from a sample as from the nearest timestep; so the schedule should span the levels
        drawn. At a timestep's own log_snr all is as in a call with that timestep. Raises ValueError
        for log_snr that is not (B,), NaN, above 50 (no noise), or -inf (no signal) with epsilon. On
        an accelerator, where that test would wait for the device, such a level makes the loss NaN.
        """
        self._check(losses, importance)
        level, is_level = self._checked_levels(log_snr, losses)
        # The timesteps on both sides: log_snr falls with the timestep.
        right = torch.searchsorted(-self.log_snr, -level).clamp(1, self.num_timesteps - 1)
        left = right - 1
        high = self.log_snr[left]
        low = self.log_snr[right]
        share = torch.where(level <= low, 1.0, ((high - level) / (high - low)).clamp(min=0))
        factor = self._interpolated_factor()
        exact = self._log_exact(level).exp()
        weights = (exact * torch.lerp(factor[left], factor[right], share)).float()
        weights = torch.where(is_level, weights, math.nan)
        nearest = right - (share < 0.5).long()
        return self._loss(losses, weights, nearest, importance)

    def _checked_levels(self, log_snr: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (B,) float64 and which of them are noise levels, after saying what is wrong with
        them."""
        has_no_signal = self.prediction_type != "epsilon"
        levels = "finite or -inf" if has_no_signal else "finite"
        need = f"log_snr must be {tuple(losses.shape)} real, {levels}"
        if not isinstance(log_snr, Tensor):
            raise ValueError(f"{need}; got {type(log_snr).__name__}")
        if not log_snr.is_floating_point():
            raise ValueError(
                f"{need}; got {log_snr.dtype}. Integer timesteps go to weighting(losses, timesteps)"
            )
        if log_snr.shape != losses.shape:
            raise ValueError(f"{need}; got shape {tuple(log_snr.shape)}")
        level = log_snr.to(losses.device).double()
        good = level.isfinite() | (level.isneginf() & has_no_signal)
        good_and_noisy = good & (level < LARGEST_LOG_SNR)
        if level.device.type != "cpu" or torch.compiler.is_compiling():
            return level, good_and_noisy
        if not bool(good.all()):
            raise ValueError(f"{need}; got {log_snr}")
        if not bool(good_and_noisy.all()):
            raise ValueError(
                f"{need}, below {LARGEST_LOG_SNR:g}; got {float(level.max()):g}. Are these timesteps? A flow that "
                "counts t from 0 to 1000 has sigma = t / 1000 and log_snr = 2 ln((1 - sigma) / sigma)"
            )
        return level, good_and_noisy

    def _log_exact(self, log_snr: Tensor) -> Tensor:
        """Log of what is exact in log_snr, on the error of the target: (n,) to (n,)."""
        name, params = self.formula
        function = find_named(name, PREDEFINED, "predefined weighting")
        on_x0: Tensor = function(log_snr, **params)
        return on_x0 - log_error_factor(log_snr, self.prediction_type, self.is_flow)

    def _interpolated_factor(self) -> Tensor:
        """weights() over what is exact, (T,) float64; where that is 0, the factor of the nearest
        step that has one."""
        exact = self._log_exact(self.log_snr).exp()
        factor = self.weights() / exact
        has_one = exact > 0
        steps = torch.arange(self.num_timesteps, device=exact.device)
        before = torch.where(has_one, steps, -1).cummax(0).values
        first = has_one.long().argmax()
        return factor[torch.where(before >= 0, before, first)]

    def _check(self, losses: Tensor, importance: Tensor | None) -> None:
        advice = "Use F.mse_loss(output, target, reduction='none').flatten(1).mean(1)"
        need = "losses must be (B,) real, one mean squared error per sample"
        if not isinstance(losses, Tensor):
            raise ValueError(f"{need}; got {type(losses).__name__}. {advice}")
        if losses.ndim != 1 or not losses.is_floating_point():
            raise ValueError(f"{need}; got shape {tuple(losses.shape)}, {losses.dtype}. {advice}")
        if losses.device != self.log_snr.device:
            raise ValueError(
                f"losses are on {losses.device}, the weighting on {self.log_snr.device}: "
                "move it once with weighting.to(device)"
            )
        if importance is not None and importance.shape != losses.shape:
            raise ValueError(
                f"importance must have shape {tuple(losses.shape)}; got {tuple(importance.shape)}"
            )

    def _loss(
        self, losses: Tensor, weights: Tensor, timesteps: Tensor, importance: Tensor | None
    ) -> Tensor:
        if importance is None:
            importance = torch.ones_like(losses, dtype=torch.float32)
        loss = (weights * importance * losses).mean()
        if not (self.training and self.learns):
            return loss
        every_loss, every_step, every_importance = over_ranks(losses, timesteps, importance)
        usable = (every_loss.abs() <= LARGEST_LOSS) & every_importance.isfinite()
        objective = self.update(
            torch.where(usable, every_loss, 0.0),
            every_step.long(),
            torch.where(usable, every_importance, 0.0),
        )
        # Its gradient without its value.
        return loss if objective is None else loss + (objective - objective.detach())

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Groups to add to an optimizer: own learning rate (default suggested_lr), no weight decay;
        [] if nothing."""
        parameters = list(self.parameters())
        if not parameters:
            return []
        lr = self.suggested_lr if lr is None else lr
        return [{"params": parameters, "lr": lr, "weight_decay": 0.0}]

    # ------------------------------------------------------------ Gramians

    def _expect_gramian(self, gramian_every: int) -> None:
        size = self.bins.num_bins
        try:
            project_psd(torch.zeros(size, size))
        except ValueError as error:
            raise ValueError(f"bins: {size} must be fewer here. {error}") from None
        self.needs_gramian = True
        self.gramian_every = check_number("gramian_every", gramian_every, kinds=int)
        self.register_buffer("gramian", torch.zeros(size, size))
        self.register_buffer("gramian_mean", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("gramians_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe_gramian(self, gramian: Tensor) -> None:
        """Take in G (K, K), the inner products of the gradients of the mean losses of self.bins;
        the same on all ranks.

        The losses are unweighted, in the model's own target space. Give a debiased estimate,
        although it is noisy and perhaps indefinite: the last ten or so are averaged, each over the
        mean of its absolute diagonal, and the positive semi-definite matrix nearest to the mean is
        what weights use, once it is not 0. (Noise in the diagonal would survive the mean.) Ignored
        in eval() mode. Raises ValueError for another shape or entries that are not finite.
        """
        if not self.needs_gramian:
            raise ValueError(f"{type(self).__name__} uses no Gramian (needs_gramian is False)")
        size = self.bins.num_bins
        if gramian.shape != (size, size):
            raise ValueError(
                f"gramian must be ({size}, {size}), one row a bin; got {tuple(gramian.shape)}: measure it "
                "with weighting.bins"
            )
        bad = int((~torch.isfinite(gramian)).sum())
        if bad:
            raise ValueError(
                f"gramian must be finite; {bad} of its {size * size} entries are NaN or infinite: leave "
                "this measurement out"
            )
        if not self.training:
            return
        self.gramians_seen += 1
        # Gradients shrink by orders of magnitude in training: as they are, the first would rule the
        # mean.
        scale = gramian.double().diagonal().abs().mean().clamp(min=1e-30)
        memory = (1 / self.gramians_seen.double()).clamp(min=0.1)
        self.gramian_mean.lerp_(gramian.double() / scale, memory)
        nearest = project_psd(self.gramian_mean)
        if nearest.trace() > 0:
            self._observe(nearest * (size / nearest.trace()))

    def _observe(self, gramian: Tensor) -> None:
        """Keep a positive semi-definite Gramian whose diagonal has mean 1."""
        self.gramian.copy_(gramian)


def _shown(value: Any) -> str:
    """A parameter in one short word."""
    if isinstance(value, Bins):
        return f"Bins({value.num_bins})"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)
