"""Dead leaves: images drawn in memory, with the statistics of photographs."""

from __future__ import annotations

import numpy as np
import torch

from ..randomness import generator
from .dataset import SPLITS, ImageData

PALETTES = {  # a leaf takes a colour between two neighbours
    "ember": ("1c0f13", "5c1a1b", "b3361e", "e8722a", "f7b538", "fde8b0"),
    "lagoon": ("071a2e", "0b4f6c", "138a9e", "3ec1b4", "a3e4d7", "f4efd9"),
    "moss": ("141c10", "2f4a1f", "5f7f2c", "9bb04a", "d6d58e", "7a4f2a"),
    "orchid": ("1d0f2b", "4a1d5f", "8e2f8f", "d457a0", "f3a0bd", "fbe3dc"),
    "frost": ("1b2129", "47525e", "7d8ea0", "b4c6d6", "e6eef3", "9fb7d9"),
}

LEAF_CLASSES = tuple(f"{palette} {shape}" for palette in PALETTES for shape in ("discs", "shards"))

# In units of the image's side: the smallest leaf is wider than two pixels at 16 x 16, so that its shape can be seen.
LEAF_RADII = (0.09, 0.5)

# The leaves lie 4.2 deep on average, so a pixel stays bare with probability exp(-4.2) = 1.5 %.
NUM_LEAVES = 80

# Part of what a seed means: the images drawn from one generator.
_BLOCK = 1000


def leaves(num_images: int, size: int = 32, seed: int = 0, split: str = "train") -> ImageData:
    """Dead leaves: occluding shapes whose radii have density r^-3, which makes images scale-invariant with spectra
    like those of photographs (Ruderman 1997; Lee, Mumford, Huang 2001).

    Image i is of class i % 10, a palette and a shape, and depends on (seed, split, i) alone: more images extend the
    set, the splits share no draw, and `size` changes the resolution of the scene but not the scene.
    Returns uint8 (num_images, 3, size, size) with labels. Raises ValueError if num_images < 1 or size < 8.
    """
    if num_images < 1 or size < 8 or split not in SPLITS:
        raise ValueError(
            f"leaves needs num_images >= 1, size >= 8, split in {SPLITS}; got {num_images, size, split}"
        )
    images = torch.empty(num_images, 3, size, size, dtype=torch.uint8)
    labels = torch.arange(num_images) % len(LEAF_CLASSES)
    for start in range(0, num_images, _BLOCK):
        draw = generator(seed, start // _BLOCK, f"leaves {split}")
        # Drawn whole even for a part of it, so that the part does not depend on num_images.
        uniform = torch.rand(_BLOCK, NUM_LEAVES, 5, generator=draw).numpy()[: num_images - start]
        scenes = _draw_leaves(uniform, labels[start : start + _BLOCK].numpy(), size)
        images[start : start + _BLOCK] = torch.from_numpy(scenes).permute(0, 3, 1, 2)
    return ImageData(images, labels, "leaves", LEAF_CLASSES)


def _leaf_radii(uniform: np.ndarray) -> np.ndarray:
    """Radii of the leaves that touch the image: density r^-3 times the area (1 + 2r)^2 from which a leaf reaches it."""
    radii = np.geomspace(*LEAF_RADII, 1024)
    mass = 4 * np.log(radii) - 4 / radii - 0.5 / radii**2  # the antiderivative
    return np.interp(uniform, (mass - mass[0]) / (mass[-1] - mass[0]), radii).astype(np.float32)


def _draw_leaves(uniform: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Draws (n, leaves, 5) and labels (n,) -> (n, size, size, 3) uint8, painted from back to front."""
    radius = _leaf_radii(uniform[..., 0])
    x, y = ((uniform[..., i] * (1 + 2 * radius) - radius) * size for i in (1, 2))
    radius, angle = radius * size, uniform[..., 3] * np.float32(2 * np.pi)
    palettes = np.array(
        [[list(bytes.fromhex(c)) for c in colors] for colors in PALETTES.values()], np.float32
    )
    palettes, shape = palettes[labels // 2], labels % 2
    mix, low = np.modf(uniform[..., 4, None] * (palettes.shape[1] - 1))
    color, lighter = (np.take_along_axis(palettes, low.astype(np.intp) + i, 1) for i in (0, 1))
    color = (color + mix * (lighter - color)) * np.linspace(0.7, 1, NUM_LEAVES, dtype=np.float32)[
        :, None
    ]
    # Only a window around a leaf is painted, of the first width that holds the leaf and its shadow.
    widths = [w for w in (6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if w < size] + [size]
    reach = np.where(shape[:, None], 1.5552 * radius + 0.1 * size, radius + 0.05 * size)
    window = np.searchsorted(widths[:-1], 2 * reach + 2)
    canvas = np.repeat(palettes[:, :1], size * size, axis=1)
    for k, kind, w in np.ndindex(NUM_LEAVES, 2, len(widths)):
        rows = np.flatnonzero((shape == kind) & (window[:, k] == w))
        if not len(rows):
            continue
        r, a = radius[rows, k, None, None], angle[rows, k, None, None]
        left, top = (np.rint(v[rows, k, None]).astype(np.intp) - widths[w] // 2 for v in (x, y))
        left, top = (v.clip(0, size - widths[w]) + np.arange(widths[w]) for v in (left, top))
        dx = (left - x[rows, k, None] + 0.5).astype(np.float32)[:, None, :]
        dy = (top - y[rows, k, None] + 0.5).astype(np.float32)[:, :, None]
        if kind == 0:
            distance = np.sqrt(dx * dx + dy * dy) - r
        else:  # an equilateral triangle of the disc's area, whose inscribed radius is 0.7776 r
            across, along = np.cos(a) * dx + np.sin(a) * dy, np.cos(a) * dy - np.sin(a) * dx
            distance = np.maximum(along, 3**0.5 / 2 * np.abs(across) - along / 2) - 0.7776 * r
        cover = (0.5 - distance).clip(0, 1)  # antialiased
        shadow = (0.6 + 8 / size * distance).clip(0, 1)
        light = 1 - 0.3 * dy / r  # from above, so that a mirrored image looks as natural
        pixels = rows[:, None, None], top[:, :, None] * size + left[:, None, :]
        behind, leaf = (
            (shadow * (1 - cover))[..., None],
            (cover * light)[..., None] * color[rows, k, None, None],
        )
        canvas[pixels] = canvas[pixels] * behind + leaf
    return (canvas.clip(0, 255) + 0.5).astype(np.uint8).reshape(-1, size, size, 3)
