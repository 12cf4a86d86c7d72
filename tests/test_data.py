"""Data: laws of the drawn images and of the batches; files in the official format, whole, damaged and hostile."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

from dysigma.data import SPLITS, ImageData, batch, cifar10, dataset, leaves, load_data
from dysigma.data.leaves import LEAF_RADII, leaf_radii

# The official archive's own order, which is not that of the batches.
MEMBERS = [
    "data_batch_4",
    "readme.html",
    "test_batch",
    "data_batch_3",
    "batches.meta",
    "data_batch_2",
    "data_batch_5",
]
MEMBERS += ["data_batch_1"]


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- leaves -----------------------------------------------------------------------------------------------------------


def test_a_leaves_image_depends_on_seed_split_and_index_alone() -> None:
    many = leaves(1003, 8)
    assert torch.equal(leaves(7, 8).images, many.images[:7])
    assert torch.equal(leaves(1001, 8).images, many.images[:1001])
    assert many.labels is not None and many.labels.tolist() == [i % 10 for i in range(1003)]
    assert (
        many.num_classes == 10
        and many.class_names is not None
        and many.class_names[3] == "lagoon shards"
    )


@pytest.mark.slow
def test_splits_seeds_and_blocks_of_leaves_share_no_image() -> None:
    sets = [
        load_data("leaves", split=split, size=8, num_images=1100, seed=s)
        for split in SPLITS
        for s in (0, 1)
    ]
    assert len(set().union(*(rows(d.images) for d in sets))) == 4400


def test_leaves_show_the_same_scene_at_every_size() -> None:
    fine, coarse = leaves(100, 32).images.float(), leaves(100, 16).images.float()
    error = (torch.nn.functional.avg_pool2d(fine, 2) - coarse).abs().mean()
    other = (torch.nn.functional.avg_pool2d(fine, 2) - coarse.roll(10, 0)).abs().mean()
    assert error < 0.25 * other
    assert leaves(3, 45).images.shape == (3, 3, 45, 45)


def test_leaf_radii_follow_the_inverse_cube_seen_through_the_image() -> None:
    low, high = LEAF_RADII

    def cumulative(radii: np.ndarray) -> np.ndarray:
        def mass(r: float) -> float:
            return integrate.quad(lambda q: q**-3 * (1 + 2 * q) ** 2, low, r)[0]

        return np.array([mass(r) for r in radii]) / mass(high)

    drawn = leaf_radii(np.random.default_rng(0).random(2000))
    assert stats.kstest(drawn, cumulative).pvalue > 0.01
    assert stats.kstest(drawn * 1.1, cumulative).pvalue < 1e-6


def spectral_slope(images: np.ndarray) -> float:
    """Exponent of the power spectrum of (N, S, S), averaged over images and directions."""
    size = images.shape[-1]
    window = np.hanning(size + 1)[:size]
    centred = (images - images.mean((1, 2), keepdims=True)) * window[:, None] * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(0)
    cycles = np.fft.fftfreq(size) * size
    frequency = np.hypot(cycles[:, None], cycles)
    rings = np.arange(2, size // 2)
    mean = [power[(frequency >= k - 0.5) & (frequency < k + 0.5)].mean() for k in rings]
    return float(np.polyfit(np.log(rings), np.log(mean), 1)[0])


@pytest.mark.slow
def test_spectrum_of_leaves_falls_like_that_of_photographs() -> None:
    # The estimator reads -2.85 on CIFAR-10 averaged to 16 x 16 and -3.15 on it at 32 x 32; white noise reads 0.
    # Scale invariance gives -2; leaves wider than a pixel lack its finest detail, which makes it steeper.
    assert abs(spectral_slope(random_images(1000, 16, 16).astype(float))) < 0.1
    for size, count in ((16, 1000), (32, 300)):
        assert -3.3 < spectral_slope(leaves(count, size).images.double().mean(1).numpy()) < -2.3


@pytest.mark.slow
def test_palettes_are_told_apart_and_shapes_are_not_their_colours() -> None:
    train, test = leaves(1000, 16), leaves(500, 16, split="test")
    assert train.labels is not None and test.labels is not None
    features = [d.images.float().flatten(2).mean(2) for d in (train, test)]
    features = [f / f.sum(1, keepdim=True) for f in features]
    centres = torch.stack([features[0][train.labels // 2 == k].mean(0) for k in range(5)])
    found = torch.cdist(features[1], centres).argmin(1)
    assert (found == test.labels // 2).float().mean() > 0.97
    brightness = [train.images[train.labels % 2 == k].float().mean() for k in (0, 1)]
    assert abs(brightness[0] - brightness[1]) < 8


@pytest.mark.slow
def test_leaves_cover_their_images_and_use_the_whole_range() -> None:
    images = leaves(500, 16).images
    assert images.min() < 15 and images.max() > 240
    assert 45 < images.float().std() < 85
    # Light comes from above, so mirrored images are as likely; upside-down ones are not.
    mean = leaves(1000, 16).images.float().mean((0, 1))
    assert (mean - mean.flip(1)).abs().mean() < 2.5


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> ImageData:
    return ImageData(torch.from_numpy(random_images(23, 3, 8, 8)), torch.arange(23) % 4, "small")


@pytest.mark.parametrize("batch_size", [1, 7, 23, 50])
def test_every_epoch_is_a_new_permutation(small: ImageData, batch_size: int) -> None:
    stream = torch.cat(
        [batch(small, 3, step, batch_size)[2] for step in range(-(-5 * 23 // batch_size))]
    )
    epochs = stream[: 5 * 23].view(5, 23)
    assert torch.equal(epochs.sort(1).values, torch.arange(23).expand(5, 23))
    assert len({tuple(e) for e in epochs.tolist()}) == 5


def test_a_batch_is_a_function_of_seed_and_step_alone(small: ImageData) -> None:
    first = {step: batch(small, 0, step, 8) for step in range(6)}
    dataset._permutation.cache_clear()
    for step in (5, 0, 3, 1, 4, 2):
        torch.manual_seed(step)
        batch(small, 1, step, 8)
        again = batch(small, 0, step, 8)
        assert all(torch.equal(a, b) for a, b in zip(first[step], again, strict=True))  # type: ignore[arg-type]
    assert not torch.equal(first[0][2], batch(small, 1, 0, 8)[2])
    assert torch.equal(torch.cat([first[0][2], first[1][2]]), batch(small, 0, 0, 16)[2])


def test_a_batch_holds_the_images_scaled_and_perhaps_mirrored(small: ImageData) -> None:
    assert small.labels is not None
    for flip in (False, True):
        mirrored = 0
        for step in range(20):
            x0, labels, indices = batch(small, 0, step, 20, flip=flip)
            assert x0.dtype == torch.float32 and indices.dtype == torch.int64
            assert labels is not None and torch.equal(labels, small.labels[indices])
            exact = small.images[indices].double() / 127.5 - 1
            same = (x0 - exact).abs().amax((1, 2, 3)) < 1e-6
            turned = (x0 - exact.flip(-1)).abs().amax((1, 2, 3)) < 1e-6
            assert (same | turned).all()
            mirrored += int(turned.sum())
        assert mirrored == 0 if not flip else 150 < mirrored < 250


def test_a_batch_spans_minus_one_to_one_and_leaves_the_data_alone() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).clone()
    x0, labels, _ = batch(ImageData(images), 0, 0, 2, flip=False)
    assert labels is None and x0.min() == -1 and x0.max() == 1
    x0.zero_()
    assert images.sum() == 255 * 128
    for step, size in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="batch_size"):
            batch(ImageData(images), 0, step, size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_the_same_on_every_device(small: ImageData) -> None:
    for a, b in zip(batch(small, 0, 2, 16), batch(small.to("cuda"), 0, 2, 16), strict=True):
        assert a is not None and b is not None and b.is_cuda and torch.equal(a, b.cpu())


# --- CIFAR-10 in the official format ----------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2 wrote for {'batch_label', 'labels', 'data', 'filenames'}, protocol 2."""
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNN"
        + 2 * b"J\xff\xff\xff\xff"
    )
    shape = (
        b"J" + struct.pack("<i", len(pixels)) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    )
    array += b"(K\x01" + shape + dtype + b"K\x00tb\x89" + text(pixels.tobytes()) + b"tb"
    marks = b"](" + b"".join(b"K" + bytes([i]) for i in labels) + b"e"
    names = b"](" + b"".join(text(b"tabby_%d.png" % i) for i in labels) + b"e"
    parts = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + marks
    return b"\x80\x02}(" + parts + text(b"data") + array + text(b"filenames") + names + b"u."


