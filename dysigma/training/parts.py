"""The parts of a training, built from a configuration: data, schedule, weighting, sampler, network, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import ImageData
from ..data.load import load_data
from ..exact import gaussian_fields
from ..models import EMA, channels_last, make_model
from ..samplers import TimestepSampler, make_sampler
from ..schedule import NoiseSchedule
from ..weightings.base import Weighting
from ..weightings.registry import make_weighting
from .config import TrainConfig


@dataclass
class TrainState:
    """Everything a step changes, and nothing else; state_dict() is what a checkpoint holds."""

    model: nn.Module
    forward: Any  # the model, or its compiled form, which has the same parameters
    ema: EMA
    schedule: NoiseSchedule
    weighting: Weighting
    sampler: TimestepSampler
    optimizer: torch.optim.Optimizer
    step: int = 0

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest)."""
        tensors = {f"ema.{k}": v for k, v in self.ema.state.items()}
        for prefix, module in (
            ("model", self.model),
            ("weighting", self.weighting),
            ("sampler", self.sampler),
        ):
            tensors |= {f"{prefix}.{k}": v for k, v in module.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        return tensors, {"param_groups": optimizer["param_groups"]}

    def load_state_dict(self, step: int, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Inverse of state_dict; raises RuntimeError when names or shapes do not fit."""
        for prefix, module in (
            ("model", self.model),
            ("weighting", self.weighting),
            ("sampler", self.sampler),
        ):
            own = {
                key.removeprefix(f"{prefix}."): v
                for key, v in tensors.items()
                if key.startswith(f"{prefix}.")
            }
            module.load_state_dict(own)
        for name, value in self.ema.state.items():
            value.copy_(tensors[f"ema.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
        for (
            parameter,
            values,
        ) in self.optimizer.state.items():  # fused kernels want one memory format
            for name in ("exp_avg", "exp_avg_sq"):
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(values[name])
        self.step = step


def load_split(config: TrainConfig, split: str, device: torch.device) -> ImageData:
    """The "train" or "test" images a configuration asks for, on the device."""
    count = config.train_images if split == "train" else None
    if config.data == "gaussian-fields":
        data = gaussian_fields(count or 10_000, config.image_size or 8, split=split)
    else:
        size = 16 if config.image_size is None and config.data == "leaves" else config.image_size
        data = load_data(
            config.data, root=config.data_root, split=split, size=size, num_images=count
        )
    if config.conditional and data.labels is None:
        raise ValueError(f"conditional training needs labels, and {data.name} has none")
    return data.to(device)


def make_parts(config: TrainConfig) -> tuple[NoiseSchedule, Weighting, TimestepSampler]:
    """Schedule, weighting and timestep sampler of a configuration, on the CPU."""
    schedule, params = config.noise_schedule(), config.weighting_params
    weighting = make_weighting(
        config.weighting, schedule, config.prediction, config.normalize, **params
    )
    return (
        schedule,
        weighting,
        make_sampler(config.timestep_sampler, schedule, **config.sampler_params),
    )


def build(config: TrainConfig, data: ImageData) -> TrainState:
    """A fresh TrainState on the device of the data; initial weights are a function of config.seed."""
    device = data.images.device
    channels, height, width = data.images.shape[1:]
    if height != width:
        raise ValueError(f"images must be square; got {height} x {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classes = data.num_classes if config.conditional else None
        model = make_model(config.model, height, channels, classes).to(device)
    schedule, weighting, sampler = make_parts(config)
    weighting.to(device)
    groups = [
        {"params": list(model.parameters()), "lr": config.lr, "weight_decay": config.weight_decay}
    ]
    groups += weighting.parameter_groups(config.weighting_lr)
    for group in groups:
        group["base_lr"] = group["lr"]
    fast = device.type == "cuda" if config.compile is None else config.compile
    model = channels_last(model) if fast else model
    return TrainState(
        model=model,
        forward=torch.compile(model, fullgraph=True, dynamic=False) if fast else model,
        ema=EMA(model, config.ema_half_life),
        schedule=schedule.to(device),
        weighting=weighting,
        sampler=sampler.to(device),
        optimizer=torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu")),
    )


def _kwargs(config: TrainConfig, labels: Tensor | None) -> dict[str, Any]:
    return {"class_labels": labels} if config.conditional else {}
