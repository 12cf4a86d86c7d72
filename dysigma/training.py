"""Training: one configuration, one step, one loop that yields whole steps, and a run folder that can be resumed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from . import runs
from .bins import Bins, over_ranks
from .data import ImageData, batch, load_data
from .distances import extract, frechet_distance, load_features, moments, reference_features
from .draws import check_name, generator, to_device
from .evaluation import evaluation_timesteps, sample_images, save_grid, validation_losses
from .exact import gaussian_fields
from .gradients import bin_gramian, bin_timesteps, conflicts
from .models import EMA, PRESETS, channels_last, make_model
from .objective import sample_losses
from .runs import Run, RunError
from .samplers import TIMESTEP_SAMPLERS, TimestepSampler, make_sampler
from .schedule import SCHEDULES, NoiseSchedule, canonical_prediction_type, make_schedule
from .weightings import WEIGHTINGS, Weighting, make_weighting


def _option(default: Any, text: str) -> Any:
    """A field of TrainConfig, with the words that explain it on the command line."""
    value: dict[str, Any] = {"default_factory": dict} if default is dict else {"default": default}
    return field(**value, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; JSON in the run folder. Amounts of training are counted in images.

    Raises KeyError for an unknown name and ValueError for a number out of range, when constructed.
    """

    data: str = _option("leaves", "leaves, gaussian-fields (both made in memory), cifar10, an .npz file, or a folder")
    data_root: str | None = _option(None, "where CIFAR-10 lies or goes (default: $DYSIGMA_DATA, then the user's cache)")
    image_size: int | None = _option(
        None, "resize the central squares of images to this (default: as they are; leaves 16)"
    )
    train_images: int | None = _option(None, "use only the first so many training images")
    conditional: bool = _option(False, "condition the network on the class labels")
    model: str = _option("tiny", "network: micro, tiny (for CPUs), small, compact (for CIFAR-10 on a GPU), ddpm")
    schedule: str = _option("linear", "noise schedule: linear, scaled-linear, cosine, sigmoid")
    num_timesteps: int = _option(1000, "number of timesteps T")
    zero_terminal_snr: bool = _option(False, "rescale the schedule to end in pure noise (not with epsilon)")
    prediction: str = _option("epsilon", "what the network predicts: epsilon, sample (x0) or v_prediction (v)")
    weighting: str = _option("const-eps", f"{', '.join(WEIGHTINGS)}, or module:function of your own")
    weighting_params: dict[str, Any] = _option(dict, "of the weighting, as name=value (kappa=0.5)")  # noqa: RUF009
    normalize: bool = _option(True, "scale weights to mean 1 over timesteps (the default)")
    timestep_sampler: str = _option("uniform", "distribution of timesteps: " + ", ".join(TIMESTEP_SAMPLERS))
    sampler_params: dict[str, Any] = _option(dict, "of the timestep sampler, as name=value")  # noqa: RUF009
    images: int = _option(32_000, "how many images to train on, repeats included")
    batch_size: int = _option(32, "images per step")
    accumulate: int = _option(1, "parts of a batch, to save memory; a weighting's statistics move between them")
    seed: int = _option(0, "of initial weights, images, timesteps and noise")
    lr: float = _option(1e-3, "learning rate of the network (AdamW)")
    weighting_lr: float | None = _option(None, "of a learnable weighting (default: what it suggests)")
    weight_decay: float = _option(0.0, "AdamW weight decay of the network")
    warmup_images: int = _option(3_200, "linear warm-up of the learning rate over so many images")
    grad_clip: float = _option(1.0, "largest norm of the gradient")
    ema_half_life: float = _option(500_000.0, "of the averaged weights, in images (at most 5 %% of the images seen)")
    flip: bool = _option(True, "mirror images at random (the default)")
    bins: int = _option(10, "timestep bins of the logged losses")
    log_every: int = _option(50, "steps per line of metrics.jsonl")
    checkpoint_every: int | None = _option(None, "images per checkpoint (default: a tenth of the run)")
    validate_every: int | None = _option(None, "images per validation (default: a tenth of the run)")
    validate_from: int | None = _option(None, "instead: images before the first, then at every factor sqrt 2")
    validation_images: int = _option(64, "test images per validation")
    validation_timesteps: int = _option(50, "timesteps per validation")
    distance_images: int = _option(0, "samples at each validation for their Fréchet distance to the training images")
    distance_steps: int = _option(25, "DDIM steps of those samples")
    features: str = _option("pixels", "of that distance: pixels, fid, or a TorchScript file (uint8 images to (N, D))")
    conflicts_from: int | None = _option(None, "images before the first report of conflicts, then at every doubling")
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
                raise ValueError(f"{name} must not exceed num_timesteps {self.num_timesteps}; got {value}")

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
                raise ValueError(f"{name} must be {'positive' if low else '0 or more'} and below {high}; got {value!r}")

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
        return make_schedule(self.schedule, self.num_timesteps, zero_terminal_snr=self.zero_terminal_snr)

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


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the message names step, timestep bin and weighting."""


@contextmanager
def _undefined_is_divergence(config: TrainConfig, step: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise TrainingDiverged(f"at step {step}, weighting {config.weighting!r}: {error}. Try a lower lr") from None


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
    forward: Any  # the model, or its compiled form, which has the same parameters
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
        for prefix, module in (("model", self.model), ("weighting", self.weighting), ("sampler", self.sampler)):
            own = {key.removeprefix(f"{prefix}."): v for key, v in tensors.items() if key.startswith(f"{prefix}.")}
            module.load_state_dict(own)
        for name, value in self.ema.state.items():
            value.copy_(tensors[f"ema.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
        for parameter, values in self.optimizer.state.items():  # fused kernels want one memory format
            for name in ("exp_avg", "exp_avg_sq"):
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(values[name])
        self.step = step


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; "auto" takes CUDA, then MPS, then the CPU. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); use auto or cpu") from None


def _ranks() -> tuple[int, int]:
    """(rank of this process, number of ranks) in torch.distributed; (0, 1) without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def _process_group(config: TrainConfig) -> Iterator[torch.device]:
    """Join the ranks that torchrun or its environment variables speak of, if any; yields the device of this one."""
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and config.device in ("auto", "cuda") and torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", -1)), torch.cuda.device_count()
        if not 0 <= local < count:
            raise ValueError(f"LOCAL_RANK must name one of the {count} GPUs here, one for each process; got {local}")
        torch.cuda.set_device(local)
    device = resolve_device(config.device)
    if many and (device.type not in ("cpu", "cuda") or ":" in config.device):
        raise ValueError(f"with many ranks device must be auto, cpu or cuda; got {config.device!r}, {device}")
    if not many or distributed.is_initialized():
        yield device
        return
    # Longer than the first rank ever validates, samples or writes while the others wait.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        cause = str(error).split(". ")[0]
        raise RunError(f"lost another rank, whose own words tell why ({cause}); go on with --resume") from None
    finally:
        distributed.destroy_process_group()


