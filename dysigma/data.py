"""Images as one uint8 tensor: dead leaves drawn in memory, CIFAR-10 verified before it is read, or your own files."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

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
    """A data set in memory: images uint8 (N, C, H, W), labels int64 (N,) or None, class_names one per label value.

    exact: bool (N,), False where an image only approximates the original; None: all are exact.
    Raises ValueError when these do not fit together.
    """

    images: Tensor
    labels: Tensor | None = None
    name: str = "images"
    class_names: tuple[str, ...] | None = None
    exact: Tensor | None = None

    def __post_init__(self) -> None:
        total = len(self)
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or 0 in self.images.shape:
            got = f"{self.images.dtype} {(*self.images.shape,)}"
            raise ValueError(f"{self.name}: images must be uint8 (N, C, H, W), none of them 0; got {got}")
        for what, values, dtype in (("labels", self.labels, torch.int64), ("exact", self.exact, torch.bool)):
            if values is not None and (values.dtype != dtype or values.shape != (total,)):
                got = f"{values.dtype} {(*values.shape,)}"
                raise ValueError(f"{self.name}: {what} must be {dtype} ({total},), one per image; got {got}")
        if self.labels is not None and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < (
            self.num_classes or 0
        ):
            raise ValueError(
                f"{self.name}: labels must lie in [0, {self.num_classes}); got {self.labels.unique().tolist()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """How many class_names, or else one more than the largest label; None without labels."""
        return None if self.labels is None else len(self.class_names or ()) or int(self.labels.max()) + 1

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

    source: "leaves"; "cifar10" (Krizhevsky 2009); an .npz file of `{split}_images` uint8 (N, H, W, C) or (N, H, W) and
        perhaps `{split}_labels` and `{split}_exact` for each split, or of `images` and perhaps `labels`; or a folder of
        PNG/JPEG files at any depth: `train` and `test` in it are the splits, the next subfolders the classes, if any.
        Of images without splits every tenth is a test image.
    root: where CIFAR-10 lies, or goes: a folder with the official archive, its batches or cifar10.npz, or one of these
        files. Default: the environment variable DYSIGMA_DATA, else the user's cache. Other sources have no root.
    size: side in pixels; the central square is averaged over blocks if `size` divides its side, else resized
        bicubically with antialiasing. Default: as it is; leaves: 32.
    num_images: the first so many, but spread over all files of a folder. Default: all; leaves: 10,000 and 2,000.
    seed: which leaves; other sources have none.
    Raises ValueError for a bad argument or file, ConnectionError if CIFAR-10 is not here and cannot be downloaded.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; have {list(SPLITS)}")
    if (size is not None and not 8 <= size <= 1024) or (num_images is not None and num_images < 1):
        raise ValueError(f"size must lie in [8, 1024] and num_images be at least 1; got {size=}, {num_images=}")
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
    indices = torch.cat(parts).to(device)
    images = data.images[indices]
    if flip:
        mirrored = torch.rand(batch_size, 1, 1, 1, generator=draws.generator(seed, step, "flip")) < 0.5
        images = torch.where(mirrored.to(device), images.flip(-1), images)
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
        canvas[pixels] = (
            canvas[pixels] * (shadow * (1 - cover))[..., None] + (cover * light)[..., None] * color[rows, k, None, None]
        )
    return (canvas.clip(0, 255) + 0.5).astype(np.uint8).reshape(-1, size, size, 3)


def _resize(images: Tensor, size: int | None) -> Tensor:
    """The central squares of uint8 (N, C, H, W), at `size` if given; a few images at a time, to spare memory."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side]
    if size is None or size == side:
        return images.contiguous()
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for block, resized in zip(images.split(256), out.split(256), strict=True):
        if side % size == 0:
            real = F.avg_pool2d(block.float(), side // size)
        else:
            real = F.interpolate(block.float(), (size, size), mode="bicubic", antialias=True)
        resized.copy_(real.round_().clamp_(0, 255))
    return out


def _npz(path: Path, split: str) -> ImageData:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = file.files
            whole = not any(f"{name}_images" in found for name in SPLITS)
            keys = [key if whole else f"{split}_{key}" for key in ("images", "labels", "exact")]
            images, labels, exact = (file[key] if key in found else None for key in keys)
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({error}); write it with numpy.savez") from error
    if images is None:
        raise ValueError(f"{path} holds no {split} images; expected {split}_images or images, found {found}")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{path}: images must be uint8 (N, H, W[, 1 or 3]); got {images.dtype} {images.shape}")
    if (labels is not None and labels.dtype.kind not in "iu") or (exact is not None and exact.dtype != bool):
        raise ValueError(f"{path}: labels must be integers and exact bool, one per image")
    count, height, width, channels = images.shape
    flat = np.ascontiguousarray(images).reshape(count, height * width * channels)
    # Channels go first in place, block by block, so that a second copy never exists.
    for block in np.array_split(flat, 1 + count // 1024):
        block[:] = block.reshape(-1, height, width, channels).transpose(0, 3, 1, 2).reshape(block.shape)
    data = ImageData(
        torch.from_numpy(flat.reshape(count, channels, height, width)),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        path.name,
        exact=None if exact is None else torch.from_numpy(exact),
    )
    return data._map(lambda x: x[_held_out(count, split)]) if whole else data


def _held_out(count: int, split: str) -> list[int]:
    """The split's share of images that have no splits: every tenth is a test image."""
    every = min(count, 10)
    return [i for i in range(count) if (i % every == every - 1) == (split == "test")]


def _gather(blocks: Iterable[tuple[Any, Tensor]], names: list[Any]) -> Tensor:
    """Named blocks (n, C, H, W) uint8 of one shape -> one tensor in the order of `names`, never held twice."""
    out, missing = torch.empty(0), {name: i for i, name in enumerate(names)}
    for name, block in blocks:
        if len(missing) == len(names):
            out = block.new_empty(len(names), *block.shape)
        if block.shape != out.shape[1:]:
            raise ValueError(f"{name} is {(*block.shape,)}, not {(*out.shape[1:],)}: give a size to resize to")
        out[missing.pop(name)] = block
    if missing:
        raise ValueError(f"{', '.join(map(str, missing))} missing")
    return out.flatten(0, 1)


def _folder(path: Path, split: str, size: int | None, num_images: int | None) -> ImageData:
    found = (f.relative_to(path) for f in path.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.parts))
    depth = int(any((path / name).is_dir() for name in SPLITS))
    if depth:
        files = [f for f in files if f.parts[0] in SPLITS]
    # Named before a split is taken, so that labels mean the same in both.
    classes = tuple(sorted({f.parts[depth] if len(f.parts) > depth + 1 else "" for f in files}))
    files = [f for f in files if f.parts[0] == split] if depth else [files[i] for i in _held_out(len(files), split)]
    if not files:
        raise ValueError(f"{path} has no PNG or JPEG files for the {split} split (CIFAR-10 is called 'cifar10')")
    if len(classes) > 1 and not classes[0]:
        raise ValueError(f"{path}: its subfolders name classes, but some images lie outside them; move those")
    count = min(num_images or len(files), len(files))
    files = [files[i * len(files) // count] for i in range(count)]
    images = _gather(((path / f, _resize(_decode(path / f), size)) for f in files), [path / f for f in files])
    if classes[0] == "":
        return ImageData(images, None, path.name)
    return ImageData(images, torch.tensor([classes.index(f.parts[depth]) for f in files]), path.name, classes)


def _decode(file: Path) -> Tensor:
    """A PNG or JPEG as RGB uint8 (1, 3, H, W), turned upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f"{file} cannot be read as an image of 8 bits a channel ({error})") from error


def _cifar10(root: str | Path | None, split: str) -> ImageData:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dysigma"
    place = Path(root or os.environ.get("DYSIGMA_DATA") or cache).expanduser()
    if place.suffix in (".gz", ".npz") and not place.is_file():
        raise ValueError(f"there is no CIFAR-10 file {place}: give an existing file, or the folder that holds it")
    for folder in (place, place / "cifar-10-batches-py"):
        if all((folder / name).is_file() for name in CIFAR10_BATCHES[split]):
            return _official(folder, split)
    copy = place if place.suffix == ".npz" else place / "cifar10.npz"
    archive = place if place.is_file() and place != copy else place / "cifar-10-python.tar.gz"
    if copy.is_file() and not archive.is_file():
        return replace(_npz(copy, split), class_names=CIFAR10_CLASSES)
    if not archive.is_file():
        _download(archive)
    return _official(archive, split)


def _official(place: Path, split: str) -> ImageData:
    """CIFAR-10 from the official archive or its extracted folder: verified, then unpickled, arrays only."""
    labels: dict[str, Tensor] = {}

    def blocks() -> Iterator[tuple[str, Tensor]]:
        for name, raw in _read_batches(place, split):
            _check_md5(BytesIO(raw), name, CIFAR10_BATCHES[split][name])
            content = _ArraysOnly(BytesIO(raw), encoding="bytes").load()  # Python 2 wrote it, with strings of bytes
            labels[name] = torch.tensor(content[b"labels"])
            yield name, torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32)

    try:
        images = _gather(blocks(), list(CIFAR10_BATCHES[split]))
        marks = torch.cat([labels[name] for name in CIFAR10_BATCHES[split]])
        return ImageData(images, marks, "cifar10", CIFAR10_CLASSES)
    except Exception as error:  # a damaged archive or pickle raises almost anything
        raise ValueError(
            f"{place} is not the official CIFAR-10 ({error}): delete it and run again to download it, or put an intact "
            f"copy of {CIFAR10_URL} there"
        ) from error


def _read_batches(place: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """The files of a split, in any order; nothing in an archive is ever extracted to the disk."""
    if place.is_dir():
        yield from ((name, (place / name).read_bytes()) for name in CIFAR10_BATCHES[split])
        return
    with place.open("rb") as stream:
        _check_md5(stream, "the archive", CIFAR10_MD5)
    with tarfile.open(place, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if folder == "cifar-10-batches-py" and name in CIFAR10_BATCHES[split] and member.isreg():
                yield name, tar.extractfile(member).read()  # type: ignore[union-attr]  # never None for a file


def _check_md5(stream: Any, name: str, expected: str) -> None:
    found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise ValueError(f"{name} is truncated or changed: its MD5 is {found}, the official one {expected}")


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers; every other name in a pickle is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"a pickle asks for {module}.{name}, which is no numpy array")


def _download(archive: Path) -> None:
    """Fetch the official archive over HTTPS; what an interrupted download left in `.part` is continued."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from tqdm import tqdm

    part = archive.with_name(archive.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file, tqdm(total=CIFAR10_BYTES, unit="B", unit_scale=True, desc=archive.name) as bar:
            if file.tell() < CIFAR10_BYTES:
                request = Request(CIFAR10_URL, headers={"Range": f"bytes={file.tell()}-"})
                with urlopen(request, timeout=30) as reply:
                    if reply.status != 206:  # the server sends all of it again
                        file.seek(0)
                        file.truncate()
                    bar.update(file.tell())
                    while block := reply.read(1 << 20):
                        bar.update(file.write(block))
            if file.tell() < CIFAR10_BYTES:
                raise ConnectionError(f"it broke off after {file.tell()} of {CIFAR10_BYTES} bytes")
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"CIFAR-10 is not in {archive.parent}, and downloading {CIFAR10_URL} failed ({error}): run again when "
            "online to continue, put that file there, or name a folder that holds it (--data-root or DYSIGMA_DATA)"
        ) from error
    try:
        with part.open("rb") as stream:
            _check_md5(stream, "the download", CIFAR10_MD5)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{CIFAR10_URL}: {error}; it was removed, run again") from error
    part.replace(archive)
