"""The site: its pages name what exists, once, and it builds without a warning and without anything from elsewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import dysigma

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
REFERENCE = NOTEBOOKS / "reference"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
PACKAGE = Path(dysigma.__file__).parent
# The command line documents itself; dysigma.convergence is a second door to dysigma.lab.convergence.
UNLISTED = {"cli", "convergence"}


def table(text: str) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line[:2] == "| "
    ]
    return rows[1:]


def public_modules() -> set[str]:
    """Modules of the package that a reader imports from: a folder that gives names, or each file of one that does not."""
    found = set()
    for path in PACKAGE.iterdir():
        if path.stem.startswith("__") or path.stem in UNLISTED:
            continue
        if path.suffix == ".py":
            found.add(f"dysigma.{path.stem}")
        elif (path / "__init__.py").exists():
            room = importlib.import_module(f"dysigma.{path.name}")
            files = {f"dysigma.{path.name}.{file.stem}" for file in path.glob("[!_]*.py")}
            found |= {room.__name__} if hasattr(room, "__all__") else files
    return found


def test_the_api_page_lists_every_public_module_and_what_the_package_gives_at_its_top():
    assert set(re.findall(r"automodule:: ([\w.]+)", PAGES["api"])) == public_modules()
    named = re.findall(r"\{py:\w+\}`~([\w.]+)`", PAGES["api"])
    assert sorted(name.rsplit(".", 1)[1] for name in named) == sorted(dysigma.__all__)
    for name in named:
        module, attribute = name.rsplit(".", 1)
        assert getattr(importlib.import_module(module), attribute) is getattr(dysigma, attribute), (
            name
        )


def test_the_map_shows_every_room():
    drawing = (REFERENCE / "house.svg").read_text(encoding="utf-8")
    shown = set(re.findall(r"font-weight=\"bold\" text-anchor[^>]*>([\w]+)/?<", drawing))
    rooms = {path.stem for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in PACKAGE.glob("[!_]*.py")}
    assert shown == rooms


def symbols(cell: str) -> list[str]:
    """The symbols that the first cell of a row of notation defines, without the formulas of those that have one."""
    parts = re.split(r",\\ |, ", cell.replace("$", "")) if "$" in cell else []
    return [part.split("=")[0].strip() for part in parts]


def test_the_notation_page_defines_each_symbol_once_and_knows_those_of_all_notebooks():
    defined = [symbol for row in table(PAGES["notation"]) for symbol in symbols(row[0])]
    assert len(defined) == len(set(defined)) > 40
    # The page explains indices (timestep, bin, sample) and the star (the best that exists).
    bare = partial(re.sub, r"_(\w|\{\w+\})|\^\\star", "")
    known = {bare(symbol) for symbol in defined}
    tables = {}  # a page without a derivation has none
    for source in sorted(NOTEBOOKS.glob("[0-9]*.py")):
        text = source.read_text(encoding="utf-8")
        found = re.search(r"^# \| symbol \|.*\n(# \|.*\n)+", text, re.M)
        if found:
            tables[source] = table(found[0].replace("# |", "|"))[1:]
    assert len(tables) > 8
    for source, rows in tables.items():
        for row in rows:
            assert {bare(symbol) for symbol in symbols(row[0])} <= known, f"{source.name}: {row[0]}"


def test_the_glossary_is_in_order_and_explains_each_word_once():
    words = [row[0] for row in table(PAGES["glossary"])]
    assert len(words) == len(set(words)) > 30
    assert words == sorted(words, key=lambda word: re.sub(r"[^a-z ]", " ", word.lower()))


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.md")), ids=lambda path: path.stem)
def test_links_to_pages_show_the_number_of_the_page(path):
    for shown, number in re.findall(r"\[(\d\d)\]\(\.\./(\d\d)_", path.read_text(encoding="utf-8")):
        assert shown == number


@pytest.mark.parametrize(
    "path", sorted([*REFERENCE.glob("*.md"), NOTEBOOKS / "README.md"]), ids=lambda path: path.stem
)
def test_links_resolve(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_slides_that_the_plan_links_to_are_of_pages():
    linked = re.findall(r'href="\.\./slides/(\w+)\.slides\.html">(\d\d)<', PAGES["teaching"])
    assert len(linked) >= 3
    for page, number in linked:
        assert (NOTEBOOKS / f"{page}.ipynb").exists() and page.startswith(number)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path):
    for module in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        pytest.importorskip(module)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        str(tmp_path / "trees"),
    ]
    built = subprocess.run(
        [*command, "-c", str(REFERENCE), str(NOTEBOOKS), str(tmp_path / "site")],
        capture_output=True,
    )
    assert not built.returncode, built.stderr.decode()
    pages = {
        path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")
    }
    assert {path.stem for path in NOTEBOOKS.glob("[0-9]*.py")} | {
        "api",
        "architecture",
        "notation",
        "glossary",
    } <= set(pages)
    for name, text in pages.items():
        assert not re.findall(
            r'<(?:script|link|img|iframe)[^>]* (?:src|href)="(?:https?:)?//[^"]*"', text
        ), name
        pictures = [tag for tag in re.findall(r"<img[^>]*>", text) if "_images/" in tag]
        assert not [tag for tag in pictures if not re.search(r'alt="[^"]{30,}"', tag)], name
        assert "\\(" not in text and "$$" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S), (
            f"{name}: bare TeX"
        )
    for name in dysigma.__all__:
        documented = rf'id="(module-)?dysigma\.([\w.]+\.)?{name}"'
        assert re.search(documented, pages["api"]), name
    assert pages["06_dy_sigma_derived"].count("Show code cell source") >= 2
    assert "<img" in pages["06_dy_sigma_derived"] and "<math" in pages["06_dy_sigma_derived"]
    assert "<details>" in pages["06_dy_sigma_derived"]
    linked = re.findall(r"(\w+\.slides)\.html", PAGES["teaching"])
    assert set(linked) <= set(pages), "the decks lie where the plan links to"


def test_the_formulas_of_the_cheat_sheet_are_those_of_the_package():
    """Each row is written again by hand, and compared on levels of a schedule."""
    import torch

    from dysigma.schedule import NoiseSchedule
    from dysigma.weightings.formulas import log_weight

    page = Path(__file__).parents[2] / "notebooks/reference/cheat_sheet.md"
    sheet = page.read_text()
    schedule = NoiseSchedule.linear(1000)
    snr = schedule.log_snr.exp()
    by_hand = {
        ("const-x0", "$1$"): torch.ones_like(snr),
        ("const-eps", "$S$"): snr,
        ("const-v", "$1+S$"): 1 + snr,
        ("const-flow", r"$(1+\sqrt S)^2$"): (1 + snr.sqrt()) ** 2,
        ("min-snr", r"$\min(S,\gamma)$"): snr.clamp(max=5.0),
        ("p2", r"$S/(k+S)^\gamma$"): snr / (1 + snr),
        ("sigmoid", r"$S\,\mathrm{sigmoid}(b-\ln S)$"): snr * torch.sigmoid(2.0 - snr.log()),
        ("debiased", r"$\sqrt S$"): snr.sqrt(),
    }
    for (name, formula), weights in by_hand.items():
        assert f"| `{name}` | {formula} |" in sheet
        ours = log_weight(name, schedule, "sample").exp()
        torch.testing.assert_close(ours.double(), weights.double(), rtol=1e-6, atol=0)
    conversions = {"epsilon": snr, "v_prediction": 1 + snr}
    for target, factor in conversions.items():
        assert f"(`{target}`)" in sheet
        on_target = log_weight("const-x0", schedule, target).exp()
        torch.testing.assert_close(on_target.double(), 1 / factor.double(), rtol=1e-6, atol=0)
