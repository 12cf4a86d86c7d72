"""What a reader of a page answers: guesses, kept until the result is known, and exercises, which are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_name

ABSOLUTE_TOLERANCE = 1e-12


@dataclass(frozen=True)
class _Exercise:
    expected: Any
    mistakes: dict[str, Any]  # diagnosis -> the wrong answer that it explains
    rtol: float


_predictions: dict[str, Any] = {}
_exercises: dict[str, _Exercise] = {}


# Predictions.


def predict(question: str, guess: Any) -> None:
    """Record a guess, a number or a word, before the result is known; None or ``...`` stands for no guess.

    >>> predict("How many times fewer images?", 3.7)
    How many times fewer images? Your prediction: 3.7
    >>> predict("And with noise networks?", None)
    And with noise networks? No guess was given.
    """
    if guess is ...:
        guess = None
    _predictions[question] = guess
    print(question, "No guess was given." if guess is None else f"Your prediction: {guess}")


def reveal(question: str, measured: Any) -> None:
    """Print the measured value beside the prediction; KeyError when the question was never asked.

    >>> predict("How does the loss change, in %?", -5.0)
    How does the loss change, in %? Your prediction: -5.0
    >>> reveal("How does the loss change, in %?", 2.5)
    How does the loss change, in %? Predicted -5.0, measured 2.5: it goes the other way.
    """
    if question not in _predictions:
        raise KeyError(f"no prediction was recorded for {question!r}; have {sorted(_predictions)}")
    guess = _predictions[question]
    shown = f"{measured:.3g}" if isinstance(measured, float) else measured
    if guess is None:
        print(f"{question} Measured {shown}. No guess was given.")
        return
    print(f"{question} Predicted {guess}, measured {shown}: {_compare(guess, measured)}.")


def _compare(guess: Any, measured: Any) -> str:
    """What a guess was worth, in words; numbers with their signs."""
    if isinstance(guess, str):
        return "as predicted" if guess == measured else "a surprise"
    if guess == measured:
        return "exactly"
    if guess * measured < 0:
        return "it goes the other way"
    side = "too high" if guess > measured else "too low"
    if guess == 0 or measured == 0:
        return f"{side} by {abs(guess - measured):.3g}"
    ratio = max(guess / measured, measured / guess)
    if ratio < 1.1:
        return "close"
    factor = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
    return f"{side} by a factor of {factor}"


# Exercises.


def exercise(
    name: str, expected: Any, *, mistakes: Mapping[str, Any] | None = None, rtol: float = 1e-4
) -> None:
    """Declare an exercise.

    expected: the right answer, a word, a number or an array. mistakes: the wrong answers that
    common mistakes give, by diagnosis. rtol: relative tolerance of numbers.

    >>> exercise("3.2", "epsilon")
    >>> check("3.2", "epsilon")
    Exercise 3.2: correct.
    """
    _exercises[name] = _Exercise(expected, dict(mistakes or {}), rtol)


def check(name: str, answer: Any) -> None:
    """Print whether an answer is right and, if not, what is wrong with it; an untouched ``...`` is skipped.

    Raises KeyError for an exercise that was not declared.

    >>> exercise("3.1", 4.0, mistakes={"You forgot the square.": 2.0})
    >>> check("3.1", 2.0)
    Exercise 3.1: not yet. You forgot the square.
    >>> check("3.1", ...)
    Exercise 3.1: not attempted yet. Replace the ... and run the cell again.
    """
    check_name("exercise", name, _exercises)
    if answer is ... or answer is None:
        reply = "not attempted yet. Replace the ... and run the cell again."
    else:
        problem = _diagnose(answer, _exercises[name])
        reply = f"not yet. {problem}" if problem else "correct."
    print(f"Exercise {name}: {reply}")


def _as_tensor(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().double().cpu()


def _diagnose(answer: Any, exercise: _Exercise) -> str:
    """What is wrong with an answer, or nothing."""
    if isinstance(exercise.expected, str):
        return _diagnose_word(answer, exercise)

    got = _as_tensor(answer)
    want = _as_tensor(exercise.expected)
    if got.shape != want.shape:
        return f"Its shape is {tuple(got.shape)}; expected {tuple(want.shape)}."
    odd = got[~got.isfinite() & want.isfinite()]
    if len(odd):
        return f"It is {odd[0]} at {len(odd)} of {got.numel()} places: is something divided by 0?"

    def equals(value: Tensor) -> bool:
        return torch.allclose(got, value, rtol=exercise.rtol, atol=ABSOLUTE_TOLERANCE)

    if equals(want):
        return ""
    for diagnosis, value in exercise.mistakes.items():
        if equals(_as_tensor(value).expand(want.shape)):
            return diagnosis
    scale = got.sum() / want.sum()
    if got.numel() > 1 and equals(scale * want):
        return f"The shape is right, but it is {scale:.4g} times the right answer everywhere."
    relative_error = (got - want).abs() / (got.abs() + want.abs() + ABSOLUTE_TOLERANCE)
    worst = int(relative_error.argmax())
    value = got.flatten()[worst]
    side = "large" if value > want.flatten()[worst] else "small"
    return f"Furthest off at index {worst}: {value:.4g} is too {side}."


def _diagnose_word(answer: Any, exercise: _Exercise) -> str:
    if answer == exercise.expected:
        return ""
    for diagnosis, wrong in exercise.mistakes.items():
        if answer == wrong:
            return diagnosis
    return "Wrong."
