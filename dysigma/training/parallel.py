"""Training on several ranks: their process group, their share of a batch, their mean gradient."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ..devices import resolve_device
from ..runs.files import RunError
from .config import TrainConfig

T = TypeVar("T")
# Longer than the first rank ever validates, samples or writes while the others wait.
PATIENCE = timedelta(minutes=30)


def rank_and_count() -> tuple[int, int]:
    """(rank of this process, number of ranks) in torch.distributed; (0, 1) without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def process_group(config: TrainConfig) -> Iterator[torch.device]:
    """Join the ranks that torchrun's environment variables speak of, if any; yield this one's device.

    Raises ValueError for a device that ranks cannot share, RunError when another rank is lost.
    """
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and config.device in ("auto", "cuda") and torch.cuda.is_available():
        _take_own_gpu()
    device = resolve_device(config.device)
    if many and (device.type not in ("cpu", "cuda") or ":" in config.device):
        raise ValueError(
            f"with many ranks device must be auto, cpu or cuda; got {config.device!r}, {device}"
        )
    if not many or distributed.is_initialized():
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
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


def _take_own_gpu() -> None:
    """Make the GPU of LOCAL_RANK the current one; ValueError if there is none."""
    local = int(os.environ.get("LOCAL_RANK", -1))
    count = torch.cuda.device_count()
    if not 0 <= local < count:
        raise ValueError(
            f"LOCAL_RANK must name one of the {count} GPUs here, one for each process; got {local}"
        )
    torch.cuda.set_device(local)


def share_of_batch(config: TrainConfig, device: torch.device) -> Tensor:
    """The places in the batch that this rank works on, part by part: (accumulate, B / accumulate / ranks)."""
    rank, count = rank_and_count()
    if config.batch_size % (config.accumulate * count):
        raise ValueError(
            "batch_size must be a multiple of accumulate times the number of ranks; got "
            f"batch_size {config.batch_size}, accumulate {config.accumulate}, {count} ranks"
        )
    places = torch.arange(config.batch_size, device=device)
    return places.view(config.accumulate, count, -1)[:, rank]


def average_over_ranks(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """The mean of the loss () over ranks; gradients are replaced by theirs, all in one message."""
    count = rank_and_count()[1]
    if count == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    means = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(means)
    means /= count
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, means[1:].split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return means[0]


def wait_for_all() -> None:
    """Wait until all ranks are here."""
    if rank_and_count()[1] > 1:
        distributed.barrier()


def from_first(value: T, device: torch.device) -> T:
    """The first rank's value, on every rank."""
    box = [value]
    if rank_and_count()[1] > 1:
        distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]
