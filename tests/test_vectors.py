"""The test vectors: made anew they are the same, and they agree with plain arithmetic and with diffusers."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

import dysigma

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "vectors"
PAGE = ROOT / "notebooks" / "reference" / "vectors.md"

sys.path.insert(0, str(FOLDER))
script = importlib.import_module("write")
sys.path.pop(0)
VECTOR_SCHEDULES = script.VECTOR_SCHEDULES

DIFFUSERS = {
    "linear": {"beta_schedule": "linear"},
    "scaled-linear": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
}  # fmt: skip


def stored(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def entries(record, name, target):
    return [e for e in record["weights"] if (e["name"], e["target"]) == (name, target)]


def assert_same(made, kept):
    """Equal but for one unit in the last digit, by which processors differ in exp and log."""
    assert type(made) is type(kept)
    if isinstance(made, dict):
        assert list(made) == list(kept)
        for key, value in made.items():
            assert_same(value, kept[key])
    elif isinstance(made, list):
        assert len(made) == len(kept)
        for one, other in zip(made, kept, strict=True):
            assert_same(one, other)
    elif isinstance(made, float):
        assert made == pytest.approx(kept, rel=2e-12, abs=0)
    else:
        assert made == kept


@pytest.mark.parametrize("name", VECTOR_SCHEDULES)
def test_the_vectors_are_made_anew_to_the_last_digit(name):
    assert_same(json.loads(script.as_text(script.vectors(name))), stored(name))


def test_one_command_writes_them_all_and_they_are_small(tmp_path):
    script.main(["--out", str(tmp_path)])
    written = {path.name: path for path in tmp_path.iterdir()}
    kept = {path.name: path for path in FOLDER.glob("*.json")}
    assert set(written) == set(kept)
    assert sum(path.stat().st_size for path in kept.values()) < 1_000_000
    # Strict JSON, which every language reads: no NaN and no Infinity.
    for path in kept.values():
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", VECTOR_SCHEDULES)
def test_plain_arithmetic_gives_the_weights(name):
    record = stored(name)
    known = {"sqrt": math.sqrt, "log": math.log, "sigmoid": lambda x: 1 / (1 + math.exp(-x))}
    formulas = [entry for entry in record["weights"] if entry["formula"]]
    assert len(formulas) == len(record["weights"]) - len(
        [entry for entry in record["weights"] if entry["name"] == "elbo"]
    )
    for entry in formulas:
        for snr, expected in zip(record["snr"], entry["weight"], strict=True):
            if snr == 0:
                # Where a formula has log(snr) or snr / snr its limit counts.
                continue
            value = eval(entry["formula"], {**known, "snr": snr})
            assert value == pytest.approx(expected, rel=record["relative_tolerance"]["float64"])


@pytest.mark.parametrize("name", VECTOR_SCHEDULES)
def test_the_weights_of_the_package_are_the_vectors(name):
    record = stored(name)
    schedule = VECTOR_SCHEDULES[name]
    for entry in record["weights"]:
        weighting = dysigma.make_weighting(
            entry["name"], schedule, entry["target"], **entry["params"]
        )
        weights = weighting.weights()[record["timesteps"]].double()
        expected = torch.tensor(entry["weight"], dtype=torch.float64) / entry["mean"]
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_right_formulas_on_the_snr_of_diffusers_pass(name):
    record = stored(name)
    scheduler = DDPMScheduler(**DIFFUSERS[name])
    snr = compute_snr(scheduler, torch.tensor(record["timesteps"]))
    rtol = record["relative_tolerance"]["float32"]
    checked = 0
    for target, division in (("epsilon", snr), ("v_prediction", snr + 1)):
        for entry in entries(record, "min-snr", target):
            gamma = entry["params"]["gamma"] * torch.ones_like(snr)
            weight = torch.stack([snr, gamma], dim=1).min(dim=1)[0] / division
            torch.testing.assert_close(weight, torch.tensor(entry["weight"]), rtol=rtol, atol=1e-12)
            checked += 1
    assert checked == 6


@pytest.mark.parametrize(("name", "shift"), [("flow", 1.0), ("flow-shift-3", 3.0)])
def test_flow_levels_and_weights_are_those_of_diffusers(name, shift):
    record = stored(name)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    s = scheduler.sigmas[:1000].flip(0).double()[record["timesteps"]]
    rtol = record["relative_tolerance"]["float32"]
    snr = torch.tensor(record["snr"], dtype=torch.float64)
    torch.testing.assert_close(((1 - s) / s) ** 2, snr, rtol=rtol, atol=1e-9)
    # sigma^-2 on the error of x0 is their "sigma_sqrt": the plain error of the velocity.
    weight = compute_loss_weighting_for_sd3("sigma_sqrt", s)
    (entry,) = entries(record, "const-flow", "sample")
    expected = torch.tensor(entry["weight"], dtype=torch.float64)
    torch.testing.assert_close(weight.double(), expected, rtol=rtol, atol=0)


def test_the_logit_normal_density_is_that_of_its_formula():
    record = stored("flow")
    (entry,) = [e for e in record["densities"] if e["params"] == {"mean": 0.5, "std": 0.6}]
    for timestep, density in list(zip(record["timesteps"], entry["density"], strict=True))[1:-1]:
        u = (timestep + 0.5) / 1000
        z = (math.log(u / (1 - u)) - 0.5) / 0.6
        expected = math.exp(-z * z / 2) / (0.6 * math.sqrt(2 * math.pi) * u * (1 - u))
        assert density == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", VECTOR_SCHEDULES)
def test_an_objective_is_density_times_weight(name):
    record = stored(name)
    for entry in record["objectives"]:
        (density,) = [
            other["density"]
            for other in record["densities"]
            if {"name": other["name"], "params": other["params"]} == entry["density"]
        ]
        (weight,) = [
            other["weight"]
            for other in entries(record, entry["weight"]["name"], entry["target"])
            if other["params"] == entry["weight"]["params"]
        ]
        product = torch.tensor(density) * torch.tensor(weight)
        objective = torch.tensor(entry["objective"])
        used = product > 0
        ratio = objective[used] / product[used]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_the_example_of_the_page_runs_and_can_fail(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(compile(code, "the page", "exec"), {})
    with pytest.raises(AssertionError):
        exec(compile(code.replace("(snr + 1)", "snr"), "the page", "exec"), {})
