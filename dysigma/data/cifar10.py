"""CIFAR-10, verified before it is read."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Set
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..downloads import check_digest, data_folder, download
from .dataset import ImageData
from .files import _npz, _stack

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

CIFAR10_BYTES, CIFAR10_MD5 = 170_498_071, "c58f30108f718f92721af3b95e74349a"

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


def _cifar10(root: str | Path | None, split: str) -> ImageData:
    place = data_folder(root)
    if place.suffix in (".gz", ".npz") and not place.is_file():
        raise ValueError(
            f"there is no CIFAR-10 file {place}: give an existing file, or the folder that holds it"
        )
    archive = place / "cifar-10-python.tar.gz"
    for found in (place, place / "cifar-10-batches-py", archive, place / "cifar10.npz"):
        if found.is_file() and found.suffix == ".npz":
            return replace(_npz(found, split), class_names=CIFAR10_CLASSES)
        if found.is_file() or all((found / name).is_file() for name in CIFAR10_BATCHES[split]):
            return _official(found, split)
    download(
        "CIFAR-10", CIFAR10_URL, archive, CIFAR10_BYTES, CIFAR10_MD5, "--data-root or DYSIGMA_DATA"
    )
    return _official(archive, split)


def _official(place: Path, split: str) -> ImageData:
    """CIFAR-10 from the official archive or its extracted folder: verified, then unpickled, arrays only."""
    hashes, contents = CIFAR10_BATCHES[split], {}
    try:
        files = _read_batches(place, hashes.keys())
        for name, expected in hashes.items():
            raw = files.pop(name)
            check_digest(BytesIO(raw), name, expected)
            contents[name] = _ArraysOnly(
                BytesIO(raw), encoding="bytes"
            ).load()  # Python 2 wrote it: strings are bytes
        labels = torch.cat([torch.tensor(contents[name][b"labels"]) for name in hashes])
        images = _stack(
            ((name, torch.from_numpy(contents.pop(name)[b"data"])) for name in hashes), len(hashes)
        )
        return ImageData(images.view(-1, 3, 32, 32), labels, "cifar10", CIFAR10_CLASSES)
    except Exception as error:  # a damaged archive or pickle raises almost anything
        raise ValueError(
            f"{place} is not the official CIFAR-10 ({error}): delete it and run again"
        ) from error


def _read_batches(place: Path, names: Set[str]) -> dict[str, bytes]:
    """The files of these names; nothing in an archive is ever extracted to the disk."""
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in names}
    with place.open("rb") as stream:
        check_digest(stream, "the archive", CIFAR10_MD5)
    with tarfile.open(place, "r:gz") as tar:
        members = (
            (Path(member.name).name, tar.extractfile(member)) for member in tar if member.isreg()
        )
        files = {name: file.read() for name, file in members if name in names and file}
    if missing := names - files.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return files


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers; every other name in a pickle is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"a pickle asks for {module}.{name}, which is no numpy array")
