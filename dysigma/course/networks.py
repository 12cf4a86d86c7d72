"""A network so small that a page trains ten of them in a minute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..schedule import NoiseSchedule


class SmallDenoiser(nn.Module):
    """Three layers for one-channel images (B, 1, 8, 8): takes x_t and timesteps (B,), returns their shape.

    What the output means, noise or image, is the training's business. The network sees the pixels
    and, for the noise level, sines and cosines of log-SNR with eight frequencies.

    schedule: gives the log-SNR of each timestep. width: units of the two hidden layers.

    >>> network = SmallDenoiser(NoiseSchedule.linear(10), width=16)
    >>> network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 9])).shape
    torch.Size([2, 1, 8, 8])
    """

    log_snr: Tensor
    frequencies: Tensor

    def __init__(self, schedule: NoiseSchedule, width: int) -> None:
        super().__init__()
        self.register_buffer("log_snr", schedule.log_snr.float())
        self.register_buffer("frequencies", torch.arange(1, 9) / 8)
        self.layers = nn.Sequential(
            nn.Linear(64 + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 64),
        )

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        angles = self.log_snr[timesteps, None] * self.frequencies
        features = torch.cat([x_t.flatten(1), angles.sin(), angles.cos()], 1)
        images: Tensor = self.layers(features).view_as(x_t)
        return images
