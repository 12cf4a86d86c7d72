"""Networks that were trained elsewhere, called as ours are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .schedule import NoiseSchedule


class FlowNetwork(nn.Module):
    """A network trained with a flow scheduler of diffusers, called with the timesteps of our schedule.

    Such networks are told T sigma, which ``FlowMatchEulerDiscreteScheduler.timesteps`` holds from noisy to clean: its
    index i is our timestep T - 1 - i. Timestep t becomes T sigma_t, float32. Parameters keep their own names.
    Raises ValueError for a schedule that is no flow.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=4, shift=3.0)
    >>> network = FlowNetwork(nn.Identity(), NoiseSchedule.from_diffusers(scheduler))
    >>> network.levels.flip(0), scheduler.timesteps
    (tensor([4.0000, 3.6000, 3.0000, 2.0000]), tensor([4.0000, 3.6000, 3.0000, 2.0000]))
    """

    levels: Tensor

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        if not schedule.is_flow:
            raise ValueError(
                "only networks trained on a flow are told T sigma; others take the timesteps themselves"
            )
        self.network = network
        levels = schedule.num_timesteps * schedule.sigma.double()
        self.register_buffer("levels", levels.float(), persistent=False)

    def forward(self, x_t: Tensor, timesteps: Tensor, **kwargs: Any) -> Any:
        """The network's output at (x_t (B, ...), T sigma of timesteps (B,))."""
        return self.network(x_t, self.levels[timesteps], **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the network, under its own names."""
        return self.network.named_parameters(prefix, recurse, remove_duplicate)
