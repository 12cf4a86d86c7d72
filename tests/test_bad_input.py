"""Bad input: what each bad call is told, word for word; files changed at random are read right or refused."""

from __future__ import annotations

import ast
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import socket
import struct
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dysigma import data, pareto
from dysigma.bins import Bins
from dysigma.cli.main import main
from dysigma.data import ImageData, batch, leaves, load_data
from dysigma.data.cifar10 import CIFAR10_MD5
from dysigma.lab.race import Race, load_race
from dysigma.models import EMA, PRESETS, make_model
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.runs import (
    RunError,
    load_checkpoint,
    load_run,
    read_config,
    save_checkpoint,
    write_json,
)
from dysigma.samplers import TIMESTEP_SAMPLERS, make_sampler
from dysigma.schedule import PREDICTION_TYPES, SCHEDULES, NoiseSchedule, make_schedule
from dysigma.training import TrainConfig
from dysigma.weightings import GRAMIAN_RULES, VARIANTS, WEIGHTINGS, fluctuation, make_weighting

T = NoiseSchedule.linear(50)
IMAGES = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
LOSSES, TIMESTEPS = torch.ones(4), torch.arange(4)
NO_RUN = "is not a run folder (it has no config.json); dysigma runs FOLDER lists those there are"
NO_SNR = (
    "prediction_type='epsilon' has no weight where SNR = 0 (zero terminal SNR): the input there is the noise, whose "
    "error says nothing about x0. Use 'v_prediction' or 'sample', or a schedule that ends above 0"
)
NO_LOSSES = (
    "losses must be (B,) real, one mean squared error per sample; got shape {}. Use F.mse_loss(output, target, "
    "reduction='none').flatten(1).mean(1)"
)
EDGES = "edges must be int64, start at 0 and increase strictly up to T; got {} (torch.int64). Two equal edges make an empty bin: use fewer bins"
OWN = "or one of your own as 'module:function'"

