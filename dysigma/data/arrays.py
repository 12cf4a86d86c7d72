"""Images and labels in an .npz file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from .dataset import ImageData
from .splits import choose_split, held_out, split_named

# What arrays are called, by what they hold: here, in Keras, in scikit-learn, and by numpy.savez
# without names. The first that is there is read.
_NAMES = {
    "images": ("images", "image", "x", "data", "arr_0"),
    "labels": ("labels", "label", "y", "targets", "target", "arr_1"),
    "exact": ("exact",),
}

Array = NDArray[Any]

# (split or None, "images", "labels" or "exact") -> name of the array
Names = dict[tuple[str | None, str], str]


def read_npz(file: Path, split: str) -> ImageData:
    """The images of one split of an .npz file.

    Arrays: uint8 `train_images` and `test_images` (N, H, W) or (N, H, W, 1 or 3), and perhaps
    `train_labels` and so on; or `images` and perhaps `labels`, of which every tenth is held out.
    Labels are integers or text, (N,) or (N, 1). `val_images` serve where `test_images` are missing;
    names like x_train and y_train are understood. Raises ValueError for other arrays and for
    damaged files.
    """
    with _open(file) as archive:
        names = _understand(archive.files, file)
        source, is_whole = _source(split, names, archive.files, file)
        images = _channels_first(_read(archive, names[source, "images"], file), file)
        labels, class_names = _read_labels(archive, names, source, len(images), file)
        exact = None
        if (source, "exact") in names:
            exact = torch.from_numpy(_native(_read(archive, names[source, "exact"], file)))
    data = ImageData(images, labels, file.name, class_names, exact)
    if not is_whole:
        return data
    numbers = held_out(len(data), split, file.name)
    return data.apply(lambda tensor: tensor[numbers])


def _open(file: Path) -> NpzFile:
    try:
        archive = np.load(file, allow_pickle=False)
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise _unreadable(file, error) from error
    if not isinstance(archive, NpzFile):
        raise _unreadable(file, "it holds one array, as an .npy file does")
    return archive


def _read(archive: NpzFile, name: str, file: Path) -> Array:
    try:
        return archive[name]
    except Exception as error:  # as above
        raise _unreadable(file, error) from error


def _unreadable(file: Path, cause: object) -> ValueError:
    return ValueError(
        f"{file}: not a readable .npz of plain arrays ({cause}); write it with numpy.savez"
    )


def _understand(found: Sequence[str], file: Path) -> Names:
    """What the arrays hold, by their names; a warning tells which images are passed over."""
    meanings: dict[tuple[str | None, str], list[str]] = {}
    for name in found:
        split, rest = _split_of_array(name)
        for what, known in _NAMES.items():
            if rest in known:
                meanings.setdefault((split, what), []).append(name)
    names = {}
    for (split, what), candidates in meanings.items():
        known = _NAMES[what]
        names[split, what] = min(candidates, key=lambda name: known.index(_split_of_array(name)[1]))
    has_splits = any(split for split, what in names if what == "images")
    if has_splits and (None, "images") in names:
        warnings.warn(
            f"{file}: {names[None, 'images']!r} was passed over, because other arrays hold the splits",
            stacklevel=2,
        )
    return names


def _split_of_array(name: str) -> tuple[str | None, str]:
    """("train", "images") of train_images, ("test", "x") of x_test, (None, "images") of images."""
    words = name.casefold().split("_")
    for place in (0, -1):
        split = split_named(words[place])
        if split and len(words) > 1:
            del words[place]
            return split, "_".join(words)
    return None, name.casefold()


def _source(wanted: str, names: Names, found: Sequence[str], file: Path) -> tuple[str | None, bool]:
    """(the split of the arrays to read, whether every tenth of their images is to be held out)."""
    there = [split for split, what in names if what == "images"]
    test = choose_split("test", there)
    if "train" in there and test is None:
        warnings.warn(
            f"{file} has no test images: every tenth training image is held out for testing",
            stacklevel=2,
        )
        return "train", True
    if there == [None]:
        return None, True
    source = "train" if wanted == "train" else test
    if source is None or source not in there:
        raise ValueError(
            f"{file} holds no {wanted} images; expected {wanted}_images or images, found {[*found]}"
        )
    return source, False


def _channels_first(array: Array, file: Path) -> Tensor:
    """(N, H, W) or (N, H, W, C) -> (N, C, H, W) in the same memory, so that no second copy exists."""
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"{file}: images must be uint8 (N, H, W) or (N, H, W, 1 or 3), from 0 to 255; "
            f"got {images.dtype} {tuple(array.shape)}"
        )
    count, height, width, channels = images.shape
    for image in images:
        image.view(channels, height, width).copy_(image.permute(2, 0, 1).clone())
    return images.view(count, channels, height, width)


def _read_labels(
    archive: NpzFile, names: Names, source: str | None, count: int, file: Path
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """int64 labels (N,) of the source and, where they are text, the names of the classes."""
    if (source, "labels") not in names:
        return None, None
    labels = _column(_read(archive, names[source, "labels"], file))
    if labels.ndim == 2 and len(labels) == count:
        warnings.warn(
            f"{file}: {names[source, 'labels']} is {labels.shape}, not one class for each image, and "
            "was passed over (of one-hot labels, save the argmax)",
            stacklevel=2,
        )
        return None, None
    if labels.dtype.kind not in "US":
        tensor = torch.from_numpy(_native(labels))
        return (tensor if tensor.is_floating_point() else tensor.long()), None
    texts = set()
    for (split, what), name in names.items():  # of all splits, so that labels mean the same in each
        if what == "labels" and (split is None) == (source is None):
            texts.update(_texts(_column(_read(archive, name, file))))
    classes = sorted(texts)
    number = {text: index for index, text in enumerate(classes)}
    return torch.tensor([number[text] for text in _texts(labels)]), tuple(classes)


def _native(array: Array) -> Array:
    """The array in this machine's order of bytes, as torch wants it; FITS and IDX files are big-endian."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _column(labels: Array) -> Array:
    """(N,) of labels (N,) or (N, 1)."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _texts(labels: Array) -> list[str]:
    texts = np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else labels
    return [str(text) for text in texts.tolist()]
