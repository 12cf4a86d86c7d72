"""Samples of all ranks, for statistics that must agree on every rank."""

from __future__ import annotations

import torch
from torch import Tensor


def over_ranks(*columns: Tensor) -> tuple[Tensor, ...]:
    """Detached float32 columns (B,), those of all ranks one after the other; every rank must bring the same B."""
    mine = torch.stack(
        [column.detach().float() for column in columns]
    )  # exact for timesteps below 2^24
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tuple(mine)
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    return tuple(torch.cat(every, dim=1))