def md5(raw: bytes) -> str:
    return hashlib.md5(raw).hexdigest()


def make_archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for name in MEMBERS:
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    return out.getvalue()


class Official:
    """A small CIFAR-10: 6 batches of 20 images in the official files, whose hashes stand in for the official ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        self.images = random_images(6, 20, 3072)
        self.labels = np.random.default_rng(1).integers(0, 10, (6, 20))
        self.files = {
            n: python2_pickle(x, y.tolist())
            for n, x, y in zip(names, self.images, self.labels, strict=True)
        }
        self.files |= {
            "readme.html": b"<html>",
            "batches.meta": pickle.dumps({"label_names": []}, protocol=2),
        }
        self.bless()

    def bless(self) -> None:
        """Make the present files the official ones."""
        self.archive = make_archive(self.files)
        batches = {
            s: {n: md5(self.files[n]) for n in names}
            for s, names in cifar10.CIFAR10_BATCHES.items()
        }
        self.patch.setattr(cifar10, "CIFAR10_BATCHES", batches)
        self.bless_archive(self.archive)

    def bless_archive(self, archive: bytes) -> None:
        self.patch.setattr(cifar10, "CIFAR10_MD5", md5(archive))
        self.patch.setattr(cifar10, "CIFAR10_BYTES", len(archive))

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)

    def check(self, root: Path | None) -> None:
        for split, part in (("train", slice(0, 5)), ("test", slice(5, 6))):
            got = load_data("cifar10", root=root, split=split)
            assert got.images.numpy().tobytes() == self.images[part].tobytes()
            assert (
                got.images.shape[1:] == (3, 32, 32)
                and got.images.untyped_storage().nbytes() == got.images.numel()
            )
            assert (
                got.labels is not None and got.labels.tolist() == self.labels[part].ravel().tolist()
            )
            assert (got.name, got.num_classes, got.exact) == ("cifar10", 10, None)


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Official:
    monkeypatch.delenv("DYSIGMA_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(cifar10, "CIFAR10_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return Official(monkeypatch)


def test_the_pickles_of_these_tests_are_read_by_others_as_the_official_ones_are(
    official: Official,
) -> None:
    content = pickle.loads(official.files["data_batch_2"], encoding="latin1")
    assert sorted(content) == ["batch_label", "data", "filenames", "labels"]
    assert (
        np.array_equal(content["data"], official.images[1])
        and content["labels"] == official.labels[1].tolist()
    )


def test_cifar10_is_read_from_archive_folder_environment_and_cache(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cifar-10-python.tar.gz").write_bytes(official.archive)
    (tmp_path / "renamed.tar.gz").write_bytes(official.archive)
    (tmp_path / "a" / "cifar10.npz").write_bytes(b"not read where the official archive is")
    official.write(tmp_path / "b" / "cifar-10-batches-py")
    (tmp_path / "cache" / "dysigma").mkdir(parents=True)
    (tmp_path / "cache" / "dysigma" / "cifar-10-python.tar.gz").write_bytes(official.archive)
    for place in ("a", "a/cifar-10-python.tar.gz", "renamed.tar.gz", "b", "b/cifar-10-batches-py"):
        official.check(tmp_path / place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    official.check(None)
    monkeypatch.setenv("DYSIGMA_DATA", str(tmp_path / "b"))
    (tmp_path / "cache" / "dysigma" / "cifar-10-python.tar.gz").unlink()
    official.check(None)
    monkeypatch.setenv("DYSIGMA_DATA", str(tmp_path / "empty"))
    official.check(tmp_path / "a")
    assert not (tmp_path / "empty").exists()


def test_damaged_archives_and_batches_are_refused_before_they_are_unpickled(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled without verification")

    monkeypatch.setattr(cifar10, "_ArraysOnly", explode)
    archive, folder = tmp_path / "cifar-10-python.tar.gz", tmp_path / "cifar-10-batches-py"
    rng = np.random.default_rng(0)
    for raw in damaged(official.archive, rng, 12):
        archive.write_bytes(raw)
        with pytest.raises(ValueError, match=r"official.*MD5.*move it away") as caught:
            load_data("cifar10", root=tmp_path)
        assert str(archive) in str(caught.value) and "\n" not in str(caught.value)
    official.write(folder)
    for raw in damaged(official.files["data_batch_1"], rng, 12):
        (folder / "data_batch_1").write_bytes(raw)
        with pytest.raises(ValueError, match="data_batch_1 is truncated or changed"):
            load_data("cifar10", root=tmp_path)


def damaged(raw: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Truncations, single flipped bits and appended bytes."""
    for i in range(count):
        place = int(rng.integers(len(raw)))
        yield (
            raw[:place]
            if i % 2
            else raw[:place] + bytes([raw[place] ^ (1 << i % 8)]) + raw[place + 1 :]
        )
    yield raw + b"\0"
    yield b""


