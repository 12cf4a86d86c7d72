"""The command that uses a GPU for a quarter of an hour: its parts in small, and what keeps it from losing anything."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dysigma.lab.records import load_races
from dysigma.models import make_model
from dysigma.runs import RunError, load_run

ROOT = Path(__file__).resolve().parent.parent
BACKLOG = (ROOT / "data/gpu-backlog.md").read_text()
SCRIPTS = re.findall(r"`python data/races/(\w+)\.py ([^`]*)`", BACKLOG)

sys.path.insert(0, str(ROOT / "data/races"))
gpu_run = importlib.import_module("gpu_run")
sys.path.pop(0)


def test_the_backlog_names_this_command():
    assert "gpu_run" in {name for name, _ in SCRIPTS}


@pytest.mark.parametrize(("name", "options"), SCRIPTS)
def test_every_script_of_the_backlog_takes_its_options(name, options, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data/races"))
    module = importlib.import_module(name)
    words = shlex.split(options)
    if words[0] == "import":
        assert module.parse_import(words[1:]).folder
        return
    monkeypatch.setattr("sys.argv", [name, *words])
    assert module.parse().out


# Requests that cannot be met.


def refusal(capsys, *words: str) -> str:
    """The one line with which a command is refused."""
    assert gpu_run.main([*words]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


@pytest.fixture
def place(tmp_path):
    return ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]


def test_where_there_is_no_gpu_the_rehearsal_is_named(capsys, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--rehearse" in refusal(capsys, *place)


def test_too_little_time_is_told_before_anything_is_done(capsys, place, tmp_path):
    assert "at least" in refusal(capsys, "--rehearse", "--minutes", "1", *place)
    assert not list(tmp_path.iterdir())


def test_data_that_are_nowhere_are_told_before_anything_is_done(capsys, place, tmp_path):
    nowhere = str(tmp_path / "no.npz")
    text = refusal(capsys, "--device", "cpu", "--data-root", nowhere, *place)
    assert nowhere in text
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(capsys, place, tmp_path):
    note = tmp_path / "state/note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    assert "--state" in refusal(capsys, "--rehearse", *place)
    assert note.read_text() == "mine"


def test_a_session_of_another_device_is_left_alone(capsys, place, tmp_path):
    known = tmp_path / "state/session.json"
    known.parent.mkdir()
    other = json.dumps({"settings": {"rehearsal": False, "device": "some GPU", "data": "cifar10"}})
    known.write_text(other)
    text = refusal(capsys, "--rehearse", *place)
    assert "another session" in text and "some GPU" in text
    assert known.read_text() == other


# Parts and their deadlines.


@pytest.fixture
def session(tmp_path):
    place = ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    return gpu_run.open_session(gpu_run.parse(["--rehearse", *place]), "cpu")


def test_a_part_that_fails_stops_no_other_and_is_tried_again(session, tmp_path, monkeypatch):
    ran = []

    def run_part(part, timed):
        ran.append(part)
        return "failed: no luck" if part == "benchmark" and len(ran) < 5 else "done"

    monkeypatch.setattr(gpu_run, "run_part", run_part)
    parts = ["smoke", "benchmark", "best"]
    first = gpu_run.run_session(session, parts, 1, tmp_path / "out")
    assert first == {"smoke": "done", "benchmark": "failed: no luck", "best": "done"}
    again = gpu_run.run_session(session, parts, 1, tmp_path / "out")
    assert ran == [*parts, "benchmark"]
    assert again["smoke"] == "done"


def test_deadlines_share_the_time_and_leave_some_for_packing(session, tmp_path, monkeypatch):
    seconds = {}

    def run_part(part, timed):
        seconds[part] = timed.seconds_left()
        return "done"

    monkeypatch.setattr(gpu_run, "run_part", run_part)
    gpu_run.run_session(session, [*gpu_run.SHARES], 10, tmp_path / "out")
    # These parts take no time, so that each is given what those before left over.
    left = 600.0
    for number, part in enumerate(gpu_run.PARTS):
        waiting = [*gpu_run.PARTS][number:]
        share = gpu_run.SHARES[part] / sum(gpu_run.SHARES[p] for p in [*waiting, "pack"])
        assert seconds[part] == pytest.approx(share * left, abs=10), part
        assert seconds[part] < left


# What is handed back.


def test_weights_are_cut_into_files_that_may_be_handed_back(tmp_path, monkeypatch):
    from safetensors.torch import load, save_file

    weights = make_model("tiny", 16).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    limit = 300_000
    monkeypatch.setattr(gpu_run, "SHARD_BYTES", limit)
    shards = gpu_run._shards(tmp_path / "weights.safetensors")
    assert len(shards) > 1 and max(map(len, shards)) <= limit
    joined = {}
    for shard in shards:
        joined.update(load(shard))
    assert joined.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(joined[name].float(), value, rtol=1e-3, atol=1e-6)


def test_what_does_not_fit_stays_behind_and_is_named(session, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "MAX_BYTES", 1000)
    (session.state / "samples.npz").write_bytes(bytes(2000))
    names = {path.name for path in gpu_run.pack(session, tmp_path / "out")}
    assert names == {"session.tar.gz", "pack.json"}
    assert "samples.npz" in json.loads((tmp_path / "out/pack.json").read_text())["left_out"][0]


def test_imports_refuse_what_is_no_pack_damaged_or_there_already(session, tmp_path):
    out = tmp_path / "out"
    runs = tmp_path / "runs"
    gpu_run.pack(session, out)
    with pytest.raises(RunError, match=r"pack\.json"):
        gpu_run.import_pack(tmp_path, runs)
    gpu_run.import_pack(out, runs, "gpu-first")
    with pytest.raises(RunError, match="there already"):
        gpu_run.import_pack(out, runs, "gpu-first")
    (out / "session.tar.gz").write_bytes(b"")
    with pytest.raises(RunError, match="damaged"):
        gpu_run.import_pack(out, runs)
    (out / "session.tar.gz").unlink()
    with pytest.raises(RunError, match="missing"):
        gpu_run.import_pack(out, runs)
    assert [path.name for path in runs.iterdir()] == ["gpu-first"]


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_and_its_pack_is_imported(tmp_path):
    command = [sys.executable, str(ROOT / "data/races/gpu_run.py"), "--rehearse", "--minutes", "60"]
    command += ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    log = tmp_path / "state/log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()

    files = [*(tmp_path / "out").iterdir()]
    assert len(files) <= 8 and all(0 < path.stat().st_size < 16 * 2**20 for path in files)
    place = gpu_run.import_pack(tmp_path / "out", tmp_path / "runs")
    assert place.name.startswith("gpu-rehearsal-")
    run = load_run(place / "best")
    assert run.summary["status"] == "done" and len(run.metrics) > 3
    trained = load_run(tmp_path / "state/best").pipeline().unet.state_dict()
    for name, value in run.pipeline().unet.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=1e-3, atol=1e-6)
    assert len(load_races(place / "race")) == 8
    results = {path.stem: json.loads(path.read_text()) for path in (place / "results").iterdir()}
    assert results.keys() == gpu_run.PARTS.keys()
    assert results["smoke"]["networks"]["micro"]["images_per_second"] > 0
    assert results["evaluation"]["distances"]["pixels"]["images"] == 24
    assert "fails" in results["evaluation"]["distances"]["none"]
    assert len(results["conflicts"]["report"]["gnr"]) == 10
