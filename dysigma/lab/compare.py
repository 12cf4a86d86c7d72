"""Finished runs side by side: which weighting ends lower, where, by how much, how soon, and how surely."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import pareto, plots
from ..intervals import t_interval
from ..runs.files import RunError, read_metrics
from ..runs.folder import Run
from ..training.config import TrainConfig
from ..weightings.measures import fluctuation
from .convergence import images_to_threshold, race_curves

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


# What a validation loss is a loss of.
COMMON = (
    "data", "image_size", "schedule", "num_timesteps", "zero_terminal_snr", "prediction", "validation_images",
    "validation_timesteps",
)  # fmt: skip

# What may differ within an arm: the seed, the machine, and what is written down on the way.
WITHIN_ARM = {
    "seed", "device", "data_root", "compile", "checkpoint_every", "log_every", "bins", "distance_images",
    "distance_steps", "features", "conflicts_from",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found, over S seeds that all arms have; an arm has M validations of its own, at V timesteps.

    table: one row per arm, the baseline first. images; loss, the last one, mean over timesteps and seeds; ratio, the
    geometric mean over timesteps and seeds of that loss over the baseline's; bits, the difference in bits/dim of the
    diffusion term of the ELBO between the first and last validation timestep, the integral of the epsilon loss over
    log-SNR (Kingma et al. 2021); low_noise and high_noise, the mean losses of the two halves of the timesteps;
    non_dominated, whether no arm is better in both, and front_share, in which share of seeds; reached, how many
    seeds reach the baseline's last geometric-mean loss; reach, the images that takes, and speedup, the baseline's
    over the arm's, NaN unless all seeds do; fluctuation of the
    weights (bins' median) in the second half of training. _low and _high: 95 % t-intervals of paired differences
    (ratios: of their logarithms), NaN for one seed.
    """

    seeds: list[int]
    timesteps: NDArray  # (V,)
    images: dict[str, NDArray]  # (M,)
    losses: dict[str, NDArray]  # (S, M, V)
    table: pandas.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """The table and the curves as JSON values; NaN becomes None."""
        curves = {
            arm: {"images": n.tolist(), "losses": self.losses[arm].tolist()}
            for arm, n in self.images.items()
        }
        table = json.loads(self.table.to_json(orient="index", double_precision=15))
        return {
            "seeds": self.seeds,
            "table": table,
            "timesteps": self.timesteps.tolist(),
            "curves": curves,
        }

    def __str__(self) -> str:
        text = self.table.map(
            lambda value: f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        )
        for name in ("ratio", "bits", "speedup"):
            ends = " [" + text.pop(f"{name}_low") + ", " + text.pop(f"{name}_high") + "]"
            text[name] += ends.where(self.table[f"{name}_low"].notna(), "")
        text["reach"] = text.reach.replace("nan", "not reached")
        text["non_dominated"] = self.table.non_dominated.map({True: "yes", False: "no"})
        return str(text.replace("nan", "-").to_string())


