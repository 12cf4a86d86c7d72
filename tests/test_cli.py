"""The command line as a person uses it."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file
from words import in_order

import dysigma
import dysigma.evaluation
from dysigma.cli import train as train_command
from dysigma.cli.main import _is_foreign, main, make_parser
from dysigma.floors import floor_bounds
from dysigma.runs.folder import describe_loss
from dysigma.training import TrainConfig

QUICK = [
    f"--{name}={value}"
    for name, value in {
        "images": 32, "batch-size": 8, "image-size": 8, "train-images": 32, "validation-images": 4,
        "validation-timesteps": 5, "device": "cpu",
    }.items()
] + ["--quiet"]  # fmt: skip


@pytest.mark.slow
def test_train_sample_evaluate_on_ones_own_images(tmp_path, capsys):
    """Distances by pixels and by another network stand beside the losses in one file."""
    images = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", train_images=images, test_images=images[:4])
    out = tmp_path / "run"
    train = [
        "train",
        "--data",
        str(tmp_path / "mine.npz"),
        "--out",
        str(out),
        *QUICK,
        "--image-size=12",
    ]
    assert main([*train, "--train-images=16"]) == 0
    loss = dysigma.load_run(out).summary["validation_loss"]
    first = capsys.readouterr().out
    words = describe_loss(loss, "epsilon", 4)
    assert first == f"done: 32 images, {words}, {out}\n"
    assert main(["train", "--out", str(out), "--resume", "--quiet"]) == 0
    again = capsys.readouterr().out
    assert "finished already" in again and again.endswith(f"{words}, {out}\n")
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"{out}: const-eps, {words}\n")
    sample = ["sample", str(out), "--num-images", "3", "--steps", "4", "--device", "cpu"]
    assert main([*sample, "--npz", str(tmp_path / "s.npz")]) == 0
    assert np.load(tmp_path / "s.npz")["images"].shape == (3, 12, 12, 3)
    torch.jit.save(
        torch.jit.trace(torch.nn.Flatten(), torch.zeros(2, 3, 12, 12)), str(tmp_path / "net.pt")
    )
    evaluate = [
        "evaluate",
        str(out),
        "--num-images",
        "4",
        "--timesteps",
        "5",
        "--elbo-timesteps",
        "4",
    ]
    evaluate += ["--device", "cpu", "--samples", "20", "--nfe", "3", "--metric"]
    for metric in (
        ["pixels", "--sampler", "heun", "--nfe", "4"],
        ["own", "--features", str(tmp_path / "net.pt")],
    ):
        assert main([*evaluate, *metric]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert len(report["losses"]) == 5 and report["elbo"]["bits_per_dim"] > 0
    pixels, own = (report["distances"][name] for name in ("pixels", "fd_own"))
    assert (pixels["metric"], pixels["sampler"], own["metric"]) == (
        "pixels (not FID)",
        "heun",
        "fd_own (not FID)",
    )
    assert pixels["nfe"] == 3, "heun evaluates an odd number of times"
    assert (own["images"], own["reference_images"], own["features"], own["nfe"]) == (20, 24, 432, 3)
    assert own["sha256"] == hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    said = capsys.readouterr().out
    assert describe_loss(float(np.mean(report["losses"])), "epsilon", 4) in said
    assert "bits/dim" in said
    assert "20 samples (ddim, 3 evaluations) to 24 unaugmented training" in said
    assert "compare it at equal numbers alone" in said


@pytest.mark.slow
def test_evaluate_brackets_the_floor_from_training_images(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), *QUICK]) == 0
    evaluate = ["evaluate", str(run), "--device=cpu", "--num-images=4", "--timesteps=5"]
    capsys.readouterr()
    assert main([*evaluate, "--elbo-timesteps=2", "--floor-images=30"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    bounds = floor_bounds(
        dysigma.leaves(30, 8),
        dysigma.NoiseSchedule.linear(),
        "epsilon",
        torch.tensor(report["timesteps"]),
        num_samples=128,
    )
    assert report["floor"]["images"] == 30
    assert report["floor"]["lower"] == pytest.approx(bounds.lower.tolist(), rel=1e-6)
    assert report["floor"]["upper"] == pytest.approx(bounds.upper().tolist(), rel=1e-6)
    assert f"{float(bounds.upper().mean()):.4f}" in capsys.readouterr().out
    assert main([*evaluate, "--floor-images=2"]) == 2


def test_the_reference_leaves_out_images_that_are_not_exact_and_holds_out_what_it_measures(
    tmp_path, capsys
):
    """Images that only approximate the originals are black here: one of them would be seen in the mean."""
    images = np.random.default_rng(0).integers(100, 256, (90, 8, 8, 3), dtype=np.uint8)
    exact = np.arange(90) % 3 > 0
    images[~exact] = 0
    splits = {
        f"{s}_{k}": v for s in ("train", "test") for k, v in (("images", images), ("exact", exact))
    }
    np.savez(tmp_path / "d.npz", **splits)
    common = [
        "evaluate",
        "--reference-only",
        "--data",
        str(tmp_path / "d.npz"),
        "--metric",
        "pixels",
    ]
    out = tmp_path / "d.json"
    assert main([*common, "--samples", "20", "25", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(r["of"], r["images"], r["reference_images"]) for r in rows] == [
        (f"{split} images", count, 35)
        for count in (20, 25)
        for split in ("held-out training", "test")
    ]
    assert max(r["distance"] for r in rows) < 150  # black images against these: more than 190
    assert main([*common, "--samples", "45"]) == 2
    assert "has 60 training images; --samples holds 45 of them out" in capsys.readouterr().err


def test_without_options_a_first_run_is_told_as_a_command(tmp_path, capsys):
    def configured(*words):
        args = make_parser().parse_args(["train", *words])
        return train_command._configuration(args)

    first = configured("--out", str(tmp_path), "--seed", "3")
    said = capsys.readouterr().out
    words = shlex.split(said.split("dysigma train ")[1])
    assert first == configured(*words)
    assert (first.data, first.prediction, first.weighting) == ("shapes", "sample", "min-snr")

    # The command that is told has what was given, and no number of images if minutes decide.
    configured("--out", "my runs/1", "--minutes", "2.5", "--no-compile")
    words = shlex.split(capsys.readouterr().out)
    assert words[-4:] == ["--minutes", "2.5", "--out", "my runs/1"]
    assert "--no-compile" in words and "--images" not in words

    # One option of what is learned, or a file, and the plain defaults hold.
    assert configured("--out", str(tmp_path), "--bins", "5") == TrainConfig(bins=5)
    (tmp_path / "empty.toml").write_text("")
    assert configured("--out", "r", "--config", str(tmp_path / "empty.toml")) == TrainConfig()
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_options_come_from_a_file_and_flags_win(tmp_path):
    (tmp_path / "c.toml").write_text(
        'weighting = "min-snr"\nseed = 3\n[weighting_params]\ngamma = 2.0\n'
    )
    out = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--config",
                str(tmp_path / "c.toml"),
                "--seed",
                "5",
                "--out",
                str(out),
                *QUICK,
            ]
        )
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["weighting"], config["seed"], config["weighting_params"]) == (
        "min-snr",
        5,
        {"gamma": 2.0},
    )


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
        (["--device", "cuda"], "cannot be used"),
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--out", str(tmp_path / "run"), *QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--steps", "5000"], "num_steps from 1 to 1000"),
        (["sample", "RUN", "--steps", "0"], "--steps must be 1"),
        (["sample", "RUN", "--num-images", "0"], "--num-images must be 1"),
        (["sample", "RUN", "--sampler", "euler"], "dpm-solver"),
        (["sample", "RUN", "--seed", "-1"], "--seed must be 0"),
        (["evaluate", "RUN", "--seed", "-1"], "--seed must be 0"),
        (["conflicts", "RUN", "--seed", "-1"], "--seed must be 0"),
        (["conflicts", "RUN", "--micro-batches", "2"], "--micro-batches must be 6"),
        (["conflicts", "RUN", "--batch-per-bin", "0"], "--batch-per-bin must be 1"),
        (["conflicts", "RUN", "--num-images", "0"], "--num-images must be 1"),
        (["conflicts", "RUN", "--bins", "65"], "--bins must be from 2 to 64"),
        (["conflicts", "RUN", "--weighting", "min-srn"], "unknown weighting"),
        (["conflicts", "RUN", "--weighting", "uncertainty"], "learns"),
        (["benchmark", "--rounds", "0"], "--rounds must be 1"),
        (["benchmark", "--batch-size", "32", "0"], "--batch-size must be 1"),
        (["sample", "RUN", "--out", "x.txt"], ".png"),
        (["sample", "RUN", "--out", "RUN/config.json/x.png"], "cannot write"),
        (["evaluate", "RUN", "--out", "RUN/config.json/x.json"], "is a file, not a folder"),
        (["conflicts", "RUN", "--out", "RUN/config.json"], "is a file, not a folder"),
        (["conflicts", "RUN", "--out", "RUN/config.json/new"], "is a file, not a folder"),
        (["conflicts", "RUN", "--transfer", "--transfer-steps", "0"], "--transfer-steps"),
        (["benchmark", "--out", "RUN/config.json/x.json"], "is a file, not a folder"),
        (["benchmark", "--out", "x.png"], "must end in .json"),
        (["sample", "RUN", "--npz", "x.png"], ".npz"),
        (["evaluate", "RUN", "--out", "x.png"], ".json"),
        (["evaluate", "RUN", "--num-images", "0"], "--num-images"),
        (["evaluate", "RUN", "--elbo-timesteps", "0"], "--elbo-timesteps"),
        (["evaluate", "RUN", "--timesteps", "0"], "--timesteps must be 1"),
        (["evaluate", "RUN", "--timesteps", "5000"], "from 1 to 1000"),
        (["evaluate", "RUN", "--metric", "none.pt"], "none.pt does not exist"),
        (["evaluate", "RUN", "--metric", "pixels", "--nfe", "0"], "--nfe must be 1"),
        (["evaluate", "RUN", "--metric", "pixels", "--sampler", "euler"], "dpm-solver"),
        (["evaluate", "RUN", "--metric", "fid", "--features", "none.pt"], "no file none.pt"),
        (["evaluate", "RUN", "--metric", "pixels", "--samples", "5"], "20 or more"),
        (["evaluate", "RUN", "--samples", "20", "30"], "for --reference-only"),
        (["evaluate"], "name the run"),
        (["evaluate", "RUN", "--features", "none.pt"], "belongs to a --metric"),
        (
            ["evaluate", "RUN", "--metric", "pixels", "--features", "none.pt"],
            "belongs to a --metric",
        ),
        (
            ["evaluate", "RUN", "--metric", "pixels", "--reference-images", "-5"],
            "must be 20 or more",
        ),
        (["evaluate", "RUN", "--reference-only"], "choose a --metric"),
        (["evaluate", "--reference-only", "--metric", "pixels"], "a RUN or of --data"),
        (["train", "--out", "RUN", "--resume", "--seed", "7"], "seed 0 there, 7 here"),
    ],
)
def test_bad_input_about_a_run_is_one_line_and_code_2(
    a_run, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(
        dysigma.runs.Run, "pipeline", None
    )  # it is told before the network is loaded
    device = [] if arguments[0] == "train" else ["--device", "cpu"]
    assert main([word.replace("RUN", a_run) for word in arguments] + device) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("dysigma: ")


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--out", str(out), *QUICK]) == 0
    return str(out)


def test_sample_makes_the_folder_of_its_files(a_run, tmp_path):
    out, npz = tmp_path / "new" / "x.png", tmp_path / "other" / "y.npz"
    options = ["--num-images", "2", "--steps", "2", "--out", str(out), "--npz", str(npz)]
    assert main(["sample", a_run, *options, "--device", "cpu"]) == 0
    assert out.exists() and np.load(npz)["images"].shape == (2, 8, 8, 3)


def test_sample_shows_a_run_that_has_not_ended_and_says_so(a_run, tmp_path):
    out = tmp_path / "stopped"
    shutil.copytree(a_run, out)
    shutil.rmtree(out / "pipeline")
    command = ["sample", str(out), "--num-images", "2", "--steps", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "dysigma", *command], capture_output=True, text=True, check=True
    )
    assert (out / "samples-ddim-2.png").exists()
    line = done.stderr.splitlines()[0]
    assert line.startswith("dysigma: ") and "has not ended" in line


@pytest.mark.slow
def test_evaluate_keeps_losses_when_sampling_is_stopped(a_run, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(dysigma.evaluation, "sample_images", stopped)
    out = tmp_path / "e.json"
    options = [
        "--num-images",
        "4",
        "--timesteps",
        "5",
        "--elbo-timesteps",
        "4",
        "--metric",
        "pixels",
    ]
    assert main(["evaluate", a_run, *options, "--out", str(out), "--device", "cpu"]) == 130
    assert len(json.loads(out.read_text())["losses"]) == 5


OWN = """
def fails(log_snr):
    return {}["gone"]

