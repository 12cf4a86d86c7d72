"""One picture file as uint8 pixels, and pictures at one size."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow opens and cannot read without help, or what is no picture.
_NO_STILLS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def picture_endings() -> frozenset[str]:
    """The file endings of still pictures that the installed Pillow reads, in lower case."""
    from PIL import Image

    formats = Image.registered_extensions()
    readable = Image.OPEN.keys() - _NO_STILLS
    return frozenset(ending for ending, kind in formats.items() if kind in readable)


def is_picture(file: Path) -> bool:
    """Whether the first bytes of a file are those of a still picture that Pillow reads."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.format not in _NO_STILLS
    except Exception:  # what is no picture makes the decoders raise almost anything
        return False


def read_picture(file: Path, notes: Counter[str]) -> Tensor:
    """A picture as RGB uint8 (3, H, W): turned upright, and on white where it is transparent.

    Of several frames the first is read. 16 bits a channel are cut to the upper 8. What a user should
    know of is counted in `notes`. Raises ValueError for a file that is damaged or of another depth.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            # In an MPO, the JPEG of many phones, the other frames are previews or depths.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                notes["several frames, of which the first is read"] += 1
            pixels = _upright(image)
            if pixels.mode[0] in "IF":
                pixels = _eight_bits(pixels, image.format or "", notes)
            white = Image.new("RGBA", pixels.size, "white")
            opaque = Image.alpha_composite(white, pixels.convert("RGBA")).convert("RGB")
            return torch.from_numpy(np.array(opaque)).permute(2, 0, 1)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f"{file} cannot be read as a picture ({error})") from error


def _upright(image: Image) -> Image:
    """The image turned as its EXIF orientation says; as it is where that block is damaged."""
    from PIL import ImageOps

    image.load()  # a truncated picture is not mistaken for damaged EXIF
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow issues 5528 and 8348: almost anything
        return image


def _eight_bits(image: Image, kind: str, notes: Counter[str]) -> Image:
    """The upper 8 of 16 bits of gray, as Pillow itself reads 16 bits of colour."""
    from PIL import Image

    values = np.asarray(image)
    if image.mode[0] == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        raise ValueError(
            f"{image.mode} pixels have no known white: save it with 8 or 16 bits a channel"
        )
    if values.max() < 4096:
        notes["gray of 16 bits below 4096, of which 8 bits keep less than 16 levels"] += 1
    return Image.fromarray((values >> 8).astype(np.uint8))


def resize(images: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """The central parts of uint8 (N, C, H, W) at `size`, a side or (height, width).

    None gives the central squares as they are. Pixels are block means where the blocks fit, else
    bicubic values, antialiased. A few images at a time are resized, to spare memory.

    >>> resize(torch.zeros(2, 3, 20, 30, dtype=torch.uint8), (8, 16)).shape
    torch.Size([2, 3, 8, 16])
    """
    height, width = images.shape[-2:]
    if size is None:
        size = min(height, width)
    target = (size, size) if isinstance(size, int) else size
    shape = _largest_of_shape(height, width, target)
    top = (height - shape[0]) // 2
    left = (width - shape[1]) // 2
    images = images[..., top : top + shape[0], left : left + shape[1]]
    if shape == target:
        return images.contiguous()
    interpolate = _interpolation(shape, target)
    resized = torch.empty(*images.shape[:2], *target, dtype=torch.uint8)
    for block, place in zip(images.split(256), resized.split(256), strict=True):
        place.copy_(interpolate(block.float()).round_().clamp_(0, 255))
    return resized


def _largest_of_shape(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The largest part of height x width that has the shape of target, in whole pixels."""
    if height * target[1] <= width * target[0]:
        return height, max(1, height * target[1] // target[0])
    return max(1, width * target[0] // target[1]), width


def _interpolation(shape: tuple[int, int], target: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    fits = shape[0] % target[0] == 0 and shape[1] % target[1] == 0
    if fits:
        return functools.partial(F.interpolate, size=target, mode="area")
    return functools.partial(F.interpolate, size=target, mode="bicubic", antialias=True)


def with_channels(images: Tensor, channels: int | None, name: str) -> Tensor:
    """uint8 (N, C, H, W) with so many channels: gray is repeated, and colour that is gray is one channel.

    Raises ValueError for colour pictures where one channel is wanted.
    """
    if channels is None or channels == images.shape[1]:
        return images
    if images.shape[1] == 1:
        return images.repeat(1, channels, 1, 1)
    first = images[:, :1]
    if channels == 1 and all(
        torch.equal(first[i : i + 256].expand(-1, images.shape[1], -1, -1), images[i : i + 256])
        for i in range(0, len(images), 256)
    ):
        return first.contiguous()
    raise ValueError(
        f"{channels} channels are wanted, and the images of {name} have {images.shape[1]} that differ: "
        "choose gray images, or convert these yourself"
    )
