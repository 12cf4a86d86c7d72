"""Images as numbers in [-1, 1] and as bytes, and many of them as one picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def check_pixels(images: Any) -> None:
    """Raise ValueError unless images are a tensor of uint8, or floating in about [-1, 1] and finite.

    >>> check_pixels(torch.full((1, 3, 8, 8), 255.0))
    Traceback (most recent call last):
    ValueError: floating images must lie in about [-1, 1]; got values from 255 to 255: give them as uint8, or images / 127.5 - 1
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"need images as a tensor (N, C, H, W); got {type(images).__name__}: torch.as_tensor(images)"
        )
    if images.ndim < 2 or 0 in images.shape:
        raise ValueError(f"need images (N, C, H, W), one or more; got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return
    if images.is_complex():
        raise ValueError(f"need uint8 or floating images; got {images.dtype}: give their real part")
    if not images.is_floating_point():
        raise ValueError(
            f"need uint8 or floating images; got {images.dtype}: images.to(torch.uint8)"
        )
    low, high = (float(end) for end in images.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("images hold values that are NaN or infinite: leave them out")
    if low >= 0 and high > 32:
        raise ValueError(
            f"floating images must lie in about [-1, 1]; got values from {low:.3g} to {high:.3g}: give them as uint8, "
            "or images / 127.5 - 1"
        )


def check_bytes(images: Any) -> None:
    """Raise ValueError unless images are a tensor of uint8, whose 256 levels a bound or a loss counts on."""
    check_pixels(images)
    if images.dtype != torch.uint8:
        raise ValueError(
            f"need uint8 images, 0 to 255; got {images.dtype}: of images in [-1, 1] give dysigma.images.to_uint8(images)"
        )


def to_real(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes 0 to 255 as numbers from -1 to 1.

    >>> to_real(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return images.to(dtype).div(127.5).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """Numbers from -1 to 1 as the nearest bytes; what lies outside is clipped.

    >>> to_uint8(torch.tensor([-1.0, 0.1, 2.0]))
    tensor([  0, 140, 255], dtype=torch.uint8)
    """
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def tile(images: ArrayLike | Tensor, columns: int) -> NDArray[Any]:
    """One picture (H', W', 3) uint8 of images (N, 1 or 3, H, W), row by row on white, a pixel apart.

    Floating images lie in [-1, 1] and are clipped to it, for the eye only.
    """
    from einops import rearrange

    array = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1 or 3, H, W); got shape {array.shape}")
    if array.dtype != np.uint8:
        array = np.round(np.clip(array * 127.5 + 127.5, 0, 255)).astype(np.uint8)
    array = np.broadcast_to(array, (len(array), 3, *array.shape[2:]))
    framed = np.pad(
        array, ((0, -len(array) % columns), (0, 0), (0, 1), (0, 1)), constant_values=255
    )
    return rearrange(framed, "(row column) c h w -> (row h) (column w) c", column=columns)


def save_grid(images: Tensor, path: Path, columns: int = 8, scale: int = 1) -> None:
    """Write (N, C, H, W) images as one PNG, row by row, each pixel enlarged `scale` times."""
    from PIL import Image

    picture: Any = Image.fromarray(tile(images.cpu(), columns))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(
        path, optimize=True
    )
