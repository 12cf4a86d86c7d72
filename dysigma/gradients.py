"""Gradients of the losses of timestep bins: which bins conflict, by how much, and how much of it is minibatch noise."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from . import pareto
from .bins import Bins
from .data import ImageData
from .draws import generator
from .objective import sample_losses
from .schedule import NoiseSchedule, canonical_prediction_type
from .weightings import Weighting

SKETCH_COLUMNS = 65_536  # cosines between sketches are within about 0.01 of those between gradients


@dataclass(frozen=True)
class ConflictReport:
    """What ``conflicts`` measured on K bins; float64 CPU tensors, NaN where the data leave a value undetermined.

    Debiased means from a Gramian unbiased in every entry, diagonal included; standard errors (`_se`) are jackknife over
    the M micro-batches, intervals 95 % (Student t, M - 1 degrees of freedom).
    """

    edges: list[int]  # K + 1 timesteps, as in Bins
    log_snr: Tensor  # (K,) mean over the bin's finite values
    losses: Tensor  # (K,) times the weighting, if one was given
    gramian: Tensor  # (K, K) debiased
    gramian_se: Tensor  # (K, K)
    cosine: Tensor  # (K, K) naive: of the averaged gradients, shrunk by sqrt(gnr / (1 + gnr)) on each side
    cosine_debiased: Tensor  # (K, K) never clipped; NaN if a bin's gradient does not stand out of its noise
    cosine_se: Tensor  # (K, K)
    magnitude_similarity: Tensor  # (K, K) 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (Yu et al. 2020), debiased
    gnr: Tensor  # (K,) |g|^2 over the variance of its estimate from all samples of the report
    noise_scale: Tensor  # (K,) batch size at which the noise equals the gradient (McCandlish et al. 2018)
    weights: Tensor  # (K,) of the min-norm point of the debiased Gramian
    stationarity: float  # norm of the min-norm point, cross-fitted; negative: indistinguishable from 0
    stationarity_interval: list[float]
    stationarity_naive: float  # with the noise floor
    mean_cosine: float  # debiased, over the determined pairs of different bins, as are the next four
    mean_cosine_se: float
    conflict_rate: float  # share of pairs with cosine < 0
    sure_conflict_rate: float  # share of pairs with the whole interval < 0
    undetermined: int  # pairs left out
    null_cosine: float  # -1 / (K - 1): the mean where K gradients of equal norm cancel, as they do at a minimiser
    group_names: list[str]
    group_gramian: Tensor  # (groups, K, K) debiased; sums to gramian
    settings: dict[str, Any]  # micro_batches, batch_per_bin, paired, prediction_type, seed, training (the model's mode)
    update_cosine: Tensor | None = None  # (K,) of the optimizer's step and minus the gradient; < 0: the bin gets worse
    update_cosine_se: Tensor | None = None  # (K,)
    cosine_preconditioned: Tensor | None = None  # (K, K) debiased, in the metric of the optimizer

    def interval(self) -> tuple[Tensor, Tensor]:
        """Low and high ends (K, K) of the intervals of cosine_debiased."""
        half = _t_quantile(self.settings["micro_batches"]) * self.cosine_se
        return self.cosine_debiased - half, self.cosine_debiased + half

    def lookahead(self, lr: float) -> Tensor:
        """(K, K): to first order, the relative change of loss j by an SGD step of size lr on bin i."""
        return -lr * self.gramian / self.losses

    def table(self) -> Any:
        """A pandas DataFrame with one row per bin."""
        import pandas

        off = self.cosine_debiased.clone().fill_diagonal_(float("nan"))
        columns: dict[str, Any] = {"first": self.edges[:-1], "last": [edge - 1 for edge in self.edges[1:]]}
        names = ("log_snr", "losses", "gnr", "noise_scale", "weights", "update_cosine")
        columns |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        columns |= {"norm": self.gramian.diagonal().sqrt(), "mean_cosine": off.nanmean(1)}
        columns["conflicts"] = (off < 0).sum(1)
        return pandas.DataFrame({name: np.asarray(column) for name, column in columns.items()})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; NaN becomes None."""
        text = json.dumps(vars(self), default=Tensor.tolist)
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConflictReport:
        """The inverse of to_dict; raises TypeError for fields that are missing or unknown."""
        read = dict(values)
        for name, value in values.items():
            kind = str(cls.__annotations__.get(name))
            if kind == "float" and value is None:
                read[name] = float("nan")
            elif kind.startswith("Tensor") and value is not None:
                read[name] = torch.from_numpy(np.array(value, dtype=np.float64))
        return cls(**read)


