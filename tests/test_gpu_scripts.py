"""What waits for a GPU runs here in small: the scripts measure what they say, and every command of the list parses."""

import importlib
import json
import re
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dysigma.models import PRESETS, make_model
from dysigma.training import TrainConfig, build, load_split

FOLDER = Path(__file__).resolve().parent.parent / "data/races"
SCRIPTS = re.findall(
    r"`python data/races/(\w+)\.py ([^`]*)`", (FOLDER.parent / "gpu-backlog.md").read_text()
)

sys.path.insert(0, str(FOLDER))
networks, together = (importlib.import_module(name) for name in ("networks", "together"))
sys.path.pop(0)


@pytest.fixture
def candidates(monkeypatch):
    """Among the presets for the time of one test; importing the script must not do that."""
    assert {*PRESETS} & {*networks.CANDIDATES} == {"compact"}
    for name, preset in networks.CANDIDATES.items():
        monkeypatch.setitem(PRESETS, name, preset)


@pytest.mark.parametrize(("name", "options"), SCRIPTS)
def test_each_script_that_waits_for_a_gpu_takes_its_options(name, options, monkeypatch, candidates):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("sys.argv", [name, *shlex.split(options)])
    args = vars(importlib.import_module(name).parse())
    assert (
        args["device"] == "cuda"
        and args["data"] == "cifar10"
        and args["out"].is_relative_to("data/runs")
    )
    assert all(
        network in PRESETS for network in [args.get("model", "compact"), *args.get("networks", [])]
    )


@pytest.fixture
def threads(monkeypatch):
    """In place of processes, which take long to start."""
    monkeypatch.setattr(together, "get_context", lambda kind: threading)
    monkeypatch.setattr(
        together,
        "ProcessPoolExecutor",
        lambda n, context, **options: ThreadPoolExecutor(n, **options),
    )


SMALL = TrainConfig(model="micro", image_size=8, batch_size=4, train_images=16, device="cpu")


def test_trainings_at_once_take_their_timed_steps_together(tmp_path, monkeypatch, capsys, threads):
    sizes = [
        "--model=micro",
        "--image-size=8",
        "--batch-size=4",
        "--warmup=1",
        "--steps=3",
        "--device=cpu",
    ]
    out, spans = tmp_path / "t.json", []
    real = together.train_step

    def step(state, data, config):
        start = time.monotonic()
        if state.step == 0 and config.seed == 1:
            time.sleep(0.3)  # a warm-up for which the other has to wait
        record = real(state, data, config)
        spans.append((config.seed, start, time.monotonic()))
        return record

    monkeypatch.setattr(together, "train_step", step)
    monkeypatch.setattr("sys.argv", ["together.py", "--jobs", "1", "2", *sizes, "--out", str(out)])
    together.main()
    record = json.loads(out.read_text())
    assert [row["jobs"] for row in record["rows"]] == [1, 2] and record["provenance"]["torch"]
    for row in record["rows"]:
        assert row["images_per_second"] == pytest.approx(row["jobs"] * 3 * 4 / row["seconds"])
    assert len(spans) == 4 + 2 * 4, "warm-up and timed steps"
    both = [[span[1:] for span in spans[4:] if span[0] == seed] for seed in (0, 1)]
    warm, first, last = (
        pick([s[i][k] for s in both]) for pick, i, k in ((max, 0, 1), (min, 1, 0), (max, -1, 1))
    )
    assert warm < first and last - first <= record["rows"][1]["seconds"] < time.monotonic() - warm
    assert "images/s together" in capsys.readouterr().out


def test_a_training_that_fails_fails_all_of_them_with_its_reason(threads):
    row = together.measure(replace(SMALL, image_size=9), 2, 1, 1)
    assert row["jobs"] == 2 and "image_size must be a multiple of 2" in row["fails"]


@pytest.mark.slow
def test_trainings_at_once_are_processes(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # where they look for the script
    assert together.measure(SMALL, 2, 1, 2)["images_per_second"] > 0


def test_every_candidate_is_a_network_for_images_of_cifar10(candidates):
    assert PRESETS["compact"] == networks.COMPACT and len(networks.CANDIDATES) >= 8
    for name in networks.CANDIDATES:
        make_model(name, 32)


def test_candidates_are_judged_by_their_averaged_weights():
    train, test = (load_split(SMALL, split, torch.device("cpu")) for split in ("train", "test"))
    state = build(SMALL, train)
    before = networks.judge(state, SMALL, test.images[:4])
    with torch.no_grad():
        next(state.model.parameters()).add_(9)
    assert networks.judge(state, SMALL, test.images[:4]) == before


def test_candidates_are_trained_for_a_time_judged_on_the_way_and_resumed(
    tmp_path, monkeypatch, candidates
):
    sizes = [
        "--seconds=0.4",
        "--image-size=8",
        "--warmup-images=8",
        "--validation-images=4",
        "--device=cpu",
    ]
    sizes += ["--batch-size", "4"]
    out = tmp_path / "n.json"

    def again(*more):
        monkeypatch.setattr(
            "sys.argv", ["networks.py", "--networks", *more, *sizes, "--out", str(out)]
        )
        networks.main()
        return json.loads(out.read_text())["rows"]

    first, both = again("micro"), again("micro", "tiny", "--seeds", "0")
    assert both[0] == first[0] and [row["network"] for row in both] == ["micro", "tiny"]
    for row in both:
        assert [
            point["seconds"] >= due
            for point, due in zip(row["curve"], (0.1, 0.2, 0.4), strict=True)
        ] == [True] * 3
        images = [point["images"] for point in row["curve"]]
        assert images == sorted(images) and not any(n % 40 for n in images), (
            "whole rounds of ten steps of four images"
        )
        assert row["images_per_second"] == pytest.approx(
            (images[-1] - 40) / row["curve"][-1]["seconds"]
        )
        assert all(0 < point["loss"] < 2 and point["diffusion"] > 0 for point in row["curve"])
    assert both[0]["parameters"] < both[1]["parameters"]
    with pytest.raises(ValueError, match=r"was made with .*'batch_size': 4.*choose another --out"):
        sizes[-1] = "8"
        again("micro")
