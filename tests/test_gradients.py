"""Gradients of timestep bins against closed forms, autograd and TorchJD; and that measuring changes nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dysigma import pareto
from dysigma.bins import Bins
from dysigma.exact import LinearDenoiser
from dysigma.foreign import FlowNetwork
from dysigma.gradients import (
    ConflictReport,
    bin_gramian,
    bin_timesteps,
    conflicts,
    cosine_matrix,
    layer_group,
    negative_transfer,
)
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.schedule import NoiseSchedule
from dysigma.weightings import make_weighting

OFF = ~torch.eye(10, dtype=torch.bool)


class Linear:
    """The exact fixture: one timestep per bin, known Gramian and noise, data enough to count as the distribution."""

    def __init__(self, shrink: float = 0.9, dimension: int = 16, num_images: int = 50_000) -> None:
        self.schedule = NoiseSchedule(NoiseSchedule.linear(1000).alphas_cumprod[50::100])
        variances = torch.logspace(0.5, -1, dimension, dtype=torch.float64)
        self.model = LinearDenoiser(self.schedule, variances)
        with torch.no_grad():
            self.model.theta.copy_(self.model.minimiser(torch.ones(10).double()) * shrink)
        self.theta = self.model.theta.detach()
        self.gramian, self.trace = (
            self.model.gramian(self.theta),
            self.model.noise_trace(self.theta),
        )
        self.cosine = cosine_matrix(self.gramian)
        draw = generator(0, 0, "test")
        self.images = (
            torch.randn(num_images, dimension, generator=draw, dtype=torch.float64)
            * variances.sqrt()
        )

    def report(self, seed: int, **options) -> ConflictReport:
        return conflicts(
            self.model, self.images, self.schedule, 10, seed=seed, progress=False, **options
        )


class Net(nn.Module):
    """A small network with what diffusion networks have: time, convolutions, a norm, dropout; float32."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Embedding(20, 8)
        self.head = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))]
        )
        self.dropout = nn.Dropout(dropout)
        self.tail = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x_t: Tensor, timesteps: Tensor, shift: Tensor | None = None) -> Tensor:
        h = self.head(x_t) + self.time(timesteps)[..., None, None]
        h = self.dropout(h + self.blocks[0](h))
        return self.tail(h if shift is None else h + shift[:, None, None, None])


SCHEDULE = NoiseSchedule.linear(20)
BINS = Bins.uniform(20, 4)
IMAGES = (torch.rand(32, 1, 6, 6, generator=generator(0, 1, "test")) * 255).to(torch.uint8)


def batch(per_bin: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = generator(seed, 0, "test")
    timesteps = bin_timesteps(BINS, per_bin, draw).flatten()[
        torch.randperm(4 * per_bin, generator=draw)
    ]
    x0 = torch.randn(4 * per_bin, 1, 6, 6, generator=draw)
    return x0, torch.randn(x0.shape, generator=draw), timesteps


def loop_jacobian(model: nn.Module, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """One forward, one retained backward per bin: what the slices must reproduce."""
    means, _ = BINS.mean(sample_losses(model, SCHEDULE, x0, noise, timesteps), timesteps)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(mean, parameters, retain_graph=True) for mean in means]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_one_part_agrees_with_autograd():
    model, data = Net(), batch(3)
    rows = loop_jacobian(model, *data).double()
    gramian = bin_gramian(model, SCHEDULE, *data, BINS, splits=1)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-5, atol=1e-8)


def test_one_part_agrees_with_torchjd():
    autogram = pytest.importorskip("torchjd.autogram")
    model, data = Net(), batch(3)
    engine = autogram.Engine(model, batch_dim=None)
    means, _ = BINS.mean(sample_losses(model, SCHEDULE, *data), data[2])
    expected = engine.compute_gramian(means)
    gramian = bin_gramian(copy.deepcopy(model), SCHEDULE, *data, BINS, splits=1)
    torch.testing.assert_close(gramian.float(), expected, rtol=1e-4, atol=1e-7)


