"""Presets of diffusers' UNet2DModel, and an exponential moving average measured in images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_name

# attention: the levels, from 0, that have it. `micro` and `tiny` are for CPUs and tests. `compact` and
# `medium` are for CIFAR-10 on one GPU, the latter for the best images within ten minutes. `ddpm` is
# the network of Ho, Jain, Abbeel 2020 for CIFAR-10.
PRESETS: dict[str, dict[str, Any]] = {
    "micro": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention": (),
    },
    "tiny": {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention": (1,),
    },
    "small": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention": (2,),
    },
    "compact": {
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention": (2,),
    },
    "medium": {
        "block_out_channels": (64, 128, 256),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention": (1,),
    },
    "ddpm": {
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "attention": (1,),
    },
}

# A run that recorded no number of groups was begun when `compact` had 32: one channel a group, which
# is instance normalisation, and which triton 3.6 cannot compile.
GROUPS_BEFORE_THEY_WERE_RECORDED = {"compact": 32}


def make_model(
    preset: str,
    image_size: int = 32,
    channels: int = 3,
    num_classes: int | None = None,
    *,
    norm_num_groups: int | None = None,
) -> nn.Module:
    """A diffusers UNet2DModel of a named preset: model(x_t, timesteps[, class_labels]).sample.

    image_size must be divisible by 2 to the number of downsamplings of the preset. norm_num_groups
    replaces the preset's. Initial weights come from torch's global generator: seed it first. Raises
    KeyError for an unknown preset, ValueError for a size that does not fit.
    """
    check_name("model preset", preset, PRESETS)
    from diffusers import UNet2DModel

    options = dict(PRESETS[preset])
    attended_levels = options.pop("attention")
    if norm_num_groups is not None:
        options["norm_num_groups"] = norm_num_groups
    levels = len(options["block_out_channels"])
    factor = 2 ** (levels - 1)
    if image_size % factor or image_size // factor < 2:
        raise ValueError(
            f"preset {preset!r} halves the image {levels - 1} times: image_size must be a multiple "
            f"of {factor} and at least {2 * factor}; got {image_size}"
        )
    attention = [level in attended_levels for level in range(levels)]
    down_blocks = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    up_blocks = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple(down_blocks),
        up_block_types=tuple(up_blocks),
        num_class_embeds=num_classes,
        **options,
    )


@functools.cache
def _blocks() -> dict[type, type]:
    """Blocks of diffusers that copy their input to channels-first memory, and the same without the copies."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    class Residual(ResnetBlock2D):
        def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
            hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
            hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
            shortcut = (
                input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
            )
            return (shortcut + hidden) / self.output_scale_factor

    class Upsample(Upsample2D):
        def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
            return self.conv(
                nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
            )

    return {ResnetBlock2D: Residual, Upsample2D: Upsample}


def channels_last(model: nn.Module) -> nn.Module:
    """A network of make_model with its memory, and that of all it computes, in the order that tensor cores want.

    In place. Numbers, names and checkpoints stay those of diffusers; what compiles it fuses the normalisations.
    """
    for module in model.modules():
        module.__class__ = _blocks().get(type(module), type(module))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class EMA:
    """Exponential moving average of a model's parameters and buffers, its half-life given in images.

    The half-life is shortened to `ramp` times the images seen so far, so that the average forgets
    the initial weights (Karras, Aittala, Aila, Laine 2022 use 5 %). ``state`` maps names to averages,
    float32 whatever the model is: in bfloat16 the small steps of an average would round to none.
    Buffers of integers are copied. Raises ValueError unless half_life and ramp are positive.

    (torch's AveragedModel would copy the whole module and rename what checkpoints hold.)

    >>> model = nn.Linear(1, 1, bias=False).requires_grad_(False)
    >>> ema = EMA(model, half_life=100, ramp=1e9)
    >>> start = float(model.weight)
    >>> _ = model.weight.add_(1)
    >>> ema.update(model, images_seen=100, batch_size=100)
    >>> round(float(ema.state["weight"]) - start, 3)
    0.5
    """

    def __init__(self, model: nn.Module, half_life: float, ramp: float = 0.05) -> None:
        if not half_life > 0 or not ramp > 0:
            raise ValueError(
                f"EMA needs half_life > 0 images and ramp > 0; got {half_life}, {ramp}"
            )
        self.half_life, self.ramp = half_life, ramp
        self.state: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            self.state[name] = value.detach().to(dtype, copy=True)
        self._follow(model)

    def _follow(self, model: nn.Module) -> None:
        """List the model's tensors beside their averages, once: walking the modules takes long."""
        self._model = model
        self._averaged: list[Tensor] = []
        self._current: list[Tensor] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        values = model.state_dict(keep_vars=True)
        for name, average in self.state.items():
            if average.is_floating_point():
                self._averaged.append(average)
                self._current.append(values[name])
            else:
                self._copied.append((average, values[name]))

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the model after a step of batch_size images, images_seen in all."""
        if model is not self._model:
            self._follow(model)
        half_life = min(self.half_life, self.ramp * images_seen)
        weight = 1 - 0.5 ** (batch_size / half_life)
        current = [value.float() for value in self._current]  # no copy where it is float32
        torch._foreach_lerp_(self._averaged, current, weight)
        for average, value in self._copied:
            average.copy_(value)

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same architecture, in that model's number formats."""
        model.load_state_dict(self.state)
