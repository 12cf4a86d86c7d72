"""Many ranks: their number changes nothing but rounding, resumed or not; a rank that dies is not waited for."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import BASE, CONTEXT, begin

from dysigma import training
from dysigma.cli.main import main
from dysigma.runs import load_checkpoint, load_run, read_metrics
from dysigma.training import build, load_split, train

STEPS, STOP = 40, 20
# Everything that looks at losses: a learnable weighting with running means, a floor and a Gramian, an adaptive sampler.
CONFIG = dataclasses.replace(
    BASE, images=STEPS * 8, checkpoint_every=160, validate_every=160, log_every=10, accumulate=2, conditional=True,
    weighting="dy-sigma", weighting_params={"variant": "conflict", "floor": "online", "bins": 4, "gramian_every": 10},
    timestep_sampler="loss-second-moment", sampler_params={"bins": 4},
)  # fmt: skip
# What is learned sets the density of timesteps, from gradient norms that the ranks gather.
DENSITY = dataclasses.replace(
    BASE, images=96, checkpoint_every=96, validate_every=96, accumulate=2, weighting="dy-sigma", weighting_lr=0.05,
    weighting_params={"variant": "density", "bins": 4}, timestep_sampler="weighting",
)  # fmt: skip


def run_rank(rank, count, out, stop):
    """Train as one rank of `count`, until a signal to the last one after `stop` steps; leaves all its state by out."""
    begin()
    meeting = out.with_suffix(f".{count}-{stop}")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count
    )
    states, build_state = [], training.recorder.build

    def kept_build(*args, **options):
        states.append(build_state(*args, **options))
        return states[-1]

    @contextlib.contextmanager
    def stop_signals():
        yield lambda: rank == count - 1 and states[0].step == stop

    training.recorder.build = kept_build
    training.loop.stop_signals = stop_signals
    with contextlib.suppress(KeyboardInterrupt):
        train(CONFIG, out, resume=out.exists(), progress=False, finish=False)
    saved = states[0].state_dict()[0]
    if stop is None:  # once is enough, and another launch would take long
        train(DENSITY, out.with_suffix(".density"), progress=False, finish=False)
        of_density = states[1].state_dict()[0]
        saved |= {f"density.{name}": value for name, value in of_density.items()}
    torch.save(saved, out.with_suffix(f".{rank}"))
    torch.distributed.destroy_process_group()


def run_ranks(count, out, stop=None):
    ranks = [
        CONTEXT.Process(target=run_rank, args=(rank, count, out, stop)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * count
    states = [torch.load(out.with_suffix(f".{rank}")) for rank in range(count)]
    assert all(
        torch.equal(state[name], states[0][name]) for state in states for name in states[0]
    ), "ranks drifted"


@pytest.mark.slow
def test_1_2_and_4_ranks_agree_and_go_on_with_another_number(tmp_path):
    train(CONFIG, tmp_path / "one", progress=False, finish=False)
    run_ranks(4, tmp_path / "four", stop=STOP)
    assert load_run(tmp_path / "four").summary["step"] == STOP
    shutil.copytree(tmp_path / "four", tmp_path / "four-one")
    run_ranks(2, tmp_path / "four")
    train(CONFIG, tmp_path / "four-one", resume=True, progress=False, finish=False)
    train(DENSITY, tmp_path / "density", progress=False, finish=False)

    whole = load_checkpoint(tmp_path / "density/checkpoint")[1]
    shared = load_checkpoint(tmp_path / "four.density/checkpoint")[1]
    learned = whole["weighting.coefficients"]
    assert float(learned.abs().max()) > 0.1, "the density has moved"
    for name in [name for name in whole if name.startswith(("model", "weighting"))]:
        torch.testing.assert_close(shared[name], whole[name], rtol=1e-3, atol=2e-4)

    start = build(CONFIG, load_split(CONFIG, "train", torch.device("cpu"))).state_dict()[0]
    ends = {
        name: load_checkpoint(tmp_path / name / "checkpoint")
        for name in ("one", "four", "four-one")
    }
    rows = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ends}
    for name, (step, end, _) in ends.items():
        assert step == STEPS and [row["step"] for row in rows[name]] == [
            row["step"] for row in rows["one"]
        ]
        for part in ("model", "ema", "weighting", "sampler"):
            names = [key for key in start if key.startswith(part)]
            off, moved = (sum(float((end[key] - of[key]).double().square().sum()) for key in names) ** 0.5
                          for of in (ends["one"][1], start))  # fmt: skip
            assert moved > 0 and off <= 1e-3 * moved, (
                f"{name}: {part} is {off / moved:.1e} of its way off"
            )
        for row, expected in zip(rows[name], rows["one"], strict=True):
            for key in row.keys() - {"seconds"}:
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), (
                    name,
                    row["step"],
                    key,
                )


def run_command(rank, count, port, out):
    """`dysigma train` as torchrun would start it, its errors kept beside out."""
    begin()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    options = "--model micro --images 800000 --batch-size 8 --image-size 8 --train-images 32 --device cpu --quiet"
    options += " --num-timesteps 50 --validation-timesteps 5 --validation-images 4 --log-every 2 --checkpoint-every 80"
    sys.stderr = out.with_suffix(f".{rank}").open("w")
    code = main(
        ["train", *options.split(), f"--out={out}", *(["--resume"] if out.exists() else [])]
    )
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def two_ranks(out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=run_command, args=(rank, 2, port, out)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) > 1)
        yield ranks
    finally:
        for process in ranks:
            process.kill()


def wait_for(condition):
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.05)


def test_a_signal_to_one_rank_saves_and_a_rank_that_dies_is_not_waited_for(tmp_path):
    out = tmp_path / "run"
    with two_ranks(out) as ranks:
        os.kill(ranks[1].pid, signal.SIGTERM)
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [130, 130]
    summary = load_run(out).summary
    assert summary["status"] == "interrupted" and summary["provenance"]["ranks"] == 2
    assert load_checkpoint(out / "checkpoint")[0] == summary["step"]
    assert f"go on with: dysigma train --resume --out {out}" in out.with_suffix(".0").read_text()

    (out / "metrics.jsonl").unlink()
    with two_ranks(out) as ranks:
        ranks[1].kill()
        ranks[0].join(60)
        assert ranks[0].exitcode == 2
    said = out.with_suffix(".0").read_text()
    assert (
        said.splitlines()[-1].startswith("dysigma: lost another rank")
        and "Connection" in said
        and "--resume" in said
    )
    assert load_checkpoint(out / "checkpoint")[0] >= summary["step"]


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed_and_says_which(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "dysigma",
    ]
    command += [
        "train",
        "--model=micro",
        "--images=800000",
        "--batch-size=8",
        "--image-size=8",
        "--train-images=32",
    ]
    command += ["--device=cpu", "--quiet", "--log-every=2", f"--out={out}"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) > 1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (rank_1,) = [
            pid
            for pid in children
            if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")
        ]
        os.kill(int(rank_1), signal.SIGKILL)
        _, said = process.communicate(timeout=90)
    finally:
        process.kill()
    assert (
        process.returncode and "Signal 9 (SIGKILL)" in said and "dysigma: lost another rank" in said
    ), said


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training.parallel, "rank_and_count", lambda: (0, 3))
    with pytest.raises(
        ValueError,
        match=r"batch_size.*multiple.*8.*3 ranks",
    ):
        train(BASE, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("device", "message"), [("cpu:0", "must be auto, cpu or cuda"), ("cuda", "cannot be used")]
)
def test_a_device_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch, device, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(BASE, device=device), tmp_path / "run", progress=False)


def test_ranks_on_gpus_need_one_each(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local in (None, "2"):
        if local:
            monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(ValueError, match=r"LOCAL_RANK.*2 GPUs"):
            train(dataclasses.replace(BASE, device="auto"), tmp_path / "run", progress=False)
