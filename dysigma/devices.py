"""Devices: which one to use, how to bring tensors there, and how fast its kernels may be."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module that follows to a device and keeps its dtypes, whatever .half() a module around it gets.

    >>> module = KeepsPrecision()
    >>> module.register_buffer("table", torch.ones(2, dtype=torch.float64))
    >>> nn.Sequential(module).half()[0].table.dtype
    torch.float64
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        move: Any = super()._apply  # which torch leaves untyped
        move(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """values of the CPU on a device; a CUDA device is not waited for."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is a GPU that works, else the CPU.

    A GPU that "auto" finds and cannot use is told in a warning: too old for this torch, say.
    Apple's MPS is never used, because schedules are float64 and MPS has no such numbers. Raises
    ValueError for a device that is not there or that cannot hold float64.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return resolve_device("cuda")
        except ValueError as error:
            reason = str(error).removesuffix("; use auto or cpu")
            warnings.warn(f"the CPU is used: {reason}", stacklevel=2)
            return torch.device("cpu")
    try:
        probe = torch.zeros(1, device=name, dtype=torch.float64)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); use auto or cpu") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left.

    TorchScript and the libraries below torch say so in errors of other classes.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in words or "STATUS_ALLOC_FAILED" in words
    )


_Result = TypeVar("_Result")


def in_parts_that_fit(work: Callable[[range], _Result], count: int, size: int) -> Iterator[_Result]:
    """work(numbers) for 0 ... count - 1 in parts of `size`, or of half of that where memory runs out.

    The last part may go beyond count: work cuts it, or throws away what is too much. Raises what work
    raises, and when not even one number fits.

    >>> list(in_parts_that_fit(lambda part: list(part), count=4, size=2))
    [[0, 1], [2, 3]]
    """
    first = 0
    while first < count:
        try:
            found = work(range(first, first + size))
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        else:
            first += size
            yield found
            continue
        # Only here, after the error, is the memory of the failed attempt free.
        size = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
