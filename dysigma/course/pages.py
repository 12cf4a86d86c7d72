"""Execute the notebooks: people edit ``notebooks/NN_name.py`` (percent format), the .ipynb is written from it.

An exercise is a cell with a stub (``answer = ...``) and its check, which skips an untouched stub; the cell that solves
it carries the tag "solution". Both run every time; JupyterLab and the site show a solution collapsed.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..runs.files import read_json, write_atomically, write_json

MAX_BYTES = 4_000_000  # of a published page, pictures included

METADATA = {
    "jupytext": {"formats": "ipynb,py:percent", "cell_metadata_filter": "tags,-all"},
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class NotebookError(RuntimeError):
    """A notebook that did not run or may not be published; the message names notebook, cell and reason."""


def find(folder: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """The sources in folder, in order: all, or those whose names start with one of names ("03", "03_snr_weightings").

    Raises ValueError when the folder holds no notebook, KeyError with the choices for an unknown name.
    """
    sources = sorted(Path(folder).glob("[0-9][0-9]_*.py"))
    if not sources:
        raise ValueError(
            f"no notebooks (NN_name.py) in {folder}; run this in the checkout of the project"
        )
    chosen = {
        name: [path for path in sources if path.stem.startswith(Path(name).stem)] for name in names
    }
    if unknown := [name for name, found in chosen.items() if not found]:
        raise KeyError(f"unknown notebooks {unknown}; have {[path.stem for path in sources]}")
    return sorted(set().union(*chosen.values())) if names else sources


def convert(source: str | Path, *, solutions: bool = True) -> Any:
    """The notebook of a .py source, not executed, equal on every call; solutions=False drops the cells that solve."""
    import jupytext  # type: ignore[import-untyped]
    from nbformat import from_dict

    notebook = jupytext.read(source)
    notebook.metadata = from_dict(METADATA)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if solutions or "solution" not in cell.metadata.get("tags", ())
    ]
    for i, cell in enumerate(notebook.cells):
        cell.id, solves = f"cell-{i:02d}", "solution" in cell.metadata.get("tags", ())
        hidden = {"tags": ["solution", "hide-input"], "jupyter": {"source_hidden": True}}
        cell.metadata = from_dict(hidden if solves else {})
    return notebook


def _clean(text: str, root: Path) -> str:
    # Progress bars go, and so do the folders of this machine.
    text = "\n".join(line for line in text.split("\n") if not re.search(r"\d+%\|", line))
    return text.replace(f"{root}/", "").replace(f"{Path.home()}/", "~/")


def normalise(notebook: Any, root: Path) -> None:
    """Drop from an executed notebook, in place, what would differ between two runs or is of no use to a reader."""
    notebook.metadata["language_info"] = METADATA[
        "language_info"
    ]  # the kernel put its version there
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = _clean(output.text, root)
            for kind in {"text/plain", "text/html", "text/markdown"} & set(output.get("data", ())):
                output.data[kind] = _clean(output.data[kind], root)
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}  # where the site looks for it
        if "outputs" in cell:
            kept = [
                output
                for output in cell.outputs
                if not any("widget" in kind for kind in output.get("data", ()))
            ]
            cell.outputs = [output for output in kept if output.get("text", "not a stream")]


def _execute(source: Path, figures: Path, fast: bool, timeout: int, solutions: bool) -> str:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = convert(source, solutions=solutions)
    resources = {"metadata": {"path": str(source.parent)}}
    client = NotebookClient(
        notebook, timeout=timeout, record_timing=False, coalesce_streams=True, resources=resources
    )
    client.extra_arguments = ["--log-level=ERROR"]
    try:
        # One thread by default: the networks are tiny, and two threads on a busy machine spend their time waiting.
        told = {"DYSIGMA_FAST": str(int(fast)), "DYSIGMA_FIGURES": str(figures)}
        with ThreadPoolExecutor(
            1
        ) as aside:  # in the main thread nbclient takes Ctrl-C for itself, and stumbles
            try:
                aside.submit(
                    client.execute, env={"OMP_NUM_THREADS": "1", **os.environ, **told}
                ).result()
            except KeyboardInterrupt:
                if process := getattr(getattr(client.km, "provisioner", None), "process", None):
                    process.kill()
                raise KeyboardInterrupt(
                    f"interrupted in {source.name}; those before it are written"
                ) from None
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        cell = sum(1 for cell in notebook.cells if cell.get("execution_count"))
        reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()[-1]
        raise NotebookError(f"{source.name}, code cell {cell}: {reason}") from error
    normalise(notebook, source.parent.parent)
    text = nbformat.writes(notebook) + "\n"
    if (size := len(text.encode())) > MAX_BYTES and not fast:
        raise NotebookError(
            f"{source.name}: {size} bytes, and at most {MAX_BYTES} are published: shrink its figures"
        )
    return text


def _forget_figures(source: Path, figures: Path) -> None:
    # What the notebook once drew and no longer names.
    manifest = read_json(figures / "manifest.json") if (figures / "manifest.json").exists() else {}
    text = source.read_text(encoding="utf-8")
    for name in [
        n for n, entry in manifest.items() if entry["notebook"] == source.stem and n not in text
    ]:
        del manifest[name]
        write_json(figures / "manifest.json", manifest)
        for kind in ("svg", "png"):
            (figures / f"{name}.{kind}").unlink(missing_ok=True)


def build(
    paths: Iterable[Path],
    *,
    fast: bool = False,
    out: Path | None = None,
    timeout: int = 600,
    solutions: bool = True,
) -> None:
    """Execute notebooks and write each .ipynb beside its source, its figures to ``figures/``, or both to ``out``.

    fast: shortened sizes (DYSIGMA_FAST=1); what is published stays as it is, and results are kept only in ``out``.
    timeout: seconds for one cell. solutions=False: leave the solutions out, for a class; needs ``out``.
    Goes on after a failure and raises NotebookError at the end.
    """
    if not solutions and out is None:
        raise ValueError(
            "notebooks without solutions must not replace the complete ones: name a folder with out="
        )
    failures = []
    with tempfile.TemporaryDirectory(prefix="dysigma-") as scratch:
        aside = Path(out or scratch).resolve() if out or fast else None
        for source in (Path(path).resolve() for path in paths):
            start, figures = time.perf_counter(), (aside or source.parent.parent) / "figures"
            print(f"{source.stem} ...", end=" ", flush=True)
            try:
                text = _execute(source, figures, fast, timeout, solutions)
            except NotebookError as error:
                failures.append(str(error))
                print("failed", flush=True)
                continue
            write_atomically((aside or source.parent) / f"{source.stem}.ipynb", text)
            _forget_figures(source, figures)
            print(f"{time.perf_counter() - start:.1f} s", flush=True)
    if failures:
        raise NotebookError("\n".join(failures))
