"""Dead leaves: images drawn in memory, with the statistics of photographs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..randomness import generator
from .dataset import SPLITS, ImageData

Array = NDArray[np.float32]

PALETTES = {  # a leaf takes a colour between two neighbours
    "ember": ("1c0f13", "5c1a1b", "b3361e", "e8722a", "f7b538", "fde8b0"),
    "lagoon": ("071a2e", "0b4f6c", "138a9e", "3ec1b4", "a3e4d7", "f4efd9"),
    "moss": ("141c10", "2f4a1f", "5f7f2c", "9bb04a", "d6d58e", "7a4f2a"),
    "orchid": ("1d0f2b", "4a1d5f", "8e2f8f", "d457a0", "f3a0bd", "fbe3dc"),
    "frost": ("1b2129", "47525e", "7d8ea0", "b4c6d6", "e6eef3", "9fb7d9"),
}

_SHAPES = ("discs", "shards")

LEAF_CLASSES = tuple(f"{palette} {shape}" for palette in PALETTES for shape in _SHAPES)

# In units of the image's side: the smallest leaf is wider than two pixels at 16 x 16, so that its
# shape can be seen.
LEAF_RADII = (0.09, 0.5)

# The leaves lie 4.2 deep on average, so a pixel stays bare with probability exp(-4.2) = 1.5 %.
NUM_LEAVES = 80

# Part of what a seed means: the images drawn from one generator.
_BLOCK = 1000

# A shard is an equilateral triangle of the disc's area: its corners and its sides are so many radii
# from the centre.
_SHARD_CORNER = 1.5552
_SHARD_SIDE = 0.7776

# Sides of the squares that are painted for one leaf, in pixels.
_WINDOWS = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def leaves(num_images: int, size: int = 32, seed: int = 0, split: str = "train") -> ImageData:
    """Dead leaves: occluding shapes whose radii have density r^-3.

    That density makes images scale-invariant, with spectra like those of photographs (Ruderman
    1997; Lee, Mumford, Huang 2001). Image i is of class i % 10, a palette and a shape, and depends
    on (seed, split, i) alone: more images extend the set, the splits share no draw, and `size`
    changes the resolution of the scene but not the scene.
    Returns uint8 (num_images, 3, size, size) with labels. Raises ValueError if num_images < 1,
    size < 8 or the split is unknown.

    >>> data = leaves(12, size=16)
    >>> tuple(data.images.shape), data.labels.tolist()
    ((12, 3, 16, 16), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    """
    if num_images < 1 or size < 8 or split not in SPLITS:
        raise ValueError(
            f"leaves needs num_images >= 1, size >= 8, split in {SPLITS}; "
            f"got {num_images, size, split}"
        )
    images = torch.empty(num_images, 3, size, size, dtype=torch.uint8)
    labels = torch.arange(num_images) % len(LEAF_CLASSES)
    for start in range(0, num_images, _BLOCK):
        draw = generator(seed, start // _BLOCK, f"leaves {split}")
        # Drawn whole even for a part of it, so that the part does not depend on num_images.
        uniform = torch.rand(_BLOCK, NUM_LEAVES, 5, generator=draw).numpy()
        uniform = uniform[: num_images - start]
        classes = labels[start : start + _BLOCK].numpy()
        scenes = _draw_scenes(uniform, classes, size)
        images[start : start + _BLOCK] = torch.from_numpy(scenes).permute(0, 3, 1, 2)
    return ImageData(images, labels, "leaves", LEAF_CLASSES)


def leaf_radii(uniform: Array) -> Array:
    """Radii of the leaves that touch the image, by inversion of their distribution function.

    A leaf of radius r touches the unit square when its centre lies in a square of area (1 + 2r)^2,
    so the density is r^-3 (1 + 2r)^2. uniform: draws in [0, 1), any shape.
    """
    radii = np.geomspace(*LEAF_RADII, 1024)
    mass = 4 * np.log(radii) - 4 / radii - 0.5 / radii**2  # the antiderivative
    cumulative = (mass - mass[0]) / (mass[-1] - mass[0])
    return np.interp(uniform, cumulative, radii).astype(np.float32)


@dataclass
class _Scenes:
    """n images of L leaves each, in pixels; arrays are (n, L) unless noted."""

    x: Array
    y: Array
    radius: Array
    angle: Array
    color: Array  # (n, L, 3)
    ground: Array  # (n, 1, 3), what shows where no leaf lies
    shape: NDArray[np.intp]  # (n,), index into _SHAPES


def _draw_scenes(uniform: Array, labels: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Draws (n, leaves, 5) and labels (n,) -> (n, size, size, 3) uint8, from back to front."""
    scenes = _place_leaves(uniform, labels, size)
    widths = [width for width in _WINDOWS if width < size] + [size]
    window = np.searchsorted(widths[:-1], 2 * _reach(scenes, size) + 2)
    canvas = np.repeat(scenes.ground, size * size, axis=1)
    for leaf in range(NUM_LEAVES):
        for shape in range(len(_SHAPES)):
            for number, width in enumerate(widths):
                rows = np.flatnonzero((scenes.shape == shape) & (window[:, leaf] == number))
                if len(rows):
                    _paint(canvas, scenes, rows, leaf, shape, width, size)
    rounded = (canvas.clip(0, 255) + 0.5).astype(np.uint8)
    return rounded.reshape(-1, size, size, 3)


def _place_leaves(uniform: Array, labels: NDArray[np.int64], size: int) -> _Scenes:
    """What the five draws of each leaf mean: radius, x, y, angle, colour."""
    radius = leaf_radii(uniform[..., 0])
    x = (uniform[..., 1] * (1 + 2 * radius) - radius) * size
    y = (uniform[..., 2] * (1 + 2 * radius) - radius) * size
    angle = uniform[..., 3] * np.float32(2 * np.pi)

    tables = [[list(bytes.fromhex(color)) for color in row] for row in PALETTES.values()]
    palettes = np.array(tables, np.float32)[labels // len(_SHAPES)]  # (n, colours, 3)
    mix, low = np.modf(uniform[..., 4, None] * (palettes.shape[1] - 1))
    nearest = low.astype(np.intp)
    darker = np.take_along_axis(palettes, nearest, 1)
    lighter = np.take_along_axis(palettes, nearest + 1, 1)
    # Leaves at the back are darker, which gives depth.
    depth = np.linspace(0.7, 1, NUM_LEAVES, dtype=np.float32)[:, None]
    color = (darker + mix * (lighter - darker)) * depth
    return _Scenes(
        x, y, radius * size, angle, color, ground=palettes[:, :1], shape=labels % len(_SHAPES)
    )


def _reach(scenes: _Scenes, size: int) -> Array:
    """How far from its centre a leaf with its shadow goes, in pixels."""
    disc = scenes.radius + 0.05 * size
    shard = _SHARD_CORNER * scenes.radius + 0.1 * size
    return np.where(scenes.shape[:, None], shard, disc)


def _paint(
    canvas: Array,
    scenes: _Scenes,
    rows: NDArray[np.intp],
    leaf: int,
    shape: int,
    width: int,
    size: int,
) -> None:
    """Paint one leaf of one shape into the images `rows`, in a window of `width` pixels around it."""
    radius = scenes.radius[rows, leaf, None, None]
    columns = _window(scenes.x[rows, leaf, None], width, size)
    lines = _window(scenes.y[rows, leaf, None], width, size)
    dx = (columns - scenes.x[rows, leaf, None] + 0.5).astype(np.float32)[:, None, :]
    dy = (lines - scenes.y[rows, leaf, None] + 0.5).astype(np.float32)[:, :, None]
    if _SHAPES[shape] == "discs":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    else:
        angle = scenes.angle[rows, leaf, None, None]
        distance = _distance_to_shard(dx, dy, radius, angle)

    cover = (0.5 - distance).clip(0, 1)  # antialiased
    shadow = (0.6 + 8 / size * distance).clip(0, 1)
    light = 1 - 0.3 * dy / radius  # from above, so that a mirrored image looks as natural
    kept = (shadow * (1 - cover))[..., None]
    painted = (cover * light)[..., None] * scenes.color[rows, leaf, None, None]
    pixels = (rows[:, None, None], lines[:, :, None] * size + columns[:, None, :])
    canvas[pixels] = canvas[pixels] * kept + painted


def _window(centre: Array, width: int, size: int) -> NDArray[np.intp]:
    """Pixel numbers (n, width) of the window around centres (n, 1) that stays inside the image."""
    first = np.rint(centre).astype(np.intp) - width // 2
    return first.clip(0, size - width) + np.arange(width)


def _distance_to_shard(dx: Array, dy: Array, radius: Array, angle: Array) -> Array:
    """Signed distance to the sides of an equilateral triangle turned by `angle`."""
    across = np.cos(angle) * dx + np.sin(angle) * dy
    along = np.cos(angle) * dy - np.sin(angle) * dx
    slanted = 3**0.5 / 2 * np.abs(across) - along / 2
    return np.maximum(along, slanted) - _SHARD_SIDE * radius
