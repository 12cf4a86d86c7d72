"""Images as one uint8 tensor: dead leaves drawn in memory, CIFAR-10 verified before it is read, or your own files."""

from .cifar10 import CIFAR10_CLASSES
from .dataset import SPLITS, ImageData, batch
from .leaves import LEAF_CLASSES, PALETTES, leaves
from .load import load_data
from .shapes import SHAPES, shapes

__all__ = [
    "CIFAR10_CLASSES",
    "LEAF_CLASSES",
    "PALETTES",
    "SHAPES",
    "SPLITS",
    "ImageData",
    "batch",
    "leaves",
    "load_data",
    "shapes",
]
