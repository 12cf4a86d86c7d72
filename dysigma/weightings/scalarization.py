"""Weightings by TorchJD's scalarisations of the mean losses of timestep bins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bins import Bins
from ..checks import check_name
from .adaptive import RunningLosses, without_zeros
from .base import Setting, ratio, torchjd_class

# Rule: class of torchjd.scalarization and its arguments. Left out: its geometric mean, whose weights
# are those of "loss-balance" (and which waits for the device); Mean, Sum, Constant and Random, which
# are "const" and "random" here; COSMOS and PBI, which follow a preference between objectives.
SCALARIZATION_RULES: dict[str, tuple[str, dict[str, float]]] = {
    "uw": ("UW", {}),
    "imtl-l": ("IMTLL", {}),
    "famo": ("FAMO", {}),
    "dwa": ("DWA", {"temperature": 2.0}),
    "stch": ("STCH", {"mu": 0.1}),
}
# These learn a parameter for each bin, and so want their number.
LEARNED_RULES = ("uw", "imtl-l", "famo")

# FAMO's own learning rate (Liu et al. 2023); the others take that of every learned weighting.
FAMO_LR = 0.025


def _torchjd_scalarizer(rule: str, num_bins: int) -> Any:
    """The scalarizer of TorchJD of this name, for so many bins."""
    class_name, options = SCALARIZATION_RULES[rule]
    make_scalarizer = torchjd_class(
        "scalarization", class_name, f"'scalarization' with rule={rule!r}"
    )
    if rule in LEARNED_RULES:
        return make_scalarizer(num_bins, **options)
    return make_scalarizer(**options)


class Scalarization(RunningLosses):
    """A scalarisation S of TorchJD on the bins' mean losses L: the weight of a bin is dS / dL.

    L are running means in units of the mean of all losses, so a bin without samples in a batch keeps
    its own, and a bin never seen counts as average. What S learns gets its gradient from the same L.

    uw      e^-s / 2, where s minimises (e^-s L + s) / 2 (Kendall et al. 2018)
    imtl-l  e^s, where s minimises e^s L - s (Liu et al. 2021)
    famo    z / L with z = softmax(w), up to a factor (Liu et al. 2023). w follows how fast ln L
            falls, here that of the running means: the batch is not computed again.
    dwa     softmax(L_new / L_old / 2) (Liu et al. 2019). An epoch is half_life images.
    stch    softmax(L / (K mu)) with mu = 0.1, of K bins (Lin et al. 2024)

    rule: of SCALARIZATION_RULES. half_life: of the running means, in images.
    """

    ends: Tensor  # (2, K): running means at the ends of the last two epochs, older first; 0 before
    images: Tensor  # () int64: seen in this epoch

    def __init__(
        self,
        setting: Setting,
        *,
        rule: str = "uw",
        bins: int | Bins = 20,
        half_life: float = 10_000.0,
    ) -> None:
        super().__init__(setting, bins=bins, half_life=half_life)
        check_name("scalarization rule", rule, SCALARIZATION_RULES)
        self.rule_name = rule
        self.scalarizer = _torchjd_scalarizer(rule, self.bins.num_bins)
        if rule == "famo":
            self.suggested_lr = FAMO_LR
        if rule == "dwa":
            self.register_buffer("ends", torch.zeros(2, self.bins.num_bins))
            self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def rule(self, losses: Tensor, deviation: Tensor) -> Tensor:
        # The gradient is needed here also where the caller wants none.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = without_zeros(losses).clone().requires_grad_()
            value = self._scalarizer_now()(leaf)
            (slope,) = torch.autograd.grad(value, leaf)
        return slope

    def update(self, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor | None:
        if self.rule_name == "famo":
            before = self._bin_means()
            super().update(losses, timesteps, importance)
            return self._famo_objective(before, self._bin_means())
        super().update(losses, timesteps, importance)
        if self.rule_name == "dwa":
            self._end_epoch(self._bin_means(), len(losses))
            return None
        if self.rule_name not in LEARNED_RULES:
            return None
        relative, _ = self.relative_losses()
        objective: Tensor = self.scalarizer(without_zeros(relative))
        return objective

    def _bin_means(self) -> Tensor:
        """Running means of the bins' losses (K,) in their own unit, 0 where nothing was seen."""
        count, total, _ = self.moments
        return ratio(total, count, 0.0)

    def _famo_objective(self, before: Tensor, after: Tensor) -> Tensor:
        """z' (ln L before - ln L after), whose gradient in w is that of FAMO.update."""
        is_known = (before > 0) & (after > 0)
        fall = torch.where(is_known, before, 1.0).log() - torch.where(is_known, after, 1.0).log()
        (w,) = self.scalarizer.parameters()
        return (w.softmax(0) * fall).sum()

    def _scalarizer_now(self) -> Any:
        """The scalarizer. What DWA remembers is told to it anew, since its own memory is no state."""
        if self.rule_name != "dwa":
            return self.scalarizer
        is_known = (self.ends > 0).all(0)
        self.scalarizer.reset()
        for end in self.ends:
            self.scalarizer(torch.where(is_known, end, 1.0))
            self.scalarizer.step()
        return self.scalarizer

    def _end_epoch(self, means: Tensor, num_images: int) -> None:
        """Keep the running means (K,) if this batch ends an epoch, without asking the device."""
        self.images += num_images
        is_end = self.images >= self.half_life
        rolled = torch.stack([self.ends[1], means])
        self.ends.copy_(torch.where(is_end, rolled, self.ends))
        self.images.copy_(torch.where(is_end, 0, self.images))