class NegativeTransfer(NamedTuple):
    """Row i: a copy of the model fine-tuned on bin i alone. Column j: its loss on bin j, on fixed draws."""

    edges: list[int]
    losses: Tensor  # (K,) before
    change: Tensor  # (K, K) mean loss after minus before; > 0 is negative transfer
    change_se: Tensor  # (K, K) standard error over the evaluation draws


def layer_group(name: str) -> str:
    """The default group of a parameter: the first part of its name, with the index if one follows (down_blocks.0)."""
    return re.sub(r"^(?:_orig_mod\.)?([^.]+(?:\.\d+)?).*", r"\1", name)


def cosine_matrix(gramian: Tensor) -> Tensor:
    """Cosines of Gramians (..., K, K); NaN where a debiased squared norm is not positive."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    return gramian / (norms[..., :, None] * norms[..., None, :])


def bin_timesteps(bins: Bins, per_bin: int, draw: torch.Generator) -> Tensor:
    """per_bin independent uniform timesteps in every bin: (K, per_bin) int64 on the CPU."""
    edges = bins.edges.cpu()
    u = torch.rand(bins.num_bins, per_bin, generator=draw, dtype=torch.float64)
    return edges[:-1, None] + (u * edges.diff()[:, None]).long()


Images = Tensor | ImageData
Kwargs = Mapping[str, Tensor] | None
Part = tuple[Tensor, Tensor, Tensor, Tensor]  # x0, noise, timesteps and image indices of the samples of one bin


def _inputs(images: Images, schedule: NoiseSchedule, bins: int | Bins, model: nn.Module) -> tuple[Tensor, Bins]:
    table = images.images if isinstance(images, ImageData) else images
    cut = bins if isinstance(bins, Bins) else Bins.uniform(schedule.num_timesteps, bins)
    devices, total = {str(t.device) for t in (table, schedule.log_snr, *model.parameters())}, schedule.num_timesteps
    if len(devices) > 1 or cut.edges[-1] != total:
        got = f"devices {sorted(devices)} and edges {cut.edges.tolist()}"
        raise ValueError(f"need all on one device, and bins that end at the schedule's {total} timesteps; got {got}")
    return table, cut


def _draw(images: Tensor, bins: Bins, per_bin: int, seed: int, step: int, paired: bool) -> list[Part]:
    """per_bin samples for each bin, independent or (paired) of the same images and noise; functions of (seed, step)."""
    parts = 1 if paired else bins.num_bins
    index = torch.randint(len(images), (parts, per_bin), generator=generator(seed, step, "images")).to(images.device)
    x0 = images[index].float() / 127.5 - 1 if images.dtype == torch.uint8 else images[index]
    draw = generator(seed, step, "noise", images.device)
    noise = torch.randn(x0.shape, generator=draw, device=x0.device, dtype=x0.dtype)
    timesteps = bin_timesteps(bins, per_bin, generator(seed, step, "timesteps")).to(images.device)
    return [(x0[k % parts], noise[k % parts], t, index[k % parts]) for k, t in enumerate(timesteps)]


def _losses(model: nn.Module, schedule: NoiseSchedule, kind: str, kwargs: Kwargs, part: Part) -> Tensor:
    own = {name: rows[part[3]] for name, rows in (kwargs or {}).items()}
    return sample_losses(model, schedule, *part[:3], kind, **own)


def _unwrapped(model: nn.Module) -> nn.Module:
    # Through the wrapper, a forward would wait for gradient hooks that autograd.grad never calls.
    return model.module if isinstance(model, DistributedDataParallel) else model


def _all_reduce(model: nn.Module, *tensors: Tensor) -> None:
    for tensor in tensors if isinstance(model, DistributedDataParallel) else ():
        distributed.all_reduce(tensor)


def _fork_rng(device: torch.device) -> Any:
    # All CUDA devices, because torch.manual_seed seeds them all.
    return torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else ())


class _Accumulator:
    """Streams the gradients g_m of M micro-batches into (S S' - sum g_m g_m') / (M (M - 1)), S = sum g_m, per group.

    Unbiased in every entry, also where bins share images or noise: no product takes both factors from one micro-batch.
    """

    def __init__(self, model: nn.Module, num_bins: int, groups: Callable[[str], str] = layer_group) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named or any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
            # Such a BatchNorm ties a batch together and changes with every call.
            raise ValueError(
                "need parameters that require a gradient, and no BatchNorm in train mode: use model.eval()"
            )
        self.parameters, self.groups = list(named.values()), [groups(name) for name in named]
        self.group_names, self.sizes = list(dict.fromkeys(self.groups)), [p.numel() for p in self.parameters]
        dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        self.rows = torch.zeros(num_bins, sum(self.sizes), dtype=dtype, device=self.parameters[0].device)
        self.sums, self.own = torch.zeros_like(self.rows), self.products(self.rows)

    def products(self, rows: Tensor) -> Tensor:
        """rows rows' for rows (K, P): (groups, K, K) float64."""
        total = rows.new_zeros(len(self.group_names), len(rows), len(rows), dtype=torch.float64)
        for group, columns in zip(self.groups, rows.split(self.sizes, 1), strict=True):
            block = columns.double()
            total[self.group_names.index(group)] += block @ block.T
        return total

    def add(self, losses: Iterable[Tensor]) -> Tensor:
        """Take in a micro-batch: the loss () of each bin, computed when it is asked for. Returns the losses, (K,).

        A forward and a backward per slice of the batch cost together about what one step on the whole batch does.
        """
        values = []
        with torch.enable_grad():
            for row, loss in zip(self.rows, losses, strict=True):
                gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
                torch.cat([g.flatten() for g in gradients], out=row)
                values.append(loss.detach())
        own = self.products(self.rows)
        squares = own.sum(0).diagonal()
        bad = torch.nonzero(~(squares.isfinite() & (squares > 0))).flatten().tolist()
        if bad:
            raise ValueError(
                f"bins {bad} have losses {[float(values[k]) for k in bad]} and gradients of squared norm "
                f"{squares[bad].tolist()}: NaN has no direction, and an exact 0 would pass for a solved objective"
            )
        self.sums += self.rows
        self.own += own
        return torch.stack(values)

    def debiased(self, count: int) -> Tensor:
        """The unbiased Gramian (groups, K, K) of count micro-batches; of a single one, the plain Gramian."""
        total = self.products(self.sums)
        return total if count == 1 else (total - self.own) / (count * (count - 1))


