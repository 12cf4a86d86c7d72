"""The notebooks: sources and executed pages agree, and every page has what a teaching page must have.

The published .ipynb files are read, not executed, except two that run in fast mode.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dysigma.course.pages import MAX_BYTES, NotebookError, build, convert, find, normalise

ROOT = Path(__file__).resolve().parent.parent
FOLDER, FIGURES = ROOT / "notebooks", ROOT / "figures"
SOURCES = find(FOLDER)
HEADER = (
    "> **Claim.**",
    "**You will be able to**",
    "**You need**",
    "**Time**",
    "**Functions introduced**",
)
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
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) / 2


@every_notebook
def test_page_is_small_and_says_nothing_of_the_machine_it_ran_on(source):
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) <= MAX_BYTES
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
    for part in HEADER:
        assert part in header, part
    skills = header.split("**You will be able to**")[1].split("**You need**")[0]
    assert 3 <= skills.count("\n- ") <= 5
    positions = [text.find(f"\n{part}\n") for part in ENDING]
    assert -1 not in positions and positions == sorted(positions)
    assert 3 <= len(re.findall(r"^- ", text.split("## References")[1], re.M)) <= 8
    assert "banner(" in notebook.cells[1].source
    assert notebook.cells[-1].source == "watermark()"


@every_notebook
def test_one_idea_per_page(source):
    notebook = convert(source)
    code = [
        line
        for c in notebook.cells
        if c.cell_type == "code"
        for line in c.source.splitlines()
        if line.strip()
    ]
    assert len(notebook.cells) <= 40
    assert len(code) <= 250
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "", prose(notebook), flags=re.S)
    assert len(re.sub(r"^\|.*\|$|</?\w[^>]*>", "", text, flags=re.M).split()) <= 2000


@every_notebook
def test_predictions_are_recorded_before_they_are_revealed(source):
    order = [
        (ast.unparse(call.func), ast.unparse(call.args[0]))
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
    for cell in solutions:
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
    text, number = prose(convert(source)), int(source.stem[:2])
    after = text.split("## References")[1]
    assert (
        f"**Next:** [{number + 1:02d}, " in after
        if number < 10
        else "(00_start_here.ipynb)" in after
    )
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
        ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "dysigma").glob("*.py")
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
def test_no_tricks(source):
    notebook = convert(source)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for trick in ("sys.path", "%pip", "!pip", "urllib", "import requests", ".cuda()"):
        assert trick not in code, trick
    assert "data:image" not in prose(notebook), "a picture belongs in figures/, not in the text"
    for node in ast.walk(code_of(notebook.cells)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 20, f"{node.name} has {lines} lines: it belongs in the package"


def test_the_map_lists_every_notebook_and_promises_none_that_is_here():
    table = (
        (FOLDER / "00_start_here.py")
        .read_text(encoding="utf-8")
        .split("## The map")[1]
        .split("**Three routes.**")[0]
    )
    for number in range(1, 11):
        row = next(line for line in table.splitlines() if re.match(rf"# \| \[?{number:02d} ", line))
        here = [source.stem for source in SOURCES if source.stem.startswith(f"{number:02d}")]
        assert ("*(planned)*" in row) == (not here), row
        assert all(f"({stem}.ipynb)" in row for stem in here), row


# Figures.


def test_the_manifest_and_the_folder_agree():
    manifest = json.loads((FIGURES / "manifest.json").read_text(encoding="utf-8"))
    files = {path.name for path in FIGURES.iterdir()} - {"manifest.json"}
    assert files == {f"{name}.{kind}" for name in manifest for kind in ("svg", "png")}
    for name, entry in manifest.items():
        for kind, digest in entry["sha256"].items():
            assert (
                hashlib.sha256((FIGURES / f"{name}.{kind}").read_bytes()).hexdigest() == digest
            ), f"{name}.{kind}"
        source = FOLDER / f"{entry['notebook']}.py"
        assert source.read_text(encoding="utf-8").count(f'"{name}"') == 1, (
            f"{name} is drawn once, by {source.name}"
        )


@every_notebook
def test_every_figure_of_a_notebook_is_published(source):
    manifest = json.loads((FIGURES / "manifest.json").read_text(encoding="utf-8"))
    drawn = [
        ast.literal_eval(call.args[1]) for call in calls(code_of(convert(source).cells), "show")
    ]
    assert drawn and sorted(drawn) == sorted(
        k for k, entry in manifest.items() if entry["notebook"] == source.stem
    )


# The tool itself.


@pytest.fixture
def project(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "dysigma").mkdir()
    (tmp_path / "dysigma" / "plots.py").touch()  # marks a checkout

    def write(name: str, *cells: str) -> Path:
        path = tmp_path / "notebooks" / f"{name}.py"
        path.write_text("\n\n".join(cells), encoding="utf-8")
        return path

    return write


PICTURE = """# %%
import matplotlib.pyplot as plt
from dysigma import plots
fig, ax = plt.subplots(figsize=(1, 1))
plots.show(fig, "07_dot", title="T", caption="C", alt="An empty square.", notebook="07_tiny")"""


def test_build_writes_page_and_figures_beside_the_source_and_the_same_bytes_again(
    project, tmp_path
):
    stub, answer = "# %%\nx = ...\nprint(x)", '# %% tags=["solution"]\nx = 1\nprint(x)'
    source = project("07_tiny", "# %% [markdown]\n# # Title", PICTURE, stub, answer)
    build([source])
    first = source.with_suffix(".ipynb").read_bytes()
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "07_dot.png",
        "07_dot.svg",
        "manifest.json",
    ]
    notebook = page(source)
    assert [printed(cell) for cell in notebook.cells[2:]] == ["Ellipsis\n", "1\n"]
    assert notebook.cells[3].metadata.jupyter.source_hidden
    assert notebook.cells[1].metadata.mystnb.image.alt == "An empty square."

    # The figure is renamed: the old one goes. Then the same source gives the same bytes.
    source.write_text(source.read_text().replace("07_dot", "07_point"))
    build([source])
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.*g")) == [
        "07_point.png",
        "07_point.svg",
    ]
    source.write_text(source.read_text().replace("07_point", "07_dot"))
    build([source])
    assert source.with_suffix(".ipynb").read_bytes() == first


def test_fast_and_student_builds_leave_the_published_page_alone(project, tmp_path):
    show = "# %%\nimport os\nprint(os.environ['DYSIGMA_FAST'])"
    source = project("07_tiny", show, PICTURE, '# %% tags=["solution"]\nprint("secret")')
    build([source], fast=True)
    assert not source.with_suffix(".ipynb").exists() and not (tmp_path / "figures").exists()
    with pytest.raises(ValueError, match="out="):
        build([source], solutions=False)
    build([source], fast=True, solutions=False, out=tmp_path / "class")
    text = (tmp_path / "class" / "07_tiny.ipynb").read_text()
    assert "secret" not in text and '"1\\n"' in text
    assert (tmp_path / "class" / "figures" / "07_dot.png").exists()
    assert not source.with_suffix(".ipynb").exists()


def test_a_failing_cell_is_named_the_others_still_run_and_nothing_is_written(project):
    bad, good = (
        project("07_bad", "# %%\n1 + 1", "# %%\nraise ValueError('seven')"),
        project("08_good", "# %%\n1 + 1"),
    )
    with pytest.raises(NotebookError, match=r"07_bad\.py, code cell 2: ValueError: seven"):
        build([bad, good])
    assert not bad.with_suffix(".ipynb").exists()
    assert good.with_suffix(".ipynb").exists()


def test_a_kernel_that_dies_is_a_failure_like_others(project):
    with pytest.raises(NotebookError, match=r"07_dies\.py, code cell .*died"):
        build([project("07_dies", "# %%\nimport os\nos._exit(1)")])


def test_an_interrupt_stops_the_kernel_and_says_where(project, tmp_path):
    source = project(
        "07_slow", "# %%\nimport pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(600)"
    )
    command = [sys.executable, "-m", "dysigma", "notebooks", "--folder", source.parent]
    # Background jobs of a shell ignore SIGINT, and what they start inherits that.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heard
    )
    while not (source.parent / "begun").exists():
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1].strip()
    assert (running.returncode, said) == (
        130,
        "dysigma: interrupted in 07_slow.py; those before it are written",
    )


def test_a_page_that_is_too_large_is_refused(project):
    source = project("07_large", f"# %%\nprint('x\\n' * {MAX_BYTES})")
    with pytest.raises(NotebookError, match="at most 300000"):
        build([source])
    assert not source.with_suffix(".ipynb").exists()


def test_normalise_keeps_results_and_drops_bars_paths_and_widgets(tmp_path):
    bar = nbformat.v4.new_output(
        "stream", name="stderr", text="\r 10%|#  | 1/9\r100%|####| 9/9 [00:01]\n"
    )
    warning = nbformat.v4.new_output(
        "stream", name="stderr", text=f"{tmp_path}/dysigma/x.py:3: Warning\n"
    )
    widget = nbformat.v4.new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "w"}
    )
    value = nbformat.v4.new_output(
        "execute_result", {"text/plain": f"PosixPath('{Path.home()}/x')"}, execution_count=1
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", outputs=[bar, warning, widget, value])]
    )
    normalise(notebook, tmp_path)
    kept = notebook.cells[0].outputs
    assert [output.get("text") for output in kept] == ["dysigma/x.py:3: Warning\n", None]
    assert kept[1].data["text/plain"] == "PosixPath('~/x')"


def test_find_knows_numbers_names_and_files(tmp_path):
    for name in ("00_a.py", "01_b.py", "conftest.py"):
        (tmp_path / name).touch()
    assert [path.name for path in find(tmp_path)] == ["00_a.py", "01_b.py"]
    for name in ("01", "01_b", "notebooks/01_b.ipynb"):
        assert [path.name for path in find(tmp_path, [name])] == ["01_b.py"]
    with pytest.raises(KeyError, match=r"'07'.*'00_a', '01_b'"):
        find(tmp_path, ["07"])
    with pytest.raises(ValueError, match="checkout"):
        find(tmp_path / "no")


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
