"""Slides for a class, made from an executed page: what to project, with the rest as speaker notes.

A page is written to be read; a slide is looked at while somebody speaks. So a slide shows a heading, the first
paragraph below it, formulas, lists, tables and pictures. All other paragraphs go into the speaker notes (key S), and
code is left out: show the page itself for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..runs.files import write_atomically

# Sections that are for a reader and not for an audience.
NOT_SHOWN = ("Exercises", "Solutions", "References")
GUESS = re.compile(r"^(?P<question>.+) No guess was given\.$", re.M)
BLOCK = re.compile(r"(\$\$.*?\$\$|<details>.*?</details>|\n\s*\n)", re.S)


def write_slides(sources: Iterable[Path], out: Path) -> list[Path]:
    """Write ``NN_name.slides.html`` for each page into a folder, from the executed .ipynb beside its source.

    The files hold their pictures. The viewer, reveal.js, is loaded from the web when they are opened. Returns the
    files. Raises FileNotFoundError for a page that has not been executed.
    """
    import nbformat
    from nbconvert.exporters import SlidesExporter

    exporter = SlidesExporter(exclude_input=True, exclude_output_prompt=True)
    written = []
    for source in sources:
        executed = source.with_suffix(".ipynb")
        if not executed.is_file():
            raise FileNotFoundError(
                f"{executed} does not exist: run dysigma notebooks {source.stem[:2]} first"
            )
        page = nbformat.read(executed, as_version=4)
        html, _ = exporter.from_notebook_node(slides(page))
        path = Path(out) / f"{source.stem}.slides.html"
        write_atomically(path, html)
        written.append(path)
    return written


def slides(page: Any) -> Any:
    """The notebook of slides of an executed page: cells with the slide types of Jupyter.

    >>> import pytest
    >>> nbformat = pytest.importorskip("nbformat")
    >>> text = nbformat.v4.new_markdown_cell("## A weight\\n\\nIt is clipped.\\n\\nMore on that.")
    >>> made = slides(nbformat.v4.new_notebook(cells=[text]))
    >>> [(cell.metadata["slideshow"]["slide_type"], cell.source) for cell in made.cells]
    [('slide', '## A weight\\n\\nIt is clipped.'), ('notes', 'More on that.')]
    """
    from nbformat.v4 import new_notebook

    cells: list[Any] = []
    shown = True
    for cell in page.cells:
        if cell.cell_type == "markdown":
            for section in _sections(cell.source):
                heading = section.split("\n", 1)[0]
                if heading.startswith("#"):
                    shown = heading.lstrip("# ").strip() not in NOT_SHOWN
                if shown:
                    cells += _of_text(section)
        elif shown:
            cells += _of_outputs(cell.get("outputs", ()))
    return new_notebook(cells=cells, metadata=page.metadata)


def _sections(text: str) -> list[str]:
    """A markdown cell, cut before each heading."""
    return [part.strip() for part in re.split(r"^(?=#{1,3} )", text, flags=re.M) if part.strip()]


def _cell(source: str, kind: str) -> Any:
    from nbformat.v4 import new_markdown_cell

    return new_markdown_cell(source, metadata={"slideshow": {"slide_type": kind}})


def _is_for_the_slide(block: str) -> bool:
    """Whether a block of markdown is a formula, a list, a table or a quotation."""
    return block.startswith(("$$", "- ", "| ", "> ", "1. "))


def _of_text(section: str) -> list[Any]:
    """One slide of a section, if it has a heading, and its other paragraphs as notes."""
    blocks = [block.strip() for block in BLOCK.split(section) if block.strip()]
    begins = blocks[0].startswith("#")
    is_title = blocks[0].startswith("# ")
    on_slide: list[str] = []
    notes: list[str] = []
    paragraphs_shown = 0
    for block in blocks:
        if block.startswith("#"):
            on_slide.append(block)
        elif is_title:  # beside the name of the page, its claim or question alone
            shown = on_slide if block.startswith("> ") else notes
            shown.append(block)
        elif _is_for_the_slide(block):
            on_slide.append(block)
        elif begins and paragraphs_shown == 0 and not block.startswith("<details>"):
            on_slide.append(block)
            paragraphs_shown += 1
        else:
            notes.append(block)
    cells = []
    if on_slide:
        cells.append(_cell("\n\n".join(on_slide), "slide" if begins else "subslide"))
    if notes:
        cells.append(_cell("\n\n".join(notes), "notes"))
    return cells


def _of_outputs(outputs: Iterable[Any]) -> list[Any]:
    """A slide for each picture and table, and for each question that asks for a guess."""
    from nbformat.v4 import new_code_cell

    cells = []
    for output in outputs:
        if output.output_type == "stream":
            for found in GUESS.finditer(output.text):
                question = found["question"]
                if "Measured" not in question:
                    cells.append(_cell(f"### What do you expect?\n\n{question}", "subslide"))
        elif output.output_type == "display_data":
            if "image/png" in output.data or "text/html" in output.data:
                metadata = {"slideshow": {"slide_type": "subslide"}}
                cells.append(new_code_cell("", outputs=[output], metadata=metadata))
            elif "text/markdown" in output.data:  # the caption below a picture
                cells.append(_cell(output.data["text/markdown"], "notes"))
    return cells
