"""Gramians of the gradients of timestep bins, free of minibatch noise.

The gradient of bin i from one micro-batch is g_i + e_i, with noise e_i of mean 0. The product of two such gradients
from the same micro-batch has the expectation g_i . g_j + E[e_i . e_j]: the diagonal holds the noise, and so do the
other entries where bins share images or noise. Gradients from two different micro-batches m and n are independent, so
their products have the expectation g_i . g_j. The mean of these products over all pairs m != n is a U-statistic

    G = (S S' - sum_m g_m g_m') / (M (M - 1)),    S = sum_m g_m,

with g_m (K, P) the gradients of all bins from micro-batch m. It takes one pass and the memory of S. TorchJD's MoDo and
SDMGrad weightings use the product of two batches, J_1 J_2', which is its case M = 2 (Chen et al. 2023; Xiao,
Ban, Ji 2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..bins import Bins
from ..checks import NotFiniteError
from ..randomness import forked_rng
from ..schedule import NoiseSchedule
from .batches import BinBatch, ModelKwargs, batch_losses


def layer_group(name: str) -> str:
    """The default group of a parameter: the first part of its name, with the index if one follows.

    >>> layer_group("down_blocks.0.resnets.1.conv1.weight")
    'down_blocks.0'
    """
    return re.sub(r"^(?:_orig_mod\.)?([^.]+(?:\.\d+)?).*", r"\1", name)


def cosine_matrix(gramian: Tensor) -> Tensor:
    """Cosines of Gramians (..., K, K); NaN where a debiased squared norm is not positive.

    >>> cosine_matrix(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    return gramian / (norms[..., :, None] * norms[..., None, :])


def without_ranks(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper.

    Through the wrapper, a forward would wait for gradient hooks that autograd.grad never calls.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def sum_over_ranks(model: nn.Module, *tensors: Tensor) -> None:
    """Sum the tensors in place over the ranks of a DistributedDataParallel model."""
    if isinstance(model, DistributedDataParallel):
        for tensor in tensors:
            distributed.all_reduce(tensor)


class GramianAccumulator:
    """Streams the gradients of micro-batches into the U-statistic of this module, one Gramian per group of parameters.

    rows: (K, P), the gradients of the latest micro-batch. sums: (K, P), those of all. own_products: (groups, K, K)
    float64, the sum of g_m g_m'. Raises ValueError without parameters to differentiate, and for a BatchNorm in train
    mode, which ties the samples of a batch together and changes with every call.
    """

    def __init__(
        self, model: nn.Module, num_bins: int, groups: Callable[[str], str] = layer_group
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        if not named or batch_norms:
            raise ValueError(
                "need parameters that require a gradient, and no BatchNorm in train mode: use model.eval()"
            )
        self.parameters = list(named.values())
        self.groups = [groups(name) for name in named]
        self.group_names = list(dict.fromkeys(self.groups))
        self.sizes = [p.numel() for p in self.parameters]
        dtype = torch.float32
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        device = self.parameters[0].device
        self.rows = torch.zeros(num_bins, sum(self.sizes), dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.rows)
        self.own_products = self.products(self.rows)

    def products(self, rows: Tensor) -> Tensor:
        """rows rows' for rows (K, P): (groups, K, K) float64."""
        count = len(rows)
        total = rows.new_zeros(len(self.group_names), count, count, dtype=torch.float64)
        for group, columns in zip(self.groups, rows.split(self.sizes, 1), strict=True):
            block = columns.double()
            total[self.group_names.index(group)] += block @ block.T
        return total

    def add(self, losses: Iterable[Tensor]) -> Tensor:
        """Take in a micro-batch: the loss () of each bin, computed when it is asked for. Returns the losses, (K,).

        A forward and a backward per bin cost together about what one step on the whole batch does. Raises ValueError
        for a gradient that is NaN, infinite or exactly 0.
        """
        values = []
        scale = self._loss_scale()
        with torch.enable_grad():
            for row, loss in zip(self.rows, losses, strict=True):
                scaled = loss if scale == 1 else scale * loss
                gradients = torch.autograd.grad(scaled, self.parameters, materialize_grads=True)
                torch.cat([g.flatten() for g in gradients], out=row)
                if scale != 1:
                    row /= scale
                values.append(loss.detach())
        products = self.products(self.rows)
        self._check(products.sum(0).diagonal(), values)
        self.sums += self.rows
        self.own_products += products
        return torch.stack(values)

    def _loss_scale(self) -> float:
        """2^12 where gradients pass through float16, whose smallest numbers would be 0 without it; else 1."""
        device = self.rows.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        in_half = autocast == torch.float16
        in_half = in_half or any(p.dtype == torch.float16 for p in self.parameters)
        return 4096.0 if in_half else 1.0

    def _check(self, squares: Tensor, losses: list[Tensor]) -> None:
        usable = squares.isfinite() & (squares > 0)
        bad = torch.nonzero(~usable).flatten().tolist()
        if bad:
            kind = ValueError if squares.isfinite().all() else NotFiniteError
            raise kind(
                f"bins {bad} have losses {[float(losses[k]) for k in bad]} and gradients of squared norm "
                f"{squares[bad].tolist()}: NaN has no direction, and an exact 0 would pass for a solved objective"
            )

    def debiased(self, count: int) -> Tensor:
        """The unbiased Gramian (groups, K, K) of count micro-batches; of a single one, the plain Gramian."""
        total = self.products(self.sums)
        if count == 1:
            return total
        return (total - self.own_products) / (count * (count - 1))


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
    model_kwargs: ModelKwargs = None,
) -> Tensor:
    """Inner products (K, K) float64 of the gradients of the bins' mean losses, from one batch: for use in training.

    Arguments as in ``sample_losses``; model_kwargs are tensors with one row per sample. ``bin_timesteps`` draws
    timesteps that fill all bins. The samples of a bin are dealt into `splits` parts, and products are taken between
    different parts only. The result is unbiased but noisy, and perhaps indefinite (see ``pareto.project_psd``). With
    splits=1 it is the plain Gramian, with the noise in its diagonal.

    Summed over the ranks of a DistributedDataParallel model. Leaves parameters, .grad and the random state alone.
    Raises ValueError for a bin with fewer samples than splits, and for a gradient that is NaN or exactly 0.

    >>> schedule, bins = NoiseSchedule.linear(10), Bins.uniform(10, 2)
    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(()))
    ...     def forward(self, x_t, timesteps):
    ...         return self.factor * x_t
    >>> x0, noise = torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
    >>> bin_gramian(Scale(), schedule, x0, noise, torch.tensor([0, 1, 5, 6]), bins).shape
    torch.Size([2, 2])
    """
    bin_of_sample = bins.index(timesteps)
    counts = torch.bincount(bin_of_sample, minlength=bins.num_bins).tolist()
    if not 1 <= splits <= min(counts):
        raise ValueError(
            f"every bin needs splits = {splits} >= 1 samples or more; got {counts}. An empty bin would pass for a "
            "solved objective: draw timesteps with bin_timesteps, or use fewer bins"
        )
    network = without_ranks(model)
    accumulator = GramianAccumulator(network, bins.num_bins)
    members = [torch.nonzero(bin_of_sample == k).flatten() for k in range(bins.num_bins)]
    with forked_rng(x0.device):
        for split in range(splits):
            parts = [rows[split::splits] for rows in members]
            batches = [BinBatch(x0[i], noise[i], timesteps[i], i) for i in parts]
            accumulator.add(
                batch_losses(network, schedule, batch, prediction_type, model_kwargs).mean()
                for batch in batches
            )
    micro_batches = torch.tensor(splits, device=x0.device)
    sum_over_ranks(model, accumulator.sums, accumulator.own_products, micro_batches)
    return accumulator.debiased(int(micro_batches)).sum(0)
