"""CIFAR-10, verified before it is read."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Mapping, Set
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..downloads import check_digest, data_folder, download
from .arrays import read_npz
from .dataset import ImageData

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

CIFAR10_BYTES = 170_498_071

CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"

CIFAR10_BATCHES = {  # the files of each split and their MD5
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def read_cifar10(root: str | Path | None, split: str) -> ImageData:
    """CIFAR-10 from the official archive, from its batches or from an .npz file.

    root: a folder that holds one of these, or the file itself; None is the data folder. An archive
    that is missing is downloaded. Raises ValueError for a file that is not CIFAR-10.
    """
    place = data_folder(root)
    if place.suffix in (".gz", ".npz") and not place.is_file():
        raise ValueError(
            f"there is no CIFAR-10 file {place}: give an existing file, or the folder that holds it"
        )
    archive = place / "cifar-10-python.tar.gz"
    for found in (place, place / "cifar-10-batches-py", archive, place / "cifar10.npz"):
        if found.is_file() and found.suffix == ".npz":
            return replace(read_npz(found, split), class_names=CIFAR10_CLASSES)
        if found.is_file() or all((found / name).is_file() for name in CIFAR10_BATCHES[split]):
            return _read_official(found, split)
    places = "--data-root or DYSIGMA_DATA"
    download("CIFAR-10", CIFAR10_URL, archive, CIFAR10_BYTES, CIFAR10_MD5, places)
    return _read_official(archive, split)


def _read_official(place: Path, split: str) -> ImageData:
    """The official archive or its extracted folder: verified, then unpickled, arrays only."""
    try:
        return _unpickle(
            _read_batches(place, CIFAR10_BATCHES[split].keys()), CIFAR10_BATCHES[split]
        )
    except Exception as error:  # a damaged archive or pickle raises almost anything
        raise ValueError(
            f"{place} is not the official CIFAR-10 ({error}): move it away and run again"
        ) from error


def _read_batches(place: Path, names: Set[str]) -> dict[str, bytes]:
    """The files of these names; nothing in an archive is ever extracted to the disk."""
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in names}
    with place.open("rb") as stream:
        check_digest(stream, "the archive", CIFAR10_MD5)
    files = {}
    with tarfile.open(place, "r:gz") as tar:
        for member in tar:
            name = Path(member.name).name
            content = tar.extractfile(member) if member.isreg() and name in names else None
            if content is not None:
                files[name] = content.read()
    missing = names - files.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return files


def _unpickle(files: dict[str, bytes], hashes: Mapping[str, str]) -> ImageData:
    """The images of the batches, each verified; a batch is dropped as soon as it is copied."""
    images = torch.empty(0)
    labels = []
    for number, (name, expected) in enumerate(hashes.items()):
        raw = files.pop(name)
        check_digest(BytesIO(raw), name, expected)
        batch = _ArraysOnly(BytesIO(raw), encoding="bytes").load()  # Python 2 wrote it
        pixels = torch.from_numpy(batch[b"data"])
        if number == 0:
            images = pixels.new_empty(len(hashes), *pixels.shape)
        if pixels.shape != images.shape[1:]:
            raise ValueError(f"{name} holds {[*pixels.shape]}, those before {[*images.shape[1:]]}")
        images[number] = pixels
        labels.append(torch.tensor(batch[b"labels"]))
    pictures = images.view(-1, 3, 32, 32)
    return ImageData(pictures, torch.cat(labels), "cifar10", CIFAR10_CLASSES)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers; any other name is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"a pickle asks for {module}.{name}, which is no numpy array")
