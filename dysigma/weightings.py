"""Loss weightings over timesteps, all behind ``loss = weighting(losses, timesteps)``.

One scale: a predefined weighting is a function of log_snr (natural log, float64) giving a log-weight on the x0 error,
the convention of Min-SNR (Hang et al. 2023). The squared error of epsilon is SNR times that of x0, the one of v SNR + 1
times, so on the model's own target the log-weight is less by 0 (sample), log_snr (epsilon), softplus(log_snr) (v) or
2 softplus(log_snr / 2) (flow, whose error noise - x0 has the factor (1 + sqrt(SNR))^2).

Dy-Sigma is an independent reconstruction from the abstract (Liu, Ye, Liu, Qin, IJCNN 2024), not the authors' formulas.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bins import Bins, over_ranks
from .draws import check_name, check_timesteps
from .pareto import project_psd
from .schedule import PREDICTION_TYPES, NoiseSchedule, canonical_prediction_type


def _log_add(log_snr: Tensor, other: float) -> Tensor:
    return torch.logaddexp(log_snr, log_snr.new_tensor(other))


def _elbo(log_snr: Tensor) -> Tensor:
    # t = 0 has no predecessor: it repeats the first step in log SNR.
    before = torch.cat([2 * log_snr[:1] - log_snr[1:2], log_snr[:-1]])
    return before + torch.log(-torch.expm1(log_snr - before)) - math.log(2)


Name = str | Callable[..., Any]  # of a weighting, or one of your own
# What the plain error of a target is called as a weighting.
PLAIN = dict(zip(PREDICTION_TYPES, ("const-eps", "const-x0", "const-v", "const-flow"), strict=True))
# Log of the weight on the x0 error, as a function of log_snr; the comments give the weight itself and where it is from.
PREDEFINED: dict[str, Callable[..., Tensor]] = {
    # 1; what Min-SNR calls Const
    "const-x0": lambda log_snr: torch.zeros_like(log_snr),
    # SNR, plain epsilon error (Ho, Jain, Abbeel 2020)
    "const-eps": lambda log_snr: log_snr,
    # SNR + 1, plain v error (Salimans, Ho 2022)
    "const-v": lambda log_snr: _log_add(log_snr, 0.0),
    # (1 + sqrt(SNR))^2 = 1 / s^2, plain error of the velocity of a rectified flow
    "const-flow": lambda log_snr: 2 * _log_add(log_snr / 2, 0.0),
    # max(SNR, 1) (Salimans, Ho 2022), and for any gamma
    "truncated-snr": lambda log_snr, *, gamma=1.0: log_snr.clamp(min=math.log(gamma)),
    "max-snr": lambda log_snr, *, gamma=5.0: log_snr.clamp(min=math.log(gamma)),
    # min(SNR, gamma) (Hang et al. 2023)
    "min-snr": lambda log_snr, *, gamma=5.0: log_snr.clamp(max=math.log(gamma)),
    # gamma SNR / (SNR + gamma) (k-diffusion, with gamma = 1 / sigma_data^2)
    "soft-min-snr": lambda log_snr, *, gamma=4.0: log_snr + math.log(gamma) - _log_add(log_snr, math.log(gamma)),
    # SNR / (k + SNR)^gamma (Choi et al. 2022)
    "p2": lambda log_snr, *, k=1.0, gamma=1.0: log_snr - gamma * _log_add(log_snr, math.log(k)),
    # sqrt(SNR) (arXiv 2310.08442)
    "debiased": lambda log_snr: log_snr / 2,
    # SNR + 1 / sigma_data^2, lambda(sigma) of Karras et al. 2022 at sigma^2 = 1 / SNR, without their sampling
    "edm": lambda log_snr, *, sigma_data=0.5: _log_add(log_snr, -2 * math.log(sigma_data)),
    # SNR sigmoid(bias - log_snr), here per timestep; Kingma, Gao 2023 have it per unit of log_snr
    "sigmoid": lambda log_snr, *, bias=2.0: log_snr - _log_add(log_snr - bias, 0.0),
    # (SNR(t-1) - SNR(t)) / 2 (Kingma et al. 2021)
    "elbo": _elbo,
    # SNR, times ratio where log_snr > at: two objectives in any proportion, to sweep a front with
    "split": lambda log_snr, *, ratio=1.0, at=0.0: log_snr + math.log(ratio) * (log_snr > at),
}


def _check_options(name: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    if set(options) - set(known):
        raise ValueError(f"{name} has no parameter {sorted(set(options) - set(known))}; it has {known}")


def _check_number(name: str, value: Any, low: float = 0.0, kinds: Any = int | float) -> Any:
    # Weights are float32: what lies beyond would overflow there, in the middle of a run.
    if isinstance(value, bool) or not isinstance(value, kinds) or not max(low, -1e30) < value < 1e30:
        kind = "int" if kinds is int else "number"
        raise ValueError(f"{name} must be a {kind} > {max(low, -1e30):g} and < 1e30; got {value!r}")
    return value


def log_conversion(log_snr: Tensor, prediction_type: str) -> Tensor:
    """What a log-weight on the x0 error gains on the error of another target: (T,) to (T,).

    Raises ValueError for epsilon where SNR = 0.
    """
    kind = canonical_prediction_type(prediction_type)
    if kind == "epsilon" and bool(torch.isneginf(log_snr).any()):
        raise ValueError(
            "prediction_type='epsilon' has no weight where SNR = 0 (zero terminal SNR): the input there is the noise, "
            "whose error says nothing about x0. Use 'v_prediction' or 'sample', or a schedule that ends above 0"
        )
    return -PREDEFINED[PLAIN[kind]](log_snr)


def _named(name: Name, known: Mapping[str, Callable[..., Any]], what: str) -> Callable[..., Any]:
    """known[name], a callable as it is, or what "module:function" names; the module may lie in the working folder."""
    if callable(name) or name in known:
        return name if callable(name) else known[name]
    if not re.fullmatch(r"[a-zA-Z_][\w.]*:[a-zA-Z_]\w*", name):
        check_name(what, name, known, more=", or one of your own as 'module:function'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides a package
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ImportError(
            f"{what} {name!r}: {error} (installed modules and the working folder were searched)"
        ) from error
    if not callable(found):
        raise KeyError(f"{what} {name!r}: {module} has no function or class {function}")
    return found


def log_weight(name: Name, schedule: NoiseSchedule, prediction_type: str, **params: float) -> Tensor:
    """Log of a predefined weight on the error of the model's own target, on the formula's scale: (T,) float64.

    name: of PREDEFINED, or such a function of your own, itself or as "module:function".
    """
    function = _named(name, PREDEFINED, "predefined weighting")
    _check_options(str(name), params, function)
    for key, value in params.items() if name in PREDEFINED else ():
        _check_number(f"{key} of {name}", value, low=-math.inf if key in ("bias", "at") else 0.0)
    table = function(schedule.log_snr, **params)
    if not isinstance(table, Tensor) or table.shape != schedule.log_snr.shape or not bool((table < math.inf).all()):
        raise ValueError(
            f"{name} must give a log-weight below inf for each of {len(schedule.log_snr)} log_snr; got {table}"
        )
    return table + log_conversion(schedule.log_snr, prediction_type)


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
    formula: tuple[Name, Mapping[str, Any]] = "const-x0", {}  # what of the weight is exact in log_snr, with parameters
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
        self.register_buffer("log_conversion", log_conversion(log_snr, self.prediction_type), persistent=False)
        if bins is not None:
            self.bins = Bins(bins.edges) if isinstance(bins, Bins) else Bins.uniform(self.num_timesteps, bins)
            if int(self.bins.edges[-1]) != self.num_timesteps:
                raise ValueError(f"{bins} do not end where the schedule does, at {self.num_timesteps} timesteps")
            self.register_buffer("bin_index", self.bins.index(torch.arange(self.num_timesteps)), persistent=False)

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
            raise ValueError(f"{formula} {params} gives weights that are all 0 or not finite: normalize, or use less")
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

    def forward(self, losses: Tensor, timesteps: Tensor, importance: Tensor | None = None) -> Tensor:
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
        if log_snr.shape != losses.shape or not log_snr.is_floating_point() or (is_checked and not bool(good.all())):
            levels = "finite or -inf" if self.prediction_type != "epsilon" else "finite"
            raise ValueError(f"log_snr must be {tuple(losses.shape)} real, {levels}; got {log_snr}")
        level = log_snr.double()
        right = torch.searchsorted(-self.log_snr, -level).clamp(1, self.num_timesteps - 1)
        high, low = self.log_snr[right - 1], self.log_snr[right]
        share = torch.where(level <= low, 1.0, ((high - level) / (high - low)).clamp(min=0))
        known = self._known(self.log_snr)
        factor = self.weights() / known.exp()
        factor = torch.where(known.isneginf(), factor.roll(1), factor)
        weights = (self._known(level).exp() * torch.lerp(factor[right - 1], factor[right], share)).float()
        return self._loss(losses, weights, right - (share < 0.5).long(), importance)

    def _known(self, log_snr: Tensor) -> Tensor:
        """Log of what is exact in log_snr."""
        name, params = self.formula
        function = _named(name, PREDEFINED, "predefined weighting")
        return function(log_snr, **params) - PREDEFINED[PLAIN[self.prediction_type]](log_snr)

    def _check(self, losses: Tensor, importance: Tensor | None) -> None:
        if losses.ndim != 1 or not losses.is_floating_point():
            raise ValueError(
                f"losses must be (B,) real, one mean squared error per sample; got shape {tuple(losses.shape)}, "
                f"{losses.dtype}. Use F.mse_loss(output, target, reduction='none').flatten(1).mean(1)"
            )
        if importance is not None and importance.shape != losses.shape:
            raise ValueError(f"importance must have shape {tuple(losses.shape)}; got {tuple(importance.shape)}")

    def _loss(self, losses: Tensor, weights: Tensor, timesteps: Tensor, importance: Tensor | None) -> Tensor:
        importance = torch.ones_like(losses, dtype=torch.float32) if importance is None else importance
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
        self.gramian_every = _check_number("gramian_every", gramian_every, kinds=int)
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
        self.seed = _check_number("seed", seed, low=-1, kinds=int)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def weights(self) -> Tensor:
        index = torch.arange(self.bins.num_bins, device=self.count.device)
        x = (self.seed * 0x9E3779B1 % 2**32 + self.count * self.bins.num_bins + index) & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # the 32-bit mixer "lowbias32" (Wellons)
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
        self.rule, self.strength = rule, _check_number("strength", strength)
        self.half_life = _check_number("half_life", half_life)
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
        self.moments.mul_(0.5 ** (len(losses) / self.half_life)).index_add_(1, self.bin_index[timesteps], powers)


class Variant(NamedTuple):
    """A member of the Dy-Sigma family: what s, the log variance of a timestep, minimises, and what it does to a weight.

    w is the prior's weight and z the loss that s looks at: w L, or L unless weighted. kappa is the trust in the prior.
    """

    kappa_in: str = ""  # "objective", "boost", or nowhere
    weighted: bool = True
    outside: bool = False
    sign: int = -1
    floor: str | None = None  # the default of floor=
    gramian: bool = False  # whether the Gramian term is added

    def objective(self, s: Tensor, z: Tensor, w: Tensor, kappa: float) -> Tensor:
        """What s minimises the mean of over samples."""
        each = z * torch.exp(-s) + s
        each = each + kappa / 2 * s**2 if self.kappa_in == "objective" else each
        return w * each if self.outside else each

    def boost(self, s: Tensor, kappa: float) -> Tensor:
        """Log of the factor on the prior's weight."""
        return self.sign * s / (1 + kappa) if self.kappa_in == "boost" else self.sign * s

    def fixed_point(self, z: Tensor, kappa: float) -> Tensor:
        """Where constant z leads s, float64."""
        if self.kappa_in != "objective":
            return z.double().log()
        from scipy.special import wrightomega

        # W(e^y) is wrightomega(y); e^(1 / kappa) itself would overflow for small kappa.
        y = z.double().log() + 1 / kappa - math.log(kappa)
        return torch.as_tensor(wrightomega(y.cpu().numpy())).to(z.device) - 1 / kappa