def _share(config: TrainConfig, device: torch.device) -> Tensor:
    """The places in the batch that this rank works on, part by part: (accumulate, B / accumulate / ranks)."""
    rank, count = _ranks()
    if config.batch_size % (config.accumulate * count):
        got = f"batch_size {config.batch_size}, accumulate {config.accumulate}, {count} ranks"
        raise ValueError(f"batch_size must be a multiple of accumulate times the number of ranks; got {got}")
    return torch.arange(config.batch_size, device=device).view(config.accumulate, count, -1)[:, rank]


def _average(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """The mean of the loss () over ranks; gradients are replaced by theirs, all in one message."""
    if _ranks()[1] == 1:
        return loss
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    means = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])
    distributed.all_reduce(means)
    means /= _ranks()[1]
    for grad, mean in zip(grads, means[1:].split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
    return means[0]


def _wait() -> None:
    """Until all ranks are here."""
    if _ranks()[1] > 1:
        distributed.barrier()


def _from_first(value: Any, device: torch.device) -> Any:
    """The first rank's value, on every rank."""
    box = [value]
    if _ranks()[1] > 1:
        distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]


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
    schedule, params = config.noise_schedule(), config.weighting_params
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
    fast = device.type == "cuda" if config.compile is None else config.compile
    model = channels_last(model) if fast else model
    return TrainState(
        model=model,
        forward=torch.compile(model, fullgraph=True, dynamic=False) if fast else model,
        ema=EMA(model, config.ema_half_life),
        schedule=schedule.to(device),
        weighting=weighting,
        sampler=sampler.to(device),
        optimizer=torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu")),
    )


