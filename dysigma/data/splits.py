"""Which images are for training and which are held out: by the names that people give, or by counting."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}

# "Train", "test_set", "val2017" and "train_64x64" name splits; "train_station" is a class.
_SPLIT = re.compile(r"([a-z]+?)[\W_]*(?:set|split|data|images?|imgs|\d[\dx]*)?")


def split_named(name: str) -> str | None:
    """The split that a folder or an array of this name holds: "train", "test", "validation" or None.

    >>> [split_named(name) for name in ("Training", "test_set", "val2017", "train_station", "cats")]
    ['train', 'test', 'validation', None, None]
    """
    found = _SPLIT.fullmatch(name.casefold())
    return _WORDS.get(found.group(1)) if found else None


def choose_split(wanted: str, there: Iterable[str | None]) -> str | None:
    """Of the splits that are there, the one to read: "validation" serves where "test" is missing.

    None where the wanted images have to be taken from all images, or from the training images, by
    held_out.
    """
    known = set(there)
    if wanted == "test" and "test" not in known and "validation" in known:
        return "validation"
    return wanted if wanted in known else None


def held_out(count: int, wanted: str, name: str) -> list[int]:
    """The image numbers of a split of `count` images that have none: every tenth is a test image.

    Of two to nine images the last is the test image. A single image is used for both, with a
    warning.

    >>> held_out(12, "test", "pictures"), held_out(3, "train", "pictures")
    ([9], [0, 1])
    """
    if count == 1:
        warnings.warn(
            f"{name} has one image: it is used for training and for testing, so validation losses "
            "say nothing about other images",
            stacklevel=2,
        )
        return [0]
    every = min(count, 10)
    is_test = wanted == "test"
    return [number for number in range(count) if (number % every == every - 1) == is_test]
