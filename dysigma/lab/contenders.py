"""Training steps to be timed: ours and those of other packages, on one network and its images.

Every function takes a configuration and its images, and returns a call that takes one step.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import ImageData
from ..models import make_model
from ..training.config import TrainConfig
from ..training.parts import build
from ..training.step import train_step

Step = Callable[[], Any]
Maker = Callable[[TrainConfig, ImageData], Step]

LEARNING_RATE = 1e-4


def make_network(config: TrainConfig, data: ImageData) -> nn.Module:
    """The network of a configuration on the device of the images, as everybody here trains it."""
    _, channels, _, size = data.images.shape
    return make_model(config.model, size, channels).to(data.images.device)


def own_step(config: TrainConfig, data: ImageData, **compile_options: Any) -> Step:
    """Our training step; with options the network is compiled with those instead."""
    state = build(config, data)
    if compile_options:
        options: Any = {"fullgraph": True, "dynamic": False, **compile_options}
        compiled: Any = torch.compile(state.model, **options)
        state.forward = compiled
    return lambda: train_step(state, data, config)


def own_flow_step(config: TrainConfig, data: ImageData) -> Step:
    """Our training step on the rectified flow."""
    on_flow = replace(config, schedule="flow", prediction="flow_prediction", weighting="const-flow")
    return own_step(on_flow, data)


def by_hand_step(config: TrainConfig, data: ImageData) -> Step:
    """The same step written by hand with diffusers and accelerate: the measure of our overhead.

    The same images, flips, optimizer, clipping and averaging; draws are torch's own. Uncompiled, in
    float32.
    """
    import accelerate
    import diffusers
    from diffusers.training_utils import EMAModel

    device = data.images.device
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    model: Any = make_network(config, data)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=0.9999, foreach=True)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=config.num_timesteps)
    size = config.batch_size

    def step() -> Tensor:
        chosen = torch.randint(0, len(data), (size,), device=device)
        clean = data.images[chosen].float() / 127.5 - 1
        mirrored = torch.rand(size, device=device) < 0.5
        clean = torch.where(mirrored[:, None, None, None], clean.flip(-1), clean)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, config.num_timesteps, (size,), device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        output = model(noisy, timesteps).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach()

    return step


def recipe_step(config: TrainConfig, data: ImageData, low: bool = False) -> Step:
    """A step of diffusers' train_unconditional.py with EMA and its other defaults.

    Pictures are decoded already. low: with --mixed_precision bf16, which casts images, noise and
    schedule too.
    """
    import accelerate
    import diffusers
    import numpy
    from diffusers.training_utils import EMAModel
    from PIL import Image, ImageOps

    device = data.images.device
    dtype = torch.bfloat16 if low else torch.float32
    pictures = [Image.fromarray(image) for image in data.images.permute(0, 2, 3, 1).cpu().numpy()]

    def collate(chosen: list[Any]) -> Tensor:
        tensors = []
        for picture in chosen:
            if torch.rand(()) < 0.5:
                picture = ImageOps.mirror(picture)
            pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)
            tensors.append(pixels.div(127.5).sub(1))
        return torch.stack(tensors)

    # drop_last, so that all batches have the size that is timed
    loader: Any = torch.utils.data.DataLoader(
        pictures,  # type: ignore[arg-type]
        config.batch_size,
        shuffle=True,
        collate_fn=collate,
        drop_last=True,
    )
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    model: Any = make_network(config, data)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.95, 0.999), weight_decay=1e-6
    )
    rate: Any = diffusers.optimization.get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=10**5
    )
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    scheduler = diffusers.DDPMScheduler()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        clean = next(batches).to(dtype)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device.type, dtype, enabled=low):
            output = model(noisy, timesteps).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach().item()

    return step


def contenders(device: torch.device) -> dict[str, Maker]:
    """What can be timed here, by name, ours first; a package that is not installed is left out.

    >>> [*contenders(torch.device("cpu"))][:2]
    ['dysigma', 'dysigma, flow']
    """
    found: dict[str, Maker] = {"dysigma": own_step, "dysigma, flow": own_flow_step}
    if device.type == "cuda":
        found["dysigma, CUDA graphs"] = functools.partial(own_step, mode="reduce-overhead")
        # Several kernels in one launch: fewer launches, but Inductor has this off by default.
        combined = {"combo_kernels": True}
        found["dysigma, combo kernels"] = functools.partial(own_step, options=combined)
    if importlib.util.find_spec("accelerate") is not None:
        found["by hand, diffusers + accelerate"] = by_hand_step
        found["diffusers recipe"] = recipe_step
        found["diffusers recipe, bf16"] = functools.partial(recipe_step, low=True)
    return found
