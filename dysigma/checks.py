"""Checks of names, numbers and timesteps that all rooms share: one clear line for bad input."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite: in training, a sign of divergence."""


def check_name(
    what: str, name: str, known: Iterable[str], more: str = "", error: type[Exception] = KeyError
) -> None:
    """Raise error unless name is one of the known ones.

    The message shows the name that was perhaps meant, all known ones, and more.

    >>> check_name("colour", "red", ["red", "green"])
    >>> check_name("colour", "gren", ["red", "green"], error=ValueError)
    Traceback (most recent call last):
    ValueError: unknown colour 'gren' (did you mean 'green'?); have ['red', 'green']
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, 1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    raise error(f"unknown {what} {name!r}{meant}; have {names}{more}")


def described(value: Any) -> str:
    """What was given in the place of an object, for the message of an error.

    >>> described(int), described("cosine"), described({"lr": 1e-3}), described(None)
    ('the class int', "the text 'cosine'", 'a configuration', 'NoneType')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return "a configuration" if isinstance(value, Mapping) else type(value).__name__


def check_timesteps(timesteps: Tensor, num_timesteps: int, batch: int | None = None) -> None:
    """Raise ValueError unless timesteps is (B,) int64 in [0, num_timesteps), with B == batch if
    given.

    The range is not checked while torch.compile traces, nor on an accelerator, where it would stall
    the device.
    """
    wanted = "(B,)" if batch is None else f"({batch},)"
    need = f"timesteps must be {wanted} int64 in [0, {num_timesteps})"
    if not isinstance(timesteps, Tensor):
        raise ValueError(f"{need}; got {type(timesteps).__name__}: use torch.tensor(timesteps)")
    got = f"got shape {tuple(timesteps.shape)}, dtype {timesteps.dtype}"
    if timesteps.is_floating_point():
        raise ValueError(
            f"{need}; {got}. Loops in continuous time (SD3, Flux, EDM) have levels in place of timesteps: call "
            "weighting.at(losses, log_snr), for a flow with log_snr = 2 ln((1 - sigma) / sigma)"
        )
    if timesteps.ndim != 1 or (batch is not None and len(timesteps) != batch):
        raise ValueError(f"{need}; {got}")
    if timesteps.dtype != torch.int64:
        raise ValueError(f"{need}; {got}. Use timesteps.long()")
    is_checked = timesteps.device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_checked or timesteps.numel() == 0:
        return
    low = int(timesteps.min())
    high = int(timesteps.max())
    if low < 0 or high >= num_timesteps:
        raise ValueError(
            f"timesteps must lie in [0, {num_timesteps}); got values from {low} to {high}"
        )


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class, after its first, that can be given by name.

    The first is what the function is about: log_snr of a formula, the setting of a weighting.

    >>> [*keyword_parameters(lambda log_snr, power, *, shift=0.0: power * log_snr + shift)]
    ['power', 'shift']
    """
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        del parameters[0]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each for each in parameters if each.kind in by_name}


def check_options(name: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise ValueError unless the options are what the function takes by name after its first
    argument."""
    known = keyword_parameters(function)
    every = inspect.signature(function).parameters.values()
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in every)
    unknown = sorted(set(options) - set(known))
    if unknown and not takes_any:
        raise ValueError(f"{name} has no parameter {unknown}; it has {[*known]}")
    needed = [key for key, each in known.items() if each.default is inspect.Parameter.empty]
    missing = [key for key in needed if key not in options]
    if missing:
        raise ValueError(f"{name} needs a value for {missing}, by name")


def plain_number(value: Any) -> Any:
    """A NumPy scalar, or a tensor or array without dimensions, as a Python number; anything else as
    it is.

    >>> plain_number(np.int64(5)), plain_number(torch.tensor(0.5)), plain_number("five")
    (5, 0.5, 'five')
    """
    is_scalar = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    return value.item() if is_scalar else value


def check_number(
    name: str,
    value: Any,
    low: float = 0.0,
    kinds: Any = int | float,
    *,
    inclusive: bool = False,
    high: float = 1e30,
) -> Any:
    """value as a Python number, if it is one in (low, high), or in [low, high) if inclusive.

    NumPy scalars and tensors without dimensions count as numbers; bool does not. kinds=int asks for
    an integer. Raises ValueError that names what is wanted. high: weights are float32, and what
    lies beyond 1e30 would overflow there in the middle of a run.

    >>> check_number("gamma", np.float32(0.5))
    0.5
    >>> check_number("gamma", -1.0)
    Traceback (most recent call last):
    ValueError: gamma must be a number > 0 and < 1e30; got -1.0
    """
    number = plain_number(value)
    low = max(low, -1e30)
    is_number = isinstance(number, kinds) and not isinstance(number, bool)
    if is_number and (low < number < high or (inclusive and number == low)):
        return number
    kind = "an int" if kinds is int else "a number"
    sign = ">=" if inclusive else ">"
    limit = "finite" if math.isinf(high) else f"< {high:g}".replace("e+", "e")
    raise ValueError(f"{name} must be {kind} {sign} {low:g} and {limit}; got {value!r}")


def find_named(
    name: str | Callable[..., Any], known: Mapping[str, Callable[..., Any]], what: str
) -> Callable[..., Any]:
    """known[name], a callable as it is, or what "module:function" names.

    The module may lie in the working folder; it is imported, so run. Raises KeyError for an unknown
    name or function, ImportError for a module that does not load.
    """
    if callable(name):
        return name
    if isinstance(name, str) and name in known:
        return known[name]
    if not re.fullmatch(r"[a-zA-Z_][\w.]*:[a-zA-Z_]\w*", str(name)):
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
    own: Callable[..., Any] = found
    return own