def test_damage_that_the_hashes_vouch_for_still_ends_in_one_clear_error(
    official: Official, tmp_path: Path
) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    rng = np.random.default_rng(1)
    refused = 0
    for raw in damaged(official.archive, rng, 30):
        archive.write_bytes(raw)
        official.bless_archive(raw)
        try:
            load_data("cifar10", root=tmp_path)
        except ValueError as error:
            assert "not the official CIFAR-10" in str(error)
            refused += 1
    assert refused > 20  # a bit of the gzip header or a byte after the end may not matter
    whole = official.files["data_batch_1"]
    for raw in damaged(whole, rng, 40):
        official.files["data_batch_1"] = raw
        official.bless()
        archive.write_bytes(official.archive)
        try:
            assert len(load_data("cifar10", root=tmp_path)) == 100
        except ValueError as error:
            assert "not the official CIFAR-10" in str(error)


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "os.system": lambda mark: b"cos\nsystem\n" + text(b"touch " + mark) + b"\x85R.",
    "a stacked name": lambda mark: (
        b"\x8c\x08builtins\x8c\x04exec\x93" + text(b"open('%s','w').close()" % mark) + b"\x85R."
    ),
    "numpy's functions": lambda mark: b"cnumpy\nsave\n" + text(mark) + b"K\x01\x86R.",
    "an attribute": lambda mark: (
        b"\x8c\x05numpy\x8c\x0endarray.tofile\x93" + text(mark) + b"\x85R."
    ),
    "a subclass": lambda mark: (
        b"cnumpy\nmemmap\n(" + text(mark) + text(b"u1") + text(b"w+") + b"K\x00K\x09tR."
    ),
    "a codec": lambda mark: b"c_codecs\nencode\n" + text(mark) + b"\x85R.",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_pickle_never_runs_even_with_the_right_hash(
    official: Official, tmp_path: Path, payload: Callable[[bytes], bytes]
) -> None:
    mark = tmp_path / "mark"
    official.files["data_batch_1"] = b"\x80\x04" + payload(str(mark).encode())
    official.bless()
    official.write(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match="which is no numpy array"):
        load_data("cifar10", root=tmp_path)
    assert not mark.exists()


