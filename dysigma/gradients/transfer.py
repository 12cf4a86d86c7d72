"""Negative transfer: what training on one timestep bin does to every other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..randomness import forked_rng
from ..schedule import NoiseSchedule
from .batches import (
    BinBatch,
    Images,
    ModelKwargs,
    batch_losses,
    check_count,
    check_request,
    draw_batches,
    spans,
)
from .estimator import without_ranks


class NegativeTransfer(NamedTuple):
    """Row i: a copy of the model fine-tuned on bin i alone. Column j: its loss on bin j, on fixed draws."""

    edges: list[int]
    losses: Tensor  # (K,) before
    change: Tensor  # (K, K) mean loss after minus before; > 0 is negative transfer
    change_se: Tensor  # (K, K) standard error over the evaluation draws

    def spans(self) -> list[str]:
        """First and last timestep of each bin: ["0-99", "100-199", ...]."""
        return spans(self.edges)

    def percent(self) -> tuple[Tensor, Tensor]:
        """(K, K) the change in percent of the loss before, and half the width of its 95 % interval."""
        change = 100 * self.change / self.losses
        half = (
            100 * (2 * self.change_se) / self.losses
        )  # two standard errors, for 64 draws of a bin
        return change, half

    def sentence(self) -> str:
        """How many losses rose and fell for sure, and which changed most, for a reader."""
        change, half = self.percent()
        names = self.spans()
        rose = change > half
        fell = change < -half
        others = ~torch.eye(len(names), dtype=torch.bool)
        most = int(torch.where(others, change, -torch.inf).argmax())
        i, j = divmod(most, len(names))
        return (
            f"Transfer: fine-tuning on one bin lowered its own loss for sure in {int(fell.diagonal().sum())} of "
            f"{len(names)} bins. Of {int(others.sum())} losses of other bins {int(rose[others].sum())} rose and "
            f"{int(fell[others].sum())} fell for sure (95 % intervals of the evaluation; each fine-tuning ran once). "
            f"Most: {names[i]} changed {names[j]} by {change[i, j]:+.1f} ± {half[i, j]:.1f} %."
        )


def negative_transfer(
    model: nn.Module,
    images: Images,
    schedule: NoiseSchedule,
    bins: int | Bins = 10,
    *,
    prediction_type: str = "epsilon",
    steps: int = 50,
    batch_size: int = 16,
    samples_per_bin: int = 64,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    model_kwargs: ModelKwargs = None,
    seed: int = 0,
    progress: bool = True,
) -> NegativeTransfer:
    """What fine-tuning on one bin alone does to every other: K copies of the model, `steps` steps each.

    optimizer: makes the optimizer of a copy from its parameters; None is Adam, lr 1e-4. The copies train on the same
    images and noise. Evaluation is in eval() mode on samples_per_bin draws per bin fixed beforehand, so differences
    are paired; their standard errors are of the evaluation alone. The rest is as in ``conflicts``, errors included.
    """
    from tqdm import tqdm

    steps = check_count("steps", steps, 1)
    batch_size = check_count("batch_size", batch_size, 1)
    samples_per_bin = check_count("samples_per_bin", samples_per_bin, 2)
    seed = check_count("seed", seed, 0)
    table, cut, kind = check_request(model, images, schedule, bins, prediction_type, model_kwargs)
    held_out = draw_batches(table, cut, samples_per_bin, seed, 0, paired=False)

    def losses(network: nn.Module, batch: BinBatch) -> Tensor:
        return batch_losses(network, schedule, batch, kind, model_kwargs)

    @torch.no_grad()
    def evaluate(network: nn.Module) -> Tensor:
        network.eval()
        return torch.stack([losses(network, batch) for batch in held_out]).double().cpu()

    def fine_tune(network: nn.Module, k: int) -> None:
        make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-4))
        stepper = make(network.parameters())
        with forked_rng(table.device, seed), torch.enable_grad():
            for step in range(1, steps + 1):
                stepper.zero_grad()
                batches = draw_batches(table, cut, batch_size, seed, step, paired=True)
                losses(network, batches[k]).mean().backward()
                stepper.step()

    before = evaluate(copy.deepcopy(without_ranks(model)))
    changes = []
    for k in tqdm(range(cut.num_bins), desc="negative transfer", unit="bin", disable=not progress):
        tuned = copy.deepcopy(without_ranks(model))
        fine_tune(tuned, k)
        changes.append(evaluate(tuned) - before)
    change = torch.stack(changes)  # (K, K, samples_per_bin)
    return NegativeTransfer(
        edges=cut.edges.tolist(),
        losses=before.mean(1),
        change=change.mean(2),
        change_se=change.std(2) / samples_per_bin**0.5,
    )
