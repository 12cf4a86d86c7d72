"""Finished runs side by side: which weighting ends lower, where, how much, how soon, how surely."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from .curves import Array, Curve, images_to_threshold
from .records import race_curves
from .speedups import speedup

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


# What a validation loss is a loss of.
COMMON = (
    "data",
    "image_size",
    "schedule",
    "shift",
    "num_timesteps",
    "zero_terminal_snr",
    "prediction",
    "validation_images",
    "validation_timesteps",
)

# What may differ within an arm: the seed, the machine, and what is written down on the way.
WITHIN_ARM = {
    "seed",
    "device",
    "data_root",
    "compile",
    "threads",
    "checkpoint_every",
    "log_every",
    "bins",
    "distance_images",
    "distance_steps",
    "features",
    "conflicts_from",
}


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found, over S seeds that all arms have; M validations of V timesteps.

    table: one row per arm, the baseline first, with these columns.

    - images: of the last validation.
    - loss: of that validation, mean over timesteps and seeds.
    - ratio: that loss over the baseline's, geometric mean over timesteps and seeds.
    - bits: difference, in bits/dim, of the ELBO's diffusion term between the first and the last
      validation timestep, the integral of the epsilon loss over log-SNR (Kingma et al. 2021).
    - low_noise, high_noise: mean losses of the two halves of the timesteps; non_dominated: whether
      no arm is better in both; front_share: in which share of seeds.
    - reached: how many seeds reach the baseline's last geometric-mean loss; reach: the images that
      takes, and speedup: the baseline's images over the arm's, NaN unless all seeds get there.
    - fluctuation: of the weights, median over bins, in the second half of training.
    - _low and _high: 95 % t-intervals of paired differences (ratios: of their logarithms), NaN for
      one seed.
    """

    seeds: list[int]
    timesteps: Array  # (V,)
    images: dict[str, Array]  # arm -> (M,)
    losses: dict[str, Array]  # arm -> (S, M, V)
    table: pandas.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """The table and the curves as JSON values; NaN becomes None."""
        curves = {}
        for arm, images in self.images.items():
            curves[arm] = {"images": images.tolist(), "losses": self.losses[arm].tolist()}
        return {
            "seeds": self.seeds,
            "table": json.loads(self.table.to_json(orient="index", double_precision=15)),
            "timesteps": self.timesteps.tolist(),
            "curves": curves,
        }

    def __str__(self) -> str:
        text = self.table.map(_text)
        for name in ("ratio", "bits", "speedup"):
            interval = " [" + text.pop(f"{name}_low") + ", " + text.pop(f"{name}_high") + "]"
            has_interval = self.table[f"{name}_low"].notna()
            text[name] += interval.where(has_interval, "")
        text["reach"] = text.reach.replace("nan", "not reached")
        text["non_dominated"] = self.table.non_dominated.map({True: "yes", False: "no"})
        return str(text.replace("nan", "-").to_string())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _differing(configs: Sequence[TrainConfig], names: Iterable[str]) -> dict[str, list[Any]]:
    """The fields of these in which configurations differ, with the value of each configuration."""
    found = {}
    for name in names:
        values = [getattr(config, name) for config in configs]
        if any(value != values[0] for value in values):
            found[name] = values
    return found


def _check_comparable(runs: Sequence[Run], configs: Sequence[TrainConfig]) -> None:
    for run in runs:
        status = run.summary.get("status")
        if status != "done":
            raise RunError(
                f"{run.path} is not finished (status: {status}): resume it first, or leave it out"
            )
    differing = _differing(configs, COMMON)
    if differing:
        fields = [f"{name} {', '.join(map(str, values))}" for name, values in differing.items()]
        raise RunError(
            "losses of different things cannot be compared; these runs differ in "
            + "; ".join(fields)
        )
    if configs[0].validation_timesteps < 2:
        raise RunError("need two validation timesteps or more, for two halves; these runs have one")


