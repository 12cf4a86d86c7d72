"""The site (`make docs`): the notebooks as they were published, none executed, and a reference. Nothing is fetched, built or read.

Formulas become MathML, which browsers draw themselves: MathJax would come from elsewhere, for every reader anew.
"""

import re
from pathlib import Path

from docutils import nodes

import dysigma
from dysigma.course.pages import find
from dysigma.course.slides import mathml, write_slides

project, author, release = "dysigma", "The dysigma authors", dysigma.__version__
copyright = "the dysigma authors, MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "reference/index"
exclude_patterns = ["**.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would be fetched
nb_render_markdown_format = "myst"  # captions hold formulas
myst_enable_extensions = ["dollarmath"]
suppress_warnings = [
    "myst.xref_missing"
]  # the README is no page of the site; tests follow every link
html_math_renderer = "mathml"

default_role = "py:obj"  # `name` in a docstring links where it can
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 130
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "dysigma"
smartquotes = False
html_extra_path = ["index.html"]
html_static_path = html_css_files = ["site.css"]
html_show_sourcelink = False


def as_rst(app, what, name, obj, options, lines):
    """A docstring is plain text: only `names` are marked, and a hanging indent goes on with the line above."""
    if isinstance(obj, dict):
        lines[:] = [", ".join(f"``{name}``" for name in obj)]
        return
    text = "".join(
        part if i % 2 else re.sub(r"([*|_\\])", r"\\\1", part)
        for i, part in enumerate(re.split(r"(``.+?``|`.+?`)", "\n".join(lines)))
    )
    paragraphs = [p.split("\n") for p in re.split(r"\n\s*\n", text.strip())]
    lines.clear()
    for rows in paragraphs:
        hangs = any(row.startswith(" ") for row in rows)
        lines += [
            f"| {row}" if hangs and not row.startswith(" ") else row for row in rows
        ] + [""]


def write_decks(app, exception):
    """Beside the pages, the slides that the teaching plan links to."""
    if exception is not None or app.builder.name != "html":
        return
    reference = Path(__file__).parent
    plan = (reference / "teaching.md").read_text(encoding="utf-8")
    linked = re.findall(r'href="\.\./slides/(\w+)\.slides\.html"', plan)
    write_slides(find(reference.parent, linked), Path(app.outdir) / "slides")


def setup(app):
    def math(display):
        def visit(self, node):
            self.body.append(mathml(node.astext(), display))
            raise nodes.SkipNode

        return visit, None

    app.connect("autodoc-process-docstring", as_rst)
    app.connect("build-finished", write_decks)
    app.add_html_math_renderer("mathml", math("inline"), math("block"))
