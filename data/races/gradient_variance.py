"""How much each timestep sampler lowers the variance of the gradient, on networks trained here.

    python data/races/gradient_variance.py --data cifar10 --data-root $DATA --out gradient-variance.json

One network for each target (x0, noise, v, velocity of a flow) and seed is trained with uniform timesteps. Then, for the
plain error of its target and for min-snr, the variance of the gradient of one batch is compared between samplers that
leave the objective as it is. 1 is uniform sampling.

With density p over T timesteps and importance 1 / (T p), a batch of B samples with weights w and gradients g has

    variance = (S(p) - |mean gradient|^2) / B,    S(p) = mean over samples drawn uniformly of w^2 |g|^2 / (T p).

So one set of gradients measures all densities. Adaptive samplers first learn, from batches of their own, what they would
have learned in training. The variance of stratified sampling is measured between micro-batches that are stratified.
Intervals are a bootstrap over micro-batches, 95 %.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dysigma.data import ImageData
from dysigma.objective import OutputLayerGradients, sample_losses
from dysigma.randomness import generator
from dysigma.runs import provenance, write_json
from dysigma.samplers import make_sampler
from dysigma.schedule import NoiseSchedule
from dysigma.training import TrainConfig, build, iterate, load_split
from dysigma.weightings import make_weighting
from dysigma.weightings.base import Weighting
from dysigma.weightings.formulas import PLAIN

# On which path each target is trained, and how fast.
TARGETS: dict[str, dict[str, Any]] = {
    "sample": {"schedule": "linear", "lr": 4e-3},
    "epsilon": {"schedule": "linear", "lr": 2e-3},
    "v_prediction": {"schedule": "linear", "lr": 4e-3},
    "flow_prediction": {"schedule": "flow", "lr": 4e-3},
}
BATCH = 32
DENSITY_LR = 0.02
BOOTSTRAPS = 1000


class Gradients(NamedTuple):
    """Of M stratified micro-batches of B samples, for one objective."""

    timesteps: Tensor  # (M, B)
    squares: Tensor  # (M, B) squared norms of the weighted gradients of single samples
    products: Tensor  # (M, M) inner products of the mean gradients of micro-batches


def train_network(config: TrainConfig, data: ImageData) -> nn.Module:
    """The network, not its average, at the end of a training: the gradients of the next step are its own."""
    state = build(config, data)
    for _ in iterate(state, data, config):
        pass
    return state.model


def draw(
    data: ImageData, num_timesteps: int, seed: int, number: int, stream: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise and stratified timesteps of one batch."""
    random = generator(seed, number, stream)
    chosen = torch.randint(0, len(data), (BATCH,), generator=random)
    x0 = data.images[chosen].float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=random)
    shift = torch.rand(1, generator=random)
    timesteps = ((torch.arange(BATCH) + shift) / BATCH * num_timesteps).long()
    return x0, noise, timesteps.clamp(max=num_timesteps - 1)


def measure_gradients(
    model: nn.Module,
    schedule: NoiseSchedule,
    target: str,
    weightings: dict[str, Weighting],
    data: ImageData,
    micro_batches: int,
    seed: int,
) -> dict[str, Gradients]:
    """One backward pass for every sample; by objective."""
    parameters = list(model.parameters())
    tables = {name: weighting.weights() for name, weighting in weightings.items()}
    means: dict[str, list[Tensor]] = {name: [] for name in tables}
    steps = []
    squares = []
    for number in range(micro_batches):
        x0, noise, timesteps = draw(data, schedule.num_timesteps, seed, number, "measure")
        sums = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in tables}
        for i in range(BATCH):
            one = slice(i, i + 1)
            loss = sample_losses(model, schedule, x0[one], noise[one], timesteps[one], target)
            found = torch.autograd.grad(loss.sum(), parameters)
            gradient = torch.cat([g.flatten() for g in found])
            squares.append(gradient.double().square().sum())
            for name, table in tables.items():
                sums[name] += table[timesteps[i]] * gradient
        steps.append(timesteps)
        for name, total in sums.items():
            means[name].append(total / BATCH)
    at = torch.stack(steps)
    norms = torch.stack(squares).view(micro_batches, BATCH)
    measured = {}
    for name, table in tables.items():
        rows = torch.stack(means[name]).double()
        weighted = table[at].double().square() * norms
        measured[name] = Gradients(at, weighted, rows @ rows.T)
    return measured