def _without_places(runs: Sequence[Run], configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Configurations with one place of the images, if all runs recorded the same images, wherever they lay."""
    recorded = [run.summary.get("data") for run in runs]
    if recorded[0] is None or any(found != recorded[0] for found in recorded):
        return [*configs]
    return [replace(config, data=configs[0].data) for config in configs]


def _label(config: TrainConfig, varied: Iterable[str]) -> str:
    """The name of an arm: its weighting, with parameters, and what else differs between arms."""
    words = [config.weighting]
    for name, value in config.weighting_params.items():
        words.append(f"{name}={value}")
    for name in varied:
        if name not in ("weighting", "weighting_params"):
            words.append(f"{name}={getattr(config, name)}")
    return " ".join(words)


def _arms(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """{label: {seed: run}} in the order given; RunError for runs that cannot be compared."""
    configs = _without_places(runs, [TrainConfig.from_dict(run.config) for run in runs])
    _check_comparable(runs, configs)
    between_arms = [name for name in configs[0].to_dict() if name not in WITHIN_ARM]
    varied = _differing(configs, between_arms)
    arms: dict[str, dict[int, Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        arm = arms.setdefault(_label(config, varied), {})
        if config.seed in arm:
            raise RunError(
                f"{arm[config.seed].path} and {run.path} are the same training: "
                f"arm and seed {config.seed}"
            )
        arm[config.seed] = run
    if len(arms) < 2:
        raise RunError(
            f"need runs of two arms or more; got {len(runs)} of {next(iter(arms))!r} alone"
        )
    return arms


def _common_seeds(arms: Mapping[str, Mapping[int, Run]]) -> list[int]:
    seeds = set.intersection(*(set(arm) for arm in arms.values()))
    if not seeds:
        having = [f"{label} {', '.join(map(str, sorted(arm)))}" for label, arm in arms.items()]
        raise RunError(
            "no seed is common to all arms, so nothing is paired; seeds: " + "; ".join(having)
        )
    return sorted(seeds)


def _record(label: str, run: Run) -> dict[str, Any]:
    """A run as a row of a race table, without the validation of the untrained network."""
    rows = read_metrics(run.path / "metrics.jsonl")
    validations = [row for row in rows if "validation_losses" in row and row["images"] > 0]
    weights = [row["bin_weights"] for row in rows if "bin_weights" in row]
    late = torch.tensor(weights[len(weights) // 2 :])
    return {
        "grid": "",
        "arm": label,
        "seed": run.config["seed"],
        "config": run.config,
        "images": [row["images"] for row in validations],
        "validation_losses": [row["validation_losses"] for row in validations],
        "validation_timesteps": validations[0]["validation_timesteps"],
        "fluctuation": float(fluctuation(late).median()) if len(late) > 1 else math.nan,
    }


def _interval(name: str, differences: NDArray[Any], undo: Any = float) -> dict[str, float]:
    """Mean of paired differences (S,) and the ends of its 95 % interval, NaN for one seed."""
    mean, half = map(float, t_interval(differences))
    return {name: undo(mean), f"{name}_low": undo(mean - half), f"{name}_high": undo(mean + half)}


def _row(
    records: pandas.DataFrame,
    loss: Mapping[int, Curve],
    bits: Mapping[int, Curve],
    baseline_loss: Mapping[int, Curve],
    baseline_bits: Mapping[int, Curve],
) -> dict[str, Any]:
    """The columns of one arm that are about it and the baseline alone; curves by seed."""
    log_ratios = []
    bits_differences = []
    reach = {}
    baseline_reach = {}
    for seed, (images, values) in loss.items():
        goal = baseline_loss[seed][1][-1]
        log_ratios.append(math.log(values[-1] / goal))
        bits_differences.append(bits[seed][1][-1] - baseline_bits[seed][1][-1])
        reach[seed] = images_to_threshold(images, values, goal)
        baseline_reach[seed] = images_to_threshold(*baseline_loss[seed], goal)
    last_losses = [losses[-1] for losses in records.validation_losses]
    row = {
        "images": records.images.iloc[0][-1],
        "loss": float(np.mean(last_losses)),
        "reached": sum(map(math.isfinite, reach.values())),
        "reach": math.nan,
    }
    row.update(_interval("ratio", np.array(log_ratios), math.exp))
    row.update(_interval("bits", np.array(bits_differences)))
    if row["reached"] == len(reach):
        found = speedup(baseline_reach, reach)
        row["reach"] = math.exp(np.mean(np.log(list(reach.values()))))
        row.update(speedup=found.ratio, speedup_low=found.low, speedup_high=found.high)
    row["fluctuation"] = float(np.mean(records.fluctuation.to_numpy()))
    return row


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare finished runs; the arm of the first is the baseline.

    Runs that differ in the seed alone are one arm, and arms are compared on the seeds that all of
    them have, paired: runs of one seed share initial weights, images, timesteps and noise. Raises
    RunError for runs that are not finished, were validated on different things (the message names
    the fields), are of one arm, or share no seed.
    """
    import pandas

    arms = _arms(runs)
    seeds = _common_seeds(arms)
    baseline = next(iter(arms))
    records = pandas.DataFrame(
        [_record(label, runs_of[seed]) for label, runs_of in arms.items() for seed in seeds]
    )
    loss_curves = race_curves(records, "validation")
    bits_curves = race_curves(records, "bits")

    images: dict[str, Array] = {}
    losses: dict[str, Array] = {}
    rows: dict[str, dict[str, Any]] = {}
    for label in arms:
        own = records[records.arm == label]
        key = ("", label)
        images[label] = np.array(own.images.iloc[0])
        losses[label] = np.array(own.validation_losses.tolist())
        rows[label] = _row(
            own,
            loss_curves[key],
            bits_curves[key],
            loss_curves["", baseline],
            bits_curves["", baseline],
        )
    table = pandas.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    timesteps = np.array(records.validation_timesteps[0])
    low = timesteps < runs[0].config["num_timesteps"] / 2
    last = np.array([of_arm[:, -1] for of_arm in losses.values()])  # (arms, S, V)
    halves = np.stack([last[:, :, low].mean(2), last[:, :, ~low].mean(2)], axis=-1)
    mean_halves = halves.mean(1)  # (arms, 2)
    table["low_noise"] = mean_halves[:, 0]
    table["high_noise"] = mean_halves[:, 1]
    table["non_dominated"] = pareto.non_dominated(mean_halves)
    on_front = [pareto.non_dominated(halves[:, i]) for i in range(len(seeds))]
    table["front_share"] = np.mean(on_front, axis=0)
    return Comparison(seeds, timesteps, images, losses, table)


def draw(comparison: Comparison) -> Figure:
    """For each arm the geometric-mean loss against images, and by timestep the last loss as a ratio."""
    import matplotlib.pyplot as plt

    plots.use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    baseline = next(iter(comparison.losses))
    last = comparison.losses[baseline][:, -1]

    every = np.unique(np.concatenate([*comparison.images.values()]))
    curves = {}
    for label, losses in comparison.losses.items():
        own = []
        for ln_loss in np.log(losses).mean(2):
            # Between an arm's own validations the line that is drawn anyway, beyond them nothing.
            own.append(np.interp(every, comparison.images[label], ln_loss, np.nan, np.nan))
        curves[label] = np.exp(own)
    plots.trajectories(left, every, curves, log=True)
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
        xlabel="timestep (0 = clean)",
        ylabel=f"last loss over that of {baseline}",
        title=title,
    )
    return fig
