"""The training loop: from a configuration to a finished run folder."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from .. import runs
from ..bins import Bins
from ..data.dataset import ImageData
from ..devices import fast_kernels
from ..parallel import over_ranks
from ..runs.files import RunError
from ..runs.folder import Run
from .config import TrainConfig
from .parallel import _from_first, _process_group, _ranks, _share, _wait
from .parts import TrainState, load_split, make_parts
from .recorder import _Recorder
from .step import (
    StepRecord,
    TrainingDiverged,
    check_compiled,
    iterate,
)


def _first_failure(records: list[StepRecord]) -> StepRecord | None:
    finite = torch.stack(
        [torch.cat([r.losses, r.loss[None], r.grad_norm[None]]).isfinite().all() for r in records]
    )
    return None if bool(finite.all()) else records[int(finite.logical_not().nonzero()[0])]


def _explain_failure(
    record: StepRecord, state: TrainState, config: TrainConfig, out: Path
) -> TrainingDiverged:
    """Write failure.json beside the last whole checkpoint and return the error to raise."""
    bins, bad = Bins.uniform(config.num_timesteps, config.bins), ~record.losses.isfinite()
    index = int(bins.index((record.timesteps[bad] if bad.any() else record.timesteps).cpu())[0])
    what = "loss" if bad.any() else "weighted loss" if not record.loss.isfinite() else "gradient"
    numbers = {
        "losses": record.losses,
        "weights": state.weighting.weights(),
        "grad_norm": record.grad_norm[None],
    }
    report = {
        "step": record.step,
        "what": what,
        "weighting": config.weighting,
        "timesteps": record.timesteps.tolist(),
    }
    report |= {
        name: [str(v) for v in t.tolist()] for name, t in numbers.items()
    }  # as text: JSON has no NaN
    if _ranks()[0] == 0:
        runs.write_json(out / "failure.json", report)
    return TrainingDiverged(
        f"{what} is not finite at step {record.step}, first in timestep bin {index} "
        f"({int(bins.edges[index])}..{int(bins.edges[index + 1]) - 1}), weighting {config.weighting!r}; nothing was "
        f"repaired. {out}/failure.json has the draws, {out}/checkpoint (if any) the last whole state. Try a lower lr"
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; one more, a second or more later, interrupts at once.

    A scheduler that stops torchrun and its ranks sends each rank two, and means one.
    """
    received: list[float] = []

    def handle(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] > received[0] + 1:
            raise KeyboardInterrupt

    previous = {}
    with suppress(ValueError):  # not in the main thread: the caller's own handling stays
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuse a run folder that is in use, is no run to resume, or is a run of another configuration."""
    if not resume:
        # Hidden files are what a process leaves that was killed while it claimed the folder.
        if out.is_dir() and any(
            not path.name.startswith((".lock", ".config.json.")) for path in out.iterdir()
        ):
            raise RunError(
                f"{out} is not empty; choose another --out, or continue that run with --resume"
            )
        return
    if not (out / "config.json").exists():
        raise RunError(f"{out} holds no run to resume; leave out --resume to start one there")
    # A field that the run is older than had its default then.
    if differing := runs.differences(
        TrainConfig.from_dict(runs.load_run(out).config).to_dict(), config.to_dict()
    ):
        raise RunError(
            f"{out} is of another configuration ({differing}); resume it as it was, or choose another --out"
        )


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    finish: bool = True,
) -> Run:
    """Train to the end of the configuration and write a run folder; returns it as load_run does.

    finish=False leaves out what comes after the last step: pipeline and samples.

    With resume=True an interrupted run goes on from its last checkpoint and ends with the same weights as one that was
    never interrupted (bit for bit on one CPU device). SIGINT and SIGTERM save and raise KeyboardInterrupt. Under
    torchrun the ranks share each batch, and their number changes nothing but rounding; the first one reads and writes
    the folder. Raises RunError for a folder that cannot be used or written, when another rank is lost, and for compiled
    code with wrong gradients; TrainingDiverged when a loss or gradient is not finite.
    """
    from safetensors import SafetensorError

    out = Path(out)
    make_parts(config)  # so that a misspelled name is told before any data are read
    with _process_group(config) as device, fast_kernels(device):
        _share(config, device)
        first = _ranks()[0] == 0
        if first:
            _check_folder(config, out, resume)
        else:
            _wait()  # the first rank may have to download the data
        data, test = load_split(config, "train", device), load_split(config, "test", device)
        if first:
            _wait()
        if config.conditional and (test.num_classes or 0) > (data.num_classes or 0):
            raise ValueError(
                f"{data.name}: test labels reach {test.num_classes} classes and the training images chosen have only "
                f"{data.num_classes}; use more train_images"
            )
        recorder = _Recorder(config, data, test, out)
        try:
            if recorder.state.forward is not recorder.state.model:
                check_compiled(recorder.state, data, config)
            # Claimed only now, so that a misspelled name or missing data leaves no half-made run behind.
            with runs.lock(out) if first else nullcontext():
                _train(data, recorder, resume, progress, finish)
        except torch.OutOfMemoryError:
            raise RunError(
                f"batches of {config.batch_size} images in {config.accumulate} parts do not fit in the memory of "
                f"{device}: --accumulate {2 * config.accumulate} takes the same steps with less, in another --out; or "
                "use a smaller --batch-size or --model"
            ) from None
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write to {out} ({getattr(error, 'strerror', None) or error}); what was saved before is whole: "
                "make room and go on with --resume, or choose another --out"
            ) from None
        return _from_first(runs.load_run(out) if first else None, device)


def _train(
    data: ImageData, recorder: _Recorder, resume: bool, progress: bool, finish: bool
) -> None:
    config, out, state = recorder.config, recorder.out, recorder.state
    if resume:
        recorder.restore()
    if recorder.first:
        _check_folder(config, out, resume)  # again, now that nobody else can write to it
        runs.write_json(out / "config.json", config.to_dict())
        rows = runs.read_metrics(out / "metrics.jsonl", until_step=state.step) if state.step else []
        runs.write_atomically(
            out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        )
    recorder.summarise("running")
    with _stop_signals() as stopped:
        try:
            _run(data, recorder, stopped, progress)
        except TrainingDiverged:
            recorder.summarise("failed")
            raise
        if recorder.first and finish:
            recorder.finish()
        else:
            recorder.summarise("done")


def _run(data: ImageData, recorder: _Recorder, stopped: Callable[[], bool], progress: bool) -> None:
    from tqdm.auto import tqdm

    config, state = recorder.config, recorder.state
    # On a CPU a check costs nothing; on a GPU it would stall the queue, so it waits for the log line.
    check_every = 1 if data.images.device.type == "cpu" else config.log_every
    seen = state.step * config.batch_size
    shown = progress and recorder.first
    bar = tqdm(
        desc=config.weighting,
        total=config.images,
        initial=seen,
        unit="img",
        unit_scale=True,
        disable=not shown,
    )
    if state.step == 0:
        recorder.log(data, validate=True, report=config.conflicts_from is not None)
    with bar:
        for record in iterate(state, data, config):
            recorder.pending.append(record)
            bar.update(config.batch_size)
            done = state.step == config.num_steps
            save = done or state.step % config.interval("checkpoint_every") == 0
            every, start = config.interval("validate_every"), config.validate_from
            validate = done or (
                config.is_due("validate_from", state.step, 2**0.5)
                if start
                else not state.step % every
            )
            report = config.conflicts_from is not None and (
                done or config.is_due("conflicts_from", state.step, 2.0)
            )
            log = save or validate or report or state.step % config.log_every == 0
            check = log or state.step % check_every == 0
            stop = stopped()
            if _ranks()[1] > 1:  # all must stop after the same step
                stop = check and bool(
                    over_ranks(torch.tensor([float(stop)], device=record.loss.device))[0].any()
                )
            if stop or check:
                failed = _first_failure(recorder.pending[-check_every:])
                if failed is not None:
                    raise _explain_failure(failed, state, config, recorder.out)
            if log:
                bar.set_postfix(loss=f"{float(record.losses.mean()):.4f}", refresh=False)
                recorder.log(data, validate=validate, report=report)
            if save:
                recorder.save("running")
            if stop and not done:
                recorder.save("interrupted")
                _wait()  # a rank that left now would have the one that writes stopped
                raise KeyboardInterrupt(
                    f"stopped at {state.step * config.batch_size:,} of {config.images:,} images, all saved; "
                    f"go on with: dysigma train --resume --out {recorder.out}"
                )
