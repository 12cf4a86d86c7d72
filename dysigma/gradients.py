"""Gradients of the losses of timestep bins: which bins conflict, by how much, and how much of it is minibatch noise."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
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
    update_cosine: Tensor | None  # (K,) of the optimizer's last step and minus the gradient; < 0: the bin gets worse
    update_cosine_se: Tensor | None  # (K,)
    cosine_preconditioned: Tensor | None  # (K, K) debiased, in the metric of the optimizer
    settings: dict[str, Any]  # micro_batches, batch_per_bin, paired, prediction_type, seed, training (the model's mode)

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
        columns |= {name: getattr(self, name) for name in ("log_snr", "losses", "gnr", "noise_scale", "weights")}
        columns |= {"norm": self.gramian.diagonal().sqrt(), "mean_cosine": off.nanmean(1)}
        columns |= {"conflicts": (off < 0).sum(1)}
        columns |= {} if self.update_cosine is None else {"update_cosine": self.update_cosine}
        return pandas.DataFrame({name: np.asarray(column) for name, column in columns.items()})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; NaN becomes None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: np.asarray(value) for name, value in values.items() if isinstance(value, Tensor | float)}
        none: Any = None
        return values | {name: np.where(np.isnan(array), none, array).tolist() for name, array in arrays.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConflictReport:
        """The inverse of to_dict; raises TypeError for fields that are missing or unknown."""
        read = dict(values)
        for f in fields(cls):
            if f.type == "float" and f.name in read:
                read[f.name] = float(np.array(read[f.name], dtype=np.float64))
            elif str(f.type).startswith("Tensor") and read.get(f.name) is not None:
                read[f.name] = torch.from_numpy(np.array(read[f.name], dtype=np.float64))
        return cls(**read)


class NegativeTransfer(NamedTuple):
    """Row i: a copy of the model fine-tuned on bin i alone. Column j: its loss on bin j, on fixed draws."""

    edges: list[int]
    losses: Tensor  # (K,) before
    change: Tensor  # (K, K) mean loss after minus before; > 0 is negative transfer
    change_se: Tensor  # (K, K) standard error over the evaluation draws


def layer_group(name: str) -> str:
    """The default group of a parameter: the first part of its name, with the index if one follows (down_blocks.0)."""
    found = re.match(r"(?:_orig_mod\.)?([^.]+(?:\.\d+)?)", name)
    return found.group(1) if found else name


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


def _inputs(model: nn.Module, images: Images, schedule: NoiseSchedule, bins: int | Bins) -> tuple[Tensor, Bins]:
    table = images.images if isinstance(images, ImageData) else images
    cut = bins if isinstance(bins, Bins) else Bins.uniform(schedule.num_timesteps, bins)
    devices = sorted({str(t.device) for t in (table, schedule.log_snr, *model.parameters())})
    if len(devices) > 1 or int(cut.edges[-1]) != schedule.num_timesteps:
        raise ValueError(
            "model, images and schedule must be on one device, and bins must end at the schedule's "
            f"{schedule.num_timesteps} timesteps; got devices {devices} and edges {cut.edges.tolist()}"
        )
    return table, cut


class _Accumulator:
    """Streams the gradients g_m of M micro-batches into (S S' - sum g_m g_m') / (M (M - 1)), S = sum g_m, per group.

    Unbiased in every entry, also where bins share images or noise: no product takes both factors from one micro-batch.
    """

    def __init__(self, model: nn.Module, num_bins: int, groups: Callable[[str], str]) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named or any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
            raise ValueError(
                "the model needs parameters that require a gradient, and no BatchNorm in train mode: that ties a batch "
                "together and changes with every call; use model.eval()"
            )
        self.parameters = [p for _, p in named]
        self.group_names = list(dict.fromkeys(groups(name) for name, _ in named))
        ends = list(itertools.accumulate(p.numel() for p in self.parameters))
        starts = [0, *ends[:-1]]
        self.spans = [
            (self.group_names.index(groups(n)), *span) for (n, _), *span in zip(named, starts, ends, strict=True)
        ]
        dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        self.rows = torch.zeros(num_bins, ends[-1], dtype=dtype, device=self.parameters[0].device)
        self.sums, self.own = torch.zeros_like(self.rows), self.products(self.rows)

    def products(self, rows: Tensor) -> Tensor:
        """rows rows' for rows (K, P): (groups, K, K) float64."""
        total = rows.new_zeros(len(self.group_names), len(rows), len(rows), dtype=torch.float64)
        for group, start, stop in self.spans:
            block = rows[:, start:stop].double()
            total[group] += block @ block.T
        return total

    def add(self, bin_loss: Callable[[int], Tensor]) -> Tensor:
        """Take in one micro-batch; bin_loss(k) computes the loss () of bin k. Returns the losses, (K,).

        A forward and a backward per slice of the batch cost together about what one step on the whole batch does.
        """
        losses = []
        for k, row in enumerate(self.rows):
            with torch.enable_grad():
                loss = bin_loss(k)
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            losses.append(loss.detach())
            pairs = zip(gradients, self.parameters, strict=True)
            torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs], out=row)
        own = self.products(self.rows)
        squares = own.sum(0).diagonal()
        bad = torch.nonzero(~(squares.isfinite() & (squares > 0))).flatten().tolist()
        if bad:
            raise ValueError(
                f"bins {bad} have losses {[float(losses[k]) for k in bad]} and gradients of squared norm "
                f"{squares[bad].tolist()}: NaN has no direction, and an exact 0 would pass for a solved objective"
            )
        self.sums += self.rows
        self.own += own
        return torch.stack(losses)

    def debiased(self, count: int) -> Tensor:
        """The unbiased Gramian (groups, K, K) of count micro-batches; of a single one, the plain Gramian."""
        total = self.products(self.sums)
        return total if count == 1 else (total - self.own) / (count * (count - 1))


