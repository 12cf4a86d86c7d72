"""Figures: one colour-blind-safe style, deterministic files with alt text, plot functions of arrays and an ``ax``.

Plot functions take arrays (numpy, or torch on the CPU), draw on the ``ax`` they are given and return it. They never
train, show or save. Series differ in dash and marker as well as in colour, so that a figure survives a grey printer.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .images import tile
from .intervals import t_interval
from .runs.files import read_json, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .auditing import Audit, Preview
    from .gradients import ConflictReport, NegativeTransfer


DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def use_style() -> None:
    """Set the house style: seaborn's colour-blind palette, fonts of 9 pt or more, reproducible SVG bytes."""
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font="DejaVu Sans")
    mpl.rc("figure", dpi=100, figsize=(6.4, 3.8))
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("font", size=10)
    mpl.rc("axes", labelsize=10, titlesize=11, titlelocation="left")
    mpl.rc(("xtick", "ytick"), labelsize=9)
    mpl.rc("legend", fontsize=9)
    mpl.rc("svg", hashsalt="dysigma", fonttype="none")


def figures_folder() -> Path:
    """Where figures go: $DYSIGMA_FIGURES, or ``figures/`` of the checkout around the working folder.

    With DYSIGMA_FAST=1, whose figures show shortened runs, it is a temporary folder instead.
    """
    chosen = os.environ.get("DYSIGMA_FIGURES")
    if chosen:
        return Path(chosen)
    if os.environ.get("DYSIGMA_FAST") == "1":
        return Path(tempfile.gettempdir()) / f"dysigma-figures-{os.getpid()}"
    here = Path.cwd()
    for root in (here, *here.parents):
        if (root / "dysigma/plots.py").exists():
            return root / "figures"
    return here / "figures"


def _shrink(png: io.BytesIO, words: Mapping[str, str]) -> bytes:
    # A palette of 256 colours keeps a notebook with its pictures small. No date, no version: equal data, equal bytes.
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, text in words.items():
        info.add_itxt(key, text)
    picture = Image.open(png).convert("RGB").quantize(256)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True, pnginfo=info)
    return out.getvalue()


def save_figure(
    fig: Figure,
    name: str,
    *,
    title: str,
    caption: str,
    alt: str,
    notebook: str,
    folder: str | Path | None = None,
) -> Path:
    """Write ``<name>.svg`` and ``<name>.png`` with their texts inside; list them in ``manifest.json``.

    name: NN_words, NN the number of the notebook. notebook: its stem. title, caption (states the
    conclusion) and alt (the picture in words) are required. folder: default `figures_folder`. Equal
    data give equal bytes under one matplotlib version.

    Returns the path of the PNG. Raises ValueError for a bad name or an empty text.
    """
    texts = {"title": title, "caption": caption, "alt": alt}
    _check_figure(name, texts, notebook)
    words = {"Title": title, "Description": f"{caption} Alt text: {alt}", "Source": notebook}
    metadata = {**words, "Date": None}

    vector = io.BytesIO()
    fig.savefig(vector, format="svg", dpi=110, bbox_inches="tight", metadata=metadata)
    raster = io.BytesIO()
    fig.savefig(raster, format="png", dpi=110, bbox_inches="tight", metadata=metadata)

    contents = {"svg": vector.getvalue(), "png": _shrink(raster, words)}
    return _publish(contents, name, texts, notebook, folder)


def save_animation(
    content: bytes,
    still: NDArray[np.uint8],
    name: str,
    *,
    title: str,
    caption: str,
    alt: str,
    notebook: str,
) -> Path:
    """Write ``<name>.gif`` and its static twin ``<name>.png``; list them in ``manifest.json``.

    content: the bytes of the GIF. still: the picture (H, W, 3) that stands for it where nothing
    moves. The other arguments are those of `save_figure`. Returns the path of the GIF.
    """
    from PIL import Image

    texts = {"title": title, "caption": caption, "alt": alt}
    _check_figure(name, texts, notebook)
    words = {"Title": title, "Description": f"{caption} Alt text: {alt}", "Source": notebook}
    raster = io.BytesIO()
    Image.fromarray(still).save(raster, "PNG")
    contents = {"gif": content, "png": _shrink(raster, words)}
    return _publish(contents, name, texts, notebook).with_suffix(".gif")


def _check_figure(name: str, texts: Mapping[str, str], notebook: str) -> None:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name) or not notebook.startswith(name[:3]):
        raise ValueError(
            f"name must be NN_words with the number of its notebook; got {name!r} for {notebook!r}"
        )
    empty = [key for key, text in texts.items() if not text.strip()]
    if empty:
        raise ValueError(f"figure {name!r} needs a non-empty {' and '.join(empty)}")