def test_the_hostile_pickles_of_these_tests_do_run_elsewhere(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = HOSTILE["a stacked name"](str(mark).encode())
    pickle.loads(b"\x80\x04" + payload, encoding="latin1")
    assert mark.exists()


def test_nothing_in_an_archive_is_written_to_disk(official: Official, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in ("../escaped", "/tmp/dysigma-escaped", "cifar-10-batches-py/../../escaped"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    root = tmp_path / "inner" / "root"
    root.mkdir(parents=True)
    (root / "cifar-10-python.tar.gz").write_bytes(out.getvalue())
    official.bless_archive(out.getvalue())
    with pytest.raises(ValueError, match="test_batch missing"):
        load_data("cifar10", root=root, split="test")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["cifar-10-python.tar.gz"]


# --- download ---------------------------------------------------------------------------------------------------------


class Server:
    """Serves `body` on this machine; can ignore ranges, and break off after some bytes."""

    def __init__(self, body: bytes) -> None:
        self.body, self.ranges, self.breaks_after = body, True, None
        self.asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers["Range"]
                outer.asked.append(asked)
                start = (
                    int(asked.removeprefix("bytes=").rstrip("-")) if asked and outer.ranges else 0
                )
                rest = outer.body[start:]
                self.send_response(206 if asked and outer.ranges else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: outer.breaks_after])

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/cifar-10-python.tar.gz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(official: Official, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(official.archive)
    monkeypatch.setattr(cifar10, "CIFAR10_URL", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_an_absent_archive_is_downloaded_once(
    official: Official, server: Server, tmp_path: Path
) -> None:
    official.check(tmp_path / "new")
    assert server.asked == ["bytes=0-"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_off_download_is_continued(
    official: Official, server: Server, tmp_path: Path, ranges: bool
) -> None:
    server.ranges, server.breaks_after = ranges, 5000
    with pytest.raises(ConnectionError, match=r"5000 of \d+.*run again"):
        load_data("cifar10", root=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["cifar-10-python.tar.gz.part"]
    server.breaks_after = None
    official.check(tmp_path)
    assert server.asked == ["bytes=0-", "bytes=5000-"]


def test_a_complete_download_that_was_not_yet_renamed_is_used(
    official: Official, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(official.archive)
    official.check(tmp_path)
    assert server.asked == []


def test_a_tampered_download_is_removed(official: Official, server: Server, tmp_path: Path) -> None:
    server.body = official.archive[:-1] + b"?"
    with pytest.raises(ValueError, match=r"MD5.*removed, run again"):
        load_data("cifar10", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_offline_the_error_says_what_to_do(official: Official, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"http.*failed.*--data-root.*DYSIGMA_DATA"):
        load_data("cifar10", root=tmp_path / "none")
    with pytest.raises(ValueError, match="no CIFAR-10 file"):
        load_data("cifar10", root=tmp_path / "mistyped.tar.gz")


def test_the_address_is_https_and_every_official_file_has_a_hash() -> None:
    assert cifar10.CIFAR10_URL.startswith("https://")
    hashes = [
        cifar10.CIFAR10_MD5,
        *cifar10.CIFAR10_BATCHES["train"].values(),
        *cifar10.CIFAR10_BATCHES["test"].values(),
    ]
    assert len(set(hashes)) == 7 and all(len(h) == 32 and int(h, 16) for h in hashes)


# --- arrays of one's own ----------------------------------------------------------------------------------------------


def test_npz_with_both_splits(tmp_path: Path) -> None:
    train, test = random_images(40, 6, 6, 3), random_images(10, 6, 6, 3, seed=1)
    exact = np.arange(40) % 7 > 0
    path = tmp_path / "mine.npz"
    np.savez(
        path,
        train_images=train,
        train_labels=np.arange(40) % 3,
        train_exact=exact,
        test_images=test,
    )
    got = load_data(path)
    assert got.images.is_contiguous() and np.array_equal(
        got.images.permute(0, 2, 3, 1).numpy(), train
    )
    assert (
        got.labels is not None
        and got.labels.tolist() == [i % 3 for i in range(40)]
        and got.num_classes == 3
    )
    assert got.exact is not None and got.exact.tolist() == exact.tolist()
    got = load_data(path, split="test")
    assert np.array_equal(got.images.permute(0, 2, 3, 1).numpy(), test)
    assert got.labels is None and got.exact is None and got.num_classes is None
    assert len(load_data(path, num_images=5)) == 5
    path.rename(tmp_path / "cifar10.npz")
    for root in (tmp_path, tmp_path / "cifar10.npz"):
        named = load_data("cifar10", root=root)
        assert named.num_classes == 10 and named.name == "cifar10.npz" and named.exact is not None


@pytest.mark.parametrize("count", [2, 9, 10, 57])
def test_images_without_splits_give_every_tenth_to_the_test_split(
    tmp_path: Path, count: int
) -> None:
    images = random_images(count, 5, 5)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(count))
    parts = [load_data(tmp_path / "a.npz", split=split) for split in SPLITS]
    assert rows(parts[0].images) | rows(parts[1].images) == {i.tobytes() for i in images}
    assert len(parts[0]) + len(parts[1]) == count and len(parts[1]) == max(1, count // 10)
    for part in parts:
        assert part.labels is not None and part.images.shape[1:] == (1, 5, 5)
        assert np.array_equal(images[part.labels.numpy()], part.images[:, 0].numpy())


def test_one_copy_of_the_images_is_ever_in_memory(tmp_path: Path) -> None:
    images = random_images(2000, 32, 32, 3)
    np.savez(tmp_path / "a.npz", train_images=images, test_images=images[:1])
    size = images.nbytes
    del images
    tracemalloc.start()
    got = load_data(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * size
    assert got.images.untyped_storage().nbytes() == size
    assert got.to("cpu").images.data_ptr() == got.images.data_ptr()
    for side in (16, 32):
        first = load_data(tmp_path / "a.npz", num_images=10, size=side)
        assert first.images.untyped_storage().nbytes() == 10 * 3 * side * side
    drawn = leaves(20, 8)
    assert drawn.images.untyped_storage().nbytes() == drawn.images.numel()


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "float images": ({"images": np.zeros((4, 8, 8, 3))}, r"uint8 .*float64"),
    "channels first": (
        {"images": np.zeros((4, 3, 8, 8), np.uint8)},
        r"uint8 .*\(4, 3, 8, 8\)",
    ),
    "one image": ({"images": np.zeros((8, 8), np.uint8)}, "uint8"),
    "none": ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "none of them 0"),
    "other keys": ({"pixels": np.zeros((4, 8, 8), np.uint8)}, "no train images.*pixels"),
    "too few labels": (
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(3, int)},
        r"labels .*\(4,\)",
    ),
    "real labels": (
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(4)},
        r"labels must be torch\.int64",
    ),
    "negative": (
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.full(4, -1)},
        r"labels must lie in \[0",
    ),
    "exact": (
        {"images": np.zeros((4, 8, 8), np.uint8), "exact": np.ones(4)},
        r"exact must be torch\.bool",
    ),
    "objects": ({"images": np.array([None, {}])}, "allow_pickle"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_unusable_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "a.npz")


def test_a_damaged_npz_is_refused_or_read_right(tmp_path: Path) -> None:
    path, images = tmp_path / "a.npz", random_images(20, 8, 8, 3)
    np.savez(path, train_images=images, test_images=images[:1])
    raw = path.read_bytes()
    for bad in damaged(raw, np.random.default_rng(0), 200):
        path.write_bytes(bad)
        try:
            got = load_data(path)
        except ValueError as error:
            assert "a.npz" in str(error)
        else:
            assert np.array_equal(got.images.permute(0, 2, 3, 1).numpy(), images)


# --- pictures of one's own --------------------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_folders_name_the_classes_and_files_come_in_order(tmp_path: Path) -> None:
    images = random_images(20, 8, 8, 3)
    for i, pixels in enumerate(images):
        save(tmp_path / f"{'ab'[i // 10]}/deep/{i:02}.{'PNG' if i % 2 else 'png'}", pixels)
    save(tmp_path / ".cache" / "x.png", images[0])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    train, test = load_data(tmp_path), load_data(tmp_path, split="test")
    order = [i for i in range(20) if i not in (9, 19)]
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), images[order])
    assert (
        train.class_names == ("a", "b")
        and train.labels is not None
        and train.labels.tolist() == [0] * 9 + [1] * 9
    )
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), images[[9, 19]])
    few = load_data(str(tmp_path), num_images=4)
    assert few.labels is not None and few.labels.tolist() == [0, 0, 1, 1]


def test_train_and_test_folders_are_the_splits_and_share_their_classes(tmp_path: Path) -> None:
    for i, name in enumerate(
        ("train/cat/0.png", "train/dog/1.png", "train/eel/2.jpg", "test/dog/3.png")
    ):
        save(tmp_path / name, np.full((8, 8, 3), i, np.uint8))
    train, test = load_data(tmp_path), load_data(tmp_path, split="test")
    assert train.images.amax((1, 2, 3)).tolist() == [0, 1, 2] and test.images.amax(
        (1, 2, 3)
    ).tolist() == [3]
    assert train.class_names == test.class_names == ("cat", "dog", "eel")
    assert train.labels is not None and train.labels.tolist() == [0, 1, 2]
    assert test.labels is not None and test.labels.tolist() == [1]


def test_pictures_are_cropped_turned_and_put_on_white(tmp_path: Path) -> None:
    wide = random_images(8, 12, 3)
    save(tmp_path / "train" / "a.png", wide)
    got = load_data(tmp_path).images[0].permute(1, 2, 0)
    assert np.array_equal(got.numpy(), wide[:, 2:10])
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255
    save(tmp_path / "train" / "a.png", clear)
    image = load_data(tmp_path).images[0]
    assert (image[:, :4] == 0).all() and (image[:, 4:] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    gray = random_images(8, 8)
    save(tmp_path / "train" / "a.png", gray, exif=exif)
    assert np.array_equal(load_data(tmp_path).images[0, 0].numpy(), np.rot90(gray, -1))


@pytest.mark.parametrize(("side", "size"), [(32, 16), (24, 8), (20, 16), (10, 16)])
def test_resizing_is_the_block_mean_or_agrees_with_pillow(
    tmp_path: Path, side: int, size: int
) -> None:
    # Far from 0 and 255, where Pillow would clip between rows and columns.
    pixels = leaves(10, 48).images[:, :, :side, :side].permute(0, 2, 3, 1).numpy() // 2 + 64
    for i, image in enumerate(pixels):
        save(tmp_path / "pictures" / f"{i}.png", image)
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "a.npz", train_images=pixels, test_images=pixels)
    got = (
        load_data(tmp_path / "arrays" / "a.npz", size=size)
        .images.permute(0, 2, 3, 1)
        .numpy()
        .astype(float)
    )
    assert np.array_equal(
        got[:9], load_data(tmp_path / "pictures", size=size).images.permute(0, 2, 3, 1).numpy()
    )
    if side % size == 0:
        factor = side // size
        expected = pixels.reshape(10, size, factor, size, factor, 3).mean((2, 4))
        assert np.abs(got - expected).max() <= 0.5
    else:
        square = (size, size)
        expected = np.stack(
            [Image.fromarray(p).resize(square, Image.Resampling.BICUBIC) for p in pixels]
        )
        error = np.abs(got - expected)  # Pillow also rounds between rows and columns
        assert error.max() <= 2 and error.mean() < 0.5


def test_unusable_pictures_are_named(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", random_images(8, 8, 3, seed=i))
    save(tmp_path / "1.png", random_images(9, 9, 3))
    with pytest.raises(ValueError, match=r"1\.png.*9 pixels.*8.*size"):
        load_data(tmp_path)
    assert load_data(tmp_path, size=8).images.shape == (2, 3, 8, 8)
    whole = (tmp_path / "0.png").read_bytes()
    for raw in (whole[:60], b"", b"GIF89a"):
        (tmp_path / "1.png").write_bytes(raw)
        with pytest.raises(ValueError, match=r"1\.png cannot be read"):
            load_data(tmp_path)
    save(tmp_path / "1.png", random_images(8, 8, 3))
    save(tmp_path / "cats" / "0.png", random_images(8, 8, 3))
    with pytest.raises(ValueError, match="some images lie outside"):
        load_data(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        load_data(tmp_path / "empty")


# --- data as people have it -------------------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> None:
    """A picture for each name, all of one gray: that of its place in the list."""
    for value, name in enumerate(names):
        save(folder / name, np.full((8, 8, 3), value, np.uint8))


def values(data: ImageData) -> list[int]:
    return data.images.amax((1, 2, 3)).tolist()


SPLIT_FOLDERS: dict[str, tuple[tuple[str, ...], list[int], list[int], tuple[str, ...] | None]] = {
    "MNIST as PNG": (
        ("training/0/a.png", "training/1/a.png", "testing/0/a.png", "testing/1/a.png"),
        [0, 1], [2, 3], ("0", "1"),
    ),
    "capitals": (("TRAIN/a/1.png", "Test/a/1.png"), [0], [1], ("a",)),
    "sets": (("training_set/a/1.png", "test_set/b/1.png"), [0], [1], ("a", "b")),
    "years": (("train2017/1.png", "val2017/2.png"), [0], [1], None),
    "downsampled ImageNet": (("train_64x64/1.png", "valid_64x64/2.png"), [0], [1], None),
    "three splits": (("train/1.png", "val/2.png", "test/3.png"), [0], [2], None),
    "an unlabelled test folder": (
        ("train/a/1.png", "val/a/2.png", "test/3.png"), [0], [1], ("a",),
    ),
    "a folder around them": (("mnist/png/train/a/1.png", "mnist/png/test/a/2.png"), [0], [1], ("a",)),
    "classes first": (("cat/train/1.png", "cat/test/2.png", "dog/train/3.png"), [0, 2], [1], ("cat", "dog")),
    "a class that sounds like one": (
        ("train_station/1.png", "train_station/2.png", "cat/3.png"), [2, 0], [1], ("cat", "train_station"),
    ),
    "two classes that sound like one": (("strain/1.png", "contest/2.png"), [1], [0], ("contest", "strain")),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT_FOLDERS.values(), ids=SPLIT_FOLDERS.keys())
def test_folders_of_splits_are_told_from_classes(tmp_path: Path, case: Any) -> None:
    names, train, test, classes = case
    fill(tmp_path, *names)
    loaded = [load_data(tmp_path, split=split) for split in SPLITS]
    assert [values(part) for part in loaded] == [train, test]
    assert {part.class_names for part in loaded} == {classes}


def test_of_a_lone_train_folder_or_array_a_tenth_is_held_out_and_that_is_said(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "folder", *[f"train/{'ab'[i % 2]}/{i:02}.png" for i in range(20)])
    images = np.arange(20, dtype=np.uint8).repeat(64).reshape(20, 8, 8)
    np.savez(tmp_path / "a.npz", train_images=images)
    for name in ("folder", "a.npz"):
        with pytest.warns(UserWarning, match=r"no test .*every tenth"):
            parts = [load_data(tmp_path / name, split=split) for split in SPLITS]
        assert [len(part) for part in parts] == [18, 2]
        assert sorted(values(parts[0]) + values(parts[1])) == [*range(20)]


REFUSED_FOLDERS = {
    "a class or a split": (("train/1.png", "bus/2.png"), "class"),
    "no training pictures": (("test/a/1.png", "test/b/2.png"), "train"),
    "testing beside classes": (("Testing/1.png", "cats/2.png"), "train"),
    "two for training": (("train/1.png", "Train_2/2.png", "test/3.png"), "several"),
    "splits of another name": (("mnist_train/1.png", "mnist_test/2.png"), "sound like splits"),
    "numbered splits": (("01_Train/a/1.png", "02_Test/a/2.png"), "sound like splits"),
    "splits in a folder": (("set/split-train/1.png", "set/split-val/2.png"), "sound like splits"),
    "pairs of splits": (("trainA/1.png", "trainB/2.png", "testA/3.png"), "sound like splits"),
}


@pytest.mark.parametrize(("names", "word"), REFUSED_FOLDERS.values(), ids=REFUSED_FOLDERS.keys())
def test_splits_that_cannot_be_told_are_refused(
    tmp_path: Path, names: tuple[str, ...], word: str
) -> None:
    fill(tmp_path, *names)
    with pytest.raises(ValueError, match=word):
        load_data(tmp_path)


def test_pictures_outside_the_splits_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "test/2.png", "unlabeled/3.png", "preview.png")
    with pytest.warns(UserWarning, match=r"2 pictures .* passed over"):
        assert values(load_data(tmp_path)) == [0]


def test_a_class_may_be_called_valid(tmp_path: Path) -> None:
    fill(tmp_path, *[f"{name}/{i}.png" for name in ("invalid", "valid") for i in range(2)])
    assert load_data(tmp_path).class_names == ("invalid", "valid")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_pictures_train_and_a_single_one_also_tests(tmp_path: Path, count: int) -> None:
    fill(tmp_path / "folder", *[f"{i}.png" for i in range(count)])
    np.savez(tmp_path / "a.npz", images=np.zeros((count, 8, 8), np.uint8))
    for name in ("folder", "a.npz"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sizes = [len(load_data(tmp_path / name, split=split)) for split in SPLITS]
        assert sizes == [max(1, count - 1), 1]
        assert [("one image" in str(w.message)) for w in caught] == [True] * (
            2 if count == 1 else 0
        )


def test_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "store", "cats/1.png", "cats/2.png", "one.png")
    (tmp_path / "data").mkdir()
    for name, target in {"cat": "../store/cats", "cat2": "cat", "loop": "."}.items():
        (tmp_path / "data" / name).symlink_to(target)
    train = load_data(tmp_path / "data")
    assert train.class_names == ("cat", "cat2") and len(train) == 3
    (tmp_path / "files").mkdir()
    for number in range(3):
        (tmp_path / "files" / f"{number}.png").symlink_to(tmp_path / "store" / "one.png")
    assert values(load_data(tmp_path / "files")) == [2, 2]
    (tmp_path / "files" / "0.png").unlink()
    (tmp_path / "files" / "0.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"0\.png cannot be read"):
        load_data(tmp_path / "files")
    (tmp_path / "files" / "0.png").unlink()
    (tmp_path / "files" / "0.png").symlink_to("0.png")  # to itself
    with pytest.raises(ValueError, match=r"0\.png cannot be read"):
        load_data(tmp_path / "files")


STILL = ("bmp", "gif", "ppm", "tiff", "webp", "tga", "jp2", "avif", "ico", "jfif")


def test_every_still_picture_that_pillow_reads_is_read(tmp_path: Path) -> None:
    from PIL import features

    Image.init()
    square = np.full((16, 16, 3), 77, np.uint8)
    without = {
        name for name, need in (("jp2", "jpg_2000"), ("avif", "avif")) if not features.check(need)
    }
    endings = [ending for ending in STILL if ending not in without]
    for ending in endings:
        Image.fromarray(square).save(tmp_path / f"{ending}.{ending.upper()}", quality=100)
    data = load_data(tmp_path, num_images=len(endings) - 1)
    assert len(data) == len(endings) - 1
    assert (data.images.int() - 77).abs().max() <= 3


def test_a_file_is_read_by_what_it_is_whatever_its_name(tmp_path: Path) -> None:
    pixels = random_images(5, 8, 8, 3)
    for number, name in enumerate(("0.jpg", "1.png", "2", "3.heic", "4.gif")):
        with (tmp_path / name).open("wb") as file:
            Image.fromarray(pixels[number]).save(file, "BMP")
    found = load_data(tmp_path).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, pixels[:4])


def test_files_that_are_no_pictures_are_counted_and_notes_are_not(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("1,cat")
    (tmp_path / "README").write_text("about")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.heic").write_bytes(b"ftypheic")
    (tmp_path / "film.mp4").write_bytes(b"moving")
    with pytest.warns(UserWarning, match=r"4 files .*\(3 of \.heic"):
        assert len(load_data(tmp_path)) == 1


def test_of_a_film_the_first_frame_is_read_and_that_is_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (50, 150, 250)]
    for name in ("0.gif", "1.png", "2.tiff", "3.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=r"3 of 3.*several frames"):
        data = load_data(tmp_path)
    assert data.images[:, 0].unique().tolist() == [50]


@pytest.mark.parametrize(
    ("mode", "color", "wanted"),
    [
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("P", 1, (1, 2, 3)),
    ],
)
def test_all_kinds_of_pixels_become_colours(
    tmp_path: Path, mode: str, color: Any, wanted: tuple[int, int, int]
) -> None:
    image = Image.new(mode, (8, 8), color)
    if mode == "P":
        image.putpalette([0, 0, 0, 1, 2, 3])
    for number in range(2):
        image.save(tmp_path / f"{number}.tiff")
    assert load_data(tmp_path).images[0, :, 4, 4].tolist() == [*wanted]


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_colour_that_stands_for_transparency_is_white(
    tmp_path: Path, mode: str, clear: Any
) -> None:
    for number in range(2):
        Image.new(mode, (8, 8), clear).save(tmp_path / f"{number}.png", transparency=clear)
    assert (load_data(tmp_path).images == 255).all()


def test_previews_inside_a_photograph_are_no_frames(tmp_path: Path) -> None:
    photograph = Image.new("RGB", (8, 8), (200, 200, 200))
    for number in range(2):
        with (tmp_path / f"{number}.jpg").open("wb") as file:
            photograph.save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (load_data(tmp_path).images.int() - 200).abs().max() <= 2


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_gray_of_sixteen_bits_keeps_its_upper_eight(tmp_path: Path, ending: str) -> None:
    gray = random_images(8, 8)
    for number in range(2):
        Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / f"{number}.{ending}")
    assert np.array_equal(load_data(tmp_path).images[0, 1].numpy(), gray)
    for number in range(2):
        Image.fromarray(gray.astype(np.uint16) * 16).save(tmp_path / f"{number}.{ending}")
    with pytest.warns(UserWarning, match="16 bits below 4096"):
        load_data(tmp_path)


def test_pixels_without_a_known_white_are_refused(tmp_path: Path) -> None:
    for number, kind in enumerate((np.float32, np.int32)):
        Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / f"{number}.tiff")
        with pytest.raises(ValueError, match=r"\.tiff cannot be read .*white"):
            load_data(tmp_path, num_images=1, split="train" if number == 0 else "test")


DAMAGED_EXIF = (
    b"\x00\x08\x00\x02\x01\x12\x00\x03",
    b"XXXXXXXX",
    b"MM\x00*",
    b"II;\x00\x08\x00\x00\x00",
    b"",
)


@pytest.mark.parametrize("exif", DAMAGED_EXIF)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_pixels_are_read_whatever_their_exif(tmp_path: Path, exif: bytes, ending: str) -> None:
    pixels = np.full((8, 8, 3), 99, np.uint8)
    for number in range(2):
        save(tmp_path / f"{number}.{ending}", pixels, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (load_data(tmp_path).images.int() - 99).abs().max() <= 1


# .npz: arrays by name, what train and test must then hold, and their labels.
GRAY = {
    split: random_images(12, 8, 8, seed=seed) for seed, split in enumerate(("train", "val", "test"))
}
NAMED_ARRAYS = {
    "MedMNIST": ("{}_images", "{}_labels"),
    "Keras": ("x_{}", "y_{}"),
    "capitals": ("X_{}", "Y_{}"),
    "images first": ("images_{}", "labels_{}"),
}


@pytest.mark.parametrize(("images", "labels"), NAMED_ARRAYS.values(), ids=NAMED_ARRAYS.keys())
@pytest.mark.parametrize("shape", [(12,), (12, 1)])
@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "val")])
def test_arrays_are_found_by_the_names_they_have_elsewhere(
    tmp_path: Path, images: str, labels: str, shape: tuple[int, ...], splits: tuple[str, ...]
) -> None:
    arrays = {images.format(split): GRAY[split] for split in splits}
    numbers = {split: (np.arange(12, dtype=np.uint8) + i) % 5 for i, split in enumerate(splits)}
    arrays |= {labels.format(split): numbers[split].reshape(shape) for split in splits}
    np.savez(tmp_path / "a.npz", **arrays)
    for split, source in (("train", "train"), ("test", splits[-1])):
        data = load_data(tmp_path / "a.npz", split=split)
        assert np.array_equal(data.images[:, 0].numpy(), GRAY[source])
        assert data.labels is not None and data.labels.tolist() == numbers[source].tolist()


