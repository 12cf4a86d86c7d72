"""Every edit that a page suggests under "Try it yourself" runs to the end of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dysigma.course.pages import build

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"

# Page, and what is put in place of what. Edits that have nothing to do with each other share a run.
EDITS = [
    (
        "00",
        {
            'make_weighting("min-snr", schedule, prediction_type="sample")\n': (
                'make_weighting("dy-sigma", schedule, prediction_type="sample")\n'
            ),
            "torch.optim.AdamW(model.parameters(), lr=8e-3)": (
                'torch.optim.AdamW([{"params": model.parameters()}, '
                "*weighting.parameter_groups()], lr=8e-3)"
            ),
            "torch.testing.assert_close(weighting.weights(), by_hand)\n": "",
        },
    ),
    (
        "01",
        {
            'SCHEDULE = "linear"': 'SCHEDULE = "cosine"',
            "POINTS = [-1.0, 1.0]": "POINTS = [-1.0, 0.0, 1.0]",
        },
    ),
    ("02", {"STEPS = lesson.fast(270, 15)": "STEPS = 120", "WIDTH = 32": "WIDTH = 8"}),
    ("02", {"schedule = NoiseSchedule.cosine(1000)": "schedule = NoiseSchedule.linear(1000)"}),
    (
        "03",
        {
            'SCHEDULE = "linear"': 'SCHEDULE = "cosine"',
            "DEGREE = 1": "DEGREE = 2",
            "SIGMA_DATA = 0.5": "SIGMA_DATA = 1.0",
        },
    ),
    ("03", {"\nGAMMA = 5.0": "\nGAMMA = 1.0", "DEGREE = 1": "DEGREE = 3"}),
    ("04", {"GAMMA = 5": "GAMMA = 1", "DEGREE = 1": "DEGREE = 2"}),
    ("04", {'SCHEDULE = "scaled-linear"': 'SCHEDULE = "cosine"'}),
    (
        "05",
        {
            "FAST_LR = 0.1": "FAST_LR = 0.3",
            "CLAMP = 10.0": "CLAMP = 2.0",
            "SKIP = 1.0": "SKIP = 0.0",
        },
    ),
    (
        "06",
        {'PRIOR = "min-snr"': 'PRIOR = "const-eps"', "UNIFORM_PART = 0.1": "UNIFORM_PART = 0.5"},
    ),
    ("06", {'PRIOR = "min-snr"': 'PRIOR = "const-x0"', "KAPPA = 1.0": "KAPPA = 0.5"}),
    (
        "07",
        {
            'SHORT = ["const-eps", "dy-sigma"]': 'SHORT = ["const-eps", "dy-sigma", "p2"]',
            '    weighting="min-snr",\n': '    weighting="const-x0",\n',
        },
    ),
    ("08", {"    lr=2e-3,": "    lr=2e-4,"}),
    ("09", {"RATE = 20.0": "RATE = 2.0"}),
    ("10", {"SPLIT_AT = 500": "SPLIT_AT = 250"}),
    ("11", {"FRACTION = 0.5": "FRACTION = 0.25", "PLATEAU = 2 / 3": "PLATEAU = 0.8"}),
    (
        "12",
        {
            "\nlesson.end()": (
                '\nsummary(against(photos_x0, "distance", "const-x0", fractions=[0.1, 0.3, 0.95]))'
                "\nlesson.end()"
            )
        },
    ),
    (
        "13",
        {
            'NAME = "dy-sigma"': 'NAME = "uncertainty"',
            "check_weighting(gentle, power=0.5)": "check_weighting(gentle, power=0.2)",
            "bins=4,": "bins=6,",
        },
    ),
    (
        "13",
        {
            'NAME = "dy-sigma"': 'NAME = "p2"',
            "check_weighting(gentle, power=0.5)": "check_weighting(gentle, power=1.0)",
        },
    ),
    ("14", {'TRIED = "dy-sigma"': 'TRIED = "min-snr"'}),
    (
        "14",
        {
            'TRIED = "dy-sigma"': 'TRIED = "uncertainty"',
            'PRETRAINED_WITH = "const-eps"': 'PRETRAINED_WITH = "min-snr"',
        },
    ),
]


def page(number: str) -> Path:
    (found,) = FOLDER.glob(f"{number}_*.py")
    return found


def suggestions(source: Path) -> list[str]:
    """The assignments in the paragraph "Try it yourself" of a page, without blanks."""
    text = source.read_text(encoding="utf-8")
    paragraph = re.split(r"\n# *\n|\n\n", text.split("**Try it yourself.**")[1])[0]
    code = re.findall(r"`([^`]+)`", paragraph.replace("\n# ", " "))
    return [words for words in code if "=" in words]


@pytest.mark.parametrize("source", sorted(FOLDER.glob("[01]*.py")), ids=lambda path: path.stem[:2])
def test_every_suggested_assignment_is_tried(source):
    edits = [edit for number, edit in EDITS if source.stem.startswith(number)]
    assert edits
    tried = "\n".join(words for edit in edits for pair in edit.items() for words in pair)
    for suggested in suggestions(source):
        assert re.sub(r"\s", "", suggested) in re.sub(r"\s", "", tried), suggested


@pytest.mark.slow
@pytest.mark.parametrize(("number", "edit"), EDITS)
def test_a_suggested_edit_runs(tmp_path, number, edit):
    text = page(number).read_text(encoding="utf-8")
    for old, new in edit.items():
        assert old in text, f"page {number} has no {old!r}"
        text = text.replace(old, new, 1)
    copy = tmp_path / "notebooks" / page(number).name
    copy.parent.mkdir()
    copy.write_text(text, encoding="utf-8")
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "figures").mkdir()
    build([copy], fast=True, out=tmp_path / "out")
