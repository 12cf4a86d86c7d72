"""Which network is the best for its time? Candidates around the preset compact, trained equally long on one device.

    python data/races/networks.py --data cifar10 --device cuda --seconds 120 --out networks.json

Every candidate is trained with min-snr on the same draws, and judged at a quarter, half and all of --seconds, on its
averaged weights: the mean validation loss and the diffusion term of the ELBO in bits/dim. The clock starts after the
first ten steps, so compilation does not count, and stands still while a network is judged. One learning rate serves
all, so this is no search for each candidate's best. Given again, it goes on at the first candidate and seed that --out
lacks.
"""

import argparse
import copy
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from dysigma.devices import fast_kernels, resolve_device
from dysigma.evaluation import elbo, evaluation_timesteps, validation_losses
from dysigma.lab.benchmark import flops_per_image
from dysigma.models import PRESETS, count_parameters
from dysigma.runs import provenance, read_json, write_json
from dysigma.training import TrainConfig, build, check_compiled, iterate, load_split

COMPACT = PRESETS["compact"]
_CHANGES: dict[str, dict[str, Any]] = {
    "compact": {},
    "groups of 8": {"norm_num_groups": 8},
    "no attention": {"attention": ()},
    "attention at 16": {"attention": (1,)},
    "one block": {"layers_per_block": 1},
    "three blocks": {"layers_per_block": 3},
    "wide": {"block_out_channels": (64, 128, 128, 128)},
    "wide, one block": {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1},
    "narrow": {"block_out_channels": (32, 64, 64, 64)},
    "three levels": {"block_out_channels": (64, 128, 128), "attention": (1,)},
}
CANDIDATES = {name: COMPACT | changes for name, changes in _CHANGES.items()}


def judge(state: Any, config: TrainConfig, images: torch.Tensor) -> dict[str, float]:
    """Validation loss and ELBO of the averaged weights."""
    model = copy.deepcopy(state.model)
    state.ema.copy_to(model)
    timesteps = evaluation_timesteps(config.num_timesteps, config.validation_timesteps)
    losses = validation_losses(
        model, images, state.schedule, config.prediction, timesteps=timesteps
    )
    bound = elbo(
        model,
        images,
        state.schedule,
        config.prediction,
        timesteps_per_image=config.validation_timesteps,
    )
    return {
        "loss": float(losses.mean()),
        "diffusion": bound.diffusion,
        "standard_error": bound.standard_error,
    }


def run(config: TrainConfig, seconds: float) -> dict[str, Any]:
    """One training of `seconds`, judged on its way."""
    device = resolve_device(config.device)
    torch.compiler.reset()  # it compiles one function a few times at most, and every network runs the same ones
    with fast_kernels(device):
        train, test = load_split(config, "train", device), load_split(config, "test", device)
        state, curve = build(config, train), []
        steps = iterate(state, train, config)
        if state.forward is not state.model:
            check_compiled(state, train, config)
        [*itertools.islice(steps, 10)][-1].loss.item()
        spent, first = 0.0, state.step
        for due in (seconds / 4, seconds / 2, seconds):
            start = time.perf_counter()
            while spent + time.perf_counter() - start < due:
                # Waits for the device, after ten steps: one at a time would not keep it busy.
                [*itertools.islice(steps, 10)][-1].loss.item()
            spent += time.perf_counter() - start
            row = {"seconds": spent, "images": state.step * config.batch_size}
            curve.append(row | judge(state, config, test.images[: config.validation_images]))
    row = {
        "network": config.model,
        "seed": config.seed,
        "parameters": count_parameters(state.model),
    }
    row |= {"flops_per_image": flops_per_image(config.model, train.images.shape[-1])}
    row |= {"images_per_second": (state.step - first) * config.batch_size / spent}
    return row | {"curve": curve}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", choices=PRESETS | CANDIDATES, default=[*CANDIDATES]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--data", default="leaves")
    parser.add_argument("--data-root")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-images", type=int, default=50_000)
    parser.add_argument("--validation-images", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    return parser.parse_args()


def main() -> None:
    """Train what is missing, print and write."""
    args = vars(parse())
    PRESETS.update(CANDIDATES)
    networks, seeds, seconds, out = (
        args.pop(name) for name in ("networks", "seeds", "seconds", "out")
    )
    settings = {key: value for key, value in args.items() if key not in ("data_root", "device")} | {
        "seconds": seconds
    }
    record = read_json(out) if out.exists() else {"settings": settings, "rows": []}
    if record["settings"] != settings:
        raise ValueError(
            f"{out} was made with {record['settings']}; got {settings}: choose another --out"
        )
    for seed, name in itertools.product(seeds, networks):
        if any((row["network"], row["seed"]) == (name, seed) for row in record["rows"]):
            continue
        row = run(
            TrainConfig(model=name, seed=seed, weighting="min-snr", images=10**12, **args), seconds
        )
        record["rows"].append(row | {"provenance": provenance()})
        write_json(out, record)
        end = row["curve"][-1]
        size = f"{row['parameters'] / 1e6:6.2f} M, {row['flops_per_image'] / 1e9:6.2f} GFLOP/image"
        quality = f"loss {end['loss']:.4f}, diffusion {end['diffusion']:.3f} bits/dim"
        print(
            f"{name:16s} seed {seed}: {size}, {row['images_per_second']:8,.0f} images/s, {quality}",
            flush=True,
        )


if __name__ == "__main__":
    main()
