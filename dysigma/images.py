"""Images as numbers in [-1, 1] and as bytes, and many of them as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


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


def tile(images: ArrayLike, columns: int) -> NDArray[Any]:
    """One picture (H', W', 3) uint8 of images (N, 1 or 3, H, W), row by row on white, a pixel apart.

    Floating images lie in [-1, 1] and are clipped to it, for the eye only.
    """
    from einops import rearrange

    array = np.asarray(images)
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
