"""The records of races as tables and curves; refuses to mix records of different protocols."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..runs.files import RunError, read_json, read_metrics
from ..training.config import TrainConfig
from ..weightings.formulas import log_conversion
from .curves import Array, Curve, check_curve

if TYPE_CHECKING:
    import pandas

Curves = dict[tuple[str, str], dict[int, Curve]]  # (grid label, arm) -> seed -> curve

# What an arm may change; the rest of a configuration is the protocol.
STRATEGY = {
    "weighting",
    "weighting_params",
    "weighting_lr",
    "normalize",
    "timestep_sampler",
    "sampler_params",
    "lr",
}

# What depends on the machine and not on the protocol.
MACHINE = {"device", "data_root", "threads"}

# What the values of a metric are.
UNITS = {
    "validation": "loss",
    "bits": "bits/dim",
    "distance": "squared Fréchet distance",
    "kid": "kernel distance",
}


def _protocol_of(record: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in all records under one grid label (STRATEGY: of one arm), by name."""
    protocol = {name: value for name, value in config.items() if name not in MACHINE}
    if "features_sha256" in record:
        protocol["features_sha256"] = record["features_sha256"]
    return protocol


def load_races(*folders: Path) -> pandas.DataFrame:
    """The records of race folders as one table, a row for each training.

    Columns: grid, arm, seed; images (M,), validation_losses (M, V), validation_timesteps (V,) and
    what else the races recorded; config, the whole configuration of that training.

    Raises RunError for a folder that holds no records, and for folders that are not of one
    protocol: under a grid label everything must be equal but seed, machine and STRATEGY; under one
    arm of it STRATEGY too; and no entry may come twice. The message says what differs, and where.

    >>> load_races(Path("a-race-that-nobody-ran"))
    Traceback (most recent call last):
    dysigma.runs.files.RunError: a-race-that-nobody-ran has no records.jsonl with records; ...
    """
    import pandas

    rows: list[dict[str, Any]] = []
    first_seen: dict[tuple[str, ...], tuple[Any, Path]] = {}
    for folder in folders:
        records = read_metrics(Path(folder) / "records.jsonl")
        if not records:
            raise RunError(
                f"{folder} has no records.jsonl with records; dysigma race SPEC --out {folder} "
                "writes it"
            )
        spec = read_json(Path(folder) / "race.json")
        for record in records:
            label = record["grid"]
            arm = record["arm"]
            config = race_config(spec, label, arm).to_dict()
            for name, value in _protocol_of(record, config).items():
                scope = (label, arm, name) if name in STRATEGY else (label, name)
                known, where = first_seen.setdefault(scope, (value, folder))
                if known != value:
                    raise RunError(
                        f"races of different protocols cannot be compared: {name} of {label}, {arm} "
                        f"is {value!r} in {folder} and {known!r} in {where}"
                    )
            rows.append({**record, "config": config})
    if not rows:
        raise RunError("no race folder was given")
    table = pandas.DataFrame(rows)
    twice = table[table.duplicated(["grid", "arm", "seed"])]
    if len(twice):
        entry = twice.iloc[0]
        raise RunError(
            f"{entry.grid}, {entry.arm}, seed {entry.seed} is recorded more than once in "
            f"{[str(folder) for folder in folders]}; give each record once"
        )
    return table


def entries_of_a_seed(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """(grid label, arm) of all trainings of one seed, in the order of the specification.

    >>> arms = {"const": {}, "min-snr": {}}
    >>> entries_of_a_seed({"arms": arms, "grid": {"x0": {}, "epsilon": {"arms": ["const"]}}})
    [('x0', 'const'), ('x0', 'min-snr'), ('epsilon', 'const')]
    """
    entries = []
    for label, fields in spec["grid"].items():
        for arm in spec["arms"]:
            if arm in fields.get("arms", spec["arms"]):
                entries.append((label, arm))
    return entries


def race_config(spec: dict[str, Any], label: str, arm: str) -> TrainConfig:
    """The configuration of an arm under a grid label, seed aside.

    The arm overrides the grid entry, which overrides the base.

    >>> spec = {"base": {"lr": 1e-3}, "grid": {"x0": {"prediction": "x0"}}, "arms": {"slow": {"lr": 1e-4}}}
    >>> config = race_config(spec, "x0", "slow")
    >>> config.prediction, config.lr
    ('sample', 0.0001)
    """
    fields = {**spec["base"], **spec["grid"][label], **spec["arms"][arm]}
    fields.pop("arms", None)  # of the grid entry: which arms are raced under it
    return TrainConfig.from_dict(fields)


def _geometric_mean(losses: torch.Tensor) -> Array:
    """Over timesteps: (M, V) -> (M,)."""
    return losses.log().mean(1).exp().numpy()


def _diffusion_bits(losses: torch.Tensor, timesteps: list[int], config: dict[str, Any]) -> Array:
    """Diffusion term of the ELBO in bits per dimension, (M, V) -> (M,) (Kingma et al. 2021).

    Half the integral of the epsilon loss over log-SNR, by trapezoids between the first and the last
    validation timestep: what lies beyond them is left out.
    """
    schedule = TrainConfig.from_dict(config).noise_schedule()
    log_snr = schedule.log_snr
    to_x0 = log_conversion(log_snr, config["prediction"], schedule.is_flow)
    to_epsilon = (log_snr + to_x0).exp()
    at = torch.tensor(timesteps)
    nats = torch.trapezoid(losses * to_epsilon[at], -log_snr[at]) / 2
    return (nats / math.log(2)).numpy()


def _values(row: dict[str, Any], metric: str) -> Any:
    """The values of a metric along one training, (M,)."""
    sampled = {"distance": "distances", "kid": "kids"}
    if metric in sampled:
        values = row.get(sampled[metric])
        if not isinstance(values, list):
            raise KeyError(
                f"no metric {metric!r} in these records: the race sampled no images "
                "(distance_images), or is older than that metric"
            )
        return values
    losses = torch.tensor(row["validation_losses"], dtype=torch.float64)
    if metric == "validation":
        return _geometric_mean(losses)
    return _diffusion_bits(losses, row["validation_timesteps"], row["config"])


def race_curves(table: pandas.DataFrame, metric: str) -> Curves:
    """Curves by (grid label, arm) and seed, of a table of load_races; empty where one diverged.

    metric: "validation", the geometric mean over timesteps of validation losses; "bits", the
    diffusion term of the ELBO between the first and the last validation timestep, in bits per
    dimension; "distance" and "kid", of sampled images. KeyError for any other, or for one that the
    records do not have; ValueError where a KID, unbiased, is not positive.

    >>> import pandas
    >>> row = {"grid": "x0", "arm": "const", "seed": 7, "images": [10, 20], "distances": [4.0, 2.0]}
    >>> race_curves(pandas.DataFrame([row]), "distance")
    {('x0', 'const'): {7: (array([10., 20.]), array([4., 2.]))}}
    """
    if metric not in UNITS:
        raise KeyError(f"no metric {metric!r}; there are {', '.join(UNITS)}")
    curves: Curves = {}
    for row in table.to_dict("records"):
        if isinstance(row.get("diverged"), str):
            curve = check_curve(np.empty(0), np.empty(0))
        else:
            curve = check_curve(row["images"], _values(row, metric))
        curves.setdefault((row["grid"], row["arm"]), {})[row["seed"]] = curve
    return curves
