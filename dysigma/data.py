"""Images as one uint8 tensor: dead leaves drawn in memory, CIFAR-10 verified before it is read, or your own files."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import draws

SPLITS = ("train", "test")

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
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

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


@dataclass(eq=False)
class ImageData:
    """A data set in memory. Raises ValueError when its parts do not fit together."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None = None  # int64 (N,)
    name: str = "images"
    class_names: tuple[str, ...] | None = None  # one for each value of labels
    exact: Tensor | None = None  # bool (N,), False where an image only approximates the original; None: all are exact

    def __post_init__(self) -> None:
        x, n = self.images, len(self)
        if x.ndim != 4 or x.dtype != torch.uint8 or 0 in x.shape:
            raise ValueError(f"{self.name}: need uint8 images (N, C, H, W), none of them 0; got {x.dtype} {[*x.shape]}")
        for y, dtype in ((self.labels, torch.int64), (self.exact, torch.bool)):
            if y is not None and (y.dtype != dtype or y.shape != (n,)):
                wanted = f"labels must be integers (int64) and exact bool, both ({n},)"
                raise ValueError(f"{self.name}: {wanted}; got {y.dtype} {[*y.shape]}")
        classes = self.num_classes or 0
        if self.labels is not None and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise ValueError(f"{self.name}: labels must lie in [0, {classes}); got {self.labels.unique().tolist()}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """How many class_names, or else one more than the largest label; None without labels."""
        return None if self.labels is None else len(self.class_names or ()) or int(self.labels.max()) + 1

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


def load_data(
    source: str | Path,
    *,
    root: str | Path | None = None,
    split: str = "train",
    size: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> ImageData:
    """One split of a data set, on the CPU, in one uint8 tensor and no second copy.

    source: "leaves"; "cifar10" (Krizhevsky 2009); an .npz file of uint8 `train_images` and `test_images` (N, H, W[, C])
        and perhaps `train_labels`, `train_exact`, ..., or of `images` and perhaps `labels`; or a folder of PNG/JPEG
        files, its subfolders the classes, if any, in `train` and `test` or not. Without splits every tenth is for test.
    root: folder of the official archive, its batches or cifar10.npz, or one of these files; where they are missing the
        archive is downloaded. Default: the environment variable DYSIGMA_DATA, else the user's cache.
    size: side in pixels, of block means of the central square where they fit, else of bicubic values, antialiased.
        Default: the central square as it is; leaves: 32.
    num_images: the first so many, but spread over all files of a folder. Default: all; leaves: 10,000 and 2,000.
    seed: which leaves.
    Raises ValueError for a bad argument or file, ConnectionError if CIFAR-10 is not here and cannot be downloaded.
    """
    if split not in SPLITS or not (size is None or 8 <= size <= 1024) or not (num_images is None or num_images >= 1):
        raise ValueError(f"{split=}, {size=}, {num_images=}: choose from {SPLITS}, 8 <= size <= 1024, num_images >= 1")
    path = Path(source).expanduser()
    if source == "leaves":
        return leaves(num_images or (10_000 if split == "train" else 2_000), size or 32, seed, split)
    if source == "cifar10":
        data = _cifar10(root, split)
    elif path.suffix == ".npz" and path.is_file():
        data = _npz(path, split)
    elif path.is_dir():
        data = _folder(path, split, size, num_images)
    else:
        raise ValueError(f"no data {str(source)!r}; have 'leaves', 'cifar10', .npz files, folders of PNG/JPEG files")
    count = num_images or len(data)
    if count > len(data):
        raise ValueError(f"{data.name} has {len(data)} {split} images; {count} were asked for")
    if count < len(data):
        data = data._map(lambda x: x[:count].clone())  # a slice alone would keep all the images in memory
    return replace(data, images=_resize(data.images, size))


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
    parts = [_permutation(total, seed, e)[max(start - e * total, 0) : stop - e * total] for e in epochs]
    device = data.images.device
    indices = draws.to_device(torch.cat(parts), device)
    images = data.images[indices]
    if flip:
        mirrored = torch.rand(batch_size, 1, 1, 1, generator=draws.generator(seed, step, "flip")) < 0.5
        images = torch.where(draws.to_device(mirrored, device), images.flip(-1), images)
    labels = None if data.labels is None else data.labels[indices]
    return images.float().div_(127.5).sub_(1), labels, indices


@functools.lru_cache(maxsize=4)
def _permutation(total: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(total, generator=draws.generator(seed, epoch, "images"))


def leaves(num_images: int, size: int = 32, seed: int = 0, split: str = "train") -> ImageData:
    """Dead leaves: occluding shapes whose radii have density r^-3, which makes images scale-invariant with spectra
    like those of photographs (Ruderman 1997; Lee, Mumford, Huang 2001).

    Image i is of class i % 10, a palette and a shape, and depends on (seed, split, i) alone: more images extend the
    set, the splits share no draw, and `size` changes the resolution of the scene but not the scene.
    Returns uint8 (num_images, 3, size, size) with labels. Raises ValueError if num_images < 1 or size < 8.
    """
    if num_images < 1 or size < 8 or split not in SPLITS:
        raise ValueError(f"leaves needs num_images >= 1, size >= 8, split in {SPLITS}; got {num_images, size, split}")
    images = torch.empty(num_images, 3, size, size, dtype=torch.uint8)
    labels = torch.arange(num_images) % len(LEAF_CLASSES)
    for start in range(0, num_images, _BLOCK):
        generator = draws.generator(seed, start // _BLOCK, f"leaves {split}")
        # Drawn whole even for a part of it, so that the part does not depend on num_images.
        uniform = torch.rand(_BLOCK, NUM_LEAVES, 5, generator=generator).numpy()[: num_images - start]
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
    palettes = np.array([[list(bytes.fromhex(c)) for c in colors] for colors in PALETTES.values()], np.float32)
    palettes, shape = palettes[labels // 2], labels % 2
    mix, low = np.modf(uniform[..., 4, None] * (palettes.shape[1] - 1))
    color, lighter = (np.take_along_axis(palettes, low.astype(np.intp) + i, 1) for i in (0, 1))
    color = (color + mix * (lighter - color)) * np.linspace(0.7, 1, NUM_LEAVES, dtype=np.float32)[:, None]
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
        behind, leaf = (shadow * (1 - cover))[..., None], (cover * light)[..., None] * color[rows, k, None, None]
        canvas[pixels] = canvas[pixels] * behind + leaf
    return (canvas.clip(0, 255) + 0.5).astype(np.uint8).reshape(-1, size, size, 3)


def _resize(images: Tensor, size: int | None) -> Tensor:
    """The central squares of uint8 (N, C, H, W), at `size` if given; a few images at a time, to spare memory."""
    side = min(images.shape[-2:])
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    images = images[..., top : top + side, left : left + side]
    if size is None or size == side:
        return images.contiguous()
    mode = "bicubic" if side % size else "area"
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for block, resized in zip(images.split(256), out.split(256), strict=True):
        real = F.interpolate(block.float(), (size, size), mode=mode, antialias=mode == "bicubic")
        resized.copy_(real.round_().clamp_(0, 255))
    return out


def _npz(path: Path, split: str) -> ImageData:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = file.files
            prefix = f"{split}_" if any(f"{name}_images" in found for name in SPLITS) else ""
            keys = {key: prefix + key for key in ("images", "labels", "exact") if prefix + key in found}
            arrays = {key: torch.from_numpy(file[name]) for key, name in keys.items()}
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({error}); write it with numpy.savez") from error
    if "images" not in arrays:
        raise ValueError(f"{path} holds no {split} images; expected {split}_images or images, found {found}")
    images, labels = arrays["images"].contiguous(), arrays.get("labels")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{path}: images must be uint8 (N, H, W[, 1 or 3]); got {images.dtype} {(*images.shape,)}")
    count, height, width, channels = images.shape
    for image in images:  # in place, so that a second copy of all never exists
        image.view(channels, height, width).copy_(image.permute(2, 0, 1).clone())
    if labels is not None and not labels.is_floating_point():
        labels = labels.long()
    data = ImageData(images.view(count, channels, height, width), labels, path.name, exact=arrays.get("exact"))
    return data if prefix else data._map(lambda x: x[_held_out(count, split)])


def _held_out(count: int, split: str) -> list[int]:
    """The split's share of images that have no splits: every tenth is a test image."""
    every = min(count, 10)
    return [i for i in range(count) if (i % every == every - 1) == (split == "test")]


def _stack(blocks: Iterable[tuple[Any, Tensor]], count: int) -> Tensor:
    """`count` named blocks (n, ...) of one shape -> one tensor (count n, ...), filled as they come: none is kept."""
    out = torch.empty(0)
    for i, (name, block) in enumerate(blocks):
        out = block.new_empty(count, *block.shape) if i == 0 else out
        if block.shape != out.shape[1:]:
            sides = f"{block.shape[-1]} pixels wide as a square, those before are {out.shape[-1]}"
            raise ValueError(f"{name} is {sides}: give a size to resize all of them to (--image-size)")
        out[i] = block
    return out.flatten(0, 1)


def _folder(path: Path, split: str, size: int | None, num_images: int | None) -> ImageData:
    found = (f.relative_to(path) for f in path.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.parts))
    depth = int(any((path / name).is_dir() for name in SPLITS))
    if depth:
        files = [f for f in files if f.parts[0] in SPLITS]
    # Named before a split is taken, so that labels mean the same in both.
    classes = sorted({"".join(f.parts[depth:-1][:1]) for f in files})
    files = [f for f in files if f.parts[0] == split] if depth else [files[i] for i in _held_out(len(files), split)]
    if not files:
        raise ValueError(f"{path} has no PNG or JPEG files for the {split} split (CIFAR-10 is called 'cifar10')")
    if len(classes) > 1 and not classes[0]:
        raise ValueError(f"{path}: its subfolders name classes, but some images lie outside them; move those")
    count = min(num_images or len(files), len(files))
    files = [files[i * len(files) // count] for i in range(count)]
    images = _stack(((path / f, _resize(_decode(path / f), size)) for f in files), count)
    if not classes[0]:
        return ImageData(images, None, path.name)
    return ImageData(images, torch.tensor([classes.index(f.parts[depth]) for f in files]), path.name, tuple(classes))


def _decode(file: Path) -> Tensor:
    """A PNG or JPEG as RGB uint8 (1, 3, H, W), turned upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f"{file} cannot be read as an image of 8 bits a channel ({error})") from error


def data_folder(root: str | Path | None = None) -> Path:
    """Where downloads lie: root, else the environment variable DYSIGMA_DATA, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dysigma"
    return Path(root or os.environ.get("DYSIGMA_DATA") or cache).expanduser()


def _cifar10(root: str | Path | None, split: str) -> ImageData:
    place = data_folder(root)
    if place.suffix in (".gz", ".npz") and not place.is_file():
        raise ValueError(f"there is no CIFAR-10 file {place}: give an existing file, or the folder that holds it")
    archive = place / "cifar-10-python.tar.gz"
    for found in (place, place / "cifar-10-batches-py", archive, place / "cifar10.npz"):
        if found.is_file() and found.suffix == ".npz":
            return replace(_npz(found, split), class_names=CIFAR10_CLASSES)
        if found.is_file() or all((found / name).is_file() for name in CIFAR10_BATCHES[split]):
            return _official(found, split)
    download("CIFAR-10", CIFAR10_URL, archive, CIFAR10_BYTES, CIFAR10_MD5, "--data-root or DYSIGMA_DATA")
    return _official(archive, split)


def _official(place: Path, split: str) -> ImageData:
    """CIFAR-10 from the official archive or its extracted folder: verified, then unpickled, arrays only."""
    hashes, contents = CIFAR10_BATCHES[split], {}
    try:
        files = _read_batches(place, hashes.keys())
        for name, expected in hashes.items():
            raw = files.pop(name)
            check_digest(BytesIO(raw), name, expected)
            contents[name] = _ArraysOnly(BytesIO(raw), encoding="bytes").load()  # Python 2 wrote it: strings are bytes
        labels = torch.cat([torch.tensor(contents[name][b"labels"]) for name in hashes])
        images = _stack(((name, torch.from_numpy(contents.pop(name)[b"data"])) for name in hashes), len(hashes))
        return ImageData(images.view(-1, 3, 32, 32), labels, "cifar10", CIFAR10_CLASSES)
    except Exception as error:  # a damaged archive or pickle raises almost anything
        raise ValueError(f"{place} is not the official CIFAR-10 ({error}): delete it and run again") from error


def _read_batches(place: Path, names: Set[str]) -> dict[str, bytes]:
    """The files of these names; nothing in an archive is ever extracted to the disk."""
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in names}
    with place.open("rb") as stream:
        check_digest(stream, "the archive", CIFAR10_MD5)
    with tarfile.open(place, "r:gz") as tar:
        members = ((Path(member.name).name, tar.extractfile(member)) for member in tar if member.isreg())
        files = {name: file.read() for name, file in members if name in names and file}
    if missing := names - files.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return files


def check_digest(stream: Any, name: str, expected: str) -> None:
    """Raise ValueError unless a binary stream has the expected MD5 (32 hex digits) or SHA-256 (64)."""
    kind = "MD5" if len(expected) == 32 else "SHA256"
    found = hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if found != expected:
        raise ValueError(f"{name} is truncated or changed: its {kind} is {found}, the official one {expected}")


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers; every other name in a pickle is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"a pickle asks for {module}.{name}, which is no numpy array")


def download(what: str, url: str, target: Path, size: int, digest: str, options: str) -> None:
    """Fetch a published file over HTTPS and verify it; what an interrupted download left in `.part` is continued.

    options: how the user names another place. Raises ConnectionError, or ValueError if what arrives is not that file.
    """
    from tqdm import tqdm

    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        if done < size:
            request = Request(url, headers={"Range": f"bytes={done}-"})
            # A status other than 206 means that the server sends all of it again.
            with urlopen(request, timeout=30) as reply, part.open("ab" if reply.status == 206 else "wb") as file:
                with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, desc=target.name) as bar:
                    while block := reply.read(1 << 20):
                        bar.update(file.write(block))
                done = file.tell()
        if done < size:
            raise ConnectionError(f"it broke off after {done} of {size} bytes")
        with part.open("rb") as stream:
            check_digest(stream, "the download", digest)
        part.replace(target)
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"{what} is not in {target.parent}, and downloading {url} failed ({error}): run again when online to "
            f"continue, put that file there, or name a place that holds it ({options})"
        ) from error
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}; it was removed, run again") from error