def _publish(
    contents: Mapping[str, bytes],
    name: str,
    texts: Mapping[str, str],
    notebook: str,
    folder: str | Path | None = None,
) -> Path:
    """Write the files of one figure, ending to bytes, and its entry in the manifest."""
    place = figures_folder() if folder is None else Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for kind, content in contents.items():
        write_atomically(place / f"{name}.{kind}", content)
        hashes[kind] = hashlib.sha256(content).hexdigest()

    path = place / "manifest.json"
    manifest = read_json(path) if path.exists() else {}
    manifest[name] = {**texts, "notebook": notebook, "sha256": hashes}
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, text)
    return place / f"{name}.png"


def show(fig: Figure, name: str, *, title: str, caption: str, alt: str, notebook: str) -> None:
    """Save a figure with `save_figure`, display it with its alt text, and print the caption below it."""
    import matplotlib.pyplot as plt
    from IPython.display import Markdown, display

    path = save_figure(fig, name, title=title, caption=caption, alt=alt, notebook=notebook)
    data = {"image/png": base64.b64encode(path.read_bytes()).decode(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})
    display(Markdown(f"**{title.removesuffix('.')}{'' if title[-1] in '?!' else '.'}** {caption}"))
    plt.close(fig)  # else the inline backend shows it a second time


