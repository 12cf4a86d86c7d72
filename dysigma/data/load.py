"""One door to every data set."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

from .arrays import read_npz
from .cifar10 import read_cifar10
from .dataset import SPLITS, ImageData
from .folders import read_folder
from .leaves import leaves
from .pictures import resize, with_channels
from .shapes import shapes

# Drawn in memory: the function, and the side where none is asked for.
_DRAWN = {"shapes": (shapes, 16), "leaves": (leaves, 32)}


def load_data(
    source: str | Path,
    *,
    root: str | Path | None = None,
    split: str = "train",
    size: int | tuple[int, int] | None = None,
    num_images: int | None = None,
    seed: int = 0,
    channels: int | None = None,
) -> ImageData:
    """One split of a data set, on the CPU, in one uint8 tensor and no second copy.

    source: "shapes" or "leaves", drawn in memory; "cifar10" (Krizhevsky 2009); an .npz file; or a
        folder of pictures.
        .npz: uint8 `train_images` and `test_images` (N, H, W) or (N, H, W, C) and perhaps
        `train_labels`, ..., or `images` and perhaps `labels`, integers or text.
        Folder: any still pictures that Pillow reads, as 8-bit RGB; its subfolders name the classes,
        in folders called train and test (training, val, ..., in any case) or without them.
        Without test images every tenth is held out for testing; a single image serves for both.
    split: "train" or "test"; a validation split serves where there is none for testing.
    root: folder of CIFAR-10's official archive, its batches or cifar10.npz, or one of these files;
        where they are missing the archive is downloaded. Default: the environment variable
        DYSIGMA_DATA, else the user's cache.
    size: side, or (height, width), in pixels, of block means of the central part where they fit,
        else of bicubic values, antialiased. Default: the central square as it is; leaves: 32;
        shapes: 16.
    num_images: the first so many, but spread over all files of a folder. Default: all; of shapes
        and leaves 10,000 for training and 2,000 for testing.
    seed: which shapes or leaves.
    channels: 3 repeats gray; 1 takes pictures that are gray. Default: as they come.
    Raises ValueError for a bad argument or file, ConnectionError if CIFAR-10 is not here and cannot
    be downloaded. What is passed over, files or labels, is told in a warning.

    >>> load_data("leaves", split="test", size=16, num_images=10).images.shape
    torch.Size([10, 3, 16, 16])
    """
    size = _checked(split, size, num_images, channels)
    data = _read(source, root, split, size, num_images, seed)
    count = num_images or len(data)
    if count > len(data):
        raise ValueError(f"{data.name} has {len(data)} {split} images; {count} were asked for")
    if count < len(data):  # a slice alone would keep all the images in memory
        data = data.apply(lambda tensor: tensor[:count].clone())
    images = with_channels(data.images, channels, data.name)
    return replace(data, images=resize(images, size))


def _checked(
    split: str, size: int | tuple[int, int] | None, num_images: int | None, channels: int | None
) -> int | tuple[int, int] | None:
    """The size in plain ints; ValueError for arguments out of range."""
    sides = _sides(size)
    good = (
        split in SPLITS
        and len(sides) in (0, 2)
        and all(8 <= side <= 1024 for side in sides)
        and (num_images is None or num_images >= 1)
        and channels in (None, 1, 3)
    )
    if not good:
        raise ValueError(
            f"{split=}, {size=}, {num_images=}, {channels=}: choose split from {SPLITS}, "
            "8 <= size <= 1024, num_images >= 1, channels 1 or 3"
        )
    if not sides:
        return None
    height, width = sides
    return height if height == width else (height, width)


def _sides(size: object) -> tuple[int, ...]:
    """(height, width) of a size, () of None; (0, 0) of what is neither a side nor two."""
    if size is None:
        return ()
    try:
        given = size if isinstance(size, tuple | list) else (size, size)
        return tuple(operator.index(side) for side in given)
    except TypeError:
        return 0, 0


def _read(
    source: str | Path,
    root: str | Path | None,
    split: str,
    size: int | tuple[int, int] | None,
    num_images: int | None,
    seed: int,
) -> ImageData:
    if source in _DRAWN:
        draw, usual_side = _DRAWN[str(source)]
        count = num_images or (10_000 if split == "train" else 2_000)
        side = max(size) if isinstance(size, tuple) else size or usual_side
        return draw(count, side, seed, split)
    if source == "cifar10":
        return read_cifar10(root, split)
    path = Path(source).expanduser()
    if path.is_dir():
        return read_folder(path, split, size, num_images)
    if path.is_file() and path.suffix.lower() == ".npz":
        return read_npz(path, split)
    if path.is_file():
        raise ValueError(f"{path} is a file, and no .npz: give the folder that holds the pictures")
    raise ValueError(
        f"no data {str(source)!r}; have {[*_DRAWN]}, 'cifar10', .npz files, folders of pictures. If "
        "images moved, name the place where they lie now (--data)"
    )
