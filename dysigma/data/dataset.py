"""Images as one uint8 tensor, and batches of them as functions of (seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import to_device
from ..randomness import generator

SPLITS = ("train", "test")


@dataclass(eq=False)
class ImageData:
    """A data set in memory. Raises ValueError when its parts do not fit together."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None = None  # int64 (N,)
    name: str = "images"
    class_names: tuple[str, ...] | None = None  # one for each value of labels
    exact: Tensor | None = (
        None  # bool (N,), False where an image only approximates the original; None: all are exact
    )

    def __post_init__(self) -> None:
        x, n = self.images, len(self)
        if x.ndim != 4 or x.dtype != torch.uint8 or 0 in x.shape:
            raise ValueError(
                f"{self.name}: need uint8 images (N, C, H, W), none of them 0; got {x.dtype} {[*x.shape]}"
            )
        for y, dtype in ((self.labels, torch.int64), (self.exact, torch.bool)):
            if y is not None and (y.dtype != dtype or y.shape != (n,)):
                wanted = f"labels must be integers (int64) and exact bool, both ({n},)"
                raise ValueError(f"{self.name}: {wanted}; got {y.dtype} {[*y.shape]}")
        classes = self.num_classes or 0
        if (
            self.labels is not None
            and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes
        ):
            raise ValueError(
                f"{self.name}: labels must lie in [0, {classes}); got {self.labels.unique().tolist()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """How many class_names, or else one more than the largest label; None without labels."""
        return (
            None
            if self.labels is None
            else len(self.class_names or ()) or int(self.labels.max()) + 1
        )

    @property
    def originals(self) -> Tensor:
        """The images that are exact, (M, C, H, W)."""
        return self.images if self.exact is None else self.images[self.exact]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on `device`; where it already is there, in the same memory."""
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageData:
        labels, exact = (None if x is None else function(x) for x in (self.labels, self.exact))
        return replace(self, images=function(self.images), labels=labels, exact=exact)


def batch(
    data: ImageData, seed: int, step: int, batch_size: int, *, flip: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The batch of one training step: a pure function of (seed, step), whatever device holds the data.

    Images are consumed as a stream, each epoch in a new order; `flip` mirrors each with probability 1/2.
    Returns x0 (B, C, H, W) float32 in [-1, 1], labels (B,) int64 or None, indices (B,) int64, on the data's device.
    Raises ValueError if step < 0 or batch_size < 1.
    """
    if step < 0 or batch_size < 1:
        raise ValueError(f"batch needs step >= 0 and batch_size >= 1; got {step=}, {batch_size=}")
    total, start, stop = len(data), step * batch_size, (step + 1) * batch_size
    epochs = range(start // total, (stop - 1) // total + 1)
    parts = [
        _permutation(total, seed, e)[max(start - e * total, 0) : stop - e * total] for e in epochs
    ]
    device = data.images.device
    indices = to_device(torch.cat(parts), device)
    images = data.images[indices]
    if flip:
        mirrored = torch.rand(batch_size, 1, 1, 1, generator=generator(seed, step, "flip")) < 0.5
        images = torch.where(to_device(mirrored, device), images.flip(-1), images)
    labels = None if data.labels is None else data.labels[indices]
    return images.float().div_(127.5).sub_(1), labels, indices


@functools.lru_cache(maxsize=4)
def _permutation(total: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, epoch, "images"))
