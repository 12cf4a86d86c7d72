"""Kill training at random moments, go on, and compare the end, bit for bit, with a run that was never interrupted.

    python tests/tools/faults.py --kills 50 --out data/runs/faults/faults.json

Half of the kills come at a random time, the others at a random one of the moments inside writing: when half of a file
is written, before it is flushed, before it gets its name, after, before an old one goes. SIGKILL leaves a process time
for nothing. A checkpoint that a kill damaged would be a failure too, even where the one before it saves the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dysigma import runs
from dysigma.training import TrainConfig, train

# A clean process that has imported everything once and is forked for every run.
CONTEXT = get_context("forkserver")
PRELOAD = [
    "dysigma.training",
    "dysigma.cli",
    "diffusers.models.unets.unet_2d",
    "safetensors.torch",
    "tqdm.auto",
]
CONTEXT.set_forkserver_preload(PRELOAD)

BASE = TrainConfig(
    model="micro", images=160, batch_size=8, image_size=8, train_images=32, num_timesteps=50, bins=4, warmup_images=16,
    log_every=3, checkpoint_every=32, validate_every=80, validation_images=4, validation_timesteps=5, device="cpu",
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "min-snr": {},
    "uncertainty": {},
    "dy-sigma": {
        "timestep_sampler": "loss-second-moment",
        "sampler_params": {"bins": 4, "warmup": 3},
    },
    "ugd": {"weighting_params": {"gramian_every": 3, "bins": 4}},
}
MOMENTS = (
    "half a file",
    "before the flush",
    "before the name",
    "after the name",
    "before an old one goes",
)


def set_trap(moment: str, number: int) -> Counter[str]:
    """Make this process kill itself when writing reaches a moment for the number-th time; counts all of them."""
    reached: Counter[str] = Counter()

    def reach(name: str) -> None:
        reached[name] += 1
        if name == moment and reached[name] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    class HalfWritten:
        def __init__(self, *args: Any) -> None:
            self.file = open(*args)  # noqa: SIM115

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, content: Any) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            reach("half a file")
            self.file.write(content[len(content) // 2 :])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def trapped_fsync(number: int) -> None:
        reach("before the flush")
        fsync(number)

    def trapped_replace(*paths: Any) -> None:
        reach("before the name")
        replace(*paths)
        reach("after the name")

    def trapped_unlink(path: Path, *args: Any, **kwargs: Any) -> None:
        reach("before an old one goes")
        unlink(path, *args, **kwargs)

    runs.files.open = HalfWritten  # type: ignore[attr-defined]
    os.fsync, os.replace, Path.unlink = trapped_fsync, trapped_replace, trapped_unlink  # type: ignore[assignment]
    return reached


def begin() -> None:
    """What every process does first."""
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore of the system, which a killed process would leave behind


def child(config: TrainConfig, out: Path, moment: str, number: int) -> None:
    """One process: train or go on in out, perhaps into a trap; leaves the counted moments beside out."""
    begin()
    warnings.filterwarnings("error", module="dysigma")
    reached = set_trap(moment, number)
    train(config, out, resume=(out / "config.json").exists(), progress=False, finish=False)
    if not moment:
        runs.write_json(out.with_suffix(".moments"), reached)


def start(
    config: TrainConfig, out: Path, moment: str = "", number: int = 0, after: float | None = None
) -> bool:
    """Run one process, killed at a moment of its own or `after` so many seconds; whether it was killed."""
    process = CONTEXT.Process(target=child, args=(config, out, moment, number))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"{out}: a process ended with code {process.exitcode}, see above")
    return process.exitcode != 0


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """All a run ends with: (tensors of the last checkpoint, the rest and the metrics), wall times left out."""
    step, tensors, meta = runs.load_checkpoint(out / "checkpoint")
    rows = runs.read_metrics(out / "metrics.jsonl")
    return tensors, [
        {k: v for k, v in row.items() if k != "seconds"} for row in (*rows, meta | {"step": step})
    ]


def torment(
    config: TrainConfig, kills: int, folder: Path, seed: int, progress: bool = False
) -> dict[str, Any]:
    """Kill runs of one configuration `kills` times in all and compare each, once it is through, with a whole one."""
    choose, begun = random.Random(f"{seed} {config.weighting}"), time.perf_counter()
    start(config, folder / "whole")
    duration = time.perf_counter() - begun
    whole_tensors, whole_rows = outcome(folder / "whole")
    moments = runs.read_json(folder / "whole.moments")
    killed: Counter[str] = Counter()
    found: Counter[str] = Counter(runs=0, tensors=0, differing_tensors=0, rows=0, differing_rows=0)
    bar = tqdm(total=kills, desc=config.weighting, unit="kill", disable=not progress)
    while killed.total() < kills or found["runs"] == 0:
        out = folder / f"cut-{found['runs']}"
        while True:
            timed = choose.random() < 0.5
            moment = "" if timed else choose.choice(MOMENTS)
            trap: dict[str, Any] = {"after": choose.uniform(0, duration)}
            if not timed:
                trap = {"moment": moment, "number": choose.randint(1, moments[moment])}
            if not start(config, out, **(trap if killed.total() < kills else {})):
                break
            killed[moment or "a random time"] += 1
            bar.update()
        tensors, rows = outcome(out)
        assert tensors.keys() == whole_tensors.keys() and len(rows) == len(whole_rows), (
            f"{out} lacks something"
        )
        found["runs"] += 1
        found["tensors"] += len(tensors)
        found["differing_tensors"] += sum(
            not torch.equal(tensors[name], whole_tensors[name]) for name in tensors
        )
        found["rows"] += len(rows)
        found["differing_rows"] += sum(a != b for a, b in zip(rows, whole_rows, strict=True))
    bar.close()
    return {"kills": killed.total(), "killed_at": dict(sorted(killed.items()))} | dict(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each weighting (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    args = parser.parse_args()
    record: dict[str, Any] = {"seed": args.seed, "config": BASE.to_dict(), "cases": {}}
    for weighting, changes in CASES.items():
        config = dataclasses.replace(BASE, weighting=weighting, **changes)
        with tempfile.TemporaryDirectory() as folder:
            record["cases"][weighting] = changes | torment(
                config, args.kills, Path(folder), args.seed, progress=True
            )
    for key in ("kills", "runs", "tensors", "differing_tensors", "rows", "differing_rows"):
        record[key] = sum(case[key] for case in record["cases"].values())
    runs.write_json(args.out, record | {"provenance": runs.provenance()})
    print(f"{record['kills']} kills, {record['runs']} runs compared: {record['differing_tensors']} of "
          f"{record['tensors']} tensors and {record['differing_rows']} of {record['rows']} lines differ")  # fmt: skip
    return int(record["differing_tensors"] + record["differing_rows"] > 0)


if __name__ == "__main__":
    sys.exit(main())
