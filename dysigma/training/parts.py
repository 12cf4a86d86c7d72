"""The parts of a training, built from a configuration: data, schedule, weighting, sampler, network, optimizer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import pareto
from ..data.dataset import ImageData
from ..data.load import load_data
from ..devices import compile_problem
from ..exact import gaussian_fields
from ..models import EMA, channels_last, make_model
from ..randomness import forked_rng
from ..samplers import TimestepSampler, make_sampler
from ..schedule import NoiseSchedule
from ..weightings.base import Weighting
from ..weightings.registry import make_weighting
from .config import TrainConfig
from .precision import make_scaler


@dataclass
class TrainState:
    """Everything a step changes, and nothing else; state_dict() is what a checkpoint holds."""

    model: nn.Module
    forward: nn.Module  # the model, or its compiled form, which has the same parameters
    ema: EMA
    schedule: NoiseSchedule
    weighting: Weighting
    sampler: TimestepSampler
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    # Listed once: walking a network's modules takes a millisecond or more of every step.
    model_parameters: list[Tensor] = field(init=False)
    trained_parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.model_parameters = list(self.model.parameters())
        groups = self.optimizer.param_groups
        self.trained_parameters = [p for group in groups for p in group["params"]]

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "weighting": self.weighting, "sampler": self.sampler}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest)."""
        tensors = {f"ema.{name}": value for name, value in self.ema.state.items()}
        for prefix, module in self._modules().items():
            for name, value in module.state_dict().items():
                tensors[f"{prefix}.{name}"] = value
        optimizer = self.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            for name, value in values.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        rest: dict[str, Any] = {"param_groups": optimizer["param_groups"]}
        if self.scaler.is_enabled():
            rest["scaler"] = self.scaler.state_dict()
        return tensors, rest

    def load_state_dict(self, step: int, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Inverse of state_dict; raises RuntimeError or KeyError when names or shapes do not fit."""
        for prefix, module in self._modules().items():
            module.load_state_dict(_below(prefix, tensors))
        averaged = _below("ema", tensors)
        for name, value in self.ema.state.items():
            value.copy_(averaged[name])
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer", tensors).items():
            index, name = key.split(".", 1)
            optimizer_state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(
            {"state": optimizer_state, "param_groups": rest["param_groups"]}
        )
        # Fused kernels want moments in the memory format of their parameter.
        for parameter, values in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = torch.empty_like(parameter, requires_grad=False)
                values[name] = moment.copy_(values[name])
        if self.scaler.is_enabled() and "scaler" in rest:
            self.scaler.load_state_dict(rest["scaler"])
        self.step = step


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named prefix.NAME, by NAME."""
    start = f"{prefix}."
    return {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}


def load_split(
    config: TrainConfig,
    split: str,
    device: torch.device,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> ImageData:
    """The "train" or "test" images a configuration asks for, on the device.

    size, a side or (height, width), and channels are those of a network that has them already; by
    default they are as the configuration and the images say.
    Raises ValueError for conditional training on images without labels, and for colour where one
    channel is wanted.
    """
    count = config.train_images if split == "train" else None
    if config.data == "gaussian-fields":
        data = gaussian_fields(count or 10_000, config.image_size or 8, split=split)
    else:
        size = size or config.image_size
        if size is None and config.data == "leaves":
            size = 16
        data = load_data(
            config.data,
            root=config.data_root,
            split=split,
            size=size,
            num_images=count,
            channels=channels,
        )
    if config.conditional and data.labels is None:
        raise ValueError(f"conditional training needs labels, and {data.name} has none")
    return data.to(device)


def make_parts(config: TrainConfig) -> tuple[NoiseSchedule, Weighting, TimestepSampler]:
    """Schedule, weighting and timestep sampler of a configuration, on the CPU.

    Raises ValueError or KeyError for settings that would fail in the middle of training.
    """
    schedule = config.noise_schedule()
    weighting = make_weighting(
        config.weighting,
        schedule,
        config.prediction,
        config.normalize,
        **config.weighting_params,
    )
    sampler = make_sampler(
        config.timestep_sampler, schedule, weighting=weighting, **config.sampler_params
    )
    if config.compile and "gradient-norms" in (sampler.observes, weighting.observes):
        raise ValueError(
            f"timestep sampler {config.timestep_sampler!r} with weighting {config.weighting!r} measures "
            "gradients inside the network, which a compiled one does not show; use --no-compile"
        )
    if weighting.needs_gramian:
        # A rule that cannot take so many bins says so now and not hours later.
        pareto.min_norm_weights(torch.eye(weighting.bins.num_bins))
        copy.deepcopy(weighting).observe_gramian(torch.eye(weighting.bins.num_bins))
    if config.conflicts_from is not None:
        pareto.min_norm_weights(torch.eye(config.bins))
    return schedule, weighting, sampler


def build(
    config: TrainConfig, data: ImageData, *, norm_num_groups: int | None = None
) -> TrainState:
    """A fresh TrainState on the device of the data; initial weights are a function of config.seed.

    norm_num_groups: those of the preset, unless an older run was begun with others. Raises
    ValueError for images that are not square or of a size that the network does not take.
    """
    device = data.images.device
    channels, height, width = data.images.shape[1:]
    if height != width:
        raise ValueError(f"images must be square; got {height} x {width}")
    classes = data.num_classes if config.conditional else None
    with forked_rng("cpu", config.seed):
        model = make_model(config.model, height, channels, classes, norm_num_groups=norm_num_groups)
    model = model.to(device)
    schedule, weighting, sampler = make_parts(config)
    weighting.to(device)
    network_group = {
        "params": list(model.parameters()),
        "lr": config.lr,
        "weight_decay": config.weight_decay,
    }
    groups = [network_group, *weighting.parameter_groups(config.weighting_lr)]
    for group in groups:
        group["base_lr"] = group["lr"]
    forward = model
    if is_compiled(config, device):
        model = channels_last(model)
        forward = cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False))
    return TrainState(
        model=model,
        forward=forward,
        ema=EMA(model, config.ema_half_life),
        schedule=schedule.to(device),
        weighting=weighting,
        sampler=sampler.to(device),
        optimizer=torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu")),
        scaler=make_scaler(config, device),
    )


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run compiles its network: as told, else on CUDA devices where nothing speaks against it."""
    if config.compile is not None:
        return config.compile
    if config.timestep_sampler in ("gradient-norm", "weighting"):
        return False  # they look inside the network
    return device.type == "cuda" and compile_problem(device) is None


def model_kwargs(config: TrainConfig, labels: Tensor | None) -> dict[str, Tensor]:
    """What the network is given beside x_t and timesteps: class_labels (B,), if it is conditional."""
    if not config.conditional or labels is None:
        return {}
    return {"class_labels": labels}
