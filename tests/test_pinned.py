"""What users rely on stays: the public names, the commands, run folders and records of earlier versions."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import dysigma
from dysigma.cli.main import make_parser
from dysigma.lab.convergence import load_races, race_curves
from dysigma.runs import find_runs

RECORDS = Path(__file__).resolve().parent.parent / "data" / "runs"
NAMES = [
    "dysigma.NoiseSchedule.from_diffusers",
    "dysigma.NoiseSchedule.linear",
    "dysigma.NoiseSchedule.cosine",
    "dysigma.NoiseSchedule.sigmoid",
    "dysigma.WEIGHTINGS",
    "dysigma.make_weighting",
    "dysigma.make_sampler",
    "dysigma.conflicts",
    "dysigma.pareto.min_norm_weights",
    "dysigma.pareto.stationarity",
    "dysigma.pareto.non_dominated",
    "dysigma.pareto.hypervolume",
    "dysigma.train",
    "dysigma.TrainConfig",
    "dysigma.load_run",
    "dysigma.load_data",
    "dysigma.leaves",
    "dysigma.exact",
    "dysigma.convergence",
    "dysigma.testing.check_weighting",
]
WEIGHTINGS = [
    "const-x0",
    "const-eps",
    "const-v",
    "truncated-snr",
    "min-snr",
    "max-snr",
    "soft-min-snr",
    "p2",
    "debiased",
    "edm",
    "sigmoid",
    "elbo",
    "uncertainty",
    "ugd",
    "variance-aware",
    "loss-balance",
    "dy-sigma",
    "gramian",
]
SAMPLERS = ["uniform", "stratified", "logit-normal", "lognormal", "loss-second-moment"]
COMMANDS = [
    "train --out x --data cifar10 --data-root d --weighting dy-sigma --prediction epsilon --model compact "
    "--images 20000 --batch-size 128 --seed 0 --device auto --resume",
    "evaluate RUN",
    "sample RUN",
    "conflicts RUN",
    "compare A B",
    "benchmark",
    "notebooks --fast",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_where_it_was(name):
    first, *rest = name.removeprefix("dysigma.").split(".")
    found = getattr(dysigma, first, None) or importlib.import_module(f"dysigma.{first}")
    for attribute in rest:
        found = getattr(found, attribute)


def test_the_names_of_weightings_and_samplers_stay():
    assert set(WEIGHTINGS) <= set(dysigma.WEIGHTINGS)
    assert set(SAMPLERS) <= set(dysigma.TIMESTEP_SAMPLERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_the_words_that_it_took(command):
    assert make_parser().parse_args(command.split()).command == command.split()[0]


def test_an_old_run_folder_opens():
    path = RECORDS / "cifar10-cpu-small"
    run = dysigma.load_run(path)
    assert dysigma.TrainConfig.from_dict(run.config).num_steps > 0
    assert {"step", "images"} <= set(run.metrics.columns) and len(run.metrics) > 1
    (found,) = find_runs(path)
    assert found.state == "finished"


def test_an_old_race_opens_and_its_curves_are_read():
    table = load_races(RECORDS / "race-leaves")
    curves = race_curves(table, "validation")
    assert len(table) == sum(len(by_seed) for by_seed in curves.values())
    assert all(len(curve[0]) > 1 for by_seed in curves.values() for curve in by_seed.values())
