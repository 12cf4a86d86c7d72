"""How many times fewer images one arm of a race needs than another: levels and tables.

Curves and images to a threshold are in `curves`, speed-ups with their intervals in `speedups`, the
records of races in `records`; the names of all of them that a page needs are importable from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..intervals import holm
from ..runs.files import RunError
from .curves import Array, Curve, images_to_threshold, log_curve_until, worst_to_come
from .records import MACHINE, STRATEGY, UNITS, Curves, load_races, race_curves
from .speedups import CLAIMED, Speedup, against_claim, speedup

if TYPE_CHECKING:
    import pandas

__all__ = [
    "CLAIMED",
    "UNITS",
    "Array",
    "Curves",
    "Speedup",
    "against_claim",
    "compare_across",
    "holm",
    "images_to_threshold",
    "levels_at",
    "load_races",
    "race_curves",
    "race_table",
    "speedup",
    "thresholds_at",
]

# What targets and noise paths change, and nothing else: compare_across allows these to differ.
TARGET = {"prediction", "schedule", "zero_terminal_snr", "num_timesteps", "shift"}

Levels = Sequence[float] | Mapping[str, float]  # of a metric; a mapping names them


def _kept_from(runs: Iterable[Curve], fractions: Sequence[float]) -> list[float]:
    """What runs stay below from these fractions of their images on: the median over runs."""
    levels = []
    for fraction in fractions:
        ln_values = []
        for images, values in runs:
            end = fraction * images.max(initial=0.0)
            _, kept = log_curve_until(images, worst_to_come(values), end)
            ln_values.append(kept[-1])
        levels.append(math.exp(np.median(ln_values)))
    return levels


def thresholds_at(
    curves: Curves, baseline: str, fractions: Sequence[float]
) -> dict[str, list[float]]:
    """Thresholds by rule, for each grid label that has the baseline.

    The level that the baseline stays below from each of these fractions of its images on: the
    median over its seeds, in the unit of the metric. Fraction 1 is the level at its end. Raises
    ValueError for a fraction that is not beyond the first evaluation, or for a diverged seed.

    >>> curves = {("x0", "const-x0"): {0: (np.array([1.0, 2.0, 4.0]), np.array([8.0, 4.0, 2.0]))}}
    >>> levels = thresholds_at(curves, "const-x0", [0.5, 1.0])
    >>> np.round(levels["x0"], 6).tolist()
    [4.0, 2.0]
    """
    return {
        label: _kept_from(runs.values(), fractions)
        for (label, arm), runs in curves.items()
        if arm == baseline
    }


def levels_at(
    curves: Curves,
    baseline: str,
    fractions: Sequence[float] = (0.25, 0.5, 0.8),
) -> dict[str, dict[str, float]]:
    """The thresholds of thresholds_at with names, as race_table takes them.

    >>> curves = {("x0", "const-x0"): {0: (np.array([1.0, 2.0, 4.0]), np.array([8.0, 4.0, 2.0]))}}
    >>> levels_at(curves, "const-x0", [1.0])
    {'x0': {'fraction 1': 2.0}}
    """
    found = thresholds_at(curves, baseline, fractions)
    return {label: _named_fractions(fractions, levels) for label, levels in found.items()}


def _named_fractions(fractions: Sequence[float], levels: Sequence[float]) -> dict[str, float]:
    names = [f"fraction {fraction:g}" for fraction in fractions]
    return dict(zip(names, levels, strict=True))


def _named(levels: Levels) -> list[tuple[str, float]]:
    """(name, level) pairs; the name of a level that has none is the level."""
    if isinstance(levels, Mapping):
        return list(levels.items())
    return [(f"{level:.4g}", level) for level in levels]


def _budget(runs_of_arms: Iterable[Mapping[int, Curve]]) -> float:
    """The most images of any training: what a censored one would at least have needed."""
    return max(images[-1] for runs in runs_of_arms for images, _ in runs.values() if len(images))


def _end(runs: Mapping[int, Curve]) -> float:
    """Value at the end of training: geometric mean over seeds, NaN if any seed diverged."""
    last = [float(values[-1]) if len(values) else math.nan for _, values in runs.values()]
    return float(np.exp(np.log(last).mean()))


def _reached(runs: Mapping[int, Curve], level: float) -> dict[int, float]:
    return {seed: images_to_threshold(*curve, level) for seed, curve in runs.items()}


def _comparisons(
    baseline: Mapping[int, Curve],
    arms: Mapping[tuple[str, str], Mapping[int, Curve]],
    levels: Sequence[tuple[str, float]],
    budget: float,
) -> list[dict[str, Any]]:
    """One family of tests: a row for each level and arm, Holm's adjustment over all of them.

    A race in progress has more seeds of some arms than of others. An arm is compared over the seeds
    that it has in common with the baseline, and left out where there are none.
    """
    rows: list[dict[str, Any]] = []
    for name, level in levels:
        baseline_images = _reached(baseline, level)
        for (label, arm), runs in arms.items():
            common = baseline.keys() & runs.keys()
            if not common:
                continue
            found = speedup(baseline_images, _reached(runs, level), budget)
            row: dict[str, Any] = {"grid": label, "level": name, "threshold": level, "arm": arm}
            row.update(found._asdict())
            row["claim"] = against_claim(found.estimate_low, found.estimate_high)
            row["baseline_end"] = _end({seed: baseline[seed] for seed in common})
            row["arm_end"] = _end({seed: runs[seed] for seed in common})
            rows.append(row)
    adjusted = holm([row["p"] for row in rows])
    estimate_adjusted = holm([row["estimate_p"] for row in rows])
    for row, p, estimate_p in zip(rows, adjusted, estimate_adjusted, strict=True):
        row["p_holm"] = p
        row["estimate_p_holm"] = estimate_p
        row["outcome"] = _outcome(row["estimate"], estimate_p)
    return rows


def _check_common_seeds(rows: list[dict[str, Any]], baseline: object) -> None:
    if not rows:
        raise ValueError(
            f"no arm has a seed in common with the baseline {baseline!r}; race one first"
        )


def _outcome(estimate: float, p_holm: float) -> str:
    """Whether an arm is shown to need fewer or more images, at 5 % after Holm's adjustment."""
    if not p_holm < 0.05:
        return "open"
    return "fewer images" if estimate > 1 else "more images"