def _unwrapped(model: nn.Module) -> nn.Module:
    # Through the wrapper, a forward would wait for gradient hooks that autograd.grad never calls.
    return model.module if isinstance(model, DistributedDataParallel) else model


def _all_reduce(model: nn.Module, *tensors: Tensor) -> None:
    for tensor in tensors if isinstance(model, DistributedDataParallel) else ():
        torch.distributed.all_reduce(tensor)


def _fork_rng(device: torch.device) -> Any:
    # All CUDA devices, because torch.manual_seed seeds them all.
    return torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else ())


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
    the ranks of a DistributedDataParallel model. Parameters, .grad and the random state stay as they are. Raises
    ValueError for a bin with fewer samples than splits, and for a gradient that is NaN or exactly 0.
    """
    index = bins.index(timesteps)
    counts = torch.bincount(index, minlength=bins.num_bins)
    if splits < 1 or int(counts.min()) < splits:
        raise ValueError(
            f"every bin needs splits = {splits} samples or more; got {counts.tolist()}. An empty bin would pass for a "
            "solved objective: draw timesteps with bin_timesteps, or use fewer bins"
        )
    bare, count = _unwrapped(model), torch.tensor(splits, device=x0.device)
    gradients = _Accumulator(bare, bins.num_bins, layer_group)

    def bin_loss(split: int, k: int) -> Tensor:
        of = torch.nonzero(index == k).flatten()[split::splits]
        return _losses(bare, schedule, prediction_type, model_kwargs, (x0[of], noise[of], timesteps[of], of)).mean()

    with _fork_rng(x0.device):
        for split in range(splits):
            gradients.add(functools.partial(bin_loss, split))
    _all_reduce(model, gradients.sums, gradients.own, count)
    return gradients.debiased(int(count)).sum(0)


def _t_quantile(micro_batches: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, micro_batches - 1))


def _jackknife_se(left_out: Tensor) -> Tensor:
    return ((left_out - left_out.mean(0)).square().mean(0) * (len(left_out) - 1)).sqrt()


def _leave_one_out(sketches: Tensor) -> tuple[Tensor, Tensor]:
    """From micro-batch gradients (M, K, D): the debiased Gramian (K, K), and (M, K, K) leaving out each micro-batch."""
    count, own, with_all = len(sketches), sketches @ sketches.mT, sketches @ sketches.sum(0).T
    total = with_all.sum(0) - own.sum(0)
    left_out = (total - with_all - with_all.mT + 2 * own) / ((count - 1) * (count - 2))
    return (total / (count * (count - 1))).cpu(), left_out.cpu()


def _cross_fitted(sketches: Tensor) -> tuple[float, float]:
    """Squared norm of the min-norm point, weights from one half judged on the other and back; its standard error."""
    halves = [_leave_one_out(sketches[i::2]) for i in (0, 1)]
    squares, variances = [], []
    for (chosen, _), (judge, left_out) in (halves, halves[::-1]):
        weights = pareto.min_norm_weights(pareto.project_psd(chosen))
        squares.append(float(weights @ judge @ weights))
        variances.append(float(_jackknife_se(left_out @ weights @ weights)) ** 2)
    return sum(squares) / 2, sum(variances) ** 0.5 / 2


def _sketch(rows: Tensor, bits: Tensor) -> Tensor:
    """(K, P) to (K, D): folded with random signs, which keeps inner products in expectation; as it is if P <= D."""
    if rows.shape[1] <= SKETCH_COLUMNS:
        return rows
    fold, signs = (0, -rows.shape[1] % SKETCH_COLUMNS), 2 * bits - 1
    return torch.stack([nn.functional.pad(row * signs, fold).view(-1, SKETCH_COLUMNS).sum(0) for row in rows])


def _last_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """The optimizer's last step downhill, weight decay apart, and its metric (rate per coordinate): (P,) each."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    steps, metrics = [], []
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                "optimizer must be of the Adam family and have stepped on every parameter of the model; "
                f"{type(optimizer).__name__} holds no second moment for one of shape {tuple(p.shape)}"
            )
        first, second = (1 - beta ** float(state["step"]) for beta in groups[p]["betas"])
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / second
        metrics.append((groups[p]["lr"] / (square.sqrt() + groups[p]["eps"])).flatten())
        steps.append(metrics[-1] * state["exp_avg"].flatten() / first)
    return torch.cat(steps).double(), torch.cat(metrics)