def bin_gramian(
    model: nn.Module,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    bins: Bins,
    *,
    prediction_type: str = "epsilon",
    splits: int = 2,
    model_kwargs: Kwargs = None,
) -> Tensor:
    """Inner products (K, K) float64 of the gradients of the bins' mean losses, from one batch: for use in training.

    Arguments as in ``sample_losses``, model_kwargs with one row per sample; ``bin_timesteps`` fills all bins. A bin's
    samples are dealt into `splits` parts and products taken between parts only: unbiased, but noisy and perhaps
    indefinite (``pareto.project_psd``); splits=1 gives the plain Gramian, with the noise in its diagonal. Summed over
    the ranks of a DistributedDataParallel model. Leaves parameters, .grad and the random state alone. Raises ValueError
    for a bin with fewer samples than splits, and for a gradient that is NaN or exactly 0.
    """
    index = bins.index(timesteps)
    counts = torch.bincount(index, minlength=bins.num_bins).tolist()
    if not 1 <= splits <= min(counts):
        raise ValueError(
            f"every bin needs splits = {splits} >= 1 samples or more; got {counts}. An empty bin would pass for a "
            "solved objective: draw timesteps with bin_timesteps, or use fewer bins"
        )
    bare, count = _unwrapped(model), torch.tensor(splits, device=x0.device)
    gradients = _Accumulator(bare, bins.num_bins)
    with _fork_rng(x0.device):
        for split in range(splits):
            of = [torch.nonzero(index == k).flatten()[split::splits] for k in range(bins.num_bins)]
            parts = [(x0[i], noise[i], timesteps[i], i) for i in of]
            gradients.add(_losses(bare, schedule, prediction_type, model_kwargs, part).mean() for part in parts)
    _all_reduce(model, gradients.sums, gradients.own, count)
    return gradients.debiased(int(count)).sum(0)