def _kwargs(config: TrainConfig, labels: Tensor | None) -> dict[str, Any]:
    return {"class_labels": labels} if config.conditional else {}


@contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """On CUDA: TF32 for what stays in float32, and cuDNN tries its kernels; as before afterwards."""
    before, cuda = torch.get_float32_matmul_precision(), device.type == "cuda"
    with torch.backends.cudnn.flags(enabled=True, benchmark=cuda, allow_tf32=True):
        try:
            torch.set_float32_matmul_precision("high" if cuda else before)
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """The context in which networks run: bfloat16, or what they are in."""
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def _step_gramian(state: TrainState, data: ImageData, config: TrainConfig) -> Tensor:
    """Debiased Gramian of the bin losses at this step, on images and noise of its own: at least 4 samples a bin."""
    bins, step, device = state.weighting.bins, state.step, data.images.device
    per_bin = max(4, config.batch_size // bins.num_bins)
    drawn = bin_timesteps(bins, per_bin, generator(config.seed, step, "gramian timesteps"))
    timesteps = to_device(drawn.flatten(), device)
    # Another seed gives another order of the images than training has at this step.
    x0, labels, _ = batch(data, config.seed + 2**32, step, len(timesteps), flip=config.flip)
    noise = torch.randn(x0.shape, generator=generator(config.seed, step, "gramian noise", device), device=device)
    options: dict[str, Any] = {"prediction_type": config.prediction, "splits": 4}
    options["model_kwargs"] = _kwargs(config, labels)
    with autocast(config, device), _undefined_is_divergence(config, step):
        gramian = bin_gramian(state.model, state.schedule, x0, noise, timesteps, bins, **options)
    if _ranks()[1] > 1:  # each has computed it whole; rounding may differ, the weights that follow must not
        distributed.broadcast(gramian, 0)
    return gramian


def train_step(state: TrainState, data: ImageData, config: TrainConfig) -> StepRecord:
    """One optimizer step on batch_size images; a function of (state, data, config) alone.

    No number crosses to the host. When it returns, the step is whole: weights, EMA, weighting and counter agree. Under
    torch.distributed every rank draws the whole batch, works on its share and returns the record of the whole.
    """
    seed, step, device = config.seed, state.step, data.images.device
    x0, labels, _ = batch(data, seed, step, config.batch_size, flip=config.flip)
    u = torch.rand(config.batch_size, generator=generator(seed, step, "timesteps"))
    timesteps, importance = state.sampler(to_device(u, device))
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
    share = _share(config, device)
    for part in share:
        draws = x0[part], noise[part], timesteps[part]
        part_kwargs = {key: value[part] for key, value in kwargs.items()}
        with autocast(config, device):
            part_losses = sample_losses(state.forward, state.schedule, *draws, config.prediction, **part_kwargs)
        correction = importance[part] if state.sampler.corrected else None
        loss = state.weighting(part_losses, timesteps[part], correction) / config.accumulate
        loss.backward()
        losses.append(over_ranks(part_losses)[0])
        total += loss.detach()
    total, every = _average(total, state.optimizer), torch.cat(losses)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.model, state.step * config.batch_size, config.batch_size)
    share = share.flatten()
    state.sampler.update((weights * every)[share], timesteps[share])
    return StepRecord(step, timesteps, every, total, grad_norm)


