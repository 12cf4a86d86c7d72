"""Execute the notebooks: people edit ``notebooks/NN_name.py`` (percent format), the .ipynb is written from it.

An exercise is a cell with a stub (``answer = ...``) and its check, which skips an untouched stub;
the cell that solves it carries the tag "solution". The cell that tells the checks what they expect
begins with EXPECTED. All run every time; JupyterLab and the site show the code of the last two
collapsed.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.files import read_json, write_atomically

MAX_BYTES = 4_000_000  # of a published page, pictures included
CELL_SECONDS = 600  # that one cell may take

METADATA = {
    "jupytext": {"formats": "ipynb,py:percent", "cell_metadata_filter": "tags,-all"},
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


# What would tell a reader the answer is shown collapsed, on the site and in JupyterLab.
COLLAPSED = {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}
COLLAPSED_SOLUTION = {"tags": ["solution", "hide-input"], "jupyter": {"source_hidden": True}}
EXPECTED = "# What the checks"  # how the cell begins that holds the answers of a page's exercises
# The first cell of a hosted page. %pip keeps the host's torch, which fits its GPU.
SETUP_OF_A_HOST = """\
# Set-up: run this cell once on a hosted machine.
from pathlib import Path

if not Path("../dysigma").is_dir():
    !git clone --quiet --depth 1 {repository} dysigma-course
    %pip install --quiet "./dysigma-course[notebooks]"
    %cd dysigma-course/notebooks"""
PROGRESS_BAR = re.compile(r"\d+%\|")
COLOUR = re.compile(r"\x1b\[[\d;]*m")


class NotebookError(RuntimeError):
    """A notebook that did not run or may not be published; the message names notebook, cell and reason."""


def find(folder: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """The sources in folder, in order: all, or those whose names start with one of names ("03", "03_snr_weightings").

    Raises ValueError when the folder holds no notebook, KeyError with the choices for an unknown
    name.

    >>> find("a-folder-of-nobody")
    Traceback (most recent call last):
    ValueError: no notebooks (NN_name.py) in a-folder-of-nobody; run this in the checkout of the project
    """
    sources = sorted(Path(folder).glob("[0-9][0-9]_*.py"))
    if not sources:
        raise ValueError(
            f"no notebooks (NN_name.py) in {folder}; run this in the checkout of the project"
        )
    if not names:
        return sources
    chosen = set()
    for name in names:
        found = [path for path in sources if path.stem.startswith(Path(name).stem)]
        if not found:
            raise KeyError(f"unknown notebook {name!r}; have {[path.stem for path in sources]}")
        chosen.update(found)
    return sorted(chosen)


def convert(source: str | Path, *, solutions: bool = True) -> Any:
    """The notebook of a .py source, not executed, equal on every call; solutions=False drops the cells that solve."""
    import jupytext  # type: ignore[import-untyped]
    from nbformat import from_dict

    notebook = jupytext.read(source)
    notebook.metadata = from_dict(METADATA)
    if not solutions:
        notebook.cells = [cell for cell in notebook.cells if not _solves(cell)]
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata = from_dict(_metadata(cell))
    return notebook


def write_hosted(sources: Iterable[Path], out: Path, repository: str) -> list[Path]:
    """Write each page, not executed, with one set-up cell at the top, for a machine that has nothing of the project.

    The cell clones the repository (an address that git understands), installs the package, and
    moves to the folder notebooks, where pages find records and figures. Run twice, it does no harm.
    Returns the files. Raises ValueError for an address that a shell would take for more than one
    word.
    """
    import nbformat

    if not re.fullmatch(r"[\w.:/~@+-]+", repository):
        raise ValueError(f"{repository!r} is no address of a repository: give https://...")

    written = []
    for source in sources:
        notebook = convert(source)
        setup = nbformat.v4.new_code_cell(SETUP_OF_A_HOST.format(repository=repository), id="setup")
        notebook.cells.insert(0, setup)
        notebook.metadata["accelerator"] = "GPU"  # what hosts read to choose a machine
        path = Path(out) / source.with_suffix(".ipynb").name
        write_atomically(path, nbformat.writes(notebook) + "\n")
        written.append(path)
    return written


def _metadata(cell: Any) -> dict[str, Any]:
    """What a published cell carries: cells that hold an answer are collapsed."""
    if _solves(cell):
        return COLLAPSED_SOLUTION
    if cell.cell_type == "code" and cell.source.startswith(EXPECTED):
        return COLLAPSED
    return {}


def _solves(cell: Any) -> bool:
    return "solution" in cell.metadata.get("tags", ())


def _clean(text: str, root: Path) -> str:
    """Text without progress bars and without the folders of this machine."""
    lines = [line for line in text.split("\n") if not PROGRESS_BAR.search(line)]
    return "\n".join(lines).replace(f"{root}/", "").replace(f"{Path.home()}/", "~/")


def normalise(notebook: Any, root: Path) -> None:
    """Drop from an executed notebook, in place, what would differ between two runs or is of no use to a reader.

    Widgets, progress bars, and the paths of this machine in front of root go; the versions of the
    kernel too.

    >>> import pytest
    >>> nbformat = pytest.importorskip("nbformat")
    >>> printed = nbformat.v4.new_output("stream", text=" 50%|##  |\\nsaved /tmp/course/runs/first")
    >>> page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[printed])])
    >>> normalise(page, Path("/tmp/course"))
    >>> page.cells[0].outputs[0].text
    'saved runs/first'
    """
    notebook.metadata["language_info"] = METADATA["language_info"]  # the kernel puts its version
    for cell in notebook.cells:
        if "outputs" not in cell:
            continue
        kept = []
        for output in cell.outputs:
            if any("widget" in kind for kind in output.get("data", ())):
                continue
            _clean_output(output, root)
            if output.get("text") == "":  # a stream of nothing but progress bars
                continue
            kept.append(output)
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": alt}}  # where the site looks for it
        cell.outputs = kept


def _clean_output(output: Any, root: Path) -> None:
    if "text" in output:
        output.text = _clean(output.text, root)
    for kind in ("text/plain", "text/html", "text/markdown"):
        if kind in output.get("data", ()):
            output.data[kind] = _clean(output.data[kind], root)


@dataclass
class _Builder:
    """Executes notebooks side by side, one kernel and one CPU thread each."""

    fast: bool
    solutions: bool
    out: Path | None  # for pages and figures; beside the sources if None
    scratch: Path
    clients: dict[Path, Any] = field(default_factory=dict)  # of the notebooks that run now

    def make(self, source: Path) -> float:
        """Execute a notebook, write it and its figures, and return the seconds it took."""
        start = time.perf_counter()
        # Figures go aside first: two notebooks at once must not write one manifest.
        drawn = self.scratch / source.stem
        text = self._execute(source, drawn)
        folder = self.out or source.parent
        write_atomically(folder / f"{source.stem}.ipynb", text)
        return time.perf_counter() - start

    def publish_figures(self, source: Path) -> None:
        """Put the figures that a notebook drew in the place of those it drew before."""
        drawn = self.scratch / source.stem
        figures = (self.out or source.parent.parent) / "figures"
        path = figures / "manifest.json"
        manifest = read_json(path) if path.exists() else {}
        mine = [name for name, entry in manifest.items() if entry["notebook"] == source.stem]
        for name in mine:
            for kind in manifest.pop(name)["sha256"]:
                (figures / f"{name}.{kind}").unlink(missing_ok=True)
        if (drawn / "manifest.json").exists():
            manifest.update(read_json(drawn / "manifest.json"))
            for file in drawn.iterdir():
                if file.name != "manifest.json":
                    write_atomically(figures / file.name, file.read_bytes())
        if mine or drawn.exists():
            words = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
            write_atomically(path, words + "\n")

    def _execute(self, source: Path, figures: Path) -> str:
        """The text of the executed notebook."""
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

        notebook = convert(source, solutions=self.solutions)
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(source.parent)}},
        )
        client.extra_arguments = ["--log-level=ERROR"]
        environment = {
            "OMP_NUM_THREADS": "1",  # the networks are tiny, and kernels share the cores
            **os.environ,
            "DYSIGMA_FAST": str(int(self.fast)),
            "DYSIGMA_FIGURES": str(figures),
        }
        self.clients[source] = client
        try:
            client.execute(env=environment)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            cell = sum(1 for cell in notebook.cells if cell.get("execution_count"))
            reason = COLOUR.sub("", str(error)).strip().splitlines()[-1]
            raise NotebookError(f"{source.name}, code cell {cell}: {reason}") from error
        finally:
            del self.clients[source]
        normalise(notebook, source.parent.parent)
        text: str = nbformat.writes(notebook) + "\n"
        size = len(text.encode())
        if size > MAX_BYTES and not self.fast:
            raise NotebookError(
                f"{source.name}: {size} bytes, and at most {MAX_BYTES} are published: "
                "shrink its figures"
            )
        return text

    def stop(self, pages: Iterable[Future[float]]) -> list[Path]:
        """Kill the kernels until no page is being made; returns those that were interrupted."""
        pages = list(pages)
        for page in pages:
            page.cancel()
        interrupted = list(self.clients)
        while True:
            for client in list(self.clients.values()):
                # A kernel that is just starting has no process yet; it has one in the next round.
                process = getattr(getattr(client.km, "provisioner", None), "process", None)
                if process is not None:
                    process.kill()
            if not wait(pages, timeout=0.2).not_done:
                return interrupted


def build(
    paths: Iterable[Path],
    *,
    fast: bool = False,
    out: Path | None = None,
    solutions: bool = True,
    jobs: int = 1,
) -> None:
    """Execute notebooks and write each .ipynb beside its source, its figures to ``figures/``, or both to ``out``.

    fast: shortened sizes (DYSIGMA_FAST=1); what is published stays as it is, and results are kept
    only in ``out``. solutions=False: leave the solutions out, for a class; needs ``out``. jobs:
    notebooks at once, one CPU thread each. Goes on after a failure and raises NotebookError at the
    end.
    """
    if not solutions and out is None:
        raise ValueError(
            "notebooks without solutions must not replace the complete ones: name a folder with out="
        )
    if jobs < 1:
        raise ValueError(f"jobs must be positive; got {jobs}")
    failures = {}
    sources = [Path(path).resolve() for path in paths]
    with tempfile.TemporaryDirectory(prefix="dysigma-") as name:
        scratch = Path(name).resolve()
        folder = scratch / "pages" if fast else None
        if out is not None:
            folder = Path(out).resolve()
        builder = _Builder(fast, solutions, folder, scratch / "figures")
        # Not in the main thread: there nbclient takes Ctrl-C for itself, and stumbles.
        with ThreadPoolExecutor(jobs) as workers:
            pages = {workers.submit(builder.make, source): source for source in sources}
            try:
                for page in as_completed(pages):
                    source = pages[page]
                    try:
                        seconds = page.result()
                    except NotebookError as error:
                        failures[source] = str(error)
                        print(f"{source.stem}: failed", flush=True)
                        continue
                    builder.publish_figures(source)
                    print(f"{source.stem}: {seconds:.1f} s", flush=True)
            except KeyboardInterrupt:
                stopped = " and ".join(source.name for source in builder.stop(pages))
                raise KeyboardInterrupt(
                    f"interrupted in {stopped}; those before it are written"
                ) from None
    if failures:
        raise NotebookError("\n".join(failures[source] for source in sorted(failures)))
