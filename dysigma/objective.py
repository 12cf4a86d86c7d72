"""The per-sample loss of a denoiser, unreduced: what weightings, bins and Gramians all consume."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import NoiseSchedule, check_schedule


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
    check_schedule(schedule)
    for name, values in {"x0": x0, "noise": noise}.items():
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{name} must be a floating tensor; got {got}: of bytes give images / 127.5 - 1"
            )
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


class OutputLayerGradients:
    """Squared gradient norms of single samples, in the last layer of a network.

    They are exact for that layer and cost one product of its input and output gradient. Over timesteps
    they are a near-perfect stand-in for the norms of the whole gradient.

    Use it around forward and backward:

    >>> network = nn.Linear(2, 2, bias=False)
    >>> with OutputLayerGradients(network) as output:
    ...     losses = network(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).sum(1)
    ...     losses.retain_grad()
    ...     losses.mean().backward()
    >>> output.squared_norms(losses)
    tensor([2., 8.])

    The last layer is the last nn.Linear or nn.Conv2d of model.modules(). Raises ValueError if there is
    none, or if its convolution has groups.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if not layers:
            raise ValueError("the network has no nn.Linear or nn.Conv2d whose gradient to take")
        self.layer = layers[-1]
        if isinstance(self.layer, nn.Conv2d) and self.layer.groups != 1:
            raise ValueError("the gradient of a last convolution with groups is not measured")
        self.found: Tensor | None = None

    def __enter__(self) -> Self:
        self.found = None
        self.handle = self.layer.register_forward_hook(self._remember_input)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.handle.remove()

    def _remember_input(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features = inputs[0].detach()

        def measure(gradient: Tensor) -> None:
            self.found = self.squares(features.float(), gradient.float())

        output.register_hook(measure)

    def squares(self, features: Tensor, gradient: Tensor) -> Tensor:
        """|dL_i/dW|^2 + |dL_i/db|^2 (B,) of the layer's input and of the gradient in its output."""
        with torch.autocast(features.device.type, enabled=False):
            if isinstance(self.layer, nn.Conv2d):
                features, gradient_rows = self._patches(features, gradient)
                gradient = gradient.flatten(2)
            else:
                features = features.reshape(len(features), -1, features.shape[-1]).mT
                gradient = gradient.reshape(len(gradient), -1, gradient.shape[-1]).mT
                gradient_rows = gradient
            of_weight = gradient_rows @ features.mT  # (B, out, in), summed over positions
            squares = of_weight.square().sum((1, 2))
            if self.layer.bias is not None:
                squares = squares + gradient.sum(2).square().sum(1)
        return squares

    def _patches(self, features: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output gradient of the convolution as (B, rows, positions), one of them in patches.

        The product of the two is the gradient of the weight, in some order. Where the output is as
        large as the input, patches of the gradient do as well, and an output has fewer channels.
        """
        layer = self.layer
        assert isinstance(layer, nn.Conv2d)
        padding = layer.padding
        # "same" may pad one side more than the other, and unfold itself pads with zeros only.
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            features = F.pad(features, layer._reversed_padding_repeated_twice, mode)
            padding = (0, 0)
        shape = (layer.kernel_size, layer.dilation, padding, layer.stride)
        spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        is_same = [2 * p for p in padding] == spans and layer.stride == (1, 1)
        if is_same and layer.out_channels < layer.in_channels:
            return features.flatten(2), F.unfold(gradient, *shape)
        return F.unfold(features, *shape), gradient.flatten(2)

    def squared_norms(self, losses: Tensor) -> Tensor:
        """(B,): of the gradient of each loss alone, whatever weight it had in what was minimised.

        losses: (B,), after backward, with their own gradient retained. A sample of weight 0 gets 0.
        Raises RuntimeError if the layer took no part in a forward and backward of these losses.
        """
        if self.found is None or losses.grad is None:
            raise RuntimeError(
                "no gradient passed the network's last layer: call losses.retain_grad() before backward; "
                "a compiled network cannot be measured"
            )
        factor = losses.grad.square()
        return torch.where(factor > 0, self.found / factor, 0.0)
