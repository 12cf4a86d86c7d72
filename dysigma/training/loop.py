"""The training loop: from a configuration to a finished run folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from .. import runs
from ..data.dataset import ImageData
from ..devices import fast_kernels, is_out_of_memory
from ..models import GROUPS_BEFORE_THEY_WERE_RECORDED
from ..parallel import over_ranks
from ..runs.files import RunError
from ..runs.folder import Run
from .budget import fit_in_memory
from .compiled import settle_compilation
from .config import TrainConfig
from .identity import check_images, check_place
from .parallel import from_first, process_group, rank_and_count, share_of_batch, wait_for_all
from .parts import load_split, make_parts
from .recorder import Recorder, writing
from .signals import StopRequest, stop_signals
from .step import TrainingDiverged, iterate
from .threads import number_of_threads, threads
from .tracking import Tracker

# Hidden files are what a process leaves that was killed while it claimed the folder.
LEFTOVERS = (".lock", ".config.json.")


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    finish: bool = True,
    images: tuple[ImageData, ImageData] | None = None,
    log_with: str | None = None,
) -> Run:
    """Train to the end of the configuration and write a run folder; returns it as load_run does.

    finish=False leaves out what comes after the last step: pipeline and samples. images: train and
    test images, if load_split has loaded those of this configuration before. log_with:
    "tensorboard", "wandb" or "trackio" gets the metrics too.

    With resume=True an interrupted run goes on from its last checkpoint and ends with the same
    weights as one that was never interrupted (bit for bit on one CPU device). Its images may lie
    elsewhere now: config.data may be another path, if the same images are found there. SIGINT and
    SIGTERM save and raise KeyboardInterrupt. Under torchrun the ranks share each batch, and their
    number changes nothing but rounding; the first one reads and writes the folder.

    Raises RunError for a folder that cannot be used or written, other images than the run began
    with, and when another rank is lost; TrainingDiverged when a loss or gradient is not finite.
    """
    out = Path(out)
    make_parts(config)  # so that a misspelled name is told before any data are read
    with process_group(config) as device, fast_kernels(device):
        share_of_batch(config, device)  # so that a batch that ranks cannot share is told, too
        first = rank_and_count()[0] == 0
        if first:
            check_folder(config, out, resume)
        else:
            wait_for_all()  # the first rank may have to download the data
        if images is None:
            images = load_split(config, "train", device), load_split(config, "test", device)
        data, test = images
        if first:
            wait_for_all()
        _check_classes(config, data, test)
        earlier = from_first(runs.load_run(out).summary if first and resume else None, device)
        threads_before = (earlier or {}).get("provenance", {}).get("cpu_threads")
        tracker = Tracker(log_with, config, out) if log_with is not None and first else None
        ran_out = False
        try:
            with threads(number_of_threads(config, data, threads_before)):
                _train_on(data, test, config, out, earlier, tracker, progress, finish)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        finally:
            if tracker is not None:
                tracker.finish()
        if ran_out:  # only here, after the error, is the memory of what failed free
            raise RunError(_advice_on_memory(config, data))
        run = runs.load_run(out) if first else Run(out, {}, {})
        return from_first(run, device)


def check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuse a run folder that is in use, is no run to resume, or is a run of another configuration."""
    if not resume:
        names = [path.name for path in out.iterdir()] if out.is_dir() else []
        if any(not name.startswith(LEFTOVERS) for name in names):
            raise RunError(
                f"{out} is not empty; choose another --out, or continue that run with --resume"
            )
        return
    if not (out / "config.json").exists():
        raise RunError(f"{out} holds no run to resume; leave out --resume to start one there")
    run = runs.load_run(out)
    # A field that the run is older than had its default then.
    saved = TrainConfig.from_dict(run.config)
    differing = runs.differences(saved.to_dict(), config.to_dict())
    if differing:
        raise RunError(
            f"{out} is of another configuration ({differing}); resume it as it was, or choose "
            "another --out"
        )
    if "data" not in run.summary:
        check_place(saved.data, config.data, out)


def _check_classes(config: TrainConfig, data: ImageData, test: ImageData) -> None:
    if config.conditional and (test.num_classes or 0) > (data.num_classes or 0):
        raise ValueError(
            f"{data.name}: test labels reach {test.num_classes} classes and the training images "
            f"chosen have only {data.num_classes}; use more train_images"
        )


