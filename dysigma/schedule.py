"""Noise schedules in terms of one quantity, log_snr, and the forward process x_t = alpha x0 + sigma noise.

There are two paths. On the variance-preserving one alpha^2 + sigma^2 = 1. On the rectified flow
alpha + sigma = 1.

Tables are built in float64 from alphas_cumprod and never change precision. diffusers casts its
table to the dtype of the images, which in bfloat16 gives some timesteps exactly zero noise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checks import check_name, check_options, check_timesteps

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

_ALIASES = {"x0": "sample", "v": "v_prediction", "eps": "epsilon", "flow": "flow_prediction"}

# What alphas_cumprod ends at in schedulers of diffusers that cannot sample from exactly 0.
_DIFFUSERS_ZERO = 2.0**-24

# The last alpha in place of 0 when one of our schedules goes to such a scheduler. As a power of two
# it is exact in float32, so that reading the scheduler back recognises it.
_LAST_ALPHA = 2.0**-12

_HOW_TO_GIVE_LEVELS = (
    "Give its levels yourself, clean to noisy, in float64: NoiseSchedule(log_snr.sigmoid()), for "
    "EDM with log_snr = -2 ln sigma; and call weighting.at(losses, log_snr) at the levels drawn"
)


def canonical_prediction_type(name: str) -> str:
    """The diffusers name of a prediction type; "x0", "v", "eps" and "flow" are aliases.

    flow_prediction is noise - x0, the velocity of the rectified flow. Raises ValueError for a name
    that is neither an alias nor one of PREDICTION_TYPES.

    >>> canonical_prediction_type("x0")
    'sample'
    """
    check_name("prediction type", name, [*PREDICTION_TYPES, *_ALIASES], error=ValueError)
    return _ALIASES.get(name, name)


def _line(start: float, end: float, num_timesteps: int) -> Tensor:
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64)


def _linear_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    return _line(start, end, num_timesteps)


def _scaled_linear_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    return _line(start**0.5, end**0.5, num_timesteps) ** 2


def _sigmoid_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    return _line(-6, 6, num_timesteps).sigmoid() * (end - start) + start


# By the names of diffusers.
_BETAS = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "sigmoid": _sigmoid_betas,
}


def _products(betas: Tensor) -> Tensor:
    """alphas_cumprod of betas (T,), as a sum of logarithms: a float64 product would underflow."""
    return torch.log1p(-betas).cumsum(0).exp()


def _cosine(num_timesteps: int, offset: float, max_beta: float) -> Tensor:
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=max_beta)
    return _products(betas)


def _rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) to end at exactly 0 (Lin, Liu, Li, Yang 2024, alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


class NoiseSchedule(nn.Module):
    """A noise schedule on T discrete timesteps; timestep 0 is the cleanest.

    alphas_cumprod: (T,) real, strictly decreasing, in (0, 1). The last value may be 0, which is zero
        terminal SNR.
    config: keyword arguments with which a diffusers scheduler makes the same table, if there are any.
    is_flow: whether x_t is that of the rectified flow of the same SNR. By default it is
        variance-preserving.
    shift: of a flow, what its levels were shifted by.

    For levels sigma of another process (EDM, any continuous time) use NoiseSchedule(log_snr.sigmoid()),
    in float64. With quantiles of the levels that training draws, weights have mean 1 over the draws,
    and uniform bins hold equal shares of them.

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
        if bar.ndim != 1 or len(bar) < 2:
            raise ValueError(
                f"alphas_cumprod must be (T,) with T >= 2; got shape {tuple(bar.shape)}"
            )
        if not _falls(bar):
            raise ValueError(
                f"alphas_cumprod must fall strictly from below 1 to 0 or more; got {len(bar)} "
                f"values from {bar[0]:.6g} to {bar[-1]:.6g}"
            )
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        # .half() on an enclosing module must not round the schedule: follow the device, keep the dtype.
        for name, table in self.named_buffers(recurse=False):
            setattr(self, name, table.to(fn(table).device))
        return self

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
        """The rectified flow x_t = (1 - s) x0 + s noise (Liu, Gong, Liu 2023).

        log_snr = 2 ln((1 - s) / s). The levels are those of diffusers, s = (t + 1) / T, shifted to
        shift s / (1 + (shift - 1) s) (Esser et al. 2024). The last one is s = 1, noise alone.

        Timesteps are counted from the clean end, as everywhere here: index i of diffusers is our
        T - 1 - i. The pipelines of diffusers call a network with T s. Networks trained here are called
        with the integer t, as on the other path; see timestep_of.

        >>> NoiseSchedule.flow(4).sigma
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
        """
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be a finite number > 0; got {shift!r}")
        s = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        s = shift * s / (1 + (shift - 1) * s)
        return cls(_flow_alphas_cumprod(s), is_flow=True, shift=float(shift))

    @classmethod
    def _of_betas(
        cls, name: str, start: float, end: float, num_timesteps: int, zero_terminal_snr: bool
    ) -> NoiseSchedule:
        betas = _BETAS[name](start, end, num_timesteps)
        config = {"beta_schedule": name, "beta_start": start, "beta_end": end}
        return cls._named(_products(betas), config, zero_terminal_snr)

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

        scheduler: any object with ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, ...; those of Euler type
        work in x / alpha, on the same table) or of flow matching. Its table is read, not its config, so
        a table that was edited in place is what comes out. Dynamic shifting of flows is for sampling
        and not in the table.
        Raises TypeError for what is no scheduler object, such as its class, its config or a model's
        name. Raises ValueError for schedulers whose network was trained on a continuum of levels (EDM,
        Stable Video Diffusion), in stages, or on no levels at all.

        >>> from diffusers import DDIMScheduler
        >>> NoiseSchedule.from_diffusers(DDIMScheduler(beta_schedule="squaredcos_cap_v2")).num_timesteps
        1000
        """
        _check_is_scheduler(scheduler)
        name = type(scheduler).__name__
        config = getattr(scheduler, "config", {})
        table = getattr(scheduler, "alphas_cumprod", None)
        if config.get("timestep_type") == "continuous":
            raise ValueError(
                f"{name} has timestep_type='continuous': its network was trained on a continuum of "
                f"levels, and alphas_cumprod does not hold them. {_HOW_TO_GIVE_LEVELS}"
            )
        if table is None:
            is_flow = hasattr(scheduler, "scale_noise")
        else:
            is_flow = bool(config.get("use_flow_sigmas"))
        if is_flow:
            return cls._from_flow(scheduler, config)
        if isinstance(table, np.ndarray | list | tuple):
            table = torch.as_tensor(table)
        if not isinstance(table, Tensor):
            raise ValueError(
                f"{name} has no alphas_cumprod and is no plain flow matching: its training levels "
                f"are unknown. {_HOW_TO_GIVE_LEVELS}"
            )
        betas = getattr(scheduler, "betas", None)
        betas = None if betas is None else torch.as_tensor(betas)
        bar = _read_alphas_cumprod(table, betas, config)
        return cls(bar, config=_config_that_makes(bar, config))

    @classmethod
    def _from_flow(cls, scheduler: Any, config: Mapping[str, Any]) -> NoiseSchedule:
        num_timesteps = config.get("num_train_timesteps")
        if not num_timesteps or config.get("invert_sigmas"):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod and is no plain flow matching "
                "(num_train_timesteps levels that are not inverted): its training levels are "
                f"unknown. {_HOW_TO_GIVE_LEVELS}"
            )
        shift = config.get("flow_shift", config.get("shift", 1.0))
        if config.get("use_dynamic_shifting"):
            shift = 1.0
        schedule = cls.flow(num_timesteps, shift=shift)
        has_sampled = getattr(scheduler, "num_inference_steps", None) is not None
        if has_sampled or config.get("use_flow_sigmas"):
            return schedule
        # Until it is set to sample, the table of the scheduler holds the levels of training.
        s = scheduler.sigmas.detach().to("cpu", torch.float64)[:num_timesteps].flip(0)
        if s.shape != schedule.sigma.shape or torch.allclose(s, schedule.sigma.double(), atol=1e-5):
            return schedule
        return cls(_flow_alphas_cumprod(s), is_flow=True)

    def to_diffusers(
        self,
        scheduler_class: type | None = None,
        prediction_type: str | None = None,
        **options: Any,
    ) -> Any:
        """A diffusers scheduler with the levels of this schedule.

        scheduler_class: by default DDPMScheduler, and FlowMatchEulerDiscreteScheduler of a flow.
        prediction_type: by default epsilon, and flow_prediction of a flow. FlowMatch schedulers step by
        flow_prediction alone: convert the outputs of other networks with to_velocity.
        options go to the scheduler's constructor unchanged (for example
        ``timestep_spacing="trailing"``).

        Where the class does not know the name of the schedule, it gets the betas. Classes that cannot
        sample from SNR 0 get a last alpha of 2^-12 in its place, which from_diffusers reads as 0.
        Raises TypeError for what is not a class, ValueError for a class that cannot hold the levels.

        >>> from diffusers import DDIMScheduler
        >>> NoiseSchedule.sigmoid(50).to_diffusers(DDIMScheduler).config.num_train_timesteps
        50
        """
        if scheduler_class is not None and not isinstance(scheduler_class, type):
            raise TypeError(
                "to_diffusers takes a scheduler's class, such as diffusers.DDIMScheduler; got "
                f"{type(scheduler_class).__name__}"
            )
        if self.is_flow:
            return self._to_flow_scheduler(scheduler_class, prediction_type, options)
        if scheduler_class is None:
            from diffusers import DDPMScheduler

            scheduler_class = DDPMScheduler
        kind = self.canonical(prediction_type or "epsilon")
        known = _parameters(scheduler_class)
        arguments: dict[str, Any] = {"num_train_timesteps": self.num_timesteps, **options}
        if "prediction_type" in known:
            arguments["prediction_type"] = kind
        elif kind != "epsilon":
            raise ValueError(f"{scheduler_class.__name__} steps by epsilon alone; got {kind}")
        if "snr_shift_scale" in known:
            arguments.setdefault("snr_shift_scale", 1.0)  # the levels given are shifted already
        refused: TypeError | None = None
        for levels in self._levels_for(known):
            try:
                scheduler = scheduler_class(**{**levels, **arguments})
            except NotImplementedError:  # the class does not know this beta_schedule
                continue
            except TypeError as error:  # an option that it does not take, or betas of another type
                refused = error
                continue
            if self._has_levels_of(scheduler):
                return scheduler
        if refused is not None:
            raise refused
        given = f" with {options}" if options else ""
        raise ValueError(
            f"{scheduler_class.__name__}{given} cannot hold the levels of this schedule"
        )

    def _levels_for(self, known: set[str]) -> list[dict[str, Any]]:
        """Arguments that may make these levels in a scheduler, the most readable ones first."""
        if not {"num_train_timesteps", "beta_schedule", "trained_betas"} <= known:
            return []
        bar = self.alphas_cumprod.cpu()
        alphas = bar / torch.cat([bar.new_ones(1), bar[:-1]])
        attempts: list[dict[str, Any]] = [] if self.config is None else [self.config]
        # A class that knows of SNR 0 can perhaps sample from it.
        if not self.has_zero_terminal_snr or "rescale_betas_zero_snr" in known:
            attempts.append({"trained_betas": (1 - alphas).tolist()})
        if self.has_zero_terminal_snr:
            alphas[-1] = _LAST_ALPHA
            attempts.append({"trained_betas": (1 - alphas).tolist()})
        attempts.append({"trained_betas": (1 - alphas).numpy()})  # as RePaintScheduler wants them
        return attempts

    def _has_levels_of(self, scheduler: Any) -> bool:
        """Whether a scheduler just made has these levels, and finite numbers to sample with."""
        sigmas = torch.as_tensor(getattr(scheduler, "sigmas", 0.0))
        if not bool(sigmas.isfinite().all()):
            return False
        try:
            return _same_levels(self.from_diffusers(scheduler).alphas_cumprod, self.alphas_cumprod)
        except ValueError:
            return False

    def _to_flow_scheduler(
        self, scheduler_class: type | None, prediction_type: str | None, options: dict[str, Any]
    ) -> Any:
        if scheduler_class is None:
            from diffusers import FlowMatchEulerDiscreteScheduler

            scheduler_class = FlowMatchEulerDiscreteScheduler
        kind = self.canonical(prediction_type or "flow_prediction")
        name = scheduler_class.__name__
        known = _parameters(scheduler_class)
        arguments: dict[str, Any] = {"num_train_timesteps": self.num_timesteps}
        if "use_flow_sigmas" in known and "flow_shift" in known:
            if kind == "v_prediction":
                raise ValueError(
                    f"{name} reads v as on the variance-preserving path; convert outputs with "
                    "to_velocity and give prediction_type='flow_prediction'"
                )
            arguments.update(use_flow_sigmas=True, flow_shift=self.shift, prediction_type=kind)
        elif {"shift", "num_train_timesteps"} <= known:
            if kind != "flow_prediction":
                raise ValueError(
                    f"{name} steps by flow_prediction alone; convert outputs of {kind} with "
                    "to_velocity and leave prediction_type out"
                )
            arguments["shift"] = self.shift
        else:
            raise ValueError(
                f"{name} holds no flow; use FlowMatchEulerDiscreteScheduler or one with use_flow_sigmas"
            )
        scheduler = scheduler_class(**{**arguments, **options})
        if not self._has_levels_of(scheduler):
            raise ValueError(f"{name} cannot hold the levels of this flow: they are no shift of s")
        return scheduler

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

        epsilon: noise. sample: x0. v_prediction: alpha noise - sigma x0 (Salimans, Ho 2022), with the
        alpha and sigma of the path. flow_prediction: noise - x0, of the rectified flow.
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


def _falls(bar: Tensor) -> bool:
    return bool((bar.diff() < 0).all() and bar[0] < 1 and bar[-1] >= 0)


def _flow_alphas_cumprod(s: Tensor) -> Tensor:
    """The variance-preserving alphas_cumprod of the same SNR as x_t = (1 - s) x0 + s noise."""
    return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


def _same_levels(bar: Tensor, other: Tensor) -> bool:
    """Whether two alphas_cumprod agree as well as products in float32 can."""
    bar = bar.cpu()
    other = other.cpu()
    if bar.shape != other.shape or not torch.allclose(bar, other, rtol=1e-3, atol=1e-6):
        return False
    return torch.allclose(bar.log(), other.log(), rtol=1e-3, atol=5e-3)


def _parameters(scheduler_class: type) -> set[str]:
    """Names that a scheduler's constructor takes; a subclass that passes on **kwargs has its base's."""
    names: set[str] = set()
    for each in scheduler_class.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        names.update(p.name for p in parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def check_schedule(schedule: Any) -> None:
    """Raise TypeError, with the way, unless schedule is a NoiseSchedule."""
    if isinstance(schedule, NoiseSchedule):
        return
    need = "schedule must be a NoiseSchedule"
    advice = "use NoiseSchedule.from_diffusers(scheduler)"
    if isinstance(schedule, type):
        raise TypeError(f"{need}; got the class {schedule.__name__}: make one, and {advice}")
    if isinstance(schedule, str):
        raise TypeError(
            f"{need}; got the text {schedule!r}: for a name of SCHEDULES use make_schedule, for a model of diffusers "
            "NoiseSchedule.from_diffusers(pipeline.scheduler)"
        )
    if isinstance(schedule, Mapping):
        raise TypeError(f"{need}; got a configuration: make its scheduler, and {advice}")
    raise TypeError(f"{need}; got {type(schedule).__name__}: {advice}")


def _check_is_scheduler(scheduler: Any) -> None:
    """Raise TypeError, with the way, for what is near a scheduler object and none."""
    wanted = "from_diffusers takes a scheduler object"
    if isinstance(scheduler, type):
        name = scheduler.__name__
        raise TypeError(f"{wanted}; got the class {name}: make one, {name}(...) or .from_config")
    if isinstance(scheduler, str):
        raise TypeError(
            f"{wanted}; got the text {scheduler!r}: open the scheduler of that model first, such as "
            "DDPMScheduler.from_pretrained(model, subfolder='scheduler')"
        )
    if isinstance(scheduler, Mapping):
        raise TypeError(f"{wanted}; got a config: make one with DDPMScheduler.from_config(config)")
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return
    if hasattr(scheduler, "scheduler"):
        raise TypeError(f"{wanted}; got {type(scheduler).__name__}: give its .scheduler")
    if not hasattr(scheduler, "step") and not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"{wanted}; got {type(scheduler).__name__}")


def _read_alphas_cumprod(table: Tensor, betas: Tensor | None, config: Mapping[str, Any]) -> Tensor:
    """The training levels in a scheduler's float32 table, in float64."""
    bar = table.detach().to("cpu", torch.float64)
    if bar.ndim != 1 or len(bar) < 2:
        return bar
    replaced = config.get("rescale_betas_zero_snr") and bar[-1] == _DIFFUSERS_ZERO
    if replaced or bar[-1] == bar[-2] * _LAST_ALPHA:
        bar = torch.cat([bar[:-1], bar.new_zeros(1)])
    smallest = torch.finfo(torch.float32).tiny
    is_exact = _falls(bar) and bool((bar[:-1] > smallest).all())
    if is_exact or betas is None:
        return bar
    # Products below the smallest float32, or nearer to 1 than its step, are lost in the table but not
    # in the betas that made it.
    products = _products(betas.detach().to("cpu", torch.float64))
    if products.shape == bar.shape and torch.allclose(products, bar, rtol=1e-2, atol=1e-6):
        ends_at_zero = bar[-1] == 0 and bar[-2] > smallest
        return torch.cat([products[:-1], bar.new_zeros(1)]) if ends_at_zero else products
    return bar