def check_compiled(state: TrainState, data: ImageData, config: TrainConfig) -> None:
    """Refuse generated code whose gradient is not that of the network itself; bfloat16 alone makes 1 to 3 %."""
    part, device, found = _share(config, data.images.device)[0], data.images.device, []
    images, labels, _ = batch(data, config.seed, 0, config.batch_size)
    x0, kwargs = images[part], _kwargs(config, labels if labels is None else labels[part])
    noise = torch.randn(x0.shape, generator=generator(config.seed, 0, "compiled", device), device=device)
    timesteps = torch.linspace(0, config.num_timesteps - 1, len(x0), device=device).long()
    for network in (state.model, state.forward):
        with autocast(config, device):
            loss = sample_losses(network, state.schedule, x0, noise, timesteps, config.prediction, **kwargs).mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(state.model.parameters()))]))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    if not error < 0.1:
        raise RunError(
            f"compiled, the network has gradients that are {error:.0%} off what they are without torch.compile "
            f"(torch {torch.__version__}, {device}): train with --no-compile"
        )


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
    report |= {name: [str(v) for v in t.tolist()] for name, t in numbers.items()}  # as text: JSON has no NaN
    if _ranks()[0] == 0:
        runs.write_json(out / "failure.json", report)
    return TrainingDiverged(
        f"{what} is not finite at step {record.step}, first in timestep bin {index} "
        f"({int(bins.edges[index])}..{int(bins.edges[index + 1]) - 1}), weighting {config.weighting!r}; nothing was "
        f"repaired. {out}/failure.json has the draws, {out}/checkpoint (if any) the last whole state. Try a lower lr"
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; one more, a second or more later, interrupts at once.

    A scheduler that stops torchrun and its ranks sends each rank two, and means one.
    """
    received: list[float] = []

    def handle(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] > received[0] + 1:
            raise KeyboardInterrupt

    previous = {}
    with suppress(ValueError):  # not in the main thread: the caller's own handling stays
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Recorder:
    """Turns step records into the run folder: metrics, validation, checkpoints, summary. Only the first rank writes."""

    def __init__(self, config: TrainConfig, data: ImageData, test: ImageData, out: Path) -> None:
        self.config, self.state, self.out = config, build(config, data), out
        self.pending: list[StepRecord] = []
        self.seconds, self.since = 0.0, time.perf_counter()
        # Copies, because slices would keep the whole test split in memory.
        self.images = test.images[: config.validation_images].clone()
        labels = test.labels if config.conditional else None
        self.labels = None if labels is None else labels[: config.validation_images].clone()
        self.timesteps = evaluation_timesteps(config.num_timesteps, config.validation_timesteps)
        self.first, ranks = _ranks()[0] == 0, _ranks()[1]
        self.provenance = runs.provenance() | ({"ranks": ranks} if ranks > 1 else {})
        self.ema_model: Any = copy.deepcopy(self.state.model)
        self.reference: Any = None
        if self.first and config.distance_images:
            features = load_features(config.features, self.images.device)
            self.reference = features, moments(reference_features(features, data.originals))

    def log(self, data: ImageData, *, validate: bool, report: bool) -> None:
        """Write one metrics line for the steps since the last one, with a validation and a report of conflicts."""
        if not self.first:
            return self.pending.clear()
        extra = self.validate() | self.distance() if validate else {}
        extra |= self.conflicts(data) if report else {}
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        images = self.state.step * self.config.batch_size
        row: dict[str, Any] = {"step": self.state.step, "images": images, "seconds": round(self.seconds, 3)}
        if self.pending:
            names = ("loss", "grad_norm", "losses", "timesteps")
            loss, norm, losses, timesteps = (
                torch.cat([getattr(r, n).view(-1) for r in self.pending]).cpu() for n in names
            )
            weights = self.state.weighting.weights().cpu()
            bins = Bins.uniform(self.config.num_timesteps, self.config.bins)
            row |= {"loss": float(loss.mean()), "grad_norm": float(norm.mean()), "mean_loss": float(losses.mean())}
            row |= {"bin_losses": bins.mean(losses, timesteps)[0]}
            row |= {"bin_weights": bins.mean(weights, torch.arange(len(weights)))[0]}
        runs.append_metrics(self.out / "metrics.jsonl", row | extra)
        self.pending.clear()

    def validate(self) -> dict[str, Any]:
        """Losses of the EMA weights at fixed timesteps, images and noise; TrainingDiverged if they are not finite."""
        self.state.ema.copy_to(self.ema_model)
        fixed: dict[str, Any] = {"timesteps": self.timesteps, "labels": self.labels}
        losses = validation_losses(self.ema_model, self.images, self.state.schedule, self.config.prediction, **fixed)
        if not losses.isfinite().all():
            raise TrainingDiverged(
                f"validation losses are not finite after step {self.state.step}, weighting {self.config.weighting!r}: "
                f"the averaged weights are broken; nothing was repaired. Try a lower lr, in another folder"
            )
        return {"validation_timesteps": self.timesteps, "validation_losses": losses}

    def distance(self) -> dict[str, Any]:
        """Distance of samples to the training images."""
        if self.reference is None:
            return {}
        features, reference = self.reference
        samples = self.samples(self.config.distance_images, self.config.distance_steps)
        return {"distance": frechet_distance(moments(extract(features, samples)), reference)}

    def samples(self, count: int, steps: int) -> Tensor:
        """Images of the EMA weights as validated, of classes in turn, from one set of latents."""
        shape, kind = (count, *self.images.shape[1:]), self.config.prediction
        return sample_images(self.ema_model, self.state.schedule, shape, prediction_type=kind, num_steps=steps)

    def conflicts(self, data: ImageData) -> dict[str, Any]:
        """Conflicts of the bins at the EMA weights, rounded, from 16 batches a bin; every call has the same draws."""
        self.state.ema.copy_to(self.ema_model)
        config, aside = self.config, {"edges", "log_snr", "settings", "group_names", "group_gramian", "gramian_se"}
        aside |= {"cosine", "magnitude_similarity", "update_cosine", "update_cosine_se", "cosine_preconditioned"}
        options: dict[str, Any] = {"prediction_type": config.prediction, "batch_per_bin": config.batch_size}
        options |= {"model_kwargs": _kwargs(config, data.labels), "seed": config.seed, "progress": False}
        with autocast(config, data.images.device), _undefined_is_divergence(config, self.state.step):
            report = conflicts(self.ema_model, data.images, self.state.schedule, config.bins, **options)
        values = {name: value for name, value in report.to_dict().items() if name not in aside}
        return {"conflicts": json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))}

    def save(self, status: str) -> None:
        """Checkpoint, the steps not yet logged included, then summary."""
        if not self.first:
            return
        tensors, rest = self.state.state_dict()
        for name, column in zip(StepRecord._fields, zip(*self.pending, strict=True), strict=False):
            tensors[f"pending.{name}"] = torch.stack([torch.as_tensor(value) for value in column])
        rest |= {"seconds": self.seconds, "config": self.config.to_dict()}
        runs.save_checkpoint(self.out / "checkpoint", self.state.step, tensors, rest)
        self.summarise(status)

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, if there is one; the first rank reads it for all."""
        folder = self.out / "checkpoint"
        there = self.first and any(folder.glob("*.json"))
        found = _from_first(runs.load_checkpoint(folder, self.config.to_dict()) if there else None, self.images.device)
        if found:
            step, tensors, rest = found
            columns = [tensors.get(f"pending.{name}", torch.empty(0)) for name in StepRecord._fields]
            on_device = [column.to(self.images.device) for column in columns[1:]]
            try:
                self.pending = [StepRecord(int(i), *row) for i, *row in zip(columns[0], *on_device, strict=True)]
                self.seconds = rest["seconds"]
                self.state.load_state_dict(step, tensors, rest)
            except (RuntimeError, ValueError, KeyError) as error:
                cause = str(error).splitlines()[0]
                raise RunError(f"{folder} does not fit this run ({cause}): delete it to start again") from None
        if self.first and (started := runs.load_run(self.out).summary.get("provenance")):
            self.provenance |= {} if started == self.provenance else {"resumed_from": started}

    def summarise(self, status: str, **more: Any) -> None:
        """Write summary.json."""
        if not self.first:
            return
        base = {"status": status, "step": self.state.step, "seconds": round(self.seconds, 3)}
        base |= {"images": self.state.step * self.config.batch_size, "validation_images": len(self.images)}
        runs.write_json(self.out / "summary.json", base | more | {"provenance": self.provenance})

    def finish(self) -> None:
        """Write the diffusers pipeline with the EMA weights, a grid of samples, and the summary."""
        from diffusers import DDPMPipeline

        loss, kind = float(self.validate()["validation_losses"].mean()), self.config.prediction
        # Sampling must start at the last timestep, where a zero-terminal-SNR model learned what pure noise is.
        scheduler = self.state.schedule.to_diffusers(prediction_type=kind, timestep_spacing="trailing")
        DDPMPipeline(self.ema_model, scheduler).save_pretrained(self.out / "pipeline")
        samples = self.samples(64, 50)
        save_grid(samples, self.out / "samples.png", scale=2 if samples.shape[-1] <= 32 else 1)
        self.summarise("done", validation_loss=loss)


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuse a run folder that is in use, is no run to resume, or is a run of another configuration."""
    if not resume:
        # Hidden files are what a process leaves that was killed while it claimed the folder.
        if out.is_dir() and any(not path.name.startswith((".lock", ".config.json.")) for path in out.iterdir()):
            raise RunError(f"{out} is not empty; choose another --out, or continue that run with --resume")
        return
    if not (out / "config.json").exists():
        raise RunError(f"{out} holds no run to resume; leave out --resume to start one there")
    # A field that the run is older than had its default then.
    if differing := runs.differences(TrainConfig.from_dict(runs.load_run(out).config).to_dict(), config.to_dict()):
        raise RunError(f"{out} is of another configuration ({differing}); resume it as it was, or choose another --out")


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, progress: bool = True, finish: bool = True
) -> Run:
    """Train to the end of the configuration and write a run folder; returns it as load_run does.

    finish=False leaves out what comes after the last step: pipeline and samples.

    With resume=True an interrupted run goes on from its last checkpoint and ends with the same weights as one that was
    never interrupted (bit for bit on one CPU device). SIGINT and SIGTERM save and raise KeyboardInterrupt. Under
    torchrun the ranks share each batch, and their number changes nothing but rounding; the first one reads and writes
    the folder. Raises RunError for a folder that cannot be used or written, when another rank is lost, and for compiled
    code with wrong gradients; TrainingDiverged when a loss or gradient is not finite.
    """
    from safetensors import SafetensorError

    out = Path(out)
    make_parts(config)  # so that a misspelled name is told before any data are read
    with _process_group(config) as device, fast_kernels(device):
        _share(config, device)
        first = _ranks()[0] == 0
        if first:
            _check_folder(config, out, resume)
        else:
            _wait()  # the first rank may have to download the data
        data, test = load_split(config, "train", device), load_split(config, "test", device)
        if first:
            _wait()
        if config.conditional and (test.num_classes or 0) > (data.num_classes or 0):
            raise ValueError(
                f"{data.name}: test labels reach {test.num_classes} classes and the training images chosen have only "
                f"{data.num_classes}; use more train_images"
            )
        recorder = _Recorder(config, data, test, out)
        try:
            if recorder.state.forward is not recorder.state.model:
                check_compiled(recorder.state, data, config)
            # Claimed only now, so that a misspelled name or missing data leaves no half-made run behind.
            with runs.lock(out) if first else nullcontext():
                _train(data, recorder, resume, progress, finish)
        except torch.OutOfMemoryError:
            raise RunError(
                f"batches of {config.batch_size} images in {config.accumulate} parts do not fit in the memory of "
                f"{device}: --accumulate {2 * config.accumulate} takes the same steps with less, in another --out; or "
                "use a smaller --batch-size or --model"
            ) from None
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write to {out} ({getattr(error, 'strerror', None) or error}); what was saved before is whole: "
                "make room and go on with --resume, or choose another --out"
            ) from None
        return _from_first(runs.load_run(out) if first else None, device)


def _train(data: ImageData, recorder: _Recorder, resume: bool, progress: bool, finish: bool) -> None:
    config, out, state = recorder.config, recorder.out, recorder.state
    if resume:
        recorder.restore()
    if recorder.first:
        _check_folder(config, out, resume)  # again, now that nobody else can write to it
        runs.write_json(out / "config.json", config.to_dict())
        rows = runs.read_metrics(out / "metrics.jsonl", until_step=state.step) if state.step else []
        runs.write_atomically(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    recorder.summarise("running")
    with _stop_signals() as stopped:
        try:
            _run(data, recorder, stopped, progress)
        except TrainingDiverged:
            recorder.summarise("failed")
            raise
        if recorder.first and finish:
            recorder.finish()
        else:
            recorder.summarise("done")


def _run(data: ImageData, recorder: _Recorder, stopped: Callable[[], bool], progress: bool) -> None:
    from tqdm.auto import tqdm

    config, state = recorder.config, recorder.state
    # On a CPU a check costs nothing; on a GPU it would stall the queue, so it waits for the log line.
    check_every = 1 if data.images.device.type == "cpu" else config.log_every
    seen = state.step * config.batch_size
    shown = progress and recorder.first
    bar = tqdm(desc=config.weighting, total=config.images, initial=seen, unit="img", unit_scale=True, disable=not shown)
    if state.step == 0:
        recorder.log(data, validate=True, report=config.conflicts_from is not None)
    with bar:
        for record in iterate(state, data, config):
            recorder.pending.append(record)
            bar.update(config.batch_size)
            done = state.step == config.num_steps
            save = done or state.step % config.interval("checkpoint_every") == 0
            every, start = config.interval("validate_every"), config.validate_from
            validate = done or (config.is_due("validate_from", state.step, 2**0.5) if start else not state.step % every)
            report = config.conflicts_from is not None and (done or config.is_due("conflicts_from", state.step, 2.0))
            log = save or validate or report or state.step % config.log_every == 0
            check = log or state.step % check_every == 0
            stop = stopped()
            if _ranks()[1] > 1:  # all must stop after the same step
                stop = check and bool(over_ranks(torch.tensor([float(stop)], device=record.loss.device))[0].any())
            if stop or check:
                failed = _first_failure(recorder.pending[-check_every:])
                if failed is not None:
                    raise _explain_failure(failed, state, config, recorder.out)
            if log:
                bar.set_postfix(loss=f"{float(record.losses.mean()):.4f}", refresh=False)
                recorder.log(data, validate=validate, report=report)
            if save:
                recorder.save("running")
            if stop and not done:
                recorder.save("interrupted")
                _wait()  # a rank that left now would have the one that writes stopped
                raise KeyboardInterrupt(
                    f"stopped at {state.step * config.batch_size:,} of {config.images:,} images, all saved; "
                    f"go on with: dysigma train --resume --out {recorder.out}"
                )
