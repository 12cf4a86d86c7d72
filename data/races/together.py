"""Does it pay to train several small networks at once on one device? Images per second of all of them together.

    python data/races/together.py --device cuda --model compact --jobs 1 2 4 8 --out together.json

Each training is a process of its own, with one thread and its own copy of the data, as in `dysigma race --jobs N`. All
take --warmup steps, wait for each other, and then take --steps steps: images per second are those of all the timed
steps over the time from the first start to the last end. On one GPU their kernels take turns, unless the machine runs
NVIDIA's MPS; what is won is time in which a process alone would leave the device idle.
"""

import argparse
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dysigma.devices import fast_kernels, resolve_device
from dysigma.runs import provenance, write_json
from dysigma.training import TrainConfig, build, load_split, train_step

PATIENCE = 900  # seconds that a process waits for the others to load and compile
meet: Any = None


def join(barrier: Any) -> None:
    """In every process: where it meets the others."""
    global meet
    meet = barrier


def train(config: TrainConfig, warmup: int, steps: int) -> tuple[float, float, int]:
    """(start, end, bytes at the peak on a GPU) of the timed steps of one training."""
    torch.set_num_threads(1)
    try:
        device = resolve_device(config.device)
        with fast_kernels(device):
            data = load_split(config, "train", device)
            state = build(config, data)
            for count in (warmup, steps):
                meet.wait(PATIENCE)
                start = time.monotonic()
                for _ in range(count):
                    record = train_step(state, data, config)
                record.loss.item()  # waits for the device
        used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return start, time.monotonic(), used
    except threading.BrokenBarrierError:
        raise RuntimeError("another training failed") from None
    except BaseException:
        meet.abort()
        raise


def measure(config: TrainConfig, jobs: int, warmup: int, steps: int) -> dict[str, Any]:
    """Images per second of `jobs` trainings at once, or "fails" with the reason."""
    context = get_context("spawn")
    with ProcessPoolExecutor(
        jobs, context, initializer=join, initargs=(context.Barrier(jobs),)
    ) as pool:
        futures = [
            pool.submit(train, TrainConfig(**{**config.to_dict(), "seed": i}), warmup, steps)
            for i in range(jobs)
        ]
        failures = [str(error).partition("\n")[0] for f in futures if (error := f.exception())]
        if failures:
            return {
                "jobs": jobs,
                "fails": min(failures, key=lambda text: text.startswith("another training")),
            }
        starts, ends, used = zip(*(future.result() for future in futures), strict=True)
    seconds = max(ends) - min(starts)
    return {
        "jobs": jobs,
        "seconds": seconds,
        "images_per_second": jobs * steps * config.batch_size / seconds,
        "bytes": sum(used),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4], help="trainings at once")
    parser.add_argument("--data", default="leaves")
    parser.add_argument("--data-root")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    return parser.parse_args()


def main() -> None:
    """Measure each number of trainings, print and write."""
    args = vars(parse())
    jobs, warmup, steps, out = (args.pop(name) for name in ("jobs", "warmup", "steps", "out"))
    config, rows = TrainConfig(images=10**9, weighting="min-snr", **args), []
    for count in jobs:
        rows.append(measure(config, count, warmup, steps))
        row = rows[-1]
        print(
            count,
            row.get("fails") or f"{row['images_per_second']:,.0f} images/s together",
            flush=True,
        )
        settings = {key: value for key, value in args.items() if key != "data_root"}
        record = settings | {
            "warmup": warmup,
            "steps": steps,
            "rows": rows,
            "provenance": provenance(),
        }
        write_json(out, record)


if __name__ == "__main__":
    main()
