"""Use a quarter of an hour of a GPU well: one command that measures, trains, races, and packs what it found.

    python data/races/gpu_run.py --data-root DATA --minutes 14 --out OUT
    python data/races/gpu_run.py --rehearse --out OUT
    python data/races/gpu_run.py import OUT

The first line runs these parts, in this order:

    smoke       compiled against plain networks, bfloat16 against float32, images per second, tests for GPUs
    benchmark   our training step against those of other packages, in one process
    best        the best single model that the time allows, with samples along its training
    race        two network targets x four weightings, as many seeds as fit
    evaluation  samples of that model, their time and distances, validation losses, ELBO
    conflicts   gradient conflicts of that model
    pack        what is handed back: at most 8 files, each below 16 MiB

A part is a process of its own, and has a deadline: its share of the time that is left. What it measured is written at
once, and packed after every part. A part that fails or is too slow is recorded, and the next one begins. Given again
with the same --state, the command leaves out the parts that are done. --rehearse runs all of them at toy size on a CPU.
`import` puts what was handed back into data/runs, where the notebooks find it.
"""

from __future__ import annotations

import _thread
import argparse
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dysigma.training
from dysigma.data import batch
from dysigma.devices import fast_kernels, resolve_device
from dysigma.distances import compare_features, extract, load_features, reference_features
from dysigma.evaluation import elbo, evaluation_timesteps, sample_images, validation_losses
from dysigma.gradients import conflicts
from dysigma.lab.benchmark import flops_per_image, matmul_peak, step_costs
from dysigma.lab.race import Race, race
from dysigma.models import count_parameters
from dysigma.objective import sample_losses
from dysigma.runs import (
    RunError,
    digest,
    load_run,
    provenance,
    read_json,
    read_metrics,
    write_atomically,
    write_json,
)
from dysigma.training import TrainConfig, build, load_split, train, train_step
from dysigma.training.budget import fit_in_memory, fit_to_minutes
from dysigma.training.compiled import settle_compilation
from dysigma.training.precision import autocast, low_precision

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "data/runs"

# What each part may take, relative to the others.
SHARES = {
    "smoke": 0.18,
    "benchmark": 0.12,
    "best": 0.36,
    "race": 0.16,
    "evaluation": 0.10,
    "conflicts": 0.04,
    "pack": 0.04,
}
SECONDS_A_PART = 20  # at least
SECONDS_TO_SAVE = 15  # what a part is given after its deadline, before it is killed

MAX_FILES = 8
MAX_BYTES = 16 * 2**20
SHARD_BYTES = 15_000_000
MAX_SHARDS = MAX_FILES - 4
LARGEST_IN_SESSION = 2_000_000  # a file of the state folder above this is not packed


@dataclass(frozen=True)
class Sizes:
    """How large everything is: the real thing, or its rehearsal."""

    networks: dict[str, int]  # preset -> batch size, in the parts smoke and benchmark
    timed_steps: int
    rounds: int
    base: dict[str, Any]  # fields of TrainConfig in every part
    best: dict[str, Any]  # and of the best model; without "images" they follow from the time
    race: dict[str, Any]  # and of the race; without "images" they follow from the rate
    race_seeds: int
    fewest_seeds: int  # that the race is cut to
    moments: int  # at which the best model is sampled along its training
    shown: int  # samples each time
    samples: int
    kept_samples: int
    evaluations: int  # of the network, for a sample
    test_images: int
    elbo_timesteps: int
    conflict_batch: int


