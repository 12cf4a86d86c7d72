"""Training on several ranks: their process group, their share of a batch, their mean gradient."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ..devices import resolve_device
from ..runs.files import RunError
from .config import TrainConfig


def _ranks() -> tuple[int, int]:
    """(rank of this process, number of ranks) in torch.distributed; (0, 1) without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def _process_group(config: TrainConfig) -> Iterator[torch.device]:
    """Join the ranks that torchrun or its environment variables speak of, if any; yields the device of this one."""
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and config.device in ("auto", "cuda") and torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", -1)), torch.cuda.device_count()
        if not 0 <= local < count:
            raise ValueError(
                f"LOCAL_RANK must name one of the {count} GPUs here, one for each process; got {local}"
            )
        torch.cuda.set_device(local)
    device = resolve_device(config.device)
    if many and (device.type not in ("cpu", "cuda") or ":" in config.device):
        raise ValueError(
            f"with many ranks device must be auto, cpu or cuda; got {config.device!r}, {device}"
        )
    if not many or distributed.is_initialized():
        yield device
        return
    # Longer than the first rank ever validates, samples or writes while the others wait.
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
    )
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        cause = str(error).split(". ")[0]
        raise RunError(
            f"lost another rank, whose own words tell why ({cause}); go on with --resume"
        ) from None
    finally:
        distributed.destroy_process_group()


def _share(config: TrainConfig, device: torch.device) -> Tensor:
    """The places in the batch that this rank works on, part by part: (accumulate, B / accumulate / ranks)."""
    rank, count = _ranks()
    if config.batch_size % (config.accumulate * count):
        got = f"batch_size {config.batch_size}, accumulate {config.accumulate}, {count} ranks"
        raise ValueError(
            f"batch_size must be a multiple of accumulate times the number of ranks; got {got}"
        )
    return torch.arange(config.batch_size, device=device).view(config.accumulate, count, -1)[
        :, rank
    ]


def _average(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """The mean of the loss () over ranks; gradients are replaced by theirs, all in one message."""
    if _ranks()[1] == 1:
        return loss
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    means = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])
    distributed.all_reduce(means)
    means /= _ranks()[1]
    for grad, mean in zip(grads, means[1:].split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
    return means[0]


def _wait() -> None:
    """Until all ranks are here."""
    if _ranks()[1] > 1:
        distributed.barrier()


def _from_first(value: Any, device: torch.device) -> Any:
    """The first rank's value, on every rank."""
    box = [value]
    if _ranks()[1] > 1:
        distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]
