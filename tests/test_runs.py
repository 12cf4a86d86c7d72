"""Run folders: whole or named as damaged, one process at a time, nothing that was whole lost."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dysigma.runs import (
    RunError,
    append_metrics,
    find_runs,
    load_checkpoint,
    load_run,
    lock,
    read_metrics,
    save_checkpoint,
    write_atomically,
    write_json,
)
from dysigma.training import TrainConfig, train

TENSORS = {"a": torch.arange(5.0), "b": torch.tensor(3)}


def test_checkpoint_round_trip_keeps_the_newest_and_the_one_before(tmp_path):
    save_checkpoint(tmp_path, 10, {"a": torch.zeros(2)}, {})
    save_checkpoint(tmp_path, 20, TENSORS, {"seconds": 1.5})
    step, tensors, meta = load_checkpoint(tmp_path)
    assert step == 20 and meta == {"seconds": 1.5} and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    save_checkpoint(tmp_path, 30, TENSORS, {})
    names = [f"state-{step:09d}.{kind}" for step in (20, 30) for kind in ("json", "safetensors")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", *names]


def harm(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-3])
    elif how == "a bit flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "gone":
        path.unlink()
    else:
        path.write_text(how)


DAMAGE = {
    ("state", "truncated"): "state-000000002.safetensors does not match its SHA-256",
    ("state", "a bit flipped"): "state-000000002.safetensors does not match its SHA-256",
    ("state", "gone"): "names state-000000002.safetensors, which is not there",
    ("latest", "{"): "latest.json is not valid JSON",
    ("latest", "a bit flipped"): "latest.json",
    ("latest", "[]"): "latest.json is no checkpoint",
    ("latest", "{}"): "latest.json is no checkpoint",
    (
        "latest",
        '{"step": 1, "tensors": 3, "sha256": "", "meta": {}}',
    ): "latest.json is no checkpoint",
    (
        "latest",
        '{"step": 1, "tensors": "../x", "sha256": "", "meta": {}}',
    ): "names x, which is not there",
    (
        "latest",
        '{"step": 1, "tensors": "/dev/zero", "sha256": "", "meta": {}}',
    ): "names zero, which is not there",
    ("latest", "gone"): "latest.json does not exist",
}


@pytest.mark.parametrize(("what", "how"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, what, how):
    save_checkpoint(tmp_path, 1, {"a": torch.zeros(5)}, {"lr": 0.1})
    save_checkpoint(tmp_path, 2, TENSORS, {"lr": 0.2})
    harm(tmp_path / ("latest.json" if what == "latest" else "state-000000002.safetensors"), how)
    with pytest.warns(UserWarning, match=re.escape(DAMAGE[what, how])) as warned:
        step, tensors, meta = load_checkpoint(tmp_path)
    assert len(warned) == 1
    # What latest.json says stands in the checkpoint's own file too, so without it nothing is lost.
    assert (step, meta) == ((2, {"lr": 0.2}) if what == "latest" else (1, {"lr": 0.1}))
    assert torch.equal(tensors["a"], TENSORS["a"] if what == "latest" else torch.zeros(5))

    # Whatever happens next, the whole one stays until there is a newer one.
    save_checkpoint(tmp_path, 3, {"a": torch.ones(5)}, {})
    harm(tmp_path / "state-000000003.safetensors", "truncated")
    if what == "latest":
        with pytest.warns(UserWarning, match="state-000000003.safetensors does not match"):
            assert load_checkpoint(tmp_path)[0] == 2


def test_no_whole_checkpoint_is_an_error_that_names_the_damage(tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, {})
    harm(tmp_path / "state-000000001.safetensors", "a bit flipped")
    with pytest.raises(
        RunError,
        match=r"state-000000001\.safetensors does not match.*move it away",
    ):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path):
    ours, theirs = {"seed": 0, "device": "cpu"}, {"seed": 1, "device": "cpu"}
    save_checkpoint(tmp_path, 1, TENSORS, {"config": ours})
    save_checkpoint(tmp_path, 2, TENSORS, {"config": theirs})
    with pytest.warns(
        UserWarning, match=r"state-000000002\.safetensors.*another run.*seed 1 there, 0 here"
    ):
        assert load_checkpoint(tmp_path, ours)[0] == 1
    assert load_checkpoint(tmp_path, theirs | {"device": "cuda", "new": 3})[0] == 2


def test_checkpoints_of_early_versions_are_still_read(tmp_path):
    content = save(TENSORS)
    (tmp_path / "state-000000007.safetensors").write_bytes(content)
    latest = {
        "step": 7,
        "tensors": "state-000000007.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_json(tmp_path / "latest.json", latest | {"meta": {"seconds": 1.0, "param_groups": []}})
    step, tensors, meta = load_checkpoint(tmp_path, {"seed": 0})
    assert step == 7 and torch.equal(tensors["a"], TENSORS["a"]) and meta["seconds"] == 1.0


def test_what_a_killed_process_left_is_cleared_by_the_next_checkpoint(tmp_path):
    (tmp_path / ".state-000000001.safetensors.123").write_bytes(b"half")
    save_checkpoint(tmp_path, 2, TENSORS, {})
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_locked_for_others_and_free_once_its_process_is_gone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere since the flood")
    refusal = rf"run is in use by process {os.getpid()} on .* since 20.*left over locks nothing"
    with lock(tmp_path / "run"), lock(tmp_path / "new"), pytest.raises(RunError, match=refusal):
        lock(tmp_path / "run").__enter__()
    with lock(tmp_path / "run"):
        pass


def test_without_locks_in_the_system_a_warning_says_so(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.warns(UserWarning, match=r"no locks.*not implemented"),
        lock(tmp_path),
    ):
        pass


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"v": 1})
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"v": 2})
    assert json.loads(path.read_text()) == {"v": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing is left on the full disk"


def test_json_refuses_numbers_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"v": float("nan")})


def test_metrics_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1, "bin_losses": torch.tensor([0.5, float("nan")])})
    append_metrics(path, {"step": 2})
    write_atomically(path, path.read_text() + '{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "bin_losses": [0.5, None]}, {"step": 2}]
    assert read_metrics(path, until_step=1) == [{"step": 1, "bin_losses": [0.5, None]}]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert len(read_metrics(path)) == 2


@pytest.mark.parametrize(
    "line", ['{"step": 1', "", "[]", "3", "{}", '{"step": "a"}', "[" * 100_000, "\0\0"]
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"line 2.*metrics\.jsonl.*damaged"):
        read_metrics(tmp_path / "metrics.jsonl", until_step=2)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="not a run folder"):
        load_run(Path("/nonexistent"))


def test_every_run_and_race_is_listed_with_what_it_has_come_to(tmp_path):
    config = {"weighting": "min-snr", "images": 2000}
    rows = '{"step": 0, "images": 0}\n{"step": 9, "images": 1800, "loss": 0.25, "grad_norm": 2}\n'
    spec = {"seeds": [0, 1], "arms": {"a": {}}, "grid": {"g": {}}}
    entry = '{"grid": "g", "arm": "a", "seed": 0}\n'
    files = {
        "cut/summary.json": '{"status": "running"}', "cut/config.json": config, "cut/metrics.jsonl": rows + '{"st',
        "done/summary.json": '{"status": "done"}', "done/config.json": config, "done/metrics.jsonl": rows,
        "diverged/summary.json": '{"status": "failed"}', "diverged/config.json": config,
        "deep/er/held/config.json": config, "deep/er/held/.lock": "", "deep/er/held/metrics.jsonl": rows,
        "race/race.json": spec, "race/records.jsonl": entry, "race/entries/0001/config.json": config,
        "raced/race.json": spec, "raced/records.jsonl": 2 * entry,
        "bad/config.json": "{", "bad/summary.json": "{}", "line/config.json": config, "line/metrics.jsonl": "x\ny\n",
        "odd/race.json": {"seeds": 3}, "odd-summary/config.json": config, "odd-summary/summary.json": "[]",
        "none/config.json": {"_class_name": "UNet2DModel"}, "text/config.json": "hello", ".hidden/config.json": config,
        "list/config.json": [1], "folder/config.json/x": "", "empty/y": "",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    with lock(tmp_path / "deep" / "er" / "held"):
        found = {str(path.relative_to(tmp_path)): tuple(row) for path, *row in find_runs(tmp_path)}
    last = "min-snr, weighted training loss 0.25"
    damaged = {name: found.pop(name) for name in ("bad", "line", "odd", "odd-summary")}
    assert found == {
        "cut": ("interrupted", "1,800 of 2,000 images", last),
        "deep/er/held": ("running", "1,800 of 2,000 images", last),
        "diverged": ("failed", "0 of 2,000 images", "min-snr"),
        "done": ("finished", "1,800 of 2,000 images", last),
        "race": ("interrupted", "1 of 2 trainings", "g a 0"),
        "race/entries/0001": ("interrupted", "0 of 2,000 images", "min-snr"),
        "raced": ("finished", "2 of 2 trainings", "g a 0"),
    }
    assert {state for state, *_ in damaged.values()} == {"damaged"}
    assert (
        "config.json is not valid JSON" in damaged["bad"][2] and "line 1 of" in damaged["line"][2]
    )
    assert sorted(tmp_path.rglob("*")) == before, "looking changes nothing"
    assert next(find_runs(tmp_path / "deep"))[1] == "interrupted", "free again"
    with pytest.raises(RunError, match="there is no folder"):
        next(find_runs(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "schedule, prediction, scheduler",
    [("cosine", "v_prediction", "DDPMScheduler"), ("flow", "sample", "FlowRunScheduler")],
)
def test_a_run_that_has_not_ended_opens_with_the_averaged_weights_of_its_checkpoint(
    tmp_path, schedule, prediction, scheduler
):
    config = TrainConfig(
        data="leaves",
        model="micro",
        images=64,
        batch_size=8,
        weighting="min-snr",
        schedule=schedule,
        prediction=prediction,
        train_images=8,
        validation_images=2,
        validation_timesteps=2,
        device="cpu",
    )
    run = train(config, tmp_path / "run", finish=False, progress=False)
    _, tensors, _ = load_checkpoint(tmp_path / "run/checkpoint")
    with pytest.warns(UserWarning, match="has not ended.*64 of 64 images"):
        so_far = run.pipeline()
    for name, value in so_far.unet.state_dict().items():
        assert torch.equal(value, tensors[f"ema.{name}"])
    assert so_far.unet.config.sample_size == 16
    assert type(so_far.scheduler).__name__ == scheduler
    if schedule == "cosine":
        expected = config.noise_schedule().alphas_cumprod.float()
        assert torch.allclose(so_far.scheduler.alphas_cumprod, expected)
        assert so_far.scheduler.config.timestep_spacing == "trailing"


def test_a_run_without_pipeline_and_checkpoint_says_so(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"schedule": "linear"}')
    with pytest.raises(RunError, match=r"no pipeline yet.*no checkpoint"):
        load_run(folder).pipeline()
