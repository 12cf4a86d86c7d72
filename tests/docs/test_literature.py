"""The page of papers: every line is whole, and what it names here exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from dysigma.samplers import TIMESTEP_SAMPLERS
from dysigma.weightings import WEIGHTINGS

PAGE = Path(__file__).resolve().parents[2] / "notebooks/reference/literature.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| paper")
]


def test_the_page_says_when_it_was_last_looked_at():
    assert re.search(r"Last looked at on \d+ [A-Z][a-z]+ 20\d\d", TEXT)


def test_every_line_has_a_year_a_source_and_what_was_read():
    assert len(ROWS) > 40
    for paper, says, here, read in ROWS:
        assert re.search(r"\b20[12]\d\b", paper), paper
        assert "](https://" in paper or "Dy-Sigma" in paper, paper
        assert says.endswith(".") and here, paper
        assert read in {"paper", "code", "notes", "abstract"}, paper


def test_an_arxiv_number_fits_its_year():
    for paper, *_ in ROWS:
        year = re.search(r"\b(20\d\d)\b", paper)[1]
        for number in re.findall(r"arxiv\.org/abs/(\d\d)\d\d\.", paper):
            assert f"20{number}" == year, paper


def test_no_paper_is_listed_twice():
    links = re.findall(r"\]\((https://[^)]+)\)", TEXT)
    assert len(links) == len(set(links))


def test_the_names_of_weightings_samplers_and_modules_exist():
    known = {*WEIGHTINGS, *TIMESTEP_SAMPLERS, "inside", "sample", "--shift", "NoiseSchedule.flow"}
    for *_, here, _ in ROWS:
        for name in re.findall(r"`([^`]+)`", here):
            if name.startswith("dysigma."):
                module, _, attribute = name.rpartition(".")
                found = getattr(importlib.import_module(module), attribute, None)
                assert found or importlib.import_module(name), name
            elif not name.startswith("rule="):
                assert name in known, name