FULL = Sizes(
    networks={"compact": 1024, "medium": 512},
    timed_steps=60,
    rounds=10,
    base={"data": "cifar10"},
    best={
        "model": "medium",
        "batch_size": 512,
        "prediction": "v_prediction",
        "schedule": "cosine",
        "weighting": "min-snr",
        "lr": 1e-3,
        "warmup_images": 250_000,
        "validation_images": 512,
        "log_every": 100,
    },
    race={
        "model": "compact",
        "batch_size": 512,
        "lr": 1e-3,
        "warmup_images": 25_000,
        "validation_images": 512,
        "log_every": 100,
    },
    race_seeds=8,
    fewest_seeds=2,
    moments=6,
    shown=64,
    samples=10_000,
    kept_samples=4_000,
    evaluations=35,
    test_images=512,
    elbo_timesteps=50,
    conflict_batch=64,
)

_TOY_NETWORK = {
    "model": "micro",
    "batch_size": 8,
    "weighting": "min-snr",
    "warmup_images": 16,
    "validation_images": 8,
    "validation_timesteps": 4,
    "log_every": 2,
    "threads": 1,
}
TOY = Sizes(
    networks={"micro": 8},
    timed_steps=3,
    rounds=1,
    base={"data": "shapes", "image_size": 16, "train_images": 64, "device": "cpu"},
    best={**_TOY_NETWORK, "prediction": "v_prediction", "schedule": "cosine", "images": 96},
    race={**_TOY_NETWORK, "images": 16},
    race_seeds=1,
    fewest_seeds=1,
    moments=3,
    shown=8,
    samples=24,
    kept_samples=16,
    evaluations=5,
    test_images=8,
    elbo_timesteps=2,
    conflict_batch=2,
)

RACE_WEIGHTINGS = ("const-x0", "const-eps", "min-snr", "dy-sigma")
RACE_TARGETS = ("sample", "epsilon")


@dataclass(frozen=True)
class Session:
    """What every part is given."""

    state: Path
    device: str
    data_root: str | None
    features: str | None
    rehearsal: bool
    deadline: float = 0.0  # of the part, on time.time()'s clock

    @property
    def sizes(self) -> Sizes:
        return TOY if self.rehearsal else FULL

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def config(self, **fields: Any) -> TrainConfig:
        """A configuration with what all parts share."""
        given = {"device": self.device, "data_root": self.data_root, **self.sizes.base, **fields}
        return TrainConfig(**given)

    def result(self, part: str) -> Path:
        return self.state / "results" / f"{part}.json"

    def keep(self, part: str, values: dict[str, Any]) -> None:
        """Write what a part has measured so far."""
        write_json(self.result(part), {"provenance": provenance(), **values})


# The parts.


def precision_error(config: TrainConfig, data: Any) -> float:
    """Relative distance of the gradient in the precision of training from that in float32, uncompiled."""
    plain = replace(config, compile=False)
    state = build(plain, data)
    images, _, _ = batch(data, 0, 0, min(64, config.batch_size))
    noise = torch.randn_like(images)
    timesteps = torch.linspace(0, config.num_timesteps - 1, len(images), device=images.device)
    gradients = []
    for precision in ("float32", config.precision):
        with autocast(replace(plain, precision=precision), images.device):
            losses = sample_losses(
                state.model, state.schedule, images, noise, timesteps.long(), config.prediction
            )
        found = torch.autograd.grad(losses.sum(), state.model_parameters)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    exact, rounded = gradients
    return float((rounded - exact).norm() / exact.norm())


