"""Runs of the reader: trained while watched, kept where the next pages find them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import training
from ..data.dataset import ImageData
from ..images import tile
from ..runs.folder import Run, load_run
from ..sampling import sample_images
from ..training.config import TrainConfig
from ..training.parts import TrainState
from ..training.precision import low_precision
from ..training.step import StepRecord

# As seen from the pages, which run in their own folder.
READERS_RUNS = Path("../runs/course")
RECORDS = Path("../data/runs")
RECORD_OF_A_CPU = "cifar10-cpu-small"


class AlongTraining:
    """What a network draws from the same latents while it trains.

    moments: the numbers of images seen at which to look. count: how many latents. steps: of DDIM.
    After training, `samples` and `networks` hold the pictures (count, C, H, W) and the network with
    averaged weights, by images seen; `first_losses` the losses (B,) of the first step.

    >>> AlongTraining([3200, 6400], count=4).samples  # nothing has been trained
    {}
    """

    def __init__(self, moments: Sequence[int], count: int = 8, steps: int = 25) -> None:
        self.moments = set(moments)
        self.count = count
        self.steps = steps
        self.samples: dict[int, Tensor] = {}
        self.networks: dict[int, nn.Module] = {}
        self.first_losses = torch.empty(0)
        self._shown: Any = None

    def look(self, state: TrainState, config: TrainConfig, record: StepRecord) -> None:
        """Called after each step."""
        if state.step == 1:
            self.first_losses = record.losses.detach().cpu()
        seen = state.step * config.batch_size
        if seen not in self.moments:
            return
        network: Any = copy.deepcopy(state.model)  # a UNet2DModel
        state.ema.copy_to(network)
        size = network.config.sample_size
        drawn = sample_images(
            network,
            state.schedule,
            (self.count, network.config.in_channels, size, size),
            prediction_type=config.prediction,
            num_steps=self.steps,
            precision=low_precision(config, next(network.parameters()).device),
        )
        self.networks[seen] = network
        self.samples[seen] = drawn.cpu()
        self._show()

    def _show(self) -> None:
        """Show all pictures so far, one row a moment, in place of those shown before."""
        from IPython.display import display
        from PIL import Image

        rows = tile(torch.cat([*self.samples.values()]), self.count)
        picture = Image.fromarray(rows)
        enlarged = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
        if self._shown is None:
            self._shown = display(enlarged, display_id=True)
        else:
            self._shown.update(enlarged)

    def end(self, words: str) -> None:
        """Show words in place of the pictures, which the page shows larger."""
        from IPython.display import Markdown, display

        if self._shown is None:
            display(Markdown(words))
        else:
            self._shown.update(Markdown(words))


@contextmanager
def _each_step(along: AlongTraining) -> Iterator[None]:
    plain_step = training.train_step

    def step_and_look(state: TrainState, data: ImageData, config: TrainConfig) -> StepRecord:
        record = plain_step(state, data, config)
        along.look(state, config, record)
        return record

    training.train_step = step_and_look  # iterate takes the step of this name
    try:
        yield
    finally:
        training.train_step = plain_step


def train_and_watch(
    config: TrainConfig,
    folder: Path,
    along: AlongTraining,
    images: tuple[ImageData, ImageData] | None = None,
    finish: bool = True,
) -> Run:
    """`dysigma.training.train` with a live bar and a growing grid of samples; returns the run."""
    with _each_step(along):
        run = training.train(config, folder, images=images, finish=finish)
    minutes = run.summary["seconds"] / 60
    along.end(f"{config.weighting}: {config.images:,} images in {minutes:.1f} minutes")
    return run


def new_run_folder(name: str, runs: Path = READERS_RUNS) -> Path:
    """A folder that is not there yet: name, or name-2, name-3, ...; earlier runs are kept.

    >>> new_run_folder("ddpm", runs=Path("runs-of-nobody")).name
    'ddpm'
    """
    folder = runs / name
    number = 1
    while folder.exists():
        number += 1
        folder = runs / f"{name}-{number}"
    return folder


def best_run(name: str, runs: Path = READERS_RUNS, records: Path = RECORDS) -> Run:
    """The reader's newest finished run of a name; else the newest record of a GPU, else of a CPU.

    name: as given to `new_run_folder`. A record of a GPU is what `data/races/gpu_run.py import`
    puts beside the other records.
    """
    own = [runs / name, *runs.glob(f"{name}-[0-9]*")]
    of_gpus = [path for path in records.glob("gpu-*/best") if "rehearsal" not in str(path)]
    for places in (own, of_gpus):
        finished = [path for path in places if _is_finished(path)]
        if finished:
            return load_run(max(finished, key=_time_of_end))
    return load_run(records / RECORD_OF_A_CPU)


def _is_finished(folder: Path) -> bool:
    if not (folder / "config.json").exists() or not (folder / "samples.png").exists():
        return False
    return load_run(folder).summary.get("status") == "done"


def _time_of_end(folder: Path) -> float:
    return (folder / "summary.json").stat().st_mtime