def test_parts_are_multiplied_with_each_other_only():
    """Two parts by hand: (g_a g_b' + g_b g_a') / 2, where part a holds every bin's first, third, ... sample."""
    model, data = Net(), batch(4)
    index = BINS.index(data[2])
    first = torch.cat([torch.nonzero(index == k).flatten()[::2] for k in range(4)])
    second = torch.cat([torch.nonzero(index == k).flatten()[1::2] for k in range(4)])
    a, b = (loop_jacobian(model, *(x[of] for x in data)).double() for of in (first, second))
    gramian = bin_gramian(model, SCHEDULE, *data, BINS)
    torch.testing.assert_close(gramian, (a @ b.T + b @ a.T) / 2, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_the_training_gramian_is_unbiased():
    exact, repeats = Linear(), 200
    bins = Bins.uniform(10, 10)
    estimates, plain = [], []
    for seed in range(repeats):
        draw = generator(seed, 0, "test")
        timesteps = bin_timesteps(bins, 4, draw).flatten()
        x0 = exact.images[torch.randint(len(exact.images), (40,), generator=draw)]
        noise = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
        for splits, results in ((2, estimates), (1, plain)):
            results.append(
                bin_gramian(exact.model, exact.schedule, x0, noise, timesteps, bins, splits=splits)
            )
    values = torch.stack(estimates)
    z = (values.mean(0) - exact.gramian) / (values.std(0) / math.sqrt(repeats))
    assert z.abs().max() < 4.5
    inflated = exact.gramian.diagonal() + exact.trace / 4
    torch.testing.assert_close(torch.stack(plain).mean(0).diagonal(), inflated, rtol=0.15, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_the_report_is_unbiased_and_its_intervals_cover(paired):
    """Also where bins share images and noise: there the naive cosines are wrong by something else than shrinkage."""
    exact, repeats = Linear(), 40
    reports = [exact.report(seed, paired=paired) for seed in range(repeats)]
    gramians = torch.stack([r.gramian for r in reports])
    z = (gramians.mean(0) - exact.gramian) / (gramians.std(0) / math.sqrt(repeats))
    assert z.abs().max() < 4.5
    errors = torch.stack([r.gramian_se for r in reports]).square().mean(0).sqrt()
    assert float((errors / gramians.std(0)).mean()) == pytest.approx(1, abs=0.15)
    intervals = [r.interval() for r in reports]
    covered = torch.stack(
        [
            torch.where(low.isnan(), low, ((low <= exact.cosine) & (exact.cosine <= high)).double())
            for low, high in intervals
        ]
    )
    assert 0.9 < float(covered[:, OFF].nanmean()) <= 0.995
    debiased = torch.stack([r.cosine_debiased for r in reports]).nanmean(0)
    assert (debiased - exact.cosine)[OFF].abs().max() < 0.12
    gnr = exact.gramian.diagonal() / (exact.trace / 64)
    shrink = (gnr / (1 + gnr)).sqrt()
    naive = torch.stack([r.cosine for r in reports]).mean(0)
    predicted = exact.cosine * torch.outer(shrink, shrink)
    if paired:
        assert (naive - predicted)[OFF].abs().max() > 0.1
    else:
        assert (
            (naive - predicted)[OFF].abs().max()
            < 0.06
            < 0.1
            < (naive - exact.cosine)[OFF].abs().max()
        )
    scale = torch.stack([r.noise_scale for r in reports]).nanmedian(0).values
    torch.testing.assert_close(
        scale[4:], (exact.trace / exact.gramian.diagonal())[4:], rtol=0.3, atol=0
    )


@pytest.mark.slow
def test_stationarity_is_free_of_the_noise_floor():
    exact = Linear(
        shrink=1.0, dimension=1000, num_images=5000
    )  # on the Pareto set: equal weights cancel
    assert pareto.stationarity(exact.gramian) < 1e-7
    reports = [exact.report(seed) for seed in range(15)]
    squares = torch.tensor([r.stationarity * abs(r.stationarity) for r in reports])
    assert abs(squares.mean()) < 4 * squares.std() / math.sqrt(15)
    covering = [r.stationarity_interval[0] <= 0 <= r.stationarity_interval[1] for r in reports]
    assert sum(covering) >= 12
    # The weights that are best against noise alone are inverse to its size: the floor is the harmonic sum.
    floor = 1 / float((64 / exact.trace).sum())
    naive = sum(r.stationarity_naive**2 for r in reports) / 15
    assert naive > 0.8 * floor and naive > 5 * abs(squares.mean())
    away = Linear(shrink=0.0)
    report = away.report(0, micro_batches=64, batch_per_bin=32)
    assert (
        0
        < report.stationarity_interval[0]
        <= pareto.stationarity(away.gramian)
        <= report.stationarity_interval[1]
    )


def test_conflict_rate_and_null():
    # From theta = 0 all gradients point the same way.
    report = Linear(shrink=0.0).report(0, micro_batches=64)
    assert report.conflict_rate == 0 and report.mean_cosine > 0.95 and report.undetermined == 0
    report = Linear(shrink=1.0).report(0, micro_batches=64)
    exact = Linear(shrink=1.0).cosine[OFF]
    known = ~report.cosine_debiased.isnan()
    assert report.conflict_rate == pytest.approx(
        float((Linear(shrink=1.0).cosine[known & OFF] < 0).double().mean()), abs=0.03
    )
    assert report.sure_conflict_rate <= report.conflict_rate
    assert report.null_cosine == -1 / 9
    assert float(exact.mean()) == pytest.approx(report.mean_cosine, abs=0.1)


def test_undetermined_entries_are_nan_and_counted():
    exact = Linear(shrink=1.0)
    report = exact.report(0, micro_batches=6, batch_per_bin=1)
    hidden = report.cosine_debiased.isnan()
    assert report.undetermined == int(hidden.triu(1).sum()) > 0
    assert torch.equal(hidden, report.cosine_se.isnan()) and not report.gramian.isnan().any()


def test_groups_add_up_and_agree_with_autograd():
    model = Net()
    options = {"micro_batches": 6, "batch_per_bin": 2, "progress": False}
    report = conflicts(model, IMAGES, SCHEDULE, BINS, **options)
    assert report.group_names == ["time", "head", "blocks.0", "tail"]
    torch.testing.assert_close(report.group_gramian.sum(0), report.gramian)
    by_kind = conflicts(
        model, IMAGES, SCHEDULE, BINS, groups=lambda name: name.rsplit(".", 1)[1], **options
    )
    assert by_kind.group_names == ["weight", "bias"]
    torch.testing.assert_close(by_kind.gramian, report.gramian)
    for parameter in (
        *model.time.parameters(),
        *model.head.parameters(),
        *model.blocks.parameters(),
    ):
        parameter.requires_grad_(False)
    alone = conflicts(model, IMAGES, SCHEDULE, BINS, **options)
    torch.testing.assert_close(alone.gramian, report.group_gramian[3])
    assert layer_group("_orig_mod.down_blocks.1.resnets.0.conv1.weight") == "down_blocks.1"


def test_sketches_carry_the_intervals_of_large_models(monkeypatch):
    """Folded into few columns, estimates stay exact and intervals stay about right."""
    options = {"micro_batches": 12, "batch_per_bin": 2, "progress": False}
    full = conflicts(Net(), IMAGES, SCHEDULE, BINS, **options)
    monkeypatch.setattr("dysigma.gradients.statistics.SKETCH_COLUMNS", 500)
    folded = conflicts(Net(), IMAGES, SCHEDULE, BINS, **options)
    torch.testing.assert_close(folded.gramian, full.gramian)
    assert not torch.equal(folded.gramian_se, full.gramian_se)
    torch.testing.assert_close(folded.gramian_se, full.gramian_se, rtol=0.3, atol=0)
    assert folded.stationarity == pytest.approx(full.stationarity, rel=0.2)


def test_optimizer_step_and_metric():
    exact = Linear(shrink=0.3)
    optimizer = torch.optim.AdamW(exact.model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        exact.model.losses(exact.model.theta)[:3].sum().backward()
        before = exact.model.theta.detach().clone()
        optimizer.step()
    theta = exact.model.theta.detach()
    downhill = (before - theta).flatten()
    gradients = exact.model.gradients(theta)
    expected = gradients @ downhill / (gradients.norm(dim=1) * downhill.norm())
    state = optimizer.state[exact.model.theta]
    metric = 1 / ((state["exp_avg_sq"] / (1 - 0.999**5)).sqrt() + 1e-8)
    in_metric = cosine_matrix((gradients * metric.flatten()) @ gradients.T)
    report = exact.report(0, micro_batches=64, batch_per_bin=16, optimizer=optimizer)
    known = ~report.update_cosine.isnan()
    error = (report.update_cosine - expected)[known].abs()
    assert known.sum() >= 8 and (error < 4 * report.update_cosine_se[known] + 1e-3).all()
    assert (report.cosine_preconditioned - in_metric)[known][:, known].abs().max() < 0.1
    assert (
        in_metric - cosine_matrix(gradients @ gradients.T)
    ).abs().max() > 0.2  # the metric matters here
    assert "update_cosine" in report.table()
    with pytest.raises(ValueError, match="Adam family"):
        exact.report(0, optimizer=torch.optim.SGD(exact.model.parameters(), lr=0.1))


def test_weighting_multiplies_losses():
    weighting = make_weighting("min-snr", SCHEDULE, "epsilon", normalize=False)
    options = {"micro_batches": 6, "progress": False}
    bins = Bins.uniform(20, 20)  # one timestep per bin: the weight is one factor of the gradient
    plain, weighted = (
        conflicts(Net(), IMAGES, SCHEDULE, bins, weighting=w, **options) for w in (None, weighting)
    )
    weights = weighting.weights().double()
    torch.testing.assert_close(weighted.losses, plain.losses * weights, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        weighted.gramian, plain.gramian * torch.outer(weights, weights), rtol=1e-3, atol=1e-9
    )


def test_measuring_changes_nothing():
    model = Net(dropout=0.5).train()
    model.tail.eval()
    sum(p.sum() for p in model.parameters()).backward()
    model.head.weight.grad = None
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    saved, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        first = conflicts(model, IMAGES, SCHEDULE, BINS, micro_batches=6, progress=False)
    negative_transfer(model, IMAGES, SCHEDULE, BINS, steps=1, samples_per_bin=2, progress=False)
    bin_gramian(model, SCHEDULE, *batch(2), BINS)
    with pytest.raises(ValueError, match="splits"):
        bin_gramian(model, SCHEDULE, *batch(1), BINS)
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    assert first.settings["training"]
    torch.rand(3)  # another random state: the report, dropout included, is a function of the seed
    again = conflicts(model, IMAGES, SCHEDULE, BINS, micro_batches=6, progress=False)
    assert torch.equal(first.gramian, again.gramian)
    assert not torch.equal(
        first.gramian,
        conflicts(model, IMAGES, SCHEDULE, BINS, micro_batches=6, seed=1, progress=False).gramian,
    )


def test_model_arguments_follow_the_samples():
    model, data, shift = Net(), batch(2), torch.linspace(-2, 2, 8)
    losses = sample_losses(model, SCHEDULE, *data, shift=shift)
    means, _ = BINS.mean(losses, data[2])
    rows = [
        torch.autograd.grad(mean, list(model.parameters()), retain_graph=True) for mean in means
    ]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    gramian = bin_gramian(model, SCHEDULE, *data, BINS, splits=1, model_kwargs={"shift": shift})
    torch.testing.assert_close(gramian, jacobian @ jacobian.T, rtol=1e-5, atol=1e-8)


def test_model_arguments_follow_the_images():
    """An argument that repeats the image's own first pixel must arrive beside that image."""

    class Checks(Net):
        def forward(self, x_t: Tensor, timesteps: Tensor, pixel: Tensor) -> Tensor:
            assert (x_t[:, 0, 0, 0] - pixel).abs().max() < 1e-2  # hardly any noise is added
            return super().forward(x_t, timesteps)

    clean = NoiseSchedule(
        torch.tensor([1 - 1e-7, 1 - 2e-7, 1 - 3e-7, 1 - 4e-7], dtype=torch.float64)
    )
    pixel = IMAGES[:, 0, 0, 0].float() / 127.5 - 1
    options = {"micro_batches": 6, "model_kwargs": {"pixel": pixel}, "progress": False}
    for paired in (False, True):
        conflicts(Checks(), IMAGES, clean, 4, paired=paired, **options)
    with pytest.raises(AssertionError):
        conflicts(
            Checks(), IMAGES, clean, 4, **options | {"model_kwargs": {"pixel": pixel.flip(0)}}
        )


@pytest.mark.slow
def test_diffusers_autocast_and_compiled_models():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    images = torch.rand(16, 1, 8, 8, generator=generator(0, 2, "test")) * 2 - 1
    options = {"micro_batches": 6, "batch_per_bin": 2, "progress": False}
    plain = conflicts(unet, images, SCHEDULE, 4, **options)
    assert {"conv_in", "down_blocks.0", "mid_block", "time_embedding"} <= set(plain.group_names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = conflicts(unet, images, SCHEDULE, 4, **options)
    assert (low.cosine - plain.cosine).abs().max() < 0.1 and not torch.equal(
        low.gramian, plain.gramian
    )
    compiled = torch.compile(Net(), backend="aot_eager")
    a = conflicts(compiled, IMAGES, SCHEDULE, BINS, **options)
    b = conflicts(Net(), IMAGES, SCHEDULE, BINS, **options)
    torch.testing.assert_close(a.gramian, b.gramian, rtol=1e-3, atol=1e-7)
    assert a.group_names == b.group_names


def test_report_survives_json():
    report = Linear(shrink=1.0).report(0, micro_batches=6, batch_per_bin=1)
    assert report.cosine_debiased.isnan().any()
    again = ConflictReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.settings == report.settings and again.update_cosine is None
    for name, value in vars(report).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(again, name), value, rtol=0, atol=0, equal_nan=True)
        elif isinstance(value, float) and math.isnan(value):
            assert math.isnan(getattr(again, name))
        else:
            assert getattr(again, name) == value
    with pytest.raises(TypeError):
        ConflictReport.from_dict({"edges": [0, 1]})
    assert report != again and report == report and len({report, again}) == 2
    table = report.table()
    assert len(table) == 10 and list(table["last"]) == list(range(10))


class Bad(nn.Module):
    """A network with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.weight, self.norm = fault, nn.Parameter(torch.ones(())), nn.BatchNorm2d(1)
        self.train(fault == "BatchNorm")
        if fault == "parameters":
            self.requires_grad_(False)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        factor = self.weight
        if self.fault == "NaN":
            factor = factor * torch.where(timesteps >= 15, torch.nan, 1.0)[:, None, None, None]
        if self.fault == "zero":
            factor = factor * (timesteps < 15)[:, None, None, None] + 0 * self.weight
        output = self.norm(x_t) * factor
        return output.repeat(1, 2, 1, 1) if self.fault == "shape" else output


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("BatchNorm", "BatchNorm in train mode"),
        ("parameters", "require a gradient"),
        ("NaN", r"bins \[3\].*NaN has no direction"),
        ("zero", r"bins \[3\].*solved objective"),
        ("shape", "shape of its input"),
    ],
)
def test_faulty_models_are_explained(fault, message):
    with pytest.raises(ValueError, match=message):
        conflicts(Bad(fault), IMAGES, SCHEDULE, BINS, micro_batches=6, progress=False)


class Untouched(Net):
    """A network that must not be run: what is wrong is told before any work."""

    def forward(self, x_t: Tensor, timesteps: Tensor, shift: Tensor | None = None) -> Tensor:
        raise AssertionError("the network was run")


@pytest.mark.parametrize("measure", [conflicts, negative_transfer])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bins": 100}, ValueError, "64 bins"),
        ({"bins": 2000}, ValueError, "bins"),
        ({"bins": 2.5}, ValueError, "bins"),
        ({"bins": Bins.uniform(10, 2)}, ValueError, "end at"),
        ({"images": IMAGES[:0]}, ValueError, "one or more"),
        ({"images": IMAGES.float()}, ValueError, r"\[-1, 1\]"),
        ({"images": IMAGES.float() / torch.nan}, ValueError, "NaN"),
        ({"images": IMAGES.long()}, ValueError, "int64"),
        ({"images": IMAGES.numpy()}, ValueError, "tensor"),
        (
            {"schedule": copy.deepcopy(NoiseSchedule.linear(1000)).to("meta")},
            ValueError,
            "one device",
        ),
        ({"schedule": "linear"}, TypeError, "NoiseSchedule"),
        ({"schedule": type("DDPMScheduler", (), {})()}, TypeError, "from_diffusers"),
        ({"model": torch.relu}, TypeError, "Module"),
        ({"prediction_type": "score"}, ValueError, "prediction type"),
        ({"prediction_type": "flow_prediction"}, ValueError, "flow_prediction"),
        ({"model_kwargs": {"shift": torch.zeros(5)}}, ValueError, "shift"),
        ({"model_kwargs": {"shift": 1.0}}, ValueError, "shift"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_requests_are_told_before_any_work(measure, change, error, words):
    request = {"model": Untouched(), "images": IMAGES, "schedule": NoiseSchedule.linear(1000)}
    with pytest.raises(error, match=words):
        measure(**{**request, **change}, progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"micro_batches": 5}, r"micro_batches.*>= 6"),
        ({"micro_batches": 6.5}, "micro_batches"),
        ({"batch_per_bin": 0}, "batch_per_bin"),
        ({"weighting": make_weighting("min-snr", NoiseSchedule.linear(10))}, "10 timesteps"),
        ({"weighting": make_weighting("min-snr", SCHEDULE, "v")}, "v_prediction"),
        ({"optimizer": torch.optim.Adam(Untouched().parameters())}, "not stepped"),
    ],
)
def test_bad_settings_of_conflicts_are_told_before_any_work(change, words):
    with pytest.raises(ValueError, match=words):
        conflicts(Untouched(), IMAGES, SCHEDULE, BINS, progress=False, **change)


def test_counts_may_be_numbers_of_numpy_and_torch():
    counts = {"micro_batches": np.int64(6), "batch_per_bin": torch.tensor(2), "seed": np.uint8(3)}
    theirs = conflicts(Net(), IMAGES, SCHEDULE, np.int64(4), progress=False, **counts)
    ours = conflicts(
        Net(), IMAGES, SCHEDULE, 4, progress=False, micro_batches=6, batch_per_bin=2, seed=3
    )
    assert theirs.settings == ours.settings and torch.equal(theirs.gramian, ours.gramian)
    json.dumps(theirs.to_dict())


def test_an_empty_bin_of_a_batch_is_explained():
    x0, noise, timesteps = batch(2)
    with pytest.raises(ValueError, match=r"\[4, 4, 0, 0\].*bin_timesteps"):
        bin_gramian(Net(), SCHEDULE, x0, noise, timesteps % 10, BINS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_in_other_precisions_are_measured(dtype):
    """Against the same rounded weights in float32."""
    options = {"micro_batches": 6, "batch_per_bin": 4, "progress": False}
    low = conflicts(Net().to(dtype), IMAGES, SCHEDULE, BINS, **options)
    full = conflicts(Net().to(dtype).float(), IMAGES, SCHEDULE, BINS, **options)
    torch.testing.assert_close(low.losses, full.losses, rtol=1e-2, atol=0)
    assert (low.cosine - full.cosine).abs().max() < 0.02
    size = full.gramian.diagonal()
    assert ((low.gramian.diagonal() - size) / size).abs().max() < 0.05


def test_small_gradients_do_not_vanish_in_float16():
    """Where a network is nearly right, gradients fall below the smallest float16: 6e-8."""

    class Nearly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(1 + 2.0**-10))

        def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
            return (self.factor * x_t).view(x_t.shape)

    clean = NoiseSchedule(torch.tensor([1 - 1e-9, 1 - 2e-9], dtype=torch.float64))
    images = torch.rand(8, 1, 128, 128, generator=generator(0, 3, "test")) * 2 - 1
    options = {"prediction_type": "sample", "micro_batches": 6, "progress": False}
    half = conflicts(Nearly().half(), images.half(), clean, 2, **options)
    full = conflicts(Nearly(), images.half().float(), clean, 2, **options)
    torch.testing.assert_close(half.gramian, full.gramian, rtol=0.1, atol=0)


def test_weights_of_two_precisions_ask_for_autocast():
    model = Net()
    model.head.to(torch.bfloat16)
    with pytest.raises(ValueError, match="autocast"):
        conflicts(model, IMAGES, SCHEDULE, BINS, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        report = conflicts(model, IMAGES, SCHEDULE, BINS, micro_batches=6, progress=False)
    assert report.losses.isfinite().all()


@pytest.mark.parametrize(
    "pack",
    [
        lambda out: (out, None),
        lambda out: [out],
        lambda out: {"sample": out, "logvar": out},
        lambda out: {"prediction": out},
        lambda out: types.SimpleNamespace(sample=out),
    ],
    ids=["tuple", "list", "dict", "only tensor", "object"],
)
def test_outputs_are_unpacked(pack):
    class Packs(Net):
        def forward(self, x_t: Tensor, timesteps: Tensor, shift: Tensor | None = None):
            return pack(super().forward(x_t, timesteps))

    options = {"micro_batches": 6, "batch_per_bin": 1, "progress": False}
    packed = conflicts(Packs(), IMAGES, SCHEDULE, BINS, **options)
    assert torch.equal(packed.gramian, conflicts(Net(), IMAGES, SCHEDULE, BINS, **options).gramian)


def test_measuring_seeds_no_generator_but_its_own(monkeypatch):
    """torch.manual_seed would seed all CUDA devices, whose state nobody puts back when the network is on the CPU."""
    model = Net(dropout=0.5).train()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("all devices are seeded"))
    conflicts(model, IMAGES, SCHEDULE, BINS, micro_batches=6, progress=False)
    negative_transfer(model, IMAGES, SCHEDULE, BINS, steps=1, samples_per_bin=2, progress=False)


def test_a_flow_network_is_told_its_noise_level():
    """Against FlowMatchEulerDiscreteScheduler: index i of its table, from noisy to clean, is our timestep T - 1 - i."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=2.0)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    seen = []

    class Told(Net):
        def forward(self, x_t: Tensor, timesteps: Tensor, shift: Tensor | None = None) -> Tensor:
            seen.append(timesteps)
            return super().forward(x_t, timesteps.round().long() - 1)

    x0, noise, _ = batch(5)
    timesteps = torch.arange(20)
    network = FlowNetwork(Told(), schedule)
    losses = sample_losses(network, schedule, x0, noise, timesteps, "flow_prediction")
    index = 19 - timesteps
    torch.testing.assert_close(seen[0], scheduler.timesteps[index])
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    output = network.network(x_t, scheduler.timesteps[index])
    expected = (output - (noise - x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="flow"):
        FlowNetwork(Told(), SCHEDULE)


def test_bin_timesteps_fill_their_bins_evenly():
    bins = Bins([0, 1, 4, 20])
    timesteps = bin_timesteps(bins, 3000, generator(0, 0, "test"))
    assert timesteps.shape == (3, 3000)
    for k in range(3):
        assert (bins.index(timesteps[k]) == k).all()
        counts = torch.bincount(timesteps[k] - bins.edges[k])
        assert len(counts) == bins.counts[k] and counts.min() > 0.7 * counts.double().mean()


def test_small_steps_transfer_as_the_gramian_says():
    """SGD on bin i changes loss j by -lr steps G_ij to first order."""
    exact, lr, steps = Linear(shrink=0.5), 1e-3, 20
    result = negative_transfer(
        exact.model,
        exact.images,
        exact.schedule,
        10,
        steps=steps,
        batch_size=256,
        samples_per_bin=4096,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        progress=False,
    )
    expected = -lr * steps * exact.gramian
    assert (
        (result.change - expected).abs() < 5 * result.change_se + 0.03 * expected.abs().max()
    ).all()
    assert (result.change.diagonal() < 0).all()
    losses = exact.model.losses(exact.theta)
    assert (result.losses - losses).abs().max() < 0.1
    report = exact.report(0, micro_batches=64)
    ratio = -lr * steps * report.gramian * losses / report.losses / expected
    assert float(ratio.median()) == pytest.approx(1, abs=0.15)


RANKS = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_gradients import BINS, IMAGES, SCHEDULE, Net, bin_gramian, batch, conflicts
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(Net())
report = conflicts(model, IMAGES, SCHEDULE, BINS, micro_batches=7, progress=False)
gramian = bin_gramian(model, SCHEDULE, *(x[rank::2] for x in batch(8)), BINS)
model(torch.zeros(2, 1, 6, 6), torch.zeros(2, dtype=torch.int64)).sum().backward()  # training goes on as before
if rank == 0:
    torch.save((report, gramian, model.module.tail.bias.grad), {out!r})
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_report_as_one(tmp_path: Path):
    out = tmp_path / "report.pt"
    code = RANKS.format(tests=str(Path(__file__).parent), file=tmp_path / "store", out=str(out))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    report, gramian, grad = torch.load(out, weights_only=False)
    alone = conflicts(Net(), IMAGES, SCHEDULE, BINS, micro_batches=7, progress=False)
    torch.testing.assert_close(report.gramian, alone.gramian, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        report.cosine_se, alone.cosine_se, rtol=1e-3, atol=1e-5, equal_nan=True
    )
    assert report.stationarity == pytest.approx(alone.stationarity, rel=1e-4)
    assert gramian.shape == (4, 4) and float(grad) == 72


class Inference(nn.Module):
    """A network made for inference, which takes no gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    @torch.no_grad()
    def forward(self, x, timesteps):
        return self.layer(x)


@pytest.mark.parametrize("measure", [conflicts, negative_transfer])
def test_a_network_without_a_gradient_is_told_so(measure):
    with pytest.raises(ValueError, match=r"detached.*no_grad"):
        measure(Inference(), torch.randn(8, 1, 4, 4), NoiseSchedule.linear(), 2, progress=False)
