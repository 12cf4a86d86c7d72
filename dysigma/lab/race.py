"""Races: targets x weightings x samplers x seeds on common random numbers, resumable."""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import runs
from ..data.dataset import ImageData
from ..devices import resolve_device
from ..runs.files import RunError
from ..training.config import TrainConfig
from ..training.loop import train
from ..training.parts import load_split, make_parts
from ..training.step import TrainingDiverged
from ..training.threads import threads
from .records import entries_of_a_seed, race_config

# The fields on which the images depend.
DATA_FIELDS = ("data", "data_root", "image_size", "train_images", "conditional", "device")

Key = tuple[str, str, int]  # grid label, arm, seed


class Entry(NamedTuple):
    """One training of a race."""

    key: Key
    config: TrainConfig
    folder: Path


Finished = Generator[tuple[Entry, dict[str, Any]], None, None]


@dataclass(frozen=True)
class Race:
    """A specification: every arm is raced with every seed under every entry of the grid.

    base: TrainConfig fields common to all; grid: label -> fields it changes, usually what is
    predicted, on which schedule or path (prediction, schedule); arms: name -> fields it changes,
    usually how it is trained (weighting, timestep_sampler, lr). Any field may stand in any of the
    three, and an arm overrides the grid, which overrides the base. A grid entry may also have
    "arms", a list: only those are raced under it.

    Entries with one seed and networks of one shape share initial weights, images, timesteps and
    noise. Raises ValueError for anything else, and what TrainConfig raises for a wrong field.

    >>> arms = {"const": {"weighting": "const-x0"}, "min-snr": {"weighting": "min-snr"}}
    >>> grid = {"x0": {"prediction": "x0"}}
    >>> values = {"name": "two", "seeds": [1, 2], "base": {"images": 320}, "arms": arms, "grid": grid}
    >>> [key for key, config in Race.from_dict(values).entries()]
    [('x0', 'const', 1), ('x0', 'min-snr', 1), ('x0', 'const', 2), ('x0', 'min-snr', 2)]
    """

    name: str
    seeds: tuple[int, ...]
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    grid: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Race:
        """From a TOML file with the tables base, arms and grid and the keys name and seeds."""
        return cls.from_dict(runs.read_config(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "race") -> Race:
        """Inverse of to_dict.

        Everything is built once here, so that a misspelled name is found before hours are spent.
        """
        _check_specification(values, origin)
        seeds = tuple(values["seeds"])
        race = cls(values["name"], seeds, values["base"], values["arms"], values["grid"])
        for _, config in race.entries():
            make_parts(config)
        return race

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON-able values."""
        return {
            "name": self.name,
            "seeds": list(self.seeds),
            "base": self.base,
            "arms": self.arms,
            "grid": self.grid,
        }

    def entries(self) -> Iterator[tuple[Key, TrainConfig]]:
        """(key, configuration), seeds outermost: a race that is cut short has whole seeds."""
        spec = self.to_dict()
        for seed in self.seeds:
            for label, arm in entries_of_a_seed(spec):
                config = race_config(spec, label, arm)
                yield (label, arm, seed), replace(config, seed=seed)


_KINDS = {"name": str, "seeds": list, "base": dict, "arms": dict, "grid": dict}


def _check_specification(values: dict[str, Any], origin: str) -> None:
    """ValueError for a specification that is not of the form of Race."""
    complete = set(values) == set(_KINDS)
    if not complete or not all(isinstance(values[key], kind) for key, kind in _KINDS.items()):
        raise ValueError(
            f"{origin} must have exactly name (text), seeds (a list), and tables base, arms and grid"
        )
    tables = [*values["arms"].values(), *values["grid"].values()]
    if not values["seeds"] or not values["arms"] or not values["grid"]:
        raise ValueError(f"{origin}: seeds, arms and grid must not be empty")
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{origin}: every arm and grid entry is a table")
    if len(set(values["seeds"])) < len(values["seeds"]):
        raise ValueError(f"{origin}: every seed once; got {values['seeds']}")
    for label, fields in values["grid"].items():
        chosen = fields.get("arms", [])
        unknown = [arm for arm in chosen if arm not in values["arms"]]
        if unknown or not isinstance(chosen, list):
            raise ValueError(
                f"{origin}: arms of grid entry {label!r} must be a list of names of arms; "
                f"got {chosen!r}, have {', '.join(values['arms'])}"
            )


def _end_with(parent: int) -> None:
    """End this process when its parent ends.

    An orphan would go on writing into folders that the next race uses.
    """
    from tqdm import tqdm

    # A semaphore of the system would outlive a worker that is cut short.
    tqdm.set_lock(threading.RLock())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rounded(values: list[float], digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _features_digest(config: TrainConfig) -> str | None:
    """SHA-256 of the file that turns samples into features; None without samples, or for pixels."""
    file = Path(config.features)
    if not config.distance_images or not file.is_file():
        return None
    return runs.digest(file.read_bytes())


def _device_name(config: TrainConfig) -> str:
    """What the training ran on: the name of the GPU, or the kind of CPU."""
    device = resolve_device(config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def _record(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What a race keeps of a finished training: the columns that data/README.md lists."""
    rows = runs.read_metrics(folder / "metrics.jsonl")
    validations = [row for row in rows if "validation_losses" in row]
    logged = [row for row in rows if "bin_weights" in row]
    reports = [row for row in rows if "conflicts" in row]
    values = {
        "images": [row["images"] for row in validations],
        "validation_losses": [_rounded(row["validation_losses"], 5) for row in validations],
        "validation_timesteps": validations[0]["validation_timesteps"],
        "distances": _rounded([row["distance"] for row in validations if "distance" in row], 5),
        "kids": _rounded([row["kid"] for row in validations if "kid" in row], 5),
        "features_sha256": _features_digest(config),
        "weights_images": [row["images"] for row in logged],
        "bin_weights": [_rounded(row["bin_weights"], 3) for row in logged],
        "conflicts": [{"images": row["images"], **row["conflicts"]} for row in reports],
        "device": _device_name(config),
        "seconds": rows[-1]["seconds"],
    }
    return {name: value for name, value in values.items() if value is not None and value != []}


def _run_entry(
    key: Key,
    config: TrainConfig,
    folder: Path,
    images: tuple[ImageData, ImageData] | None = None,
) -> dict[str, Any]:
    """Train one entry in its own folder and reduce it to a record; goes on where it was stopped."""
    label, arm, seed = key
    record: dict[str, Any] = {"grid": label, "arm": arm, "seed": seed}
    begun = (folder / "config.json").exists()
    try:
        train(config, folder, resume=begun, progress=False, finish=False, images=images)
    except TrainingDiverged as error:
        record["diverged"] = str(error).replace(str(folder), "the run folder")
        return record
    record.update(_record(config, folder))
    return record


def _run_entry_in_worker(key: Key, config: TrainConfig, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        return _run_entry(key, config, folder)
    except KeyboardInterrupt:
        os._exit(1)  # it is saved, and the executor would begin the next entry


def _claim(spec: Race, out: Path) -> set[Key]:
    """Claim the folder for this race; returns the entries that it has already."""
    known = out / "race.json"
    as_json = json.loads(json.dumps(spec.to_dict()))
    if known.exists() and runs.read_json(known) != as_json:
        raise RunError(f"{out} holds a race with another specification; choose another --out")
    runs.write_json(known, as_json)

    origin = out / "provenance.json"
    origins = runs.read_json(origin) if origin.exists() else []
    here = runs.provenance()
    if here not in origins:
        origins.append(here)
    runs.write_json(origin, origins)

    records = out / "records.jsonl"
    rows = runs.read_metrics(records)
    # Written anew, because a line cut short by a crash would swallow the next one.
    runs.write_atomically(records, "".join(json.dumps(row) + "\n" for row in rows))
    return {(row["grid"], row["arm"], row["seed"]) for row in rows}


def _to_do(spec: Race, out: Path, done: set[Key], overrides: dict[str, Any]) -> list[Entry]:
    entries = []
    for number, (key, config) in enumerate(spec.entries()):
        if key not in done:
            folder = out / "entries" / f"{number:04d}"
            entries.append(Entry(key, replace(config, **overrides), folder))
    return entries


def _in_processes(entries: list[Entry], jobs: int) -> Finished:
    """(entry, record) as they finish, `jobs` processes at once, one thread each."""
    others = {*active_children()}
    # Forking a process that has used torch's threads can hang, hence "spawn".
    context = get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_end_with, initargs=(os.getpid(),))
    try:
        futures = {}
        for entry in entries:
            futures[pool.submit(_run_entry_in_worker, *entry)] = entry
        for future in as_completed(futures):
            yield futures[future], future.result()
    except (KeyboardInterrupt, GeneratorExit):
        for process in {*active_children()} - others:
            process.terminate()
        raise
    finally:
        # Not "with pool", which would wait for every entry after one has failed.
        pool.shutdown(cancel_futures=True)


def _in_this_process(entries: list[Entry]) -> Finished:
    """(entry, record) one after the other, with one thread on a CPU."""
    loaded: dict[tuple[Any, ...], tuple[ImageData, ImageData]] = {}
    with threads(1):
        for entry in entries:
            config = entry.config
            which = tuple(getattr(config, name) for name in DATA_FIELDS)
            if which not in loaded:
                loaded.clear()  # one data set at a time in memory
                device = resolve_device(config.device)
                train_images = load_split(config, "train", device)
                loaded[which] = train_images, load_split(config, "test", device)
            yield entry, _run_entry(*entry, images=loaded[which])


def race(
    spec: Race,
    out: Path,
    *,
    jobs: int = 1,
    in_process: bool = False,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Run what is missing of a race; returns out/records.jsonl, one line per finished entry.

    The folder also gets race.json (the specification) and provenance.json. Called again, it goes on
    where it stopped.

    jobs: processes at once, one thread each. in_process: train in this process instead, one entry
    after the other, so that data are read once and compiled code is used again; best on a GPU, or
    where loading takes long beside a training. overrides: fields that depend on the machine
    (device, data_root).

    Raises ValueError for in_process with several jobs; RunError if the folder holds another race,
    another process runs it, or a training is ended from outside. KeyboardInterrupt saves first.
    """
    from tqdm.auto import tqdm

    if in_process and jobs != 1:
        raise ValueError(f"a race in one process has one job; got jobs {jobs} with in_process")
    with runs.lock(out):
        done = _claim(spec, out)
        entries = _to_do(spec, out, done, overrides or {})
        records = out / "records.jsonl"
        finished = _in_this_process(entries) if in_process else _in_processes(entries, jobs)
        bar = tqdm(
            total=len(done) + len(entries),
            initial=len(done),
            unit="run",
            desc=spec.name,
            disable=not progress,
        )
        try:
            # Closed before anything else is done, so that no training goes on unheard.
            with closing(finished):
                for entry, record in finished:
                    runs.append_metrics(records, record)
                    shutil.rmtree(entry.folder)
                    bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped, all saved in {out}; go on with the same command"
            ) from None
        except BrokenProcessPool:
            raise RunError(
                f"a training of {out} was ended from outside; go on with the same command"
            ) from None
        finally:
            bar.close()
    return records
