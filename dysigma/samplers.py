"""Timestep samplers: uniform numbers u in, timesteps and importance 1 / (T p_t) out.

A sampler inverts the cumulative sums of its probabilities p_t, so that all samplers given the same u
share their random numbers. It is no weighting. With importance, the expected loss is that of uniform
sampling and only its variance differs. Without, the objective is weighted by p_t too. `corrected` says
which one the method means, and effective_weights what a sampler and a weighting mean together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from .bins import Bins
from .checks import check_name, check_timesteps, keyword_parameters
from .devices import KeepsPrecision
from .parallel import over_ranks
from .schedule import NoiseSchedule, check_schedule


def _number(name: str, value: SupportsFloat, low: float = 0.0, high: float = math.inf) -> float:
    """value as a float, if it is one in (low, high]; numbers of NumPy and torch are numbers too."""
    is_number = isinstance(value, SupportsFloat) and not isinstance(value, bool | str)
    number = float(value) if is_number else math.nan
    if math.isinf(number) or not low < number <= high:
        raise ValueError(f"{name} must be a finite number in ({low:g}, {high:g}]; got {value!r}")
    return number


# ---------------------------------------------------------------- densities


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.special.erfc(-x / math.sqrt(2)) / 2  # torch.special.ndtr is 0 below -9


def _laplace_cdf(x: Tensor) -> Tensor:
    below = x.clamp(max=0).exp() / 2
    above = 1 - (-x.clamp(min=0)).exp() / 2
    return torch.where(x < 0, below, above)


def _mass(edges: Tensor, cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """Mass of a symmetric distribution between rising edges (T+1,).

    Each difference is taken in the tail where the numbers are small, and so keep their digits.
    """
    low = edges[:-1]
    high = edges[1:]
    return torch.where(low + high > 0, cdf(-low) - cdf(-high), cdf(high) - cdf(low))


def _noise_edges(log_snr: Tensor) -> Tensor:
    """-log_snr midway between timesteps, open at both ends (T+1,).

    A last step at SNR = 0 gets what lies beyond half a step from its neighbour.
    """
    finite = -log_snr[torch.isfinite(log_snr)]
    inner = (finite[1:] + finite[:-1]) / 2
    beyond = (1.5 * finite[-1:] - finite[-2:-1] / 2)[: len(log_snr) - len(finite)]
    end = inner.new_tensor([math.inf])
    return torch.cat([-end, inner, beyond, end])


def _time_edges(log_snr: Tensor, shift: float) -> Tensor:
    """t / T at the edges of the timesteps (T+1,), before the shift of Esser et al. 2024 was applied."""
    shift = _number("shift", shift)
    count = len(log_snr) + 1
    edges = torch.linspace(0, 1, count, dtype=torch.float64, device=log_snr.device)
    return edges / (shift - (shift - 1) * edges)


def uniform_density(log_snr: Tensor) -> Tensor:
    """Every timestep alike."""
    return torch.ones_like(log_snr)


def logit_normal_density(
    log_snr: Tensor, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """logit of t / T normal, for the time of a rectified flow (Esser et al. 2024, equation 19).

    t / T grows with the noise. diffusers counts from the noisy end, so its logit_mean is minus ours.
    shift: draws are moved to shift s / (1 + (shift - 1) s), which adds ln(shift) to the mean. On a
    schedule that has the shift already, as SD3 has it, leave it at 1.
    """
    edges = _time_edges(log_snr, shift).logit()
    return _mass((edges - mean) / _number("std", std), _normal_cdf)


def mode_density(log_snr: Tensor, *, scale: float = 1.29, shift: float = 1.0) -> Tensor:
    """Mode sampling with heavy tails (Esser et al. 2024, equation 20), "mode" of diffusers.

    t / T = 1 - u - scale (cos(pi u / 2)^2 - 1 + u) with u uniform; 0 is uniform. scale lies in
    (-1, 2 / (pi - 2)), where that falls in u.
    """
    scale = _number("scale", scale, low=-1.0, high=2 / (math.pi - 2) - 1e-6)
    edges = _time_edges(log_snr, shift)
    low = torch.zeros_like(edges)
    high = torch.ones_like(edges)
    for _ in range(60):  # bisection for u(t), which has no closed form; by symmetry u -> 1 - u
        middle = (low + high) / 2
        t = middle + scale * (middle - torch.sin(middle * math.pi / 2) ** 2)
        low = torch.where(t < edges, middle, low)
        high = torch.where(t < edges, high, middle)
    return ((low + high) / 2).diff()


def cosmap_density(log_snr: Tensor, *, shift: float = 1.0) -> Tensor:
    """The density 2 / (pi (1 - 2 s + 2 s^2)) of s = t / T (Esser et al. 2024, equation 21).

    On a rectified flow it is what the variance-preserving cosine schedule draws.
    """
    s = _time_edges(log_snr, shift)
    return (torch.atan2(s, 1 - s) * 2 / math.pi).diff()


def beta_density(
    log_snr: Tensor, *, alpha: float = 2.0, beta: float = 2.0, shift: float = 1.0
) -> Tensor:
    """t / T of the beta distribution, whose density is t^(alpha - 1) (1 - t)^(beta - 1)."""
    from scipy.stats import beta as distribution

    shape = distribution(_number("alpha", alpha), _number("beta", beta))
    edges = _time_edges(log_snr, shift).cpu().numpy()
    below = torch.from_numpy(shape.cdf(edges)).diff()
    above = -torch.from_numpy(shape.sf(edges)).diff()
    from_below = torch.from_numpy(edges[1:] < shape.median())
    return torch.where(from_below, below, above).to(log_snr.device)


def lognormal_density(log_snr: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln sigma normal, for sigma^2 = 1 / SNR on the levels of the schedule (Karras et al. 2022)."""
    return _mass((_noise_edges(log_snr) / 2 - mean) / _number("std", std), _normal_cdf)


