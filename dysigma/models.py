"""Presets of diffusers' UNet2DModel, and an exponential moving average measured in images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_name

# attention: which resolutions have it. `micro` and `tiny` are for CPUs and tests, `compact` for CIFAR-10 on one GPU,
# `ddpm` is the network of Ho, Jain, Abbeel 2020 for CIFAR-10.
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
    "compact": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "attention": (2,)},
    "ddpm": {"block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "attention": (1,)},
}


def make_model(
    preset: str, image_size: int = 32, channels: int = 3, num_classes: int | None = None
) -> nn.Module:
    """A diffusers UNet2DModel of a named preset: model(x_t, timesteps[, class_labels]).sample.

    image_size must be divisible by 2 to the number of downsamplings of the preset. Initial weights come from torch's
    global generator: seed it first. Raises KeyError for an unknown preset, ValueError for a size that does not fit.
    """
    check_name("model preset", preset, PRESETS)
    from diffusers import UNet2DModel

    options = dict(PRESETS[preset])
    levels, attended = len(options["block_out_channels"]), options.pop("attention")
    attention = [level in attended for level in range(levels)]
    factor = 2 ** (levels - 1)
    if image_size % factor or image_size // factor < 2:
        raise ValueError(
            f"preset {preset!r} halves the image {levels - 1} times: image_size must be a multiple of {factor} "
            f"and at least {2 * factor}; got {image_size}"
        )
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
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

    The half-life is shortened to `ramp` times the images seen so far, so that the average forgets the initial weights
    (Karras, Aittala, Aila, Laine 2022 use 5 %). ``state`` maps names to averaged float32 tensors.
    """

    def __init__(self, model: nn.Module, half_life: float, ramp: float = 0.05) -> None:
        if not half_life > 0 or not ramp > 0:
            raise ValueError(
                f"EMA needs half_life > 0 images and ramp > 0; got {half_life}, {ramp}"
            )
        self.half_life, self.ramp = half_life, ramp
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the model after a step of batch_size images, images_seen in all."""
        half_life = min(self.half_life, self.ramp * images_seen)
        weight = 1 - 0.5 ** (batch_size / half_life)
        values = model.state_dict()
        averaged: list[Tensor] = [v for v in self.state.values() if v.is_floating_point()]
        current: list[Tensor] = [
            values[name] for name, v in self.state.items() if v.is_floating_point()
        ]
        torch._foreach_lerp_(averaged, current, weight)
        for name, value in self.state.items():
            if not value.is_floating_point():
                value.copy_(values[name])

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same architecture."""
        model.load_state_dict(self.state)
