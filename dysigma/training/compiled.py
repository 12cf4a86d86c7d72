"""Compiled networks that cannot hurt: whatever goes wrong, training goes on without torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.dataset import ImageData, batch
from ..devices import compile_problem, is_out_of_memory
from ..objective import sample_losses
from ..randomness import generator
from .config import TrainConfig
from .parallel import share_of_batch
from .parts import TrainState, model_kwargs
from .precision import autocast

# Of the relative distance between gradients; bfloat16 alone makes 1 to 3 %.
TOLERANCE = 0.1
# Uncompiled, an image takes three times the memory that it takes compiled.
REFERENCE_IMAGES = 32


def settle_compilation(state: TrainState, data: ImageData, config: TrainConfig) -> str:
    """Try the compiled network and go back to the plain one if it fails; a line for the run's summary.

    The line is "yes", or "no" with the reason. Running out of memory still raises OutOfMemoryError.
    """
    device = data.images.device
    if state.forward is state.model:
        problem = compile_problem(device)
        asked = config.compile is None and device.type == "cuda" and problem
        return f"no: {problem}" if asked else "no"
    try:
        error = check_compiled(state, data, config)
    except Exception as failure:  # compilers fail with almost any error
        if is_out_of_memory(failure):
            raise
        first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        reason = f"torch.compile failed ({type(failure).__name__}: {first_line:.200})"
    else:
        if error < TOLERANCE:
            return "yes"
        reason = (
            f"compiled, the network has gradients that are {error:.0%} off "
            f"(torch {torch.__version__}, {device})"
        )
    state.forward = state.model
    return f"no: {reason}"


def check_compiled(state: TrainState, data: ImageData, config: TrainConfig) -> float:
    """Relative distance of the compiled network's gradient from that of the network itself.

    Both see the first batch of the run. The compiled network takes this rank's part of it in one
    piece, as in training; the plain one in pieces, because it needs more memory.
    """
    device = data.images.device
    part = share_of_batch(config, device)[0]
    images, labels, _ = batch(data, config.seed, 0, config.batch_size)
    x0 = images[part]
    kwargs = model_kwargs(config, None if labels is None else labels[part])
    draw = generator(config.seed, 0, "compiled", device)
    noise = torch.randn(x0.shape, generator=draw, device=device)
    timesteps = torch.linspace(0, config.num_timesteps - 1, len(x0), device=device).long()

    def gradient(pieces: tuple[Tensor, ...], compiled: bool) -> Tensor:
        total = torch.zeros(sum(p.numel() for p in state.model_parameters), device=device)
        for piece in pieces:
            piece_kwargs = {name: value[piece] for name, value in kwargs.items()}
            with autocast(config, device):
                losses = sample_losses(
                    state.forward if compiled else state.model,
                    state.schedule,
                    x0[piece],
                    noise[piece],
                    timesteps[piece],
                    config.prediction,
                    **piece_kwargs,
                )
            # The sum, because gradients of the mean of a large batch vanish in float16.
            gradients = torch.autograd.grad(losses.sum(), state.model_parameters)
            total += torch.cat([g.flatten() for g in gradients])
        return total

    places = torch.arange(len(x0), device=device)
    reference = gradient(places.split(REFERENCE_IMAGES), compiled=False)
    found = gradient((places,), compiled=True)
    return float((found - reference).norm() / reference.norm())