def _gramian_statistics(gradients: _Accumulator, sketches: Tensor, batch_per_bin: int) -> tuple[dict[str, Any], Tensor]:
    """The fields of the report that follow from the Gramian; and (M, K, K), Gramians without each micro-batch."""
    count, nan = len(sketches), float("nan")
    group_gramian, left_out = gradients.debiased(count).cpu(), _leave_one_out(sketches)[1]
    gramian, gramian_se = group_gramian.sum(0), _jackknife_se(left_out)
    naive = gradients.products(gradients.sums).sum(0).cpu() / count**2
    squares, quantile = gramian.diagonal(), _t_quantile(count)
    known = (squares > quantile * gramian_se.diagonal()) & (left_out.diagonal(dim1=1, dim2=2) > 0).all(0)
    hidden = ~(known & known[:, None])
    cosine, cosines = cosine_matrix(gramian).masked_fill(hidden, nan), cosine_matrix(left_out)
    cosine_se = _jackknife_se(cosines).masked_fill(hidden, nan)
    pairs, norms = (~hidden).triu(1), (squares / squares[:, None]).sqrt()
    variance = gradients.own.sum(0).diagonal().cpu() / count - squares  # of the gradient of one micro-batch
    square, square_se = _cross_fitted(sketches)
    ends = np.array([square, square - quantile * square_se, square + quantile * square_se])
    stationarity = (np.sign(ends) * np.sqrt(np.abs(ends))).tolist()
    return {
        "gramian": gramian,
        "gramian_se": gramian_se,
        "cosine": cosine_matrix(naive),
        "cosine_debiased": cosine,
        "cosine_se": cosine_se,
        "magnitude_similarity": (2 * norms / (1 + norms**2)).masked_fill(hidden, nan),
        "gnr": squares / variance * count,
        "noise_scale": (variance * batch_per_bin / squares).masked_fill(~known, nan),
        "weights": pareto.min_norm_weights(pareto.project_psd(gramian)),
        "stationarity": stationarity[0],
        "stationarity_interval": stationarity[1:],
        "stationarity_naive": pareto.stationarity(naive),
        "mean_cosine": float(cosine[pairs].mean()),
        "mean_cosine_se": float(_jackknife_se(cosines[:, pairs].mean(1))),
        "conflict_rate": float((cosine[pairs] < 0).double().mean()),
        "sure_conflict_rate": float((cosine + quantile * cosine_se < 0)[pairs].double().mean()),
        "undetermined": int(hidden.triu(1).sum()),
        "null_cosine": -1 / max(1, len(gramian) - 1),
        "group_names": gradients.group_names,
        "group_gramian": group_gramian,
    }, left_out


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

    model: any module called as model(x_t, timesteps, **kwargs), compiled or not; measured in the mode it is in, and
    under an autocast around the call. images: (N, C, H, W) uint8, or float in [-1, 1]. bins: Bins, or how many of equal
    width in t. weighting: its weights() multiply the losses. optimizer: the Adam that trains the model, for the cosines
    with its last step and in its metric. groups: from a parameter's name to its group. paired: bins share images and
    noise, which spoils the naive cosine alone. model_kwargs: tensors with one row per image.

    Costs about micro_batches training steps on bins * batch_per_bin images, and memory for 2 K gradients. Parameters,
    .grad, mode and the random state stay as they are. Ranks of a DistributedDataParallel model share the micro-batches;
    each must hold all images. Raises ValueError for gradients that are NaN or exactly 0, BatchNorm in train mode, an
    output unlike the input, fewer than 6 micro_batches, tensors on two devices.
    """
    from tqdm import tqdm

    if micro_batches < 6 or batch_per_bin < 1:
        raise ValueError(f"need micro_batches >= 6 and batch_per_bin >= 1; got {micro_batches} and {batch_per_bin}")
    prediction_type, (table, cut) = canonical_prediction_type(prediction_type), _inputs(model, images, schedule, bins)
    bare = _unwrapped(model)
    gradients = _Accumulator(bare, cut.num_bins, groups)
    rows, size = gradients.rows, (micro_batches, cut.num_bins)
    scale = torch.ones_like(schedule.alpha) if weighting is None else weighting.weights()
    update = None if optimizer is None else _last_step(optimizer, gradients.parameters)
    bits = torch.randint(2, rows.shape[1:], generator=generator(seed, 0, "signs"), dtype=torch.int8).to(rows.device)
    losses, along = rows.new_zeros(2, *size, dtype=torch.float64)
    sketches = losses.new_zeros(*size, min(SKETCH_COLUMNS, rows.shape[1]))
    in_metric = torch.zeros_like(sketches if update else losses)
    distributed = bare is not model
    first, stride = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)

    def bin_loss(parts: list[Part], k: int) -> Tensor:
        return (scale[parts[k][2]] * _losses(bare, schedule, prediction_type, model_kwargs, parts[k])).mean()

    with _fork_rng(table.device):
        for m in tqdm(range(first, micro_batches, stride), desc="conflicts", unit="micro-batch", disable=not progress):
            torch.manual_seed(generator(seed, m, "dropout").initial_seed())
            parts = _draw(table, cut, batch_per_bin, seed, m, paired)
            losses[m] = gradients.add(functools.partial(bin_loss, parts))
            sketches[m] = _sketch(rows, bits)
            if update:
                along[m] = torch.stack([row.double() @ update[0] for row in rows])
                in_metric[m] = _sketch(rows * update[1].sqrt(), bits)
    _all_reduce(model, gradients.sums, gradients.own, losses, along, sketches, in_metric)

    values, left_out = _gramian_statistics(gradients, sketches, batch_per_bin)
    cosines: list[Tensor | None] = [None, None, None]
    if update:
        along, hidden = along.cpu() / update[0].norm().cpu(), values["cosine_debiased"].isnan()
        others = (along.sum(0) - along) / (micro_batches - 1) / left_out.diagonal(dim1=1, dim2=2).sqrt()
        mean, error = along.mean(0) / values["gramian"].diagonal().sqrt(), _jackknife_se(others)
        cosines = [v.masked_fill(hidden.diagonal(), float("nan")) for v in (mean, error)]
        cosines += [cosine_matrix(_leave_one_out(in_metric)[0]).masked_fill(hidden, float("nan"))]
    log_snr = [v[v.isfinite()].mean() for v in schedule.log_snr.cpu().split(cut.edges.diff().tolist())]
    settings = {"micro_batches": micro_batches, "batch_per_bin": batch_per_bin, "paired": paired, "seed": seed}
    return ConflictReport(
        edges=cut.edges.tolist(),
        log_snr=torch.stack(log_snr),
        losses=losses.mean(0).cpu(),
        update_cosine=cosines[0],
        update_cosine_se=cosines[1],
        cosine_preconditioned=cosines[2],
        settings=settings | {"prediction_type": prediction_type, "training": model.training},
        **values,
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

    table, cut = _inputs(model, images, schedule, bins)
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
