"""The README's Python runs as printed, its commands are those of the command line, its numbers those of the results."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

import dysigma
from dysigma.cli.main import make_parser
from dysigma.lab.convergence import (
    compare_across,
    load_races,
    race_curves,
    race_table,
    thresholds_at,
)
from dysigma.lab.race import Race
from dysigma.training import TrainConfig
from dysigma.weightings import SCALARIZATION_RULES, VARIANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "data/RESULTS.md").read_text()
REFERENCE = ROOT / "notebooks/reference"
PAGES = {
    name: (REFERENCE / f"{name}.md").read_text()
    for name in ("recipes", "weightings", "commands", "reliability", "setup")
}
ALL = "\n".join([README, *PAGES.values()])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", ALL, re.S | re.M)
SHELL = [
    re.split(r"\s+#", line)[0]
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
]
# Commands between the lines too, and what --help gives as examples; an ellipsis stands for options.
INLINE = re.findall(r"`(?:torchrun --nproc_per_node \d -m )?(dysigma [a-z][^`]*)`", ALL + RESULTS)
ENTRIES = (ROOT / "data/gpu-backlog.md").read_text().split("\n- [")[1:]
JOBS = [
    job
    for entry in ENTRIES
    if "*ready*" in entry
    for job in re.findall(r"`(dysigma [^`]+)`", entry)
]
CAPSTONE = re.findall(
    r"^# (dysigma .*)$",
    (ROOT / "notebooks/14_text_guided_and_capstone.py").read_text(),
    re.M,
)
COMMANDS = [line for line in SHELL if line.startswith("dysigma ")] + INLINE + JOBS + CAPSTONE


def test_every_block_is_python_or_shell_and_every_python_block_runs_as_printed():
    assert {language for language, _ in BLOCKS} == {"python", "diff", "bash", ""}
    blocks = [block for language, block in BLOCKS if language == "python"]
    namespace: dict = {}
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, namespace)
    assert namespace["loss"].isfinite()


def test_shell_blocks_hold_commands_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    known = {"dysigma", "python3", "pip", "pytest", "ruff", "jupyter", "sphinx-build", "make"}
    assert len(SHELL) > 15
    for line in SHELL:
        words = shlex.split(line)
        assert words[0] in known, line
        assert words[0] != "make" or words[1] in targets, line


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_of_the_command_line(command, capsys):
    words = [word for word in shlex.split(command)[1:] if word not in ("...", "…")]
    out = [] if "--out" in words or words[0] != "train" else ["--out", "x"]
    try:
        args = make_parser().parse_args(words + out)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if args.command == "race":
        assert Race.read(ROOT / args.spec).arms
    if args.command == "train" and not args.resume:
        names = {
            name: value for name, value in vars(args).items() if name in TrainConfig.__annotations__
        }
        TrainConfig.from_dict({name: value for name, value in names.items() if value is not None})


def test_the_levels_of_a_flow_and_of_edm_are_as_printed():
    of_flow, of_edm = re.findall(r"`([^`]*\.log\(\))`", PAGES["recipes"])
    flow, s = dysigma.NoiseSchedule.flow(50), torch.arange(1, 50) / 50
    torch.testing.assert_close(
        eval(of_flow, {"s": s}).double(), flow.log_snr[:-1], rtol=1e-4, atol=1e-4
    )
    sigma = torch.tensor([0.01, 1.0, 80.0])
    torch.testing.assert_close(eval(of_edm, {"sigma": sigma}), (1 / sigma**2).log())


def test_the_weightings_of_the_table_exist():
    section = PAGES["weightings"]
    first_cells = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", section, re.M)
    named = re.findall(r"`([\w-]+)`", " ".join(first_cells))
    assert len(named) > 8
    assert set(named) <= set(dysigma.WEIGHTINGS)
    for option in [*VARIANTS, *SCALARIZATION_RULES]:
        assert f'`"{option}"`' in section, f"{option} is not on the page of weightings"


@pytest.mark.parametrize("page", ["README.md", "data/RESULTS.md", "data/README.md"])
def test_links_pictures_and_scripts_exist(page):
    path = ROOT / page
    text = path.read_text()
    for target, section in re.findall(
        r"""(?:\]\(|src=")(?!http)([^)#"]*)(?:#([^)]*))?[)"]""", text
    ):
        to = path.parent / target if target else path
        assert to.exists(), target
        titles = re.findall("^#+ (.*)$", to.read_text(), re.M) if section else []
        assert section in [
            "",
            *(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles),
        ], section
    for script in re.findall(r"`python (\S+\.py)", text):
        assert (ROOT / script).exists(), script


