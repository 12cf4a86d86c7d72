"""Comparing runs: known curves give known ratios, what differs in kind is refused, one seed claims no interval."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from words import in_order

from dysigma.cli.main import main
from dysigma.evaluation import evaluation_timesteps
from dysigma.lab.compare import COMMON, WITHIN_ARM, compare, draw
from dysigma.lab.convergence import images_to_threshold, speedup
from dysigma.pareto import non_dominated
from dysigma.runs import RunError, append_metrics, load_run, read_json, write_json
from dysigma.schedule import NoiseSchedule
from dysigma.training import TrainConfig, train
from dysigma.weightings import fluctuation

IMAGES = (0, 1000, 2000, 4000, 8000)
T = evaluation_timesteps(1000, 6)
START = torch.linspace(2, 0.5, 6, dtype=torch.float64).numpy()  # loss per timestep at 1000 images


def a_run(
    folder,
    weighting="const-eps",
    seed=0,
    *,
    factor=1.0,
    power=0.5,
    images=IMAGES,
    status="done",
    **fields,
):
    """A run folder whose validation losses are factor * START * (images / 1000)^-power."""
    config = TrainConfig(
        weighting=weighting, seed=seed, images=8000, validation_timesteps=6, **fields
    )
    out = folder / f"{weighting}-{seed}-{factor}-{len(list(folder.iterdir()))}"
    write_json(out / "config.json", config.to_dict())
    write_json(out / "summary.json", {"status": status})
    for step, n in enumerate(images):
        losses = factor * START * (max(n, 100) / 1000) ** -power
        row = {"step": step, "images": n, "bin_weights": [1.0 + seed * 0.1 * step, 1.0]}
        append_metrics(
            out / "metrics.jsonl",
            row | {"validation_timesteps": T, "validation_losses": losses.tolist()},
        )
    return load_run(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Paths of two arms x two seeds, trained."""
    folder, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data") / "noise.npz"
    images = np.random.default_rng(0).integers(0, 256, (72, 8, 8, 3), dtype=np.uint8)
    np.savez(data, train_images=images[:64], test_images=images[64:])
    base = TrainConfig(
        data=str(data), model="micro", images=256, batch_size=16, log_every=2, warmup_images=16, validate_every=64,
        validation_images=8, validation_timesteps=6, device="cpu",
    )  # fmt: skip
    for weighting in ("const-eps", "uncertainty"):
        for seed in (0, 1):
            config = TrainConfig.from_dict(base.to_dict() | {"weighting": weighting, "seed": seed})
            train(config, folder / f"{weighting}-{seed}", progress=False, finish=False)
    return sorted(folder.iterdir())


def test_the_fields_it_names_are_fields():
    fields = set(TrainConfig().to_dict())
    assert set(COMMON) < fields and fields > WITHIN_ARM and not WITHIN_ARM & set(COMMON)


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_power_laws_give_their_ratio_speedup_and_bits(tmp_path, factor):
    """c a n^-b against a n^-b: ratio c, and c^(1/b) times as many images to any loss that both reach."""
    runs = [
        a_run(tmp_path, w, seed, factor=f)
        for w, f in (("const-eps", 1.0), ("min-snr", factor))
        for seed in (0, 1)
    ]
    table = compare(runs).table
    row, base = table.loc["min-snr"], table.loc["const-eps"]
    for name in ("ratio", "ratio_low", "ratio_high"):
        assert row[name] == pytest.approx(factor)
    assert row.loss == pytest.approx(factor * base.loss)
    last, log_snr = START * 8**-0.5, NoiseSchedule.linear(1000).log_snr[T].numpy()
    nats = torch.trapezoid(torch.tensor(last), torch.tensor(-log_snr)) / 2
    assert row.bits == pytest.approx((factor - 1) * float(nats) / math.log(2))
    assert (base.ratio, base.bits, base.reach, base.speedup) == pytest.approx((1, 0, 8000, 1))
    assert list(table.non_dominated) == list(table.front_share == 1) == [factor > 1, factor < 1]
    assert (base.low_noise, base.high_noise) == pytest.approx((last[:3].mean(), last[3:].mean()))
    if factor < 1:
        assert row.reached == 2 and row.reach == pytest.approx(8000 * factor**2)
        assert row.speedup == pytest.approx(factor**-2)
    else:
        assert row.reached == 0 and math.isnan(row.reach) and math.isnan(row.speedup)


