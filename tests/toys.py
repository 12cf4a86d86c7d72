"""Small networks that tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dysigma.schedule import NoiseSchedule


class GaussianDenoiser(nn.Module):
    """The optimal denoiser of x0 ~ N(0, std^2), for any target on either path.

    calls: the first timestep of each batch it was called with.
    """

    def __init__(self, schedule: NoiseSchedule, std: float, kind: str = "epsilon") -> None:
        super().__init__()
        self.schedule = schedule
        self.std = std
        self.kind = kind
        self.calls: list[int] = []
        self.anchor = nn.Parameter(torch.zeros(()))  # says on which device the network is

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        self.calls.append(int(timesteps[0]))
        t = timesteps.long()
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        alpha = self.schedule.alpha[t].view(shape)
        sigma = self.schedule.sigma[t].view(shape)
        variance = alpha**2 * self.std**2 + sigma**2
        x0 = alpha * self.std**2 / variance * x_t
        noise = sigma / variance * x_t
        outputs = {
            "sample": x0,
            "epsilon": noise,
            "flow_prediction": noise - x0,
            "v_prediction": alpha * noise - sigma * x0,
        }
        return outputs[self.kind]
