"""For notebooks: sizes for a short run, recorded predictions, checked exercises, and what a page was run with."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from ..checks import check_name

_predictions: dict[str, Any] = {}

_exercises: dict[str, tuple[Any, dict[str, Any], float]] = {}


def fast(full: Any, quick: Any) -> Any:
    """``quick`` when DYSIGMA_FAST=1, else ``full``: the same code path at two sizes."""
    return quick if os.environ.get("DYSIGMA_FAST") == "1" else full


def banner(notebook: str) -> None:
    """Print which notebook this is, what runs it, and whether the run is full or shortened."""
    warnings.filterwarnings(
        "ignore", message="IProgress not found"
    )  # diffusers' progress bars ask for widgets
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        notebook,
        f"dysigma {version('dysigma')}",
        f"torch {torch.__version__}",
        device,
        sep=" · ",
        end=" · ",
    )
    print(fast("full run", "short run (DYSIGMA_FAST=1): smaller sizes, looser numbers"))


def watermark() -> None:
    """Print the versions that produced the outputs above; the last cell of every notebook."""
    names = ("dysigma", "torch", "diffusers", "numpy", "scipy", "matplotlib", "seaborn")
    print(
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in names)
    )


def check_environment(extra: str = "notebooks") -> bool:
    """Compare what is installed with what the package declares, print a verdict, and return whether all is well."""
    from packaging.requirements import Requirement

    problems, listed = [], map(Requirement, requires("dysigma") or [])
    needs = [
        need for need in listed if need.marker is None or need.marker.evaluate({"extra": extra})
    ]
    for need in needs:
        try:
            if not need.specifier.contains(found := version(need.name), prereleases=True):
                problems.append(f"{need.name} is {found}; this package needs {need.specifier}")
        except PackageNotFoundError:
            problems.append(f"{need.name} is not installed")
    print(
        "\n".join(f"✗ {line}" for line in problems)
        or f"✓ all {len(needs)} required packages are here"
    )
    gpu = (
        "a GPU is here" if torch.cuda.is_available() else "no GPU: every notebook runs without one"
    )
    print(f"✓ Python {platform.python_version()}; {gpu}")
    print(
        "Verdict: "
        + ("run `make setup` once more, then restart the kernel." if problems else "you can start.")
    )
    return not problems


def predict(question: str, guess: Any) -> None:
    """Record a guess, a number or a word, before the result is known."""
    _predictions[question] = guess
    print(f"{question} Your prediction: {'none yet' if guess is ... else guess}")


def reveal(question: str, measured: Any) -> None:
    """Print the measured value beside the prediction; KeyError when the question was never asked."""
    if question not in _predictions:
        raise KeyError(f"no prediction was recorded for {question!r}; have {sorted(_predictions)}")
    guess = _predictions[question]
    if guess is ... or isinstance(guess, str):
        verdict = (
            "no prediction to compare"
            if guess is ...
            else "as predicted"
            if guess == measured
            else "a surprise"
        )
    elif guess * measured > 0:
        ratio = max(guess / measured, measured / guess)
        side = "too high" if abs(guess) > abs(measured) else "too low"
        verdict = (
            "close"
            if ratio < 1.1
            else f"{side} by a factor of {ratio:{'.2g' if ratio < 100 else '.0f'}}"
        )
    else:
        verdict = "exactly" if guess == measured else f"off by {abs(guess - measured):.3g}"
    shown = f"{measured:.3g}" if isinstance(measured, float) else measured
    print(
        f"{question} Predicted {'nothing' if guess is ... else guess}, measured {shown}: {verdict}."
    )


def exercise(
    name: str, expected: Any, *, mistakes: Mapping[str, Any] | None = None, rtol: float = 1e-4
) -> None:
    """Declare an exercise: the value a right answer has, and wrong values that common mistakes give, by diagnosis."""
    _exercises[name] = expected, dict(mistakes or {}), rtol


def check(name: str, answer: Any) -> None:
    """Print whether ``answer`` is right and, if not, what is wrong with it; an untouched ``...`` is skipped."""
    check_name("exercise", name, _exercises)
    reply = "not attempted yet. Replace the ... and run the cell again."
    if answer is not ... and answer is not None:
        reply = (
            f"not yet. {problem}"
            if (problem := _diagnose(answer, *_exercises[name]))
            else "correct."
        )
    print(f"Exercise {name}: {reply}")


def _diagnose(answer: Any, expected: Any, mistakes: dict[str, Any], rtol: float) -> str:
    if isinstance(expected, str):
        return (
            ""
            if answer == expected
            else next((text for text, bad in mistakes.items() if bad == answer), "Wrong.")
        )
    got, want = (torch.as_tensor(value).detach().double().cpu() for value in (answer, expected))
    if got.shape != want.shape:
        return f"Its shape is {tuple(got.shape)}; expected {tuple(want.shape)}."
    if len(odd := got[~got.isfinite() & want.isfinite()]):
        return f"It is {odd[0]} at {len(odd)} of {got.numel()} places: is something divided by 0?"
    if torch.allclose(got, want, rtol=rtol, atol=1e-12):
        return ""
    wrong = {
        text: torch.as_tensor(value).double().expand(want.shape) for text, value in mistakes.items()
    }
    if known := [
        text for text, value in wrong.items() if torch.allclose(got, value, rtol=rtol, atol=1e-12)
    ]:
        return known[0]
    scale = got.sum() / want.sum()
    if got.numel() > 1 and torch.allclose(got, scale * want, rtol=rtol, atol=1e-12):
        return f"The shape is right, but it is {scale:.4g} times the right answer everywhere."
    worst = int(((got - want).abs() / (got.abs() + want.abs() + 1e-12)).argmax())
    side = "large" if got.flatten()[worst] > want.flatten()[worst] else "small"
    return f"Furthest off at index {worst}: {got.flatten()[worst]:.4g} is too {side}."