def images_per_second(session: Session, config: TrainConfig, data: Any) -> dict[str, Any]:
    """How fast a network trains, whether it is compiled, and the memory at the peak."""
    device = data.images.device
    state = build(config, data)
    compiled = settle_compilation(state, data, config)
    for _ in range(3):
        train_step(state, data, config)
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(session.sizes.timed_steps):
        train_step(state, data, config)
    _wait_for(device)
    seconds = (time.perf_counter() - start) / session.sizes.timed_steps
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "parameters": count_parameters(state.model),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "compile": compiled,
        "seconds_per_step": seconds,
        "images_per_second": config.batch_size / seconds,
        "bytes": memory,
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def smoke(session: Session) -> None:
    """Does the fast path compute what it should, and how fast?"""
    device = resolve_device(session.device)
    found: dict[str, Any] = {"networks": {}}
    with fast_kernels(device):
        found["matmul_flops"] = matmul_peak(device)
        for model, batch_size in session.sizes.networks.items():
            torch.compiler.reset()
            fields = {**session.sizes.best, "model": model, "batch_size": batch_size}
            fields.pop("images", None)
            config = session.config(**fields)
            data = load_split(config, "train", device)
            config = fit_in_memory(config, data)
            row = images_per_second(session, config, data)
            row["precision"] = str(low_precision(config, device) or torch.float32)
            row["precision_error"] = precision_error(config, data)
            flops = flops_per_image(model, data.images.shape[-1])
            row["share_of_matmul"] = flops * row["images_per_second"] / found["matmul_flops"]
            found["networks"][model] = row
            session.keep("smoke", found)
            print(f"{model}: {row['images_per_second']:,.0f} images/s, compiled: {row['compile']}")
    if device.type == "cuda" and importlib.util.find_spec("pytest"):
        found["tests"] = _tests_for_gpus(session)
        session.keep("smoke", found)


