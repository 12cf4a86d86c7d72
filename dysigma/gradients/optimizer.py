"""What an Adam optimizer did in its last step, and the metric in which it measures gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class AdamStep(NamedTuple):
    """The last step of an Adam optimizer, weight decay apart, over the parameters laid end to end."""

    direction: Tensor  # (P,) float64 of norm 1; the step goes against it
    root_rates: Tensor  # (P,) square root of the rate of each coordinate: multiplies gradients into Adam's metric


def adam_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> AdamStep:
    """The last step of the optimizer (Kingma, Ba 2015, algorithm 1) on the parameters.

    Coordinate by coordinate the step is -rate * m, with m the bias-corrected first moment and
    rate = lr / (sqrt(v) + eps), v the bias-corrected second moment. Raises ValueError for an optimizer without such
    moments, or one that has not stepped yet.
    """
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    steps = []
    rates = []
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"{type(optimizer).__name__} is not of the Adam family, or has not stepped on the parameter of shape "
                f"{tuple(p.shape)}"
            )
        group = settings[p]
        first_decay, second_decay = group["betas"]
        count = float(state["step"])
        first_moment = state["exp_avg"].flatten()
        second_moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        second_moment = second_moment / (1 - second_decay**count)
        rate = (group["lr"] / (second_moment.sqrt() + group["eps"])).flatten()
        rates.append(rate)
        steps.append(rate * first_moment / (1 - first_decay**count))
    step = torch.cat(steps).double()
    return AdamStep(step / step.norm(), torch.cat(rates).sqrt())
