"""Published files: where they lie, how they are fetched and verified."""

from __future__ import annotations

import hashlib
import os
from http.client import HTTPException
from io import BufferedIOBase
from pathlib import Path
from urllib.request import Request, urlopen


def data_folder(root: str | Path | None = None) -> Path:
    """Where downloads lie: root, else the environment variable DYSIGMA_DATA, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dysigma"
    return Path(root or os.environ.get("DYSIGMA_DATA") or cache).expanduser()


def check_digest(stream: BufferedIOBase, name: str, expected: str) -> None:
    """Raise ValueError unless a binary stream has the expected MD5 (32 hex digits) or SHA-256 (64).

    >>> from io import BytesIO
    >>> check_digest(BytesIO(b""), "nothing", "d41d8cd98f00b204e9800998ecf8427e")
    """
    kind = "MD5" if len(expected) == 32 else "SHA256"
    digest = hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False))
    found = digest.hexdigest()
    if found != expected:
        raise ValueError(
            f"{name} is truncated or changed: its {kind} is {found}, the official one {expected}"
        )


def download(what: str, url: str, target: Path, size: int, digest: str, options: str) -> None:
    """Fetch a published file over HTTPS and verify it.

    What an interrupted download left in `.part` is continued. what: how messages call the file;
    options: how the user names another place for it. Raises ConnectionError when it cannot be had,
    ValueError if what arrives is not that file.
    """
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        if done < size:
            done = _fetch(url, part, done, size)
        if done < size:
            raise ConnectionError(f"it broke off after {done} of {size} bytes")
        with part.open("rb") as stream:
            check_digest(stream, "the download", digest)
        part.replace(target)
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"{what} is not in {target.parent}, and downloading {url} failed ({error}): run again when "
            f"online to continue, put that file there, or name a place that holds it ({options})"
        ) from error
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}; it was removed, run again") from error


def _fetch(url: str, part: Path, done: int, size: int) -> int:
    """Append what is missing of a file, or all of it where the server knows no ranges; its bytes."""
    from tqdm import tqdm

    request = Request(url, headers={"Range": f"bytes={done}-"})
    with urlopen(request, timeout=30) as reply:
        is_continued = reply.status == 206
        with part.open("ab" if is_continued else "wb") as file:
            before = file.tell()
            with tqdm(total=size, initial=before, unit="B", unit_scale=True, desc=part.stem) as bar:
                while block := reply.read(1 << 20):
                    bar.update(file.write(block))
            return file.tell()
