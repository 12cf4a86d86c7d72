"""Shapes: small pictures of one bright shape each, drawn in memory, that anybody can name.

They are the data of a first run: a tiny network learns them in some minutes on a CPU, and a sample
either is a heart or is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..randomness import generator
from .dataset import SPLITS, ImageData

Array = NDArray[np.floating[Any]]

# Each picture is drawn at this multiple of its size and averaged, so that edges are smooth.
SUPERSAMPLING = 2
# Part of what a seed means: the pictures drawn from one generator.
BLOCK = 1000
# Random numbers of one picture: place (2), radius, angle, colours (5), light (1).
DRAWS = 10


# A shape is a function of x (to the right) and y (down), about 1 at its rim: negative inside,
# positive outside, and near the rim about the distance from it.
def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: Array, y: Array) -> Array:
    sides = 0.866 * np.abs(x) - 0.5 * y - 0.5
    base = y - 0.55
    return np.maximum(sides, base)


def _star(x: Array, y: Array) -> Array:
    fifth = 2 * np.pi / 5
    angle = np.mod(np.arctan2(x, -y) + fifth / 2, fifth) - fifth / 2
    towards_notch = np.abs(angle) / (fifth / 2)
    rim = 1.05 * (1 - towards_notch) + 0.45 * towards_notch
    return np.hypot(x, y) - rim


def _cross(x: Array, y: Array) -> Array:
    upright = np.maximum(np.abs(x) - 0.32, np.abs(y) - 0.95)
    level = np.maximum(np.abs(y) - 0.32, np.abs(x) - 0.95)
    return np.minimum(upright, level)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.7) - 0.25


def _heart(x: Array, y: Array) -> Array:
    side = np.abs(x)
    height = 1.1 * (0.15 - y) - 0.6 * np.sqrt(side)
    return 0.6 * (side**2 + height**2 - 0.72)


def _moon(x: Array, y: Array) -> Array:
    bite = 0.75 - np.hypot(x - 0.45, y)
    return np.maximum(_circle(x, y), bite)


def _diamond(x: Array, y: Array) -> Array:
    return 0.9 * np.abs(x) + 0.75 * np.abs(y) - 0.75


def _smile(x: Array, y: Array) -> Array:
    eyes = 0.2 - np.hypot(np.abs(x) - 0.35, y + 0.25)
    lips = 0.14 - np.abs(np.hypot(x, y) - 0.52)
    mouth = np.minimum(lips, y - 0.12)
    return np.maximum(_circle(x, y), np.maximum(eyes, mouth))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
    "diamond": _diamond,
    "smile": _smile,
}


def shapes(num_images: int, size: int = 16, seed: int = 0, split: str = "train") -> ImageData:
    """Pictures of one bright shape on a darker ground of the opposite colour.

    Picture i shows shape i % 10 of `SHAPES`. It depends on (seed, split, i) alone: asking for more
    images extends the set, and the splits share no draw.

    Returns uint8 images (num_images, 3, size, size) with labels and class names. Raises ValueError
    if num_images < 1, size < 8 or the split is unknown.

    >>> data = shapes(20)
    >>> tuple(data.images.shape), data.class_names[6]
    ((20, 3, 16, 16), 'heart')
    """
    if num_images < 1 or size < 8 or split not in SPLITS:
        raise ValueError(
            f"shapes needs num_images >= 1, size >= 8 and split in {SPLITS}; "
            f"got {num_images}, {size}, {split!r}"
        )
    images = torch.empty(num_images, 3, size, size, dtype=torch.uint8)
    labels = torch.arange(num_images) % len(SHAPES)
    for start in range(0, num_images, BLOCK):
        count = min(BLOCK, num_images - start)
        draw = generator(seed, start // BLOCK, f"shapes {split}")
        # A block is drawn whole even for a part of it, so that the part does not depend on num_images.
        uniform = torch.rand(BLOCK, DRAWS, generator=draw)[:count].numpy()
        kinds = labels[start : start + count].numpy()
        pictures = _draw(uniform, kinds, size)
        images[start : start + count] = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return ImageData(images, labels, "shapes", tuple(SHAPES))


def _draw(uniform: Array, kinds: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Random numbers (n, DRAWS) and numbers of shapes (n,) to pictures (n, size, size, 3)."""
    across, down, radius, angle = uniform[:, 0:4].T[:, :, None, None]
    radius = 0.6 + 0.2 * radius
    angle = 0.5 * (angle - 0.5)
    room = 1.4 * (1 - radius)  # a shape stays inside the picture

    fine = size * SUPERSAMPLING
    line = ((np.arange(fine, dtype=np.float32) + 0.5) / fine * 2 - 1).astype(np.float32)
    right, below = np.meshgrid(line, line)
    x = right - room * (across - 0.5)
    y = below - room * (down - 0.5)
    turned_x = (np.cos(angle) * x + np.sin(angle) * y) / radius
    turned_y = (np.cos(angle) * y - np.sin(angle) * x) / radius

    rim = np.empty_like(turned_x)
    for kind, shape in enumerate(SHAPES.values()):
        rows = kinds == kind
        rim[rows] = shape(turned_x[rows], turned_y[rows])

    hue, bright, vivid, contrast, dark = uniform[:, 4:9].T
    front = _colour(hue, 0.75 + 0.25 * vivid, 0.85 + 0.15 * bright)[:, None, None, :]
    opposite = hue + 0.5 + 0.3 * (contrast - 0.5)
    back = _colour(opposite, 0.45 + 0.3 * vivid, 0.25 + 0.3 * dark)[:, None, None, :]
    slope = np.sin(2 * np.pi * uniform[:, 9])[:, None, None]

    cover = np.clip(0.5 - rim * radius * fine / 2, 0, 1)[..., None]
    light_on_shape = (1 - 0.12 * below)[..., None]
    light_on_ground = (1 + 0.35 * (0.5 * right - below * slope))[..., None]
    shadow = np.clip(0.75 + 1.2 * rim, 0.55, 1)[..., None]
    picture = front * light_on_shape * cover + back * light_on_ground * shadow * (1 - cover)

    blocks = picture.reshape(len(kinds), size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    mean = blocks.mean((2, 4))
    return (mean.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _colour(hue: Array, saturation: Array, value: Array) -> Array:
    """Hue (in turns), saturation and value, (n,) each, to red, green and blue, (n, 3) in [0, 1]."""
    # Smith 1978: each channel is the same function of the hue, a third of a turn apart.
    place = (hue[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    ramp = np.minimum(place, 4 - place).clip(0, 1)
    return (value[:, None] * (1 - saturation[:, None] * ramp)).astype(np.float32)
