"""Published files: where they lie, how they are fetched and verified."""

from __future__ import annotations

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def data_folder(root: str | Path | None = None) -> Path:
    """Where downloads lie: root, else the environment variable DYSIGMA_DATA, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dysigma"
    return Path(root or os.environ.get("DYSIGMA_DATA") or cache).expanduser()


def check_digest(stream: Any, name: str, expected: str) -> None:
    """Raise ValueError unless a binary stream has the expected MD5 (32 hex digits) or SHA-256 (64)."""
    kind = "MD5" if len(expected) == 32 else "SHA256"
    found = hashlib.file_digest(
        stream, lambda: hashlib.new(kind, usedforsecurity=False)
    ).hexdigest()
    if found != expected:
        raise ValueError(
            f"{name} is truncated or changed: its {kind} is {found}, the official one {expected}"
        )


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
            with (
                urlopen(request, timeout=30) as reply,
                part.open("ab" if reply.status == 206 else "wb") as file,
            ):
                with tqdm(
                    total=size, initial=file.tell(), unit="B", unit_scale=True, desc=target.name
                ) as bar:
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
