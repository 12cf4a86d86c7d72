"""Test vectors: known weights at known noise levels, as JSON that a project in any language can read.

    python data/vectors/write.py --out data/vectors

One file for each schedule. Numbers are computed in float64 and written with 13 significant digits.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dysigma import NoiseSchedule, make_sampler
from dysigma.auditing.mistakes import X0_CODE, code_of
from dysigma.auditing.tables import parameters_of
from dysigma.weightings import log_weight

FORMAT = "dysigma loss-weight vectors"
# Counts up when a number or the meaning of a key changes; new entries alone change nothing.
VERSION = 1

NUM_LEVELS = 32
DIGITS = 13

# Relative errors that a right implementation keeps. In single precision 1 - alphas_cumprod loses digits at clean steps.
TOLERANCE = {"float64": 1e-9, "float32": 2e-3}

VECTOR_SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": NoiseSchedule.linear(),
    "scaled-linear": NoiseSchedule.scaled_linear(),
    "scaled-linear-zero-terminal-snr": NoiseSchedule.scaled_linear(zero_terminal_snr=True),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "flow": NoiseSchedule.flow(),
    "flow-shift-3": NoiseSchedule.flow(shift=3.0),
}

# Besides every formula with its defaults, parameters that papers and trainers use.
PARAMETERS: tuple[tuple[str, dict[str, float]], ...] = (
    ("min-snr", {"gamma": 1.0}),
    ("min-snr", {"gamma": 20.0}),
    ("soft-min-snr", {"gamma": 5.0}),
    ("max-snr", {"gamma": 1.0}),
    ("p2", {"k": 1.0, "gamma": 0.5}),
    ("edm", {"sigma_data": 1.0}),
    ("sigmoid", {"bias": -3.0}),
)

DENSITY_CASES: tuple[tuple[str, dict[str, float]], ...] = (
    ("uniform", {}),
    ("logit-normal", {}),
    ("logit-normal", {"mean": 0.5, "std": 0.6}),
    ("laplace", {"scale": 1.0}),
    ("beta", {"alpha": 2.0, "beta": 2.0}),
    ("beta", {"alpha": 2.5, "beta": 1.0}),
    ("mode", {"scale": 1.29}),
    ("cosmap", {}),
)

# Density times weight is an objective, here with the plain error of the path and with Min-SNR.
OBJECTIVES = ("logit-normal", "laplace")


def _rounded(values: Tensor, digits: int = DIGITS) -> list[float | None]:
    """Numbers with so many significant digits; -inf, the log-SNR of pure noise, becomes null."""
    numbers = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [number if math.isfinite(number) else None for number in numbers]


def _targets(schedule: NoiseSchedule) -> list[str]:
    path = "flow_prediction" if schedule.is_flow else "v_prediction"
    # Where SNR = 0 the noise says nothing about x0, and its error has no weight.
    has_epsilon = bool(schedule.log_snr.isfinite().all())
    return ["epsilon", "sample", path] if has_epsilon else ["sample", path]


def _weights(schedule: NoiseSchedule, steps: Tensor) -> list[dict[str, Any]]:
    defaults = [(name, parameters_of(name)) for name in (*X0_CODE, "elbo")]
    entries = []
    for name, params in (*defaults, *PARAMETERS):
        for target in _targets(schedule):
            weight = log_weight(name, schedule, target, **params).exp()
            formula = code_of(name, target, params) if name in X0_CODE else None
            entries.append(
                {
                    "name": name,
                    "params": params,
                    "target": target,
                    "formula": formula,
                    "mean": _rounded(weight.mean()[None])[0],
                    "weight": _rounded(weight[steps]),
                }
            )
    return entries


def _densities(schedule: NoiseSchedule, steps: Tensor) -> list[dict[str, Any]]:
    entries = []
    for name, known in DENSITY_CASES:
        params: dict[str, Any] = dict(known)
        density = make_sampler(name, schedule, **params).probabilities() * schedule.num_timesteps
        entries.append({"name": name, "params": params, "density": _rounded(density[steps])})
    return entries


def _objectives(schedule: NoiseSchedule, steps: Tensor) -> list[dict[str, Any]]:
    path = _targets(schedule)[-1]
    entries = []
    for sampler in OBJECTIVES:
        params: dict[str, Any] = dict(
            next(known for name, known in DENSITY_CASES if name == sampler)
        )
        density = make_sampler(sampler, schedule, **params).probabilities()
        for name in ("const-flow" if schedule.is_flow else "const-v", "min-snr"):
            product = density * log_weight(name, schedule, path).exp()
            entries.append(
                {
                    "density": {"name": sampler, "params": params},
                    "weight": {"name": name, "params": parameters_of(name)},
                    "target": path,
                    "objective": _rounded((product / product.mean())[steps]),
                }
            )
    return entries


def vectors(name: str) -> dict[str, Any]:
    """The record of one of VECTOR_SCHEDULES, as its file holds it."""
    schedule = VECTOR_SCHEDULES[name]
    last = schedule.num_timesteps - 1
    steps = torch.linspace(0, last, NUM_LEVELS, dtype=torch.float64).round().long()
    return {
        "format": FORMAT,
        "version": VERSION,
        "schedule": name,
        "path": "flow" if schedule.is_flow else "variance-preserving",
        "num_timesteps": schedule.num_timesteps,
        "relative_tolerance": TOLERANCE,
        "timesteps": steps.tolist(),
        # All its digits: at clean timesteps 1 - alphas_cumprod has few of its own.
        "alphas_cumprod": _rounded(schedule.alphas_cumprod[steps], digits=17),
        "snr": _rounded(schedule.log_snr[steps].exp()),
        "log_snr": _rounded(schedule.log_snr[steps]),
        "weights": _weights(schedule, steps),
        "densities": _densities(schedule, steps),
        "objectives": _objectives(schedule, steps),
    }


def as_text(record: dict[str, Any]) -> str:
    """JSON with one entry on a line, so that a change of one weighting is a change of one line."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(entry) for entry in value)
            text = f"[\n  {rows}\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    body = ",\n".join(parts)
    return f"{{\n{body}\n}}\n"


def write_vectors(out: Path) -> list[Path]:
    """Write every file of vectors into a folder; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in VECTOR_SCHEDULES:
        path = out / f"{name}.json"
        path.write_text(as_text(vectors(name)), encoding="utf-8")
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Write the vectors from the command line."""
    parser = argparse.ArgumentParser(description="Write the test vectors.")
    parser.add_argument("--out", type=Path, default=Path("data/vectors"))
    for path in write_vectors(parser.parse_args(argv).out):
        print(path)


if __name__ == "__main__":
    main()
