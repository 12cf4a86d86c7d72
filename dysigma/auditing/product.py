"""What a training run minimises: the density of its timesteps times its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..samplers import TimestepSampler, effective_weights
from ..schedule import NoiseSchedule
from ..weightings import Weighting


@dataclass
class Preview:
    """Density, weight and their product at each timestep, (T,) float64 of mean 1, on the error of target.

    objective is density times weight: the weights of the same objective under uniform timesteps.
    For a sampler that is corrected for its density (corrected) it is the weight alone.
    """

    target: str
    corrected: bool
    log_snr: Tensor = field(repr=False)
    density: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    objective: Tensor = field(repr=False)

    def middle_half(self) -> tuple[int, int]:
        """The timesteps between which the middle half of the objective lies, a quarter on either side."""
        share = self.objective.cumsum(0) / self.objective.sum()
        low, high = torch.searchsorted(share, share.new_tensor([0.25, 0.75])).tolist()
        return low, high

    def table(self, rows: int = 10) -> str:
        """Rows of timestep, log-SNR, density, weight, objective, and the share of the objective up to there."""
        last = len(self.log_snr) - 1
        steps = torch.linspace(0, last, rows).round().long().unique().tolist()
        share = self.objective.cumsum(0) / self.objective.sum()
        lines = [
            f"{'timestep':>8} {'log-SNR':>9} {'density':>9} {'weight':>9} {'objective':>9} {'up to here':>10}"
        ]
        for step in steps:
            numbers = [self.density[step], self.weight[step], self.objective[step]]
            cells = " ".join(f"{float(number):9.4g}" for number in numbers)
            level = float(self.log_snr[step])
            lines.append(f"{step:8} {level:9.3f} {cells} {float(share[step]):10.1%}")
        return "\n".join(lines)


def preview(weighting: Weighting, sampler: TimestepSampler, schedule: NoiseSchedule) -> Preview:
    """Density, weight and effective objective of a weighting and a sampler, as they are now.

    >>> from dysigma import NoiseSchedule, make_sampler, make_weighting
    >>> schedule = NoiseSchedule.flow()
    >>> weighting = make_weighting("const-flow", schedule, "flow_prediction")
    >>> shown = preview(weighting, make_sampler("logit-normal", schedule), schedule)
    >>> shown.middle_half()
    (337, 662)
    """
    density = sampler.probabilities().double().cpu() * schedule.num_timesteps
    weight = weighting.weights().double().cpu()
    return Preview(
        target=weighting.prediction_type,
        corrected=sampler.corrected,
        log_snr=schedule.log_snr.cpu(),
        density=density,
        weight=weight / weight.mean(),
        objective=effective_weights(sampler, weighting).cpu(),
    )