VARIANTS: dict[str, Variant] = {
    "anchored": Variant("objective"),
    "inside": Variant(),
    "outside": Variant(weighted=False, outside=True),
    "tempered": Variant("boost", weighted=False),
    "excess": Variant("objective", floor="online"),
    "tilt": Variant("boost", sign=1),
    "conflict": Variant("objective", gramian=True),
}


def _fourier_features(log_snr: Tensor, size: int = 128) -> Tensor:
    """Cosines of -log_snr / 8 with random frequency and phase, as in EDM2 (Karras et al. 2024): (T, size) float32."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.randn(size, generator=generator, dtype=torch.float64).to(log_snr.device)
    phase = torch.rand(size, generator=generator, dtype=torch.float64).to(log_snr.device)
    # SNR = 0 has no place on this axis; its step takes the features of the step before.
    position = -torch.where(torch.isneginf(log_snr), log_snr.roll(1), log_snr)[:, None] / 8
    # Over the size, so that one step of Adam moves s about as far as it moves a bin.
    return (2**0.5 / size * torch.cos(2 * math.pi * (position * frequency + phase))).float()


class DySigma(Weighting):
    """The Dy-Sigma family: a predefined weighting w (the prior) times what a learned log variance s makes of it.

    A reconstruction from the abstract of Liu, Ye, Liu, Qin (IJCNN 2024). s(0) = 0: training starts at the prior. z is
    w L (outside, tempered: L) over its running mean, so that the scale of the losses, a learning rate in disguise,
    stays out of s; with half_life=None it is w L itself. For given z all but conflict are convex in s.

    anchored  z e^-s + s + kappa/2 s^2: uncertainty weighting with the prior N(0, 1/kappa) on s, so a MAP estimate. At
              1 + kappa s = z e^-s, s* = W((z/kappa) e^(1/kappa)) - 1/kappa with Lambert's W; weight w e^-s*. As
              s* >= -1/kappa, no weight exceeds e^(1/kappa) w. kappa -> inf: the prior; kappa -> 0: inside.
    inside    z e^-s + s: s* = ln z, weight 1 / L up to a factor: the prior cancels, it acts while s is catching up.
              The network then descends sum_t ln L_t, the geometric mean.
    outside   w (z e^-s + s): s* = ln z, weight w / L; the network descends sum_t w_t ln L_t.
    tempered  s as in outside, weight w e^(-s/(1+kappa)) -> w L^(-1/(1+kappa)); the network descends sum_t
              w_t L_t^(kappa/(1+kappa)). kappa -> inf: the prior; kappa -> 0: outside.
    excess    anchored on the learnable loss L - L* in place of L. Near its irreducible floor L* a bin keeps a loss that
              no weight can lower: 1 / L takes it for unsolved, 1 / (L - L*) does not.
    tilt      s as in inside, weight w e^(s/(1+kappa)) -> w (w L)^(1/(1+kappa)): the opposite sign, more where the
              weighted loss is large; with floor=, where more can still be learned. The network descends a power mean
              of the w L, exponent 1 + 1/(1+kappa), on the way from mean to maximum. kappa -> inf: the prior.
    conflict  anchored + K u'Gu with u (K,) the shares of the bins in the total weight, G their Gramian over its mean
              diagonal: the squared length of the step, the objective of MGDA and UGD. Its slope in ln u_k is
              2 K u_k (Gu)_k: a bin that the step hurts, (Gu)_k < 0, gains weight. G = 0 or kappa -> inf: anchored.

    prior, prior_params: as in log_weight. s is linear between the centres of bins, or with fourier=True in the
    features of EDM2; |s| <= clamp. half_life: of the running mean, in images. floor: L* (T,) in the space of the
    losses, or "online": two running means of a bin, of mean age 1/3 and 1/9 of the training, extrapolated as
    L* + c / images. (Another power scales c in all bins alike, and z has no scale.) At least 1 % of a loss counts as
    learnable. The target space of L matters to outside, tempered and conflict alone.
    """

    basis: Tensor
    log_prior: Tensor
    prior: Tensor  # (T,) the w of the objective: mean 1 where z is relative
    running: Tensor  # (2,): running sums of 1 and z
    history: Tensor  # (2, 2, K): for the long and the short memory, running sums of 1 and loss
    images: Tensor

    def __init__(
        self,
        setting: Setting,
        *,
        prior: Name = "min-snr",
        prior_params: Mapping[str, float] | None = None,
        variant: str = "anchored",
        kappa: float = 1.0,
        bins: int | Bins = 20,
        clamp: float = 5.0,
        fourier: bool = False,
        floor: Tensor | Sequence[float] | str | None = None,
        half_life: float | None = 10_000.0,
        gramian_every: int = 50,
    ) -> None:
        super().__init__(setting, bins)
        check_name("dy-sigma variant", variant, VARIANTS)
        self.variant = VARIANTS[variant]
        if kappa != 1 and not self.variant.kappa_in:
            raise ValueError(f"dy-sigma variant {variant!r} has no kappa; got {kappa!r}")
        self.kappa, self.clamp = _check_number("kappa", kappa), _check_number("clamp", clamp)
        self.half_life = half_life if half_life is None else _check_number("half_life", half_life)
        log_prior = self.use_formula(prior, setting.schedule, **(prior_params or {}))
        basis = _fourier_features(setting.schedule.log_snr) if fourier else self.bins.interpolation()
        # In units of the width of its prior, s has curvature 1 at z = 1 for every kappa, and optimizer steps of fixed
        # length do not shake what a strong prior holds still.
        width = (1 + kappa) ** -0.5 if self.variant.kappa_in == "objective" else 1.0
        self.coefficients = nn.Parameter(torch.zeros(basis.shape[1]))
        self.register_buffer("basis", basis * width, persistent=False)
        self.register_buffer("log_prior", log_prior.float(), persistent=False)
        prior_weights = log_prior.exp() if half_life is None else log_prior.softmax(0) * self.num_timesteps
        self.register_buffer("prior", prior_weights.float(), persistent=False)
        if half_life is not None:
            self.register_buffer("running", torch.zeros(2))
        self._set_floor(self.variant.floor if floor is None else floor)
        if self.variant.gramian:
            self._expect_gramian(gramian_every)

    def _set_floor(self, floor: Any) -> None:
        self.floor = floor if floor is None or isinstance(floor, str) else "given"
        if self.floor is not None:
            self.register_buffer("images", torch.zeros((), dtype=torch.int64))
            self.register_buffer("history", torch.zeros(2, 2, self.bins.num_bins))
        if self.floor == "given":
            table = torch.as_tensor(floor, dtype=torch.float32, device="cpu")
            if table.shape != self.bin_index.shape or not bool(torch.isfinite(table).all()):
                raise ValueError(f"floor must be finite, ({self.num_timesteps},); got shape {tuple(table.shape)}")
            self.register_buffer("floor_means", self.bins.mean(table, torch.arange(len(table)))[0], persistent=False)
        elif self.floor not in (None, "online"):
            raise ValueError(f"floor must be None, 'online' or the floor of each timestep; got {floor!r}")

    def _unbounded(self) -> Tensor:
        return (self.basis * self.coefficients).sum(1)  # a matrix product would be rounded by autocast

    def _log_weights(self, s: Tensor) -> Tensor:
        return self.log_prior + self.variant.boost(s, self.kappa)

    def log_variances(self) -> Tensor:
        """s: (T,) float32, with gradient to the parameters."""
        return self._unbounded().clamp(-self.clamp, self.clamp)

    def fixed_point(self, z: Tensor) -> Tensor:
        """The s, float64, to which a constant z >= 0 leads, clamp included; for conflict, while G = 0."""
        return self.variant.fixed_point(z, self.kappa).clamp(-self.clamp, self.clamp)

    @torch.no_grad()
    def weights(self) -> Tensor:
        return self.from_log(self._log_weights(self.log_variances()))

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
        prior = self.prior[timesteps]
        z = prior * losses if self.variant.weighted else losses
        if self.floor is not None:
            z = z * self._learnable_share(losses, timesteps, importance)
        if self.half_life is not None:
            self.running.mul_(0.5 ** (len(z) / self.half_life))
            self.running.add_(torch.stack([importance.sum(), (importance * z).sum()]))
            z = z / (self.running[1] / self.running[0]).clamp(min=1e-30)
        unbounded = self._unbounded()
        s = unbounded.clamp(-self.clamp, self.clamp)
        each = self.variant.objective(s[timesteps], z, prior, self.kappa)
        # The clamp stops the gradient both ways; the square brings s back once it is outside.
        each = each + (unbounded - s.detach())[timesteps] ** 2 / 2
        objective = (importance * each).mean()
        if self.variant.gramian:
            share = self._log_weights(s).softmax(0)
            shares = share.new_zeros(self.bins.num_bins).index_add(0, self.bin_index, share)
            objective = objective + self.bins.num_bins * _quadratic(self.gramian, shares)
        return objective

    def _learnable_share(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
        index = self.bin_index[timesteps]
        self.images += len(losses)
        # A mean over the past with density images^(p-1) remembers a fixed fraction of the run and reads c / images as
        # p / (p-1) times its present value: 2 for p = 2, 8/7 for p = 8, hence the 8/7 / (2 - 8/7) below.
        keep = 1 - len(losses) / self.images.float()
        keep = torch.stack([keep, keep**7])[:, None, None]
        self.history.mul_(keep).index_add_(2, index, torch.stack([importance, importance * losses]).expand(2, 2, -1))
        long, short = _ratio(self.history[:, 1], self.history[:, 0], 1.0)
        learnable = 4 / 3 * (long - short) if self.floor == "online" else short - self.floor_means
        return (learnable / short.clamp(min=1e-30)).clamp(0.01, 1)[index]


class _Uncertainty(DySigma):
    """Uncertainty weighting (Kendall, Gal, Cipolla 2018): "inside" with weight 1 in the model's own target space.

    s minimises L e^-s + s: e^s* = L, weight 1 / L, the same in every target space; the start is that of the own space.
    White Gaussian data of variance v have L = 1 / (SNR + 1/v) on x0 at best, so there the weight becomes that of EDM.
    Without normalize, weights grow as losses fall, which acts like a learning rate.
    """

    def __init__(self, setting: Setting, *, bins: int | Bins = 20, fourier: bool = False, clamp: float = 10.0) -> None:
        prior = PLAIN[canonical_prediction_type(setting.prediction_type)]
        super().__init__(
            setting, prior=prior, variant="inside", bins=bins, fourier=fourier, clamp=clamp, half_life=None
        )


class _OfGramian(Weighting):
    """Weights from the shares u_k of the bins, each spread evenly over its timesteps: w_t = u_k T / n_k."""

    needs_gramian = True
    spread: Tensor

    def __init__(self, setting: Setting, bins: int | Bins, gramian_every: int) -> None:
        super().__init__(setting, bins)
        self._expect_gramian(gramian_every)
        self.register_buffer("spread", self.num_timesteps / self.bins.counts.float(), persistent=False)

    def _shares(self) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def weights(self) -> Tensor:
        return self.scaled((self._shares() * self.spread)[self.bin_index])


class _UGD(_OfGramian):
    """Min-SNR's unconstrained gradient descent (Hang et al. 2023): u = softmax(beta), beta descends u'Gu + lambda u'u.

    Every call descends the last Gramian seen, over its mean diagonal, with the optimizer of parameters(). lambda, the
    regularization, keeps every bin in; at 0 the fixed point is the min-norm point, that of MGDA.
    """

    def __init__(
        self, setting: Setting, *, bins: int | Bins = 10, gramian_every: int = 50, regularization: float = 0.1
    ) -> None:
        super().__init__(setting, bins, gramian_every)
        self.regularization = _check_number("regularization", regularization, low=-1e-9)
        self.beta = nn.Parameter(torch.zeros(self.bins.num_bins))

    def _shares(self) -> Tensor:
        return self.beta.softmax(0)

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
        u = self._shares()
        return _quadratic(self.gramian, u) + self.regularization * (u * u).sum()


# Rule: class of torchjd.aggregation and its arguments. Fairness of order 1 solves G a = 1 / a, the bargaining solution
# of Nash-MTL (Navon et al. 2022), whose own class there asks for the whole Jacobian.
GRAMIAN_RULES: dict[str, tuple[str, dict[str, float]]] = {
    "mgda": ("MGDAWeighting", {}),
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "pcgrad": ("PCGradWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.5}),
    "imtl-g": ("IMTLGWeighting", {}),
    "nash-mtl": ("FairGradWeighting", {"alpha": 1.0}),
    "fairgrad": ("FairGradWeighting", {"alpha": 2.0}),
    "aligned-mtl": ("AlignedMTLWeighting", {}),
}


class _GramianRule(_OfGramian):
    """Shares of the bins by a rule of TorchJD, equal before the first Gramian; negative ones of some rules are kept."""

    shares: Tensor

    def __init__(
        self, setting: Setting, *, rule: str = "upgrad", bins: int | Bins = 10, gramian_every: int = 50
    ) -> None:
        super().__init__(setting, bins, gramian_every)
        check_name("gramian rule", rule, GRAMIAN_RULES)
        name, options = GRAMIAN_RULES[rule]
        try:
            from torchjd import aggregation

            self.rule = getattr(aggregation, name)(**options)
        except ImportError as error:
            raise ImportError(f"weighting 'gramian' with rule={rule!r}: {error}. pip install 'dysigma[moo]'") from error
        self.register_buffer("shares", torch.full((self.bins.num_bins,), 1 / self.bins.num_bins))

    def _shares(self) -> Tensor:
        return self.shares

    def _observe(self, gramian: Tensor) -> None:
        super()._observe(gramian)
        # Some rules draw a random order; that draw belongs to the state, not to the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.gramians_seen))
            shares = self.rule(gramian)
        if not bool(torch.isfinite(shares).all()) or not shares.sum() > 0:
            raise ValueError(f"{self.rule} found no usable shares, {shares.tolist()}, in {gramian.tolist()}")
        self.shares.copy_(shares)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    **{name: partial(_Fixed, name) for name in PREDEFINED},
    "uncertainty": _Uncertainty,
    "ugd": _UGD,
    "loss-balance": partial(_Adaptive, _loss_balance),
    "variance-aware": partial(_Adaptive, _variance_aware),
    "random": _Random,
    "dy-sigma": DySigma,
    "gramian": _GramianRule,
}


def make_weighting(
    name: Name, schedule: NoiseSchedule, prediction_type: str = "epsilon", normalize: bool = True, **params: Any
) -> Weighting:
    """The named weighting for losses in the target space of prediction_type, on the device of the schedule.

    name: of WEIGHTINGS; or your own, as an object or "module:function" (imported, so run): a subclass of Weighting, a
    partial of one, or a function of log_snr that gives the log-weight on the x0 error, like those of PREDEFINED.
    normalize=True: weights of mean 1 over timesteps; False: the formula's own scale. params: those of the weighting, by
    name. Raises KeyError for an unknown name, ImportError for a module that does not load, ValueError for an unknown or
    bad parameter, epsilon where SNR = 0, a target that the schedule does not have, and weights all 0 or not finite.
    """
    found = _named(name, WEIGHTINGS, "weighting")
    if not hasattr(schedule, "log_snr"):
        kind = type(schedule).__name__
        raise TypeError(f"schedule must be a NoiseSchedule; got {kind}: use NoiseSchedule.from_diffusers(scheduler)")
    _check_options(str(name), params, PREDEFINED.get(str(name), found))
    made = getattr(found, "func", found)  # of a partial
    factory = found if isinstance(made, type) and issubclass(made, Weighting) else partial(_Fixed, name)
    return factory(Setting(schedule, prediction_type, normalize), **params).to(schedule.log_snr.device)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / (T sum w^2) in (0, 1], the share of timesteps that does the work: weights (T,) to () float64."""
    w = weights.double()
    return w.sum() ** 2 / (len(w) * (w * w).sum())


