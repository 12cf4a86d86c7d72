"""One noise schedule: its levels, and the forward process x_t = alpha x0 + sigma noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_timesteps
from ..devices import KeepsPrecision
from . import tables
from .predictions import canonical_prediction_type
from .reading import read_scheduler
from .writing import make_scheduler


class NoiseSchedule(KeepsPrecision):
    """A noise schedule on T discrete timesteps; timestep 0 is the cleanest.

    alphas_cumprod: (T,) real, strictly decreasing, in (0, 1). The last value may be 0, which is
        zero terminal SNR.
    config: keyword arguments with which a diffusers scheduler makes the same table, if there are
        any.
    is_flow: whether x_t is that of the rectified flow of the same SNR. By default it is
        variance-preserving.
    shift: of a flow, what its levels were shifted by.

    For levels sigma of another process (EDM, any continuous time) use
    NoiseSchedule(log_snr.sigmoid()), in float64. With quantiles of the levels that training draws,
    weights have mean 1 over the draws, and uniform bins hold equal shares of them.

    Buffers: ``log_snr`` (T,) float64, natural log of alphas_cumprod / (1 - alphas_cumprod),
    decreasing, -inf only at the last step; ``alphas_cumprod`` (T,) float64; ``alpha`` and ``sigma``
    (T,) float32. `.to(device)` moves them and never changes their precision.
    Raises ValueError for a table that is not such a sequence.

    >>> NoiseSchedule(torch.tensor([0.8, 0.5, 0.2])).log_snr
    tensor([ 1.3863,  0.0000, -1.3863], dtype=torch.float64)
    """

    log_snr: Tensor
    alphas_cumprod: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        config: Mapping[str, Any] | None = None,
        is_flow: bool = False,
        shift: float = 1.0,
    ) -> None:
        super().__init__()
        bar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        tables.check_alphas_cumprod(bar)
        self.config = None if config is None else dict(config)
        self.is_flow = is_flow
        self.shift = shift
        alpha = bar.sqrt()
        sigma = (1 - bar).sqrt()
        if is_flow:
            total = alpha + sigma
            alpha = alpha / total
            sigma = sigma / total
        self.register_buffer("alphas_cumprod", bar, persistent=False)
        self.register_buffer("log_snr", bar.log() - torch.log1p(-bar), persistent=False)
        self.register_buffer("alpha", alpha.float(), persistent=False)
        self.register_buffer("sigma", sigma.float(), persistent=False)

    def extra_repr(self) -> str:
        """What print(schedule) shows: the path, T and the range of log_snr."""
        path = f"flow, shift={self.shift:g}" if self.is_flow else "variance-preserving"
        first = float(self.log_snr[0])
        last = float(self.log_snr[-1])
        return f"{path}, num_timesteps={self.num_timesteps}, log_snr from {first:.3g} to {last:.3g}"

    @property
    def num_timesteps(self) -> int:
        """T, the number of discrete timesteps."""
        return len(self.log_snr)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep holds noise alone."""
        return bool(self.alphas_cumprod[-1] == 0)

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
        """Square roots of betas linear in t; diffusers "scaled_linear".

        The defaults are those of Stable Diffusion.
        """
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
        """alphas_cumprod a squared cosine of t, betas capped (Nichol, Dhariwal 2021).

        With these defaults it is "squaredcos_cap_v2" of diffusers.
        """
        is_theirs = offset == 0.008 and max_beta == 0.999
        config = {"beta_schedule": "squaredcos_cap_v2"} if is_theirs else None
        return cls._named(tables.cosine(num_timesteps, offset, max_beta), config, zero_terminal_snr)

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
        """The rectified flow x_t = (1 - s) x0 + s noise (Liu, Gong, Liu 2023).

        log_snr = 2 ln((1 - s) / s). The levels are those of diffusers, s = (t + 1) / T, shifted to
        shift s / (1 + (shift - 1) s) (Esser et al. 2024). The last one is s = 1, noise alone.

        Timesteps are counted from the clean end, as everywhere here: index i of diffusers is our
        T - 1 - i. The pipelines of diffusers call a network with T s. Networks trained here are
        called with the integer t, as on the other path; see timestep_of.

        >>> NoiseSchedule.flow(4).sigma
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
        """
        s = tables.flow_shares(num_timesteps, shift)
        return cls(tables.flow_alphas_cumprod(s), is_flow=True, shift=float(shift))

    @classmethod
    def _of_betas(
        cls, name: str, start: float, end: float, num_timesteps: int, zero_terminal_snr: bool
    ) -> NoiseSchedule:
        betas = tables.BETAS[name](start, end, num_timesteps)
        config = {"beta_schedule": name, "beta_start": start, "beta_end": end}
        return cls._named(tables.products(betas), config, zero_terminal_snr)

    @classmethod
    def _named(
        cls, alphas_cumprod: Tensor, config: dict[str, Any] | None, zero_terminal_snr: bool
    ) -> NoiseSchedule:
        if zero_terminal_snr:
            # Passed on as betas: diffusers rescales in float32, which leaves a different last step.
            return cls(tables.rescale_zero_terminal_snr(alphas_cumprod))
        return cls(alphas_cumprod, config=config)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule that a diffusers scheduler is for, whatever steps it was last set to sample with.

        scheduler: any object with ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, ...; those of Euler
        type work in x / alpha, on the same table) or of flow matching. Its table is read, not its
        config, so a table that was edited in place is what comes out. Dynamic shifting of flows is
        for sampling and not in the table.
        Raises TypeError for what is no scheduler object, such as its class, its config or a model's
        name. Raises ValueError for schedulers whose network was trained on a continuum of levels
        (EDM, Stable Video Diffusion), in stages, or on no levels at all.

        >>> from diffusers import DDIMScheduler
        >>> NoiseSchedule.from_diffusers(DDIMScheduler(beta_schedule="squaredcos_cap_v2")).num_timesteps
        1000
        """
        return cls(**read_scheduler(scheduler)._asdict())

    def to_diffusers(
        self,
        scheduler_class: type | None = None,
        prediction_type: str | None = None,
        **options: Any,
    ) -> Any:
        """A diffusers scheduler with the levels of this schedule.

        scheduler_class: by default DDPMScheduler, and FlowMatchEulerDiscreteScheduler of a flow.
        prediction_type: by default epsilon, and flow_prediction of a flow. FlowMatch schedulers
        step by flow_prediction alone: convert the outputs of other networks with to_velocity.
        options go to the scheduler's constructor unchanged (for example
        ``timestep_spacing="trailing"``).

        Where the class does not know the name of the schedule, it gets the betas. Classes that
        cannot sample from SNR 0 get a last alpha of 2^-12 in its place, which from_diffusers reads
        as 0.
        Raises TypeError for what is not a class, ValueError for a class that cannot hold the
        levels.

        >>> from diffusers import DDIMScheduler
        >>> NoiseSchedule.sigmoid(50).to_diffusers(DDIMScheduler).config.num_train_timesteps
        50
        """
        usual = "flow_prediction" if self.is_flow else "epsilon"
        kind = self.canonical(prediction_type or usual)
        levels = tables.NoiseLevels(
            self.alphas_cumprod.cpu(), self.config, self.is_flow, self.shift
        )
        return make_scheduler(levels, scheduler_class, kind, options)

    def canonical(self, prediction_type: str) -> str:
        """canonical_prediction_type of one that this path has; ValueError for a velocity off the flow.

        v = alpha noise - sigma x0 is defined on both paths: on the flow alpha^2 + sigma^2 >= 1/2.
        """
        kind = canonical_prediction_type(prediction_type)
        if kind == "flow_prediction" and not self.is_flow:
            raise ValueError(
                f"a variance-preserving path has no {kind}: noise - x0 is flow_prediction, "
                "alpha noise - sigma x0 is v_prediction"
            )
        return kind

    def _coefficients(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        check_timesteps(timesteps, self.num_timesteps, len(x))
        shape = (-1,) + (1,) * (x.ndim - 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise, for x0 and noise (B, ...) and timesteps (B,) int64.

        The result is float32 at least, whatever the dtype of the images or autocast.
        """
        alpha, sigma = self._coefficients(x0, timesteps)
        return alpha * x0 + sigma * noise

    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: str = "epsilon"
    ) -> Tensor:
        """What a network of this prediction type must return: (B, ...), float32 at least.

        epsilon: noise. sample: x0. v_prediction: alpha noise - sigma x0 (Salimans, Ho 2022), with
        the alpha and sigma of the path. flow_prediction: noise - x0, of the rectified flow.
        """
        kind = self.canonical(prediction_type)
        alpha, sigma = self._coefficients(x0, timesteps)
        if kind == "v_prediction":
            return alpha * noise - sigma * x0
        if kind == "flow_prediction":
            return noise.to(alpha.dtype) - x0
        target = noise if kind == "epsilon" else x0
        return target.to(torch.promote_types(target.dtype, torch.float32))

    def to_x0(
        self, output: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: str = "epsilon"
    ) -> Tensor:
        """The x0 (B, ...) that a network's output implies at x_t.

        For epsilon at zero SNR it is infinite: x_T holds no x0.
        """
        kind = self.canonical(prediction_type)
        alpha, sigma = self._coefficients(x_t, timesteps)
        if kind == "sample":
            return output.float()
        if kind == "epsilon":
            return (x_t - sigma * output) / alpha
        if kind == "flow_prediction":
            return x_t - sigma * output
        # alpha x_t - sigma v = (alpha^2 + sigma^2) x0, and the factor is 1 off the flow.
        x0 = alpha * x_t - sigma * output
        return x0 / (alpha.square() + sigma.square()) if self.is_flow else x0

    def to_velocity(
        self, output: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: str
    ) -> Tensor:
        """The velocity noise - x0 (B, ...) of a flow that a network's output implies at x_t.

        It is what the flow-matching schedulers of diffusers step by. For epsilon at s = 1 it is
        infinite. Raises ValueError off the flow.
        """
        if not self.is_flow:
            raise ValueError("only a flow has a velocity; use to_x0 on a variance-preserving path")
        kind = self.canonical(prediction_type)
        if kind == "flow_prediction":
            return output.float()
        _, sigma = self._coefficients(x_t, timesteps)
        # x_t = x0 + s (noise - x0)
        return (x_t - self.to_x0(output, x_t, timesteps, kind)) / sigma

    def timestep_of(self, sigma: Tensor) -> Tensor:
        """The timestep (B,) int64 whose noise level alpha : sigma is nearest, for sigma (B,) in (0, 1].

        sigma is that of this path: s of a flow. A flow scheduler of diffusers steps at T s, and a
        network trained here is called with schedule.timestep_of(t / T).

        >>> NoiseSchedule.flow(10, shift=3.0).timestep_of(torch.tensor([0.25, 1.0]))
        tensor([0, 9])
        """
        levels = self.sigma.double()
        middle = (levels[1:] + levels[:-1]) / 2
        return torch.searchsorted(middle, sigma.double())
