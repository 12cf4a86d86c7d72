"""Gradients of the losses of timestep bins, and Gramians that are free of minibatch noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .. import pareto
from ..bins import Bins
from ..data.dataset import ImageData
from ..intervals import jackknife_se, t_quantile
from ..objective import sample_losses
from ..randomness import generator
from ..schedule import NoiseSchedule

SKETCH_COLUMNS = 65_536  # cosines between sketches are within about 0.01 of those between gradients


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

Part = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # x0, noise, timesteps and image indices of the samples of one bin


def _inputs(
    images: Images, schedule: NoiseSchedule, bins: int | Bins, model: nn.Module
) -> tuple[Tensor, Bins]:
    table = images.images if isinstance(images, ImageData) else images
    cut = bins if isinstance(bins, Bins) else Bins.uniform(schedule.num_timesteps, bins)
    devices, total = (
        {str(t.device) for t in (table, schedule.log_snr, *model.parameters())},
        schedule.num_timesteps,
    )
    if len(devices) > 1 or cut.edges[-1] != total:
        got = f"devices {sorted(devices)} and edges {cut.edges.tolist()}"
        raise ValueError(
            f"need all on one device, and bins that end at the schedule's {total} timesteps; got {got}"
        )
    return table, cut


def _draw(
    images: Tensor, bins: Bins, per_bin: int, seed: int, step: int, paired: bool
) -> list[Part]:
    """per_bin samples for each bin, independent or (paired) of the same images and noise; functions of (seed, step)."""
    parts = 1 if paired else bins.num_bins
    index = torch.randint(
        len(images), (parts, per_bin), generator=generator(seed, step, "images")
    ).to(images.device)
    x0 = images[index].float() / 127.5 - 1 if images.dtype == torch.uint8 else images[index]
    draw = generator(seed, step, "noise", images.device)
    noise = torch.randn(x0.shape, generator=draw, device=x0.device, dtype=x0.dtype)
    timesteps = bin_timesteps(bins, per_bin, generator(seed, step, "timesteps")).to(images.device)
    return [(x0[k % parts], noise[k % parts], t, index[k % parts]) for k, t in enumerate(timesteps)]


def _losses(
    model: nn.Module, schedule: NoiseSchedule, kind: str, kwargs: Kwargs, part: Part
) -> Tensor:
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

    def __init__(
        self, model: nn.Module, num_bins: int, groups: Callable[[str], str] = layer_group
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named or any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()
        ):
            # Such a BatchNorm ties a batch together and changes with every call.
            raise ValueError(
                "need parameters that require a gradient, and no BatchNorm in train mode: use model.eval()"
            )
        self.parameters, self.groups = list(named.values()), [groups(name) for name in named]
        self.group_names, self.sizes = (
            list(dict.fromkeys(self.groups)),
            [p.numel() for p in self.parameters],
        )
        dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        self.rows = torch.zeros(
            num_bins, sum(self.sizes), dtype=dtype, device=self.parameters[0].device
        )
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
            gradients.add(
                _losses(bare, schedule, prediction_type, model_kwargs, part).mean()
                for part in parts
            )
    _all_reduce(model, gradients.sums, gradients.own, count)
    return gradients.debiased(int(count)).sum(0)


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
    square, error = (
        sum(x.mean() for x in squares) / 2,
        sum(jackknife_se(x) ** 2 for x in squares) ** 0.5 / 2,
    )
    ends = torch.stack([square, square - quantile * error, square + quantile * error])
    return (ends.sign() * ends.abs().sqrt()).tolist()


def _sketch(rows: Tensor, bits: Tensor) -> Tensor:
    """(K, P) to (K, D): folded with random signs, which keeps inner products in expectation; as it is if P <= D."""
    if rows.shape[1] <= SKETCH_COLUMNS:
        return rows
    signs, fold = 2 * bits - 1, (0, -rows.shape[1] % SKETCH_COLUMNS)
    return torch.stack(
        [nn.functional.pad(row * signs, fold).view(-1, SKETCH_COLUMNS).sum(0) for row in rows]
    )


def _last_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Direction of the last step, weight decay apart (P,); root (P,) of its metric, the rate of each coordinate."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    steps, metrics = [], []
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            name, shape = type(optimizer).__name__, tuple(p.shape)
            raise ValueError(
                f"{name} is not of the Adam family, or has not stepped on the parameter of shape {shape}"
            )
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
    count, quantile, left_out = len(sketches), t_quantile(len(sketches)), _leave_one_out(sketches)
    group_gramian, gramian_se = gradients.debiased(count).cpu(), jackknife_se(left_out)
    naive = gradients.products(gradients.sums).sum(0).cpu() / count**2
    gramian = group_gramian.sum(0)
    squares, left_squares = gramian.diagonal(), left_out.diagonal(dim1=1, dim2=2)
    known = (squares > quantile * gramian_se.diagonal()) & (left_squares > 0).all(0)

    def shown(values: Tensor) -> Tensor:
        return values.masked_fill(
            ~(known if values.ndim == 1 else known & known[:, None]), float("nan")
        )

    cosine, cosines = shown(cosine_matrix(gramian)), cosine_matrix(left_out)
    cosine_se, pairs = shown(jackknife_se(cosines)), (known & known[:, None]).triu(1)
    variance = (
        gradients.own.sum(0).diagonal().cpu() / count - squares
    )  # of the gradient of one micro-batch
    stationarity, *interval = _cross_fitted(sketches, quantile)
    values = {
        "gramian": gramian,
        "gramian_se": gramian_se,
        "cosine": cosine_matrix(naive),
        "cosine_debiased": cosine,
        "cosine_se": cosine_se,
        "magnitude_similarity": shown(
            2 * (squares * squares[:, None]).sqrt() / (squares + squares[:, None])
        ),
        "gnr": squares / variance * count,
        "noise_scale": shown(variance * batch_per_bin / squares),
        "weights": pareto.min_norm_weights(pareto.project_psd(gramian)),
        "stationarity": stationarity,
        "stationarity_interval": interval,
        "stationarity_naive": pareto.stationarity(naive),
        "mean_cosine": float(cosine[pairs].mean()),
        "mean_cosine_se": float(jackknife_se(cosines[:, pairs].mean(1))),
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
        values["update_cosine_se"] = shown(jackknife_se(others / left_squares.sqrt()))
        values["cosine_preconditioned"] = shown(cosine_matrix(_leave_one_out(in_metric).mean(0)))
    return values
