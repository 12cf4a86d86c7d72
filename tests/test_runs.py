import json
from pathlib import Path

import pytest
import torch

from dysigma.runs import (
    RunError,
    append_metrics,
    load_checkpoint,
    load_run,
    read_metrics,
    save_checkpoint,
    write_atomically,
    write_json,
)

TENSORS = {"a": torch.arange(5.0), "b": torch.tensor(3)}


def test_checkpoint_round_trip_keeps_only_the_newest(tmp_path):
    save_checkpoint(tmp_path, 10, {"a": torch.zeros(2)}, {})
    save_checkpoint(tmp_path, 20, TENSORS, {"seconds": 1.5})
    step, tensors, meta = load_checkpoint(tmp_path)
    assert step == 20 and meta == {"seconds": 1.5} and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert len(list(tmp_path.glob("state-*"))) == 1


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no json"])
def test_a_damaged_checkpoint_is_named_and_never_loaded(tmp_path, harm):
    save_checkpoint(tmp_path, 1, TENSORS, {})
    (state,) = tmp_path.glob("state-*")
    content = bytearray(state.read_bytes())
    if harm == "truncate":
        state.write_bytes(content[:-3])
    elif harm == "flip":
        content[-1] ^= 1
        state.write_bytes(content)
    elif harm == "remove":
        state.unlink()
    else:
        (tmp_path / "latest.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"v": 1})
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"v": 2})
    assert json.loads(path.read_text()) == {"v": 1}


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


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="not a run folder"):
        load_run(Path("/nonexistent"))