def _tests_for_gpus(session: Session) -> str:
    """The last line of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_fast.py"]
    seconds = max(1.0, session.seconds_left() - 5)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    print(done.stdout)
    return done.stdout.strip().rpartition("\n")[2]


def benchmark(session: Session) -> None:
    """Our step and those of others, each network in turn."""
    device = resolve_device(session.device)
    found: dict[str, Any] = {"networks": {}}
    with fast_kernels(device):
        found["matmul_flops"] = matmul_peak(device)
        for model, batch_size in session.sizes.networks.items():
            count = max(2048, batch_size)
            config = session.config(model=model, batch_size=batch_size)
            config = replace(config, train_images=config.train_images or count)
            costs = step_costs(config, session.sizes.rounds, device, found["matmul_flops"])
            found["networks"][model] = costs
            session.keep("benchmark", found)


def best(session: Session) -> None:
    """Train the best model that the time allows, and sample it along its training."""
    folder = session.state / "best"
    begun = (folder / "config.json").exists()
    if begun:
        config = TrainConfig.from_dict(load_run(folder).config)
        config = replace(config, device=session.device, data_root=session.data_root)
    else:
        config = _best_config(session)
    steps = config.num_steps
    moments = {steps * (k + 1) // session.sizes.moments for k in range(session.sizes.moments)}
    pictures: dict[str, Any] = {}

    def step_and_sample(state: Any, data: Any, config: TrainConfig) -> Any:
        record = train_step(state, data, config)
        if state.step in moments:
            seen = state.step * config.batch_size
            pictures[f"after_{seen:010d}_images"] = _samples_along(session, state, config)
            _save_images(session.state / "samples-along.npz", pictures)
        return record

    dysigma.training.train_step = step_and_sample  # iterate() takes the step of this name
    try:
        with _interrupted_in(session.seconds_left() - SECONDS_TO_SAVE):
            train(config, folder, resume=begun, progress=False)
    except KeyboardInterrupt:
        if not (folder / "checkpoint/latest.json").exists():
            raise
        print("the training is stopped at its deadline; its averaged weights are kept")
        load_run(folder).pipeline().save_pretrained(folder / "pipeline")
    run = load_run(folder)
    session.keep("best", {"config": {**run.config, "data_root": None}, "summary": run.summary})


@contextmanager
def _interrupted_in(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread after so many seconds; training saves and stops."""
    timer = threading.Timer(max(1.0, seconds), _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _best_config(session: Session) -> TrainConfig:
    """The recipe, with as many images as fit into the time."""
    config = session.config(**session.sizes.best)
    if "images" in session.sizes.best:
        device = resolve_device(session.device)
        config = fit_in_memory(config, load_split(config, "train", device))
    else:
        # Samples along the way take their time too.
        config = fit_to_minutes(config, 0.9 * session.seconds_left() / 60)
    images = config.images
    return replace(
        config,
        cooldown_images=images // 4,
        validate_every=max(1, images // 6),
        checkpoint_every=images,  # each is hundreds of megabytes; a deadline saves one anyway
    )


def _samples_along(session: Session, state: Any, config: TrainConfig) -> torch.Tensor:
    """Samples of the averaged weights, always from the same latents."""
    current = {name: value.clone() for name, value in state.model.state_dict().items()}
    state.ema.copy_to(state.model)
    size = state.model.config.sample_size
    device = next(state.model.parameters()).device
    images = sample_images(
        state.model,
        state.schedule,
        (session.sizes.shown, 3, size, size),
        prediction_type=config.prediction,
        num_steps=min(25, session.sizes.evaluations),
        precision=low_precision(config, device),
    )
    state.model.load_state_dict(current)
    return images


def run_race(session: Session) -> None:
    """Race the weightings, seed after seed, until the time is over."""
    folder = session.state / "race"
    if (folder / "race.json").exists():
        spec = Race.from_dict(read_json(folder / "race.json"))
    else:
        spec = Race.from_dict(_race_specification(session))
    machine = {"device": session.device, "data_root": session.data_root}
    try:
        with _interrupted_in(session.seconds_left() - 5):
            race(spec, folder, in_process=True, overrides=machine, progress=False)
    except KeyboardInterrupt:
        print("the race is stopped at its deadline; whole seeds count")
    records = read_metrics(folder / "records.jsonl")
    seeds = [record["seed"] for record in records]
    entries = len(RACE_TARGETS) * len(RACE_WEIGHTINGS)
    whole = [seed for seed in spec.seeds if seeds.count(seed) == entries]
    session.keep("race", {"records": len(records), "whole_seeds": whole})
    if not whole:
        raise RunError(
            f"no seed is complete: {len(records)} of {entries} trainings; give more time"
        )


def _race_specification(session: Session) -> dict[str, Any]:
    """The race, with as many images a training as leave time for a few seeds."""
    sizes = session.sizes
    base = {**sizes.base, **sizes.race}
    if "images" not in base:
        rate = _rate_of(session, base["model"])
        trainings = len(RACE_TARGETS) * len(RACE_WEIGHTINGS) * sizes.fewest_seeds
        images = int(0.6 * rate * session.seconds_left() / trainings)
        batch_size = base["batch_size"]
        base["images"] = max(20, images // batch_size) * batch_size
    known = {key: value for key, value in base.items() if key != "device"}
    device = resolve_device(session.device)
    config = session.config(**known)
    base["accumulate"] = fit_in_memory(config, load_split(config, "train", device)).accumulate
    base["checkpoint_every"] = base["images"]
    base["validate_every"] = max(1, base["images"] // 10)
    base.pop("device", None)
    return {
        "name": "gpu",
        "seeds": list(range(sizes.race_seeds)),
        "base": base,
        "arms": {name: {"weighting": name} for name in RACE_WEIGHTINGS},
        "grid": {target: {"prediction": target} for target in RACE_TARGETS},
    }


def _rate_of(session: Session, model: str) -> float:
    """Images per second of a network, from the part smoke if it has measured them."""
    if session.result("smoke").exists():
        row = read_json(session.result("smoke"))["networks"].get(model)
        if row is not None:
            return float(row["images_per_second"])
    fields = {key: value for key, value in session.sizes.race.items() if key != "images"}
    config = session.config(**fields)
    device = resolve_device(session.device)
    with fast_kernels(device):
        data = load_split(config, "train", device)
        return float(images_per_second(session, config, data)["images_per_second"])


def _open_best(session: Session) -> tuple[Any, TrainConfig, Any, torch.device]:
    """(network with averaged weights, configuration, schedule, device) of the part best."""
    folder = session.state / "best"
    if not (folder / "pipeline/model_index.json").exists():
        raise RunError("the part best has left no finished model; run it first")
    config = TrainConfig.from_dict(load_run(folder).config)
    config = replace(config, device=session.device, data_root=session.data_root)
    device = resolve_device(session.device)
    network = load_run(folder).pipeline().unet.to(device)
    return network, config, config.noise_schedule().to(device), device


def evaluation(session: Session) -> None:
    """Losses, ELBO and samples of the best model, how long a sample takes, and distances."""
    sizes = session.sizes
    network, config, schedule, device = _open_best(session)
    train_data = load_split(replace(config, train_images=None), "train", device)
    test = load_split(config, "test", device)
    shape = (sizes.samples, *test.images.shape[1:])

    def draw(count: int) -> torch.Tensor:
        return sample_images(
            network,
            schedule,
            (count, *shape[1:]),
            prediction_type=config.prediction,
            sampler="heun",
            num_steps=sizes.evaluations,
            precision=low_precision(config, device),
        )

    with fast_kernels(device):
        draw(2)
        _wait_for(device)
        start = time.perf_counter()
        samples = draw(sizes.samples)
        _wait_for(device)
        seconds = time.perf_counter() - start
        _save_images(session.state / "samples.npz", {"images": samples[: sizes.kept_samples]})
        found: dict[str, Any] = {
            "samples": len(samples),
            "sampler": "heun",
            "network_evaluations": sizes.evaluations,
            "seconds_per_sample": seconds / len(samples),
            "images_trained_on": load_run(session.state / "best").summary["images"],
        }
        session.keep("evaluation", found)
        found["distances"] = {}
        for name, source in _feature_networks(session).items():
            found["distances"][name] = _distance(source, samples, train_data, device)
            session.keep("evaluation", found)
        images = test.images[: sizes.test_images]
        timesteps = evaluation_timesteps(config.num_timesteps, 50)
        losses = validation_losses(
            network, images, schedule, config.prediction, timesteps=timesteps, batch_size=1024
        )
        found["timesteps"] = timesteps.tolist()
        found["losses"] = losses.tolist()
        session.keep("evaluation", found)
        bound = elbo(
            network,
            images,
            schedule,
            config.prediction,
            timesteps_per_image=sizes.elbo_timesteps,
            batch_size=1024,
        )
        found["elbo"] = bound._asdict()
        session.keep("evaluation", found)


def _feature_networks(session: Session) -> dict[str, str]:
    """What measures distances, by name."""
    if session.rehearsal:
        return {"pixels": "pixels", "none": "there-is-no-such.pt"}
    found = {"classifier": str(ROOT / "data/features/cifar10-classifier.pt"), "fid": "fid"}
    if session.features is not None:
        found[Path(session.features).stem] = session.features
    return found


def _distance(
    source: str, samples: torch.Tensor, data: Any, device: torch.device
) -> dict[str, Any]:
    """Distances to the training images; or "fails" with the reason, offline without FID's network say."""
    try:
        features = load_features(source, device)
        reference = reference_features(features, data.originals)
        found = compare_features(extract(features, samples.to(device)).cpu(), reference.cpu())
        return {**found, "sha256": features.sha256}
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        return {"fails": str(error).partition("\n")[0]}


def measure_conflicts(session: Session) -> None:
    """Gradient conflicts between ten bins of timesteps, of the best model."""
    network, config, schedule, device = _open_best(session)
    data = load_split(config, "train", device)
    with fast_kernels(device), autocast(config, device):
        report = conflicts(
            network,
            data.images,
            schedule,
            10,
            prediction_type=config.prediction,
            batch_per_bin=session.sizes.conflict_batch,
            progress=False,
        )
    print(*report.sentences(), sep="\n")
    session.keep("conflicts", {"report": report.to_dict()})


PARTS: dict[str, Callable[[Session], None]] = {
    "smoke": smoke,
    "benchmark": benchmark,
    "best": best,
    "race": run_race,
    "evaluation": evaluation,
    "conflicts": measure_conflicts,
}


# What is handed back.


def _save_images(path: Path, images: dict[str, torch.Tensor]) -> None:
    """uint8 images (N, C, H, W) by name, as a compressed .npz of (N, H, W, C)."""
    import numpy as np

    stream = io.BytesIO()
    arrays = {name: value.permute(0, 2, 3, 1).cpu().numpy() for name, value in images.items()}
    np.savez_compressed(stream, **arrays)
    write_atomically(path, stream.getvalue())


def pack(session: Session, out: Path) -> list[Path]:
    """Write what is handed back to a folder; whatever would not fit stays behind, and is named.

    The folder gets session.tar.gz, samples.npz, log.txt, weights-N.safetensors (averaged weights of
    the best model in float16) and pack.json, with the SHA-256 of each.
    """
    out.mkdir(parents=True, exist_ok=True)
    left_out: list[str] = []
    contents = {"session.tar.gz": _tar_of_state(session, left_out)}
    for name in ("samples.npz", "samples-along.npz"):
        if (session.state / name).exists():
            contents[name] = (session.state / name).read_bytes()
    if (session.state / "log.txt").exists():
        contents["log.txt"] = (session.state / "log.txt").read_bytes()[-SHARD_BYTES:]
    shards = _shards(session.state / "best/pipeline/unet/diffusion_pytorch_model.safetensors")
    room = MAX_FILES - len(contents) - 1
    if len(shards) > room:
        left_out.append(f"weights of {len(shards)} files, where {room} are left")
        shards = []
    for number, shard in enumerate(shards):
        contents[f"weights-{number}.safetensors"] = shard
    for name in [*contents]:
        if len(contents[name]) >= MAX_BYTES:
            left_out.append(f"{name} of {len(contents.pop(name)):,} bytes")
    for name, content in contents.items():
        write_atomically(out / name, content)
    for stale in out.glob("weights-*.safetensors"):
        if stale.name not in contents:
            stale.unlink()
    index = {
        "files": {name: digest(content) for name, content in contents.items()},
        "left_out": left_out,
        "session": read_json(session.state / "session.json"),
    }
    write_json(out / "pack.json", index)
    return [out / name for name in [*contents, "pack.json"]]


def _tar_of_state(session: Session, left_out: list[str]) -> bytes:
    """The small files of the state folder: results, the run and the race without their tensors."""
    stream = io.BytesIO()
    apart = {"samples.npz", "samples-along.npz", "log.txt"}
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for path in sorted(session.state.rglob("*")):
            relative = path.relative_to(session.state)
            hidden = any(part.startswith(".") for part in relative.parts)
            tensors = path.suffix == ".safetensors" or "entries" in relative.parts
            if not path.is_file() or hidden or tensors or str(relative) in apart:
                continue
            if relative.parts[0] == "best" and "checkpoint" in relative.parts:
                continue
            if path.stat().st_size > LARGEST_IN_SESSION and path.suffix not in (".json", ".jsonl"):
                left_out.append(str(relative))
                continue
            tar.add(path, str(relative))
    return stream.getvalue()


def _shards(path: Path) -> list[bytes]:
    """The weights in float16, as safetensors of at most SHARD_BYTES; none if there are none."""
    from safetensors.torch import load_file, save

    if not path.exists():
        return []
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in load_file(path).items():
        half = value.half()
        if groups[-1] and size + half.nbytes > SHARD_BYTES - 100_000:
            groups.append({})
            size = 0
        groups[-1][name] = half
        size += half.nbytes
    return [save(group) for group in groups]


def import_pack(folder: Path, runs: Path = RUNS, name: str | None = None) -> Path:
    """Put what a session handed back into a folder of its own below `runs`; returns it.

    best/ is a run folder again, with its weights; race/ a race; results/ what each part measured.
    Raises RunError if the folder holds no pack, a file is damaged, or the place is taken.
    """
    from safetensors.torch import load, save

    if not (folder / "pack.json").is_file():
        raise RunError(f"{folder} has no pack.json: give the folder that gpu_run.py wrote to --out")
    index = read_json(folder / "pack.json")
    contents = {}
    for file, expected in index["files"].items():
        if not (folder / file).is_file():
            raise RunError(f"{folder / file} is missing: copy it again")
        contents[file] = (folder / file).read_bytes()
        if digest(contents[file]) != expected:
            raise RunError(f"{folder / file} is damaged (its SHA-256 differs): copy it again")

    kind = "rehearsal" if index["session"]["rehearsal"] else index["session"]["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    place = runs / (name or f"gpu-{slug}-{digest(index['files'])[:6]}")
    if place.exists():
        raise RunError(f"{place} is there already: move it away, or give another --name")
    aside = runs / f".{place.name}.importing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(contents["session.tar.gz"])) as tar:
        tar.extractall(aside, filter="data")
    weights: dict[str, torch.Tensor] = {}
    for file, content in contents.items():
        if file.startswith("weights-"):
            weights.update(load(content))
        elif file != "session.tar.gz":
            write_atomically(aside / file, content)
    if weights:
        target = aside / "best/pipeline/unet/diffusion_pytorch_model.safetensors"
        write_atomically(target, save(weights, {"format": "pt"}))
    config = aside / "best/config.json"
    if config.exists():  # where the images lay on that machine is of no use here
        write_json(config, {**read_json(config), "data_root": None})
    aside.rename(place)
    return place


# The session.


def _run_part(part: str, session: Session) -> None:
    """In a process of its own: run a part with its output in the log."""
    log = os.open(session.state / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"\n== {part} ==", flush=True)
    if session.rehearsal:
        torch.set_num_threads(1)
    PARTS[part](session)


def run_part(part: str, session: Session) -> str:
    """Run a part in a process of its own until it ends or its time is over: "done", or what went wrong."""
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if hasattr(context, "set_forkserver_preload"):
        # Imported once, for all parts. A part that breaks the GPU's state breaks its own alone.
        context.set_forkserver_preload(["diffusers.models.unets.unet_2d", __name__])
    process = context.Process(target=_run_part, args=(part, session))
    process.start()
    try:
        process.join(max(1.0, session.seconds_left()))
        if process.is_alive():
            return "stopped at its deadline"
    finally:
        _end(process)
    if process.exitcode == 0:
        return "done"
    return f"failed: {_last_line(session.state / 'log.txt')}"


def _end(process: Any) -> None:
    """End a process that is still there: training saves and stops, and what does not is killed."""
    if process.is_alive():
        process.terminate()
        process.join(SECONDS_TO_SAVE)
    if process.is_alive():
        process.kill()
        process.join()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "no output"


def open_session(args: argparse.Namespace, device: str) -> Session:
    """Claim the state folder. Raises RunError if it holds something else."""
    settings = {"rehearsal": args.rehearse, "device": device, "data": _data_of(args)}
    known = args.state / "session.json"
    if known.exists():
        before = read_json(known)
        if before["settings"] != settings:
            raise RunError(
                f"{args.state} is of another session ({before['settings']}; this is {settings}): "
                "choose another --state; nothing there was touched"
            )
    elif args.state.is_dir() and any(args.state.iterdir()):
        raise RunError(f"{args.state} is not empty and holds no session: choose another --state")
    else:
        about = {"settings": settings, "rehearsal": args.rehearse, "device": device, "parts": {}}
        write_json(known, about)
    return Session(
        state=args.state.resolve(),
        device="cpu" if args.rehearse else args.device,
        data_root=args.data_root,
        features=args.features,
        rehearsal=args.rehearse,
    )


def _data_of(args: argparse.Namespace) -> str:
    return str((TOY if args.rehearse else FULL).base["data"])


def run_session(session: Session, parts: list[str], minutes: float, out: Path) -> dict[str, str]:
    """Run the parts that are not done, each until its share of the time left is used; what became of them."""
    end = time.time() + 60 * minutes
    known = session.state / "session.json"
    about = read_json(known)
    waiting = [part for part in parts if about["parts"].get(part) != "done" and part != "pack"]
    for part in parts:
        if part != "pack" and part not in waiting:
            print(f"{part:11s} done before", flush=True)
    for number, part in enumerate(waiting):
        start = time.time()
        shares = sum(SHARES[other] for other in waiting[number:]) + SHARES["pack"]
        seconds = (end - start) * SHARES[part] / shares
        if seconds < 1:
            about["parts"][part] = "left out: no time"
        else:
            timed = replace(session, deadline=start + seconds)
            about["parts"][part] = run_part(part, timed)
        write_json(known, about)
        print(f"{part:11s} {time.time() - start:5.0f} s  {about['parts'][part]}", flush=True)
        pack(session, out)
    written = pack(session, out)
    total = sum(path.stat().st_size for path in written)
    print(f"{'pack':11s} {len(written)} files, {total / 1e6:.1f} MB in {out}", flush=True)
    return {part: about["parts"][part] for part in parts if part != "pack"}


def _device_of(args: argparse.Namespace) -> str:
    """The name of the device. Raises ValueError where there is no GPU and none but it was asked for."""
    if args.rehearse:
        return "cpu"
    device = resolve_device(args.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if args.device == "auto":
        raise ValueError(
            "there is no CUDA device here: --rehearse runs every part at toy size on a CPU, "
            "--device cpu the real sizes"
        )
    return device.type


def check_data(args: argparse.Namespace) -> None:
    """Raise ValueError or ConnectionError, in one line, if the images are neither here nor to be had."""
    if not args.rehearse:
        load_split(
            TrainConfig(data="cifar10", data_root=args.data_root), "test", torch.device("cpu")
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of a session."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=14.0, help="for all parts (default: 14)")
    parser.add_argument("--device", default="auto", help="auto (a GPU), cuda:1, or cpu")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=[*SHARES], metavar="PART")
    parser.add_argument("--state", type=Path, default=Path("runs/gpu"), help="what is being done")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is handed back")
    parser.add_argument("--data-root", help="where CIFAR-10 lies")
    parser.add_argument("--features", help="a TorchScript network for one more distance")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU")
    return parser.parse_args(argv)


def parse_import(argv: list[str]) -> argparse.Namespace:
    """The command line of an import."""
    parser = argparse.ArgumentParser(prog="gpu_run.py import")
    parser.add_argument("folder", type=Path, help="what a session wrote to --out")
    parser.add_argument("--runs", type=Path, default=RUNS, help="default: data/runs")
    parser.add_argument("--name", help="of the new folder (default: gpu-DEVICE-DIGEST)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """0 if every part is done, 1 if one is not, 2 for a request that cannot be met."""
    try:
        if argv[:1] == ["import"]:
            chosen = parse_import(argv[1:])
            print(import_pack(chosen.folder, chosen.runs, chosen.name))
            return 0
        args = parse(argv)
        enough = SECONDS_A_PART * len(args.parts) / 60
        if not args.minutes >= enough:
            raise ValueError(
                f"{args.minutes:g} minutes are too little for {len(args.parts)} parts: give at "
                f"least {enough:.2g}, or fewer --parts"
            )
        device = _device_of(args)
        check_data(args)
        session = open_session(args, device)
        results = run_session(session, args.parts, args.minutes, args.out)
    except KeyboardInterrupt:
        print("gpu_run: stopped; go on with the same command", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"gpu_run: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0 if all(result == "done" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