def refuses(log_snr):
    raise ValueError("try gamma = 2")

def breaks(log_snr):
    return log_snr.no_such_method()
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", ["line 3", "KeyError", "gone"]),
        ("refuses", ["line 6", "ValueError", "try gamma = 2"]),
        ("breaks", ["line 9", "AttributeError", "no_such_method"]),
    ],
)
def test_a_module_of_ones_own_fails_in_its_own_words(tmp_path, monkeypatch, capsys, name, words):
    module = f"own_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    train = ["train", "--out", str(tmp_path / "run"), *QUICK, "--weighting", f"{module}:{name}"]
    assert main(train) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in [f"{module}.py", *words]) and "Traceback" not in error
    kind = {"fails": KeyError, "refuses": ValueError, "breaks": AttributeError}[name]
    with pytest.raises(kind):
        main([*train, "--debug"])


def test_help_of_train_shows_common_options_first_and_every_field_once(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    fields = [field.name for field in dataclasses.fields(dysigma.TrainConfig)]
    for name in fields:
        flag = "--" + name.replace("_", "-")
        assert len(re.findall(rf"^  {flag}[ ,]", text, re.M)) == 1, flag
    assert text.index("--weighting STR") < text.index("--data-root") < text.index("--grad-clip")


@pytest.mark.slow
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


SMALL = ["--bins=3", "--micro-batches=6", "--batch-per-bin=2", "--device=cpu"]
BLOCKS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def a_pipeline(folder, scheduler=None, network=None, **options):
    """A folder that diffusers alone wrote: {file: digest} of what it holds comes with it."""
    network = network or UNet2DModel(**BLOCKS, **PLAIN, **options)
    DDPMPipeline(network, scheduler or DDPMScheduler()).save_pretrained(folder)
    return str(folder), contents(folder)


def contents(folder):
    return {
        str(f): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def reread(out):
    """(record, ConflictReport) of a folder that the command wrote."""
    record = json.loads((out / "conflicts.json").read_text())
    return record, dysigma.ConflictReport.from_dict(record["report"])


def same(read, expected):
    for name, value in vars(expected).items():
        kept = getattr(read, name)
        if isinstance(value, torch.Tensor | float):
            torch.testing.assert_close(kept, value, rtol=1e-12, atol=0, equal_nan=True, msg=name)
        else:
            assert kept == value, name


@pytest.mark.slow
def test_conflicts_of_a_pipeline_are_those_of_its_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, num_train_timesteps=40
    )
    path, before = a_pipeline(tmp_path / "someones", scheduler)
    options = [
        "--num-images=20",
        "--binning=log-snr",
        "--seed=3",
        "--transfer",
        "--transfer-steps=2",
    ]
    assert main(["conflicts", path, *SMALL, *options]) == 0
    assert contents(tmp_path / "someones") == before
    out = tmp_path / "conflicts-someones"
    assert sorted(f.name for f in out.iterdir()) == [
        "conflicts.json",
        "conflicts.png",
        "transfer.json",
        "transfer.png",
    ]
    record, report = reread(out)
    assert (
        str(tmp_path) not in json.dumps(record)
        and record["provenance"]["torch"] == torch.__version__
    )
    assert (record["path"], record["data"], record["images"], record["weighting"]) == (
        "someones",
        "leaves",
        20,
        None,
    )

    schedule, images = dysigma.NoiseSchedule.from_diffusers(scheduler), dysigma.leaves(20, 8).images
    network = UNet2DModel.from_pretrained(path, subfolder="unet")
    common = {"prediction_type": "v_prediction", "seed": 3, "progress": False}
    bins = dysigma.Bins.equal_log_snr(schedule.log_snr, 3)
    same(
        report,
        dysigma.conflicts(
            network, images, schedule, bins, micro_batches=6, batch_per_bin=2, **common
        ),
    )
    transfer = json.loads((out / "transfer.json").read_text())
    expected = dysigma.gradients.negative_transfer(
        network, images, schedule, bins, steps=2, **common
    )
    torch.testing.assert_close(
        torch.tensor(transfer["change"], dtype=torch.float64), expected.change
    )
    text = capsys.readouterr().out
    assert "someones: v_prediction network, 20 images of leaves, weighting none" in text
    assert all(f"\n{word}: " in text for word in ("Stationarity", "Transfer"))
    assert "Mean cosine of " in text or "Undetermined: 3 of 3 pairs" in text


@pytest.mark.slow
def test_conflicts_of_a_run_are_on_its_images_and_averaged_weights(a_run, tmp_path, capsys):
    assert main(["conflicts", a_run, *SMALL, "--weighting=min-snr"]) == 0
    run = dysigma.load_run(a_run)
    record, report = reread(run.path / "conflicts")
    assert (record["images"], record["weighting"], record["report"]["edges"]) == (
        32,
        "min-snr",
        [0, 333, 666, 1000],
    )
    schedule, options = (
        dysigma.NoiseSchedule.linear(1000),
        {"micro_batches": 6, "batch_per_bin": 2, "progress": False},
    )
    options["weighting"] = dysigma.make_weighting("min-snr", schedule)
    same(
        report,
        dysigma.conflicts(
            run.pipeline().unet, dysigma.leaves(32, 8).images, schedule, 3, **options
        ),
    )
    assert main(["conflicts", a_run, *SMALL, "--num-images=8", "--out", str(tmp_path)]) == 0
    assert reread(tmp_path)[0]["images"] == 8


@pytest.mark.slow
def test_conflicts_of_a_class_conditional_network_use_the_labels(tmp_path):
    path, _ = a_pipeline(tmp_path / "p", num_class_embeds=10)
    out = tmp_path / "out"
    assert main(["conflicts", path, *SMALL, "--num-images=20", "--out", str(out)]) == 0
    data, network = dysigma.leaves(20, 8), UNet2DModel.from_pretrained(path, subfolder="unet")
    options = {"micro_batches": 6, "batch_per_bin": 2, "progress": False}
    schedule = dysigma.NoiseSchedule.from_diffusers(DDPMScheduler())
    expected = dysigma.conflicts(
        network, data, schedule, 3, model_kwargs={"class_labels": data.labels}, **options
    )
    same(reread(out)[1], expected)


@pytest.mark.slow
def test_conflicts_of_a_flow_are_those_of_the_network_told_its_noise_level(tmp_path, monkeypatch):
    """As diffusers trains it: the network is given scheduler.timesteps, 1000 s, from noisy to clean."""
    monkeypatch.chdir(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    path, _ = a_pipeline(tmp_path / "flow", scheduler)
    assert main(["conflicts", path, *SMALL, "--num-images=20"]) == 0
    network = UNet2DModel.from_pretrained(path, subfolder="unet")

    class AsDiffusersCallsIt(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x_t, timesteps):
            return self.network(x_t, scheduler.timesteps[1000 - 1 - timesteps])

    expected = dysigma.conflicts(
        AsDiffusersCallsIt(),
        dysigma.leaves(20, 8).images,
        dysigma.NoiseSchedule.flow(shift=3.0),
        3,
        prediction_type="flow_prediction",
        micro_batches=6,
        batch_per_bin=2,
        progress=False,
    )
    report = reread(tmp_path / "conflicts-flow")[1]
    torch.testing.assert_close(report.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(report.gramian, expected.gramian, rtol=1e-3, atol=1e-9)
    assert (
        "conv_in" in report.group_names and report.settings["prediction_type"] == "flow_prediction"
    )


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_pictures_are_measured_by_gray_and_by_colour_networks(tmp_path, monkeypatch, channels):
    monkeypatch.chdir(tmp_path)
    gray = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "gray.npz", train_images=gray, test_images=gray[:2])
    path, _ = a_pipeline(tmp_path / "p", in_channels=channels, out_channels=channels)
    assert main(["conflicts", path, *SMALL, "--data=gray.npz"]) == 0
    network = UNet2DModel.from_pretrained(path, subfolder="unet")
    expected = dysigma.conflicts(
        network,
        torch.from_numpy(gray)[:, None].repeat(1, channels, 1, 1),
        dysigma.NoiseSchedule.from_diffusers(DDPMScheduler()),
        3,
        micro_batches=6,
        batch_per_bin=2,
        progress=False,
    )
    same(reread(tmp_path / "conflicts-p")[1], expected)


def test_sentences_say_what_the_report_does(capsys):
    torch.manual_seed(1)
    network, schedule = torch.nn.Conv2d(3, 3, 3, padding=1), dysigma.NoiseSchedule.linear(30)
    model = Timeless(network)
    images, spans = dysigma.leaves(16, 8).images, ["0-9", "10-19", "20-29"]
    report = dysigma.conflicts(
        model, images, schedule, 3, micro_batches=20, batch_per_bin=16, progress=False
    )
    assert report.undetermined == 0
    assert report.spans() == spans
    lines = report.sentences()
    i, j = divmod(int(report.cosine_debiased.argmin()), 3)
    (low, high), lowest = (end[i, j] for end in report.interval()), report.cosine_debiased[i, j]
    assert (
        f"of 3 pairs of bins: {report.mean_cosine:.3f} ± {report.mean_cosine_se:.3f} (" in lines[0]
    )
    assert lines[0].endswith(": -0.500.") and lines[1].startswith(
        f"Conflict: {round(3 * report.conflict_rate)} pairs"
    )
    assert f"{round(3 * report.sure_conflict_rate)} of them for sure" in lines[1]
    assert f"{lowest:.3f} [{low:.3f}, {high:.3f}], timesteps {spans[i]} and {spans[j]}." in lines[2]
    assert ("every bin's loss" in lines[-1]) == (report.stationarity_interval[0] > 0) and len(
        lines
    ) == 4
    # One pair below 0 with its interval, one with its estimate alone, one with the low end of its interval alone.
    cosine, error = torch.eye(3, dtype=torch.float64), torch.full((3, 3), 0.2, dtype=torch.float64)
    for (i, j), value, se in (((0, 1), -0.5, 0.01), ((0, 2), -0.1, 0.2), ((1, 2), 0.1, 0.2)):
        cosine[i, j] = cosine[j, i] = value
        error[i, j] = error[j, i] = se
    mixed = dataclasses.replace(report, cosine_debiased=cosine, cosine_se=error)
    assert "Conflict: 2 pairs have a negative cosine, 1 of them for sure" in mixed.sentences()[1]
    unknown = report.cosine_debiased.clone()
    unknown[2], unknown[:, 2] = float("nan"), float("nan")
    lines = dataclasses.replace(report, cosine_debiased=unknown, undetermined=2).sentences()
    assert (
        "Undetermined: 2 of 3 pairs. The gradient of timesteps 20-29 does not stand out" in lines[3]
    )
    assert "more micro-batches (now 20)" in lines[3] and "Mean cosine of 1 pairs" in lines[0]


class Timeless(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, timesteps):
        return self.network(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "4 channels 1 or 3 latents"),
        (["--data=NPZ"], "4 classes plain.npz none"),
        (["--data=leaves"], "4 classes leaves 10"),
        (["--bins=1"], "--bins 2 64 1"),
        (["--bins=65"], "--bins 2 64 65"),
        (["--micro-batches=5"], "--micro-batches 6 5"),
        (["--weighting=uncertainty"], "--weighting predefined uncertainty learns"),
        (["--weighting=min-srn"], "unknown weighting 'min-srn'"),
        (["--out=PATH/sub"], "pipeline's folder another --out"),
        (["--num-images=0"], "--num-images 1 0"),
    ],
)
def test_conflicts_refuses_bad_options(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "plain.npz", images=np.zeros((10, 8, 8, 3), np.uint8))
    kind = {"in_channels": 4, "out_channels": 4} if "4 channels" in words else {}
    kind |= {"num_class_embeds": 4} if "4 classes" in words else {}
    path, before = a_pipeline(tmp_path / "p", **kind)
    options = [o.replace("NPZ", "plain.npz").replace("PATH", path) for o in options]
    assert main(["conflicts", path, *SMALL, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dysigma: ") and in_order(words, error), error
    assert contents(tmp_path / "p") == before and not (tmp_path / "conflicts-p").exists()


FOREIGN = {
    # channels and size of the network; what the images are; words of the refusal, if any
    "gray folder": (1, 8, "gray", None),
    "gray array": (1, 8, "gray.npz", None),
    "colours for a gray network": (1, 8, "colour", "1 channels"),
    "gray for a network of colours": (3, 8, "gray.npz", None),
    "oblong": (3, (8, 16), "colour", None),
    "oblong and gray": (1, (16, 8), "gray", None),
    "oblong leaves": (3, [8, 16], "leaves", None),
    "any size": (3, None, "colour", None),
}


@pytest.mark.parametrize("case", FOREIGN.values(), ids=FOREIGN.keys())
def test_conflicts_shows_networks_images_of_the_shape_they_take(
    tmp_path, monkeypatch, capsys, case
):
    channels, size, data, refusal = case
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 32, 3), dtype=np.uint8)
    for name, images in (("colour", pixels), ("gray", pixels[..., 0])):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            PIL.Image.fromarray(image).save(tmp_path / name / f"{number:02}.png")
    np.savez("gray.npz", images=pixels[..., 0])
    network = UNet2DModel(
        **{**BLOCKS, "sample_size": size}, **PLAIN, in_channels=channels, out_channels=channels
    )
    seen = set()
    path, _ = a_pipeline(tmp_path / "p", network=network)
    forward = UNet2DModel.forward

    def watched(self, x, *args, **kwargs):
        seen.add(tuple(x.shape[1:]))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", watched)
    options = ["--data", data, "--num-images=10", "--out=out"]
    assert main(["conflicts", path, *SMALL, *options]) == (2 if refusal else 0)
    if refusal:
        assert refusal in capsys.readouterr().err and not seen
    else:
        sides = (16, 16) if size is None else (size, size) if size == 8 else tuple(size)
        assert seen == {(channels, *sides)}


