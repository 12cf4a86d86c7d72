"""Runs that a reader trains on a page: watched without being changed, and found by the next pages."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dysigma import TrainConfig, load_run, train
from dysigma.course.reader import (
    RECORD_OF_A_CPU,
    AlongTraining,
    best_run,
    new_run_folder,
    train_and_watch,
)
from dysigma.runs import load_checkpoint

CONFIG = TrainConfig(
    data="shapes",
    image_size=16,
    train_images=32,
    model="micro",
    batch_size=4,
    images=16,
    validation_images=2,
    validation_timesteps=2,
    device="cpu",
)


def test_watching_changes_nothing_and_draws_the_same_latents(tmp_path):
    along = AlongTraining([8, 16], count=2, steps=2)
    watched = train_and_watch(CONFIG, tmp_path / "watched", along, finish=False)
    plain = train(CONFIG, tmp_path / "plain", progress=False, finish=False)

    _, ours, _ = load_checkpoint(watched.path / "checkpoint")
    _, theirs, _ = load_checkpoint(plain.path / "checkpoint")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    assert list(along.samples) == list(along.networks) == [8, 16]
    assert all(drawn.shape == (2, 3, 16, 16) for drawn in along.samples.values())
    assert along.first_losses.shape == (4,)


def test_a_new_folder_replaces_no_run(tmp_path):
    assert new_run_folder("mine", tmp_path) == tmp_path / "mine"
    for name in ("mine", "mine-2"):
        (tmp_path / name).mkdir()
    assert new_run_folder("mine", tmp_path) == tmp_path / "mine-3"


def finished(folder, ended, status="done"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (folder / "samples.png").write_bytes(b"")
    (folder / "summary.json").write_text(json.dumps({"status": status}))
    os.utime(folder / "summary.json", (ended, ended))
    return folder


@pytest.mark.parametrize("name", ["mine", "cifar10-min-snr"])
def test_the_best_run_is_the_readers_then_of_a_gpu_then_of_a_cpu(tmp_path, name):
    runs = tmp_path / "runs"
    records = tmp_path / "records"
    cpu = finished(records / RECORD_OF_A_CPU, 50)
    finished(records / "gpu-rehearsal-1/best", 60)
    assert best_run(name, runs, records) == load_run(cpu)

    gpu = finished(records / "gpu-rtx-1/best", 10)
    assert best_run(name, runs, records) == load_run(gpu)

    own = finished(runs / name, 1)
    finished(runs / f"{name}-other", 9)
    assert best_run(name, runs, records) == load_run(own)
    newest = finished(runs / f"{name}-2", 2)
    finished(runs / f"{name}-3", 3, status="interrupted")
    assert best_run(name, runs, records) == load_run(newest)