def learned_densities(
    model: nn.Module,
    schedule: NoiseSchedule,
    target: str,
    weighting: Weighting,
    prior: str,
    data: ImageData,
    batches: int,
    seed: int,
) -> dict[str, Tensor]:
    """p (T,) of every sampler for one objective, the adaptive ones after `batches` batches of uniform timesteps."""
    density = make_weighting("dy-sigma", schedule, target, prior=prior, variant="density")
    optimizer = torch.optim.Adam(density.parameters(), DENSITY_LR)
    samplers = {
        "uniform": make_sampler("uniform", schedule),
        "sqrt-weight": make_sampler("sqrt-weight", schedule, weighting=weighting),
        "weight": make_sampler("weight", schedule, weighting=weighting),
        "loss-second-moment": make_sampler("loss-second-moment", schedule),
        "gradient-norm": make_sampler("gradient-norm", schedule, bins=20),
        "dy-sigma density": make_sampler("weighting", schedule, weighting=density),
    }
    weights = weighting.weights()
    output = OutputLayerGradients(model)
    for number in range(batches):
        x0, noise, timesteps = draw(data, schedule.num_timesteps, seed, number, "learn")
        with output:
            losses = sample_losses(model, schedule, x0, noise, timesteps, target)
            losses.retain_grad()
            losses.sum().backward()
        norms = output.squared_norms(losses)
        losses = losses.detach()
        samplers["loss-second-moment"].update(weights[timesteps] * losses, timesteps)
        samplers["gradient-norm"].update(weights[timesteps].square() * norms, timesteps)
        optimizer.zero_grad()
        density.observe_gradient_norms(norms, timesteps, torch.ones(BATCH)).backward()
        optimizer.step()
    model.zero_grad()
    return {name: sampler.probabilities() for name, sampler in samplers.items()}


def relative_variances(found: Gradients, densities: dict[str, Tensor]) -> dict[str, Tensor]:
    """Variance of a batch mean relative to that of uniform timesteps, () by sampler; "stratified" is added."""
    count, batch = found.squares.shape
    own = found.products.diagonal().sum()
    # Products of different micro-batches: unbiased for the squared norm of the mean gradient.
    squared_mean = (found.products.sum() - own) / (count * (count - 1))
    variances = {}
    for name, p in densities.items():
        importance = 1 / (len(p) * p[found.timesteps])
        second_moment = (found.squares * importance).mean()
        variances[name] = (second_moment - squared_mean) / batch
    variances["stratified"] = own / count - squared_mean
    return {name: value / variances["uniform"] for name, value in variances.items()}


def with_intervals(
    found: Gradients, densities: dict[str, Tensor], seed: int
) -> dict[str, list[float]]:
    """[estimate, low, high] by sampler."""
    estimates = relative_variances(found, densities)
    count = len(found.squares)
    random = generator(seed, 0, "bootstrap")
    resampled: dict[str, list[Tensor]] = {name: [] for name in estimates}
    for _ in range(BOOTSTRAPS):
        chosen = torch.randint(0, count, (count,), generator=random)
        # A micro-batch that is drawn twice must not be multiplied with itself as if it were two.
        products = found.products[chosen][:, chosen]
        again = chosen[:, None] == chosen[None, :]
        different = products[~again].mean()
        own = products.diagonal()
        filled = torch.full_like(products, float(different))
        filled.diagonal().copy_(own)
        part = Gradients(found.timesteps[chosen], found.squares[chosen], filled)
        for name, value in relative_variances(part, densities).items():
            resampled[name].append(value)
    rows = {}
    for name, estimate in estimates.items():
        levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.stack(resampled[name]).quantile(levels).tolist()
        rows[name] = [round(value, 4) for value in (float(estimate), low, high)]
    return rows


def measure(
    config: TrainConfig, data: ImageData, micro_batches: int, batches: int
) -> dict[str, dict[str, list[float]]]:
    """Train one network and return [estimate, low, high] by objective and sampler."""
    model = train_network(config, data)
    model.eval()
    schedule = config.noise_schedule()
    target = config.prediction
    objectives = (PLAIN[target], "min-snr")
    weightings = {name: make_weighting(name, schedule, target) for name in objectives}
    gradients = measure_gradients(
        model, schedule, target, weightings, data, micro_batches, config.seed
    )
    rows = {}
    for name, weighting in weightings.items():
        densities = learned_densities(
            model, schedule, target, weighting, name, data, batches, config.seed
        )
        rows[name] = with_intervals(gradients[name], densities, config.seed)
    return rows


def main() -> None:
    """Read the command line, measure, and write after every network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="leaves")
    parser.add_argument("--data-root")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=32_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--micro-batches", type=int, default=48)
    parser.add_argument("--learn-batches", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    base = TrainConfig(
        data=args.data,
        data_root=args.data_root,
        model=args.model,
        image_size=args.image_size,
        images=args.images,
        batch_size=BATCH,
        warmup_images=min(4000, args.images // 4),
        weighting="min-snr",
        device="cpu",
    )
    data = load_split(base, "train", torch.device("cpu"))
    result: dict[str, Any] = {
        "settings": {key: str(value) for key, value in vars(args).items() if key != "data_root"},
        "unit": "variance of the gradient of one batch, uniform timesteps = 1: [estimate, low, high]",
        "networks": [],
        "provenance": provenance(),
    }
    for seed in args.seeds:
        for target in args.targets:
            config = replace(base, seed=seed, prediction=target, **TARGETS[target])
            rows = measure(config, data, args.micro_batches, args.learn_batches)
            entry = {"target": target, "seed": seed, "weighting": "min-snr", **TARGETS[target]}
            result["networks"].append({**entry, "objectives": rows})
            write_json(args.out, result)
            for objective, found in rows.items():
                words = [f"{name} {value[0]:.3f}" for name, value in found.items()]
                print(f"{target} seed {seed} {objective}: " + ", ".join(words), flush=True)


if __name__ == "__main__":
    main()