@pytest.mark.slow
def test_a_trained_comparison_is_what_ttest_and_speedup_say(trained):
    result = compare([load_run(path) for path in trained])
    row, (base, arm) = result.table.loc["uncertainty"], result.losses.values()
    ends = np.log(arm[:, -1]).mean(1), np.log(base[:, -1]).mean(1)
    low, high = ttest_rel(*ends).confidence_interval()
    assert (row.ratio_low, row.ratio_high) == pytest.approx((math.exp(low), math.exp(high)))
    assert (
        row.ratio == pytest.approx(math.exp((ends[0] - ends[1]).mean()))
        and row.ratio_low < row.ratio < row.ratio_high
    )
    halves = np.array([[x[:, -1, :3].mean(), x[:, -1, 3:].mean()] for x in (base, arm)])
    assert list(result.table.non_dominated) == list(non_dominated(halves))
    n = result.images["uncertainty"]
    reach = [
        {
            s: images_to_threshold(n, np.exp(np.log(x[s]).mean(1)), math.exp(ends[1][s]))
            for s in (0, 1)
        }
        for x in (base, arm)
    ]
    assert row.reached == sum(map(math.isfinite, reach[1].values()))
    if row.reached == 2:
        judged = speedup(*reach)
        assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx(
            (judged.ratio, judged.low, judged.high)
        )
    weights = [load_run(path).metrics.bin_weights.dropna().tolist() for path in trained[2:]]
    cv = [float(fluctuation(torch.tensor(w)[len(w) // 2 :]).median()) for w in weights]
    assert (
        row.fluctuation == pytest.approx(np.mean(cv))
        and row.fluctuation > result.table.loc["const-eps"].fluctuation == 0
    )


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_bits_do_not_depend_on_the_target_that_the_loss_is_of(tmp_path, prediction, monkeypatch):
    snr = NoiseSchedule.linear(1000).log_snr[T].exp().numpy()
    bits = {}
    for kind, factor in (
        ("epsilon", np.ones(6)),
        (prediction, 1 / snr + (prediction == "v_prediction")),
    ):
        monkeypatch.setattr(f"{__name__}.START", START * factor)
        runs = [
            a_run(tmp_path, prediction=kind),
            a_run(tmp_path, "min-snr", prediction=kind, factor=0.9),
        ]
        bits[kind] = compare(runs).table.bits["min-snr"]
    assert bits[prediction] == pytest.approx(bits["epsilon"])


def test_arms_are_what_differs_besides_seed_and_machine(tmp_path):
    runs = [
        a_run(tmp_path, seed=3),
        a_run(tmp_path, seed=4, device="cpu", log_every=7),
        a_run(tmp_path, seed=4, lr=0.01),
        a_run(tmp_path, "dy-sigma", seed=4, weighting_params={"kappa": 0.5}),
        a_run(tmp_path, "dy-sigma", seed=4, weighting_params={"kappa": 0.5}, weighting_lr=0.1),
    ]
    result = compare(runs)
    names = ["const-eps lr=0.001 weighting_lr=None", "const-eps lr=0.01 weighting_lr=None"]
    names += [f"dy-sigma kappa=0.5 lr=0.001 weighting_lr={lr}" for lr in (None, 0.1)]
    assert list(result.table.index) == names
    assert result.seeds == [4] and result.losses[names[0]].shape == (1, 4, 6)


def test_one_seed_has_no_interval_and_says_not_reached(tmp_path):
    result = compare([a_run(tmp_path), a_run(tmp_path, "min-snr", factor=1.1)])
    ends = [f"{name}_{end}" for name in ("ratio", "bits") for end in ("low", "high")]
    assert result.table[ends].isna().all(axis=None)
    text = str(result)
    assert "not reached" in text and "[" not in text and "nan" not in text


def test_a_place_that_cannot_be_written_is_told_before_runs_are_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compare", "none", "none", "--out", str(tmp_path / "file" / "new")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_images_that_moved_between_two_runs_are_the_same_images(tmp_path):
    """Runs on the images of another place are compared if both recorded what the images are."""
    runs = [a_run(tmp_path, data="old"), a_run(tmp_path, "min-snr", factor=0.5, data="new")]
    with pytest.raises(RunError, match="differ in data old, new"):
        compare(runs)
    images = {"images": 3, "shape": [3, 8, 8], "sha256": "0"}
    for run in runs:
        write_json(run.path / "summary.json", {"status": "done", "data": {"train": images}})
    result = compare([load_run(run.path) for run in runs])
    assert list(result.table.index) == ["const-eps", "min-snr"]
    other = {"train": {**images, "sha256": "1"}}
    write_json(runs[1].path / "summary.json", {"status": "done", "data": other})
    with pytest.raises(RunError, match="differ in data old, new"):
        compare([load_run(run.path) for run in runs])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "v"}, "differ in prediction epsilon, v_prediction"),
        (
            {"schedule": "cosine", "num_timesteps": 500},
            "differ in schedule linear, cosine; num_timesteps 1000, 500",
        ),
        ({"data": "cifar10"}, "differ in data leaves, cifar10"),
        ({"schedule": "flow", "shift": 3.0, "prediction": "sample"}, "shift 1.0, 3.0"),
        ({"validation_images": 32}, "differ in validation_images 64, 32"),
        ({"status": "interrupted"}, r"is not finished \(status: interrupted\)"),
        ({"weighting": "const-eps"}, "are the same training: arm and seed 0"),
        (
            {"weighting": "const-eps", "seed": 1},
            "need runs of two arms or more; got 2 of 'const-eps' alone",
        ),
        ({"seed": 1}, "so nothing is paired; seeds: const-eps 0; min-snr 1"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, change, message):
    with pytest.raises(RunError, match=message):
        compare([a_run(tmp_path), a_run(tmp_path, **{"weighting": "min-snr"} | change)])


def test_the_figure_has_a_curve_per_arm_that_ends_where_the_arm_does(tmp_path):
    runs = [a_run(tmp_path, seed=s) for s in (0, 1)] + [
        a_run(tmp_path, "min-snr", s, images=(0, 500, 3000)) for s in (0, 1)
    ]
    fig = draw(compare(runs))
    first, second = (line.get_xydata() for line in fig.axes[0].lines[:2])
    drawn = [points[np.isfinite(points[:, 1]), 0] for points in (first, second)]
    assert [(x.min(), x.max()) for x in drawn] == [(1000, 8000), (500, 3000)]
    assert len(fig.axes[1].lines) == 2
    np.testing.assert_allclose(fig.axes[1].lines[0].get_ydata(), 1)
    plt.close(fig)


def test_the_command_prints_the_table_and_writes_json_and_figure(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, trained), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    first_line = text.partition("\n")[0]
    assert all(word in first_line for word in ("const-eps", "seeds 0, 1", "95 %"))
    assert "uncertainty" in text and "left out" not in text
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]
    record = read_json(out / "compare.json")
    assert record["runs"] == [path.name for path in trained] and str(
        tmp_path.parent
    ) not in json.dumps(record)
    assert record["table"] == compare([load_run(path) for path in trained]).to_dict()["table"]
    assert main(["compare", *map(str, trained[:3])]) == 0
    assert in_order("seeds 0 no intervals left out: 1", capsys.readouterr().out)


def test_bad_input_is_one_line_and_code_2(trained, tmp_path, capsys):
    for paths, message in (
        ([trained[0]], "two arms or more"),
        ([trained[0], tmp_path], "not a run folder"),
    ):
        assert main(["compare", *map(str, paths)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
