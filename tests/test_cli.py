"""The command line as a person uses it."""

import dataclasses
import json

import numpy as np
import pytest

from dysigma.cli import HELP, main
from dysigma.training import TrainConfig

QUICK = [
    f"--{name}={value}"
    for name, value in {
        "images": 32, "batch-size": 8, "image-size": 8, "train-images": 32, "validation-images": 4,
        "validation-timesteps": 5, "device": "cpu",
    }.items()
] + ["--quiet"]  # fmt: skip


def test_every_configuration_field_has_a_help_text():
    assert set(HELP) == {f.name for f in dataclasses.fields(TrainConfig)}


def test_train_sample_evaluate_on_ones_own_images(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", train_images=images, test_images=images[:4])
    out = tmp_path / "run"
    train = ["train", "--data", str(tmp_path / "mine.npz"), "--out", str(out), *QUICK, "--image-size=12"]
    assert main([*train, "--train-images=16"]) == 0
    sample = ["sample", str(out), "--num-images", "3", "--steps", "4", "--device", "cpu"]
    assert main([*sample, "--npz", str(tmp_path / "s.npz")]) == 0
    assert np.load(tmp_path / "s.npz")["images"].shape == (3, 12, 12, 3)
    evaluate = ["evaluate", str(out), "--num-images", "4", "--timesteps", "5", "--elbo-timesteps", "4"]
    assert main([*evaluate, "--device", "cpu"]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert len(report["losses"]) == 5 and report["elbo"]["bits_per_dim"] > 0
    assert "bits/dim" in capsys.readouterr().out


def test_options_come_from_a_file_and_flags_win(tmp_path):
    (tmp_path / "c.toml").write_text('weighting = "min-snr"\nseed = 3\n[weighting_params]\ngamma = 2.0\n')
    out = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "c.toml"), "--seed", "5", "--out", str(out), *QUICK]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["weighting"], config["seed"], config["weighting_params"]) == ("min-snr", 5, {"gamma": 2.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weighting", "min-srn"], "min-snr"),
        (["--weighting", "min-snr", "--weighting-params", "gama=5"], "gama"),
        (["--weighting", "min-snr", "--weighting-params", "gamma"], "name=value"),
        (["--timestep-sampler", "unifrm"], "uniform"),
        (["--prediction", "velocity"], "v_prediction"),
        (["--model", "huge"], "compact"),
        (["--schedule", "quadratic"], "cosine"),
        (["--device", "cuda"], "no CUDA"),
        (["--data", "/nonexistent/folder"], "nonexistent"),
        (["--batch-size", "0"], "positive"),
        (["--batch-size", "64"], "must not exceed"),
        (["--image-size", "9"], "multiple of 2"),
        (["--config", "/nonexistent.json"], "nonexistent.json"),
        (["--zero-terminal-snr"], "v_prediction"),
        (["--bins", "5000"], "bins must not exceed"),
        (["--weighting-lr", "nan"], "weighting_lr must be"),
        (["--device", "meta"], "cannot be used"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--out", str(tmp_path / "run"), *QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--steps", "5000"], "num_steps from 1 to 1000"),
        (["sample", "RUN", "--num-images", "0"], "1 image or more"),
        (["sample", "RUN", "--sampler", "euler"], "dpm-solver"),
        (["sample", "RUN", "--seed", "-1"], "zero or more"),
        (["sample", "RUN", "--steps", "2", "--num-images", "1", "--out", "none/x.png"], "none/x.png"),
        (["evaluate", "RUN", "--num-images", "0"], "2 or more"),
        (["evaluate", "RUN", "--elbo-timesteps", "0"], "1 timestep per image"),
        (["evaluate", "RUN", "--timesteps", "0"], "from 1 to"),
        (["train", "--out", "RUN", "--resume", "--seed", "7"], "seed 0 there, 7 here"),
    ],
)
def test_bad_input_about_a_run_is_one_line_and_code_2(a_run, capsys, arguments, message):
    device = [] if arguments[0] == "train" else ["--device", "cpu"]
    assert main([a_run if word == "RUN" else word for word in arguments] + device) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("dysigma: ")


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--out", str(out), *QUICK]) == 0
    return str(out)


def test_a_used_folder_is_refused_and_untouched(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *QUICK]) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(["train", "--out", str(out), *QUICK]) == 2
    assert "not empty" in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_an_unwritable_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--out", str(tmp_path / "file" / "run"), *QUICK]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_sampling_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["sample", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
