"""Noise schedules in terms of one quantity, log_snr, and the forward process x_t = alpha x0 + sigma noise.

Two paths: variance-preserving, alpha^2 + sigma^2 = 1, and the rectified flow, alpha + sigma = 1.

Tables are built in float64 from alphas_cumprod and never change precision: diffusers casts its table to the
dtype of the images, which in bfloat16 gives some timesteps exactly zero noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_name, check_timesteps

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

_ALIASES = {"x0": "sample", "v": "v_prediction", "eps": "epsilon", "flow": "flow_prediction"}


def canonical_prediction_type(name: str) -> str:
    """The diffusers name of a prediction type: one of PREDICTION_TYPES; "x0", "v", "eps" and "flow" are aliases.

    flow_prediction is noise - x0, the velocity of the rectified flow. Raises ValueError for any other name.
    """
    check_name("prediction type", name, [*PREDICTION_TYPES, *_ALIASES], error=ValueError)
    return _ALIASES.get(name, name)


_BETAS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda start, end, steps: torch.linspace(start, end, steps, dtype=torch.float64),
    "scaled_linear": lambda start, end, steps: _BETAS["linear"](start**0.5, end**0.5, steps) ** 2,
    "sigmoid": lambda start, end, steps: (
        _BETAS["linear"](-6, 6, steps).sigmoid() * (end - start) + start
    ),
}


def _cosine(num_timesteps: int, offset: float, max_beta: float) -> Tensor:
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=max_beta)
    return torch.log1p(-betas).cumsum(0).exp()


def _rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at exactly 0 (Lin, Liu, Li, Yang 2024, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


class NoiseSchedule(nn.Module):
    """A noise schedule on T discrete timesteps; timestep 0 is the cleanest.

    alphas_cumprod: (T,) real, strictly decreasing, in (0, 1); the last value may be 0 (zero terminal SNR).
    config: keyword arguments that make the same schedule in a diffusers scheduler; without it the betas are passed.
    is_flow: of the rectified flow of the same SNR, not variance-preserving. For levels sigma of another process (EDM,
    any continuous time) NoiseSchedule(log_snr.sigmoid()), in float64: with quantiles of the levels that training
    draws, weights have mean 1 over the draws, and uniform bins hold equal shares of them.

    Buffers: ``log_snr`` (T,) float64, natural log of alphas_cumprod / (1 - alphas_cumprod), decreasing, -inf only at
    the last step; ``alphas_cumprod`` (T,) float64; ``alpha`` and ``sigma`` (T,) float32. `.to(device)` moves them;
    their precision never changes. Raises ValueError for a table that is not such a sequence.
    """

    log_snr: Tensor
    alphas_cumprod: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(
        self, alphas_cumprod: Tensor, *, config: dict[str, Any] | None = None, is_flow: bool = False
    ) -> None:
        super().__init__()
        bar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if bar.ndim != 1 or len(bar) < 2:
            raise ValueError(
                f"alphas_cumprod must be (T,) with T >= 2; got shape {tuple(bar.shape)}"
            )
        if not (bool((bar.diff() < 0).all()) and bar[0] < 1 and bar[-1] >= 0):
            raise ValueError(
                f"alphas_cumprod must fall strictly from below 1 to 0 or more; got {len(bar)} values from "
                f"{bar[0]:.6g} to {bar[-1]:.6g}"
            )
        self.config, self.is_flow = config, is_flow
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        scale = alpha + sigma if is_flow else 1.0
        self.register_buffer("alphas_cumprod", bar, persistent=False)
        self.register_buffer("log_snr", bar.log() - torch.log1p(-bar), persistent=False)
        self.register_buffer("alpha", (alpha / scale).float(), persistent=False)
        self.register_buffer("sigma", (sigma / scale).float(), persistent=False)

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
        return cls._of_betas("linear", beta_start, beta_end, num_timesteps, zero_terminal_snr)

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
        return cls._of_betas(
            "scaled_linear", beta_start, beta_end, num_timesteps, zero_terminal_snr
        )

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
        config = (
            {"beta_schedule": "squaredcos_cap_v2"} if (offset, max_beta) == (0.008, 0.999) else None
        )
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
        return cls._of_betas("sigmoid", beta_start, beta_end, num_timesteps, zero_terminal_snr)

    @classmethod
    def flow(cls, num_timesteps: int = 1000, *, shift: float = 1.0) -> NoiseSchedule:
        """The rectified flow x_t = (1 - s) x0 + s noise (Liu, Gong, Liu 2023), log_snr = 2 ln((1 - s) / s).

        s = (t + 1) / T, shifted to shift s / (1 + (shift - 1) s) (Esser et al. 2024): the levels of diffusers, which
        counts them from the noisy end (its index i is our T - 1 - i) and gives a network T s as its timestep.
        """
        s = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        s = shift * s / (1 + (shift - 1) * s)
        return cls((1 - s) ** 2 / ((1 - s) ** 2 + s**2), is_flow=True)

    @classmethod
    def _of_betas(
        cls, name: str, start: float, end: float, steps: int, zero_terminal_snr: bool
    ) -> NoiseSchedule:
        bar = torch.log1p(-_BETAS[name](start, end, steps)).cumsum(0).exp()
        return cls._named(
            bar, {"beta_schedule": name, "beta_start": start, "beta_end": end}, zero_terminal_snr
        )

    @classmethod
    def _named(
        cls, alphas_cumprod: Tensor, config: dict[str, Any] | None, zero_terminal_snr: bool
    ) -> NoiseSchedule:
        if zero_terminal_snr:
            # Passed on as betas: diffusers rescales in float32, which leaves a different last step.
            return cls(_rescale_zero_terminal_snr(alphas_cumprod))
        return cls(alphas_cumprod, config=config)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule that a diffusers scheduler is for, whatever steps it was last set to sample with.

        Any with ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, ...; those of Euler type work in x / alpha, on the same
        table), and flow matching, by shift or flow_shift; dynamic shifting is for sampling and not in the table.
        Raises ValueError for others: EDM has a continuum of levels, some have stages or no levels at all.
        """
        config, table = getattr(scheduler, "config", {}), getattr(scheduler, "alphas_cumprod", None)
        is_flow = (
            hasattr(scheduler, "scale_noise") if table is None else config.get("use_flow_sigmas")
        )
        if is_flow and config.get("num_train_timesteps") and not config.get("invert_sigmas"):
            shift = (
                1.0
                if config.get("use_dynamic_shifting")
                else config.get("flow_shift", config.get("shift", 1.0))
            )
            return cls.flow(config["num_train_timesteps"], shift=shift)
        if is_flow or not isinstance(table, Tensor):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod and is no plain flow matching: its training levels "
                "are unknown. Give yours, clean to noisy, in float64: NoiseSchedule(log_snr.sigmoid()), for EDM with "
                "log_snr = -2 ln sigma, and call weighting.at(losses, log_snr) at the levels drawn"
            )
        bar = table.detach().to("cpu", torch.float64)
        if config.get("rescale_betas_zero_snr"):
            # Some schedulers replace the final 0 by 2**-24 to keep their sampler finite; the training table ends at 0.
            return cls(torch.cat([bar[:-1], bar.new_zeros(1)]))
        keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
        # Where the betas alone do not make the table (CogVideoX shifts its SNR), it is passed on as a table.
        of_betas = torch.allclose(
            (1 - scheduler.betas.double()).cumprod(0), bar, rtol=1e-3, atol=1e-9
        )
        return cls(
            bar,
            config={key: config[key] for key in keys if config.get(key) is not None}
            if of_betas
            else None,
        )

    def to_diffusers(
        self, scheduler_class: type | None = None, prediction_type: str = "epsilon", **options: Any
    ) -> Any:
        """A diffusers scheduler with this schedule, DDPMScheduler unless another class is given.

        options go to the scheduler's constructor unchanged (for example ``timestep_spacing="trailing"``). Raises
        ValueError for a flow, whose scheduler is FlowMatchEulerDiscreteScheduler(num_train_timesteps, shift).
        """
        prediction_type = self.canonical(prediction_type)
        if self.is_flow:
            raise ValueError(
                "a flow has no betas; make a FlowMatchEulerDiscreteScheduler(num_train_timesteps, shift)"
            )
        if scheduler_class is None:
            from diffusers import DDPMScheduler

            scheduler_class = DDPMScheduler
        config = self.config
        if config is None:
            bar = self.alphas_cumprod.cpu()
            betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
            config = {"trained_betas": betas.tolist()}
        return scheduler_class(
            num_train_timesteps=self.num_timesteps,
            prediction_type=prediction_type,
            **{**config, **options},
        )

    def canonical(self, prediction_type: str) -> str:
        """canonical_prediction_type of one that this path has; ValueError for v of a flow, flow of the other path."""
        kind = canonical_prediction_type(prediction_type)
        if kind == ("v_prediction" if self.is_flow else "flow_prediction"):
            path = "a rectified flow" if self.is_flow else "a variance-preserving path"
            raise ValueError(
                f"{path} has no {kind}: noise - x0 is flow_prediction, alpha noise - sigma x0 is v"
            )
        return kind

    def _coefficients(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        check_timesteps(timesteps, self.num_timesteps, len(x))
        shape = (-1,) + (1,) * (x.ndim - 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise in float32 at least, whatever the dtype or autocast; shapes (B, ...), (B,)."""
        alpha, sigma = self._coefficients(x0, timesteps)
        return alpha * x0 + sigma * noise

    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: str = "epsilon"
    ) -> Tensor:
        """What a network of this prediction type must return: noise, x0, v = alpha noise - sigma x0, or noise - x0.

        v as in Salimans, Ho 2022. Shapes (B, ...), float32 at least.
        """
        prediction_type = self.canonical(prediction_type)
        alpha, sigma = self._coefficients(x0, timesteps)
        if prediction_type == "v_prediction":
            return alpha * noise - sigma * x0
        if prediction_type == "flow_prediction":
            return noise.to(alpha.dtype) - x0
        target = noise if prediction_type == "epsilon" else x0
        return target.to(torch.promote_types(target.dtype, torch.float32))

    def to_x0(
        self, output: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: str = "epsilon"
    ) -> Tensor:
        """The x0 that a network output implies at x_t. For epsilon at zero SNR this is infinite: x_T holds no x0."""
        prediction_type = self.canonical(prediction_type)
        alpha, sigma = self._coefficients(x_t, timesteps)
        if prediction_type == "sample":
            return output.float()
        if prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha
        return x_t - sigma * output if self.is_flow else alpha * x_t - sigma * output


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled-linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
}


def make_schedule(
    name: str, num_timesteps: int = 1000, *, zero_terminal_snr: bool = False
) -> NoiseSchedule:
    """The named schedule; raises KeyError with the choices for an unknown name."""
    check_name("schedule", name, SCHEDULES)
    return SCHEDULES[name](num_timesteps, zero_terminal_snr=zero_terminal_snr)
