"""The per-sample loss of a denoiser, unreduced: the one tensor that weightings, bins and Gramians all consume."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .schedule import NoiseSchedule


def predict(model: nn.Module, x_t: Tensor, timesteps: Tensor, **model_kwargs: Any) -> Tensor:
    """model(x_t, timesteps, **model_kwargs) as a tensor; diffusers output objects and tuples are unwrapped.

    Raises ValueError if the output's shape is not that of x_t.
    """
    output = model(x_t, timesteps, **model_kwargs)
    output = getattr(output, "sample", output)
    output = output[0] if isinstance(output, tuple) else output
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

    x0, noise: (B, ...) of one shape; timesteps: (B,) int64; model_kwargs go to the model unchanged. Noising, target
    and error are float32 under any autocast. Raises ValueError for shapes or timesteps that do not fit.
    """
    if x0.shape != noise.shape:
        raise ValueError(
            f"x0 and noise must have one shape; got {tuple(x0.shape)} and {tuple(noise.shape)}"
        )
    x_t = schedule.add_noise(x0, noise, timesteps)
    target = schedule.target(x0, noise, timesteps, prediction_type)
    error = predict(model, x_t, timesteps, **model_kwargs).float() - target
    return error.square().flatten(1).mean(1)
