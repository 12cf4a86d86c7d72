"""The script on routes to Gramians compares like with like: the same numbers by every route, memory of its own."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dysigma.bins import Bins
from dysigma.gradients import bin_timesteps
from dysigma.models import make_model
from dysigma.objective import sample_losses
from dysigma.randomness import generator
from dysigma.schedule import make_schedule

FOLDER = Path(__file__).resolve().parent.parent / "data/races"
CPU = torch.device("cpu")

sys.path.insert(0, str(FOLDER))
script = importlib.import_module("conflict_routes")
sys.path.pop(0)


@pytest.fixture
def one_process(monkeypatch):
    """Memory is then measured here, where it means little, but at once."""
    monkeypatch.setattr(script, "ProcessPoolExecutor", ThreadPoolExecutor)


@pytest.mark.parametrize(
    "route",
    ["bin_gramian", "TorchJD autogram, per sample", "TorchJD jac, bin by bin", "retained graph"],
)
def test_every_route_leads_to_the_gramian_of_the_bin_means(route):
    if route.startswith("TorchJD"):
        pytest.importorskip("torchjd")
    torch.manual_seed(0)
    model, draw = make_model("micro", 8), generator(0, 0, "benchmark")
    timesteps = bin_timesteps(Bins.uniform(1000, 10), 2, draw)
    x0, noise = torch.randn(2, 10, 2, 3, 8, 8, generator=draw)
    rows = []
    for part in zip(x0, noise, timesteps, strict=True):
        model.zero_grad()
        sample_losses(model, make_schedule("cosine"), *part).mean().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    expected = torch.stack([torch.stack([a @ b for a in rows]) for b in rows])
    gramian = script._routes("micro", 8, 2, CPU)[route]().double()
    torch.testing.assert_close(gramian, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_a_route_that_fails_or_errs_is_listed_with_its_reason_and_not_timed(
    one_process, monkeypatch, capsys
):
    right = torch.eye(3, dtype=torch.float64)

    def broken():
        raise RuntimeError("no rule for this layer\nlong trace")

    routes = {"bin_gramian": right.clone, "close": lambda: right + 1e-4}
    routes |= {"wrong": lambda: right * 1.1, "nan": lambda: right * float("nan"), "broken": broken}
    routes |= {"training steps": lambda: None, "conflicts": lambda: None}
    monkeypatch.setattr(script, "_routes", lambda *batch: routes)
    found = script.conflict_costs("micro", 8, 2, 2, CPU)["routes"]
    assert list(found) == list(routes)
    assert found["close"]["error"] == pytest.approx(1e-4)
    assert found["wrong"] == {
        "fails": "ValueError: its Gramian differs by 10.0% of the largest entry"
    }
    assert found["broken"] == {"fails": "RuntimeError: no rule for this layer"}
    assert "nan%" in found["nan"]["fails"]
    assert "no rule for this layer" in capsys.readouterr().out


@pytest.mark.slow
def test_without_torchjd_its_rows_say_so_and_the_others_stand(one_process, monkeypatch):
    for module in ("torchjd", "torchjd.autogram", "torchjd.autojac"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(script, "MICRO_BATCHES", 6)
    found = script.conflict_costs("micro", 8, 1, 1, CPU)["routes"]
    assert {name for name, row in found.items() if "torchjd" in row.get("fails", "")} == {
        name for name in found if "TorchJD" in name
    }
    assert sum("fails" in row for row in found.values()) == 3


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell a process its peak"
)
def test_the_peak_is_of_the_call_alone():
    """64 MiB held for a moment, in a process whose parent is larger by far."""
    held = torch.ones(2**26)
    code = (
        f"import sys, torch; sys.path.insert(0, {str(FOLDER)!r}); cpu = torch.device('cpu')\n"
        "import conflict_routes as b\n"
        "b._routes = lambda preset, size, count, device: {'x': lambda: torch.ones(count).fill_(2)}\n"
        "print(b._peak_memory('x', 'micro', 8, 2**24, cpu))"
    )
    peak = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert held[0] == 1 and 2**26 <= peak < 2**26 + 2**23
