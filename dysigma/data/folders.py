"""A folder of pictures: its files, its splits, its classes."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dataset import ImageData
from .pictures import is_picture, picture_endings, read_picture, resize
from .splits import choose_split, held_out, named_like_splits, split_named

# Files that often lie beside pictures and are none.
_NOTES = {".caption", ".csv", ".db", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".pdf"}
_NOTES |= {".py", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml"}

Parts = tuple[str, ...]


@dataclass(frozen=True)
class _Picture:
    """A file by its path's parts below the folder, its split and its class, None where it has none."""

    parts: Parts
    split: str | None = None
    label: str | None = None


def read_folder(
    folder: Path,
    split: str,
    size: int | tuple[int, int] | None = None,
    num_images: int | None = None,
) -> ImageData:
    """The pictures of one split of a folder, in the order of their paths, RGB.

    Folders named like splits (train, training; test, testing; val, valid, validation; in any case)
    hold the splits; without one for testing, every tenth picture is held out. The other folders
    name the classes. Symbolic links are followed. num_images are spread evenly over all files.
    Raises ValueError when there are no pictures, when one cannot be read, or when splits and
    classes cannot be told apart.
    """
    everything = _list_pictures(folder)
    pictures = _sort_into_splits(everything, folder)
    chosen = _choose(pictures, split, folder)
    classes = _classes(pictures)
    labels = _labels(chosen, pictures, classes, folder)
    count = min(num_images or len(chosen), len(chosen))
    places = [number * len(chosen) // count for number in range(count)]
    images = _read(folder, [chosen[place] for place in places], size)
    if labels is None:
        return ImageData(images, None, folder.name)
    return ImageData(images, torch.tensor(labels)[places], folder.name, tuple(classes))


def _list_pictures(folder: Path) -> list[Parts]:
    """All picture files below a folder, sorted; a warning tells how many others there are."""
    files: list[Parts] = []
    _walk(folder, (), frozenset(), files)
    pictures = []
    others: Counter[str] = Counter()
    for parts in sorted(files):
        file = folder.joinpath(*parts)
        ending = file.suffix.lower()
        if ending in picture_endings():
            pictures.append(parts)
        elif ending in _NOTES:
            continue
        elif is_picture(file):
            pictures.append(parts)
        elif ending:
            others[ending] += 1
    if others:
        endings = ", ".join(f"{number} of {ending}" for ending, number in others.most_common(5))
        warnings.warn(
            f"{folder}: {others.total()} files are no pictures that can be read here and were "
            f"passed over ({endings})",
            stacklevel=2,
        )
    if not pictures:
        arrays = " Its .npz files are data sets of their own: name one." if ".npz" in others else ""
        raise ValueError(
            f"{folder} holds no pictures that can be read here (CIFAR-10 is called 'cifar10').{arrays}"
        )
    return pictures


def _walk(
    folder: Path, above: Parts, ancestors: frozenset[tuple[int, int]], files: list[Parts]
) -> None:
    """Append the files below a folder; links are followed, but not back into a folder they lie in."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror})") from error
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        parts = (*above, entry.name)
        path = Path(entry.path)
        if path.is_dir():  # of a link to itself, which os.DirEntry raises at, False
            _walk(path, parts, ancestors | {here}, files)
        elif path.is_file() or entry.is_symlink():  # a link to nowhere is told when it is read
            files.append(parts)


def _sort_into_splits(files: Sequence[Parts], folder: Path) -> list[_Picture]:
    """Each picture with its split and its class, by the names of its folders."""
    depth = _depth_of_splits(files)
    if depth is not None:
        return _in_split_folders(files, depth, folder)
    if _are_classes_of_splits(files):  # cat/train/1.png
        return [_Picture(parts, split_named(parts[1]), parts[0]) for parts in files]
    _refuse_test_without_train(files, folder)
    _refuse_names_like_splits(files, folder)
    return [_Picture(parts, None, _folder_at(parts, 0)) for parts in files]


def _folder_at(parts: Parts, depth: int) -> str | None:
    """The folder at this depth of a file's path; None where the file itself or nothing is there."""
    return parts[depth] if len(parts) > depth + 1 else None


def _depth_of_splits(files: Sequence[Parts]) -> int | None:
    """The depth of the folder for training; a folder that holds everything may lie around it."""
    depth = 0
    while True:
        names = {_folder_at(parts, depth) for parts in files}
        if any(name and split_named(name) == "train" for name in names):
            return depth
        if len(names) > 1 or None in names:
            return None
        depth += 1


def _in_split_folders(files: Sequence[Parts], depth: int, folder: Path) -> list[_Picture]:
    names = sorted({parts[depth] for parts in files if _folder_at(parts, depth)})
    others = [name for name in names if not split_named(name)]
    training = [name for name in names if split_named(name) == "train"]
    if len(training) > 1:
        raise ValueError(
            f"{folder} has several folders for training, {training}: keep one of them there"
        )
    if others and len(others) + 1 == len(names):
        raise ValueError(
            f"{folder} has a folder {training[0]!r} beside {others[:5]}: is that the training split, or "
            "a class? Give another name to the class, or put the other folders elsewhere"
        )
    pictures = []
    for parts in files:
        name = _folder_at(parts, depth)
        split = split_named(name) if name else None
        if split:
            pictures.append(_Picture(parts, split, _folder_at(parts, depth + 1)))
    if len(pictures) < len(files):
        warnings.warn(
            f"{folder}: {len(files) - len(pictures)} pictures lie outside the folders of its splits "
            "and were passed over",
            stacklevel=2,
        )
    return pictures


def _are_classes_of_splits(files: Sequence[Parts]) -> bool:
    names = {_folder_at(parts, 1) for parts in files}
    splits = {split_named(name) if name else None for name in names}
    return "train" in splits and None not in splits


def _refuse_test_without_train(files: Sequence[Parts], folder: Path) -> None:
    names = {_folder_at(parts, 0) or "" for parts in files}
    held_out_alone = sorted(
        # A class may be called valid, beside invalid.
        name
        for name in names
        if split_named(name) and (len(names) == 1 or name.casefold() != "valid")
    )
    if held_out_alone:
        raise ValueError(
            f"{folder} has a folder {held_out_alone[0]!r} and none called train: name the folder of the "
            "training pictures train"
        )


def _refuse_names_like_splits(files: Sequence[Parts], folder: Path) -> None:
    """Refuse mnist_train beside mnist_test: as classes, the network would train on the test pictures."""
    depth = 0
    names = {_folder_at(parts, depth) for parts in files}
    while len(names) == 1 and None not in names:
        depth += 1
        names = {_folder_at(parts, depth) for parts in files}
    found = named_like_splits(name for name in names if name)
    if found:
        raise ValueError(
            f"{folder} has the folders {found[0]!r} and {found[1]!r}, which sound like splits: call them "
            "train and test if they are, and give them other names if they are classes"
        )


def _choose(pictures: Sequence[_Picture], split: str, folder: Path) -> list[_Picture]:
    """The pictures of one split, held out by counting where no folder holds them."""
    test = _test_split(pictures)
    if test is not None:
        wanted = test if split == "test" else "train"
        return [picture for picture in pictures if picture.split == wanted]
    if pictures[0].split == "train":
        warnings.warn(
            f"{folder} has no test pictures: every tenth training picture is held out for testing",
            stacklevel=2,
        )
    return [pictures[number] for number in held_out(len(pictures), split, str(folder))]


def _test_split(pictures: Sequence[_Picture]) -> str | None:
    """The split that serves for testing: one with classes, if that for training has them."""
    there = {picture.split for picture in pictures}
    named = {picture.split for picture in pictures if picture.label}
    if "train" in named and "test" not in named and "validation" in named:
        return "validation"
    return choose_split("test", there)


def _classes(pictures: Sequence[_Picture]) -> list[str]:
    """The names of the classes: of both splits, so that labels mean the same in both."""
    used = {None, "train", _test_split(pictures)}
    return sorted(
        {picture.label for picture in pictures if picture.split in used and picture.label}
    )


def _labels(
    chosen: Sequence[_Picture], pictures: Sequence[_Picture], classes: list[str], folder: Path
) -> list[int] | None:
    """The numbers of the classes of the chosen pictures, or None where their split has no classes."""
    split = chosen[0].split
    alike = [picture for picture in pictures if picture.split == split]
    without = [picture for picture in alike if not picture.label]
    if not without:
        number = {name: index for index, name in enumerate(classes)}
        return [number[picture.label] for picture in chosen if picture.label]
    if len(without) < len(alike):
        raise ValueError(
            f"{folder}: its subfolders name classes, but some images lie outside them, as "
            f"{'/'.join(without[0].parts)}; move those"
        )
    if classes:
        warnings.warn(
            f"{folder}: the {len(alike)} pictures of the {split} split lie in no folders of classes, "
            "so they have no labels",
            stacklevel=2,
        )
    return None


def _read(folder: Path, pictures: Sequence[_Picture], size: int | tuple[int, int] | None) -> Tensor:
    """The pictures as one tensor (N, 3, H, W), which is filled as they come."""
    notes: Counter[str] = Counter()
    images = torch.empty(0)
    for number, picture in enumerate(pictures):
        file = folder.joinpath(*picture.parts)
        image = resize(read_picture(file, notes)[None], size)[0]
        if number == 0:
            images = image.new_empty(len(pictures), *image.shape)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{file} is {image.shape[-1]} pixels wide as a square, those before are "
                f"{images.shape[-1]}: give a size to resize all of them to (--image-size)"
            )
        images[number] = image
    for note, number in notes.items():
        warnings.warn(f"{folder}: {number} of {len(pictures)} pictures have {note}", stacklevel=2)
    return images