@pytest.mark.parametrize("kind", [str, np.bytes_])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_labels_of_text_keep_their_names_and_mean_the_same_in_both_splits(
    tmp_path: Path, kind: Any, shape: tuple[int, ...]
) -> None:
    train = np.array(["dog", "cat", "dog", "eel"]).astype(kind).reshape(shape)
    test = np.array(["eel", "fox", "eel", "cat"]).astype(kind).reshape(shape)
    images = np.zeros((4, 8, 8), np.uint8)
    arrays = {"train_images": images, "test_images": images}
    np.savez(tmp_path / "a.npz", **arrays, train_labels=train, test_labels=test)
    parts = [load_data(tmp_path / "a.npz", split=split) for split in SPLITS]
    assert {part.class_names for part in parts} == {("cat", "dog", "eel", "fox")}
    assert [part.labels.tolist() for part in parts if part.labels is not None] == [
        [1, 0, 1, 2],
        [2, 3, 2, 0],
    ]


@pytest.mark.parametrize("kind", [">i4", ">u2", ">i8"])
def test_labels_may_have_their_bytes_in_either_order(tmp_path: Path, kind: str) -> None:
    labels = np.array([300, 0, 2], dtype=kind)
    np.savez(tmp_path / "a.npz", train_images=np.zeros((3, 8, 8), np.uint8), train_labels=labels,
             test_images=np.zeros((1, 8, 8), np.uint8), test_labels=labels[:1])  # fmt: skip
    data = load_data(tmp_path / "a.npz")
    assert data.labels is not None and data.labels.tolist() == [300, 0, 2]