def test_conflicts_refuses_other_pipelines_with_the_reason(tmp_path, capsys):
    cross = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    prompted = UNet2DConditionModel(
        **BLOCKS, **cross, cross_attention_dim=8, in_channels=3, out_channels=3
    )
    reasons = {
        "prompted": "encoder_hidden_states prompt pixels",
        "latent": "vqvae latents pixels",
        "headless": "unet scheduler ['scheduler']",
        "damaged": "does not open",
        "pickled": "does not open safetensors",
        "stranger": "unet of os no code",
        "continuous": "continuum of levels",
        "edm": "no alphas_cumprod",
        "alone/unet": "neither run folder pipeline model_index.json",
        "none": "neither run folder pipeline",
    }
    a_pipeline(tmp_path / "prompted", network=prompted)
    for name in ("latent", "headless", "damaged", "alone", "pickled", "stranger"):
        a_pipeline(tmp_path / name)
    continuous = EulerDiscreteScheduler(timestep_type="continuous", sigma_min=0.002, sigma_max=700)
    a_pipeline(tmp_path / "continuous", continuous)
    a_pipeline(tmp_path / "edm", EDMEulerScheduler())
    changes = {"latent": {"vqvae": ["diffusers", "VQModel"]}, "headless": {"unet": [None, None]}}
    for name, change in (changes | {"stranger": {"unet": ["os", "system"]}}).items():
        index = tmp_path / name / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | change))
    (tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    weights = tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    for name, reason in reasons.items():
        assert main(["conflicts", str(tmp_path / name), *SMALL]) == 2, name
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"dysigma: {tmp_path / name}") and in_order(reason, error), error


