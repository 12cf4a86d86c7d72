"""Run folders: what a training run leaves behind, written so that a crash at any moment loses nothing that was whole.

config.json  metrics.jsonl  summary.json  checkpoint/  pipeline/
"""

from .checkpoints import differences, load_checkpoint, save_checkpoint
from .files import (
    RunError,
    append_metrics,
    digest,
    read_config,
    read_json,
    read_metrics,
    write_atomically,
    write_json,
)
from .folder import Run, find_runs, load_run
from .locks import lock
from .provenance import provenance

__all__ = [
    "Run",
    "RunError",
    "append_metrics",
    "differences",
    "digest",
    "find_runs",
    "load_checkpoint",
    "load_run",
    "lock",
    "provenance",
    "read_config",
    "read_json",
    "read_metrics",
    "save_checkpoint",
    "write_atomically",
    "write_json",
]
