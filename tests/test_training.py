"""Laws of training: it learns, it resumes exactly, all arms see the same draws, and nothing is repaired in silence."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dysigma.distances import frechet_distance, moments
from dysigma.evaluation import sample_images
from dysigma.gradients import conflicts
from dysigma.runs import RunError, load_checkpoint, load_run
from dysigma.schedule import NoiseSchedule
from dysigma.training import (
    TrainConfig,
    TrainingDiverged,
    build,
    iterate,
    load_split,
    train,
    train_step,
)

TINY = TrainConfig(
    model="micro", images=192, batch_size=8, image_size=8, train_images=64, warmup_images=16, log_every=6, checkpoint_every=64,
    validate_every=96, validation_images=4, validation_timesteps=5, num_timesteps=50, bins=4, device="cpu",
)  # fmt: skip


def with_(**changes) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def data():
    return load_split(TINY, "train", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("stopped", {"weighting": "min-snr"}),
        (
            "killed",
            {
                "weighting": "dy-sigma",
                "timestep_sampler": "loss-second-moment",
                "sampler_params": {"bins": 5},
            },
        ),
        ("stopped", {"weighting": "ugd", "weighting_params": {"gramian_every": 4, "bins": 4}}),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, how, changes, monkeypatch):
    config = with_(model="micro", **changes)
    whole = train(config, tmp_path / "whole", progress=False, finish=False)

    class Killed(Exception):
        pass

    def kill_at_step_15(state, data, config):
        if state.step == 15:
            raise Killed
        return train_step(state, data, config)

    @contextlib.contextmanager
    def stop_at_step_15():
        yield lambda: next(steps) >= 15  # asked once a step

    out, steps = tmp_path / how, itertools.count(1)
    if how == "killed":
        monkeypatch.setattr("dysigma.training.train_step", kill_at_step_15)
    else:
        monkeypatch.setattr("dysigma.training.loop.stop_signals", stop_at_step_15)
    with pytest.raises(Killed if how == "killed" else KeyboardInterrupt):
        train(config, out, progress=False)
    monkeypatch.undo()
    cut = train(config, out, resume=True, progress=False, finish=False)
    kept = [load_checkpoint(run.path / "checkpoint")[:2] for run in (whole, cut)]
    assert kept[0][0] == kept[1][0] == 24 and kept[0][1].keys() == kept[1][1].keys()
    assert all(torch.equal(kept[0][1][name], kept[1][1][name]) for name in kept[0][1])
    rows = [run.metrics.drop(columns="seconds").to_json() for run in (whole, cut)]
    assert rows[0] == rows[1]


def test_two_weightings_see_the_same_images_timesteps_and_noise(data):
    seen = []
    for weighting in ("const-eps", "min-snr"):
        config = with_(weighting=weighting)
        state = build(config, data)
        seen.append([r for r, _ in zip(iterate(state, data, config), range(3), strict=False)])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a.timesteps, b.timesteps)
    # Before the first update both networks are the same, so equal losses mean equal images and noise.
    assert torch.equal(seen[0][0].losses, seen[1][0].losses)
    assert not torch.equal(seen[0][2].losses, seen[1][2].losses)


def test_accumulation_gives_the_gradient_of_the_whole_batch(data):
    grads = []
    for accumulate in (1, 4):
        config = with_(accumulate=accumulate, weighting="min-snr")
        state = build(config, data)
        train_step(state, data, config)
        grads.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_stopping_the_loop_leaves_a_whole_step(data):
    state = build(TINY, data)
    for record in iterate(state, data, TINY):
        if record.step == 2:
            break
    assert state.step == 3


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_training_lowers_the_validation_loss(tmp_path, prediction):
    weighting = {"epsilon": "const-eps", "sample": "const-x0", "v_prediction": "const-v"}[
        prediction
    ]
    config = with_(
        prediction=prediction, images=640, lr=3e-3, num_timesteps=1000, weighting=weighting
    )
    metrics = train(config, tmp_path / "run", progress=False, finish=False).metrics
    curve = [sum(v) for v in metrics.validation_losses.dropna()]
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.slow
def test_conflicts_and_distances_are_measured_at_the_averaged_weights_and_change_nothing(tmp_path):
    plain = train(TINY, tmp_path / "plain", progress=False, finish=False)
    config = with_(conflicts_from=24, distance_images=8, distance_steps=2)
    measured = train(config, tmp_path / "measured", progress=False)
    rows = measured.metrics
    with_reports = rows[rows.conflicts.notna()]
    assert with_reports.images.tolist() == [0, 24, 48, 96, 192], (
        "at the start, at every doubling, at the end"
    )
    assert (
        rows[rows.distance.notna()].images.tolist()
        == rows[rows.validation_losses.notna()].images.tolist()
    )
    weights = [load_checkpoint(run.path / "checkpoint")[1] for run in (plain, measured)]
    assert all(
        torch.equal(weights[0][name], weights[1][name])
        for name in weights[0]
        if name.startswith("model.")
    )

    model, split = measured.pipeline().unet, load_split(config, "train", torch.device("cpu"))
    report = conflicts(
        model, split.images, NoiseSchedule.linear(50), 4, batch_per_bin=8, progress=False
    )
    kept = with_reports.conflicts.iloc[-1]
    np.testing.assert_allclose(kept["gramian"], report.gramian, rtol=1e-3, atol=1e-9)
    assert kept["stationarity"] == pytest.approx(report.stationarity, rel=1e-3)

    samples = sample_images(model, NoiseSchedule.linear(50), (8, 3, 8, 8), num_steps=2)
    pixels = [images.flatten(1).double() / 127.5 - 1 for images in (samples, split.images)]
    assert rows.distance.iloc[-1] == pytest.approx(frechet_distance(*map(moments, pixels)))


@pytest.mark.slow
def test_a_finished_run_opens_in_diffusers_and_in_a_table(tmp_path):
    run = train(with_(conditional=True), tmp_path / "run", progress=False)
    assert run.summary["status"] == "done" and run.summary["images"] == 192
    assert {"torch", "diffusers", "device", "dysigma_commit"} <= run.summary["provenance"].keys()
    assert run.pipeline().unet.config.sample_size == 8
    assert len(run.metrics.bin_losses.dropna().iloc[0]) == 4
    assert load_run(run.path).config["conditional"] is True
    assert (run.path / "samples.png").stat().st_size < 300_000


def test_a_non_finite_loss_stops_the_run_and_names_step_bin_and_weighting(tmp_path, monkeypatch):
    def poisoned(model, schedule, x0, noise, timesteps, *args, **kwargs):
        losses = torch.ones(len(x0), requires_grad=True) * sum(p.sum() for p in model.parameters())
        return (
            torch.where(torch.arange(len(x0)) == 3, torch.tensor(float("nan")), losses)
            if timesteps[0] > 25
            else losses
        )

    monkeypatch.setattr("dysigma.training.step.sample_losses", poisoned)
    with pytest.raises(TrainingDiverged, match=r"not finite.*step \d+.*bin \d.*'min-snr'"):
        train(with_(weighting="min-snr"), tmp_path / "run", progress=False)
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["losses"].count("nan") == 1 and failure["what"] == "loss"
    assert load_run(tmp_path / "run").summary["status"] == "failed"


def test_a_network_destroyed_by_its_last_step_is_not_called_done(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"validation.*not finite.*step 1"):
        train(with_(images=8, lr=1e30, warmup_images=0), tmp_path / "run", progress=False)
    assert load_run(tmp_path / "run").summary["status"] == "failed"
    assert not (tmp_path / "run" / "pipeline").exists()


@pytest.mark.slow
def test_the_adaptive_sampler_learns_from_weighted_losses(data):
    config = with_(
        weighting="const-x0",
        timestep_sampler="loss-second-moment",
        sampler_params={"bins": 5},
        images=1600,
    )
    state = build(config, data)
    for _ in iterate(state, data, config):
        pass
    # On an epsilon network const-x0 puts nearly all weight on the noisy end, so that is where to sample.
    probabilities = state.sampler.probabilities()
    assert probabilities[-10:].sum() > 2 * probabilities[:10].sum()


def test_labels_that_the_training_images_lack_are_refused(tmp_path):
    images = np.zeros((8, 8, 8, 3), np.uint8)
    labels = np.array([0, 1, 2, 3] * 2)
    np.savez(
        tmp_path / "x.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    with pytest.raises(ValueError, match="more train_images"):
        train(
            with_(data=str(tmp_path / "x.npz"), train_images=2, conditional=True),
            tmp_path / "run",
            progress=False,
        )
    with pytest.raises(ValueError, match="needs labels"):
        train(with_(data="gaussian-fields", conditional=True), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "dysigma",
        "train",
        "--images=800000",
        "--batch-size=8",
        "--image-size=8",
    ]
    command += ["--train-images=64", "--device=cpu", "--quiet", f"--out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and len(
            (out / "metrics.jsonl").read_text().splitlines()
        ) > 1:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and f"dysigma train --resume --out {out}" in error
    run = load_run(out)
    assert run.summary["status"] == "interrupted" and (out / "checkpoint" / "latest.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "big"}, KeyError, "compact"),
        ({"schedule": "cosin"}, KeyError, "cosine"),
        ({"prediction": "velocity"}, ValueError, "v_prediction"),
        ({"batch_size": 0}, ValueError, "batch_size must be positive"),
        ({"batch_size": 500}, ValueError, "must not exceed images"),
        ({"accumulate": 3}, ValueError, "multiple of accumulate"),
        ({"lr": float("nan")}, ValueError, "lr must be positive and below inf; got nan"),
        ({"lr": "a"}, ValueError, "lr must be float; got 'a'"),
        ({"weighting_lr": -1.0}, ValueError, "weighting_lr must be positive"),
        ({"seed": -1}, ValueError, "seed must be 0 or more"),
        ({"seed": 1.5}, ValueError, "seed must be int"),
        ({"seed": 2**64}, ValueError, "seed must be 0 or more and below 9223372036854775808"),
        ({"flip": "no"}, ValueError, "flip must be bool"),
        ({"compile": "no"}, ValueError, "compile must be bool"),
        ({"device": None}, ValueError, "device must be str"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be positive"),
        ({"weighting_params": "kappa"}, ValueError, "weighting_params must be dict"),
        ({"bins": 51}, ValueError, "bins must not exceed num_timesteps 50"),
        ({"validation_timesteps": 51}, ValueError, "validation_timesteps must not exceed"),
        ({"precision": "fp8"}, KeyError, "bfloat16"),
    ],
)
def test_a_bad_configuration_is_refused_when_it_is_made(changes, error, message):
    with pytest.raises(error, match=message):
        with_(**changes)


MICRO = {"model": "micro", "images": 16, "num_timesteps": 50}
ONE = {"images": 4, "batch_size": 1, "weighting_params": {"bins": 20, "gramian_every": 2}}
RIGHT = {
    "a batch of 1, 20 bins": ONE | {"weighting": "ugd"},
    "a batch of 1, all that adapts": ONE | {
        "weighting": "dy-sigma", "weighting_params": {"variant": "conflict", "floor": "online", "bins": 20},
        "timestep_sampler": "loss-second-moment",  "sampler_params": {"bins": 20},
    },
    "a batch of 1, stratified": {"images": 4, "batch_size": 1, "timestep_sampler": "stratified"},
    "pure noise at the end": {"zero_terminal_snr": True, "prediction": "v", "weighting": "dy-sigma"},
    "two timesteps": {"num_timesteps": 2, "bins": 2, "validation_timesteps": 2},
    "bfloat16": {"precision": "bfloat16"},
    "gray": {"data": "gray.npz", "image_size": None, "train_images": None},
    "wide, its middle": {"data": "wide.npz", "image_size": 8, "train_images": None},
    "two images": {"data": "two.npz", "image_size": None, "train_images": None},
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shape in {"gray": (20, 8, 8), "wide": (20, 8, 12, 3), "two": (2, 8, 8, 3)}.items():
        np.savez(
            f"{name}.npz", images=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_unusual_settings_train(tmp_path, files, name):
    config = with_(**(MICRO | RIGHT[name]))
    run = train(config, tmp_path / "run", progress=False, finish=False)
    assert run.metrics.step.iloc[-1] == config.num_steps
    # A network that knows nothing loses about as much as its target varies; 1 for noise.
    assert 0.3 < run.metrics.mean_loss.iloc[-1] < 3
    assert all(0 <= weight < np.inf for weight in run.metrics.bin_weights.iloc[-1])


def test_wide_images_are_cropped_to_their_middle(files):
    data = load_split(
        with_(data="wide.npz", image_size=8, train_images=None), "train", torch.device("cpu")
    )
    middle = torch.from_numpy(np.load("wide.npz")["images"][:9, :, 2:10]).permute(0, 3, 1, 2)
    assert torch.equal(data.images[:9], middle)


OVERFLOWS = "gives weights that are all 0 or not finite"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": "gray.npz", "image_size": None, "train_images": None, "conditional": True},
            "needs labels",
        ),
        ({"zero_terminal_snr": True}, "epsilon' has no weight where SNR = 0"),
        ({"num_timesteps": 1, "bins": 1, "validation_timesteps": 1}, "T >= 2"),
        (
            {"normalize": False, "weighting": "min-snr", "weighting_params": {"gamma": 1e-300}},
            OVERFLOWS,
        ),
        (
            {"normalize": False, "weighting": "edm", "weighting_params": {"sigma_data": 1e-30}},
            OVERFLOWS,
        ),
        (
            {"weighting": "variance-aware", "weighting_params": {"strength": 1e300}},
            "strength must be a number",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused_and_leave_no_folder(
    tmp_path, files, changes, message
):
    with pytest.raises(ValueError, match=message):
        train(with_(**(MICRO | changes)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "loss is not finite at step 1"),
        (
            {"weighting": "ugd", "weighting_params": {"gramian_every": 1, "bins": 4}},
            "at step 1, weighting 'ugd': bins",
        ),
        ({"conflicts_from": 8}, "at step 1, weighting 'const-eps': bins"),
        (
            {"weighting": "uncertainty", "weighting_lr": 1e38, "lr": 1e-3},
            "loss is not finite at step 1",
        ),
    ],
)
def test_overflow_is_divergence_wherever_it_is_met_first(tmp_path, changes, what):
    config = with_(**(MICRO | {"images": 64, "lr": 1e30, "warmup_images": 0} | changes))
    with pytest.raises(TrainingDiverged, match=what):
        train(config, tmp_path / "run", progress=False)
    assert load_run(tmp_path / "run").summary["status"] == "failed"


def test_validations_on_a_geometric_grid_fall_on_its_nearest_steps():
    config = with_(batch_size=32, images=20_000, validate_from=250)
    due = [step * 32 for step in range(625) if config.is_due("validate_from", step, 2**0.5)]
    assert due == [32 * round(7 * 2 ** (k / 2)) for k in range(13)]
    assert [s for s in range(50) if with_(conflicts_from=24).is_due("conflicts_from", s, 2.0)] == [
        3,
        6,
        12,
        24,
        48,
    ]


def test_configuration_round_trip_and_unknown_keys():
    assert TrainConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(KeyError, match="learning_rate"):
        TrainConfig.from_dict({"learning_rate": 1})


def test_folders_in_use_are_left_as_they_are(tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(RunError, match="not empty"):
        train(TINY, tmp_path, progress=False)
    with pytest.raises(RunError, match="no run to resume"):
        train(TINY, tmp_path, resume=True, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_resuming_with_another_configuration_names_the_difference(tmp_path):
    train(with_(images=16), tmp_path / "run", progress=False, finish=False)
    with pytest.raises(RunError, match="seed 0 there, 1 here"):
        train(with_(images=16, seed=1), tmp_path / "run", resume=True, progress=False)
