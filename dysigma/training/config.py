"""Everything a run depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_name
from ..models import PRESETS
from ..samplers import TIMESTEP_SAMPLERS
from ..schedule import SCHEDULES, NoiseSchedule, canonical_prediction_type, make_schedule
from ..weightings.registry import WEIGHTINGS


def _option(default: Any, text: str) -> Any:
    """A field of TrainConfig, with the words that explain it on the command line."""
    value: dict[str, Any] = {"default_factory": dict} if default is dict else {"default": default}
    return field(**value, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; JSON in the run folder. Amounts of training are counted in images.

    Raises KeyError for an unknown name and ValueError for a number out of range, when constructed.
    """

    data: str = _option(
        "leaves",
        "leaves, gaussian-fields (both made in memory), cifar10, an .npz file, or a folder",
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
        "tiny", "network: micro, tiny (for CPUs), small, compact (for CIFAR-10 on a GPU), ddpm"
    )
    schedule: str = _option("linear", "noise schedule: linear, scaled-linear, cosine, sigmoid")
    num_timesteps: int = _option(1000, "number of timesteps T")
    zero_terminal_snr: bool = _option(
        False, "rescale the schedule to end in pure noise (not with epsilon)"
    )
    prediction: str = _option(
        "epsilon", "what the network predicts: epsilon, sample (x0) or v_prediction (v)"
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
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = _option("auto", "auto (bfloat16 on CUDA), float32 or bfloat16")
    compile: bool | None = _option(None, "torch.compile, and channels last (default: on CUDA only)")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check(f.name, str(f.type), getattr(self, f.name))
        object.__setattr__(self, "prediction", canonical_prediction_type(self.prediction))
        check_name("schedule", self.schedule, SCHEDULES)
        check_name("model", self.model, PRESETS)
        check_name("precision", self.precision, ["auto", "float32", "bfloat16"])
        if self.images < self.batch_size or self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must not exceed images and must be a multiple of accumulate; got images {self.images}, "
                f"batch_size {self.batch_size}, accumulate {self.accumulate}"
            )
        for name in ("bins", "validation_timesteps"):
            if (value := getattr(self, name)) > self.num_timesteps:
                raise ValueError(
                    f"{name} must not exceed num_timesteps {self.num_timesteps}; got {value}"
                )

    def _check(self, name: str, kind: str, value: Any) -> None:
        if value is None and kind.endswith(" | None"):
            return
        kind = kind.removesuffix(" | None")
        wanted: Any = {"str": str, "bool": bool, "int": int, "float": int | float}.get(kind, dict)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"{name} must be {kind}; got {value!r}")
        if kind in ("int", "float"):
            may_be_zero = name in ("seed", "warmup_images", "weight_decay", "distance_images")
            low = 0 if may_be_zero else 1 if kind == "int" else 5e-324
            high = 2**63 if kind == "int" else math.inf
            if not low <= value < high:
                raise ValueError(
                    f"{name} must be {'positive' if low else '0 or more'} and below {high}; got {value!r}"
                )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: images // batch_size."""
        return self.images // self.batch_size

    def interval(self, name: str) -> int:
        """checkpoint_every or validate_every in steps, at least 1; a tenth of the run if not set."""
        return max(1, (getattr(self, name) or self.images // 10) // self.batch_size)

    def is_due(self, name: str, step: int, factor: float) -> bool:
        """Whether step is the first of validate_from or conflicts_from, or that times a whole power of factor."""
        first = max(1, getattr(self, name) // self.batch_size)
        power = round(math.log(max(step, 1) / first, factor))
        return power >= 0 and step == round(first * factor**power)

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule alone, on the CPU: of a run of others, nothing that its configuration names is imported."""
        return make_schedule(
            self.schedule, self.num_timesteps, zero_terminal_snr=self.zero_terminal_snr
        )

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