def test_several_labels_an_image_are_passed_over_and_that_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GRAY["train"], labels=np.ones((12, 14), np.uint8))
    with pytest.warns(UserWarning, match=r"labels .*\(12, 14\).* passed over"):
        assert load_data(tmp_path / "a.npz").labels is None


def test_arrays_without_names_are_images_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.NPZ.npz", GRAY["train"], np.arange(12) % 3)
    (tmp_path / "a.NPZ.npz").rename(tmp_path / "a.NPZ")
    data = load_data(tmp_path / "a.NPZ")
    assert len(data) == 11 and data.num_classes == 3


def test_what_is_not_a_data_set_is_named_for_what_it_is(tmp_path: Path) -> None:
    save(tmp_path / "dog.png", random_images(8, 8, 3))
    with pytest.raises(ValueError, match=r"dog\.png is a file.* folder"):
        load_data(tmp_path / "dog.png")
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "a.npz", images=GRAY["train"])
    with (
        pytest.warns(UserWarning, match="npz"),
        pytest.raises(ValueError, match=r"no pictures.*\.npz files"),
    ):
        load_data(tmp_path / "arrays")
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, GRAY["train"])
    with pytest.raises(ValueError, match=r"one\.npz.*one array"):
        load_data(tmp_path / "one.npz")


