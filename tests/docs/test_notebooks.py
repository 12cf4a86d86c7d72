"""The notebooks: sources and executed pages agree, and every page has what a teaching page must have.

The published .ipynb files are read, not executed, except two that run in fast mode.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import re
from pathlib import Path

import nbformat
import pytest

from dysigma.course.pages import EXPECTED, MAX_BYTES, build, convert, find

ROOT = Path(__file__).resolve().parents[2]
FOLDER, FIGURES = ROOT / "notebooks", ROOT / "figures"
SOURCES = find(FOLDER)
HEADER = (
    "**You will be able to**",
    "**You need**",
    "**Time**",
    "**Functions introduced**",
)
# The line below the title: a claim, or a question where a claim would answer what the page asks for.
IDEA = re.compile(r"^> \*\*(Claim|Question)\.\*\* ", re.MULTILINE)
ENDING = (
    "## Exercises",
    "### Solutions",
    "## What you can now do",
    "## Limitations",
    "## References",
)
# A folder inside a folder at the root of a file system, not part of a link or of a relative path.
ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/<])/(?!/)[\w.-]+/[\w.-]+|[A-Z]:\\\\")

every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def page(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_of(cells) -> ast.Module:
    return ast.parse("\n\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def calls(tree: ast.Module, name: str) -> list[ast.Call]:
    return [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] == name
    ]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def prose(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# What a reader opens.


@every_notebook
def test_page_and_source_agree(source):
    made, published = convert(source), page(source)
    assert [(c.cell_type, c.source, c.id) for c in published.cells] == [
        (c.cell_type, c.source, c.id) for c in made.cells
    ]


@every_notebook
def test_page_was_executed_from_top_to_bottom_without_a_complaint(source):
    cells = [cell for cell in page(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@every_notebook
def test_page_says_nothing_of_the_machine_it_ran_on(source):
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) <= MAX_BYTES, "a page this large does not open everywhere"
    notebook = page(source)
    assert notebook.metadata == convert(source).metadata
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "jupyter", "mystnb"}
        shown = printed(cell) + "".join(
            text
            for output in cell.get("outputs", [])
            for kind, text in output.get("data", {}).items()
            if "text" in kind
        )
        assert not ABSOLUTE_PATH.findall(shown)
        assert not ABSOLUTE_PATH.findall(cell.source)


@every_notebook
def test_every_picture_has_words(source):
    notebook = page(source)
    for cell in notebook.cells:
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        for picture in pictures:
            alt = picture.metadata["image/png"]["alt"]
            assert len(alt) > 30 and alt == cell.metadata.mystnb.image.alt
        captions = [o for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
        assert len(pictures) <= len(captions), "a figure needs its caption: use plots.show"
    assert not re.findall(r"!\[\s*\]\(", prose(notebook)), "a picture in the text has no alt text"


# What a page must have.


@every_notebook
def test_header_and_ending(source):
    notebook = convert(source)
    header, text = notebook.cells[0].source, prose(notebook)
    assert header.startswith(f"# {source.stem[:2]} · ")
    assert len(IDEA.findall(header)) == 1
    for part in HEADER:
        assert part in header, part
    skills = header.split("**You will be able to**")[1].split("**You need**")[0]
    assert skills.count("\n- ") >= 3
    positions = [text.find(f"\n{part}\n") for part in ENDING]
    assert -1 not in positions and positions == sorted(positions)
    assert len(re.findall(r"^- ", text.split("## References")[1], re.M)) >= 3
    assert re.search(r"\b(banner|Lesson)\(", notebook.cells[1].source)
    assert notebook.cells[-1].source in ("watermark()", "lesson.end()")


@every_notebook
def test_predictions_are_recorded_before_they_are_revealed(source):
    order = [
        (ast.unparse(call.func).split(".")[-1], ast.unparse(call.args[0]))
        for call in sorted(
            calls(code_of(convert(source).cells), "predict")
            + calls(code_of(convert(source).cells), "reveal"),
            key=lambda call: call.lineno,
        )
    ]
    asked = [question for verb, question in order if verb == "predict"]
    assert asked
    for question in asked:
        assert order.index(("predict", question)) < order.index(("reveal", question))


@every_notebook
def test_at_least_three_properties_are_asserted_with_a_message(source):
    tree = code_of(convert(source).cells)
    plain = [
        node for node in ast.walk(tree) if isinstance(node, ast.Assert) and node.msg is not None
    ]
    assert len(plain) + len(calls(tree, "assert_close")) >= 3
    assert not [
        ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Assert) and n.msg is None
    ], "say what fails"


@every_notebook
def test_exercises_are_skipped_untouched_and_solved_by_their_solutions(source):
    cells = page(source).cells
    declared = [ast.literal_eval(call.args[0]) for call in calls(code_of(cells), "exercise")]
    assert len(declared) >= 2 and len(set(declared)) == len(declared)
    solutions = [cell for cell in cells if "solution" in cell.metadata.get("tags", [])]
    stubs = [
        cell
        for cell in cells
        if cell.cell_type == "code" and cell not in solutions and "check(" in cell.source
    ]
    for name in declared:
        assert any(f"Exercise {name}: not attempted yet" in printed(cell) for cell in stubs), name
        assert any(f"Exercise {name}: correct." in printed(cell) for cell in solutions), name
    (expectations,) = [cell for cell in cells if cell.source.startswith(EXPECTED)]
    for cell in [expectations, *solutions]:
        assert cell.metadata.jupyter.source_hidden and "hide-input" in cell.metadata.tags
    text = prose(convert(source))
    for name in declared:
        assert re.search(rf"^\*\*{name}\*\* \([●○]{{3}}, \d+ min\) ", text, re.M), (
            f"{name}: difficulty and minutes"
        )
    assert text.count("<summary>Hint</summary>") >= len(declared)
    assert text.count("<details>") == text.count("</details>")


@every_notebook
def test_headings_never_skip_a_level(source):
    text = re.sub(r"```.*?```", "", prose(convert(source)), flags=re.S)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@every_notebook
def test_links_resolve(source):
    for words, target in re.findall(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", prose(convert(source))):
        assert words.lower() not in ("here", "link", "this"), (
            "the words of a link say where it goes"
        )
        if not target.startswith(("http", "#")):
            assert (FOLDER / target.split("#")[0]).exists(), target


@every_notebook
def test_a_page_leads_on(source):
    text = prose(convert(source))
    after = text.split("## References")[1]
    following = SOURCES[SOURCES.index(source) + 1 :]
    wanted = f"**Next:** [{following[0].stem[:2]}, " if following else "(00_start_here.ipynb)"
    assert wanted in after
    assert "**Try it yourself.** " in text
    for named in set(re.findall(r"[Nn]otebooks? (\d\d)\b", text)) - {source.stem[:2]}:
        assert f"({named}_" in text, f"notebook {named} is named and nowhere linked"


@every_notebook
def test_what_is_recorded_can_be_computed_again(source):
    code = "\n".join(cell.source for cell in convert(source).cells if cell.cell_type == "code")
    if "data/runs" in code:
        again = re.search(r"^RECOMPUTE = False  # True: ", code, re.M) or re.search(
            r"^dysigma train |`data/races/\w+\.py`", prose(convert(source)), re.M
        )
        assert again, "a flag, or a command in the text, must make the records again"


def test_no_function_lives_in_two_places():
    found: dict[str, list[str]] = {}
    package = [
        ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "dysigma").rglob("*.py")
    ]
    for tree in [*package, *(code_of(convert(source).cells) for source in SOURCES)]:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = "\n".join(ast.unparse(statement) for statement in body)
                if len(body) > 1 and len(text) > 60:
                    found.setdefault(text, []).append(node.name)
    assert len(found) > 300 and not [names for names in found.values() if len(names) > 1]


@every_notebook
def test_a_page_needs_nothing_but_what_is_installed(source):
    notebook = convert(source)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for trick in ("sys.path", "%pip", "!pip", "urllib", "import requests", ".cuda()"):
        assert trick not in code, trick
    assert "data:image" not in prose(notebook), "a picture belongs in figures/, not in the text"


def test_the_map_lists_every_notebook():
    start = (FOLDER / "00_start_here.py").read_text(encoding="utf-8")
    table = start.split("## The map")[1].split("**Three routes.**")[0]
    missing = [source.stem for source in SOURCES[1:] if f"({source.stem}.ipynb)" not in table]
    assert not missing


# Figures.


def test_the_manifest_and_the_folder_agree():
    manifest = json.loads((FIGURES / "manifest.json").read_text(encoding="utf-8"))
    written = {
        f"{name}.{kind}": digest
        for name, entry in manifest.items()
        for kind, digest in entry["sha256"].items()
    }
    assert {path.name for path in FIGURES.iterdir()} - {"manifest.json"} == set(written)
    for name, digest in written.items():
        assert hashlib.sha256((FIGURES / name).read_bytes()).hexdigest() == digest, name
    for name, entry in manifest.items():
        source = FOLDER / f"{entry['notebook']}.py"
        drawn = source.read_text(encoding="utf-8").count(f'"{name}"')
        assert drawn == 1, f"{name} is drawn once, by {source.name}"


@every_notebook
def test_every_figure_of_a_notebook_is_published(source):
    manifest = json.loads((FIGURES / "manifest.json").read_text(encoding="utf-8"))
    code = code_of(convert(source).cells)
    drawing = [call for verb in ("show", "gallery", "animate") for call in calls(code, verb)]
    drawn = [ast.literal_eval(call.args[1]) for call in drawing]
    assert drawn and sorted(drawn) == sorted(
        k for k, entry in manifest.items() if entry["notebook"] == source.stem
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "solutions"), [("00", True), ("03", False)])
def test_fast_mode_runs(tmp_path, name, solutions):
    before = {path: path.read_bytes() for path in [*FIGURES.iterdir(), *FOLDER.glob("*.ipynb")]}
    (source,) = find(FOLDER, [name])
    build([source], fast=True, out=tmp_path, solutions=solutions)
    assert before == {
        path: path.read_bytes() for path in [*FIGURES.iterdir(), *FOLDER.glob("*.ipynb")]
    }
    said = "".join(
        printed(cell)
        for cell in nbformat.read(tmp_path / f"{source.stem}.ipynb", as_version=4).cells
    )
    assert "short run" in said and "not attempted yet" in said and "not yet." not in said
    assert ("correct." in said) == solutions, (
        "the pages for a class are executed too, and hold no answer"
    )
