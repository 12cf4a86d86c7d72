"""The table of the guide "which weighting when", computed from the records.

    python data/races/which_weighting.py --page notebooks/reference/which_weighting.md

It is written between two marks of the page. R is at the level that the baseline holds during the
second half of its training, with censored pairs kept; levels are those at the end of the budget.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas

from dysigma.lab.convergence import compare_across, levels_at, load_races, race_curves, race_table

RUNS = Path(__file__).resolve().parent.parent / "runs"
BEGIN = "<!-- computed by data/races/which_weighting.py -->"
END = "<!-- end of what is computed -->"

HEADINGS = {
    "distance": "Samples: Fréchet distance",
    "bits": "Likelihood: bits/dim",
    "validation": "All noise levels alike: geometric mean of the losses",
}


@dataclass(frozen=True)
class Question:
    """What one looks at in which records: some arms against a baseline, under a grid label."""

    metric: str
    records: tuple[str, ...]
    grid: str
    baseline: str
    arms: tuple[str, ...]
    # Set where the network of the baseline has another target.
    baseline_grid: str = ""


NETWORKS = {
    "cifar10 sample": "x0, CIFAR-10",
    "cifar10 epsilon": "ε, CIFAR-10",
    "fields sample": "x0, fields",
    "fields cosine sample": "x0, fields, cosine",
    "leaves sample": "x0, leaves",
    "leaves epsilon": "ε, leaves",
}

SAMPLES_X0 = "race-cifar10-cpu-distance-x0"
SAMPLES_NOISE = "race-cifar10-cpu-distance-epsilon"
LEARNED = ("min-snr", "dy-sigma", "uncertainty")

QUESTIONS = (
    Question("distance", (SAMPLES_X0,), "cifar10 sample", "const-x0", ("min-snr", "dy-sigma")),
    Question("distance", ("race-fields",), "fields sample", "const-x0", ("min-snr", "dy-sigma")),
    Question(
        "distance",
        ("race-fields-cosine",),
        "fields cosine sample",
        "const-x0",
        ("min-snr", "dy-sigma"),
    ),
    Question(
        "distance",
        (SAMPLES_X0, SAMPLES_NOISE),
        "cifar10 sample",
        "const-eps",
        ("const-x0", "min-snr", "dy-sigma"),
        baseline_grid="cifar10 epsilon",
    ),
    Question("distance", (SAMPLES_NOISE,), "cifar10 epsilon", "const-eps", ("min-snr", "dy-sigma")),
    Question("bits", ("race-cifar10-cpu-epsilon-repeat",), "cifar10 epsilon", "const-eps", LEARNED),
    Question(
        "bits",
        ("race-cifar10-cpu-epsilon-improved",),
        "cifar10 epsilon",
        "const-eps",
        ("const-eps sampled", "elbo sampled", "dy-sigma elbo sampled"),
    ),
    Question("bits", ("race-leaves",), "leaves epsilon", "const-eps", LEARNED),
    Question("bits", ("race-cifar10-cpu-x0-repeat",), "cifar10 sample", "const-x0", LEARNED),
    Question("bits", ("race-leaves",), "leaves sample", "const-x0", LEARNED),
    Question(
        "validation", ("race-cifar10-cpu-epsilon-repeat",), "cifar10 epsilon", "const-eps", LEARNED
    ),
    Question("validation", ("race-leaves",), "leaves epsilon", "const-eps", LEARNED),
    Question("validation", ("race-cifar10-cpu-x0-repeat",), "cifar10 sample", "const-x0", LEARNED),
    Question("validation", ("race-leaves",), "leaves sample", "const-x0", LEARNED),
)


@cache
def _records(folders: tuple[str, ...]) -> pandas.DataFrame:
    # Sorted, so that trainings of a seed pair up.
    table = load_races(*[RUNS / folder for folder in folders])
    return table.sort_values("seed", ignore_index=True)


def _compared(question: Question) -> pandas.DataFrame:
    table = _records(question.records)
    if question.baseline_grid:
        baseline = (question.baseline_grid, question.baseline)
        return compare_across(table, question.metric, baseline, fractions=(0.5,))
    levels = levels_at(race_curves(table, question.metric), question.baseline, fractions=(0.5,))
    return race_table(table, question.metric, levels, question.baseline)


def _ratio(found: dict[str, Any]) -> str:
    """R with its interval, or in words that there is none."""
    if found["censored_arm"] == found["pairs"]:
        return "never gets there"
    if math.isnan(found["estimate_low"]):
        return "no interval"
    interval = f"[{found['estimate_low']:.2f}, {found['estimate_high']:.2f}]"
    verdict = "" if found["estimate_low"] > 1 or found["estimate_high"] < 1 else ", open"
    return f"{found['estimate']:.2f} {interval}{verdict}"


def rows(question: Question) -> list[str]:
    """The lines of the table for one question."""
    table = _compared(question)
    lines = []
    for arm in question.arms:
        chosen = table[(table["grid"] == question.grid) & (table["arm"] == arm)]
        (found,) = chosen.to_dict("records")
        baseline = question.baseline
        if question.baseline_grid:
            baseline = f"{baseline} on ε"
        cells = [
            NETWORKS[question.grid],
            f"{baseline}: {found['baseline_end']:.3g}",
            f"{arm}: {found['arm_end']:.3g}",
            _ratio(found),
            " ".join(f"`{folder}`" for folder in question.records),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def computed() -> str:
    """What stands between the two marks of the page."""
    lines = [BEGIN]
    for metric, heading in HEADINGS.items():
        lines += ["", f"### {heading}", ""]
        lines.append(
            "| network, data | baseline, at the end | weighting, at the end | R | record |"
        )
        lines.append("|---|---|---|---|---|")
        for question in QUESTIONS:
            if question.metric == metric:
                lines += rows(question)
    return "\n".join([*lines, "", END])


def main() -> None:
    """Write the table into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, required=True)
    page: Path = parser.parse_args().page
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        parser.error(f"{page} does not hold the two marks {BEGIN} and {END}")
    page.write_text(before + computed() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