def race_table(
    table: pandas.DataFrame,
    metric: str,
    thresholds: Mapping[str, Levels],
    baseline: str,
) -> pandas.DataFrame:
    """Every arm against a baseline under the same grid label: a row per label, threshold and arm.

    thresholds: by grid label, levels in the unit of the metric (UNITS), as thresholds_at or
    levels_at give them, or any others. Columns: grid, level (its name), threshold (the level
    itself), arm; the fields of Speedup; claim, where the interval lies against CLAIMED;
    baseline_end and arm_end, the level that each reaches at the end; p_holm and estimate_p_holm,
    Holm's adjustment over thresholds x arms of a grid label; outcome, in words, after it. Seeds may
    be missing: a row is of the `pairs` seeds that its arm has in common with the baseline, and an
    arm that has none has no row.

    Raises KeyError for a label without the baseline.

    >>> import pandas
    >>> row = {"grid": "x0", "seed": 0, "images": [1, 2, 4]}
    >>> plain = {**row, "arm": "const-x0", "distances": [8.0, 4.0, 2.0]}
    >>> other = {**row, "arm": "min-snr", "distances": [8.0, 2.0, 1.0]}
    >>> found = race_table(pandas.DataFrame([plain, other]), "distance", {"x0": [2.0]}, "const-x0")
    >>> found[["arm", "threshold", "ratio"]].values.tolist()
    [['min-snr', 2.0, 2.0]]
    """
    import pandas

    curves = race_curves(table, metric)
    rows: list[dict[str, Any]] = []
    for label, levels in thresholds.items():
        runs_of = {key: runs for key, runs in curves.items() if key[0] == label}
        if (label, baseline) not in runs_of:
            raise KeyError(f"no arm {baseline!r} under grid label {label!r}; have {list(curves)}")
        budget = _budget(runs_of.values())
        of_baseline = runs_of.pop((label, baseline))
        rows += _comparisons(of_baseline, runs_of, _named(levels), budget)
    _check_common_seeds(rows, baseline)
    return pandas.DataFrame(rows)


def _must_agree(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """What two records must have in common for a metric to be the same quantity in both."""
    may_differ = STRATEGY | MACHINE
    if metric == "bits":
        # On one path alone, else the integrals are over different stretches of log-SNR.
        may_differ = may_differ | {"prediction"}
    else:
        may_differ = may_differ | TARGET
    common = {name: value for name, value in row["config"].items() if name not in may_differ}
    if metric != "bits" and isinstance(row.get("features_sha256"), str):
        common["features_sha256"] = row["features_sha256"]
    return common


def _check_across(table: pandas.DataFrame, metric: str) -> None:
    """Refuse to compare networks of different targets by what is not the same quantity for both."""
    if metric == "validation":
        raise ValueError(
            "metric 'validation' is a loss in the space of the target, so it cannot be compared "
            "across targets; use distance, kid or bits"
        )
    first_seen: dict[str, tuple[Any, str]] = {}
    for row in table.to_dict("records"):
        for name, value in _must_agree(row, metric).items():
            known, label = first_seen.setdefault(name, (value, row["grid"]))
            if known != value:
                raise RunError(
                    f"{metric} cannot be compared: {name} is {value!r} under {row['grid']!r} "
                    f"and {known!r} under {label!r}"
                )


def compare_across(
    table: pandas.DataFrame,
    metric: str,
    baseline: tuple[str, str],
    fractions: Sequence[float] = (0.25, 0.5, 0.8, 1.0),
    absolute: Mapping[str, float] | None = None,
) -> pandas.DataFrame:
    """Every target and weighting against one baseline, such as plain training of a noise network.

    The paper's Const has the target of the arm; a practitioner's baseline is ordinary training,
    whatever the target of the arm. `baseline` is that (grid label, arm), for example ("cifar10
    epsilon", "const-eps"). Seeds are paired: all networks of one seed share images and noise, and
    those of one shape their initial weights. Thresholds are what the baseline keeps from these
    fractions of its images on (1: what it reaches at the end), and the named levels of `absolute`.

    Returns the columns of race_table, one family of tests for Holm's adjustment. Raises ValueError
    for a metric that depends on the target, RunError for records that differ in more than target
    and strategy (the message names the first difference), KeyError for a baseline that is not
    there.
    """
    import pandas

    _check_across(table, metric)
    curves = race_curves(table, metric)
    if baseline not in curves:
        raise KeyError(f"no {baseline!r}, as (grid label, arm); have {list(curves)}")
    budget = _budget(curves.values())
    of_baseline = curves.pop(baseline)
    levels = _named_fractions(fractions, _kept_from(of_baseline.values(), fractions))
    levels.update(absolute or {})
    rows = _comparisons(of_baseline, curves, _named(levels), budget)
    _check_common_seeds(rows, baseline)
    return pandas.DataFrame(rows)
