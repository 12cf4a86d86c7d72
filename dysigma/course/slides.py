"""Slides for a class, made from an executed page: what to project, with the rest as speaker notes.

A page is written to be read; a slide is looked at while somebody speaks. So a slide shows a heading, the first
paragraph below it, formulas, lists, tables and pictures. All other paragraphs go into the speaker notes, and code is
left out: show the page itself for that.

A deck is one HTML file that needs no network: pictures and formulas are in it. Arrow keys go from slide to slide, S
shows the speaker notes, F fills the screen. On a phone, scroll.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ..runs.files import write_atomically

# Sections that are for a reader and not for an audience.
NOT_SHOWN = ("Exercises", "Solutions", "References")
GUESS = re.compile(r"^(?P<question>.+) No guess was given\.$", re.M)
BLOCK = re.compile(r"(\$\$.*?\$\$|<details>.*?</details>|\n\s*\n)", re.S)
# Code, which is left alone; formulas of a line of their own; formulas in a line.
MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<line>.+?)\$", re.S)

STYLE = """\
html { scroll-snap-type: y proximity; font: 100%/1.4 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { margin: 0; counter-reset: slide; }
section { box-sizing: border-box; min-height: 100vh; padding: 5vmin 6vmin; scroll-snap-align: start;
  position: relative; display: flex; flex-direction: column; justify-content: center; align-items: flex-start;
  font-size: clamp(1rem, 3.4vmin, 2.4rem); counter-increment: slide; border-bottom: 1px solid #ddd; }
section::after { content: counter(slide) " / " attr(data-of); position: absolute; right: 1.5em; bottom: 0.8em;
  font-size: 0.9rem; color: #767676; }
h1, h2, h3 { line-height: 1.15; margin: 0 0 0.5em; }
p, ul, ol, blockquote { margin: 0 0 0.6em; max-width: 45em; }
blockquote { border-left: 0.25em solid #2a6fb0; padding-left: 0.8em; }
section > div, section > table { display: block; max-width: 100%; overflow-x: auto; }
img { display: block; max-width: 100%; max-height: 88vh; }
section.picture { align-items: center; padding: 2vmin; }
section.picture img { width: 94vw; height: 88vh; object-fit: contain; }
table { border-collapse: collapse; font-size: 0.8em; }
td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }
math { font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", "STIXGeneral", math; }
math[display="block"] { font-size: 1.1em; margin: 0.4em 0; }
aside { display: none; max-width: 55em; margin-top: 1em; padding: 0.6em 1em; font-size: 1rem; background: #f3f3f3; }
.with-notes aside { display: block; }
@media (max-width: 700px) {
  section { min-height: 45vh; max-width: 100vw; overflow-x: auto; }
  section.picture img { width: 100%; height: auto; }
}
@media print { section { page-break-after: always; } }
"""

SCRIPT = """\
const slides = [...document.querySelectorAll("section")];
function current() {
  const middle = innerHeight / 2;
  return slides.findIndex(slide => slide.getBoundingClientRect().bottom > middle);
}
function show(number) {
  const slide = slides[Math.min(Math.max(number, 0), slides.length - 1)];
  slide.scrollIntoView();
}
function fit() {  // shrink the letters of a slide that is higher than the screen; a phone scrolls
  for (const slide of slides) {
    slide.style.fontSize = "";
    let size = parseFloat(getComputedStyle(slide).fontSize);
    while (innerWidth > 700 && slide.offsetHeight > innerHeight + 1 && size > 13) {
      size *= 0.95;
      slide.style.fontSize = size + "px";
    }
  }
}
const steps = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1};
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;  // the browser's own
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in steps) show(current() + steps[key]);
  else if (key === "Home") show(0);
  else if (key === "End") show(slides.length - 1);
  else if (key === "s") document.body.classList.toggle("with-notes");
  else if (key === "f") document.documentElement.requestFullscreen();
  else return;
  event.preventDefault();
});
addEventListener("load", fit);
addEventListener("resize", fit);
"""


def write_slides(sources: Iterable[Path], out: Path) -> list[Path]:
    """Write ``NN_name.slides.html`` for each page into a folder, from the executed .ipynb beside its source.

    Each file is whole: it loads nothing. Returns the files. Raises FileNotFoundError for a page that has not been
    executed.
    """
    import nbformat

    written = []
    for source in sources:
        executed = source.with_suffix(".ipynb")
        if not executed.is_file():
            raise FileNotFoundError(
                f"{executed} does not exist: run dysigma notebooks {source.stem[:2]} first"
            )
        page = nbformat.read(executed, as_version=4)
        path = Path(out) / f"{source.stem}.slides.html"
        write_atomically(path, to_html(slides(page), source.stem))
        written.append(path)
    return written


def to_html(deck: Any, title: str) -> str:
    """The notebook that `slides` makes, as one HTML page with its viewer."""
    shown: list[list[str]] = []  # the parts of each slide
    kinds = []
    for cell in deck.cells:
        if cell.metadata["slideshow"]["slide_type"] == "notes":
            shown[-1].append(f"<aside>{_markdown(cell.source)}</aside>")
            continue
        if cell.cell_type == "markdown":
            kinds.append("text")
            shown.append([_markdown(cell.source)])
        else:
            (output,) = cell.outputs
            kinds.append("picture" if "image/png" in output.data else "text")
            shown.append([_picture_or_table(output)])
    sections: list[str] = []
    for kind, parts in zip(kinds, shown, strict=True):
        sections.append(
            f'<section id="{len(sections) + 1}" class="{kind}" data-of="{len(shown)}">\n'
            + "\n".join(parts)
            + "\n</section>"
        )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}: slides</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE}</style>\n"
        + "\n".join(sections)
        + f"\n<script>\n{SCRIPT}</script>\n</html>\n"
    )


def mathml(tex: str, display: str) -> str:
    """A formula as MathML, which browsers draw themselves. display: "inline" or "block".

    Raises ValueError for TeX that has no form in MathML.
    """
    from latex2mathml.converter import convert

    formula: str = convert(tex, display=display)
    formula = formula.replace("&#x02015;", "&#x000AF;")  # a bar that stretches
    if "\\" in formula:
        raise ValueError(f"MathML has no form of {tex}")
    return formula


def _markdown(text: str) -> str:
    """Markdown with formulas as HTML. Links to other pages become plain words: a deck stands alone."""
    from nbconvert.filters import markdown2html

    formulas: list[str] = []

    def take_out(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        display = "block" if found["block"] else "inline"
        formulas.append(mathml((found["block"] or found["line"]).strip(), display))
        return f"FORMULA{len(formulas) - 1}ENDS"

    html: str = markdown2html(MATH.sub(take_out, text))
    html = re.sub(r'<a class="anchor-link".*?</a>', "", html)
    html = re.sub(r'<a href="(?!https?:)[^"]*"[^>]*>(.*?)</a>', r"\1", html, flags=re.S)
    return re.sub(r"FORMULA(\d+)ENDS", lambda found: formulas[int(found[1])], html)


def _picture_or_table(output: Any) -> str:
    if "image/png" not in output.data:
        return f"<div>{output.data['text/html']}</div>"
    alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
    content = output.data["image/png"].replace("\n", "")
    return f'<img src="data:image/png;base64,{content}" alt="{escape(alt)}">'


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
