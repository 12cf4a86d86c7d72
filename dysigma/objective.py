"""The per-sample loss of a denoiser, unreduced: the one tensor that weightings, bins and Gramians all consume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .schedule import NoiseSchedule


def _parameter_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The floating-point dtypes of a network's parameters, each once, in order; of a plain function, none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return list(dict.fromkeys(p.dtype for p in parameters if p.is_floating_point()))


def _input_dtype(model: nn.Module, x_t: Tensor) -> torch.dtype:
    """That of the network's first parameter where that is bfloat16, float16, float32 or float64, else x_t's own.

    Under autocast, which casts by itself, it is x_t's own.
    """
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    if first is None or first.dtype == x_t.dtype:
        return x_t.dtype
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if first.dtype not in known or torch.is_autocast_enabled(x_t.device.type):
        return x_t.dtype
    return first.dtype


def _output_tensor(output: Any) -> Tensor:
    """The prediction in what a network returned: a tensor, .sample, a dict's "sample" or only tensor, a tuple's first."""
    found = output
    if isinstance(getattr(output, "sample", None), Tensor):
        found = output.sample
    elif isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        found = output.get("sample", tensors[0] if len(tensors) == 1 else output)
    elif isinstance(output, tuple | list) and len(output) > 0:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    keys = f" with {list(output)}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"the model must return a tensor, a tuple that starts with it, or an output or dict with 'sample'; got "
        f"{type(output).__name__}{keys}: wrap the model to return the prediction alone"
    )


def predict(model: nn.Module, x_t: Tensor, timesteps: Tensor, **model_kwargs: Any) -> Tensor:
    """model(x_t, timesteps, **model_kwargs) as a tensor of the shape of x_t.

    Output objects of diffusers, dicts, tuples and lists are unwrapped. A network with weights in another precision
    gets x_t in that of its first parameter, unless autocast is on. Raises ValueError for an output without a
    prediction, for one of another shape, and for weights of several precisions that need autocast.

    >>> predict(lambda x_t, timesteps: {"sample": 2 * x_t}, torch.ones(1, 2), torch.tensor([0]))
    tensor([[2., 2.]])
    """
    given = x_t.to(_input_dtype(model, x_t))
    try:
        output = _output_tensor(model(given, timesteps, **model_kwargs))
    except RuntimeError as error:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in _parameter_dtypes(model)]
        if "type" not in str(error) or dtypes in ([], ["float32"]):
            raise
        raise ValueError(
            f"a network with weights in {' and '.join(dtypes)} cannot take {given.dtype} ({str(error).splitlines()[0]}): "
            f"measure it under torch.autocast({x_t.device.type!r}), or cast it to one dtype"
        ) from error
    if output.shape != x_t.shape:
        raise ValueError(
            f"the model must return the shape of its input; got {tuple(output.shape)} for x_t {tuple(x_t.shape)}. "
            "A model that also learns a variance must be wrapped to return the mean alone"
        )
    return output


def sample_losses(
    model: nn.Module,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prediction_type: str = "epsilon",
    **model_kwargs: Any,
) -> Tensor:
    """Per-sample mean squared error in the model's own target space: (B,) float32, with gradient.

    x0, noise: (B, ...) of one shape; timesteps: (B,) int64, on any device; model_kwargs go to the model unchanged.
    Noising, target and error are float32 or better under any autocast and for weights of any precision. Raises
    ValueError for shapes or timesteps that do not fit, and for a schedule on another device than x0.
    """
    if x0.shape != noise.shape:
        raise ValueError(
            f"x0 and noise must have one shape; got {tuple(x0.shape)} and {tuple(noise.shape)}"
        )
    if schedule.alpha.device != x0.device:
        raise ValueError(
            f"the schedule is on {schedule.alpha.device} and x0 on {x0.device}: use schedule.to(x0.device)"
        )
    timesteps = timesteps.to(x0.device)
    x_t = schedule.add_noise(x0, noise, timesteps)
    target = schedule.target(x0, noise, timesteps, prediction_type)
    prediction = predict(model, x_t, timesteps, **model_kwargs)
    error = prediction.float() - target
    return error.square().flatten(1).mean(1)
