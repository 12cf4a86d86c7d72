"""Everything a run depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_name, plain_number
from ..models import PRESETS
from ..samplers import TIMESTEP_SAMPLERS
from ..schedule import (
    SCHEDULES,
    NoiseSchedule,
    canonical_prediction_type,
    configured_schedule,
)
from ..weightings.registry import WEIGHTINGS

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
COOLDOWNS = ("linear", "cosine")
MAY_BE_ZERO = ("seed", "warmup_images", "cooldown_images", "weight_decay", "distance_images")
SMALLEST_FLOAT = 5e-324
LARGEST_INT = 2**63 - 1


def _option(default: Any, text: str) -> Any:
    """A field of TrainConfig, with the words that explain it on the command line."""
    metadata = {"help": text}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _plain(value: Any) -> Any:
    """A NumPy or torch scalar as the Python number it holds, also inside a dict; all else as it is."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return plain_number(value)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; JSON in the run folder. Amounts of training are counted in images.

    NumPy and torch scalars are stored as plain Python numbers. Raises KeyError for an unknown name
    and ValueError for a number out of range, when constructed.

    >>> config = TrainConfig(weighting="min-snr", images=64_000, batch_size=64)
    >>> config.num_steps
    1000
    >>> TrainConfig.from_dict(config.to_dict()) == config
    True
    """

    data: str = _option(
        "leaves",
        "shapes, leaves, gaussian-fields (made in memory), cifar10, an .npz file, or a folder",
    )
    data_root: str | None = _option(
        None, "where CIFAR-10 lies or goes (default: $DYSIGMA_DATA, then the user's cache)"
    )
    image_size: int | None = _option(
        None, "resize the central squares of images to this (default: as they are; leaves 16)"
    )
    train_images: int | None = _option(None, "use only the first so many training images")
    conditional: bool = _option(False, "condition the network on the class labels")
    model: str = _option(
        "tiny",
        "network: micro, tiny (for CPUs), small, compact, medium (for CIFAR-10 on a GPU), ddpm",
    )
    schedule: str = _option("linear", f"noise schedule: {', '.join(SCHEDULES)}")
    shift: float = _option(1.0, "of the flow's levels: above 1, more of them are noisy")
    num_timesteps: int = _option(1000, "number of timesteps T")
    zero_terminal_snr: bool = _option(
        False, "rescale the schedule to end in pure noise (not with epsilon)"
    )
    prediction: str = _option(
        "epsilon",
        "what the network predicts: epsilon, sample (x0), v_prediction (v) or, on the flow, "
        "flow_prediction",
    )
    weighting: str = _option(
        "const-eps", f"{', '.join(WEIGHTINGS)}, or module:function of your own"
    )
    weighting_params: dict[str, Any] = _option(dict, "of the weighting, as name=value (kappa=0.5)")  # noqa: RUF009
    normalize: bool = _option(True, "scale weights to mean 1 over timesteps (the default)")
    timestep_sampler: str = _option(
        "uniform", "distribution of timesteps: " + ", ".join(TIMESTEP_SAMPLERS)
    )
    sampler_params: dict[str, Any] = _option(dict, "of the timestep sampler, as name=value")  # noqa: RUF009
    images: int = _option(32_000, "how many images to train on, repeats included")
    batch_size: int = _option(32, "images per step")
    accumulate: int = _option(
        1, "parts of a batch, to save memory; a weighting's statistics move between them"
    )
    seed: int = _option(0, "of initial weights, images, timesteps and noise")
    lr: float = _option(1e-3, "learning rate of the network (AdamW)")
    weighting_lr: float | None = _option(
        None, "of a learnable weighting (default: what it suggests)"
    )
    weight_decay: float = _option(0.0, "AdamW weight decay of the network")
    warmup_images: int = _option(3_200, "linear warm-up of the learning rate over so many images")
    cooldown_images: int = _option(
        0, "decay of the learning rate to 0 over the last so many images (0: none)"
    )
    cooldown: str = _option("linear", "shape of that decay: linear or cosine")
    grad_clip: float = _option(1.0, "largest norm of the gradient")
    ema_half_life: float = _option(
        500_000.0, "of the averaged weights, in images (at most 5 %% of the images seen)"
    )
    flip: bool = _option(True, "mirror images at random (the default)")
    bins: int = _option(10, "timestep bins of the logged losses")
    log_every: int = _option(50, "steps per line of metrics.jsonl")
    checkpoint_every: int | None = _option(
        None, "images per checkpoint (default: a tenth of the run)"
    )
    validate_every: int | None = _option(
        None, "images per validation (default: a tenth of the run)"
    )
    validate_from: int | None = _option(
        None, "instead: images before the first, then at every factor sqrt 2"
    )
    validation_images: int = _option(64, "test images per validation")
    validation_timesteps: int = _option(50, "timesteps per validation")
    distance_images: int = _option(
        0, "samples at each validation for their Fréchet distance to the training images"
    )
    distance_steps: int = _option(25, "DDIM steps of those samples")
    features: str = _option(
        "pixels", "of that distance: pixels, fid, or a TorchScript file (uint8 images to (N, D))"
    )
    conflicts_from: int | None = _option(
        None, "images before the first report of conflicts, then at every doubling"
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1")
    precision: str = _option(
        "auto",
        "float32, bfloat16, float16, or auto: bfloat16 on a CUDA device that has it, else float32",
    )
    compile: bool | None = _option(
        None, "torch.compile, and channels last (default: on CUDA devices that support it)"
    )
    threads: int | None = _option(
        None,
        "CPU threads (default: one for micro and tiny on images of up to 16 pixels, else what torch "
        "chooses; a resumed run keeps its number)",
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = _plain(getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            _check_field(f.name, str(f.type), value)
        object.__setattr__(self, "prediction", canonical_prediction_type(self.prediction))
        check_name("schedule", self.schedule, SCHEDULES)
        if self.shift != 1 and self.schedule != "flow":
            raise ValueError(
                f"shift is of the flow; got shift {self.shift}, schedule {self.schedule}"
            )
        check_name("model", self.model, PRESETS)
        check_name("precision", self.precision, PRECISIONS)
        check_name("cooldown", self.cooldown, COOLDOWNS)
        if self.images < self.batch_size or self.batch_size % self.accumulate:
            raise ValueError(
                "batch_size must not exceed images and must be a multiple of accumulate; got "
                f"images {self.images}, batch_size {self.batch_size}, accumulate {self.accumulate}"
            )
        for name, limit in (
            ("bins", "num_timesteps"),
            ("validation_timesteps", "num_timesteps"),
            ("cooldown_images", "images"),
        ):
            value, most = getattr(self, name), getattr(self, limit)
            if value > most:
                raise ValueError(f"{name} must not exceed {limit} {most}; got {value}")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: images // batch_size."""
        return self.images // self.batch_size

    def interval(self, name: str) -> int:
        """checkpoint_every or validate_every in steps, at least 1; a tenth of the run if not set."""
        images = getattr(self, name) or self.images // 10
        return max(1, images // self.batch_size)

    def is_due(self, name: str, step: int, factor: float) -> bool:
        """Whether step is the first of validate_from or conflicts_from, or that times a whole power of factor."""
        first = max(1, getattr(self, name) // self.batch_size)
        power = round(math.log(max(step, 1) / first, factor))
        return power >= 0 and step == round(first * factor**power)

    def learning_rate_factor(self, step: int) -> float:
        """What a step, counted from 0, multiplies learning rates by: warm-up times cool-down.

        >>> config = TrainConfig(images=100, batch_size=10, warmup_images=20, cooldown_images=20)
        >>> [config.learning_rate_factor(step) for step in (0, 1, 5, 8, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5]
        """
        warmup = min(1.0, (step + 1) * self.batch_size / max(1, self.warmup_images))
        if self.cooldown_images == 0:
            return warmup
        images_left = (self.num_steps - step) * self.batch_size
        cooldown = min(1.0, images_left / self.cooldown_images)
        if self.cooldown == "cosine":
            cooldown = 0.5 - 0.5 * math.cos(math.pi * cooldown)
        return warmup * cooldown

    def noise_schedule(self) -> NoiseSchedule:
        """Build only the noise schedule, on the CPU.

        Used when opening a run made by someone else, because it imports none of the modules that
        the configuration names.
        """
        return configured_schedule(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict; fields left out keep their defaults, unknown ones raise a KeyError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            check_name("configuration key", name, known)
        return cls(**values)


def _check_field(name: str, annotation: str, value: Any) -> None:
    """Raise ValueError unless value is of the annotated kind and, if a number, in range."""
    if value is None and annotation.endswith(" | None"):
        return
    kind = annotation.removesuffix(" | None")
    wanted: Any = {"str": str, "bool": bool, "int": int, "float": int | float}.get(kind, dict)
    is_bool_elsewhere = isinstance(value, bool) and kind != "bool"
    if not isinstance(value, wanted) or is_bool_elsewhere:
        raise ValueError(f"{name} must be {kind}; got {value!r}")
    if kind not in ("int", "float"):
        return
    low: float = 1 if kind == "int" else SMALLEST_FLOAT
    high: float = LARGEST_INT + 1 if kind == "int" else math.inf
    if name in MAY_BE_ZERO:
        low = 0
    if not low <= value < high:
        sign = "positive" if low else "0 or more"
        raise ValueError(f"{name} must be {sign} and below {high}; got {value!r}")
