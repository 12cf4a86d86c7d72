"""Training steps to be timed: ours and those of other packages, on one network and its images.

Every function takes a configuration and its images, and returns a call that takes one step.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import ImageData, batch
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


# What denoising-diffusion-pytorch imports for data loading, averaging and evaluation.
UNUSED_BY_LUCIDRAINS = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.utils",
    "torchvision.datasets",
    "ema_pytorch",
    "pytorch_fid",
    "pytorch_fid.inception",
    "pytorch_fid.fid_score",
)


class _Anything(types.ModuleType):
    """A module of which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Modules in place of those that are not installed, for the time of an import."""
    added = []
    for name in names:
        top = name.partition(".")[0]
        is_missing = top in added or (
            name not in sys.modules and importlib.util.find_spec(top) is None
        )
        if is_missing:
            sys.modules[name] = _Anything(name)
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class _AsLucidrainsCallsIt(nn.Module):
    """A network of diffusers behind the attributes that denoising-diffusion-pytorch asks for."""

    channels = 3
    out_dim = 3
    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, _: Any = None) -> Tensor:
        return self.network(x, timesteps).sample


def lucidrains_step(config: TrainConfig, data: ImageData) -> Step:
    """A step of denoising-diffusion-pytorch's Trainer, spared its data loading and its EMA."""
    with _stand_ins(UNUSED_BY_LUCIDRAINS):
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion

    network = _AsLucidrainsCallsIt(make_network(config, data))
    size = data.images.shape[-1]
    diffusion = GaussianDiffusion(network, image_size=size, objective="pred_noise")
    diffusion.to(data.images.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    steps = itertools.count()

    def step() -> float:
        images, _, _ = batch(data, 0, next(steps), config.batch_size)
        loss = diffusion(images.add(1).div(2))
        loss.backward()
        total = loss.item()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

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
    if importlib.util.find_spec("denoising_diffusion_pytorch") is not None:
        found["denoising-diffusion-pytorch"] = lucidrains_step
    return found
