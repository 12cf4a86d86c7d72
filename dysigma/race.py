"""Races: arms x seeds on common random numbers, as many at once as there are cores, resumable at any point."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .runs import (
    RunError,
    append_metrics,
    provenance,
    read_config,
    read_json,
    read_metrics,
    write_atomically,
    write_json,
)
from .training import TrainConfig, TrainingDiverged, make_parts, train

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Race:
    """A specification: every arm is raced with every seed under every entry of `grid`.

    base: TrainConfig fields common to all; arms: name -> fields it changes; grid: label -> fields it changes. Two arms
    with one seed share initial weights, images, timesteps and noise. Raises ValueError for anything else.
    """

    name: str
    seeds: tuple[int, ...]
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    grid: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Race:
        """From a TOML file with the tables base, arms and grid and the keys name and seeds."""
        return cls.from_dict(read_config(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "race") -> Race:
        """Inverse of to_dict."""
        kinds = {"name": str, "seeds": list, "base": dict, "arms": dict, "grid": dict}
        if set(values) != set(kinds) or not all(isinstance(values[key], kind) for key, kind in kinds.items()):
            raise ValueError(f"{origin} must have exactly name (text), seeds (a list), and tables base, arms and grid")
        tables = [*values["arms"].values(), *values["grid"].values()]
        if not values["seeds"] or not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError(
                f"{origin}: seeds, arms and grid must not be empty, and every arm and grid entry is a table"
            )
        if len(set(values["seeds"])) < len(values["seeds"]):
            raise ValueError(f"{origin}: every seed once; got {values['seeds']}")
        race = cls(values["name"], tuple(values["seeds"]), values["base"], values["arms"], values["grid"])
        # Everything is built once here, so that a misspelled name is found before hours are spent.
        for _, config in race.entries():
            make_parts(config)
        return race

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON-able values."""
        return {"name": self.name, "seeds": list(self.seeds), "base": self.base, "arms": self.arms, "grid": self.grid}

    def entries(self) -> Iterator[tuple[tuple[str, str, int], TrainConfig]]:
        """((grid label, arm, seed), configuration), seeds outermost: a race cut short has whole seeds."""
        for seed in self.seeds:
            for label, shared in self.grid.items():
                for arm, fields in self.arms.items():
                    yield (label, arm, seed), TrainConfig.from_dict(self.base | shared | fields | {"seed": seed})


def _end_with(parent: int) -> None:
    """End this process when its parent ends: an orphan would go on writing into folders that the next race uses."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_entry(key: tuple[str, str, int], config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train one entry in its own folder and reduce it to a record."""
    torch.set_num_threads(1)
    label, arm, seed = key
    record: dict[str, Any] = {"grid": label, "arm": arm, "seed": seed}
    try:
        run = train(config, folder, resume=(folder / "config.json").exists(), progress=False, finish=False)
    except TrainingDiverged as error:
        return record | {"diverged": str(error).replace(str(folder), "the run folder")}
    rows = read_metrics(run.path / "metrics.jsonl")
    validations = [row for row in rows if "validation_losses" in row]
    logged = [row for row in rows if "bin_weights" in row]
    values = {
        "images": [row["images"] for row in validations],
        "validation_losses": [[float(f"{v:.5g}") for v in row["validation_losses"]] for row in validations],
        "validation_timesteps": validations[0]["validation_timesteps"],
        "distances": [float(f"{row['distance']:.5g}") for row in validations if "distance" in row],
        "weights_images": [row["images"] for row in logged],
        "bin_weights": [[float(f"{v:.3g}") for v in row["bin_weights"]] for row in logged],
        "conflicts": [{"images": row["images"]} | row["conflicts"] for row in rows if "conflicts" in row],
        "seconds": rows[-1]["seconds"],
    }
    return record | {name: value for name, value in values.items() if value != []}


def race(
    spec: Race, out: Path, *, jobs: int = 1, overrides: dict[str, Any] | None = None, progress: bool = True
) -> Path:
    """Run what is missing of a race; returns out/records.jsonl, one line per finished entry.

    The folder also gets race.json (the specification) and provenance.json. Called again, it goes on where it stopped.
    jobs: processes at once, one thread each; overrides: fields that depend on the machine (device, data_root). Raises
    RunError if the folder holds another race.
    """
    from tqdm.auto import tqdm

    if (out / "race.json").exists() and read_json(out / "race.json") != json.loads(json.dumps(spec.to_dict())):
        raise RunError(f"{out} holds a race with another specification; choose another --out")
    write_json(out / "race.json", spec.to_dict())
    records, origin = out / "records.jsonl", out / "provenance.json"
    origins = read_json(origin) if origin.exists() else []
    write_json(origin, origins + [p for p in [provenance()] if p not in origins])
    rows = read_metrics(records)
    # Written anew, because a line cut short by a crash would swallow the next one.
    write_atomically(records, "".join(json.dumps(row) + "\n" for row in rows))
    done = {(row["grid"], row["arm"], row["seed"]) for row in rows}
    todo = {}
    for number, (key, config) in enumerate(spec.entries()):
        if key not in done:
            todo[key] = replace(config, **(overrides or {})), out / "entries" / f"{number:04d}"
    bar = tqdm(total=len(done) + len(todo), initial=len(done), unit="run", desc=spec.name, disable=not progress)
    # Forking a process that has used torch's threads can hang, hence "spawn".
    options: dict[str, Any] = {"mp_context": get_context("spawn"), "initializer": _end_with, "initargs": (os.getpid(),)}
    pool = ProcessPoolExecutor(jobs, **options)
    try:
        futures = {pool.submit(_run_entry, key, *entry): entry[1] for key, entry in todo.items()}
        for future in as_completed(futures):
            append_metrics(records, future.result())
            shutil.rmtree(futures[future])
            bar.update()
    finally:
        # Not "with pool", which would wait for every entry after one has failed.
        pool.shutdown(cancel_futures=True)
        bar.close()
    return records


def load_race(folder: Path) -> pandas.DataFrame:
    """The records of a race as a table: grid, arm, seed, images (M,), validation_losses (M, V), bin_weights, seconds.

    Raises RunError for a folder without records.
    """
    import pandas

    rows = read_metrics(folder / "records.jsonl")
    if not rows:
        raise RunError(f"{folder} has no records.jsonl with records; dysigma race SPEC --out {folder} writes it")
    return pandas.DataFrame(rows)
