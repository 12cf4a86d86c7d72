"""Laws of training: it learns, it resumes exactly, all arms see the same draws, and nothing is repaired in silence."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dysigma.runs import RunError, load_run
from dysigma.training import TrainConfig, TrainingDiverged, build, iterate, load_split, train, train_step

TINY = TrainConfig(
    images=192, batch_size=8, image_size=8, train_images=64, warmup_images=16, log_every=6, checkpoint_every=64,
    validate_every=96, validation_images=4, validation_timesteps=5, num_timesteps=50, bins=4, device="cpu",
)  # fmt: skip


def with_(**changes) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def data():
    return load_split(TINY, "train", torch.device("cpu"))


@pytest.mark.parametrize("weighting", ["const-eps", "min-snr", "uncertainty", "dy-sigma"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, weighting, monkeypatch):
    config = with_(weighting=weighting)
    whole = train(config, tmp_path / "whole", progress=False)

    class Killed(Exception):
        pass

    def kill_at_step_15(state, data, config):
        if state.step == 15:
            raise Killed
        return train_step(state, data, config)

    monkeypatch.setattr("dysigma.training.train_step", kill_at_step_15)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", progress=False)
    monkeypatch.undo()
    cut = train(config, tmp_path / "cut", resume=True, progress=False)
    states = [next((run.path / "checkpoint").glob("state-*")).read_bytes() for run in (whole, cut)]
    assert states[0] == states[1]
    timing = ["seconds"]
    assert whole.metrics.drop(columns=timing).to_json() == cut.metrics.drop(columns=timing).to_json()


def test_two_weightings_see_the_same_images_timesteps_and_noise(data):
    seen = []
    for weighting in ("const-eps", "min-snr"):
        config = with_(weighting=weighting)
        state = build(config, data)
        seen.append([next(iter([r])) for r, _ in zip(iterate(state, data, config), range(3), strict=False)])
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


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_training_lowers_the_validation_loss(tmp_path, prediction):
    weighting = {"epsilon": "const-eps", "sample": "const-x0", "v_prediction": "const-v"}[prediction]
    config = with_(prediction=prediction, images=640, lr=3e-3, num_timesteps=1000, weighting=weighting)
    metrics = train(config, tmp_path / "run", progress=False).metrics
    curve = [sum(v) for v in metrics.validation_losses.dropna()]
    assert curve[-1] < 0.8 * curve[0]


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
            torch.where(torch.arange(len(x0)) == 3, torch.tensor(float("nan")), losses) if timesteps[0] > 25 else losses
        )

    monkeypatch.setattr("dysigma.training.sample_losses", poisoned)
    with pytest.raises(TrainingDiverged, match=r"loss is not finite at step \d+.*bin \d.*'min-snr'"):
        train(with_(weighting="min-snr"), tmp_path / "run", progress=False)
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["losses"].count("nan") == 1 and failure["what"] == "loss"
    assert load_run(tmp_path / "run").summary["status"] == "failed"


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dysigma", "train", "--images=800000", "--batch-size=8", "--image-size=8"]
    command += ["--train-images=64", "--device=cpu", "--quiet", f"--out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 1:
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
        ({"batch_size": 0}, ValueError, "batch_size must be a positive"),
        ({"batch_size": 500}, ValueError, "must not exceed images"),
        ({"accumulate": 3}, ValueError, "multiple of accumulate"),
        ({"lr": float("nan")}, ValueError, "lr must be positive"),
        ({"seed": -1}, ValueError, "seed must not be negative"),
        ({"precision": "fp8"}, KeyError, "bfloat16"),
    ],
)
def test_a_bad_configuration_is_refused_when_it_is_made(changes, error, message):
    with pytest.raises(error, match=message):
        with_(**changes)


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
    train(with_(images=16), tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="seed 0 there, 1 here"):
        train(with_(images=16, seed=1), tmp_path / "run", resume=True, progress=False)