def _train_on(
    data: ImageData,
    test: ImageData,
    config: TrainConfig,
    out: Path,
    earlier: dict[str, Any] | None,
    tracker: Tracker | None,
    progress: bool,
    finish: bool,
) -> None:
    """Train on images that are there; earlier: the summary of a run to resume, None for a new one."""
    resume = earlier is not None
    groups = None
    if earlier is not None:
        before = GROUPS_BEFORE_THEY_WERE_RECORDED.get(config.model)
        groups = earlier.get("norm_num_groups", before)
    recorder = Recorder(
        config,
        data,
        test,
        out,
        norm_num_groups=groups,
        earlier=earlier,
        tracker=tracker,
    )
    if recorder.first and earlier is not None and "data" in earlier:
        for split, found in recorder.about["data"].items():
            check_images(earlier["data"][split], found, f"{split} images of {config.data}", out)
    recorder.about["compile"] = settle_compilation(recorder.state, data, config)
    if recorder.about["compile"].startswith("no: "):
        reason = recorder.about["compile"].removeprefix("no: ")
        warnings.warn(f"training goes on uncompiled: {reason}", stacklevel=4)
    # Claimed only now, so that a misspelled name or missing data leaves no half-made run behind.
    with _claimed(out) if recorder.first else nullcontext():
        if resume:
            recorder.restore()
        if recorder.first:
            check_folder(config, out, resume)  # again, now that nobody else can write to it
            recorder.begin()
        recorder.summarise("running")
        with stop_signals() as stopped:
            _train_to_the_end(data, recorder, stopped, progress, finish)


def _advice_on_memory(config: TrainConfig, data: ImageData) -> str:
    """What to do where memory ran out: the number of parts of a step that fits, found by trying."""
    parts = 2 * config.accumulate
    if rank_and_count()[1] == 1:
        with warnings.catch_warnings(), suppress(RunError):
            warnings.simplefilter("ignore")
            parts = max(parts, fit_in_memory(config, data).accumulate)
    return (
        f"batches of {config.batch_size} images in {config.accumulate} parts do not fit in the "
        f"memory of {data.images.device}: --accumulate {parts} takes the same steps with less, in "
        "another --out; or use a smaller --batch-size or --model"
    )


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the run folder; RunError if it cannot be made or another process holds it."""
    with ExitStack() as stack:
        with writing(out):
            stack.enter_context(runs.lock(out))
        yield


def _train_to_the_end(
    data: ImageData, recorder: Recorder, stopped: StopRequest, progress: bool, finish: bool
) -> None:
    try:
        _run(data, recorder, stopped, progress)
        if not recorder.first or not finish:
            recorder.summarise("done")
            if stopped() and rank_and_count()[1] == 1:
                raise KeyboardInterrupt
            return
        stopped.interrupt_at_once()
        recorder.finish()
    except TrainingDiverged:
        recorder.summarise("failed")
        raise
    except KeyboardInterrupt as interrupt:
        if recorder.state.step < recorder.config.num_steps:
            raise
        recorder.summarise("interrupted")
        raise KeyboardInterrupt(
            "stopped after the last step, all saved; what is left to do is the pipeline and samples; "
            + _advice(recorder)
        ) from interrupt


def _advice(recorder: Recorder) -> str:
    return f"go on with: dysigma train --resume --out {recorder.out}"


def _run(data: ImageData, recorder: Recorder, stopped: StopRequest, progress: bool) -> None:
    """Take the steps that are left, with log lines, validations and checkpoints where they are due."""
    from tqdm.auto import tqdm

    config, state = recorder.config, recorder.state
    # On a CPU a check costs nothing; on a GPU it would stall the queue, so it waits for the log line.
    check_every = 1 if data.images.device.type == "cpu" else config.log_every
    bar = tqdm(
        desc=config.weighting,
        total=config.images,
        initial=state.step * config.batch_size,
        unit="img",
        unit_scale=True,
        disable=not (progress and recorder.first),
    )
    if state.step == 0:
        recorder.log(validate=True, report=config.conflicts_from is not None)
    with bar:
        for record in iterate(state, data, config):
            recorder.pending.append(record)
            bar.update(config.batch_size)
            done = state.step == config.num_steps
            save = done or state.step % config.interval("checkpoint_every") == 0
            validate = done or _validation_is_due(config, state.step)
            report = config.conflicts_from is not None and (
                done or config.is_due("conflicts_from", state.step, 2.0)
            )
            log = save or validate or report or state.step % config.log_every == 0
            check = log or state.step % check_every == 0
            stop = _stop_together(stopped(), check, record.loss.device)
            if stop or check:
                failed = recorder.first_failure(recorder.pending[-check_every:])
                if failed is not None:
                    raise recorder.explain_failure(failed)
            if log:
                bar.set_postfix(loss=f"{float(record.losses.mean()):.4f}", refresh=False)
                recorder.log(validate=validate, report=report)
            if save:
                recorder.save("running")
            if stop and not done:
                recorder.save("interrupted")
                wait_for_all()  # a rank that left now would have the one that writes stopped
                seen = state.step * config.batch_size
                raise KeyboardInterrupt(
                    f"stopped at {seen:,} of {config.images:,} images, all saved; "
                    + _advice(recorder)
                )


def _validation_is_due(config: TrainConfig, step: int) -> bool:
    if config.validate_from is not None:
        return config.is_due("validate_from", step, 2**0.5)
    return step % config.interval("validate_every") == 0


def _stop_together(stop: bool, check: bool, device: torch.device) -> bool:
    """Whether to stop after this step: as asked, or with many ranks at a check if any of them was asked."""
    if rank_and_count()[1] == 1:
        return stop
    if not check:
        return False
    asked = torch.tensor([float(stop)], device=device)
    return bool(over_ranks(asked)[0].any())
