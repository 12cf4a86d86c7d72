"""The Dy-Sigma family and uncertainty weighting: weights learned through a log variance per
timestep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..checks import check_name, check_number
from ..schedule import canonical_prediction_type
from .base import Setting, Weighting, quadratic, ratio
from .formulas import PLAIN, Name

# Beyond this kappa a weight is its prior's to the last digit of float32, which has no room for much
# larger numbers.
LARGEST_KAPPA = 1e30
# At least this share of a loss counts as learnable.
SMALLEST_SHARE = 0.01


class Variant(NamedTuple):
    """A member of the Dy-Sigma family: what s, the log variance of a timestep, minimises, and what
    it does to a weight.

    w is the prior's weight and z the loss that s looks at: w L, or L unless weighted. kappa is the
    trust in the prior.
    """

    kappa_in: str = ""  # "objective", "boost", or nowhere
    weighted: bool = True
    outside: bool = False
    sign: int = -1
    floor: str | None = None  # the default of floor=
    gramian: bool = False  # whether the Gramian term is added
    density: bool = False  # whether s moves the density of timesteps in place of their weights

    def objective(self, s: Tensor, z: Tensor, w: Tensor, kappa: float) -> Tensor:
        """What s minimises the mean of over samples."""
        each = z * torch.exp(-s) + s
        if self.kappa_in == "objective":
            each = each + kappa / 2 * s**2
        return w * each if self.outside else each

    def boost(self, s: Tensor, kappa: float) -> Tensor:
        """Log of the factor on the prior's weight."""
        return self.sign * s / (1 + kappa) if self.kappa_in == "boost" else self.sign * s

    def fixed_point(self, z: Tensor, kappa: float) -> Tensor:
        """Where constant z leads s, float64: ln z, or with kappa in the objective W(z e^(1/kappa) /
        kappa) - 1/kappa."""
        log_z = z.double().log()
        if self.kappa_in != "objective" or kappa == 0:
            return log_z
        from scipy.special import wrightomega

        # W(e^y) is wrightomega(y); e^(1 / kappa) itself would overflow for small kappa.
        y = log_z + 1 / kappa - math.log(kappa)
        return torch.as_tensor(wrightomega(y.cpu().numpy())).to(z.device) - 1 / kappa


VARIANTS: dict[str, Variant] = {
    "anchored": Variant("objective"),
    "inside": Variant(),
    "outside": Variant(weighted=False, outside=True),
    "tempered": Variant("boost", weighted=False),
    "excess": Variant("objective", floor="online"),
    "tilt": Variant("boost", sign=1),
    "conflict": Variant("objective", gramian=True),
    "density": Variant("objective", density=True),
}
# What the variant "density" may learn from.
OBSERVED = ("gradient-norms", "losses")


def fourier_features(log_snr: Tensor, size: int = 128) -> Tensor:
    """Cosines of -log_snr / 8 with random frequency and phase, as in EDM2 (Karras et al. 2024): (T,
    size) float32.

    They are divided by size, so that one step of Adam moves s about as far as it moves a bin.
    """
    generator = torch.Generator().manual_seed(0)
    frequency = torch.randn(size, generator=generator, dtype=torch.float64).to(log_snr.device)
    phase = torch.rand(size, generator=generator, dtype=torch.float64).to(log_snr.device)
    # SNR = 0 has no place on this axis; its step takes the features of the step before.
    level = torch.where(torch.isneginf(log_snr), log_snr.roll(1), log_snr)
    position = -level[:, None] / 8
    waves = torch.cos(2 * math.pi * (position * frequency + phase))
    return (2**0.5 / size * waves).float()