def laplace_density(log_snr: Tensor, *, mean: float = 0.0, scale: float = 0.5) -> Tensor:
    """log SNR Laplace around mean, on the levels of the schedule (Hang, Gu 2024)."""
    return _mass((_noise_edges(log_snr) + mean) / _number("scale", scale), _laplace_cdf)


# What may be drawn without a weighting, as masses (T,) of log_snr (T,); used uncorrected.
DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_density,
    "logit-normal": logit_normal_density,
    "lognormal": lognormal_density,
    "laplace": laplace_density,
    "mode": mode_density,
    "cosmap": cosmap_density,
    "beta": beta_density,
}


def floored(mass: Tensor, uniform: float) -> Tensor:
    """Probabilities (T,) of masses (T,), of which a share `uniform` is spread evenly.

    No importance then exceeds 1 / uniform.
    """
    evenly = 1 / len(mass)
    return (1 - uniform) * mass / mass.sum().clamp(min=1e-300) + uniform * evenly


# ---------------------------------------------------------------- samplers


class TimestepSampler(KeepsPrecision):
    """sampler(u) draws timesteps by given masses.

    masses: (T,), positive; their sum does not matter. stratified: one timestep in each of B equal parts
    of the distribution (Kingma et al. 2021); u[0] shifts the grid, modulo 1. Each timestep alone has
    the same distribution, and the mean over a batch varies less.
    corrected: whether the method means the importance to be used.
    observes: what `update` takes in: "nothing", "losses", or "gradient-norms".

    Raises ValueError for masses that leave a timestep without probability.
    """

    observes = "nothing"
    table: Tensor  # (T,) float64

    def __init__(
        self, masses: Tensor, *, stratified: bool = False, corrected: bool = False
    ) -> None:
        super().__init__()
        masses = masses.detach().double()
        good = masses.isfinite() & (masses > 0)
        if not bool(good.all()):
            raise ValueError(
                f"{int((~good).sum())} timesteps get no probability; widen the density"
            )
        self.num_timesteps = len(masses)
        self.stratified = bool(stratified)
        self.corrected = corrected
        self.register_buffer("table", masses / masses.sum(), persistent=False)

    def probabilities(self) -> Tensor:
        """p_t now: (T,) float64, positive, summing to 1."""
        return self.table.clone()

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(timesteps (B,) int64, importance (B,) float32 = 1 / (T p_t)) of u (B,) in [0, 1).

        Timesteps rise with u, unless stratified. Raises ValueError for u that is not (B,) real.
        """
        if u.ndim != 1 or not u.is_floating_point():
            raise ValueError(
                f"u must be (B,) real in [0, 1); got shape {tuple(u.shape)}, {u.dtype}"
            )
        u = u.double()
        if self.stratified:
            u = (u[:1] + torch.arange(len(u), device=u.device) / len(u)) % 1.0
        p = self.probabilities()
        timesteps = torch.searchsorted(p.cumsum(0), u, right=True)
        timesteps = timesteps.clamp(max=self.num_timesteps - 1)  # the last sum may round to below u
        importance = 1 / (self.num_timesteps * p[timesteps])
        return timesteps, importance.float()

    def update(self, values: Tensor, timesteps: Tensor) -> None:
        """Take in what the sampler observes, (B,) at timesteps (B,), if it adapts."""


def proposed_density(weighting: nn.Module | Tensor | None) -> Tensor | None:
    """Masses (T,) by which a weighting wants timesteps drawn now; None if it leaves that to others."""
    propose = getattr(weighting, "density", None)
    return None if propose is None else propose()


class WeightingSampler(TimestepSampler):
    """p_t as a weighting proposes it, corrected: its density() is read at each draw.

    The weighting learns, and holds what is learned; this sampler has no state. uniform: the share
    that stays uniform, so that no importance exceeds 1 / uniform.
    Raises ValueError for a weighting that proposes no density.
    """

    def __init__(
        self, weighting: nn.Module, *, uniform: float = 0.1, stratified: bool = False
    ) -> None:
        density = proposed_density(weighting)
        if density is None:
            raise ValueError(
                f"{weighting!r} proposes no density of timesteps; that is done by "
                "make_weighting('dy-sigma', ..., variant='density')"
            )
        uniform = _number("uniform", uniform, high=1.0)
        super().__init__(floored(density, uniform), stratified=stratified, corrected=True)
        self.uniform = uniform
        if weighting.observes == "gradient-norms":
            self.observes = "gradient-norms"
        # In a list, because a module that is an attribute would be saved a second time with this one.
        self._weighting = [weighting]

    def probabilities(self) -> Tensor:
        """p_t now: (T,) float64, positive, summing to 1."""
        density = proposed_density(self._weighting[0])
        assert density is not None  # __init__ has seen that there is one
        return floored(density, self.uniform)


class AdaptiveSampler(TimestepSampler):
    """p_t as the root of a running mean, with which the corrected mean varies least.

    For a batch mean of importance g with p_t, the variance is least at p_t as sqrt(E|g|^2).
    observes="losses" takes losses for g (Nichol, Dhariwal 2021, who keep the last 10 losses of each
    timestep). observes="gradient-norms" takes the squared norms of gradients themselves; those of the
    network's output layer alone are a near-perfect stand-in for all. Give either one of what is
    minimised: weighted, if training is.

    bins: running means are kept in so many bins of timesteps. half_life: of those means, in images.
    warmup: uniform until each bin has seen so many. uniform: the share that stays uniform, so that no
    importance exceeds 1 / uniform.

    Left out are values that are not finite, squares beyond 1e30, and squared norms below 0. Under DDP
    every rank must bring the same B.
    """

    moments: Tensor  # (3, K): how many were seen, and running sums of 1 and of what is rooted
    bin_index: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        observes: str,
        bins: int = 100,
        warmup: int = 10,
        uniform: float,
        half_life: float = 5e4,
        stratified: bool = False,
    ) -> None:
        super().__init__(uniform_density(schedule.log_snr), stratified=stratified, corrected=True)
        self.observes = observes
        self.bins = Bins.uniform(self.num_timesteps, bins)
        self.warmup = _number("warmup", warmup, low=-1.0)
        self.uniform = _number("uniform", uniform, high=1.0)
        self.half_life = _number("half_life", half_life)
        index = self.bins.index(torch.arange(self.num_timesteps))
        self.register_buffer("moments", torch.zeros(3, self.bins.num_bins))
        self.register_buffer("bin_index", index, persistent=False)

    def probabilities(self) -> Tensor:
        """p_t now: (T,) float64, positive, summing to 1."""
        seen, count, total = self.moments.double()
        root = (total / count.clamp(min=1e-12)).sqrt()[self.bin_index]
        is_ready = (seen >= self.warmup).all() & (root.sum() > 0)
        return torch.where(is_ready, floored(root, self.uniform), self.table)

    @torch.no_grad()
    def update(self, values: Tensor, timesteps: Tensor) -> None:
        """Take in losses or squared gradient norms (B,) at timesteps (B,), in train() mode alone."""
        check_timesteps(timesteps, self.num_timesteps, len(values))
        if not self.training:
            return
        values, steps = over_ranks(values, timesteps)
        squares = values**2 if self.observes == "losses" else values
        # Without a branch, which would wait for the device. Beyond 1e30 a sum of them could leave float32.
        is_good = (squares >= 0) & (squares < 1e30)
        squares = torch.where(is_good, squares, 0.0)
        one = is_good.to(squares.dtype)
        self.moments[1:] *= 0.5 ** (len(values) / self.half_life)
        added = torch.stack([one, one, squares])
        self.moments.index_add_(1, self.bin_index[steps.long()], added)


# What a sampler may be made from: a weighting, its weights (T,), or neither.
Weights = nn.Module | Tensor | None


def _of_density(
    schedule: NoiseSchedule, *, density: str, stratified: bool = False, **params: Any
) -> TimestepSampler:
    masses = DENSITIES[density](schedule.log_snr, **params)
    return TimestepSampler(masses, stratified=stratified)


def _stratified(schedule: NoiseSchedule) -> TimestepSampler:
    """Uniform and stratified."""
    return TimestepSampler(uniform_density(schedule.log_snr), stratified=True)


def _of_weight(
    schedule: NoiseSchedule,
    *,
    weighting: Weights,
    uniform: float = 0.1,
    stratified: bool = False,
    power: float,
) -> TimestepSampler:
    """p_t as a power of the weights of a weighting, as they are now, corrected."""
    if weighting is None:
        raise ValueError(
            "this sampler draws by the weights of a weighting: give make_sampler(..., weighting=)"
        )
    uniform = _number("uniform", uniform, high=1.0)
    weights = _weights_of(weighting, schedule.num_timesteps).to(schedule.log_snr.device)
    masses = floored(weights**power, uniform)
    return TimestepSampler(masses, stratified=stratified, corrected=True)


def _of_proposal(
    schedule: NoiseSchedule,
    *,
    weighting: Weights,
    uniform: float = 0.1,
    stratified: bool = False,
) -> TimestepSampler:
    """p_t as the weighting proposes it at each draw, corrected."""
    if not isinstance(weighting, nn.Module):
        raise ValueError(
            "this sampler draws as a weighting proposes while it trains: make_sampler(..., weighting=) "
            "needs make_weighting('dy-sigma', ..., variant='density'), and a table of weights is not enough"
        )
    return WeightingSampler(weighting, uniform=uniform, stratified=stratified)


# Name: what makes the sampler, called as make(schedule, **parameters), and with weighting= where it
# takes that.
TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    **{name: partial(_of_density, density=name) for name in DENSITIES},
    "stratified": _stratified,
    # The optimum where every timestep's gradient has the same norm, and a baseline that learns nothing.
    "weight": partial(_of_weight, power=1.0),
    "sqrt-weight": partial(_of_weight, power=0.5),
    "weighting": _of_proposal,
    # Nichol and Dhariwal leave 0.1 % uniform, which bounds nothing; records rest on it.
    "loss-second-moment": partial(AdaptiveSampler, observes="losses", uniform=0.001),
    "gradient-norm": partial(AdaptiveSampler, observes="gradient-norms", uniform=0.1),
}


def _parameter_names(name: str) -> list[str]:
    """What a user may give by name: neither the weighting nor what the sampler's name decides."""
    make = TIMESTEP_SAMPLERS[name]
    decided = {"weighting", *getattr(make, "keywords", ())}
    decided.discard("uniform")  # of which the name gives a default
    names = [*keyword_parameters(DENSITIES[name])] if name in DENSITIES else []
    names += keyword_parameters(make)
    return [each for each in names if each not in decided]


