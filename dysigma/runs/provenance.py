"""What a number needs to be traced back: versions, device, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Versions, device and commit of this process: what a number needs to be traced back."""
    import diffusers

    return {
        "dysigma_commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu_threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" if tracked files differ; None outside git."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--exclude=*"]
    command += ["--dirty=+changes", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
