"""Training meets what goes wrong: settings, signals, moved images, compilers, float16, other people's errors."""

import dataclasses
import json
import logging
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from faults import BASE, outcome

from dysigma import NoiseSchedule, training
from dysigma.cli.main import main
from dysigma.data import ImageData
from dysigma.devices import resolve_device
from dysigma.models import make_model
from dysigma.runs import RunError, load_checkpoint, load_run
from dysigma.runs.flow import pipeline_scheduler
from dysigma.training import (
    TrainConfig,
    TrainingDiverged,
    build,
    check_compiled,
    iterate,
    load_split,
    train,
)
from dysigma.training.budget import fit_in_memory, fit_to_minutes
from dysigma.training.threads import number_of_threads

CPU = torch.device("cpu")
SHORT = dataclasses.replace(BASE, images=48, checkpoint_every=16, validate_every=48)
RECORDED = Path(__file__).parent.parent / "data" / "runs" / "cifar10-cpu-small"


def with_(**changes):
    return dataclasses.replace(SHORT, **changes)


def quick(config, out, **options):
    return train(config, out, progress=False, **({"finish": False} | options))


def stop_at(monkeypatch, step):
    """Send this process a SIGTERM after so many steps."""
    take = training.train_step

    def stopped(state, *rest):
        record = take(state, *rest)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(training, "train_step", stopped)


# Settings


@pytest.mark.parametrize(
    "changes",
    [
        {"num_timesteps": 200, "bins": 100, "conflicts_from": 8},
        {"num_timesteps": 200, "weighting": "ugd", "weighting_params": {"bins": 100}},
    ],
)
def test_bins_that_no_rule_takes_are_refused_before_training(tmp_path, changes):
    with pytest.raises(ValueError, match="64") as error:
        quick(with_(**changes), tmp_path / "run")
    assert not isinstance(error.value, RunError)
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_no_overflow_is_not_called_divergence(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("of the user's own code")

    monkeypatch.setattr(training.measures, "conflicts", broken)
    with pytest.raises(ValueError, match="own code"):
        quick(with_(conflicts_from=8), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("images", np.int64(96), 96),
        ("lr", np.float32(0.5), 0.5),
        ("lr", torch.tensor(0.5), 0.5),
        ("seed", torch.tensor(3), 3),
        ("flip", np.bool_(False), False),
        ("weighting_params", {"gamma": np.float64(2)}, {"gamma": 2.0}),
    ],
)
def test_numbers_of_numpy_and_torch_are_stored_as_plain_ones(name, value, plain):
    config = with_(**{name: value})
    stored = getattr(config, name)
    assert stored == plain and type(stored) is type(plain)
    json.dumps(config.to_dict())


def test_a_float_is_no_number_of_images():
    with pytest.raises(ValueError, match="images"):
        with_(images=np.float64(96))


@pytest.mark.parametrize(
    ("shape", "factors"), [("linear", [0.75, 0.5, 0.25]), ("cosine", [0.8536, 0.5, 0.1464])]
)
def test_the_learning_rate_decays_over_the_last_images_alone(shape, factors):
    config = TrainConfig(
        images=100, batch_size=10, warmup_images=0, cooldown_images=40, cooldown=shape
    )
    found = [config.learning_rate_factor(step) for step in range(10)]
    np.testing.assert_allclose(found[:7], 1)
    np.testing.assert_allclose(found[7:], factors, atol=1e-4)


