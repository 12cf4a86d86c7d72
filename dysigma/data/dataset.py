"""Images as one uint8 tensor, and batches of them as functions of (seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import to_device
from ..images import to_real
from ..randomness import generator

SPLITS = ("train", "test")


@dataclass(eq=False)
class ImageData:
    """A data set in memory.

    images: uint8 (N, C, H, W).
    labels: int64 (N,), or None.
    name: what messages call the data set.
    class_names: one name for each value of labels, or None.
    exact: bool (N,), False where an image only approximates the original; None where all are exact.

    Raises ValueError when the parts do not fit together.

    >>> data = ImageData(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 1, 2]))
    >>> len(data), data.num_classes
    (4, 3)
    """

    images: Tensor
    labels: Tensor | None = None
    name: str = "images"
    class_names: tuple[str, ...] | None = None
    exact: Tensor | None = None

    def __post_init__(self) -> None:
        images = self.images
        if images.ndim != 4 or images.dtype != torch.uint8 or 0 in images.shape:
            raise ValueError(
                f"{self.name}: need uint8 images (N, C, H, W), none of them 0; "
                f"got {images.dtype} {[*images.shape]}"
            )
        self._check_column("labels", self.labels, torch.int64)
        self._check_column("exact", self.exact, torch.bool)
        self._check_range_of_labels()

    def _check_column(self, name: str, column: Tensor | None, dtype: torch.dtype) -> None:
        if column is None:
            return
        if column.dtype != dtype or column.shape != (len(self),):
            raise ValueError(
                f"{self.name}: {name} must be {dtype} ({len(self)},); "
                f"got {column.dtype} {[*column.shape]}"
            )

    def _check_range_of_labels(self) -> None:
        if self.labels is None or self.num_classes is None:
            return
        lowest = int(self.labels.min())
        highest = int(self.labels.max())
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"{self.name}: labels must lie in [0, {max(self.num_classes, 1)}); "
                f"got values from {lowest} to {highest}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """How many class_names, or else one more than the largest label; None without labels."""
        if self.labels is None:
            return None
        if self.class_names:
            return len(self.class_names)
        return int(self.labels.max()) + 1

    @property
    def originals(self) -> Tensor:
        """The images that are exact, (M, C, H, W)."""
        return self.images if self.exact is None else self.images[self.exact]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on `device`; where it already is there, in the same memory."""
        return self.apply(lambda tensor: tensor.to(device))

    def apply(self, function: Callable[[Tensor], Tensor]) -> ImageData:
        """The data set whose images, labels and exact are function(what they are here).

        >>> data = ImageData(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
        >>> data.apply(lambda tensor: tensor[:2]).labels.tolist()
        [0, 1]
        """
        return replace(
            self,
            images=function(self.images),
            labels=None if self.labels is None else function(self.labels),
            exact=None if self.exact is None else function(self.exact),
        )


def batch(
    data: ImageData, seed: int, step: int, batch_size: int, *, flip: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The batch of one training step: a pure function of (seed, step), whatever device holds the data.

    Images are consumed as a stream, each epoch in a new order; `flip` mirrors each with
    probability 1/2. Returns x0 (B, C, H, W) float32 in [-1, 1], labels (B,) int64 or None, and
    indices (B,) int64, all on the data's device. Raises ValueError if step < 0 or batch_size < 1.

    >>> data = ImageData(torch.zeros(6, 3, 8, 8, dtype=torch.uint8))
    >>> first, second = (batch(data, seed=0, step=step, batch_size=3) for step in (0, 1))
    >>> sorted(first[2].tolist() + second[2].tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if step < 0 or batch_size < 1:
        raise ValueError(f"batch needs step >= 0 and batch_size >= 1; got {step=}, {batch_size=}")
    device = data.images.device
    indices = to_device(_stream(len(data), seed, step * batch_size, batch_size), device)
    images = data.images[indices]
    if flip:
        uniform = torch.rand(batch_size, 1, 1, 1, generator=generator(seed, step, "flip"))
        mirrored = to_device(uniform < 0.5, device)
        images = torch.where(mirrored, images.flip(-1), images)
    labels = None if data.labels is None else data.labels[indices]
    x0 = to_real(images)
    return x0, labels, indices


def _stream(total: int, seed: int, start: int, count: int) -> Tensor:
    """The image numbers at places start ... start + count - 1 of the stream of epochs."""
    stop = start + count
    parts = []
    for epoch in range(start // total, (stop - 1) // total + 1):
        first = epoch * total
        order = _permutation(total, seed, epoch)
        parts.append(order[max(start - first, 0) : stop - first])
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _permutation(total: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, epoch, "images"))
