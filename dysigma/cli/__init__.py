"""The command line: one small file a command."""

from .main import main

__all__ = ["main"]