@pytest.mark.slow
def test_a_run_is_evaluated_where_its_images_lie_now(tmp_path, capsys):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, 24, 8, 8, 3), dtype=np.uint8)
    old, new, other = (tmp_path / f"{name}.npz" for name in ("old", "new", "other"))
    np.savez(old, train_images=images[0], test_images=images[0][:6])
    np.savez(other, train_images=images[1], test_images=images[1][:6])
    run = tmp_path / "run"
    train = ["train", *QUICK, "--train-images=24", "--data", str(old), "--out", str(run)]
    assert main(train) == 0
    old.rename(new)
    evaluate = ["evaluate", str(run), "--num-images", "4", "--timesteps", "5", "--device", "cpu"]
    evaluate += ["--elbo-timesteps", "2", "--data"]
    assert main([*evaluate, str(new)]) == 0
    assert main(["train", "--resume", "--quiet", "--data", str(new), "--out", str(run)]) == 0
    capsys.readouterr()
    assert main([*evaluate, str(other)]) == 2
    error = capsys.readouterr().err
    assert "other.npz" in error and "--data" in error and "delete" not in error


def test_a_run_that_is_stopped_while_it_says_why_it_failed_says_so(monkeypatch, capsys, tmp_path):
    """torchrun does that to the ranks that are left."""

    def stopped_here(filename):
        os.kill(os.getpid(), signal.SIGTERM)
        return _is_foreign(filename)

    # dysigma.cli.main is also the function of that name, which hides the module.
    monkeypatch.setattr(sys.modules["dysigma.cli.main"], "_is_foreign", stopped_here)
    assert main(["evaluate", str(tmp_path / "no-run")]) == 2
    assert "no-run" in capsys.readouterr().err