def trajectories(
    ax: Axes, x: ArrayLike, series: Mapping[str, ArrayLike], *, log: bool = False
) -> Axes:
    """Each series (N,), or (S, N) over seeds with a 95 % interval of its mean (log: geometric mean), against x (N,)."""
    x = np.asarray(x, dtype=float)
    every = max(1, len(x) // 8)
    for i, (label, values) in enumerate(series.items()):
        if np.shape(values)[-1:] != x.shape:
            raise ValueError(
                f"series {label!r} has shape {np.shape(values)}; expected (N,) or (S, N), N = {len(x)}"
            )
        array = np.asarray(values, dtype=float)
        if log:
            array = np.log(array)
        undo = np.exp if log else np.copy
        middle, half = t_interval(array) if array.ndim == 2 else (array, None)
        colour = f"C{i % 10}"
        ax.plot(
            x,
            undo(middle),
            label=label,
            color=colour,
            linestyle=DASHES[i % 5],
            marker=MARKERS[i % 10],
            markersize=4.5,
            # Markers start at different points so that curves on top of each other still show both.
            markevery=(i * every // 5 % every, every),
        )
        if half is not None:
            low = undo(middle - half)
            high = undo(middle + half)
            ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.set_yscale("log" if log else "linear")
    ax.legend()
    return ax


def heatmap(
    ax: Axes,
    matrix: ArrayLike,
    *,
    labels: Sequence[str] = (),
    limit: float = 1,
    unit: str = "cosine",
    colorbar: bool = True,
    numbers: bool = True,
) -> Axes:
    """A signed matrix (R, C) on a diverging map from -limit to limit, with ``seaborn.heatmap``.

    Numbers are written into cells up to 12 x 12, unless `numbers` is False; NaN (unknown) is hatched. labels: of
    rows and columns. The cell of row r and column c has its centre at (c + 0.5, r + 0.5).
    """
    import seaborn as sns

    values = np.asarray(matrix, dtype=float)
    texts: Any = False
    if numbers and max(values.shape) <= 12:
        written = [f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in values.flat]
        texts = np.reshape(written, values.shape)
    ticks: Any = list(labels) if labels else True
    # Cells without a value are left out, so the hatched background shows.
    ax.patch.set(facecolor="white", edgecolor="0.5", hatch="////", linewidth=0)
    sns.heatmap(
        values,
        ax=ax,
        cmap="vlag",
        vmin=-limit,
        vmax=limit,
        square=True,
        mask=np.isnan(values),
        annot=texts,
        fmt="",
        annot_kws={"fontsize": 9 if max(values.shape) <= 8 else 7},
        xticklabels=ticks,
        yticklabels=ticks,
        cbar=colorbar,
        cbar_kws={"label": unit} if colorbar else None,
    )
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)
    return ax


def mark_cells(ax: Axes, cells: ArrayLike) -> Axes:
    """Mark cells (R, C) bool of a `heatmap` with a dot in their upper right corner."""
    rows, columns = np.nonzero(np.asarray(cells))
    ax.scatter(columns + 0.86, rows + 0.15, s=14, facecolors="black", edgecolors="black", zorder=3)
    return ax


def image_grid(
    ax: Axes, images: ArrayLike, *, columns: int, row_labels: Sequence[str] = ()
) -> Axes:
    """Draw `tile`, with a label per row."""
    height = np.shape(images)[2] + 1
    ax.imshow(tile(images, columns), interpolation="nearest")
    ax.set(xticks=[], frame_on=False)
    ax.set_yticks([(i + 0.5) * height for i in range(len(row_labels))], labels=row_labels)
    ax.grid(False)
    return ax


def _bin_matrices(
    panels: Mapping[str, Any], spans: Sequence[str], limit: float = 1, unit: str = "cosine"
) -> Figure:
    """Matrices of bins side by side on one scale."""
    import matplotlib.pyplot as plt

    use_style()
    side = max(5.6, 0.16 * len(spans))
    figsize = ((side + 1) * len(panels), side)
    fig, axes = plt.subplots(1, len(panels), figsize=figsize, squeeze=False)
    for ax, (title, matrix) in zip(axes[0], panels.items(), strict=True):
        heatmap(ax, matrix, labels=spans, limit=limit, unit=unit)
        ax.tick_params(axis="x", rotation=90)
        ax.set(title=title, xlabel="timesteps", ylabel="timesteps")
    return fig


def conflict_matrices(report: ConflictReport) -> Figure:
    """The cosines of a conflict report between all bins, naive beside debiased."""
    panels = {
        "naive: of averaged gradients": report.cosine,
        "debiased; hatched: undetermined": report.cosine_debiased,
    }
    return _bin_matrices(panels, report.spans())


def transfer_matrix(transfer: NegativeTransfer) -> Figure:
    """What fine-tuning on one bin (row) did to the loss of every bin (column), in percent of the loss before."""
    change, half = transfer.percent()
    limit = float(change.abs().max())
    title = "dots: 95 % interval excludes 0"
    fig = _bin_matrices({title: change}, transfer.spans(), limit, "change of the loss, %")
    ax = fig.axes[0]
    mark_cells(ax, change.abs() > half)
    ax.set(xlabel="loss at timesteps", ylabel="fine-tuned on timesteps")
    return fig


def audit_figure(found: Audit) -> Figure:
    """Two panels of an audit: where the two weights lie, and how far the one is off the other."""
    import matplotlib.pyplot as plt

    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    weights = found.weights.numpy()
    reference = found.reference.numpy()
    timesteps = np.arange(len(weights))
    claimed = found.claims or found.nearest["name"]

    left.plot(timesteps, weights, color="C0", label="the function")
    left.plot(timesteps, reference, color="C1", linestyle=DASHES[1], label=claimed)
    left.fill_between(timesteps, weights, reference, color="0.85", linewidth=0)
    left.set(xlabel="timestep (0 = clean)", ylabel="weight, mean 1", ylim=(0, None))
    left.set_title("Where the weight lies")
    left.legend()

    # Where the claim is 0 there is no ratio to draw.
    drawn = (weights > 0) & (reference > 0)
    ratio = weights[drawn] / reference[drawn]
    ratio = ratio / np.median(ratio)
    right.axhspan(0.9, 1.1, color="0.85", linewidth=0)
    right.axhline(1, color="0.5", linewidth=1)
    right.plot(timesteps[drawn], ratio, color="C0")
    right.set(yscale="log", xlabel="timestep (0 = clean)", ylabel="ratio, median 1")
    low, high = right.get_ylim()
    right.set_ylim(min(low, 0.5), max(high, 2))
    right.set_title(f"The function over {claimed} (grey: within 10 %)")

    if found.agrees:
        title = f"The weight is within 10 % of {claimed} at every timestep"
    else:
        title = f"{found.total_variation:.0%} of the weight sits elsewhere than {claimed} puts it"
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return fig


def preview_figure(shown: Preview, weighting: str, sampler: str) -> Figure:
    """Two panels of a preview: density and weight by timestep, and their product, the objective."""
    import matplotlib.pyplot as plt

    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    objective = shown.objective.numpy()
    timesteps = np.arange(len(objective))

    left.axhline(1, color="0.5", linewidth=1)
    left.plot(timesteps, shown.density.numpy(), color="C0", label=f"density: {sampler}")
    left.plot(
        timesteps,
        shown.weight.numpy(),
        color="C1",
        linestyle=DASHES[1],
        label=f"weight: {weighting}",
    )
    left.set(xlabel="timestep (0 = clean)", ylabel="mean 1", ylim=(0, None))
    left.set_title("What is drawn, and what it counts")
    left.legend()

    low, high = shown.middle_half()
    inside = slice(low, high + 1)
    right.axhline(1, color="0.5", linewidth=1)
    right.plot(timesteps, objective, color="C2")
    right.fill_between(timesteps[inside], objective[inside], color="C2", alpha=0.25, linewidth=0)
    right.set(xlabel="timestep (0 = clean)", ylabel="density \u00d7 weight, mean 1", ylim=(0, None))
    right.set_title("The objective (shaded: its middle half)")

    title = f"Half of the objective lies at timesteps {low} to {high}"
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return fig
