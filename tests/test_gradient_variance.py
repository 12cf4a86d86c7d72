"""The variance of the gradient under each sampler: the formula by hand, and one small network from end to end."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from dysigma.training import TrainConfig, load_split

FOLDER = Path(__file__).resolve().parents[1] / "data/races"

sys.path.insert(0, str(FOLDER))
script = importlib.import_module("gradient_variance")
sys.path.pop(0)


def test_the_relative_variance_is_the_one_by_hand():
    """Four levels, gradients of length 1, 2, 3, 4 in one direction with random sign: the mean gradient is 0."""
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    timesteps = torch.arange(4).expand(6, 4)
    squares = lengths.square().expand(6, 4)
    products = torch.eye(6, dtype=torch.float64) * 5.0
    found = script.Gradients(timesteps, squares, products)
    densities = {"uniform": torch.full((4,), 0.25).double(), "best": lengths / lengths.sum()}
    values = script.relative_variances(found, densities)
    second_moment = float(lengths.square().mean())  # 7.5
    assert values["uniform"] == 1
    assert values["best"] == pytest.approx(float(lengths.mean()) ** 2 / second_moment)
    assert values["stratified"] == pytest.approx(5.0 / (second_moment / 4))


def test_a_mean_gradient_is_taken_off_without_its_noise():
    """Gradients e + n_m with |e|^2 = 3: products are 3 between micro-batches, 3 + 1 within."""
    products = torch.full((8, 8), 3.0, dtype=torch.float64) + torch.eye(8, dtype=torch.float64)
    squares = torch.full((8, 2), 5.0, dtype=torch.float64)
    found = script.Gradients(torch.zeros(8, 2, dtype=torch.long), squares, products)
    values = script.relative_variances(found, {"uniform": torch.ones(1).double()})
    assert values["stratified"] == pytest.approx(1.0 / ((5.0 - 3.0) / 2))


def test_one_network_from_training_to_intervals(monkeypatch):
    monkeypatch.setattr(script, "BATCH", 8)
    monkeypatch.setattr(script, "BOOTSTRAPS", 20)
    config = TrainConfig(
        model="micro", image_size=8, train_images=64, images=64, batch_size=8, device="cpu",
        prediction="flow_prediction", schedule="flow", weighting="min-snr", num_timesteps=200,
    )  # fmt: skip
    data = load_split(config, "train", torch.device("cpu"))
    rows = script.measure(config, data, micro_batches=8, batches=10)
    assert set(rows) == {"const-flow", "min-snr"}
    for found in rows.values():
        assert found["uniform"] == [1.0, 1.0, 1.0]
        for low, high in [found[name][1:] for name in ("sqrt-weight", "gradient-norm")]:
            assert 0 < low <= high
    # A constant weight has nothing for its own root to follow.
    assert rows["const-flow"]["sqrt-weight"][0] == pytest.approx(1.0)
    assert rows["min-snr"]["sqrt-weight"][0] < 0.9


def test_the_table_of_the_results_is_that_of_the_record():
    root = FOLDER.parent
    record = json.loads((root / "runs/gradient-variance/variance.json").read_text())
    text = (root / "RESULTS.md").read_text(encoding="utf-8")
    section = text.split("## Variance of the gradient")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    samplers = (
        "sqrt-weight", "weight", "loss-second-moment", "gradient-norm", "dy-sigma density", "stratified",
    )  # fmt: skip
    measured = [found for network in record["networks"] for found in network["objectives"].values()]
    assert len(rows) == len(measured) >= 6
    for row, found in zip(rows, measured, strict=True):
        cells = row.strip("| ").split(" | ")[2:]
        shown = [float(cell.split(" ")[0]) for cell in cells]
        assert shown == [pytest.approx(found[name][0], abs=0.0051) for name in samplers]