def _t_quantile(micro_batches: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, micro_batches - 1))


def _jackknife_se(left_out: Tensor) -> Tensor:
    return ((left_out - left_out.mean(0)).square().mean(0) * (len(left_out) - 1)).sqrt()


def _leave_one_out(sketches: Tensor) -> Tensor:
    """Debiased Gramians (M, K, K) without each of the micro-batch gradients (M, K, D); their mean is the one of all."""
    count, own, with_all = len(sketches), sketches @ sketches.mT, sketches @ sketches.sum(0).T
    total = with_all.sum(0) - own.sum(0)
    return ((total - with_all - with_all.mT + 2 * own) / ((count - 1) * (count - 2))).cpu()


def _cross_fitted(sketches: Tensor, quantile: float) -> list[float]:
    """Norm of the min-norm point, weights from one half judged on the other and back; low and high end of it."""
    halves = [_leave_one_out(sketches[i::2]) for i in (0, 1)]
    weights = [pareto.min_norm_weights(pareto.project_psd(half.mean(0))) for half in halves]
    squares = [judge @ w @ w for judge, w in zip(halves, weights[::-1], strict=True)]
    square, error = sum(x.mean() for x in squares) / 2, sum(_jackknife_se(x) ** 2 for x in squares) ** 0.5 / 2
    ends = torch.stack([square, square - quantile * error, square + quantile * error])
    return (ends.sign() * ends.abs().sqrt()).tolist()


def _sketch(rows: Tensor, bits: Tensor) -> Tensor:
    """(K, P) to (K, D): folded with random signs, which keeps inner products in expectation; as it is if P <= D."""
    if rows.shape[1] <= SKETCH_COLUMNS:
        return rows
    signs, fold = 2 * bits - 1, (0, -rows.shape[1] % SKETCH_COLUMNS)
    return torch.stack([nn.functional.pad(row * signs, fold).view(-1, SKETCH_COLUMNS).sum(0) for row in rows])


def _last_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Direction of the last step, weight decay apart (P,); root (P,) of its metric, the rate of each coordinate."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    steps, metrics = [], []
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            name, shape = type(optimizer).__name__, tuple(p.shape)
            raise ValueError(f"{name} is not of the Adam family, or has not stepped on the parameter of shape {shape}")
        first, second = (1 - beta ** float(state["step"]) for beta in groups[p]["betas"])
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / second
        metrics.append((groups[p]["lr"] / (square.sqrt() + groups[p]["eps"])).flatten())
        steps.append(metrics[-1] * state["exp_avg"].flatten() / first)
    step = torch.cat(steps).double()
    return step / step.norm(), torch.cat(metrics).sqrt()


