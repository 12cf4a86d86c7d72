"""The benchmark times contenders in turns, counts FLOP as it says, and lists what cannot run with its reason."""

import json
import sys

import pytest
import torch
from torch import nn

from dysigma.lab import benchmark
from dysigma.models import PRESETS, make_model
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


@pytest.mark.parametrize("name", ["_recipe_step", "_lucidrains_step"])
def test_others_train_the_same_network_on_the_same_images(name, monkeypatch, request):
    pytest.importorskip("accelerate")
    if name == "_lucidrains_step":
        request.getfixturevalue("lucidrains")
    made = []
    monkeypatch.setattr(benchmark, "make_model", lambda *a: made.append(make_model(*a)) or made[-1])
    config = TrainConfig(model="micro", image_size=8, batch_size=16, train_images=40, images=10**6)
    step, sizes = getattr(benchmark, name)(config, load_split(config, "train", CPU)), []
    made[0].register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
    before = [p.clone() for p in made[0].parameters()]
    losses = [step() for _ in range(6)]  # more than an epoch
    assert sizes == [16] * 6, "what is timed is one size"
    assert all(0.5 < loss < 5 for loss in losses), losses  # of unit noise, hardly trained
    assert any((a != b).any() for a, b in zip(before, made[0].parameters(), strict=True))


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


def test_the_record_holds_what_ran_and_why_the_rest_did_not(monkeypatch, tmp_path, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(benchmark, "MICRO_BATCHES", 6)
    monkeypatch.setitem(
        sys.modules, "denoising_diffusion_pytorch.denoising_diffusion_pytorch", None
    )
    out = tmp_path / "b.json"
    result = benchmark.benchmark("micro", 8, [4, 11], rounds=1, device="cpu", out=out)
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").exists()
    assert [cost["batch_size"] for cost in result["steps"]] == [4, 11]
    for cost in result["steps"]:
        rows = cost["steps"]
        assert "denoising_diffusion_pytorch" in rows.pop("denoising-diffusion-pytorch")["fails"]
        assert list(rows) == ["dysigma", "diffusers recipe", "diffusers recipe, bf16"]
        assert rows["dysigma"]["ratio"] == 1 and rows["dysigma"]["bytes"] is None
        for row in rows.values():
            assert row["images_per_second"] == pytest.approx(cost["batch_size"] / row["seconds"])
            assert row["share"] == pytest.approx(row["flops"] / result["matmul_flops"])
        assert set(cost["parts"]) >= {"forward", "forward and backward", "optimizer", "EMA"}
    assert "min-snr" in result["weighting_overhead"]
    assert (result["conflicts"]["batch_per_bin"], result["conflicts"]["ratio"] > 0) == (1, True)
    said = capsys.readouterr().out
    assert "fails: ModuleNotFoundError" in said and "2 FLOP per multiply-add" in said


def test_presets_can_all_be_counted():
    sizes = [benchmark.flops_per_image(name, 32) for name in PRESETS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("given", [{"rounds": 0}, {"batch_sizes": []}, {"batch_sizes": [4, 0]}])
def test_no_rounds_and_no_images_are_refused(given):
    with pytest.raises(ValueError, match="rounds and batch_sizes must be 1 or more; got"):
        benchmark.benchmark(device="cpu", **given)


def test_a_batch_that_is_too_large_for_us_is_named(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark, "build", full)
    with pytest.raises(ValueError, match="our step fails with batch size 4: CUDA out of memory"):
        benchmark.benchmark("micro", 8, [4], device="cpu")
