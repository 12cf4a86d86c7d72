"""Checks of names, numbers and timesteps that all rooms share: one clear line for bad input."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite: in training, a sign of divergence."""


def check_name(
    what: str, name: str, known: Iterable[str], more: str = "", error: type[Exception] = KeyError
) -> None:
    """Raise error, with the name that was perhaps meant, all known ones and more, unless name is one of them."""
    if name not in (names := list(known)):
        near = difflib.get_close_matches(str(name), names, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise error(f"unknown {what} {name!r}{meant}; have {names}{more}")


def check_timesteps(timesteps: Tensor, num_timesteps: int, batch: int | None = None) -> None:
    """Raise ValueError unless timesteps is (B,) int64 in [0, num_timesteps), with B == batch if given.

    The range is not checked while torch.compile traces, nor on an accelerator, where it would stall the device.
    """
    if (
        timesteps.ndim != 1
        or timesteps.dtype != torch.int64
        or (batch is not None and len(timesteps) != batch)
    ):
        wanted = "(B,)" if batch is None else f"({batch},)"
        raise ValueError(
            f"timesteps must be {wanted} int64 in [0, {num_timesteps}); "
            f"got shape {tuple(timesteps.shape)}, dtype {timesteps.dtype}"
        )
    if torch.compiler.is_compiling() or timesteps.device.type != "cpu" or timesteps.numel() == 0:
        return
    low, high = int(timesteps.min()), int(timesteps.max())
    if low < 0 or high >= num_timesteps:
        raise ValueError(
            f"timesteps must lie in [0, {num_timesteps}); got values from {low} to {high}"
        )


def check_options(name: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    if set(options) - set(known):
        raise ValueError(
            f"{name} has no parameter {sorted(set(options) - set(known))}; it has {known}"
        )


def check_number(name: str, value: Any, low: float = 0.0, kinds: Any = int | float) -> Any:
    # Weights are float32: what lies beyond would overflow there, in the middle of a run.
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or not max(low, -1e30) < value < 1e30
    ):
        kind = "int" if kinds is int else "number"
        raise ValueError(f"{name} must be a {kind} > {max(low, -1e30):g} and < 1e30; got {value!r}")
    return value


def find_named(
    name: str | Callable[..., Any], known: Mapping[str, Callable[..., Any]], what: str
) -> Callable[..., Any]:
    """known[name], a callable as it is, or what "module:function" names; the module may lie in the working folder."""
    if callable(name) or name in known:
        return name if callable(name) else known[name]
    if not re.fullmatch(r"[a-zA-Z_][\w.]*:[a-zA-Z_]\w*", name):
        check_name(what, name, known, more=", or one of your own as 'module:function'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides a package
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ImportError(
            f"{what} {name!r}: {error} (installed modules and the working folder were searched)"
        ) from error
    if not callable(found):
        raise KeyError(f"{what} {name!r}: {module} has no function or class {function}")
    return found
