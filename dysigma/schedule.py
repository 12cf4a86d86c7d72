"""Noise schedules in terms of one quantity, log_snr, and the forward process x_t = alpha x0 + sigma noise.

Tables are built in float64 from alphas_cumprod and never change precision: diffusers casts its table to the
dtype of the images, which in bfloat16 gives some timesteps exactly zero noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .draws import check_timesteps

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_ALIASES = {"x0": "sample", "v": "v_prediction", "eps": "epsilon"}


def canonical_prediction_type(name: str) -> str:
    """The diffusers name ("epsilon", "sample", "v_prediction") of a prediction type; "x0", "v" and "eps" are aliases.

    Raises ValueError for any other name.
    """
    name = _ALIASES.get(name, name)
    if name not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {name!r}; have {[*PREDICTION_TYPES, *_ALIASES]}")
    return name


def _linear(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return torch.log1p(-betas).cumsum(0).exp()


def _scaled_linear(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    return torch.log1p(-betas).cumsum(0).exp()


def _cosine(num_timesteps: int, offset: float, max_beta: float) -> Tensor:
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=max_beta)
    return torch.log1p(-betas).cumsum(0).exp()


def _sigmoid(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    ramp = torch.sigmoid(torch.linspace(-6, 6, num_timesteps, dtype=torch.float64))
    return torch.log1p(-(ramp * (beta_end - beta_start) + beta_start)).cumsum(0).exp()


def _rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at exactly 0 (Lin, Liu, Li, Yang 2024, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


class NoiseSchedule(nn.Module):
    """A variance-preserving noise schedule on T discrete timesteps; timestep 0 is the cleanest.

    alphas_cumprod: (T,) real, strictly decreasing, in (0, 1); the last value may be 0 (zero terminal SNR).
    config: keyword arguments that make the same schedule in a diffusers scheduler; without it the betas are passed.

    Buffers: ``log_snr`` (T,) float64, natural log of alphas_cumprod / (1 - alphas_cumprod), decreasing, -inf only at
    the last step; ``alphas_cumprod`` (T,) float64; ``alpha`` and ``sigma`` (T,) float32. `.to(device)` moves them;
    their precision never changes. Raises ValueError for a table that is not such a sequence.
    """

    log_snr: Tensor
    alphas_cumprod: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, alphas_cumprod: Tensor, *, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        bar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if bar.ndim != 1 or len(bar) < 2:
            raise ValueError(f"alphas_cumprod must be (T,) with T >= 2; got shape {tuple(bar.shape)}")
        if not (bool((bar.diff() < 0).all()) and bar[0] < 1 and bar[-1] >= 0):
            raise ValueError(
                f"alphas_cumprod must fall strictly from below 1 to 0 or more; got {len(bar)} values from "
                f"{bar[0]:.6g} to {bar[-1]:.6g}"
            )
        self.config = config
        self.register_buffer("alphas_cumprod", bar, persistent=False)
        self.register_buffer("log_snr", bar.log() - torch.log1p(-bar), persistent=False)
        self.register_buffer("alpha", bar.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - bar).sqrt().float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        # .half() on an enclosing module must not round the schedule: follow the device, keep the dtype.
        for name, table in self.named_buffers(recurse=False):
            setattr(self, name, table.to(fn(table).device))
        return self

    @property
    def num_timesteps(self) -> int:
        """T, the number of discrete timesteps."""
        return len(self.log_snr)

    @classmethod
    def linear(
        cls,
        num_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Betas linear in t (Ho, Jain, Abbeel 2020); diffusers "linear"."""
        config = {"beta_schedule": "linear", "beta_start": beta_start, "beta_end": beta_end}
        return cls._named(_linear(num_timesteps, beta_start, beta_end), config, zero_terminal_snr)

    @classmethod
    def scaled_linear(
        cls,
        num_timesteps: int = 1000,
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Square roots of betas linear in t, with the defaults of Stable Diffusion; diffusers "scaled_linear"."""
        config = {"beta_schedule": "scaled_linear", "beta_start": beta_start, "beta_end": beta_end}
        return cls._named(_scaled_linear(num_timesteps, beta_start, beta_end), config, zero_terminal_snr)

    @classmethod
    def cosine(
        cls,
        num_timesteps: int = 1000,
        *,
        offset: float = 0.008,
        max_beta: float = 0.999,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """alphas_cumprod a squared cosine of t, betas capped (Nichol, Dhariwal 2021); diffusers "squaredcos_cap_v2"."""
        config = {"beta_schedule": "squaredcos_cap_v2"} if (offset, max_beta) == (0.008, 0.999) else None
        return cls._named(_cosine(num_timesteps, offset, max_beta), config, zero_terminal_snr)

    @classmethod
    def sigmoid(
        cls,
        num_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Betas a sigmoid of t from -6 to 6 (as in GeoDiff); diffusers "sigmoid"."""
        config = {"beta_schedule": "sigmoid", "beta_start": beta_start, "beta_end": beta_end}
        return cls._named(_sigmoid(num_timesteps, beta_start, beta_end), config, zero_terminal_snr)

    @classmethod
    def _named(cls, alphas_cumprod: Tensor, config: dict[str, Any] | None, zero_terminal_snr: bool) -> NoiseSchedule:
        if zero_terminal_snr:
            # Passed on as betas: diffusers rescales in float32, which leaves a different last step.
            return cls(_rescale_zero_terminal_snr(alphas_cumprod))
        return cls(alphas_cumprod, config=config)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of any diffusers scheduler that has ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, Euler, ...).

        Euler-type schedulers work in x / alpha; their table is the same. Raises ValueError for a scheduler without
        alphas_cumprod (flow matching, EDM): it has no discrete variance-preserving table to convert.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod, so it is no discrete variance-preserving schedule; "
                "pass one of the DDPM family, or NoiseSchedule(alphas_cumprod) with your own table"
            )
        bar = torch.as_tensor(table).detach().to("cpu", torch.float64)
        config = scheduler.config
        if config.get("rescale_betas_zero_snr") and config.get("trained_betas") is None:
            # Some schedulers replace the final 0 by 2**-24 to keep their sampler finite; the training table ends at 0.
            bar = torch.cat([bar[:-1], bar.new_zeros(1)])
            return cls(bar)
        keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
        return cls(bar, config={key: config[key] for key in keys if config.get(key) is not None})

    def to_diffusers(
        self, scheduler_class: type | None = None, prediction_type: str = "epsilon", **options: Any
    ) -> Any:
        """A diffusers scheduler with this schedule, DDPMScheduler unless another class is given.

        options go to the scheduler's constructor unchanged (for example ``timestep_spacing="trailing"``).
        """
        if scheduler_class is None:
            from diffusers import DDPMScheduler

            scheduler_class = DDPMScheduler
        config = self.config
        if config is None:
            bar = self.alphas_cumprod.cpu()
            betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
            config = {"trained_betas": betas.tolist()}
        prediction_type = canonical_prediction_type(prediction_type)
        return scheduler_class(
            num_train_timesteps=self.num_timesteps, prediction_type=prediction_type, **{**config, **options}
        )

    def _coefficients(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        check_timesteps(timesteps, self.num_timesteps, len(x))
        shape = (-1,) + (1,) * (x.ndim - 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise in float32 at least, whatever the dtype or autocast; shapes (B, ...), (B,)."""
        alpha, sigma = self._coefficients(x0, timesteps)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: str = "epsilon") -> Tensor:
        """What a network of this prediction type must return: noise, x0, or v = alpha noise - sigma x0.

        v as in Salimans, Ho 2022. Shapes (B, ...), float32 at least.
        """
        prediction_type = canonical_prediction_type(prediction_type)
        alpha, sigma = self._coefficients(x0, timesteps)
        if prediction_type == "v_prediction":
            return alpha * noise - sigma * x0
        target = noise if prediction_type == "epsilon" else x0
        return target.to(torch.promote_types(target.dtype, torch.float32))

    def to_x0(self, output: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: str = "epsilon") -> Tensor:
        """The x0 that a network output implies at x_t. For epsilon at zero SNR this is infinite: x_T holds no x0."""
        prediction_type = canonical_prediction_type(prediction_type)
        alpha, sigma = self._coefficients(x_t, timesteps)
        if prediction_type == "sample":
            return output.float()
        return (x_t - sigma * output) / alpha if prediction_type == "epsilon" else alpha * x_t - sigma * output


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled-linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
}


def make_schedule(name: str, num_timesteps: int = 1000, *, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The named schedule; raises KeyError with the choices for an unknown name."""
    if name not in SCHEDULES:
        raise KeyError(f"unknown schedule {name!r}; have {sorted(SCHEDULES)}")
    return SCHEDULES[name](num_timesteps, zero_terminal_snr=zero_terminal_snr)