def make_sampler(
    name: str,
    schedule: NoiseSchedule,
    *,
    weighting: nn.Module | Tensor | None = None,
    **params: Any,
) -> TimestepSampler:
    """The named timestep sampler for a schedule, on its device.

    weighting: a weighting, or its weights (T,), which "weight" and "sqrt-weight" need. "weighting" needs
    one that proposes a density, and such a weighting takes no other sampler, so that nothing is
    counted twice. Other samplers ignore it.
    stratified=True, which every sampler but "stratified" has, draws one timestep in each of B equal
    parts of the distribution.
    Raises KeyError for an unknown name, ValueError for an unknown or bad parameter.

    >>> import torch
    >>> sampler = make_sampler("logit-normal", NoiseSchedule.flow(1000), mean=-1.0)
    >>> timesteps, importance = sampler(torch.tensor([0.1, 0.5, 0.9]))
    >>> timesteps
    tensor([ 92, 268, 569])
    """
    check_name("timestep sampler", name, TIMESTEP_SAMPLERS)
    check_schedule(schedule)
    known = _parameter_names(name)
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(f"sampler {name!r} has no parameter {unknown}; it has {known}")
    if name != "weighting" and proposed_density(weighting) is not None:
        raise ValueError(
            f"{weighting!r} proposes the density of timesteps itself: use the sampler 'weighting' "
            f"with it, not {name!r}"
        )
    if weighting is not None:
        _weights_of(weighting, schedule.num_timesteps)
    make = TIMESTEP_SAMPLERS[name]
    if "weighting" in keyword_parameters(make):
        make = partial(make, weighting=weighting)
    try:
        sampler = make(schedule, **params)
    except ValueError as error:
        raise ValueError(f"sampler {name!r} {params}: {error}") from None
    return sampler.to(schedule.log_snr.device)


