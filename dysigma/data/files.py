"""Your own images: .npz files and folders of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .dataset import SPLITS, ImageData


def _resize(images: Tensor, size: int | None) -> Tensor:
    """The central squares of uint8 (N, C, H, W), at `size` if given; a few images at a time, to spare memory."""
    side = min(images.shape[-2:])
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    images = images[..., top : top + side, left : left + side]
    if size is None or size == side:
        return images.contiguous()
    mode = "bicubic" if side % size else "area"
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for block, resized in zip(images.split(256), out.split(256), strict=True):
        real = F.interpolate(block.float(), (size, size), mode=mode, antialias=mode == "bicubic")
        resized.copy_(real.round_().clamp_(0, 255))
    return out


def _npz(path: Path, split: str) -> ImageData:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = file.files
            prefix = f"{split}_" if any(f"{name}_images" in found for name in SPLITS) else ""
            keys = {
                key: prefix + key for key in ("images", "labels", "exact") if prefix + key in found
            }
            arrays = {key: torch.from_numpy(file[name]) for key, name in keys.items()}
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise ValueError(
            f"{path}: not a readable .npz of plain arrays ({error}); write it with numpy.savez"
        ) from error
    if "images" not in arrays:
        raise ValueError(
            f"{path} holds no {split} images; expected {split}_images or images, found {found}"
        )
    images, labels = arrays["images"].contiguous(), arrays.get("labels")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"{path}: images must be uint8 (N, H, W[, 1 or 3]); got {images.dtype} {(*images.shape,)}"
        )
    count, height, width, channels = images.shape
    for image in images:  # in place, so that a second copy of all never exists
        image.view(channels, height, width).copy_(image.permute(2, 0, 1).clone())
    if labels is not None and not labels.is_floating_point():
        labels = labels.long()
    data = ImageData(
        images.view(count, channels, height, width), labels, path.name, exact=arrays.get("exact")
    )
    return data if prefix else data._map(lambda x: x[_held_out(count, split)])


def _held_out(count: int, split: str) -> list[int]:
    """The split's share of images that have no splits: every tenth is a test image."""
    every = min(count, 10)
    return [i for i in range(count) if (i % every == every - 1) == (split == "test")]


def _stack(blocks: Iterable[tuple[Any, Tensor]], count: int) -> Tensor:
    """`count` named blocks (n, ...) of one shape -> one tensor (count n, ...), filled as they come: none is kept."""
    out = torch.empty(0)
    for i, (name, block) in enumerate(blocks):
        out = block.new_empty(count, *block.shape) if i == 0 else out
        if block.shape != out.shape[1:]:
            sides = f"{block.shape[-1]} pixels wide as a square, those before are {out.shape[-1]}"
            raise ValueError(
                f"{name} is {sides}: give a size to resize all of them to (--image-size)"
            )
        out[i] = block
    return out.flatten(0, 1)


def _folder(path: Path, split: str, size: int | None, num_images: int | None) -> ImageData:
    found = (
        f.relative_to(path)
        for f in path.rglob("*")
        if f.suffix.lower() in (".png", ".jpg", ".jpeg")
    )
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.parts))
    depth = int(any((path / name).is_dir() for name in SPLITS))
    if depth:
        files = [f for f in files if f.parts[0] in SPLITS]
    # Named before a split is taken, so that labels mean the same in both.
    classes = sorted({"".join(f.parts[depth:-1][:1]) for f in files})
    files = (
        [f for f in files if f.parts[0] == split]
        if depth
        else [files[i] for i in _held_out(len(files), split)]
    )
    if not files:
        raise ValueError(
            f"{path} has no PNG or JPEG files for the {split} split (CIFAR-10 is called 'cifar10')"
        )
    if len(classes) > 1 and not classes[0]:
        raise ValueError(
            f"{path}: its subfolders name classes, but some images lie outside them; move those"
        )
    count = min(num_images or len(files), len(files))
    files = [files[i * len(files) // count] for i in range(count)]
    images = _stack(((path / f, _resize(_decode(path / f), size)) for f in files), count)
    if not classes[0]:
        return ImageData(images, None, path.name)
    return ImageData(
        images,
        torch.tensor([classes.index(f.parts[depth]) for f in files]),
        path.name,
        tuple(classes),
    )


def _decode(file: Path) -> Tensor:
    """A PNG or JPEG as RGB uint8 (1, 3, H, W), turned upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(
            f"{file} cannot be read as an image of 8 bits a channel ({error})"
        ) from error