def _differing(configs: Sequence[TrainConfig], names: Sequence[str]) -> dict[str, list[Any]]:
    values = {name: [getattr(config, name) for config in configs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _arms(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """{label: {seed: run}} in the order given; RunError for runs that cannot be compared."""
    for run in runs:
        if run.summary.get("status") != "done":
            status = run.summary.get("status")
            raise RunError(
                f"{run.path} is not finished (status: {status}): resume it first, or leave it out"
            )
    configs = [TrainConfig.from_dict(run.config) for run in runs]
    if common := _differing(configs, COMMON):
        pairs = "; ".join(
            f"{name} {', '.join(map(str, values))}" for name, values in common.items()
        )
        raise RunError(
            f"losses of different things cannot be compared; these runs differ in {pairs}"
        )
    if configs[0].validation_timesteps < 2:
        raise RunError("need two validation timesteps or more, for two halves; these runs have one")
    varied = _differing(configs, [name for name in configs[0].to_dict() if name not in WITHIN_ARM])
    arms: dict[str, dict[int, Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        words = [
            config.weighting,
            *(f"{key}={value}" for key, value in config.weighting_params.items()),
        ]
        words += [
            f"{name}={getattr(config, name)}"
            for name in varied
            if name not in ("weighting", "weighting_params")
        ]
        arm = arms.setdefault(" ".join(words), {})
        if config.seed in arm:
            raise RunError(
                f"{arm[config.seed].path} and {run.path} are the same training: arm and seed {config.seed}"
            )
        arm[config.seed] = run
    if len(arms) < 2:
        raise RunError(
            f"need runs of two arms or more; got {len(runs)} of {next(iter(arms))!r} alone"
        )
    return arms


def _interval(name: str, differences: NDArray, undo: Any = float) -> dict[str, float]:
    """Mean of paired differences (S,) and the ends of its 95 % interval, NaN for one seed."""
    mean, half = map(float, t_interval(differences))
    return {name: undo(mean), f"{name}_low": undo(mean - half), f"{name}_high": undo(mean + half)}


def _record(label: str, run: Run) -> dict[str, Any]:
    """A run as a record of a race, without the validation of the untrained network."""
    rows = read_metrics(run.path / "metrics.jsonl")
    validations = [row for row in rows if "validation_losses" in row and row["images"] > 0]
    weights = [row["bin_weights"] for row in rows if "bin_weights" in row]
    late = torch.tensor(weights[len(weights) // 2 :])
    return {
        "grid": "", "arm": label, "seed": run.config["seed"], "config": run.config,
        "images": [row["images"] for row in validations],
        "validation_losses": [row["validation_losses"] for row in validations],
        "validation_timesteps": validations[0]["validation_timesteps"],
        "fluctuation": float(fluctuation(late).median()) if len(late) > 1 else math.nan,
    }  # fmt: skip


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare finished runs; the arm of the first is the baseline.

    Runs that differ in the seed alone are one arm, and arms are compared on the seeds that all of them have, paired:
    runs of one seed share initial weights, images, timesteps and noise. Raises RunError for runs that are not finished,
    were validated on different things (the message names the fields), are of one arm, or share no seed.
    """
    import pandas

    arms = _arms(runs)
    seeds = sorted(set.intersection(*(set(arm) for arm in arms.values())))
    if not seeds:
        having = "; ".join(
            f"{label} {', '.join(map(str, sorted(arm)))}" for label, arm in arms.items()
        )
        raise RunError(f"no seed is common to all arms, so nothing is paired; seeds: {having}")
    records = {label: [_record(label, arm[seed]) for seed in seeds] for label, arm in arms.items()}
    images = {label: np.array(each[0]["images"]) for label, each in records.items()}
    losses = {
        label: np.array([record["validation_losses"] for record in each])
        for label, each in records.items()
    }
    baseline, table = (
        next(iter(arms)),
        pandas.DataFrame([record for each in records.values() for record in each]),
    )
    curves = (race_curves(table, metric) for metric in ("validation", "bits"))
    mean, bits = (  # (S, M)
        {arm: np.array([v for _, v in runs.values()]) for (_, arm), runs in each.items()}
        for each in curves
    )
    timesteps = np.array(table.validation_timesteps[0])
    low = timesteps < runs[0].config["num_timesteps"] / 2
    ends = [each[:, -1] for each in losses.values()]
    halves = np.array([[end[:, low].mean(1), end[:, ~low].mean(1)] for end in ends])  # (arms, 2, S)
    goal = mean[baseline][:, -1]
    reach = {
        label: np.array(
            [images_to_threshold(images[label], *pair) for pair in zip(each, goal, strict=True)]
        )
        for label, each in mean.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for label, each in records.items():
        count = int(np.isfinite(reach[label]).sum())
        row = {
            "images": images[label][-1],
            "loss": losses[label][:, -1].mean(),
            "reached": count,
            "reach": math.nan,
        }
        row |= _interval("ratio", np.log(mean[label][:, -1] / goal), math.exp)
        row |= _interval("bits", bits[label][:, -1] - bits[baseline][:, -1])
        if count == len(seeds):
            row |= {"reach": math.exp(np.log(reach[label]).mean())}
            row |= _interval("speedup", np.log(reach[baseline] / reach[label]), math.exp)
        rows[label] = row | {"fluctuation": np.mean([record["fluctuation"] for record in each])}
    frame = pandas.DataFrame.from_dict(rows, orient="index").rename_axis("arm")
    frame["low_noise"], frame["high_noise"] = halves.mean(2).T
    frame["non_dominated"] = pareto.non_dominated(halves.mean(2))
    frame["front_share"] = np.mean(
        [pareto.non_dominated(each) for each in np.moveaxis(halves, 2, 0)], axis=0
    )
    return Comparison(seeds, timesteps, images, losses, frame)


def draw(comparison: Comparison) -> Figure:
    """Geometric-mean loss against images, and the last loss over the baseline's by timestep, for each arm."""
    import matplotlib.pyplot as plt

    plots.use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    baseline, *_ = comparison.losses
    last = comparison.losses[baseline][:, -1]
    grid = np.unique(np.concatenate([*comparison.images.values()]))
    curves = {}
    for label, losses in comparison.losses.items():
        # Between an arm's own validations the line that would be drawn anyway, after its last one nothing.
        own = [
            np.interp(grid, comparison.images[label], logs, np.nan, np.nan)
            for logs in np.log(losses).mean(2)
        ]
        curves[label] = np.exp(own)
    plots.trajectories(left, grid, curves, log=True)
    left.axhline(np.exp(np.log(last).mean()), color="0.3", linewidth=0.8)
    left.set(
        xlabel="images seen",
        ylabel="loss, geometric mean over timesteps",
        title=f"line: where {baseline} ends",
    )
    ratios = {label: losses[:, -1] / last for label, losses in comparison.losses.items()}
    plots.trajectories(right, comparison.timesteps, ratios, log=True)
    count = len(comparison.seeds)
    title = f"bands: 95 % over {count} paired seeds" if count > 1 else "one seed: no intervals"
    right.set(
        xlabel="timestep (0 = clean)", ylabel=f"last loss over that of {baseline}", title=title
    )
    return fig