def test_each_number_of_the_race_stands_on_page_12():
    """Ratios with an interval, as `2.39 [1.81, 3.16]`."""
    race = " ".join(RESULTS.split("\n## Front")[0].split())
    rows = re.findall(r"(\d+\.\d+) \[(\d+\.\d+), (\d+\.\d+)\]", race)
    page = (ROOT / "notebooks/12_the_convergence_race.ipynb").read_text()
    assert len(rows) > 30
    assert [row for row in rows if "{} [{}, {}]".format(*row) not in page] == []


def test_the_ends_of_the_longer_race_are_those_of_its_records():
    section = RESULTS.split("## A longer race, begun")[1].split("\n## ")[0]
    longer = load_races(ROOT / "data/runs/race-cifar10-levels")
    networks = {"x0": "image", "epsilon": "noise"}
    assert section.count("| image |") + section.count("| noise |") == len(longer)
    for row in longer.itertuples():
        network = networks[row.grid.split()[-1]]
        assert f"| {network} | {row.arm} | {row.seed} | {row.distances[-1]:.2f} |" in section


def test_the_table_of_the_readme_follows_from_the_records():
    runs = ROOT / "data/runs"
    by_target = load_races(runs / "race-cifar10-cpu-distance-x0")
    curves = race_curves(by_target, "distance")
    levels = thresholds_at(curves, "const-x0", (0.5,))
    within = race_table(by_target, "distance", levels, "const-x0")
    both = load_races(
        runs / "race-cifar10-cpu-distance-x0", runs / "race-cifar10-cpu-distance-epsilon"
    )
    across = compare_across(both, "distance", ("cifar10 epsilon", "const-eps"), (0.5, 0.8))

    def cell(row):
        return f"{row.estimate:.1f} ({row.estimate_low:.1f} to {row.estimate_high:.1f})"

    lines = [line for line in README.splitlines() if line.startswith("| the ")]
    for arm in ("dy-sigma", "min-snr"):
        assert cell(within[within.arm == arm].iloc[0]) in lines[0]
        of_images = across[(across.arm == arm) & (across.grid == "cifar10 sample")]
        assert cell(of_images[of_images.level == "fraction 0.8"].iloc[0]) in lines[2]
        of_noise = across[(across.arm == arm) & (across.grid == "cifar10 epsilon")]
        assert cell(of_noise[of_noise.level == "fraction 0.5"].iloc[0]) in lines[3]
    fields = load_races(runs / "race-fields")
    of_noise_by_bits = load_races(runs / "race-cifar10-cpu-epsilon-repeat")
    for line, table, metric, baseline, name in (
        (lines[1], fields[fields.grid == "fields sample"], "distance", "const-x0", "Const"),
        (lines[4], of_noise_by_bits, "bits", "const-eps", "plain"),
    ):
        levels = thresholds_at(race_curves(table, metric), baseline, (0.5,))
        found = race_table(table, metric, levels, baseline).set_index("arm").loc["dy-sigma"]
        ends = f"{name} {found.baseline_end:.2f}, Dy-Sigma {found.arm_end:.2f}"
        assert f"| {found.threshold:.2f}; {ends} |" in line
    ends = {arm: within[within.arm == arm].iloc[0].arm_end for arm in ("dy-sigma", "min-snr")}
    said = " ".join(README.split())
    assert f"{ends['min-snr']:.2f} for Min-SNR on the image" in said
    assert f"{ends['dy-sigma']:.2f} for Dy-Sigma on the image" in said
    assert f"{across.baseline_end.iloc[0]:.2f} for ordinary DDPM training" in said


def test_scripts_for_a_cluster_parse_as_shell_and_as_commands():
    for block in (block for language, block in BLOCKS if language == "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        assert (
            make_parser()
            .parse_args(re.search(r"-m dysigma (train .*) \$\(", block)[1].split())
            .command
            == "train"
        )


def test_the_table_of_reliability_says_what_its_records_say():
    faults, mutants = (
        json.loads((ROOT / f"data/runs/{name}/{name}.json").read_text())
        for name in ("faults", "mutants")
    )
    possible = sum(module["possible"] for module in mutants["modules"].values())
    tensors = f"{faults['differing_tensors']} of {faults['tensors']:,} tensors"
    rows = f"{faults['differing_rows']} of {faults['rows']:,} log lines"
    assert f"{faults['kills']} kills, {len(faults['cases'])} weightings" in PAGES["reliability"]
    assert tensors in PAGES["reliability"] and rows in PAGES["reliability"]
    assert (
        f"{mutants['mutants']} of {possible:,} mutants | {mutants['caught']} caught"
        in PAGES["reliability"]
    )
    assert all(mutants["survivors"].values()), "a survivor without a reason"
    report = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]["report"]
    assert f"at least {report['fail_under']} %" in PAGES["reliability"]