def _weights_of(weighting: nn.Module | Tensor, num_timesteps: int) -> Tensor:
    table = weighting if isinstance(weighting, Tensor) else weighting.weights()  # type: ignore[operator]
    good = table.isfinite() & (table >= 0)
    if table.shape != (num_timesteps,) or not bool(good.all()) or not bool(table.sum() > 0):
        raise ValueError(
            f"weights must be ({num_timesteps},), finite, >= 0 and not all 0; got {tuple(table.shape)}"
        )
    return table.detach().double()


# ---------------------------------------------------------------- density times weight


def effective_weights(
    sampler: TimestepSampler, weighting: nn.Module | Tensor | None = None
) -> Tensor:
    """What training with a sampler and a weighting minimises: (T,) float64 weights of mean 1.

    They are the weights that do the same under uniform sampling: w_t where the sampler is corrected,
    p_t w_t where it is not. weighting: a weighting or its weights (T,); by default all ones.

    So an uncorrected sampler *is* a weighting. With s = t / T of a rectified flow, beta(a, b) draws as
    the weight s^(a-1) (1 - s)^(b-1) on the velocity's error weighs; as 1 / s^2 is the velocity's error
    in units of that of x0, it is on the error of x0
    ln w = (b - 1) log_snr / 2 - (a + b - 4) ln(1 + e^(log_snr / 2)).

    >>> flow = NoiseSchedule.flow(4)
    >>> effective_weights(make_sampler("beta", flow, alpha=2, beta=1))
    tensor([0.2500, 0.7500, 1.2500, 1.7500], dtype=torch.float64)
    """
    p = sampler.probabilities()
    if weighting is None:
        weights = torch.ones_like(p)
    else:
        weights = _weights_of(weighting, len(p)).to(p.device)
    product = weights if sampler.corrected else weights * p
    return product / product.mean()