def share_changed(weights: Tensor, reference: Tensor, tolerance: float = 0.01) -> Tensor:
    """Share of timesteps whose weight relative to reference (T,) is off the median by more than tolerance; () float64.

    A factor common to all is no change.
    """
    ratio = weights.double() / reference.double()
    return ((ratio / ratio.nanmedian() - 1).abs() > tolerance).double().mean()


def compare_weightings(
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    names: Sequence[str] | Mapping[str, Weighting] = tuple(PREDEFINED),
) -> Any:
    """Weights in one unit, on the error of prediction_type with mean 1 over timesteps: a pandas DataFrame (T, names).

    names: names of WEIGHTINGS, made with their defaults, or {label: weighting}; those may be for any prediction type
    and are read as they are now. For a summary see effective_sample_size and share_changed.
    """
    from pandas import DataFrame

    if not isinstance(names, Mapping):
        names = {name: make_weighting(name, schedule, prediction_type) for name in names}
    unit = log_conversion(schedule.log_snr, prediction_type)
    logs = {label: each.weights().double().log() - each.log_conversion + unit for label, each in names.items()}
    columns = {label: (log.softmax(0) * len(log)).cpu().numpy() for label, log in logs.items()}
    return DataFrame(columns).rename_axis("timestep")


def fluctuation(trajectory: Tensor, detrend: bool = False) -> Tensor:
    """Coefficient of variation of weights over training: (steps, T) or (steps, K) to (T,) or (K,), float64.

    Standard deviation over steps, divided by the mean. detrend=True counts only the changes from one row to the next
    (root mean square over sqrt 2: the same for independent values), so that a weight that drifts scores near 0.
    """
    w = torch.as_tensor(trajectory, dtype=torch.float64)
    if w.ndim != 2 or len(w) < 2:
        raise ValueError(f"trajectory must be (steps, T) with at least two steps; got shape {tuple(w.shape)}")
    spread = (w.diff(dim=0) ** 2).mean(0).div(2).sqrt() if detrend else w.std(0)
    return spread / w.mean(0)