def _statistics(
    gradients: _Accumulator, sketches: Tensor, batch_per_bin: int, along: Tensor, in_metric: Tensor
) -> dict[str, Any]:
    """The fields of the report that follow from gradients, the last three only if `along`, (M, K), is not empty."""
    count, quantile, left_out = len(sketches), _t_quantile(len(sketches)), _leave_one_out(sketches)
    group_gramian, gramian_se = gradients.debiased(count).cpu(), _jackknife_se(left_out)
    naive = gradients.products(gradients.sums).sum(0).cpu() / count**2
    gramian = group_gramian.sum(0)
    squares, left_squares = gramian.diagonal(), left_out.diagonal(dim1=1, dim2=2)
    known = (squares > quantile * gramian_se.diagonal()) & (left_squares > 0).all(0)

    def shown(values: Tensor) -> Tensor:
        return values.masked_fill(~(known if values.ndim == 1 else known & known[:, None]), float("nan"))

    cosine, cosines = shown(cosine_matrix(gramian)), cosine_matrix(left_out)
    cosine_se, pairs = shown(_jackknife_se(cosines)), (known & known[:, None]).triu(1)
    variance = gradients.own.sum(0).diagonal().cpu() / count - squares  # of the gradient of one micro-batch
    stationarity, *interval = _cross_fitted(sketches, quantile)
    values = {
        "gramian": gramian,
        "gramian_se": gramian_se,
        "cosine": cosine_matrix(naive),
        "cosine_debiased": cosine,
        "cosine_se": cosine_se,
        "magnitude_similarity": shown(2 * (squares * squares[:, None]).sqrt() / (squares + squares[:, None])),
        "gnr": squares / variance * count,
        "noise_scale": shown(variance * batch_per_bin / squares),
        "weights": pareto.min_norm_weights(pareto.project_psd(gramian)),
        "stationarity": stationarity,
        "stationarity_interval": interval,
        "stationarity_naive": pareto.stationarity(naive),
        "mean_cosine": float(cosine[pairs].mean()),
        "mean_cosine_se": float(_jackknife_se(cosines[:, pairs].mean(1))),
        "conflict_rate": float((cosine[pairs] < 0).double().mean()),
        "sure_conflict_rate": float((cosine + quantile * cosine_se < 0)[pairs].double().mean()),
        "undetermined": len(squares) * (len(squares) - 1) // 2 - int(pairs.sum()),
        "null_cosine": -1 / max(1, len(squares) - 1),
        "group_names": gradients.group_names,
        "group_gramian": group_gramian,
    }
    if along.numel():
        others = (along.sum(0) - along) / (count - 1)
        values["update_cosine"] = shown(along.mean(0) / squares.sqrt())
        values["update_cosine_se"] = shown(_jackknife_se(others / left_squares.sqrt()))
        values["cosine_preconditioned"] = shown(cosine_matrix(_leave_one_out(in_metric).mean(0)))
    return values


def conflicts(
    model: nn.Module,
    images: Images,
    schedule: NoiseSchedule,
    bins: int | Bins = 10,
    *,
    prediction_type: str = "epsilon",
    micro_batches: int = 16,
    batch_per_bin: int = 4,
    weighting: Weighting | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    groups: Callable[[str], str] = layer_group,
    paired: bool = False,
    model_kwargs: Kwargs = None,
    seed: int = 0,
    progress: bool = True,
) -> ConflictReport:
    """Which timestep bins conflict, from micro_batches * batch_per_bin samples of each bin.

    model: any module called as model(x_t, timesteps, **kwargs), measured in the mode and the autocast it is in. images:
    (N, C, H, W) uint8, or float in [-1, 1]. bins: Bins, or how many of equal width in t. weighting: its weights()
    multiply the losses. optimizer: the Adam that trains the model, for the cosines with its last step and in its
    metric. groups: from a parameter's name to its group. paired: bins share images and noise, which spoils the naive
    cosine alone. model_kwargs: tensors with one row per image.

    Costs about micro_batches training steps on bins * batch_per_bin images, and memory for 2 K gradients. Leaves
    parameters, .grad, mode and the random state alone. Ranks of a DistributedDataParallel model share the
    micro-batches; each must hold all images. Raises ValueError for gradients that are NaN or exactly 0, BatchNorm in
    train mode, an output unlike the input, fewer than 6 micro_batches, tensors on two devices.
    """
    from tqdm import tqdm

    if micro_batches < 6 or batch_per_bin < 1:
        raise ValueError(f"need micro_batches >= 6 and batch_per_bin >= 1; got {micro_batches} and {batch_per_bin}")
    kind, (table, cut) = canonical_prediction_type(prediction_type), _inputs(images, schedule, bins, model)
    bare = _unwrapped(model)
    gradients = _Accumulator(bare, cut.num_bins, groups)
    rows, size = gradients.rows, (micro_batches, cut.num_bins)
    scale = torch.ones_like(schedule.alpha) if weighting is None else weighting.weights()
    update = None if optimizer is None else _last_step(optimizer, gradients.parameters)
    bits = torch.randint(2, rows.shape[1:], generator=generator(seed, 0, "signs"), dtype=torch.int8).to(rows.device)
    losses = rows.new_zeros(size, dtype=torch.float64)
    sketches = losses.new_zeros(*size, min(SKETCH_COLUMNS, rows.shape[1]))
    along, in_metric = (torch.zeros_like(x) if update else x.new_zeros(0) for x in (losses, sketches))
    first, stride = (0, 1) if bare is model else (distributed.get_rank(), distributed.get_world_size())
    with _fork_rng(table.device):
        for m in tqdm(range(first, micro_batches, stride), desc="conflicts", unit="micro-batch", disable=not progress):
            torch.manual_seed(generator(seed, m, "dropout").initial_seed())
            parts = _draw(table, cut, batch_per_bin, seed, m, paired)
            each = (scale[part[2]] * _losses(bare, schedule, kind, model_kwargs, part) for part in parts)
            losses[m] = gradients.add(weighted.mean() for weighted in each)
            sketches[m] = _sketch(rows, bits)
            if update:
                along[m] = torch.stack([row.double() @ update[0] for row in rows])
                in_metric[m] = _sketch(rows * update[1], bits)
    _all_reduce(model, gradients.sums, gradients.own, losses, along, sketches, in_metric)
    log_snr = [v[v.isfinite()].mean() for v in schedule.log_snr.cpu().split(cut.counts.tolist())]
    settings = {"micro_batches": micro_batches, "batch_per_bin": batch_per_bin, "paired": paired, "seed": seed}
    return ConflictReport(
        edges=cut.edges.tolist(),
        log_snr=torch.stack(log_snr),
        losses=losses.mean(0).cpu(),
        settings=settings | {"prediction_type": kind, "training": model.training},
        **_statistics(gradients, sketches, batch_per_bin, along.cpu(), in_metric),
    )


