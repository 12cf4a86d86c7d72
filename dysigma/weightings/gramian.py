"""Weightings from the inner products of the gradients of timestep bins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..checks import check_name, check_number
from .base import Setting, Weighting, _quadratic


class _OfGramian(Weighting):
    """Weights from the shares u_k of the bins, each spread evenly over its timesteps: w_t = u_k T / n_k."""

    needs_gramian = True
    spread: Tensor

    def __init__(self, setting: Setting, bins: int | Bins, gramian_every: int) -> None:
        super().__init__(setting, bins)
        self._expect_gramian(gramian_every)
        self.register_buffer(
            "spread", self.num_timesteps / self.bins.counts.float(), persistent=False
        )

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
        self,
        setting: Setting,
        *,
        bins: int | Bins = 10,
        gramian_every: int = 50,
        regularization: float = 0.1,
    ) -> None:
        super().__init__(setting, bins, gramian_every)
        self.regularization = check_number("regularization", regularization, low=-1e-9)
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
        self,
        setting: Setting,
        *,
        rule: str = "upgrad",
        bins: int | Bins = 10,
        gramian_every: int = 50,
    ) -> None:
        super().__init__(setting, bins, gramian_every)
        check_name("gramian rule", rule, GRAMIAN_RULES)
        name, options = GRAMIAN_RULES[rule]
        try:
            from torchjd import aggregation

            self.rule = getattr(aggregation, name)(**options)
        except ImportError as error:
            raise ImportError(
                f"weighting 'gramian' with rule={rule!r}: {error}. pip install 'dysigma[moo]'"
            ) from error
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
            raise ValueError(
                f"{self.rule} found no usable shares, {shares.tolist()}, in {gramian.tolist()}"
            )
        self.shares.copy_(shares)
