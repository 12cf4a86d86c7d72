"""What a page of the course does besides teaching: set-up, figures, tables, guesses, exercises.

A page makes one `Lesson` in its first cell and calls its methods, so that the other cells show
ideas alone.
"""

from __future__ import annotations

import base64
import io
import os
import platform
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import plots
from ..devices import resolve_device
from ..images import tile
from . import answers

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# What one animation may weigh; a page is opened over slow lines too.
MAX_ANIMATION_BYTES = 1_500_000
FRAME_MILLISECONDS = 250
LAST_FRAME_MILLISECONDS = 2000


class Lesson:
    """One page of the course.

    notebook: the name of its file without ending, such as "03_snr_weightings". Its number starts
    the names of the page's figures. trains_on: where the page trains networks: "auto" for a GPU if
    there is one, "cpu" where recorded numbers want it, None if it trains none.
    The first line of output names the page, the versions and that device, and says whether the run is
    full or short. `device` is where networks, images and schedules belong; the CPU on a page that
    trains none. Guesses and exercises are those of `dysigma.course.answers`.

    >>> lesson = Lesson("03_snr_weightings", trains_on="cpu")
    03_snr_weightings · dysigma ... · torch ... · trains on the CPU · ...
    >>> lesson.predict("How many times fewer images?", 3.7)
    How many times fewer images? Your prediction: 3.7
    >>> lesson.end()
    Python ..., dysigma ..., torch ...
    """

    def __init__(self, notebook: str, trains_on: torch.device | str | None = None) -> None:
        self.notebook = notebook
        self.device = resolve_device("cpu" if trains_on is None else str(trains_on))
        self._tables = 0
        plots.use_style()
        warnings.filterwarnings(
            "ignore", message="IProgress not found"
        )  # diffusers asks for widgets
        words = [notebook, f"dysigma {version('dysigma')}", f"torch {torch.__version__}"]
        if trains_on is None:
            words.append("trains no network")
        else:
            words.append(f"trains on {_device_name(self.device)}")
        short = "short run (DYSIGMA_FAST=1): smaller sizes, looser numbers"
        words.append(self.fast("full run", short))
        print(" · ".join(words))

    def fast(self, full: Any, quick: Any) -> Any:
        """``quick`` in a short run (DYSIGMA_FAST=1), else ``full``: the same code path at two sizes."""
        return quick if os.environ.get("DYSIGMA_FAST") == "1" else full

    @property
    def as_published(self) -> bool:
        """Whether this is a full run on the CPU, as the pages were published.

        A claim about one experiment was checked there. Elsewhere the noise is drawn by another
        generator, and a short run trains too little.
        """
        return bool(self.fast(True, False)) and self.device.type == "cpu"

    def show(self, fig: Figure, name: str, *, title: str, caption: str, alt: str) -> None:
        """Write the conclusion above a figure, save it as ``figures/name.png`` and ``.svg``, show it.

        name: the page's number and words, such as "03_weights". title: the conclusion.
        caption: what is plotted and what to see in it. alt: the picture in words.
        """
        columns = int(fig.get_figwidth() * 9.5)
        heading = textwrap.fill(title, columns)
        fig.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
        plots.show(fig, name, title=title, caption=caption, alt=alt, notebook=self.notebook)

    def gallery(
        self,
        rows: Mapping[str, Any],
        name: str,
        *,
        title: str,
        caption: str,
        alt: str,
        columns: int = 8,
        pixels: int = 64,
    ) -> None:
        """Show images enlarged, a labelled block for each entry of rows.

        rows: label to images (N, 1 or 3, H, W), uint8 or in [-1, 1]. columns: images side by side.
        pixels: the height of one image on the page, at least.
        """
        import matplotlib.pyplot as plt

        blocks = {label: tile(images, columns) for label, images in rows.items()}
        first = next(iter(rows.values()))
        scale = max(1, round(pixels / np.shape(first)[2]))
        height = sum(block.shape[0] for block in blocks.values()) * scale / 100
        width = next(iter(blocks.values())).shape[1] * scale / 100
        fig, axes = plt.subplots(
            len(blocks),
            1,
            figsize=(width + 0.2, height + 0.45 * len(blocks) + 0.5),
            squeeze=False,
        )
        for ax, (label, block) in zip(axes[:, 0], blocks.items(), strict=True):
            ax.imshow(block, interpolation="nearest")
            ax.set_title(label)
            ax.axis("off")
        self.show(fig, name, title=title, caption=caption, alt=alt)

    def animate(
        self,
        frames: Sequence[NDArray[np.uint8]],
        name: str,
        *,
        title: str,
        caption: str,
        alt: str,
    ) -> None:
        """Show pictures (H, W, 3) one after the other, as a GIF with a static twin (the last one).

        The files are ``figures/name.gif`` and ``figures/name.png``. Raises ValueError above 1.5 MB.
        """
        from IPython.display import Markdown, display
        from PIL import Image

        pictures = [Image.fromarray(frame).quantize(128) for frame in frames]
        stream = io.BytesIO()
        hold = [FRAME_MILLISECONDS] * (len(pictures) - 1) + [LAST_FRAME_MILLISECONDS]
        pictures[0].save(
            stream, "GIF", save_all=True, append_images=pictures[1:], duration=hold, loop=0
        )
        content = stream.getvalue()
        if len(content) > MAX_ANIMATION_BYTES:
            raise ValueError(
                f"animation {name!r} has {len(content):,} bytes and may have {MAX_ANIMATION_BYTES:,}: "
                "use fewer or smaller frames"
            )
        path = plots.save_animation(
            content,
            frames[-1],
            name,
            title=title,
            caption=caption,
            alt=alt,
            notebook=self.notebook,
        )
        encoded = base64.b64encode(Path(path).with_suffix(".png").read_bytes()).decode()
        display(
            {"image/png": encoded, "text/plain": alt},
            raw=True,
            metadata={"image/png": {"alt": alt}},
        )
        link = f"[watch it move](../figures/{path.name})"
        display(Markdown(f"**{title.rstrip('.')}.** {caption} ({link})"))

    def table(
        self, frame: pandas.DataFrame, *, caption: str, mark: Any = None, digits: int = 3
    ) -> None:
        """Show a table with a caption and, if mark is given, the row of that name in bold.

        mark: a label of the index, or a list of labels.
        """
        from IPython.display import display

        marked = mark if isinstance(mark, list) else [mark]

        def emphasise(row: pandas.Series) -> list[str]:
            style = "font-weight: bold; background-color: #fdf0cf; color: black"
            return [style if row.name in marked else ""] * len(row)

        styled = frame.style.apply(emphasise, axis=1)
        styled = styled.format(precision=digits, na_rep="–").set_caption(caption)
        self._tables += 1  # the styles of a table go by this name: two tables must not share one
        styled = styled.set_uuid(f"{self.notebook[:2]}_{self._tables}").set_table_styles(
            [
                {"selector": "caption", "props": "text-align: left; font-weight: bold"},
                {"selector": "td, th", "props": "text-align: right; padding: 2px 10px"},
                {"selector": "th.row_heading", "props": "text-align: left"},
            ]
        )
        display(styled)

    predict = staticmethod(answers.predict)
    reveal = staticmethod(answers.reveal)
    exercise = staticmethod(answers.exercise)
    check = staticmethod(answers.check)

    def end(self) -> None:
        """Print the versions that produced the outputs above; the last cell of every page."""
        names = ("dysigma", "torch", "diffusers", "numpy", "scipy", "matplotlib", "seaborn")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        print(f"Python {platform.python_version()}, {versions}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "the CPU" if device.type == "cpu" else str(device)
