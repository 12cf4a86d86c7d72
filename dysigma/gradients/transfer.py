"""Negative transfer: what training on one timestep bin does to every other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bins import Bins
from ..schedule import NoiseSchedule
from .estimator import (
    Images,
    Kwargs,
    _draw,
    _fork_rng,
    _inputs,
    _losses,
    _unwrapped,
)


class NegativeTransfer(NamedTuple):
    """Row i: a copy of the model fine-tuned on bin i alone. Column j: its loss on bin j, on fixed draws."""

    edges: list[int]
    losses: Tensor  # (K,) before
    change: Tensor  # (K, K) mean loss after minus before; > 0 is negative transfer
    change_se: Tensor  # (K, K) standard error over the evaluation draws


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
    model_kwargs: Kwargs = None,
    seed: int = 0,
    progress: bool = True,
) -> NegativeTransfer:
    """What fine-tuning on one bin alone does to every other: K copies of the model, `steps` steps each.

    optimizer: makes the optimizer of a copy from its parameters; None is Adam, lr 1e-4. The copies train on the same
    images and noise. Evaluation is in eval() mode on samples_per_bin draws per bin fixed beforehand, so differences are
    paired; their standard errors are of the evaluation alone. The rest is as in ``conflicts``.
    """
    from tqdm import tqdm

    table, cut = _inputs(images, schedule, bins, model)
    losses = functools.partial(
        _losses, schedule=schedule, kind=prediction_type, kwargs=model_kwargs
    )
    held = _draw(table, cut, samples_per_bin, seed, 0, False)

    @torch.no_grad()
    def evaluate(network: nn.Module) -> Tensor:
        return torch.stack([losses(network.eval(), part=part) for part in held]).double().cpu()

    before, changes = evaluate(copy.deepcopy(_unwrapped(model))), []
    for k in tqdm(range(cut.num_bins), desc="negative transfer", unit="bin", disable=not progress):
        tuned = copy.deepcopy(_unwrapped(model))
        stepper = (optimizer or functools.partial(torch.optim.Adam, lr=1e-4))(tuned.parameters())
        with _fork_rng(table.device), torch.enable_grad():
            torch.manual_seed(seed)
            for step in range(1, steps + 1):
                stepper.zero_grad()
                losses(
                    tuned, part=_draw(table, cut, batch_size, seed, step, True)[k]
                ).mean().backward()
                stepper.step()
        changes.append(evaluate(tuned) - before)
    change = torch.stack(changes)
    return NegativeTransfer(
        cut.edges.tolist(), before.mean(1), change.mean(2), change.std(2) / samples_per_bin**0.5
    )