# Command line: arguments after `dysigma`, and the one line on stderr after "dysigma: ". DIR is the working folder.
COMMANDS: dict[str, str] = {
    "train --out r --weighting-params kappa": "parameters are given as name=value; got 'kappa'",
    "train --out r --weighting minsnr":
        f"unknown weighting 'minsnr' (did you mean 'min-snr'?); have {[*WEIGHTINGS]}, {OWN}",
    "train --out r --prediction epsilom":
        f"unknown prediction type 'epsilom' (did you mean 'epsilon'?); have {[*PREDICTION_TYPES, 'x0', 'v', 'eps', 'flow']}",
    "train --out r --weighting min-snr --weighting-params gama=5": "min-snr has no parameter ['gama']; it has ['gamma']",
    "train --out r --weighting min-snr --weighting-params gamma=-1": "gamma of min-snr must be a number > 0 and < 1e30; got -1",
    "train --out r --weighting min-snr --weighting-params gamma=five":
        "gamma of min-snr must be a number > 0 and < 1e30; got 'five'",
    "train --out r --weighting dy-sigma --weighting-params kappa=Infinity": "kappa must be a number > 0 and < 1e30; got inf",
    "train --out r --weighting dy-sigma --weighting-params variant=inside kappa=2":
        "dy-sigma variant 'inside' has no kappa; got 2",
    "train --out r --weighting dy-sigma --num-timesteps 8 --bins 8 --validation-timesteps 8":
        "bins must be an int in [1, 8], the number of timesteps; got 20",
    "train --out r --zero-terminal-snr": NO_SNR,
    "train --out r --timestep-sampler gauss": f"unknown timestep sampler 'gauss'; have {[*TIMESTEP_SAMPLERS]}",
    "train --out r --timestep-sampler logit-normal --sampler-params std=0": "std must be a finite number in (0, inf]; got 0",
    "train --out r --timestep-sampler lognormal --sampler-params std=0.001":
        "lognormal {'std': 0.001} gives 993 timesteps no probability; widen it",
    "train --out r --data cifar100": "no data 'cifar100'; have 'leaves', 'cifar10', .npz files, folders of PNG/JPEG files",
    "train --out r --model huge": f"unknown model 'huge'; have {[*PRESETS]}",
    "train --out r --train-images 20 --image-size 17":
        "preset 'tiny' halves the image 1 times: image_size must be a multiple of 2 and at least 4; got 17",
    "train --out r --lr 0": "lr must be positive and below inf; got 0.0",
    "train --out r --images 8":
        "batch_size must not exceed images and must be a multiple of accumulate; got images 8, batch_size 32, accumulate 1",
    "train --out none --resume": "none holds no run to resume; leave out --resume to start one there",
    "train --out full": "full is not empty; choose another --out, or continue that run with --resume",
    "train --out r --config none.json": "none.json does not exist",
    "train --out r --config full": "cannot read full: Is a directory",
    "train --out r --config bad.toml": "bad.toml is not valid TOML: Invalid value (at line 1, column 6)",
    "train --out r --config bad.json":
        "bad.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    "train --out r --config binary.json":
        "binary.json is not valid JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    "train --out r --config list.json": "list.json must hold named values; got list",
    "train --out r --config key.json": f"unknown configuration key 'learning_rate'; have {[*TrainConfig().to_dict()]}",
    "train --out r --config type.json": "batch_size must be int; got '32'",
    "train --out r --config nan.json": "lr must be positive and below inf; got nan",
    "runs none": "there is no folder none",
    "train --out r --train-images 8 --distance-images 8 --features junk.npz":
        "features must be 'pixels', 'fid' or a TorchScript file; junk.npz is not a TorchScript file",
    "sample none": f"none {NO_RUN.replace('DIR/', '')}",
    "evaluate none": f"none {NO_RUN.replace('DIR/', '')}",
    "race none.toml --out x": "none.toml does not exist",
    "race list.json --out x": "list.json must hold named values; got list",
    "race key.json --out x":
        "key.json must have exactly name (text), seeds (a list), and tables base, arms and grid",
}  # fmt: skip
FILES: dict[str, bytes] = {
    "full/precious": b"1", "bad.toml": b"lr = = 1", "bad.json": b"{", "binary.json": b"\xff\xfe", "list.json": b"[1]",
    "key.json": b'{"learning_rate": 1}', "type.json": b'{"batch_size": "32"}', "nan.json": b'{"lr": NaN}',
    "deep.json": b"[" * 100_000, "deep.toml": b"a = " + b"[" * 100_000,
    "junk.npz": b"PK\x03\x04junk", "pictures/a.png": b"\x89PNG", "pictures/b.png": b"\x89PNG",
    "junk/cifar-10-python.tar.gz": b"junk", "brace/config.json": b"{", "list/config.json": b"[]",
    "number/config.json": b"{}", "number/summary.json": b"3", "bare/config.json": b"{}",
    "lines/config.json": b"{}", "lines/metrics.jsonl": b'{"step": 1}\nx\n{"step": 2}\n',
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "objects.npz", images=np.array([None, {}]))
    np.savez(tmp_path / "float.npz", images=np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "few.npz", images=np.zeros((20, 8, 8), np.uint8))
    return tmp_path


