"""Races: arms x seeds on common random numbers, as many at once as there are cores, resumable at any point."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import runs
from ..runs.files import RunError
from ..training.config import TrainConfig
from ..training.loop import train
from ..training.parts import make_parts
from ..training.step import TrainingDiverged

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
        return cls.from_dict(runs.read_config(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "race") -> Race:
        """Inverse of to_dict."""
        kinds = {"name": str, "seeds": list, "base": dict, "arms": dict, "grid": dict}
        if set(values) != set(kinds) or not all(
            isinstance(values[key], kind) for key, kind in kinds.items()
        ):
            raise ValueError(
                f"{origin} must have exactly name (text), seeds (a list), and tables base, arms and grid"
            )
        seeds, tables = values["seeds"], [*values["arms"].values(), *values["grid"].values()]
        if not seeds or not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError(
                f"{origin}: seeds, arms and grid must not be empty; every arm and grid entry is a table"
            )
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{origin}: every seed once; got {seeds}")
        race = cls(values["name"], tuple(seeds), values["base"], values["arms"], values["grid"])
        # Everything is built once here, so that a misspelled name is found before hours are spent.
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

    def entries(self) -> Iterator[tuple[tuple[str, str, int], TrainConfig]]:
        """((grid label, arm, seed), configuration), seeds outermost: a race cut short has whole seeds."""
        for seed in self.seeds:
            for label, shared in self.grid.items():
                for arm, fields in self.arms.items():
                    yield (
                        (label, arm, seed),
                        TrainConfig.from_dict(self.base | shared | fields | {"seed": seed}),
                    )


def _end_with(parent: int) -> None:
    """End this process when its parent ends: an orphan would go on writing into folders that the next race uses."""
    from tqdm import tqdm

    tqdm.set_lock(
        threading.RLock()
    )  # a semaphore of the system would outlive a worker that is cut short

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
        run = train(
            config, folder, resume=(folder / "config.json").exists(), progress=False, finish=False
        )
    except TrainingDiverged as error:
        return record | {"diverged": str(error).replace(str(folder), "the run folder")}
    except KeyboardInterrupt:
        os._exit(1)  # it is saved, and the executor would begin the next entry
    rows = runs.read_metrics(run.path / "metrics.jsonl")
    validations = [row for row in rows if "validation_losses" in row]
    logged = [row for row in rows if "bin_weights" in row]
    values = {
        "images": [row["images"] for row in validations],
        "validation_losses": [
            [float(f"{v:.5g}") for v in row["validation_losses"]] for row in validations
        ],
        "validation_timesteps": validations[0]["validation_timesteps"],
        "distances": [float(f"{row['distance']:.5g}") for row in validations if "distance" in row],
        "weights_images": [row["images"] for row in logged],
        "bin_weights": [[float(f"{v:.3g}") for v in row["bin_weights"]] for row in logged],
        "conflicts": [
            {"images": row["images"]} | row["conflicts"] for row in rows if "conflicts" in row
        ],
        "seconds": rows[-1]["seconds"],
    }
    return record | {name: value for name, value in values.items() if value != []}


def _remaining(
    spec: Race, out: Path, overrides: dict[str, Any]
) -> tuple[int, dict[tuple[str, str, int], Any]]:
    """Claim the folder for this race: (entries done, key -> (configuration, folder) of those to do)."""
    if (out / "race.json").exists() and runs.read_json(out / "race.json") != json.loads(
        json.dumps(spec.to_dict())
    ):
        raise RunError(f"{out} holds a race with another specification; choose another --out")
    runs.write_json(out / "race.json", spec.to_dict())
    records, origin = out / "records.jsonl", out / "provenance.json"
    origins = runs.read_json(origin) if origin.exists() else []
    runs.write_json(origin, origins + [p for p in [runs.provenance()] if p not in origins])
    rows = runs.read_metrics(records)
    # Written anew, because a line cut short by a crash would swallow the next one.
    runs.write_atomically(records, "".join(json.dumps(row) + "\n" for row in rows))
    done = {(row["grid"], row["arm"], row["seed"]) for row in rows}
    todo = {
        key: (replace(config, **overrides), out / "entries" / f"{number:04d}")
        for number, (key, config) in enumerate(spec.entries())
        if key not in done
    }
    return len(done), todo


def race(
    spec: Race,
    out: Path,
    *,
    jobs: int = 1,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Run what is missing of a race; returns out/records.jsonl, one line per finished entry.

    The folder also gets race.json (the specification) and provenance.json. Called again, it goes on where it stopped.
    jobs: processes at once, one thread each; overrides: fields that depend on the machine (device, data_root). Raises
    RunError if the folder holds another race or another process runs it. KeyboardInterrupt saves first.
    """
    from tqdm.auto import tqdm

    with runs.lock(out):
        done, todo = _remaining(spec, out, overrides or {})
        bar = tqdm(
            total=done + len(todo), initial=done, unit="run", desc=spec.name, disable=not progress
        )
        others = {*active_children()}
        # Forking a process that has used torch's threads can hang, hence "spawn".
        pool = ProcessPoolExecutor(
            jobs, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
        )
        try:
            futures = {
                pool.submit(_run_entry, key, *entry): entry[1] for key, entry in todo.items()
            }
            for future in as_completed(futures):
                runs.append_metrics(out / "records.jsonl", future.result())
                shutil.rmtree(futures[future])
                bar.update()
        except KeyboardInterrupt:
            for process in {*active_children()} - others:
                process.terminate()
            raise KeyboardInterrupt(
                f"stopped, all saved in {out}; go on with the same command"
            ) from None
        except BrokenProcessPool:
            raise RunError(
                f"a training of {out} was ended from outside; go on with the same command"
            ) from None
        finally:
            # Not "with pool", which would wait for every entry after one has failed.
            pool.shutdown(cancel_futures=True)
            bar.close()
    return out / "records.jsonl"


def load_race(folder: Path) -> pandas.DataFrame:
    """The records of a race as a table: grid, arm, seed, images (M,), validation_losses (M, V), bin_weights, seconds.

    Raises RunError for a folder without records.
    """
    import pandas

    if not (rows := runs.read_metrics(folder / "records.jsonl")):
        raise RunError(
            f"{folder} has no records.jsonl with records; dysigma race SPEC --out {folder} writes it"
        )
    return pandas.DataFrame(rows)