def _config_that_makes(bar: Tensor, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of a scheduler's config that name this table; None where it was made in another way."""
    name = config.get("beta_schedule")
    if name == "squaredcos_cap_v2":
        named = _cosine(len(bar), 0.008, 0.999)
        kept = {"beta_schedule": name}
    elif name in _BETAS:
        kept = {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end")}
        named = _products(_BETAS[name](kept["beta_start"], kept["beta_end"], len(bar)))
    else:
        return None
    return kept if _same_levels(named, bar) else None


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled-linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
    "flow": NoiseSchedule.flow,
}


def make_schedule(
    name: str, num_timesteps: int = 1000, *, zero_terminal_snr: bool = False, **params: float
) -> NoiseSchedule:
    """The named schedule. params are its own: beta_start, beta_end, offset, max_beta, shift.

    A flow ends at zero SNR, whatever zero_terminal_snr is. Raises KeyError with the choices for an
    unknown name, ValueError for a parameter that the schedule does not have.

    >>> make_schedule("flow", 1000, shift=3.0).is_flow
    True
    """
    check_name("schedule", name, SCHEDULES)
    make = SCHEDULES[name]
    check_options(f"schedule {name!r}", params, make)
    if name == "flow":
        return make(num_timesteps, **params)
    return make(num_timesteps, zero_terminal_snr=zero_terminal_snr, **params)
