"""The benchmark times contenders in turns, counts FLOP as it says, and lists what cannot run with its reason."""

import json

import pytest
import torch
from torch import nn

from dysigma.lab import benchmark, contenders
from dysigma.models import PRESETS, make_model
from dysigma.samplers import TIMESTEP_SAMPLERS
from dysigma.training import TrainConfig, load_split

CPU = torch.device("cpu")


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = benchmark.time_in_turn(contenders, 3, CPU)
    assert calls[-6:] == list("ababab")
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_flops_are_two_for_each_multiply_add_of_convolutions_and_products(monkeypatch):
    """A network of one convolution and one linear layer, by hand; and the DDPM network, attention included."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 7)

        def forward(self, x, timesteps):
            return self.linear(self.conv(x).mean((2, 3)))

    monkeypatch.setattr(benchmark, "make_model", lambda preset, size: Network())
    assert benchmark.flops_per_image("", 8) == 3 * 2 * (8 * 8 * 5 * 3 * 3 * 3 + 5 * 7)
    monkeypatch.undo()
    attention = (
        5 * 2 * 2 * 256 * 256 * 256
    )  # layers at 16 x 16, products, 2 FLOP, tokens, tokens, channels
    assert benchmark.flops_per_image("ddpm", 32) == pytest.approx(
        36.32e9 + 3 * attention, rel=0.001
    )


@pytest.mark.parametrize("name", ["by_hand_step", "recipe_step"])
def test_others_train_the_same_network_on_the_same_images(name, monkeypatch):
    pytest.importorskip("accelerate")
    made = []
    monkeypatch.setattr(
        contenders, "make_model", lambda *a: made.append(make_model(*a)) or made[-1]
    )
    config = TrainConfig(model="micro", image_size=8, batch_size=16, train_images=40, images=10**6)
    step, sizes = getattr(contenders, name)(config, load_split(config, "train", CPU)), []
    made[0].register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
    before = [p.clone() for p in made[0].parameters()]
    losses = [float(step()) for _ in range(6)]  # more than an epoch
    assert sizes == [16] * 6, "what is timed is one size"
    assert all(0.5 < loss < 5 for loss in losses), losses  # of unit noise, hardly trained
    assert any((a != b).any() for a, b in zip(before, made[0].parameters(), strict=True))


def test_what_is_not_installed_is_no_contender(monkeypatch):
    there = contenders.importlib.util.find_spec
    monkeypatch.setattr(
        contenders.importlib.util,
        "find_spec",
        lambda name: None if name == "accelerate" else there(name),
    )
    assert [*contenders.contenders(CPU)] == ["dysigma", "dysigma, flow"]


@pytest.mark.slow
def test_a_batch_larger_than_the_number_of_timesteps_is_timed_too(monkeypatch):
    monkeypatch.setattr(benchmark, "MICRO_BATCHES", 6)
    config = TrainConfig(
        model="micro",
        image_size=8,
        batch_size=45,
        num_timesteps=20,
        validation_timesteps=5,
        train_images=45,
        images=10**6,
    )
    found = benchmark.conflict_costs(config, 1, CPU, step=0.25)
    assert found["batch_per_bin"] == 5
    steps = 50 / 45  # of 0.25 seconds, on the 50 samples of a micro-batch
    assert found["ratio"] == pytest.approx(found["seconds"] / (steps * 0.25))


def few_contenders(**others):
    def pick(device):
        return {"dysigma": contenders.own_step, **others}

    return pick


def fails(config, data):
    raise RuntimeError("no such thing here\nand more")


@pytest.mark.slow
def test_the_import_is_timed_in_fresh_processes(capsys):
    assert 0 < benchmark.import_seconds() < 60
    assert "beyond torch" in capsys.readouterr().out


@pytest.mark.slow
def test_the_record_holds_what_ran_and_why_the_rest_did_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "MICRO_BATCHES", 6)
    monkeypatch.setattr(
        benchmark,
        "contenders",
        few_contenders(other=fails, flow=contenders.own_flow_step),
    )
    monkeypatch.setattr(benchmark, "import_seconds", lambda: 0.25)
    out = tmp_path / "b.json"
    result = benchmark.benchmark("micro", 8, [4, 11], rounds=1, device="cpu", out=out)
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").exists()
    assert [cost["batch_size"] for cost in result["steps"]] == [4, 11]
    for cost in result["steps"]:
        rows = cost["steps"]
        assert rows.pop("other") == {"fails": "RuntimeError: no such thing here"}
        assert rows["dysigma"]["ratio"] == 1 and rows["dysigma"]["bytes"] is None
        for row in rows.values():
            assert row["images_per_second"] == pytest.approx(cost["batch_size"] / row["seconds"])
            assert row["share"] == pytest.approx(row["flops"] / result["matmul_flops"])
    assert "min-snr" in result["weighting_overhead"]
    assert set(result["sampler_overhead"]) == set(TIMESTEP_SAMPLERS) - {"uniform"}
    assert (result["conflicts"]["batch_per_bin"], result["conflicts"]["ratio"] > 0) == (1, True)
    assert result["import_seconds"] == 0.25
    said = capsys.readouterr().out
    assert "fails: RuntimeError" in said and "2 FLOP per multiply-add" in said


@pytest.mark.slow
def test_what_was_measured_is_written_though_our_step_and_a_part_fail(monkeypatch, tmp_path):
    def full(config, data):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def only_small(config, data):
        return full(config, data) if config.batch_size > 4 else contenders.own_step(config, data)

    def broken(*_):
        raise ValueError("no report")

    monkeypatch.setattr(benchmark, "contenders", lambda device: {"dysigma": only_small})
    monkeypatch.setattr(benchmark, "conflict_costs", broken)
    monkeypatch.setattr(benchmark, "import_seconds", broken)
    out = tmp_path / "b.json"
    benchmark.benchmark("micro", 8, [11, 4], rounds=1, device="cpu", out=out)
    record = json.loads(out.read_text())
    large, small = record["steps"]
    assert "out of memory" in large["steps"]["dysigma"]["fails"]
    assert small["steps"]["dysigma"]["ratio"] == 1
    assert "min-snr" in record["weighting_overhead"]
    assert record["conflicts"] == {"fails": "ValueError: no report"}


@pytest.mark.slow
def test_presets_can_all_be_counted():
    sizes = [benchmark.flops_per_image(name, 32) for name in PRESETS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("given", [{"rounds": 0}, {"batch_sizes": []}, {"batch_sizes": [4, 0]}])
def test_no_rounds_and_no_images_are_refused(given):
    with pytest.raises(ValueError, match=r"rounds.*batch_sizes.*got"):
        benchmark.benchmark(device="cpu", **given)