def test_bad_commands_are_told_one_line_and_leave_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    for command, message in COMMANDS.items():
        assert main(command.split()) == 2, command
        assert capsys.readouterr().err == f"dysigma: {message}\n", command
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", "the following arguments are required: --out"),
        ("train --out r --images many", "argument --images: invalid int value: 'many'"),
        ("sample", "the following arguments are required: RUN"),
    ],
)
def test_commands_that_do_not_parse(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(f"error: {message}\n")


# Python: a call, and str() of what it raises, of which class. DIR is the working folder.
Call = tuple[Callable[[Path], Any], type[Exception], str]
CALLS: list[Call] = [
    (lambda d: make_weighting("min-srn", T), KeyError,
     f"unknown weighting 'min-srn' (did you mean 'min-snr'?); have {[*WEIGHTINGS]}, {OWN}"),
    (lambda d: make_weighting("min-snr", LOSSES), TypeError,
     "schedule must be a NoiseSchedule; got Tensor: use NoiseSchedule.from_diffusers(scheduler)"),
    (lambda d: make_weighting("min-snr", T, gamma=0), ValueError, "gamma of min-snr must be a number > 0 and < 1e30; got 0"),
    (lambda d: make_weighting("min-snr", T, gamma=True), ValueError,
     "gamma of min-snr must be a number > 0 and < 1e30; got True"),
    (lambda d: make_weighting("min-snr", T, gamma=float("nan")), ValueError,
     "gamma of min-snr must be a number > 0 and < 1e30; got nan"),
    (lambda d: make_weighting("min-snr", make_schedule("cosine", zero_terminal_snr=True)), ValueError, NO_SNR),
    (lambda d: make_weighting("dy-sigma", T, clamp=1e300), ValueError,
     "clamp must be a number > 0 and < 1e30; got 1e+300"),
    (lambda d: make_weighting("sigmoid", T, bias=-(2**1100)), ValueError,
     f"bias of sigmoid must be a number > -1e+30 and < 1e30; got {-(2**1100)}"),
    (lambda d: make_weighting("min-snr", T, normalize=False, gamma=1e-300), ValueError,
     "min-snr {'gamma': 1e-300} gives weights that are all 0 or not finite: normalize, or use less"),
    (lambda d: make_weighting("dy-sigma", T, variant="best"), KeyError,
     f"unknown dy-sigma variant 'best'; have {[*VARIANTS]}"),
    (lambda d: make_weighting("dy-sigma", T, floor=[0.1]), ValueError, "floor must be finite, (50,); got shape (1,)"),
    (lambda d: make_weighting("uncertainty", T, bins=51), ValueError,
     "bins must be an int in [1, 50], the number of timesteps; got 51"),
    (lambda d: make_weighting("ugd", T, bins=2.5), ValueError,
     "bins must be an int in [1, 50], the number of timesteps; got 2.5"),
    (lambda d: make_weighting("gramian", T, rule="sum"), KeyError,
     f"unknown gramian rule 'sum'; have {[*GRAMIAN_RULES]}"),
    (lambda d: make_weighting("loss-balance", T, strength=-1), ValueError, "strength must be a number > 0 and < 1e30; got -1"),
    (lambda d: make_weighting("min-snr", T)(LOSSES[:, None], TIMESTEPS), ValueError,
     NO_LOSSES.format("(4, 1), torch.float32")),
    (lambda d: make_weighting("min-snr", T)(TIMESTEPS, TIMESTEPS), ValueError, NO_LOSSES.format("(4,), torch.int64")),
    (lambda d: make_weighting("min-snr", T)(LOSSES, TIMESTEPS + 48), ValueError,
     "timesteps must lie in [0, 50); got values from 48 to 51"),
    (lambda d: make_weighting("min-snr", T)(LOSSES, TIMESTEPS / 2), ValueError,
     "timesteps must be (4,) int64 in [0, 50); got shape (4,), dtype torch.float32"),
    (lambda d: make_weighting("min-snr", T)(LOSSES, TIMESTEPS[:3]), ValueError,
     "timesteps must be (4,) int64 in [0, 50); got shape (3,), dtype torch.int64"),
    (lambda d: make_weighting("min-snr", T)(LOSSES, TIMESTEPS, LOSSES[:2]), ValueError,
     "importance must have shape (4,); got (2,)"),
    (lambda d: fluctuation(LOSSES), ValueError,
     "trajectory must be (steps, T) with at least two steps; got shape (4,)"),
    (lambda d: Bins([0, 5, 5, 10]), ValueError, EDGES.format([0, 5, 5, 10])),
    (lambda d: Bins([1, 5]), ValueError, EDGES.format([1, 5])),
    (lambda d: make_schedule("cosin"), KeyError,
     f"unknown schedule 'cosin' (did you mean 'cosine'?); have {[*SCHEDULES]}"),
    (lambda d: NoiseSchedule(torch.tensor([0.5, 0.9])), ValueError,
     "alphas_cumprod must fall strictly from below 1 to 0 or more; got 2 values from 0.5 to 0.9"),
    (lambda d: make_sampler("stratified", T, std=1), ValueError, "sampler 'stratified' has no parameter ['std']; it has []"),
    (lambda d: sample_losses(torch.nn.Flatten(), T, torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 4), TIMESTEPS),
     ValueError, "x0 and noise must have one shape; got (4, 1, 8, 8) and (4, 1, 8, 4)"),
    (lambda d: sample_losses(lambda x, t: x[:, :, :4], T, *torch.zeros(2, 4, 1, 8, 8), TIMESTEPS), ValueError,
     "the model must return the shape of its input; got (4, 1, 4, 8) for x_t (4, 1, 8, 8). A model that also learns a "
     "variance must be wrapped to return the mean alone"),
    (lambda d: EMA(torch.nn.Linear(1, 1), 0), ValueError, "EMA needs half_life > 0 images and ramp > 0; got 0, 0.05"),
    (lambda d: make_model("big"), KeyError, f"unknown model preset 'big'; have {[*PRESETS]}"),
    (lambda d: pareto.min_norm_weights(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), ValueError,
     "gramian must be symmetric and positive semi-definite; its cosine matrix is not (lowest eigenvalue -0.5). A "
     "debiased estimate need not be: pass project_psd(gramian)"),
    (lambda d: pareto.hypervolume(LOSSES, LOSSES), ValueError,
     "points must be (n, m), one row per point and one column per objective; got (4,)"),
    (lambda d: pareto.non_dominated([[1.0, float("nan")]]), ValueError,
     "points in rows [0] are not finite: leave them out"),
    (lambda d: generator(-1, 0, "x"), ValueError, "seed and step must be zero or more; got -1, 0"),
    (lambda d: batch(ImageData(IMAGES), 0, -1, 4), ValueError,
     "batch needs step >= 0 and batch_size >= 1; got step=-1, batch_size=4"),
    (lambda d: leaves(0), ValueError,
     "leaves needs num_images >= 1, size >= 8, split in ('train', 'test'); got (0, 32, 'train')"),
    (lambda d: TrainConfig(weighting_params="kappa=1"), ValueError, "weighting_params must be dict[str, Any]; got 'kappa=1'"),
    # data files
    (lambda d: load_data("leaves", split="val"), ValueError,
     "split='val', size=None, num_images=None: choose from ('train', 'test'), 8 <= size <= 1024, num_images >= 1"),
    (lambda d: ImageData(IMAGES.float()), ValueError,
     "images: need uint8 images (N, C, H, W), none of them 0; got torch.float32 [4, 1, 8, 8]"),
    (lambda d: ImageData(IMAGES, torch.arange(3)), ValueError,
     "images: labels must be integers (int64) and exact bool, both (4,); got torch.int64 [3]"),
    (lambda d: load_data(d / "none.npz"), ValueError,
     "no data 'DIR/none.npz'; have 'leaves', 'cifar10', .npz files, folders of PNG/JPEG files"),
    (lambda d: load_data(d / "junk.npz"), ValueError,
     "DIR/junk.npz: not a readable .npz of plain arrays (File is not a zip file); write it with numpy.savez"),
    (lambda d: load_data(d / "objects.npz"), ValueError,
     "DIR/objects.npz: not a readable .npz of plain arrays (Object arrays cannot be loaded when allow_pickle=False); "
     "write it with numpy.savez"),
    (lambda d: load_data(d / "float.npz"), ValueError,
     "DIR/float.npz: images must be uint8 (N, H, W[, 1 or 3]); got torch.float64 (4, 8, 8, 3)"),
    (lambda d: load_data(d / "few.npz", num_images=99), ValueError, "few.npz has 18 train images; 99 were asked for"),
    (lambda d: load_data(d / "empty"), ValueError,
     "DIR/empty has no PNG or JPEG files for the train split (CIFAR-10 is called 'cifar10')"),
    (lambda d: load_data(d / "pictures"), ValueError,
     "DIR/pictures/a.png cannot be read as an image of 8 bits a channel (cannot identify image file "
     "'DIR/pictures/a.png')"),
    (lambda d: load_data("cifar10", root=d / "none.tar.gz"), ValueError,
     "there is no CIFAR-10 file DIR/none.tar.gz: give an existing file, or the folder that holds it"),
    (lambda d: load_data("cifar10", root=d / "junk"), ValueError,
     "DIR/junk/cifar-10-python.tar.gz is not the official CIFAR-10 (the archive is truncated or changed: its MD5 is "
     f"0c821f675f132d790b3f25e79da739a7, the official one {CIFAR10_MD5}): delete it and run again"),
    # run folders
    (lambda d: load_run(d / "none"), RunError, f"DIR/none {NO_RUN}"),
    (lambda d: load_run(d / "brace"), RunError,
     "DIR/brace/config.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (lambda d: load_run(d / "list"), RunError, "DIR/list/config.json must hold named values; got list"),
    (lambda d: load_run(d / "number"), RunError, "DIR/number/summary.json must hold named values; got int"),
    (lambda d: load_run(d / "bare").pipeline(), RunError,
     "DIR/bare has no pipeline yet (status: None): let it finish"),
    (lambda d: load_run(d / "lines").metrics, RunError,
     "line 2 of DIR/lines/metrics.jsonl is damaged: b'x'; mend it or take it out"),
    (lambda d: load_checkpoint(d / "none"), RunError,
     "DIR/none/latest.json does not exist, and DIR/none has no other: delete it to start again from the first step"),
    (lambda d: read_config(d / "deep.json"), RunError,
     "DIR/deep.json is not valid JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
    (lambda d: load_race(d / "empty"), RunError,
     "DIR/empty has no records.jsonl with records; dysigma race SPEC --out DIR/empty writes it"),
    (lambda d: Race.from_dict({}), ValueError,
     "race must have exactly name (text), seeds (a list), and tables base, arms and grid"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "message"), CALLS, ids=[f"{i}" for i in range(len(CALLS))]
)
def test_a_bad_call_is_told_in_these_words(
    folder: Path, call: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as raised:
        call(folder)
    assert type(raised.value) is kind
    assert str(raised.value.args[0]).replace(str(folder), "DIR") == message


def test_the_table_is_long_enough() -> None:
    assert len(COMMANDS) + len(CALLS) >= 90


def test_nesting_is_no_way_to_crash(folder: Path) -> None:
    with pytest.raises(RunError, match=r"deep\.toml is not valid TOML: .*recursion"):
        read_config(folder / "deep.toml")


# --- CIFAR-10 with random changes that its hashes vouch for -------------------------------------------------------------

PIXELS, LABELS = np.random.default_rng(0).integers(0, 256, (2, 12), dtype=np.uint8), [3, 7]


def python2_batch() -> bytes:
    """{'data': (2, 12) uint8, 'labels': [3, 7]} as Python 2 pickled it."""
    dtype = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x0c\x86"
    raw = b"T" + struct.pack("<i", 24) + PIXELS.tobytes()
    return b"\x80\x02}(U\x06labels](K\x03K\x07eU\x04data" + array + dtype + b"\x89" + raw + b"tbu."


WHOLE = python2_batch()
# Pieces of pickles: names, calls, memo, and opcodes that build things from what lies on the stack.
PIECES = [
    b"cos\nsystem\n",
    b"cbuiltins\nexec\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"R",
    b"\x81",
    b"b",
    b"i",
    b"o",
    b"(",
    b"t",
    b"\x85",
    b"0",
    b"2",
    b"q\x00",
    b"h\x00",
    b"N",
    b"]",
    b"}",
    b"s",
    b"u",
    b".",
    b"\x92",
    b"\x97",
    b"\x98",
    b"Q",
    b"Pid\n",
    b"\x82\x01",
]


@st.composite
def changed(draw: Any, whole: bytes) -> bytes:
    """Bytes cut, flipped, overwritten, spliced with pieces of pickles; or nothing but noise."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    raw = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(raw) - 1, 0)))
        how = draw(st.integers(0, 4))
        if how == 0:
            del raw[place:]
        elif how == 1 and raw:
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif how == 2:
            raw[place : place + 4] = draw(st.binary(max_size=8))
        elif how == 3:
            raw[place:place] = draw(st.sampled_from(PIECES))
        else:
            raw[place : place + draw(st.integers(0, 9))] = draw(st.sampled_from(PIECES))
    return bytes(raw)


def plain(value: Any) -> bool:
    """Whether value is built of nothing but arrays, containers and constants."""
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        parts = itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value
        return all(map(plain, parts))
    return value is None or type(value) in (int, float, bool, str, bytes, bytearray, complex, np.ndarray, np.dtype) or value in (
        np.ndarray, np.dtype, np.empty(0).__reduce__()[0],
    )  # fmt: skip


@settings(max_examples=600)
@given(changed(WHOLE))
def test_a_changed_pickle_gives_plain_data_or_an_error(raw: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = data._ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
    except Exception:
        return
    assert plain(value), value


@pytest.fixture(scope="module")
def blessed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cifar")


@settings(max_examples=150)
@given(changed(WHOLE), st.booleans())
def test_a_changed_batch_is_read_right_or_refused(
    blessed_folder: Path, raw: bytes, archived: bool
) -> None:
    root = blessed_folder / "cifar-10-python.tar.gz"
    if archived:
        with tarfile.open(root, "w:gz", compresslevel=1) as tar:
            info = tarfile.TarInfo("../../cifar-10-batches-py/data_batch_1")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    else:
        root = blessed_folder / "batches"
        root.mkdir(exist_ok=True)
        (root / "data_batch_1").write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(
            data, "CIFAR10_BATCHES", {"train": {"data_batch_1": hashlib.md5(raw).hexdigest()}}
        )
        if archived:
            patch.setattr(data, "CIFAR10_MD5", hashlib.md5(root.read_bytes()).hexdigest())
        try:
            got = load_data("cifar10", root=root)
        except ValueError as error:
            assert "is not the official CIFAR-10" in str(error)
        else:
            assert got.images.dtype == torch.uint8 and got.images.shape == (len(got), 3, 32, 32)
            assert (
                got.labels is not None
                and got.labels.shape == (len(got),)
                and 0 <= int(got.labels.min()) <= int(got.labels.max()) < 10
            )
    assert (
        sorted(path.name for path in blessed_folder.parent.iterdir() if "batches-py" in path.name)
        == []
    )


# --- run folders with random changes ------------------------------------------------------------------------------------


class Evil:
    """A pickle of this leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


STATES = {
    1: {"a": torch.arange(40.0), "b": torch.tensor(3)},
    2: {"a": torch.arange(40.0) ** 2, "b": torch.tensor(5)},
}
METAS = {
    1: {"seconds": 1.5, "param_groups": [{"lr": 0.1}]},
    2: {"seconds": 2.5, "param_groups": [{"lr": 0.2}]},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "run"
    write_json(out / "config.json", TrainConfig().to_dict())
    write_json(out / "summary.json", {"status": "running", "step": 2})
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(3))
    )
    for step, tensors in STATES.items():
        save_checkpoint(out / "checkpoint", step, tensors, METAS[step])
    model = make_model("micro", 8, 1)
    model.save_pretrained(out / "pipeline" / "unet")
    T.to_diffusers().save_pretrained(out / "pipeline" / "scheduler")
    write_json(out / "pipeline" / "model_index.json", {"_class_name": "DDPMPipeline"})
    return out


def change_files(out: Path, rng: random.Random, mark: Path) -> list[str]:
    """Harm one to three files of a run folder; returns which."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    chosen = rng.sample(files, rng.randint(1, 3))
    for path in chosen:
        content, how = bytearray(path.read_bytes()), rng.randrange(8)
        if how == 0:
            del content[rng.randrange(len(content)) :]
        elif how <= 2:
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif how == 3:
            content = bytearray(rng.randbytes(rng.randint(0, 200)))
        elif how == 4:
            content = bytearray(pickle.dumps(Evil(mark)))
        elif how == 5:
            content = bytearray(
                rng.choice(
                    [
                        b"[]",
                        b"{}",
                        b"null",
                        b"3",
                        b'"x"',
                        b"[" * 99_999,
                        b"NaN",
                        b"1e999",
                        b"{" * 99_999,
                    ]
                )
            )
        path.unlink()
        if how == 6:
            path.mkdir()
        elif how != 7:
            path.write_bytes(content)
    # What diffusers would take in place of absent safetensors.
    (out / "pipeline" / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(Evil(mark))
    )
    return [str(path.relative_to(out)) for path in chosen]


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_run_folder_is_read_right_or_refused(
    run_folder: Path, tmp_path: Path, seed: int
) -> None:
    rng, mark = random.Random(seed), tmp_path / "mark"
    outcomes = {"right": 0, "the one before": 0, "refused": 0}
    for number in range(75):
        out = shutil.copytree(run_folder, tmp_path / str(number))
        harmed = change_files(out, rng, mark)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                step, tensors, meta = load_checkpoint(out / "checkpoint")
            except RunError:
                outcomes["refused"] += 1
            else:
                outcomes["right" if step == 2 else "the one before"] += 1
                assert meta == METAS[step] and tensors.keys() == STATES[step].keys(), harmed
                assert all(torch.equal(tensors[name], STATES[step][name]) for name in tensors), (
                    harmed
                )
            try:
                run = load_run(out)
                assert isinstance(run.config, dict) and isinstance(run.summary, dict)
                assert len(run.metrics) <= 3
                if not any("pipeline" in name for name in harmed):
                    run.pipeline()
            except RunError as error:
                assert str(error).count("\n") == 0
            if number % 5 == 0 and (out / "config.json").is_file():
                try:
                    load_run(out).pipeline()
                except RunError as error:
                    assert str(error).count("\n") == 0
        assert not mark.exists(), f"a pickle ran, after changes of {harmed}"
        shutil.rmtree(out)
    assert outcomes["right"] > 20 and outcomes["the one before"] + outcomes["refused"] > 0


def test_the_evil_pickle_of_these_tests_does_run_elsewhere(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


# --- what the package never does ----------------------------------------------------------------------------------------

NEVER = {
    "eval", "exec", "compile", "os.system", "os.popen", "os.execv", "pickle.load", "pickle.loads", "torch.load",
    "torch.save", "pickle.dump", "shutil.unpack_archive", "tar.extract", "tar.extractall", "file.extractall",
}  # fmt: skip


def test_no_shell_no_code_from_data_no_extraction_and_one_address() -> None:
    called: dict[str, list[str]] = {}
    for path in Path(data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called.setdefault(ast.unparse(node.func), []).append(path.stem)
                values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert (
                    values.get("shell", "False") == "False"
                    and values.get("allow_pickle", "False") == "False"
                )
    assert not NEVER & called.keys()
    assert (
        called["subprocess.run"] == ["runs"]
        and called["urlopen"] == ["data"]
        and called["_ArraysOnly"] == ["data"]
    )
    assert data.CIFAR10_URL.startswith("https://")


def test_training_sampling_and_reading_back_never_touch_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("somebody called home")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(variable, raising=False)
    options = "--model micro --images 16 --batch-size 8 --image-size 8 --train-images 16 --validation-images 4 --quiet"
    assert (
        main(
            [
                "train",
                "--out",
                str(tmp_path / "run"),
                "--validation-timesteps",
                "5",
                "--device",
                "cpu",
                *options.split(),
            ]
        )
        == 0
    )
    assert load_run(tmp_path / "run").pipeline()
