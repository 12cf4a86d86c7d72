"""How much sooner one arm of a race reaches what another reaches: images to a threshold, paired by seed.

A curve is (images (M,), values (M,)) of something positive for which lower is better. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..intervals import holm
from ..runs.files import RunError, read_json, read_metrics
from ..schedule import make_schedule
from ..training.config import TrainConfig
from ..weightings.formulas import log_conversion

if TYPE_CHECKING:
    import pandas


Array = NDArray[np.float64]

Curves = dict[tuple[str, str], dict[int, tuple[Array, Array]]]  # (grid label, arm) -> seed -> curve

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


def _curve(images: ArrayLike, values: ArrayLike) -> tuple[Array, Array]:
    n, v = np.asarray(images, dtype=np.float64), np.asarray(values, dtype=np.float64)
    rising = (
        n.ndim == 1
        and np.isfinite(n).all()
        and (np.diff(n, prepend=-1.0) > 0).all()
        and (n >= 0).all()
    )
    if not rising or n.shape != v.shape or not np.isfinite(v).all() or not (v > 0).all():
        raise ValueError(
            f"need images (M,), rising from 0 or more, and values (M,), positive; got {n} and {v}"
        )
    return n, v


def _until(n: Array, v: Array, end: float) -> tuple[Array, Array]:
    """(ln images, ln values) from the first images above 0 to `end`, where the value is interpolated."""
    n, v = n[n > 0], v[n > 0]
    if not (len(n) and n[0] < end <= n[-1]):
        raise ValueError(f"nothing is extrapolated: {end} images are not within {n}")
    last = np.interp(np.log(end), np.log(n), np.log(v))
    return np.log(np.append(n[n < end], end)), np.append(np.log(v[n < end]), last)


def _worst_to_come(v: Array) -> Array:
    return np.maximum.accumulate(v[::-1])[::-1]


def images_to_threshold(
    images: ArrayLike, values: ArrayLike, threshold: float, *, slack: float = 0.0
) -> float:
    """Images until a curve (M,), (M,) first reaches a threshold and stays: the first sustained crossing.

    Sustained: that value is at most threshold and all later ones are at most threshold (1 + slack); the last
    evaluation may be the first. Between evaluations ln value is linear in ln images, or in images where they start at
    0, the untrained network. inf: never (censored; so is an empty curve, of a training that diverged). Reached at the
    first evaluation: its images, an upper bound. Raises ValueError for what is no curve, threshold <= 0, slack < 0.
    """
    n, v = _curve(images, values)
    if not (0 < threshold < math.inf and 0 <= slack < math.inf):
        raise ValueError(
            f"threshold must be finite and > 0, slack finite and >= 0; got {threshold!r} and {slack!r}"
        )
    reached = np.flatnonzero((v <= threshold) & (_worst_to_come(v) <= threshold * (1 + slack)))
    if not len(reached) or reached[0] == 0:
        return float(n[0]) if len(reached) else math.inf
    i = int(reached[0])
    share = math.log(v[i - 1] / threshold) / math.log(v[i - 1] / v[i])
    return float(n[i] * share if n[i - 1] == 0 else n[i - 1] * (n[i] / n[i - 1]) ** share)


def log_area(images: ArrayLike, values: ArrayLike, until: float | None = None) -> float:
    """Mean of ln value over ln images, by trapezoids: a whole curve (M,), (M,) in one number, without a threshold.

    From the first images above 0 to `until`, by default the last; ValueError if that is not within the record.
    """
    n, v = _curve(images, values)
    x, y = _until(n, v, n.max(initial=0.0) if until is None else until)
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))


class Speedup(NamedTuple):
    """Images to a threshold of a baseline over those of an arm: above 1, the arm is sooner. See `speedup`."""

    ratio: float  # geometric mean over seeds
    bound: str  # "=", or with censored pairs ">=", "<=" (of the truth to `ratio`) or "?"
    low: float  # 95 % interval
    high: float
    p: float  # two-sided, of ratio 1
    pairs: int
    censored_baseline: int  # how often the baseline never gets there
    censored_arm: int
    correlation: (
        float  # of ln images of baseline and arm over seeds: what common random numbers bought
    )
    detectable: (
        float  # smallest ratio above 1 found with 80 % power, at this spread and number of pairs
    )


def speedup(
    baseline: Mapping[int, float], arm: Mapping[int, float], budget: float = math.nan
) -> Speedup:
    """Compare images to a threshold, given by seed, over the common seeds; inf is censored.

    Interval and p: t on ln ratio; detectable: noncentral t, two-sided 5 %. With any pair censored these are NaN and the
    ratio is a bound, with `budget`, the images of the whole record, for what exceeded it: ">=" if baselines alone are
    censored, "<=" if arms alone, else "?" and NaN, as also where an untrained network, 0 images, meets the threshold.
    Correlation: over pairs that both reach, NaN below three. Raises ValueError for no common seed, or images outside
    [0, budget].
    """
    from scipy import optimize, stats

    seeds = sorted(set(baseline) & set(arm))
    n = np.array([[images[seed] for seed in seeds] for images in (baseline, arm)], dtype=np.float64)
    finite = np.isfinite(n)
    if not seeds or not (n >= 0).all() or (n[finite] > budget).any():
        raise ValueError(
            f"need common seeds and images in [0, {budget}]; got baseline {baseline}, arm {arm}"
        )
    bound = (
        ("=", ">=", "<=", "?")[(not finite[0].all()) + 2 * (not finite[1].all())]
        if n.all()
        else "?"
    )
    ln_n = np.log(np.where(finite & (n > 0), n, math.nan if bound == "?" else budget))
    low = high = p = correlation = detectable = math.nan
    if bound == "=" and len(seeds) > 1:
        test, df, critical = (
            stats.ttest_rel(*ln_n),
            len(seeds) - 1,
            stats.t.ppf(0.975, len(seeds) - 1),
        )
        low, high, p = (*(math.exp(end) for end in test.confidence_interval()), float(test.pvalue))
        # In standard errors. A find on the wrong side has a chance below 1e-4 and is left out.
        shift = optimize.brentq(lambda shift: stats.nct.sf(critical, df, shift) - 0.8, 0.0, 100.0)
        detectable = math.exp(shift * stats.sem(ln_n[0] - ln_n[1]))
    both = ln_n[:, np.isfinite(ln_n).all(0) & finite.all(0)]
    if both.shape[1] > 2 and both.std(1).all():
        correlation = float(np.corrcoef(both)[0, 1])
    ratio, (lost, lost_arm) = (
        math.exp((ln_n[0] - ln_n[1]).mean()),
        (int(k) for k in (~finite).sum(1)),
    )
    return Speedup(ratio, bound, low, high, p, len(seeds), lost, lost_arm, correlation, detectable)


def load_races(*folders: Path) -> pandas.DataFrame:
    """The records of race folders as one table: as load_race, with the configuration of each as the column config.

    Raises RunError unless under one grid label all is equal but seed, machine and STRATEGY, under one arm of it the
    STRATEGY too, and no entry comes twice; it says what differs.
    """
    import pandas

    rows, first = [], dict[tuple[str, ...], tuple[Any, Path]]()
    for folder in folders:
        spec = read_json(folder / "race.json")
        for row in read_metrics(folder / "records.jsonl"):
            label, arm = row["grid"], row["arm"]
            config = TrainConfig.from_dict(
                spec["base"] | spec["grid"][label] | spec["arms"][arm]
            ).to_dict()
            rows.append(row | {"config": config})
            for key, value in config.items():
                scope = (label, arm, key) if key in STRATEGY else (label, key)
                known, where = first.setdefault(scope, (value, folder))
                if known != value and key not in ("device", "data_root"):
                    what = (
                        f"{key} of {label}, {arm} is {value!r} in {folder} and {known!r} in {where}"
                    )
                    raise RunError(f"races of different protocols cannot be compared: {what}")
    table = pandas.DataFrame(rows)
    if not rows or table.duplicated(["grid", "arm", "seed"]).any():
        raise RunError(
            f"{[str(folder) for folder in folders]} must hold records, each grid label, arm and seed once"
        )
    return table


def _values(row: dict[str, Any], metric: str) -> ArrayLike:
    losses, config = torch.tensor(row["validation_losses"], dtype=torch.float64), row["config"]
    if metric == "validation":
        return losses.log().mean(1).exp().numpy()
    if metric == "bits":
        options = {"zero_terminal_snr": config["zero_terminal_snr"]}
        log_snr = make_schedule(config["schedule"], config["num_timesteps"], **options).log_snr
        to_epsilon = (log_snr + log_conversion(log_snr, config["prediction"])).exp()
        at = torch.tensor(row["validation_timesteps"])
        return (torch.trapezoid(losses * to_epsilon[at], -log_snr[at]) / 2 / math.log(2)).numpy()
    if metric == "distance" and row["config"]["distance_images"]:
        return row["distances"]
    raise KeyError(
        f"no metric {metric!r} here; there are validation, bits, and distance if the race sampled images"
    )


def race_curves(table: pandas.DataFrame, metric: str) -> Curves:
    """Curves by (grid label, arm) and seed, of a table of load_races; empty where training diverged.

    metric: "validation", the geometric mean over timesteps of validation losses; "bits", the diffusion term of the
    ELBO between the first and the last validation timestep, bits per dimension, by trapezoids over log_snr; "distance",
    of sampled images. KeyError for any other.
    """
    curves: Curves = {}
    for row in table.to_dict("records"):
        diverged = isinstance(row.get("diverged"), str)
        curve = _curve([], []) if diverged else _curve(row["images"], _values(row, metric))
        curves.setdefault((row["grid"], row["arm"]), {})[row["seed"]] = curve
    return curves


def thresholds_at(
    curves: Curves, baseline: str, fractions: Sequence[float]
) -> dict[str, list[float]]:
    """Thresholds by rule, per grid label: what the baseline stays below from these fractions of its images on.

    The median over its seeds. Raises ValueError for a fraction not beyond the first evaluation, or a diverged seed.
    """
    thresholds = {}
    for (label, arm), runs in curves.items():
        if arm == baseline:
            kept = [(n, _worst_to_come(v)) for n, v in runs.values()]
            ends = [
                [_until(n, v, part * n.max(initial=0.0))[1][-1] for n, v in kept]
                for part in fractions
            ]
            thresholds[label] = [math.exp(np.median(values)) for values in ends]
    return thresholds


def race_table(
    table: pandas.DataFrame,
    metric: str,
    thresholds: Mapping[str, Sequence[float]],
    baseline: str,
    slack: float = 0.0,
) -> pandas.DataFrame:
    """A row per grid label, threshold and arm: Speedup over the baseline, and p_holm.

    p_holm: Holm's adjustment over thresholds x arms of a grid label. Raises KeyError for a label without baseline.
    """
    import pandas

    curves, rows = race_curves(table, metric), []
    for label, levels in thresholds.items():
        arms = {arm: runs for (grid, arm), runs in curves.items() if grid == label}
        if baseline not in arms:
            raise KeyError(f"no arm {baseline!r} under grid label {label!r}; have {list(curves)}")
        budget = max(n[-1] for runs in arms.values() for n, _ in runs.values() if len(n))
        tests: list[dict[str, Any]] = []
        for level in levels:
            images = {
                arm: {
                    seed: images_to_threshold(*curve, level, slack=slack)
                    for seed, curve in runs.items()
                }
                for arm, runs in arms.items()
            }
            reached = images.pop(baseline)
            about = {"grid": label, "threshold": level}
            tests += [
                about | {"arm": arm} | speedup(reached, n, budget)._asdict()
                for arm, n in images.items()
            ]
        adjusted = holm([test["p"] for test in tests])
        rows += [test | {"p_holm": p} for test, p in zip(tests, adjusted, strict=True)]
    return pandas.DataFrame(rows)
