"""One door to every data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .cifar10 import (
    _cifar10,
)
from .dataset import SPLITS, ImageData
from .files import _folder, _npz, _resize
from .leaves import leaves
from .shapes import shapes


def load_data(
    source: str | Path,
    *,
    root: str | Path | None = None,
    split: str = "train",
    size: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> ImageData:
    """One split of a data set, on the CPU, in one uint8 tensor and no second copy.

    source: "shapes" or "leaves", both drawn in memory; "cifar10" (Krizhevsky 2009); an .npz file of uint8 `train_images` and `test_images` (N, H, W[, C])
        and perhaps `train_labels`, `train_exact`, ..., or of `images` and perhaps `labels`; or a folder of PNG/JPEG
        files, its subfolders the classes, if any, in `train` and `test` or not. Without splits every tenth is for test.
    root: folder of the official archive, its batches or cifar10.npz, or one of these files; where they are missing the
        archive is downloaded. Default: the environment variable DYSIGMA_DATA, else the user's cache.
    size: side in pixels, of block means of the central square where they fit, else of bicubic values, antialiased.
        Default: the central square as it is; leaves: 32.
    num_images: the first so many, but spread over all files of a folder. Default: all; leaves: 10,000 and 2,000.
    seed: which leaves.
    Raises ValueError for a bad argument or file, ConnectionError if CIFAR-10 is not here and cannot be downloaded.
    """
    if (
        split not in SPLITS
        or not (size is None or 8 <= size <= 1024)
        or not (num_images is None or num_images >= 1)
    ):
        raise ValueError(
            f"{split=}, {size=}, {num_images=}: choose from {SPLITS}, 8 <= size <= 1024, num_images >= 1"
        )
    path = Path(source).expanduser()
    if source == "leaves":
        return leaves(
            num_images or (10_000 if split == "train" else 2_000), size or 32, seed, split
        )
    if source == "shapes":
        return shapes(
            num_images or (10_000 if split == "train" else 2_000), size or 16, seed, split
        )
    if source == "cifar10":
        data = _cifar10(root, split)
    elif path.suffix == ".npz" and path.is_file():
        data = _npz(path, split)
    elif path.is_dir():
        data = _folder(path, split, size, num_images)
    else:
        raise ValueError(
            f"no data {str(source)!r}; have 'shapes', 'leaves', 'cifar10', .npz files, folders of PNG/JPEG files"
        )
    count = num_images or len(data)
    if count > len(data):
        raise ValueError(f"{data.name} has {len(data)} {split} images; {count} were asked for")
    if count < len(data):
        data = data._map(
            lambda x: x[:count].clone()
        )  # a slice alone would keep all the images in memory
    return replace(data, images=_resize(data.images, size))