def negative_transfer(
    model: nn.Module,
    images: Images,
    schedule: NoiseSchedule,
    bins: int | Bins = 10,
    *,
    prediction_type: str = "epsilon",
    steps: int = 50,
    batch_size: int = 16,
    samples_per_bin: int = 64,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    model_kwargs: Kwargs = None,
    seed: int = 0,
    progress: bool = True,
) -> NegativeTransfer:
    """What fine-tuning on one bin alone does to every other: K copies of the model, `steps` steps each.

    optimizer: makes the optimizer of a copy from its parameters; None is Adam, lr 1e-4. The copies train on the same
    images and noise. Evaluation is in eval() mode on samples_per_bin draws per bin fixed beforehand, so differences are
    paired; their standard errors are of the evaluation alone. The rest is as in ``conflicts``.
    """
    from tqdm import tqdm

    table, cut = _inputs(images, schedule, bins, model)
    losses = functools.partial(_losses, schedule=schedule, kind=prediction_type, kwargs=model_kwargs)
    held = _draw(table, cut, samples_per_bin, seed, 0, False)

    @torch.no_grad()
    def evaluate(network: nn.Module) -> Tensor:
        return torch.stack([losses(network.eval(), part=part) for part in held]).double().cpu()

    before, changes = evaluate(copy.deepcopy(_unwrapped(model))), []
    for k in tqdm(range(cut.num_bins), desc="negative transfer", unit="bin", disable=not progress):
        tuned = copy.deepcopy(_unwrapped(model))
        stepper = (optimizer or functools.partial(torch.optim.Adam, lr=1e-4))(tuned.parameters())
        with _fork_rng(table.device), torch.enable_grad():
            torch.manual_seed(seed)
            for step in range(1, steps + 1):
                stepper.zero_grad()
                losses(tuned, part=_draw(table, cut, batch_size, seed, step, True)[k]).mean().backward()
                stepper.step()
        changes.append(evaluate(tuned) - before)
    change = torch.stack(changes)
    return NegativeTransfer(cut.edges.tolist(), before.mean(1), change.mean(2), change.std(2) / samples_per_bin**0.5)
