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

_WORD = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)), re.IGNORECASE)

# "Train", "test_set", "val2017" and "train_64x64" name splits; "train_station" is a class.
_SPLIT = re.compile(r"([a-z]+?)[\W_]*(?:set|split|data|images?|imgs|\d[\dx]*)?")


def split_named(name: str) -> str | None:
    """The split that a folder or an array of this name holds: "train", "test", "validation" or None.

    >>> [split_named(name) for name in ("Training", "test_set", "val2017", "train_station", "cats")]
    ['train', 'test', 'validation', None, None]
    """
    found = _SPLIT.fullmatch(name.casefold())
    return _WORDS.get(found.group(1)) if found else None


def named_like_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ in the word for a split alone, one for training first; None if there are none.

    >>> named_like_splits(["dataset-train", "dataset-test"]), named_like_splits(["train_station", "cats"])
    (('dataset-train', 'dataset-test'), None)
    """
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        word = _WORD.search(name)
        if word is None:
            continue
        rest = _without_number(f"{name[: word.start()]}*{name[word.end() :]}".casefold())
        found.setdefault(rest, {})[_WORDS[word.group().casefold()]] = name
    for by_split in found.values():
        if "train" in by_split and len(by_split) > 1:
            other = by_split.get("test") or by_split["validation"]
            return by_split["train"], other
    return None


def _without_number(name: str) -> str:
    """The name without the digits that it begins with: 01_train and 02_test are splits too."""
    return name.lstrip("0123456789")


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
