"""The guide "which weighting when": its table is that of the records, and its names are weightings."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from dysigma.weightings import WEIGHTINGS

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "notebooks/reference/which_weighting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "data/races/which_weighting.py"))


@pytest.mark.slow
def test_the_tables_are_those_of_the_records(script):
    assert script["computed"]() in GUIDE


def test_every_record_that_is_named_exists():
    named = set(re.findall(r"`((?:race|front)-[\w-]+|text-guided)`", GUIDE))
    assert len(named) > 6
    assert not [
        name for name in named if not (ROOT / "data/runs" / name / "records.jsonl").exists()
    ]


def test_every_advice_is_a_weighting_with_a_record_or_says_that_there_is_none():
    start = GUIDE.split("## Start here\n\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in start.splitlines() if line.startswith("| ")]
    assert len(rows) > 8
    for _, _, advice, evidence in rows[1:]:
        for name in re.findall(r"`([a-z][\w-]+)`", advice.replace("loss-second-moment", "")):
            assert name in WEIGHTINGS, name
        assert re.search(r"not measured|CIFAR-10|data sets|no weighting is shown", evidence), advice
