"""Devices: which one to use, how to bring tensors there, and how fast its kernels may be."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """values of the CPU on a device; a CUDA device is not waited for."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is a GPU, else the CPU.

    Apple's MPS is never used, because schedules are float64 and MPS has no such numbers. Raises
    ValueError for a device that is not there or that cannot hold float64.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name, dtype=torch.float64)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); use auto or cpu"
        ) from None


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile had better not be used on a device; None if nothing speaks against it."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (
            f"torch.compile wants a GPU of compute capability 8 or more, this has {major}.{minor}"
        )
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    return None


@contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """On CUDA: TF32 for what stays in float32, and cuDNN tries its kernels; as before afterwards."""
    before = torch.get_float32_matmul_precision()
    is_cuda = device.type == "cuda"
    with torch.backends.cudnn.flags(enabled=True, benchmark=is_cuda, allow_tf32=True):
        try:
            torch.set_float32_matmul_precision("high" if is_cuda else before)
            yield
        finally:
            torch.set_float32_matmul_precision(before)
