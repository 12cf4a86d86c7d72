"""Weightings from the inner products of the gradients of timestep bins.

The noise of a batch enters the Gramian of its gradients squared, on the diagonal above all. Inner
products of gradients from two independent batches are unbiased. MoDo (Chen, Fernando, Ying, Chen
2023, "double sampling") and SDMGrad (Xiao, Ban, Ji 2023) take the weights of objectives
from such products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..checks import check_name, check_number
from .base import Setting, Weighting, quadratic, torchjd_class


class OfGramian(Weighting):
    """Weights from the shares u_k of the bins, each spread evenly over its timesteps: w_t = u_k T /
    n_k."""

    needs_gramian = True
    spread: Tensor  # (K,): T / n_k

    def __init__(self, setting: Setting, bins: int | Bins, gramian_every: int) -> None:
        super().__init__(setting, bins)
        self._expect_gramian(gramian_every)
        spread = self.num_timesteps / self.bins.counts.float()
        self.register_buffer("spread", spread, persistent=False)

    def bin_shares(self) -> Tensor:
        """u (K,), summing to 1 up to a factor."""
        raise NotImplementedError

    @torch.no_grad()
    def weights(self) -> Tensor:
        return self.scaled((self.bin_shares() * self.spread)[self.bin_index])


class UGD(OfGramian):
    """Min-SNR's unconstrained gradient descent (Hang et al. 2023): u = softmax(beta), beta descends
    u'Gu + lambda u'u.

    Every call descends the last Gramian seen, over its mean diagonal, with the optimizer of
    parameters(). regularization is lambda >= 0. The larger it is, the more equal the weights of the
    bins become; at 0 the fixed point is the min-norm point, that of MGDA, where bins may have none.
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
        self.regularization = check_number("regularization", regularization, inclusive=True)
        self.beta = nn.Parameter(torch.zeros(self.bins.num_bins))

    def bin_shares(self) -> Tensor:
        return self.beta.softmax(0)

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
        u = self.bin_shares()
        spread: Tensor = self.regularization * (u * u).sum()
        return quadratic(self.gramian, u) + spread


# Rule: class of torchjd.aggregation and its arguments. Fairness of order 1 solves G a = 1 / a, the
# bargaining solution of Nash-MTL (Navon et al. 2022), whose own class there asks for the whole
# Jacobian. Left out: GradVac, PCD, MoDo, SDMGrad, CR-MOGM and Excess-MTL, because they remember what
# they saw in a form that state_dict() does not bring back, and "ugd" and the running mean of Gramians
# are MoDo's and CR-MOGM's ideas here; Krum, which drops gradients as adversarial.
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


class GramianRule(OfGramian):
    """Shares of the bins by a rule of TorchJD, equal before the first Gramian; negative ones of
    some rules are kept."""

    shares: Tensor  # (K,)

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
        class_name, options = GRAMIAN_RULES[rule]
        make_rule = torchjd_class("aggregation", class_name, f"'gramian' with rule={rule!r}")
        self.rule = make_rule(**options)
        equal = torch.full((self.bins.num_bins,), 1 / self.bins.num_bins)
        self.register_buffer("shares", equal)

    def bin_shares(self) -> Tensor:
        return self.shares

    def _observe(self, gramian: Tensor) -> None:
        super()._observe(gramian)
        shares = self._seeded_shares(gramian)
        if not bool(torch.isfinite(shares).all()) or not shares.sum() > 0:
            raise ValueError(
                f"{self.rule} found no usable shares, {shares.tolist()}, in {gramian.tolist()}"
            )
        self.shares.copy_(shares)

    def _seeded_shares(self, gramian: Tensor) -> Tensor:
        """The rule's shares; what it draws (a random order) is a function of the number of Gramians
        seen.

        Rules draw from the CPU's global generator. It is seeded by itself, as torch.manual_seed
        would also seed those of all GPUs, and gets its state back.
        """
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(int(self.gramians_seen))
        try:
            shares: Tensor = self.rule(gramian.cpu())
            return shares.to(gramian.device)
        finally:
            generator.set_state(state)