class DySigma(Weighting):
    """The Dy-Sigma family: a predefined weighting w (the prior) times what a learned log variance s
    makes of it.

    A reconstruction from the abstract of Liu, Ye, Liu, Qin (IJCNN 2024). s(0) = 0: training starts
    at the prior. z is w L (outside, tempered: L) over its running mean, so that the scale of the
    losses, a learning rate in disguise, stays out of s; with half_life=None it is w L itself. For
    given z all but conflict are convex in s.

    anchored  z e^-s + s + kappa/2 s^2: uncertainty weighting with a quadratic penalty on s. The
              likelihood is (z e^-s + s)/2, so for one observation the penalty is that of the prior
              N(0, 2/kappa) on s. It stands beside a mean over samples and does not fade as they
              accumulate: a regulariser. At 1 + kappa s = z e^-s, s* = W((z/kappa) e^(1/kappa)) -
              1/kappa with Lambert's W; weight w e^-s*. As s* >= -1/kappa, with normalize=False
              no weight exceeds e^(1/kappa) w; weights of mean 1 may, because their mean falls
              when others are lowered. kappa -> inf: the prior; kappa = 0: inside.
    inside    z e^-s + s: s* = ln z, weight 1 / L up to a factor: the prior cancels, it acts while s
              is catching up. The network then descends sum_t ln L_t, the geometric mean.
    outside   w (z e^-s + s): s* = ln z, weight w / L; the network descends sum_t w_t ln L_t.
    tempered  s as in outside, weight w e^(-s/(1+kappa)) -> w L^(-1/(1+kappa)); the network descends
              sum_t w_t L_t^(kappa/(1+kappa)). kappa -> inf: the prior; kappa = 0: outside.
    excess    anchored on the learnable loss L - L* in place of L. Near its irreducible floor L* a
              bin keeps a loss that no weight can lower: 1 / L takes it for unsolved, 1 / (L - L*)
              does not.
    tilt      s as in inside, weight w e^(s/(1+kappa)) -> w (w L)^(1/(1+kappa)): the opposite sign,
              more where the weighted loss is large; with floor=, where more can still be learned.
              The network descends a power mean of the w L, exponent 1 + 1/(1+kappa), on the way
              from mean to maximum. kappa -> inf: the prior.
    conflict  anchored + K u'Gu with u (K,) the shares of the bins in the total weight, G their
              Gramian over its mean diagonal: the squared length of the step, the objective of MGDA
              and UGD. Its slope in ln u_k is 2 K u_k (Gu)_k: a bin that the step hurts, (Gu)_k < 0,
              gains weight. G = 0 or kappa -> inf: anchored.
    density   the weights stay those of the prior, bit for bit; s moves the density of the
              timesteps, p ~ sqrt(w) e^(s/2), which the sampler "weighting" draws from and corrects
              for. z is w q in place of w L, with q the squared norm of the gradient of a sample's
              loss in the output layer, from observe_gradient_norms, or with observes="losses" the
              loss. The objective is anchored's. kappa = 0: p ~ w sqrt(q), where the mean of the
              corrected gradients varies least if q is right up to a factor; kappa -> inf: sqrt(w).

    prior, prior_params: as in log_weight. kappa >= 0. s is linear between the centres of bins, or
    with fourier=True in the features of EDM2; |s| <= clamp. half_life: of the running mean, in
    images. floor: L* (T,) in the space of the losses, or "online": two running means of a bin, of
    mean age 1/3 and 1/9 of the training, extrapolated as L* + c / images. (Another power scales c
    in all bins alike, and z has no scale.) At least 1 % of a loss counts as learnable. The target
    space of L matters to outside, tempered and conflict alone.
    """

    basis: Tensor  # (T, number of coefficients)
    log_prior: Tensor  # (T,)
    prior: Tensor  # (T,) the w of the objective: mean 1 where z is relative
    running: Tensor  # (2,): running sums of 1 and z
    history: Tensor  # (2, 2, K): for the long and the short memory, running sums of 1 and loss
    images: Tensor  # () int64: number of losses seen
    floor_means: Tensor  # (K,)
    table: Tensor  # (T,) the weights of the variant density

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
        observes: str | None = None,
    ) -> None:
        super().__init__(setting, bins)
        check_name("dy-sigma variant", variant, VARIANTS)
        self.variant = VARIANTS[variant]
        self._set_observed(variant, observes)
        if kappa != 1 and not self.variant.kappa_in:
            raise ValueError(f"dy-sigma variant {variant!r} has no kappa; got {kappa!r}")
        kappa = check_number("kappa", kappa, inclusive=True, high=math.inf)
        self.kappa = min(kappa, LARGEST_KAPPA)
        self.clamp = check_number("clamp", clamp)
        self.half_life = None if half_life is None else check_number("half_life", half_life)

        log_prior = self.use_formula(prior, setting.schedule, **(prior_params or {}))
        if self.half_life is None:
            objective_prior = log_prior.exp()
        else:
            objective_prior = log_prior.softmax(0) * self.num_timesteps
            self.register_buffer("running", torch.zeros(2))
        self.register_buffer("log_prior", log_prior.float(), persistent=False)
        self.register_buffer("prior", objective_prior.float(), persistent=False)
        if self.variant.density:
            table = self.from_log(log_prior).float()
            self.register_buffer("table", table, persistent=False)

        basis = fourier_features(self.log_snr) if fourier else self.bins.interpolation()
        # In units of the width of its prior, s has curvature 1 at z = 1 for every kappa, and
        # optimizer steps of fixed length do not shake what a strong prior holds still.
        width = (1 + self.kappa) ** -0.5 if self.variant.kappa_in == "objective" else 1.0
        self.register_buffer("basis", basis * width, persistent=False)
        self.coefficients = nn.Parameter(torch.zeros(basis.shape[1]))

        self._set_floor(self.variant.floor if floor is None else floor)
        if self.variant.gramian:
            self._expect_gramian(gramian_every)

    def _set_observed(self, variant: str, observes: str | None) -> None:
        if observes is not None and not self.variant.density:
            raise ValueError(
                f"dy-sigma variant {variant!r} learns from losses; observes is of density"
            )
        if self.variant.density:
            self.observes = OBSERVED[0] if observes is None else observes
            check_name("observes", self.observes, OBSERVED)

    def _set_floor(self, floor: Tensor | Sequence[float] | str | None) -> None:
        self.floor = floor if floor is None or isinstance(floor, str) else "given"
        if floor is None:
            return
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", torch.zeros(2, 2, self.bins.num_bins))
        if isinstance(floor, str):
            if floor != "online":
                raise ValueError(
                    f"floor must be None, 'online' or the floor of each timestep; got {floor!r}"
                )
            return
        table = torch.as_tensor(floor, dtype=torch.float32, device="cpu")
        if table.shape != (self.num_timesteps,) or not bool(torch.isfinite(table).all()):
            raise ValueError(
                f"floor must be finite, ({self.num_timesteps},); got shape {tuple(table.shape)}"
            )
        means, _ = self.bins.mean(table, torch.arange(self.num_timesteps))
        self.register_buffer("floor_means", means, persistent=False)

    def log_variances(self) -> Tensor:
        """s: (T,) float32, with gradient to the parameters."""
        return self._unbounded().clamp(-self.clamp, self.clamp)

    def _unbounded(self) -> Tensor:
        # A sum, because autocast would round a matrix product.
        return (self.basis * self.coefficients).sum(1)

    def fixed_point(self, z: Tensor) -> Tensor:
        """The s, float64, to which a constant z >= 0 leads, clamp included; for conflict, while G =
        0."""
        return self.variant.fixed_point(z, self.kappa).clamp(-self.clamp, self.clamp)

    @torch.no_grad()
    def weights(self) -> Tensor:
        if self.variant.density:
            return self.table.clone()
        return self.from_log(self._log_weights(self.log_variances()))

    @torch.no_grad()
    def density(self) -> Tensor | None:
        """Of the variant density: masses (T,) float64 that the sampler "weighting" draws from."""
        if not self.variant.density:
            return None
        log_mass = (self.log_prior.double() + self.log_variances().double()) / 2
        return log_mass.softmax(0)

    def _log_weights(self, s: Tensor) -> Tensor:
        return self.log_prior + self.variant.boost(s, self.kappa)

    def observe_gradient_norms(
        self, squared_norms: Tensor, timesteps: Tensor, importance: Tensor
    ) -> Tensor:
        """What s minimises, () with gradient, from the squared gradient norms of a whole batch.

        squared_norms (B,), of each sample's own unweighted loss, as
        ``OutputLayerGradients.squared_norms`` gives them; importance (B,) as the sampler gave it.
        Call backward() on it in train() mode, before the optimizer's step. A norm that is not finite
        is left out. Raises ValueError for every other variant, and with observes="losses".
        """
        if self.observes != "gradient-norms":
            return super().observe_gradient_norms(squared_norms, timesteps, importance)
        self._check(squared_norms, importance)
        usable = squared_norms.isfinite() & importance.isfinite()
        return self._learn(
            torch.where(usable, squared_norms.detach(), 0.0),
            timesteps.to(squared_norms.device).long(),
            torch.where(usable, importance, 0.0),
        )

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor | None:
        if self.observes != "losses":
            return None
        return self._learn(losses, timesteps, importance)

    def _learn(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
        """What s minimises; the running statistics move. losses: (B,), or what stands for them."""
        prior = self.prior[timesteps]
        z = prior * losses if self.variant.weighted else losses
        if self.floor is not None:
            z = z * self._learnable_share(losses, timesteps, importance)
        if self.half_life is not None:
            z = z / self._running_mean(z, importance, self.half_life)

        unbounded = self._unbounded()[timesteps]
        s = unbounded.clamp(-self.clamp, self.clamp)
        each = self.variant.objective(s, z, prior, self.kappa)
        # The clamp stops the gradient both ways; the square brings s back once it is outside.
        outside = unbounded - s.detach()
        each = each + outside**2 / 2
        objective = (importance * each).mean()
        if self.variant.gramian:
            objective = objective + self._conflict(self.log_variances())
        return objective

    def _running_mean(self, z: Tensor, importance: Tensor, half_life: float) -> Tensor:
        """The running mean of z, with this batch in it."""
        self.running.mul_(0.5 ** (len(z) / half_life))
        self.running.add_(torch.stack([importance.sum(), (importance * z).sum()]))
        count, total = self.running
        return ratio(total, count, 1.0).clamp(min=1e-30)

    def _conflict(self, s: Tensor) -> Tensor:
        """K u'Gu of the shares u of the bins."""
        share = self._log_weights(s).softmax(0)
        shares = share.new_zeros(self.bins.num_bins).index_add(0, self.bin_index, share)
        return self.bins.num_bins * quadratic(self.gramian, shares)

    def _learnable_share(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
        """(L - L*) / L of the bin of each sample (B,)."""
        index = self.bin_index[timesteps]
        self.images += len(losses)
        # A mean over the past with density images^(p-1) remembers a fixed fraction of the run and
        # reads c / images as p / (p-1) times its present value: 2 for p = 2, 8/7 for p = 8. So
        # their difference is 6/7 c / images, and what is learnable in the short one, 8/7 c /
        # images, is 4/3 times that.
        keep = 1 - len(losses) / self.images.float()
        keep_both = torch.stack([keep, keep**7])[:, None, None]
        new = torch.stack([importance, importance * losses]).expand(2, 2, -1)
        self.history.mul_(keep_both).index_add_(2, index, new)
        long, short = ratio(self.history[:, 1], self.history[:, 0], 1.0)
        learnable = 4 / 3 * (long - short) if self.floor == "online" else short - self.floor_means
        share: Tensor = (learnable / short.clamp(min=1e-30)).clamp(SMALLEST_SHARE, 1)
        return share[index]


class Uncertainty(DySigma):
    """Uncertainty weighting (Kendall, Gal, Cipolla 2018): "inside" with weight 1 in the model's own
    target space.

    s minimises L e^-s + s: e^s* = L, weight 1 / L, the same in every target space; the start is
    that of the own space. White Gaussian data of variance v have L = 1 / (SNR + 1/v) on x0 at best,
    so there the weight becomes that of EDM. Without normalize, weights grow as losses fall, which
    acts like a learning rate.
    """

    def __init__(
        self, setting: Setting, *, bins: int | Bins = 20, fourier: bool = False, clamp: float = 10.0
    ) -> None:
        super().__init__(
            setting,
            prior=PLAIN[canonical_prediction_type(setting.prediction_type)],
            variant="inside",
            bins=bins,
            fourier=fourier,
            clamp=clamp,
            half_life=None,
        )
