"""Training: one configuration, one step, one loop that yields whole steps, and a run folder that can be resumed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bins import Bins
from .data import ImageData, batch, load_data
from .distances import Features, Moments, extract, frechet_distance, load_features, moments
from .draws import generator
from .evaluation import evaluation_timesteps, sample_images, save_grid, validation_losses
from .exact import gaussian_fields
from .gradients import bin_gramian, bin_timesteps, conflicts
from .models import EMA, PRESETS, make_model
from .objective import sample_losses
from .runs import (
    Run,
    RunError,
    append_metrics,
    load_checkpoint,
    load_run,
    provenance,
    read_json,
    read_metrics,
    save_checkpoint,
    write_atomically,
    write_json,
)
from .samplers import TimestepSampler, make_sampler
from .schedule import SCHEDULES, NoiseSchedule, canonical_prediction_type, make_schedule
from .weightings import Weighting, make_weighting


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; JSON in the run folder. Amounts of training are counted in images.

    Raises KeyError for an unknown name and ValueError for a number out of range, when constructed.
    """

    data: str = "leaves"  # "leaves", "cifar10", "gaussian-fields", or a path to an .npz file or a folder of images
    data_root: str | None = None  # where the data lies; default $DYSIGMA_DATA, then the user's cache
    image_size: int | None = None  # None: as in the data (leaves: 16)
    train_images: int | None = None  # use only the first so many
    conditional: bool = False  # condition the network on the class labels
    model: str = "tiny"
    schedule: str = "linear"
    num_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction: str = "epsilon"
    weighting: str = "const-eps"
    weighting_params: dict[str, Any] = field(default_factory=dict)
    normalize: bool = True  # weights of mean 1 over timesteps
    timestep_sampler: str = "uniform"
    sampler_params: dict[str, Any] = field(default_factory=dict)
    images: int = 32_000  # how many images to train on, repeats included
    batch_size: int = 32
    accumulate: int = 1  # split each batch into so many parts; statistics of a weighting then move between parts
    seed: int = 0
    lr: float = 1e-3
    weighting_lr: float | None = None  # None: what the weighting suggests
    weight_decay: float = 0.0
    warmup_images: int = 3_200
    grad_clip: float = 1.0
    ema_half_life: float = 500_000.0
    flip: bool = True
    bins: int = 10  # timestep bins of the logged losses
    log_every: int = 50  # steps
    checkpoint_every: int | None = None  # images; None: a tenth of the run
    validate_every: int | None = None  # images; None: a tenth of the run
    validate_from: int | None = None  # instead: images before the first validation, the next at every factor sqrt 2
    validation_images: int = 64
    validation_timesteps: int = 50
    distance_images: int = 0  # images sampled at each validation for their distance to the training images
    distance_steps: int = 25  # DDIM steps of those
    features: str = "pixels"  # of the distance; or a TorchScript file
    conflicts_from: int | None = None  # images before the first report of conflicts, then at every doubling; None: none
    device: str = "auto"  # "auto", "cpu", "cuda", "mps", ...
    precision: str = "auto"  # "auto" (bf16 on CUDA), "float32", "bfloat16"
    compile: bool | None = None  # None: on CUDA only

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check(f.name, str(f.type), getattr(self, f.name))
        object.__setattr__(self, "prediction", canonical_prediction_type(self.prediction))
        choices = {"schedule": [*SCHEDULES], "model": [*PRESETS], "precision": ["auto", "float32", "bfloat16"]}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise KeyError(f"unknown {name} {getattr(self, name)!r}; have {known}")
        if self.images < self.batch_size or self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must not exceed images and must be a multiple of accumulate; got images {self.images}, "
                f"batch_size {self.batch_size}, accumulate {self.accumulate}"
            )
        for name in ("bins", "validation_timesteps"):
            if getattr(self, name) > self.num_timesteps:
                raise ValueError(
                    f"{name} must not exceed num_timesteps {self.num_timesteps}; got {getattr(self, name)}"
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
            if not low <= value < math.inf:
                rule = "positive" if low else "zero or more"
                raise ValueError(f"{name} must be a {rule} and finite {kind}; got {value!r}")

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

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict; fields left out keep their defaults, unknown ones raise a KeyError."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise KeyError(f"unknown configuration keys {unknown}; have {known}")
        return cls(**values)


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the message names step, timestep bin and weighting."""


class StepRecord(NamedTuple):
    """What one whole step did; detached tensors on the device of training."""

    step: int  # of the step just done, from 0
    timesteps: Tensor  # (B,)
    losses: Tensor  # (B,) unweighted
    loss: Tensor  # () what was minimised
    grad_norm: Tensor  # () before clipping


@dataclass
class TrainState:
    """Everything a step changes, and nothing else; state_dict() is what a checkpoint holds."""

    model: nn.Module
    forward: Any  # the model, or its compiled form
    ema: EMA
    schedule: NoiseSchedule
    weighting: Weighting
    sampler: TimestepSampler
    optimizer: torch.optim.Optimizer
    step: int = 0

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest)."""
        tensors = {f"ema.{k}": v for k, v in self.ema.state.items()}
        for prefix, module in (("model", self.model), ("weighting", self.weighting), ("sampler", self.sampler)):
            tensors |= {f"{prefix}.{k}": v for k, v in module.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        return tensors, {"param_groups": optimizer["param_groups"]}

    def load_state_dict(self, step: int, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Inverse of state_dict; raises RuntimeError when names or shapes do not fit."""
        parts: dict[str, dict[str, Tensor]] = {p: {} for p in ("model", "weighting", "sampler", "ema", "optimizer")}
        for key, value in tensors.items():
            prefix, name = key.split(".", 1)
            parts[prefix][name] = value
        for prefix, module in (("model", self.model), ("weighting", self.weighting), ("sampler", self.sampler)):
            module.load_state_dict(parts[prefix])
        for name, value in self.ema.state.items():
            value.copy_(parts["ema"][name])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
        self.step = step


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; "auto" takes CUDA, then MPS, then the CPU. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} asked for, but this torch ({torch.__version__}) sees no CUDA device; use cpu"
        )
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def load_split(config: TrainConfig, split: str, device: torch.device) -> ImageData:
    """The "train" or "test" images a configuration asks for, on the device."""
    count = config.train_images if split == "train" else None
    if config.data == "gaussian-fields":
        data = gaussian_fields(count or 10_000, config.image_size or 8, split=split)
    else:
        size = 16 if config.image_size is None and config.data == "leaves" else config.image_size
        data = load_data(config.data, root=config.data_root, split=split, size=size, num_images=count)
    if config.conditional and data.labels is None:
        raise ValueError(f"conditional training needs labels, and {data.name} has none")
    return data.to(device)


def make_parts(config: TrainConfig) -> tuple[NoiseSchedule, Weighting, TimestepSampler]:
    """Schedule, weighting and timestep sampler of a configuration, on the CPU."""
    schedule = make_schedule(config.schedule, config.num_timesteps, zero_terminal_snr=config.zero_terminal_snr)
    params = config.weighting_params
    weighting = make_weighting(config.weighting, schedule, config.prediction, config.normalize, **params)
    return schedule, weighting, make_sampler(config.timestep_sampler, schedule, **config.sampler_params)


def build(config: TrainConfig, data: ImageData) -> TrainState:
    """A fresh TrainState on the device of the data; initial weights are a function of config.seed."""
    device = data.images.device
    channels, height, width = data.images.shape[1:]
    if height != width:
        raise ValueError(f"images must be square; got {height} x {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classes = data.num_classes if config.conditional else None
        model = make_model(config.model, height, channels, classes).to(device)
    schedule, weighting, sampler = make_parts(config)
    weighting.to(device)
    groups = [{"params": list(model.parameters()), "lr": config.lr, "weight_decay": config.weight_decay}]
    groups += weighting.parameter_groups(config.weighting_lr)
    for group in groups:
        group["base_lr"] = group["lr"]
    use_compile = device.type == "cuda" if config.compile is None else config.compile
    return TrainState(
        model=model,
        forward=torch.compile(model) if use_compile else model,
        ema=EMA(model, config.ema_half_life),
        schedule=schedule.to(device),
        weighting=weighting,
        sampler=sampler.to(device),
        optimizer=torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu")),
    )


def _kwargs(config: TrainConfig, labels: Tensor | None) -> dict[str, Any]:
    return {"class_labels": labels} if config.conditional else {}


@functools.lru_cache(maxsize=1)
def _reference(
    device: torch.device, source: str, data: str, root: str | None, size: int | None, count: int | None
) -> tuple[Features, Moments]:
    """The features of the distance, and their moments on the training images; the entries of a race share them."""
    config = TrainConfig(data=data, data_root=root, image_size=size, train_images=count)
    features = load_features(source, device)
    return features, moments(extract(features, load_split(config, "train", device).images))


def _autocast(config: TrainConfig, device: torch.device) -> Any:
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def _step_gramian(state: TrainState, data: ImageData, config: TrainConfig) -> Tensor:
    """Debiased Gramian of the bin losses at this step, on images and noise of its own: at least 4 samples a bin."""
    bins, step, device = state.weighting.bins, state.step, data.images.device
    per_bin = max(4, config.batch_size // bins.num_bins)
    timesteps = bin_timesteps(bins, per_bin, generator(config.seed, step, "gramian timesteps")).flatten().to(device)
    # Another seed gives another order of the images than training has at this step.
    x0, labels, _ = batch(data, config.seed + 2**32, step, len(timesteps), flip=config.flip)
    noise = torch.randn(x0.shape, generator=generator(config.seed, step, "gramian noise", device), device=device)
    options: dict[str, Any] = {
        "prediction_type": config.prediction,
        "splits": 4,
        "model_kwargs": _kwargs(config, labels),
    }
    with _autocast(config, device):
        return bin_gramian(state.model, state.schedule, x0, noise, timesteps, bins, **options)


def train_step(state: TrainState, data: ImageData, config: TrainConfig) -> StepRecord:
    """One optimizer step on batch_size images; a function of (state, data, config) alone.

    No number crosses to the host. When it returns, the step is whole: weights, EMA, weighting and counter agree.
    """
    seed, step, device = config.seed, state.step, data.images.device
    x0, labels, _ = batch(data, seed, step, config.batch_size, flip=config.flip)
    u = torch.rand(config.batch_size, generator=generator(seed, step, "timesteps"))
    timesteps, importance = state.sampler(u.to(device))
    noise = torch.randn(x0.shape, generator=generator(seed, step, "noise", device), device=device)
    kwargs = _kwargs(config, labels)
    weights = state.weighting.weights()[timesteps]
    if state.weighting.needs_gramian and step % state.weighting.gramian_every == 0:
        state.weighting.observe_gramian(_step_gramian(state, data, config))

    warmup = min(1.0, (step + 1) * config.batch_size / max(1, config.warmup_images))
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * warmup
    state.optimizer.zero_grad(set_to_none=True)
    losses, total = [], torch.zeros((), device=device)
    for part in torch.arange(config.batch_size, device=device).chunk(config.accumulate):
        draws = x0[part], noise[part], timesteps[part]
        part_kwargs = {key: value[part] for key, value in kwargs.items()}
        with _autocast(config, device):
            part_losses = sample_losses(state.forward, state.schedule, *draws, config.prediction, **part_kwargs)
        correction = importance[part] if state.sampler.corrected else None
        loss = state.weighting(part_losses, timesteps[part], correction) / config.accumulate
        loss.backward()
        losses.append(part_losses.detach())
        total += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.model, state.step * config.batch_size, config.batch_size)
    state.sampler.update(weights * torch.cat(losses), timesteps)
    return StepRecord(step, timesteps, torch.cat(losses), total, grad_norm)


def iterate(state: TrainState, data: ImageData, config: TrainConfig) -> Iterator[StepRecord]:
    """Train to config.num_steps, yielding after each whole step: the caller may stop at any time."""
    while state.step < config.num_steps:
        yield train_step(state, data, config)


def _first_failure(records: list[StepRecord]) -> StepRecord | None:
    finite = torch.stack([torch.cat([r.losses, r.loss[None], r.grad_norm[None]]).isfinite().all() for r in records])
    return None if bool(finite.all()) else records[int(finite.logical_not().nonzero()[0])]


def _explain_failure(record: StepRecord, state: TrainState, config: TrainConfig, out: Path) -> TrainingDiverged:
    """Write failure.json beside the last whole checkpoint and return the error to raise."""
    bins, bad = Bins.uniform(config.num_timesteps, config.bins), ~record.losses.isfinite()
    index = int(bins.index((record.timesteps[bad] if bad.any() else record.timesteps).cpu())[0])
    what = "loss" if bad.any() else "weighted loss" if not record.loss.isfinite() else "gradient"
    numbers = {"losses": record.losses, "weights": state.weighting.weights(), "grad_norm": record.grad_norm[None]}
    report = {"step": record.step, "what": what, "weighting": config.weighting, "timesteps": record.timesteps.tolist()}
    # As text, because JSON has no NaN.
    write_json(out / "failure.json", report | {name: [str(v) for v in t.tolist()] for name, t in numbers.items()})
    return TrainingDiverged(
        f"{what} is not finite at step {record.step}, first in timestep bin {index} "
        f"({int(bins.edges[index])}..{int(bins.edges[index + 1]) - 1}), weighting {config.weighting!r}; nothing was "
        f"repaired. {out}/failure.json has the draws, {out}/checkpoint (if any) the last whole state. Try a lower lr"
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; a second one interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's own handling stays
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Recorder:
    """Turns step records into the run folder: metrics, validation, checkpoints, summary."""

    def __init__(self, config: TrainConfig, state: TrainState, test: ImageData, out: Path) -> None:
        self.config, self.state, self.out = config, state, out
        self.pending: list[StepRecord] = []
        self.seconds, self.since = 0.0, time.perf_counter()
        # Copies, because slices would keep the whole test split in memory.
        self.images = test.images[: config.validation_images].clone()
        labels = test.labels if config.conditional else None
        self.labels = None if labels is None else labels[: config.validation_images].clone()
        self.timesteps = evaluation_timesteps(config.num_timesteps, config.validation_timesteps)
        self.provenance = provenance()
        self.ema_model: Any = copy.deepcopy(state.model)

    def log(self, extra: dict[str, Any]) -> None:
        """Write one metrics line for the steps since the last one."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        images = self.state.step * self.config.batch_size
        row: dict[str, Any] = {"step": self.state.step, "images": images, "seconds": round(self.seconds, 3)}
        if self.pending:
            losses, timesteps, weights = self._window()
            bins = Bins.uniform(self.config.num_timesteps, self.config.bins)
            row |= {
                name: float(torch.stack([getattr(r, name) for r in self.pending]).mean())
                for name in ("loss", "grad_norm")
            }
            row |= {"mean_loss": float(losses.mean()), "bin_losses": bins.mean(losses, timesteps)[0]}
            row |= {"bin_weights": bins.mean(weights, torch.arange(len(weights)))[0]}
        append_metrics(self.out / "metrics.jsonl", row | extra)
        self.pending.clear()

    def _window(self) -> tuple[Tensor, Tensor, Tensor]:
        losses, timesteps = (torch.cat([getattr(r, name) for r in self.pending]) for name in ("losses", "timesteps"))
        return losses.cpu(), timesteps.cpu(), self.state.weighting.weights().cpu()

    def validate(self) -> dict[str, Any]:
        """Losses of the EMA weights at fixed timesteps, images and noise; TrainingDiverged if they are not finite."""
        self.state.ema.copy_to(self.ema_model)
        fixed: dict[str, Any] = {"timesteps": self.timesteps, "labels": self.labels}
        losses = validation_losses(self.ema_model, self.images, self.state.schedule, self.config.prediction, **fixed)
        if not losses.isfinite().all():
            self.summarise("failed")
            raise TrainingDiverged(
                f"validation losses are not finite after step {self.state.step}, weighting {self.config.weighting!r}: "
                f"the averaged weights are broken; nothing was repaired. Try a lower lr, in another folder"
            )
        return {"validation_timesteps": self.timesteps, "validation_losses": losses}

    def distance(self) -> dict[str, Any]:
        """Distance of samples of the EMA weights as validated, from one set of latents, to the training images."""
        config, images = self.config, self.images
        if not config.distance_images:
            return {}
        settings = (config.features, config.data, config.data_root, config.image_size, config.train_images)
        features, reference = _reference(images.device, *settings)
        labels = self._labels(config.distance_images)
        options: dict[str, Any] = {"num_steps": config.distance_steps, "labels": labels}
        shape = (config.distance_images, *images.shape[1:])
        samples = sample_images(
            self.ema_model, self.state.schedule, shape, prediction_type=config.prediction, **options
        )
        return {"distance": frechet_distance(moments(extract(features, samples)), reference)}

    def conflicts(self, data: ImageData) -> dict[str, Any]:
        """Conflicts of the bins at the EMA weights, rounded, from 16 batches a bin; every call has the same draws."""
        self.state.ema.copy_to(self.ema_model)
        config, few = self.config, ("edges", "log_snr", "settings", "group_names", "group_gramian")
        options: dict[str, Any] = {
            "prediction_type": config.prediction,
            "batch_per_bin": config.batch_size,
            "model_kwargs": _kwargs(config, data.labels),
            "seed": config.seed,
            "progress": False,
        }
        with _autocast(config, data.images.device):
            report = conflicts(self.ema_model, data.images, self.state.schedule, config.bins, **options)
        values = {name: value for name, value in report.to_dict().items() if name not in few}
        return {"conflicts": json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))}

    def _labels(self, count: int) -> Tensor | None:
        """Classes in turn for `count` samples, if the model has classes."""
        return torch.arange(count) % self.ema_model.config["num_class_embeds"] if self.config.conditional else None

    def save(self, status: str) -> None:
        """Checkpoint, the steps not yet logged included, then summary."""
        tensors, rest = self.state.state_dict()
        for name, column in zip(StepRecord._fields, zip(*self.pending, strict=True), strict=False):
            tensors[f"pending.{name}"] = torch.stack([torch.as_tensor(value) for value in column])
        save_checkpoint(self.out / "checkpoint", self.state.step, tensors, rest | {"seconds": self.seconds})
        self.summarise(status)

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, if there is one."""
        if (self.out / "checkpoint" / "latest.json").exists():
            step, tensors, rest = load_checkpoint(self.out / "checkpoint")
            self.seconds = rest.pop("seconds")
            columns = [tensors.pop(f"pending.{name}", torch.empty(0)) for name in StepRecord._fields]
            on_device = [column.to(self.images.device) for column in columns[1:]]
            self.pending = [StepRecord(int(i), *row) for i, *row in zip(columns[0], *on_device, strict=True)]
            self.state.load_state_dict(step, tensors, rest)
        if (self.out / "summary.json").exists():
            started = read_json(self.out / "summary.json")["provenance"]
            self.provenance |= {} if started == self.provenance else {"resumed_from": started}

    def summarise(self, status: str, **more: Any) -> None:
        """Write summary.json."""
        images = self.state.step * self.config.batch_size
        base = {"status": status, "step": self.state.step, "images": images, "seconds": round(self.seconds, 3)}
        base |= {"validation_images": len(self.images)}
        write_json(self.out / "summary.json", base | more | {"provenance": self.provenance})

    def finish(self) -> None:
        """Write the diffusers pipeline with the EMA weights, a grid of samples, and the summary."""
        from diffusers import DDPMPipeline

        kind, model, schedule = self.config.prediction, self.ema_model, self.state.schedule
        loss = float(self.validate()["validation_losses"].mean())
        # Sampling must start at the last timestep, where a zero-terminal-SNR model learned what pure noise is.
        scheduler = schedule.to_diffusers(prediction_type=kind, timestep_spacing="trailing")
        DDPMPipeline(model, scheduler).save_pretrained(self.out / "pipeline")
        options: dict[str, Any] = {"prediction_type": kind, "labels": self._labels(64)}
        samples = sample_images(model, schedule, (64, *self.images.shape[1:]), **options)
        save_grid(samples, self.out / "samples.png", scale=2 if samples.shape[-1] <= 32 else 1)
        self.summarise("done", validation_loss=loss)


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuse a run folder that is in use, is no run to resume, or is a run of another configuration."""
    if not resume:
        if out.is_dir() and any(out.iterdir()):
            raise RunError(f"{out} is not empty; choose another --out, or continue that run with --resume")
        return
    if not (out / "config.json").exists():
        raise RunError(f"{out} holds no run to resume; leave out --resume to start one there")
    saved, given = read_json(out / "config.json"), json.loads(json.dumps(config.to_dict()))
    differing = [key for key in given if saved.get(key) != given[key] and key not in ("device", "data_root")]
    if differing:
        pairs = ", ".join(f"{key} {saved.get(key)!r} there, {given[key]!r} here" for key in differing)
        raise RunError(
            f"{out} is a run of another configuration ({pairs}); resume it as it was, or choose another --out"
        )


def _claim_folder(config: TrainConfig, out: Path) -> None:
    try:
        write_json(out / "config.json", config.to_dict())
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error.strerror}); choose another --out") from None


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, progress: bool = True, finish: bool = True
) -> Run:
    """Train to the end of the configuration and write a run folder; returns it as load_run does.

    finish=False leaves out what comes after the last step: pipeline, samples and the final checkpoint.

    With resume=True an interrupted run goes on from its last checkpoint and ends with the same weights as one that was
    never interrupted (bit for bit on one CPU device). SIGINT and SIGTERM save and raise KeyboardInterrupt. Raises
    RunError for a folder that cannot be used, TrainingDiverged when a loss or gradient is not finite.
    """
    out = Path(out)
    _check_folder(config, out, resume)
    device = resolve_device(config.device)
    data, test = load_split(config, "train", device), load_split(config, "test", device)
    if config.conditional and (test.num_classes or 0) > (data.num_classes or 0):
        raise ValueError(
            f"{data.name}: test labels reach {test.num_classes} classes and the training images chosen have only "
            f"{data.num_classes}; use more train_images"
        )
    state = build(config, data)
    recorder = _Recorder(config, state, test, out)
    # Claimed only now, so that a misspelled name or missing data leaves no half-made run behind.
    _claim_folder(config, out)
    if resume:
        recorder.restore()
    rows = read_metrics(out / "metrics.jsonl", until_step=state.step) if state.step else []
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    recorder.summarise("running")
    with _stop_signals() as stopped:
        _run(state, data, config, recorder, stopped, progress)
        if finish:
            recorder.finish()
        else:
            recorder.summarise("done")
    return load_run(out)


