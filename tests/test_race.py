"""Races: common draws, nothing lost, nothing compared that should not be."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

import dysigma.lab.race
from dysigma.cli.main import main
from dysigma.exact import (
    GaussianField,
    OptimalDenoiser,
    field_floor,
    field_variances,
    gaussian_fields,
)
from dysigma.lab.convergence import load_races
from dysigma.lab.race import Race, race
from dysigma.runs import RunError, load_run, lock
from dysigma.schedule import NoiseSchedule

SPEC = {
    "name": "test",
    "seeds": [0, 1],
    "base": {
        "data": "gaussian-fields", "image_size": 8, "train_images": 64, "model": "micro", "images": 64, "batch_size": 8,
        "validate_every": 32, "validation_images": 8, "validation_timesteps": 5, "log_every": 4, "device": "cpu",
        "num_timesteps": 50, "bins": 4, "checkpoint_every": 64,
    },
    "arms": {"const-eps": {"weighting": "const-eps"}, "min-snr": {"weighting": "min-snr"}},
    "grid": {"epsilon": {"prediction": "epsilon"}},
}  # fmt: skip


@pytest.mark.slow
def test_a_race_records_every_entry_once_and_goes_on_where_it_stopped(tmp_path):
    spec = Race.from_dict(SPEC)
    records = race(spec, tmp_path, in_process=True, progress=False)
    lines = records.read_text().splitlines()
    assert len(lines) == 4
    # As if it had been killed while it wrote the third line.
    records.write_text("\n".join(lines[:2]) + "\n" + lines[2][:50])
    race(spec, tmp_path, in_process=True, progress=False)
    table = load_races(tmp_path)
    assert sorted(zip(table.arm, table.seed, strict=True)) == [
        (a, s) for a in ("const-eps", "min-snr") for s in (0, 1)
    ]
    assert not any((tmp_path / "entries").iterdir())
    first = {(r.arm, r.seed): r.validation_losses[0] for r in table.itertuples()}
    # Paired: before the first step two arms with one seed are the same network; two seeds are not.
    assert first["const-eps", 0] == first["min-snr", 0] != first["const-eps", 1]
    rerun = {(r["arm"], r["seed"]): r["validation_losses"] for r in map(json.loads, lines)}
    again = {(r.arm, r.seed): r.validation_losses for r in table.itertuples()}
    assert rerun == again


@pytest.mark.slow
def test_one_process_gives_the_records_that_several_give_and_reads_the_data_once(
    tmp_path, monkeypatch
):
    change = {"distance_images": 24, "distance_steps": 2}
    spec = Race.from_dict(SPEC | {"seeds": [0], "base": SPEC["base"] | change})
    race(spec, tmp_path / "workers", progress=False)
    read = []
    load = dysigma.lab.race.load_split
    monkeypatch.setattr(
        dysigma.lab.race, "load_split", lambda *given: read.append(given[1]) or load(*given)
    )
    race(spec, tmp_path / "here", in_process=True, progress=False)
    assert read == ["train", "test"]
    workers, here = (
        load_races(tmp_path / name).drop(columns="seconds") for name in ("workers", "here")
    )
    assert workers.sort_values("arm").to_dict("records") == here.sort_values("arm").to_dict(
        "records"
    )
    assert all(
        len(kids) == len(images) for kids, images in zip(here.kids, here.images, strict=True)
    )
    with pytest.raises(ValueError, match="jobs"):
        race(spec, tmp_path / "both", jobs=2, in_process=True)


def test_targets_paths_and_samplers_make_up_the_grid_and_arms(tmp_path):
    change = {
        "grid": {
            "x0": {"prediction": "sample", "arms": ["const-x0", "min-snr"]},
            "v, cosine": {"prediction": "v_prediction", "schedule": "cosine", "arms": ["min-snr"]},
        },
        "arms": {
            "const-x0": {"weighting": "const-x0"},
            "min-snr": {"weighting": "min-snr", "timestep_sampler": "stratified"},
        },
    }
    spec = Race.from_dict(SPEC | change)
    keys = [key for key, _ in spec.entries()]
    assert keys == [
        (label, arm, seed)
        for seed in (0, 1)
        for label, arm in (("x0", "const-x0"), ("x0", "min-snr"), ("v, cosine", "min-snr"))
    ]
    configs = dict(spec.entries())
    last = configs["v, cosine", "min-snr", 1]
    assert (last.schedule, last.timestep_sampler, last.seed) == ("cosine", "stratified", 1)
    with pytest.raises(ValueError, match="ugd"):
        Race.from_dict(SPEC | {"grid": {"x0": {"prediction": "sample", "arms": ["ugd"]}}})


def test_targets_weightings_and_samplers_are_raced_on_a_flow(tmp_path):
    """Every kind of sampler on three targets, one of them on a shifted flow, from training to samples."""
    change = {
        "seeds": [0],
        "base": SPEC["base"]
        | {"images": 32, "distance_images": 24, "distance_steps": 3, "schedule": "flow"},
        "grid": {
            "velocity": {"prediction": "flow_prediction"},
            "x0, shift 3": {"prediction": "sample", "shift": 3.0},
            "noise": {"prediction": "epsilon"},
        },
        "arms": {
            "const-flow": {"weighting": "const-flow"},
            "logit-normal": {"weighting": "const-flow", "timestep_sampler": "logit-normal"},
            "min-snr": {"weighting": "min-snr", "timestep_sampler": "stratified"},
            "density": {
                "weighting": "dy-sigma",
                "weighting_params": {"variant": "density", "bins": 4},
                "timestep_sampler": "weighting",
            },
        },
    }
    spec = Race.from_dict(SPEC | change)
    race(spec, tmp_path, in_process=True, progress=False)
    table = load_races(tmp_path)
    assert sorted(set(zip(table.grid, table.arm, strict=True))) == [
        (label, arm) for label in sorted(change["grid"]) for arm in sorted(change["arms"])
    ]
    for label, rows in table.groupby("grid"):
        first = [losses[0] for losses in rows.validation_losses]
        assert all(losses == first[0] for losses in first), f"{label}: paired before the first step"
        ends = {tuple(losses[-1]) for losses in rows.validation_losses}
        assert len(ends) == len(rows), f"{label}: every arm trains in its own way"
    for row in table.itertuples():
        assert torch.tensor(row.validation_losses).isfinite().all(), row.arm
        assert torch.tensor(row.distances).isfinite().all(), row.arm
        weights = torch.tensor(row.bin_weights[-1])
        assert weights.isfinite().all() and (weights >= 0).all(), row.arm
    weights = {(row.grid, row.arm): row.bin_weights[-1] for row in table.itertuples()}
    assert weights["velocity", "const-flow"] == [1.0] * 4
    # The variant density leaves the weights of its prior alone.
    assert weights["velocity", "density"] == weights["velocity", "min-snr"]


@pytest.mark.slow
def test_an_entry_that_fails_ends_the_race_and_the_others_wait_for_the_next_call(tmp_path):
    spec = Race.from_dict(SPEC | {"seeds": [0, 1, 2, 3]})
    foreign = tmp_path / "entries" / "0001"
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text("{}")
    with pytest.raises(RunError, match="another configuration"):
        race(spec, tmp_path, progress=False)
    # A worker goes on until the race has heard of the failure, which a busy machine delays.
    assert len(list((tmp_path / "entries").iterdir())) < 7, (
        "entries that had not begun must not begin"
    )
    foreign.joinpath("config.json").unlink()
    foreign.rmdir()
    race(spec, tmp_path, in_process=True, progress=False)
    assert len(load_races(tmp_path)) == 8


def test_stopping_a_race_leaves_other_processes_of_the_caller_alone(tmp_path, monkeypatch):
    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr("dysigma.lab.race.as_completed", interrupted)
    own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    own.start()
    try:
        with pytest.raises(KeyboardInterrupt, match="same command"):
            race(Race.from_dict(SPEC), tmp_path, progress=False)
        own.join(0.5)
        assert own.is_alive()
    finally:
        own.kill()


@pytest.mark.slow
def test_a_stopped_race_saves_and_the_workers_of_a_killed_one_end_with_it(tmp_path):
    (tmp_path / "spec.json").write_text(
        json.dumps(SPEC | {"base": SPEC["base"] | {"images": 10**7}})
    )
    command = [
        sys.executable,
        "-m",
        "dysigma",
        "race",
        str(tmp_path / "spec.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    metrics = tmp_path / "out" / "entries" / "0000" / "metrics.jsonl"

    def begin():
        size = metrics.exists() and metrics.stat().st_size
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for _ in range(1200):
            if metrics.exists() and metrics.stat().st_size > size:
                return process
            time.sleep(0.1)
        raise AssertionError(process.communicate(process.kill()))

    process = begin()
    with pytest.raises(RunError, match=rf"out.*in use.*{process.pid}"):
        race(Race.from_dict(SPEC), tmp_path / "out", progress=False)
    process.terminate()
    said = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 130
    assert "saved" in said and f"{tmp_path}/out" in said and "same command" in said
    assert load_run(metrics.parent).summary["status"] == "interrupted"

    process = begin()
    process.kill()
    process.communicate()
    # The lock of the entry is free as soon as its worker is gone.
    limit = time.monotonic() + 60
    while True:
        with contextlib.suppress(RunError), lock(metrics.parent):
            break
        assert time.monotonic() < limit, "the worker goes on without its race"
        time.sleep(0.1)


def die(*_):
    os._exit(9)


@pytest.mark.slow
def test_a_training_killed_from_outside_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("dysigma.lab.race._run_entry_in_worker", die)
    with pytest.raises(RunError, match=r"ended from outside.*same command"):
        race(Race.from_dict(SPEC), tmp_path, progress=False)


def test_a_folder_of_another_race_is_refused(tmp_path):
    race(Race.from_dict(SPEC | {"seeds": [0]}), tmp_path, in_process=True, progress=False)
    with pytest.raises(RunError, match="another specification"):
        race(Race.from_dict(SPEC), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": []}, ValueError, "must not be empty"),
        ({"seeds": 3}, ValueError, "seeds \\(a list\\)"),
        ({"seeds": [0, 0]}, ValueError, "every seed once"),
        ({"arms": {"a": "min-snr"}}, ValueError, "is a table"),
        ({"extra": 1}, ValueError, "must have exactly name"),
        ({"arms": {"a": {"weighting": "min-srn"}}}, KeyError, "min-snr"),
        ({"arms": {"a": {"wieghting": "min-snr"}}}, KeyError, "wieghting"),
        (
            {"arms": {"a": {"weighting": "min-snr", "weighting_params": {"gama": 1}}}},
            ValueError,
            "gama",
        ),
    ],
)
def test_a_bad_specification_is_refused_before_anything_runs(change, error, message):
    with pytest.raises(error, match=message):
        Race.from_dict(SPEC | change)


def test_a_missing_specification_is_one_line_and_code_2(tmp_path, capsys):
    assert main(["race", str(tmp_path / "none.toml"), "--out", str(tmp_path)]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_no_records_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no records"):
        load_races(tmp_path)


def test_the_floor_of_gaussian_fields_is_what_the_wiener_filter_loses():
    schedule, t = NoiseSchedule.linear(), 300
    data = gaussian_fields(2000)
    x0 = data.images.double().div(127.5).sub(1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bar = schedule.alphas_cumprod[t]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    variance = field_variances()
    gain = (1 - bar).sqrt() / (bar * variance + 1 - bar)
    best = torch.fft.ifft2(torch.fft.fft2(x_t, norm="ortho") * gain, norm="ortho").real
    filtered = OptimalDenoiser(GaussianField(), schedule)(x_t, torch.full((2000,), t))
    torch.testing.assert_close(filtered, best)
    measured = float((best - noise).square().mean())
    assert abs(measured / float(field_floor(schedule)[t]) - 1) < 0.02
    snr = schedule.log_snr.exp()
    torch.testing.assert_close(field_floor(schedule, "sample") * snr, field_floor(schedule))
    torch.testing.assert_close(
        field_floor(schedule, "sample") * (1 + snr), field_floor(schedule, "v")
    )


def test_fields_of_a_split_extend_and_splits_differ():
    few, many = gaussian_fields(10).images, gaussian_fields(1500).images
    assert torch.equal(few, many[:10])
    assert not torch.equal(few, gaussian_fields(10, split="test").images)
