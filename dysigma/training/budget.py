"""What a training can take on this machine, measured before it begins: images a step, and in so many minutes."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings

import torch

from ..data.dataset import ImageData
from ..devices import fast_kernels, is_out_of_memory, resolve_device
from ..runs.files import RunError
from .compiled import settle_compilation
from .config import TrainConfig
from .measures import Measures
from .parts import TrainState, build, load_split, make_parts
from .recorder import FINAL_SAMPLES, FINAL_SAMPLING_STEPS
from .step import train_step
from .threads import number_of_threads, threads

WARMUP_STEPS = 3
TIMED_STEPS = 5  # at least
TIMED_SHARE = 0.03  # of the budget
SAFETY = 0.9  # of the time left is planned; machines slow down, checkpoints are written
FEWEST_STEPS = 10


def fit_in_memory(config: TrainConfig, data: ImageData) -> TrainConfig:
    """The configuration with its batches in as few parts as fit in the memory of the data's device.

    The steps stay the same up to rounding; `accumulate` says in how many parts they are taken. A
    warning says how many images fit, if that is not all of them. Raises RunError if not even one
    does.
    """
    with fast_kernels(data.images.device):
        return _begun(config, data)[0]


def _begun(config: TrainConfig, data: ImageData) -> tuple[TrainConfig, TrainState]:
    """fit_in_memory, and a state that has taken one step."""
    device = data.images.device
    divided = config
    while (state := _first_step(divided, data)) is None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if divided.accumulate == config.batch_size:
            raise RunError(
                f"{config.model}: not even one image at a time fits in the memory of {device}; take "
                "a smaller model, or another device"
            )
        parts = _next_divisor(config.batch_size, 2 * divided.accumulate)
        divided = dataclasses.replace(divided, accumulate=parts)
    if divided.accumulate > config.accumulate:
        warnings.warn(
            f"{config.model}: {config.batch_size // config.accumulate} images at once do not fit in "
            f"the memory of {device}; {config.batch_size // divided.accumulate} do, so a step takes "
            f"{divided.accumulate} parts",
            stacklevel=3,
        )
    return divided, state


def _next_divisor(number: int, least: int) -> int:
    """The smallest divisor of a number that is at least so large; the number itself if least is larger."""
    divisors = (parts for parts in range(least, number) if number % parts == 0)
    return next(divisors, number)


def _first_step(config: TrainConfig, data: ImageData) -> TrainState | None:
    """A state after one step, compiled if that works; None where memory runs out."""
    try:
        state = build(config, data)
        settle_compilation(state, data, config)
        train_step(state, data, config)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return state


def fit_to_minutes(config: TrainConfig, minutes: float) -> TrainConfig:
    """The configuration with as many images as fit into minutes of wall-clock time from this call on.

    Trains a throw-away network for a moment to measure the rate, validates once, and leaves time
    for the validations, the samples and the pipeline. The number is fixed in what is returned, so
    that the run can be repeated and resumed; how long it really takes depends on the machine. Where
    the memory is too small for a batch, it is taken in parts, as fit_in_memory says. Raises
    ValueError if the time is too short, or with several ranks.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be a positive number; got {minutes!r}")
    begun = time.perf_counter()
    budget = 60 * minutes
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("minutes are measured on one rank; with torchrun give --images")
    make_parts(config)
    device = resolve_device(config.device)
    with fast_kernels(device):
        data = load_split(config, "train", device)
        test = load_split(config, "test", device)
        with threads(number_of_threads(config, data)):
            config, state = _begun(config, data)
            for _ in range(WARMUP_STEPS - 1):
                train_step(state, data, config)
            ready = _now(device)
            step_seconds = _seconds_a_step(state, data, config, TIMED_SHARE * budget)
            overhead = _seconds_of_measures(state, data, test, config, step_seconds)
    # The run itself reads the data and checks the compiled network once more.
    preparation = (_now(device) - begun) + (ready - begun)
    left = SAFETY * (budget - preparation - overhead)
    steps = int(left / step_seconds)
    if steps < FEWEST_STEPS:
        enough = (preparation + overhead + FEWEST_STEPS * step_seconds / SAFETY) / 60
        raise ValueError(
            f"{minutes:g} minutes are too little: getting ready takes {preparation:.0f} s, "
            f"validations and samples {overhead:.0f} s, a step {step_seconds:.2g} s; give at least "
            f"{1.2 * enough:.2g}, or a smaller model or batch"
        )
    return dataclasses.replace(config, images=steps * config.batch_size)


def _now(device: torch.device) -> float:
    """The time when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds_a_step(
    state: TrainState, data: ImageData, config: TrainConfig, seconds: float
) -> float:
    """Mean duration of a step over a stretch of so many seconds."""
    start = _now(data.images.device)
    steps = 0
    while steps < TIMED_STEPS or time.perf_counter() - start < seconds:
        train_step(state, data, config)
        steps += 1
        if steps % TIMED_STEPS == 0:
            _now(data.images.device)  # else the host would run ahead of the device
    return (_now(data.images.device) - start) / steps


def _seconds_of_measures(
    state: TrainState, data: ImageData, test: ImageData, config: TrainConfig, step_seconds: float
) -> float:
    """What validations, samples and reports of a run of the usual ten will take, about."""
    measures = Measures(config, state, data, test)
    start = _now(data.images.device)
    measures.validate()
    validation = _now(data.images.device) - start
    a_pass = validation / (len(measures.images) * config.validation_timesteps)
    validations = 12
    distances = validations * config.distance_images * config.distance_steps * a_pass
    final_samples = FINAL_SAMPLES * FINAL_SAMPLING_STEPS * a_pass
    reports = 0 if config.conflicts_from is None else 10
    return (
        validations * validation
        + distances
        + final_samples
        + reports * 16 * config.bins * step_seconds
    )
