"""Nothing is lost: killed runs end as whole ones; damage, a full disk and a second process change nothing."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from faults import BASE, CASES, CONTEXT, begin, outcome, torment

from dysigma import training
from dysigma.runs import RunError, load_checkpoint, load_run
from dysigma.training import train

SHORT = dataclasses.replace(BASE, images=80, checkpoint_every=16)


def quick(config, out, **options):
    return train(config, out, progress=False, **({"finish": False} | options))


# Those with state of their own; `make faults` kills all of CASES, and more often.
@pytest.mark.parametrize("weighting", ["dy-sigma", "ugd"])
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path, weighting):
    config = dataclasses.replace(SHORT, weighting=weighting, **CASES[weighting])
    found = torment(config, kills=3, folder=tmp_path, seed=0)
    assert (
        found["kills"] == 3 and found["runs"] >= 1 and found["tensors"] > 300 and found["rows"] > 3
    )
    assert found["differing_tensors"] == found["differing_rows"] == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders to copy: whole; of another seed; and one that was stopped after 5 of 10 steps."""
    folder = tmp_path_factory.mktemp("runs")
    quick(SHORT, folder / "whole")
    quick(dataclasses.replace(SHORT, seed=1), folder / "other")
    asked = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            training.loop, "stop_signals", lambda: contextlib.nullcontext(lambda: next(asked) == 5)
        )
        quick(SHORT, folder / "half")
    return folder


@pytest.fixture
def half(folders, tmp_path):
    return shutil.copytree(folders / "half", tmp_path / "half")


def assert_same_end(out, folders):
    (tensors, rows), (expected, expected_rows) = outcome(out), outcome(folders / "whole")
    assert tensors.keys() == expected.keys() and rows == expected_rows
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.slow
def test_the_comparison_of_ends_tells_runs_apart(folders):
    (tensors, rows), (others, other_rows) = outcome(folders / "whole"), outcome(folders / "other")
    assert sum(not torch.equal(tensors[name], others[name]) for name in tensors) > 300
    assert all(a != b for a, b in zip(rows, other_rows, strict=True))


def harm(out, folders, how):
    """Spoil the last checkpoint, that of step 5."""
    state = out / "checkpoint" / "state-000000005.safetensors"
    if how == "truncated":
        os.truncate(state, 1000)
    elif how == "flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 16
        state.write_bytes(content)
    elif how == "half of it missing":
        (out / "checkpoint" / "latest.json").unlink()
        state.unlink()
    else:  # the latest one of another run, put here whole
        for path in (folders / "other" / "checkpoint").iterdir():
            shutil.copy(path, out / "checkpoint")
        (out / "checkpoint" / "state-000000008.json").unlink()
        for path in (out / "checkpoint").glob("state-000000005.*"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "half of it missing", "foreign"])
def test_a_spoilt_checkpoint_costs_steps_and_no_bit(folders, half, how):
    harm(half, folders, how)
    with pytest.warns(
        UserWarning, match=r"(SHA-256|does not exist|of another run).*Taken instead: .*, of step 4"
    ):
        quick(SHORT, half, resume=True)
    assert_same_end(half, folders)


def test_tensors_that_do_not_fit_are_an_error(half):
    for path in (half / "checkpoint").glob("*.json"):
        entry = json.loads(path.read_text())
        del entry["check"], entry["meta"]["seconds"]
        path.write_text(json.dumps(entry))
    with pytest.raises(
        RunError,
        match=r"checkpoint.*\('seconds'\).*move it away",
    ):
        quick(SHORT, half, resume=True)


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond limit bytes: writes break off in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [900, 100_000])  # of metrics.jsonl, of the tensors
def test_a_full_disk_stops_the_run_and_loses_nothing(folders, half, limit):
    before = load_checkpoint(half / "checkpoint")
    with (
        full_disk(limit),
        pytest.raises(RunError, match=r"cannot write.*half.*File too large.*--resume"),
    ):
        quick(SHORT, half, resume=True)
    after = load_checkpoint(half / "checkpoint")
    assert before[0] == after[0] == 5 and all(
        torch.equal(before[1][name], after[1][name]) for name in before[1]
    )
    assert not [path for path in half.rglob(".*") if not path.name.startswith(".lock")], (
        "what was half written is gone"
    )
    quick(SHORT, half, resume=True)
    assert_same_end(half, folders)


@pytest.mark.slow
def test_a_full_disk_at_the_very_end_costs_the_pipeline_alone(folders, half, monkeypatch):
    finish = training.recorder.Recorder.finish

    def finish_on_a_full_disk(recorder):
        with full_disk(20_000):
            finish(recorder)

    monkeypatch.setattr(training.recorder.Recorder, "finish", finish_on_a_full_disk)
    with pytest.raises(RunError, match=r"cannot write.*File too large"):
        quick(SHORT, half, resume=True, finish=True)
    monkeypatch.undo()
    run = load_run(half)
    with pytest.warns(UserWarning, match="has not ended"):
        so_far = run.pipeline().unet
    finished = quick(SHORT, half, resume=True, finish=True).pipeline().unet
    for kept, written in zip(so_far.parameters(), finished.parameters(), strict=True):
        assert torch.equal(kept, written)
    assert_same_end(half, folders)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(tmp_path, half, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write.*file/run.*Not a directory"):
        quick(SHORT, tmp_path / "file" / "run")

    def read_only(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.replace", read_only)
    with pytest.raises(RunError, match=r"cannot write.*half.*Read-only"):
        quick(SHORT, half, resume=True)
    monkeypatch.undo()
    assert load_checkpoint(half / "checkpoint")[0] == 5


def wait_to_be_killed(out, ready):
    begin()
    training.loop._run = lambda *_: ready.set() or signal.pause()
    quick(SHORT, out, resume=True)


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_gone(folders, half):
    ready = CONTEXT.Event()
    first = CONTEXT.Process(target=wait_to_be_killed, args=(half, ready))
    first.start()
    assert ready.wait(60)
    with pytest.raises(
        RunError, match=rf"half is in use by process {first.pid} on .*wait for it, stop it"
    ):
        quick(SHORT, half, resume=True)
    assert load_run(half).summary["status"] == "running"
    first.kill()
    first.join()
    quick(SHORT, half, resume=True)
    assert_same_end(half, folders)


def test_a_process_killed_while_it_claimed_a_new_folder_leaves_it_free(folders, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.json.4711"):
        (tmp_path / "run" / name).write_text("{")
    quick(SHORT, tmp_path / "run")
    assert_same_end(tmp_path / "run", folders)


def test_a_run_older_than_an_option_goes_on_and_a_damaged_configuration_is_named(folders, half):
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("features", "bins")})
    )
    with pytest.raises(RunError, match="bins 10 there, 4 here"):
        quick(SHORT, half, resume=True)
    (half / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "features"})
    )
    quick(SHORT, half, resume=True)
    assert_same_end(half, folders)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "must hold named values"),
        ('{"lr": "x"}', "lr must be float"),
    ):
        (half / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            quick(SHORT, half, resume=True)
