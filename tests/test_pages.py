"""The builder of the pages: what it writes, what it leaves alone, and what it says when a cell fails."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dysigma.cli.main import main
from dysigma.course.pages import (
    MAX_BYTES,
    NotebookError,
    build,
    convert,
    find,
    normalise,
    write_hosted,
)

ROOT = Path(__file__).resolve().parent.parent


def page(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(NotebookError, match=r"07_bad\.py.*cell 2.*ValueError: seven"):
        build([bad, good])
    assert not bad.with_suffix(".ipynb").exists()
    assert good.with_suffix(".ipynb").exists()


def test_a_kernel_that_dies_is_a_failure_like_others(project):
    with pytest.raises(NotebookError, match=r"07_dies\.py, code cell .*died"):
        build([project("07_dies", "# %%\nimport os\nos._exit(1)")])


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_page_that_is_too_large_is_refused(project):
    source = project("07_large", f"# %%\nprint('x\\n' * {MAX_BYTES})")
    with pytest.raises(NotebookError, match=str(MAX_BYTES)):
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


def test_hosted_copies_begin_with_one_cell_of_set_up(tmp_path):
    sources = find(ROOT / "notebooks", ["00", "07"])
    written = write_hosted(sources, tmp_path, "https://example.org/a/project.git")
    assert [path.stem for path in written] == [source.stem for source in sources]
    for source, path in zip(sources, written, strict=True):
        hosted = nbformat.read(path, as_version=4)
        nbformat.validate(hosted)
        first, *rest = hosted.cells
        assert "git clone --quiet --depth 1 https://example.org/a/project.git" in first.source
        assert [cell.source for cell in rest] == [cell.source for cell in convert(source).cells]
        assert not any(cell.get("outputs") for cell in hosted.cells)


@pytest.mark.parametrize("address", ["", "https://example.org/a; rm b", "$HOME"])
def test_hosted_copies_want_an_address(tmp_path, address):
    with pytest.raises(ValueError, match="address of a repository"):
        write_hosted(find(ROOT / "notebooks", ["07"]), tmp_path, address)
    assert not list(tmp_path.iterdir())


def test_slides_show_pictures_and_no_code_and_keep_the_rest_as_notes(tmp_path):
    from dysigma.course.slides import slides, write_slides

    source = ROOT / "notebooks/06_dy_sigma_derived.py"
    page = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    made = slides(page)
    nbformat.validate(made)
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in made.cells]
    assert kinds[0] == "slide" and {"slide", "subslide", "notes"} == set(kinds)
    assert not any(cell.source for cell in made.cells if cell.cell_type == "code")

    def pictures(notebook):
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
        return [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]

    assert pictures(made) == pictures(page)
    text = "\n".join(cell.source for cell in made.cells)
    assert "## The wish" in text and "$$" in text
    assert "# Solutions" not in text and "Measured" not in text

    pytest.importorskip("latex2mathml")
    (path,) = write_slides([source], tmp_path)
    deck = path.read_text(encoding="utf-8")
    assert deck.count('src="data:image/png') == len(pictures(page))
    assert deck.count("<section") == kinds.count("slide") + kinds.count("subslide")
    assert "<math" in deck and "$" not in re.sub(r"<script>.*", "", deck, flags=re.S)
    assert not re.search(r'(src|href)="(?!data:|https?://(arxiv|doi|github))', deck)
    assert "<script src" not in deck and "<link" not in deck


def test_a_slide_has_the_first_paragraph_and_notes_have_the_others():
    from dysigma.course.slides import slides

    text = "## A heading\n\nFirst, $a$.\n\n$$a = b$$\n\nSecond.\n\n- a list\n\n## Exercises\n\nNot this."
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    shown, notes = slides(page).cells
    assert shown.source == "## A heading\n\nFirst, $a$.\n\n$$a = b$$\n\n- a list"
    assert notes.source == "Second."


def test_slides_are_told_where_they_cannot_go_and_go_with_nothing_else(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["notebooks", "06", "--folder", str(ROOT / "notebooks"), "--slides"]
    assert main([*words, str(tmp_path / "file")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "slides"), "--hosted", str(tmp_path / "hosted")])
    assert "not allowed with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_slides_want_an_executed_page(tmp_path):
    from dysigma.course.slides import write_slides

    with pytest.raises(FileNotFoundError, match="dysigma notebooks 01"):
        write_slides([tmp_path / "01_new.py"], tmp_path)
