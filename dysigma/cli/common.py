"""What several commands share: options, a run opened for its network, samples of it, and files to write."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from ..runs.folder import Run
    from ..schedule import NoiseSchedule
    from ..training.config import TrainConfig

# To which every command adds itself.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], **texts: Any
) -> argparse.ArgumentParser:
    """Add a command that calls run(args), with the option that all commands have.

    run: returns None, or an exit code other than 0 that is a result and no error.
    """
    parser = commands.add_parser(name, **texts)
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error, whatever it is"
    )
    parser.set_defaults(run=run)
    return parser


def add_draw_options(parser: argparse.ArgumentParser) -> None:
    """Add --seed and --device, as every command that draws random numbers has them."""
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for an option that was given and is below its least value, before work is spent.

    >>> check_least(argparse.Namespace(num_images=0), num_images=1)
    Traceback (most recent call last):
    ValueError: --num-images must be 1 or more; got 0
    """
    for name, low in least.items():
        given = getattr(args, name)
        values = given if isinstance(given, list) else [given]
        for value in values:
            if value is not None and value < low:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be {low} or more; got {value}")


def read_pairs(items: Sequence[str]) -> dict[str, Any]:
    """Parameters given as name=value, their values read as JSON where they are JSON.

    >>> read_pairs(["kappa=0.5", "prior=p2"])
    {'kappa': 0.5, 'prior': 'p2'}
    """
    pairs = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise ValueError(f"parameters are given as name=value; got {item!r}")
        try:
            pairs[name] = json.loads(value)
        except ValueError:
            pairs[name] = value
    return pairs


@dataclass(frozen=True)
class OpenRun:
    """A run folder with what the commands need of it."""

    run: Run
    config: TrainConfig
    schedule: NoiseSchedule  # on the device
    device: torch.device

    def load_network(self) -> nn.Module:
        """The network with its EMA weights, on the device. This takes long: check everything else first."""
        network: nn.Module = self.run.pipeline().unet
        return network.to(self.device)


def open_run(path: Path, device: str) -> OpenRun:
    """Read a run folder, without its network."""
    from ..devices import resolve_device
    from ..runs.folder import load_run
    from ..training.config import TrainConfig

    run = load_run(path)
    target = resolve_device(device)
    config = TrainConfig.from_dict(run.config)
    schedule = config.noise_schedule().to(target)
    return OpenRun(run, config, schedule, target)


def draw_samples(
    opened: OpenRun, network: Any, sampler: str, count: int, steps: int, seed: int
) -> Tensor:
    """uint8 images (count, C, H, W) of a run's network, of its classes in turn."""
    from ..evaluation import sample_images
    from ..training.precision import low_precision

    size = network.config["sample_size"]
    channels = network.config["in_channels"]
    return sample_images(
        network,
        opened.schedule,
        (count, channels, size, size),
        prediction_type=opened.config.prediction,
        sampler=sampler,
        num_steps=steps,
        seed=seed,
        compile=None,
        precision=low_precision(opened.config, opened.device),
        progress=True,
    )


def check_writable(folder: Path) -> Path:
    """Raise ValueError unless files can be written into a folder, which need not be there yet."""
    there = folder.absolute()
    while not there.exists():
        if there.is_symlink():
            raise ValueError(f"cannot write to {folder}: {there} is a link that leads nowhere")
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"cannot write to {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {folder}: {there} is not writable")
    return folder


def prepare_output(path: Path, *endings: str) -> Path:
    """Make the folder of a file that is to be written at the end, so that no work is lost for want of it.

    Raises ValueError for another ending than those given, or for a place where no file can be.
    """
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    check_writable(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"cannot write {path}: it is not writable")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def prepare_figure(path: Path) -> Path:
    """As prepare_output, for a file that matplotlib is to write."""
    from matplotlib.backend_bases import FigureCanvasBase

    return prepare_output(path, *(f".{kind}" for kind in FigureCanvasBase.filetypes))


def write_record(folder: Path, name: str, record: dict[str, Any], figure: Figure) -> None:
    """Write a record as JSON and its figure beside it, and say where."""
    from ..runs.files import write_json

    write_json(folder / f"{name}.json", record)
    figure.savefig(folder / f"{name}.png", dpi=110)
    print(f"\n{folder / name}.json and .png")
