"""Devices: which one to use, how to bring tensors there, and how fast its kernels may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """values of the CPU on a device; a CUDA device is not waited for."""
    return (
        values.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else values.to(device)
    )


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; "auto" takes CUDA, then MPS, then the CPU. ValueError if it is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); use auto or cpu"
        ) from None


@contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """On CUDA: TF32 for what stays in float32, and cuDNN tries its kernels; as before afterwards."""
    before, cuda = torch.get_float32_matmul_precision(), device.type == "cuda"
    with torch.backends.cudnn.flags(enabled=True, benchmark=cuda, allow_tf32=True):
        try:
            torch.set_float32_matmul_precision("high" if cuda else before)
            yield
        finally:
            torch.set_float32_matmul_precision(before)
