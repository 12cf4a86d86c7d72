"""What every test relies on: one thread, no display, no network, nobody's data folder."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# Shared machines stall now and then, so time is no reason to fail; failures must come again with the same draws.
hypothesis.settings.register_profile("dysigma", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("dysigma")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYSIGMA_DATA", str(tmp_path / "dysigma-data"))


@pytest.fixture(autouse=True)
def _same_default_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def lucidrains(monkeypatch: pytest.MonkeyPatch) -> Any:
    """denoising-diffusion-pytorch, without what it imports for data loading, averaging and evaluation."""

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": lambda self, *args, **kwargs: None})

    needs = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.utils",
        "torchvision.datasets",
        "ema_pytorch",
    ]
    for module in [*needs, "pytorch_fid", "pytorch_fid.inception", "pytorch_fid.fid_score"]:
        monkeypatch.setitem(sys.modules, module, Anything(module))
    return pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
