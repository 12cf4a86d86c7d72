"""The page on flows: its formulas and numbers are those of the weightings and samplers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from dysigma import NoiseSchedule, make_sampler, make_weighting
from dysigma.samplers import effective_weights
from dysigma.weightings.formulas import PREDEFINED

PAGE = Path(__file__).resolve().parents[2] / "notebooks/reference/flows.md"
TEXT = PAGE.read_text(encoding="utf-8")
FLOW = NoiseSchedule.flow(1000)
LEVELS = np.arange(1, 1001) / 1000
SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9)

Row = tuple[str, str, list[float]]


def rows_below(heading: str) -> list[Row]:
    """First cell, formula, numbers of the table that follows a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    found = []
    for line in lines:
        name, formula, *numbers = [cell.strip() for cell in line.strip("|").split(" | ")]
        found.append((name, formula, [float(number) for number in numbers]))
    return found


WEIGHTS = rows_below("Every named weighting on the velocity error")
DENSITIES = rows_below("A density is a weighting too")


def at_shown(table: np.ndarray) -> list[float]:
    return [table[round(1000 * s) - 1] for s in SHOWN]


def evaluated(formula: str) -> np.ndarray:
    """A formula of the page over the levels, with mean 1."""
    text = formula.partition(" with c")[0].partition(", and")[0]
    for sign, word in {"²": "**2", "−": "-", "·": "*"}.items():
        text = text.replace(sign, word)
    names = {
        "s": LEVELS,
        "c": math.exp(2),
        "min": np.minimum,
        "max": np.maximum,
        "exp": np.exp,
        "ln": math.log,
        "logit": lambda s: np.log(s / (1 - s)),
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.nan_to_num(eval(text, {"__builtins__": {}}, names) * np.ones(1000))
    return values / values.mean()


def weights(name: str) -> np.ndarray:
    return make_weighting(name, FLOW, "flow_prediction").weights().double().numpy()


def sampler_weights(cell: str) -> np.ndarray:
    name, shift = re.match(r"`([\w-]+)`(?: with `shift=(\d)`)?", cell).groups()
    params = {"shift": float(shift)} if shift else {}
    return effective_weights(make_sampler(name, FLOW, **params)).numpy()


def test_a_row_is_of_a_predefined_weighting_and_none_comes_twice():
    names = [name.strip("`") for name, _, _ in WEIGHTS]
    assert set(names) <= set(PREDEFINED)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "formula", "numbers"), WEIGHTS, ids=lambda value: str(value)[:20])
def test_a_weighting_has_the_formula_and_the_numbers_of_its_row(name, formula, numbers):
    table = weights(name.strip("`"))
    assert_allclose(numbers, at_shown(table), atol=0.0051)
    expected = evaluated(formula)
    if name == "`elbo`":  # a difference of two levels: compared away from the ends, up to a factor
        ratio = table[150:-100] / expected[150:-100]
        assert_allclose(ratio, ratio.mean(), rtol=0.02)
    else:
        assert_allclose(table, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cell", "formula", "numbers"), DENSITIES, ids=lambda value: str(value)[:20]
)
def test_a_density_has_the_formula_and_the_numbers_of_its_row(cell, formula, numbers):
    table = sampler_weights(cell)
    assert_allclose(numbers, at_shown(table), atol=0.0051)
    # A timestep is drawn for all levels down to the one before; the formula is for one level.
    assert_allclose(at_shown(table), at_shown(evaluated(formula)), atol=0.01)


def test_the_scales_of_the_three_targets():
    """The first table, from weights without normalisation: what one objective is on each target."""
    objective = {}
    for kind in ("flow_prediction", "sample"):
        made = make_weighting("const-flow", FLOW, kind, normalize=False)
        objective[kind] = made.weights().double().numpy()
    assert_allclose(objective["flow_prediction"], 1.0, rtol=1e-5)
    assert_allclose(objective["sample"], 1 / LEVELS**2, rtol=1e-5)
    log_snr = FLOW.log_snr[:-1].numpy()
    assert_allclose((1 + np.exp(log_snr / 2)) ** 2, 1 / LEVELS[:-1] ** 2, rtol=1e-6)
    on_noise = make_weighting("const-eps", FLOW, "flow_prediction", normalize=False).weights()
    assert_allclose(on_noise.numpy(), (1 - LEVELS) ** 2, rtol=1e-4, atol=1e-12)
    at_ends = [objective["sample"][99], objective["sample"][899]]
    assert "the weight is 100, at s = 0.9 it is 1.2" in TEXT
    assert_allclose(at_ends, [100, 1.2], rtol=0.03)


def test_what_the_page_says_about_them_holds():
    hump = weights("min-snr")
    top = LEVELS[hump.argmax()]
    assert "s = 1 / (1 + √5) = 0.31, and 74 %" in TEXT
    assert top == pytest.approx(1 / (1 + math.sqrt(5)), abs=0.001)
    assert hump[LEVELS <= 0.5].sum() / hump.sum() == pytest.approx(0.74, abs=0.005)
    smooth = make_weighting("soft-min-snr", FLOW, "flow_prediction", gamma=math.exp(2)).weights()
    assert_allclose(weights("sigmoid"), smooth.numpy(), rtol=1e-4)
    assert "171 times the mean" in TEXT
    assert weights("elbo").max() == pytest.approx(171, abs=0.5)
    on_x0 = weights("const-x0")
    assert "noisy half (87 %)" in TEXT
    assert on_x0[LEVELS > 0.5].sum() / on_x0.sum() == pytest.approx(0.875, abs=0.005)
    assert_allclose(sampler_weights("`beta`"), weights("debiased"), atol=0.004)
