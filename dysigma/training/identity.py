"""Which images a run was trained on, by what they are and not by where they lie."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from ..data.dataset import ImageData
from ..runs.files import RunError

# Data that are known by name; everything else is a path.
NAMED = ("shapes", "leaves", "gaussian-fields", "cifar10")


def identity(data: ImageData, *, with_labels: bool = False) -> dict[str, Any]:
    """Number, shape (C, H, W) and SHA-256 of images in their order, and of their labels if those matter.

    >>> import torch
    >>> found = identity(ImageData(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)))
    >>> found["images"], found["shape"], found["sha256"][:8]
    (2, [1, 4, 4], '66687aad')
    """
    content = hashlib.sha256(data.images.cpu().contiguous().numpy().data)
    if with_labels and data.labels is not None:
        content.update(data.labels.cpu().contiguous().numpy().data)
    return {
        "images": len(data),
        "shape": list(data.images.shape[1:]),
        "sha256": content.hexdigest(),
    }


def check_images(recorded: dict[str, Any], found: dict[str, Any], what: str, run: Path) -> None:
    """Raise RunError unless the images found are the recorded ones.

    what: which images, for the message.
    """
    if found == recorded:
        return
    difference = "as many there as here, but other ones or in another order"
    if (found["images"], found["shape"]) != (recorded["images"], recorded["shape"]):
        difference = f"{_count(recorded)} there, {_count(found)} here"
    raise RunError(
        f"{what} are not those that {run} was begun with ({difference}); name the place where those "
        "lie with --data or --data-root. The run is left as it is"
    )


def check_place(saved: str, given: str, run: Path) -> None:
    """For a run that recorded no images: take another path with a warning, refuse other named data."""
    if saved == given:
        return
    if saved in NAMED or given in NAMED:
        raise RunError(
            f"{run} is of another configuration (data {saved!r} there, {given!r} here); resume it "
            "as it was, or choose another --out"
        )
    warnings.warn(
        f"{run} was begun before runs recorded their images, so nothing tells whether {given} holds "
        f"those of {saved}",
        stacklevel=3,
    )


def _count(images: dict[str, Any]) -> str:
    return f"{images['images']:,} of {' x '.join(map(str, images['shape']))}"