@pytest.mark.parametrize("source", ["folder", "a.npz"])
def test_gray_images_fill_one_channel_or_three(tmp_path: Path, source: str) -> None:
    gray = random_images(4, 8, 8)
    for number, pixels in enumerate(gray):
        save(tmp_path / "folder" / f"{number}.png", pixels)
    np.savez(tmp_path / "a.npz", images=gray)
    for channels in (1, 3):
        data = load_data(tmp_path / source, channels=channels)
        assert data.images.shape == (3, channels, 8, 8) and data.images.is_contiguous()
        assert np.array_equal(data.images[:, -1].numpy(), gray[:3])
    save(tmp_path / "folder" / "1.png", random_images(8, 8, 3))
    with pytest.raises(ValueError, match=r"1 channels .* gray"):
        load_data(tmp_path / "folder", channels=1)


def test_oblong_sizes_take_the_largest_central_part(tmp_path: Path) -> None:
    pixels = random_images(2, 32, 48, 3)
    for number, image in enumerate(pixels):
        save(tmp_path / f"{number}.png", image)
    found = load_data(tmp_path, size=(8, 16)).images
    # 24 of 32 lines and all columns, in blocks of 3 x 3.
    blocks = pixels[:1, 4:28].reshape(1, 8, 3, 16, 3, 3).mean((2, 4))
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - blocks).max() <= 0.5
    assert load_data(tmp_path, size=(16, 8)).images.shape == (1, 3, 16, 8)
    assert load_data("leaves", size=(8, 16), num_images=3).images.shape == (3, 3, 8, 16)
    assert torch.equal(load_data(tmp_path, size=(8, 8)).images, load_data(tmp_path, size=8).images)


def test_wrong_arguments_are_restated() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"source": "cifar100"}, "'cifar100'.*'leaves'.*'cifar10'"),
        ({"source": "nowhere.npz"}, "nowhere.npz"),
        ({"source": "leaves", "split": "validation"}, "'validation'.*train.*test"),
        ({"source": "leaves", "size": 4}, "size=4"),
        ({"source": "leaves", "num_images": 0}, "num_images=0"),
        ({"source": "leaves", "size": 16.5}, "size=16.5"),
        ({"source": "leaves", "channels": 4}, "channels=4"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            load_data(**arguments)
    with pytest.raises(ValueError, match="size >= 8"):
        leaves(4, 7)
    with pytest.raises(ValueError, match=r"labels.*\[0, 2\).* 2"):
        ImageData(
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([2]), class_names=("a", "b")
        )
    with pytest.raises(ValueError, match="uint8"):
        ImageData(torch.zeros(1, 3, 8, 8))


def test_asking_for_more_images_than_there_are_says_how_many(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=random_images(20, 8, 8))
    with pytest.raises(ValueError, match=r"18 train.*19"):
        load_data(tmp_path / "a.npz", num_images=19)