def test_building_a_network_reseeds_nobody(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    build(SHORT, load_split(SHORT, "train", CPU))
    assert torch.equal(before, torch.get_rng_state()) and not seeded


def test_auto_falls_back_to_the_cpu_where_a_gpu_cannot_be_used(monkeypatch):
    """One too old for this torch, or taken by another process; "cuda" alone is refused."""
    real = torch.zeros

    def zeros(*shape, device=None, **options):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")
        return real(*shape, device=device, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.warns(UserWarning, match="the CPU is used: .*no kernel image"):
        assert resolve_device("auto") == CPU
    with pytest.raises(ValueError, match="no kernel image"):
        resolve_device("cuda")


def test_auto_never_takes_a_device_without_float64(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == CPU


# Signals and errors


@pytest.mark.slow
def test_a_signal_during_the_final_sampling_saves_and_a_resume_finishes(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(training.measures, "sample_images", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"--resume --out .*run"):
        quick(SHORT, tmp_path / "run", finish=True)
    monkeypatch.undo()
    assert load_run(tmp_path / "run").summary["status"] == "interrupted"
    run = quick(SHORT, tmp_path / "run", resume=True, finish=True)
    assert run.summary["status"] == "done" and (run.path / "samples.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("finish", [False, True])
def test_a_signal_in_the_last_step_is_not_lost(tmp_path, monkeypatch, finish):
    stop_at(monkeypatch, SHORT.num_steps)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        quick(SHORT, tmp_path / "run", finish=finish)
    monkeypatch.undo()
    assert quick(SHORT, tmp_path / "run", resume=True).summary["step"] == SHORT.num_steps


def test_an_os_error_that_is_not_about_writing_keeps_its_own_words(tmp_path, monkeypatch):
    def no_device(*_):
        raise OSError("the camera is gone")

    monkeypatch.setattr(training, "train_step", no_device)
    with pytest.raises(OSError, match="camera") as error:
        quick(SHORT, tmp_path / "run")
    assert not isinstance(error.value, RunError)


# Images that moved


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """(a run of an .npz, stopped half-way, the new place of the file)."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "old.npz", images=images)
    config = with_(data=str(tmp_path / "old.npz"), image_size=None, train_images=None)
    quick(config, tmp_path / "whole")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        quick(config, tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    return config, tmp_path / "run", tmp_path / "new.npz"


def test_a_run_goes_on_where_its_images_lie_now(moved):
    config, out, new = moved
    run = quick(dataclasses.replace(config, data=str(new)), out, resume=True)
    assert run.config["data"] == str(new)
    (tensors, rows), (expected, expected_rows) = outcome(out), outcome(out.with_name("whole"))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert len(rows) == len(expected_rows)


@pytest.mark.parametrize("how", ["fewer", "another size", "one pixel", "another order", "leaves"])
def test_other_images_are_refused_and_nothing_is_lost(moved, how):
    config, out, new = moved
    images = np.load(new)["images"]
    changed = {
        "fewer": images[:-1],
        "another size": images[:, ::2, ::2],
        "one pixel": np.where(
            np.arange(images.size).reshape(images.shape) == 7, 255 - images, images
        ),
        "another order": images[::-1],
        "leaves": images,
    }[how]
    np.savez(new, images=changed)
    changes = {"data": "leaves", "image_size": 8} if how == "leaves" else {"data": str(new)}
    if how == "leaves":
        changes = {"data": "gaussian-fields"}
    before = load_checkpoint(out / "checkpoint")[1]
    with pytest.raises(RunError, match="not those") as error:
        quick(dataclasses.replace(config, **changes), out, resume=True)
    assert "delete" not in str(error.value)
    after = load_checkpoint(out / "checkpoint")[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_recorded_no_images_still_resumes(moved):
    config, out, new = moved
    summary = json.loads((out / "summary.json").read_text())
    for key in ("data", "norm_num_groups", "compile", "precision"):
        del summary[key]
    (out / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunError, match="configuration"):
        quick(dataclasses.replace(config, data="gaussian-fields"), out, resume=True)
    with pytest.warns(UserWarning, match="nothing tells"):
        run = quick(dataclasses.replace(config, data=str(new)), out, resume=True)
    assert run.summary["status"] == "done"


# Older runs


def test_a_recorded_run_of_an_early_version_opens(tmp_path):
    run = load_run(RECORDED)
    config = TrainConfig.from_dict(run.config)
    assert config.cooldown_images == 0 and config.threads is None
    assert config.noise_schedule().log_snr.shape == (config.num_timesteps,)
    assert run.metrics.images.iloc[-1] == config.images


@pytest.mark.slow
def test_a_checkpoint_of_an_early_version_goes_on(tmp_path, monkeypatch):
    whole = quick(SHORT, tmp_path / "whole")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        quick(SHORT, tmp_path / "run")
    monkeypatch.undo()
    new = ("threads", "cooldown", "cooldown_images", "features", "validate_from")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in new}
    (tmp_path / "run" / "config.json").write_text(json.dumps(kept))
    for path in (tmp_path / "run" / "checkpoint").glob("*.json"):
        entry = json.loads(path.read_text())
        entry.pop("check")
        for name in new:
            entry["meta"]["config"].pop(name)
        path.write_text(json.dumps(entry))
    quick(TrainConfig.from_dict(kept), tmp_path / "run", resume=True)
    ends = [load_checkpoint(path / "checkpoint")[1] for path in (whole.path, tmp_path / "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_a_compact_run_keeps_the_groups_it_was_begun_with(tmp_path):
    config = with_(model="compact", image_size=16, batch_size=2, images=2, validation_images=1)
    run = quick(config, tmp_path / "run")
    assert run.summary["norm_num_groups"] == make_model("compact").config.norm_num_groups == 8
    summary = json.loads((run.path / "summary.json").read_text())
    del summary["norm_num_groups"]
    (run.path / "summary.json").write_text(json.dumps(summary))
    run = quick(config, run.path, resume=True)
    assert run.summary["norm_num_groups"] == 32, "that of the time before it was recorded"


# Threads


def test_small_work_takes_one_thread_and_a_resumed_run_its_own_number(tmp_path):
    data = load_split(SHORT, "train", CPU)
    assert number_of_threads(SHORT, data) == 1
    assert number_of_threads(with_(threads=3), data, recorded=2) == 3
    assert number_of_threads(SHORT, data, recorded=1) == 1
    large = ImageData(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert number_of_threads(SHORT, large) == torch.get_num_threads()


@pytest.mark.slow
def test_the_number_of_threads_is_recorded_and_left_as_it_was(tmp_path):
    before = torch.get_num_threads()
    run = quick(with_(threads=2), tmp_path / "run")
    assert run.summary["provenance"]["cpu_threads"] == 2
    assert torch.get_num_threads() == before


# Compilation and number formats


@pytest.mark.slow
def test_a_compiler_that_fails_costs_a_line(tmp_path, monkeypatch):
    def no_compiler(model, **options):
        def forward(*inputs):
            raise RuntimeError("no C++ compiler\nand a hundred lines more")

        return forward

    plain = quick(SHORT, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(UserWarning, match=r"uncompiled: .*no C\+\+ compiler\)$"):
        run = quick(with_(compile=True), tmp_path / "run")
    assert "no C++ compiler" in run.summary["compile"] and plain.summary["compile"] == "no"
    assert run.summary["status"] == "done"


def test_the_reference_of_a_compiled_gradient_is_taken_in_parts(monkeypatch):
    sizes = []
    data = load_split(with_(train_images=32), "train", CPU)
    config = with_(batch_size=12, images=24)
    state = build(config, data)
    monkeypatch.setattr(training.compiled, "REFERENCE_IMAGES", 5)
    take = training.compiled.sample_losses

    def counted(model, schedule, x0, *rest, **kwargs):
        sizes.append(len(x0))
        return take(model, schedule, x0, *rest, **kwargs)

    monkeypatch.setattr(training.compiled, "sample_losses", counted)
    assert check_compiled(state, data, config) < 1e-5
    assert sizes == [5, 5, 2, 12]


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, None)])
def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    found = training.precision.low_precision(SHORT, torch.device("cuda"))
    assert found == (getattr(torch, dtype) if dtype else None)


@pytest.mark.slow
def test_float16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    config = with_(precision="float16", weighting="uncertainty", log_every=1)
    data = load_split(config, "train", CPU)
    state = build(config, data)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    start = [p.detach().clone() for p in state.trained_parameters]
    record = next(iterate(state, data, config))
    assert not record.grad_norm.isfinite() and record.losses.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(start, state.trained_parameters, strict=True))
    assert all(value.isfinite().all() for value in state.weighting.state_dict().values())

    run = quick(config, tmp_path / "run")
    assert run.summary["precision"] == "float16" and run.summary["status"] == "done"
    assert run.summary["skipped_steps"] == run.metrics.skipped_steps.dropna().sum()
    assert load_checkpoint(run.path / "checkpoint")[2]["scaler"]["scale"] > 0
    slow = quick(with_(weighting="uncertainty"), tmp_path / "slow")
    assert run.metrics.mean_loss.iloc[-1] == pytest.approx(
        slow.metrics.mean_loss.iloc[-1], rel=0.05
    )


def test_float16_without_any_scale_left_is_divergence(tmp_path):
    with pytest.raises(TrainingDiverged):
        quick(with_(precision="float16", lr=1e30, warmup_images=0), tmp_path / "run")


# Budget and trackers


def test_a_budget_of_time_becomes_a_number_of_images(monkeypatch):
    monkeypatch.setattr(training.budget, "TIMED_SHARE", 0.0)
    config = fit_to_minutes(with_(validation_images=1), 60)
    assert config.images % config.batch_size == 0 and config.images >= 80
    assert dataclasses.replace(config, images=SHORT.images) == with_(validation_images=1)


@pytest.fixture
def small_memory(monkeypatch):
    """A device on which more than two images at once do not fit, as torch says it and as others do."""
    real = training.step.sample_losses
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA out of memory.")]
    errors.append(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))

    def losses(model, schedule, x0, *rest, **kwargs):
        if len(x0) > 2:
            raise errors[len(x0) % len(errors)]
        return real(model, schedule, x0, *rest, **kwargs)

    monkeypatch.setattr(training.step, "sample_losses", losses)


def test_batches_are_divided_until_they_fit_and_that_is_told(small_memory):
    data = load_split(SHORT, "train", CPU)
    with pytest.warns(UserWarning, match="8 images at once do not fit .* 2 do"):
        fitting = fit_in_memory(with_(batch_size=8), data)
    assert fitting == with_(batch_size=8, accumulate=4)
    # One that was divided already is divided on, into parts of one size.
    with pytest.warns(UserWarning, match="10 images at once do not fit .* 2 do"):
        assert fit_in_memory(with_(batch_size=20, accumulate=2), data).accumulate == 10
    with pytest.warns(UserWarning, match="3 images at once do not fit .* 1 do"):
        assert fit_in_memory(with_(batch_size=3), data).accumulate == 3


def test_a_network_of_which_no_image_fits_is_refused(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training.step, "sample_losses", full)
    with pytest.raises(RunError, match="not even one image"):
        fit_in_memory(with_(batch_size=4), load_split(SHORT, "train", CPU))


def test_a_budget_of_time_divides_batches_that_do_not_fit(small_memory, monkeypatch):
    monkeypatch.setattr(training.budget, "TIMED_SHARE", 0.0)
    with pytest.warns(UserWarning, match="do not fit"):
        config = fit_to_minutes(with_(batch_size=8, validation_images=1), 60)
    assert config == with_(batch_size=8, validation_images=1, accumulate=4, images=config.images)


def test_a_training_that_runs_out_of_memory_says_what_fits(small_memory, tmp_path):
    with pytest.raises(RunError, match=r"do not fit .*--accumulate 4 takes the same"):
        quick(with_(batch_size=8), tmp_path / "run")


def test_running_out_of_memory_anywhere_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines")

    monkeypatch.setattr(training.loop, "train", full)
    assert main(["train", "--out", str(tmp_path / "run"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said and "--device cpu" in said


def test_a_budget_too_small_says_what_is_enough(monkeypatch):
    with pytest.raises(ValueError, match=r"too little: .*give at least"):
        fit_to_minutes(SHORT, 1e-4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one rank"):
        fit_to_minutes(SHORT, 1)


@pytest.mark.slow
def test_a_tracker_gets_every_line_and_its_absence_is_told(tmp_path, monkeypatch):
    sent = []

    class Fake:
        requires_logging_directory = False

        def __init__(self, project):
            sent.append(project)

        def store_init_configuration(self, values):
            sent.append(values["weighting"])

        def log(self, values, step):
            assert all(isinstance(value, int | float) for value in values.values())
            sent.append(step)

        def finish(self):
            sent.append("finished")

    pytest.importorskip("accelerate")
    monkeypatch.setattr("accelerate.tracking.TrackioTracker", Fake)
    run = quick(SHORT, tmp_path / "run", log_with="trackio")
    assert sent == ["dysigma", SHORT.weighting, *run.metrics.step, "finished"]
    with pytest.raises(KeyError, match="tensorboard"):
        quick(SHORT, tmp_path / "other", log_with="tensorbord")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install accelerate wandb"):
        quick(SHORT, tmp_path / "other", log_with="wandb")
    assert not (tmp_path / "other").exists()


# Flows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "shift"),
    [("flow_prediction", 1.0), ("flow_prediction", 3.0), ("sample", 3.0), ("v_prediction", 1.0)],
)
def test_a_flow_trains_to_samples_and_its_pipeline_gives_the_same(tmp_path, prediction, shift):
    config = with_(schedule="flow", shift=shift, prediction=prediction, weighting="const-v")
    run = quick(config, tmp_path / "run", finish=True)
    assert run.summary["status"] == "done" and (run.path / "samples.png").exists()
    pipeline = run.pipeline()
    scheduler, schedule = pipeline.scheduler, config.noise_schedule()
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, sigma, following in zip(
        scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True
    ):
        index = int(schedule.timestep_of(sigma[None]))
        assert int(t) == index and float((schedule.sigma[index] - sigma).abs()) < 0.04
        with torch.no_grad():
            output = pipeline.unet(x, t).sample
        numbers = torch.full((2,), index)
        velocity = schedule.to_velocity(output, x, numbers, prediction)
        expected = x + (following - sigma) * velocity
        x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(x, expected.to(x), rtol=1e-4, atol=1e-5)
    images = samples_of(pipeline)
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()
    # As diffusers opens it where dysigma is imported.
    opened = DDPMPipeline.from_pretrained(run.path / "pipeline")
    is_plain = type(opened.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    close = 0.05 if is_plain else 1e-6  # to one of 50 timesteps
    np.testing.assert_allclose(samples_of(opened), images, atol=close)
    # Folders written before hold a scheduler of diffusers whatever was predicted.
    schedule.to_diffusers().save_pretrained(run.path / "pipeline/scheduler")
    np.testing.assert_array_equal(samples_of(run.pipeline()), images)


def samples_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    found = pipeline(batch_size=2, generator=draw, num_inference_steps=3, output_type="np")
    return found.images


@pytest.mark.parametrize(
    ("prediction", "shift", "is_plain"),
    [("flow_prediction", 1.0, True), ("flow_prediction", 3.0, False), ("epsilon", 1.0, False)],
)
def test_diffusers_alone_never_samples_a_flow_wrongly_in_silence(
    tmp_path, monkeypatch, prediction, shift, is_plain
):
    schedule = NoiseSchedule.flow(50, shift=shift)
    scheduler = pipeline_scheduler(schedule, prediction)
    DDPMPipeline(make_model("micro", 8), scheduler).save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "dysigma.runs.flow")
    try:
        opened = DDPMPipeline.from_pretrained(tmp_path).scheduler
    except ValueError as error:
        assert not is_plain and "import dysigma.runs.flow" in str(error)
        return
    # Old versions of diffusers import what a file names.
    wanted = "FlowMatchEulerDiscreteScheduler" if is_plain else "FlowRunScheduler"
    assert type(opened).__name__ == wanted


def test_the_scheduler_of_a_flow_opens_without_a_warning_and_travels_to_processes(
    tmp_path, monkeypatch
):
    scheduler = pipeline_scheduler(NoiseSchedule.flow(50, shift=3.0), "sample")
    scheduler.save_pretrained(tmp_path)
    told = []
    monkeypatch.setattr(logging.getLogger("diffusers.configuration_utils"), "warning", told.append)
    opened = type(scheduler).from_pretrained(tmp_path)
    assert not told
    for name in ("num_train_timesteps", "shift", "run_prediction"):
        assert opened.config[name] == scheduler.config[name]
    sent = pickle.loads(pickle.dumps(opened))
    for each in (opened, sent):
        each.set_timesteps(5)
        scheduler.set_timesteps(5)
        assert torch.equal(each.timesteps, scheduler.timesteps)
        output, x = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        here, there = (s.step(output, s.timesteps[0], x).prev_sample for s in (scheduler, each))
        assert torch.equal(here, there)


def test_the_command_conflicts_asks_for_the_run_in_place_of_its_pipeline(tmp_path, capsys):
    scheduler = pipeline_scheduler(NoiseSchedule.flow(50), "sample")
    DDPMPipeline(make_model("micro", 8), scheduler).save_pretrained(tmp_path)
    assert main(["conflicts", str(tmp_path), "--data", "leaves"]) != 0
    assert "give the folder of the run itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 3.0},
        {"prediction": "flow_prediction"},
        {"schedule": "flow", "shift": -1.0},
    ],
)
def test_what_a_path_does_not_have_is_refused_before_training(tmp_path, changes):
    with pytest.raises(ValueError, match=r"flow|shift"):
        quick(with_(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
