"""Number formats: which one the network runs in, and the scaled loss that float16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .config import TrainConfig


def low_precision(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """bfloat16 or float16, or None for float32.

    "auto" is bfloat16 on CUDA devices that compute in it. Older ones, such as a T4, only emulate
    it, slowly; there "auto" is float32, and float16 has to be asked for.
    """
    if config.precision == "bfloat16":
        return torch.bfloat16
    if config.precision == "float16":
        return torch.float16
    if config.precision == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    return None


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """The context in which networks run: in low precision, or as they are."""
    dtype = low_precision(config, device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler of float16; in the other formats one that is switched off and changes nothing."""
    is_float16 = low_precision(config, device) is torch.float16
    return torch.amp.GradScaler(device.type, enabled=is_float16)