def _run(
    state: TrainState,
    data: ImageData,
    config: TrainConfig,
    recorder: _Recorder,
    stopped: Callable[[], bool],
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    # On a CPU a check costs nothing; on a GPU it would stall the queue, so it waits for the log line.
    check_every = 1 if data.images.device.type == "cpu" else config.log_every
    seen = state.step * config.batch_size
    bar = tqdm(total=config.images, initial=seen, unit="img", unit_scale=True, disable=not progress)
    bar.set_description(config.weighting, refresh=False)
    if state.step == 0:
        recorder.log(
            recorder.validate() | recorder.distance() | (recorder.conflicts(data) if config.conflicts_from else {})
        )
    with bar:
        for record in iterate(state, data, config):
            recorder.pending.append(record)
            bar.update(config.batch_size)
            done = state.step == config.num_steps
            save = done or state.step % config.interval("checkpoint_every") == 0
            if config.validate_from is None:
                validate = done or state.step % config.interval("validate_every") == 0
            else:
                validate = done or config.is_due("validate_from", state.step, 2**0.5)
            report = config.conflicts_from is not None and (done or config.is_due("conflicts_from", state.step, 2.0))
            log = save or validate or report or state.step % config.log_every == 0
            if stopped() or log or state.step % check_every == 0:
                failed = _first_failure(recorder.pending[-check_every:])
                if failed is not None:
                    recorder.summarise("failed")
                    raise _explain_failure(failed, state, config, recorder.out)
            if log:
                bar.set_postfix(loss=f"{float(record.losses.mean()):.4f}", refresh=False)
                extra = recorder.validate() | recorder.distance() if validate else {}
                recorder.log(extra | (recorder.conflicts(data) if report else {}))
            if save:
                recorder.save("running")
            if stopped() and not done:
                recorder.save("interrupted")
                raise KeyboardInterrupt(
                    f"stopped at {state.step * config.batch_size:,} of {config.images:,} images, all saved; "
                    f"go on with: dysigma train --resume --out {recorder.out}"
                )
