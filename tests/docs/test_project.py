"""The project files agree with each other, so that every way of installing gives the same thing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from lowest import lowest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dysigma

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
INSTALL = '-e ".[notebooks,test]"'
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [
    *PROJECT["project"]["dependencies"],
    *(line for extra in EXTRAS.values() for line in extra),
]


def pins() -> dict[str, Version]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines)
    }


def closure(lines: list[str]) -> set[str]:
    """Canonical names of all that the requirements bring here, through the metadata of what is installed."""
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        names.add(name)
        for wanted in ({""} | requirement.extras) - {e for n, e in seen if n == name}:
            seen.add((name, wanted))
            try:
                brought = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            todo += [(Requirement(line), wanted) for line in brought]
    return names - {"dysigma"}


def test_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dysigma.__version__ == PROJECT["project"]["version"] == citation["version"] == changes[0]


def test_conda_environment_adds_only_python_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert environment["dependencies"] == [
        f"python={python}",
        "pip",
        {"pip": [INSTALL.replace('"', "")]},
    ]
    assert INSTALL in MAKEFILE
    assert {"notebooks", "test"} <= set(EXTRAS)


def test_tools_check_the_oldest_python():
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_each_requirement_is_pinned_within_its_range(line):
    requirement = Requirement(line)
    if requirement.name == "dysigma":
        assert requirement.extras <= set(EXTRAS)
    else:
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_pins_are_public_releases():
    assert not [name for name, version in pins().items() if version.local]


def test_all_that_make_installs_is_pinned():
    installed = {
        canonicalize_name(d.name): Version(d.version).public
        for d in importlib.metadata.distributions()
    }
    other = [
        name
        for name, version in pins().items()
        if installed.get(name, str(version)) != str(version)
    ]
    if other:
        pytest.skip(f"not the tested set of versions: {other}")
    brought = closure(
        [*PROJECT["project"]["dependencies"], *EXTRAS["notebooks"], *EXTRAS["test"], *EXTRAS["moo"]]
    )
    assert {"torch", "sympy", "pyzmq", "quadprog"} <= brought  # the walk went deep
    assert not brought - set(pins())


def test_the_lowest_versions_are_the_bounds_of_pyproject():
    bounds = lowest(["torch==2.13.0"])
    assert bounds.pop("torch") == "2.13.0"
    ranges = {r.name: r.specifier for r in map(Requirement, REQUIREMENTS) if r.name != "dysigma"}
    for name, version in bounds.items():
        assert version in ranges[name] and f">={version}" in {str(part) for part in ranges[name]}
    assert set(bounds) == set(ranges) - {Requirement(line).name for line in EXTRAS["docs"]} - {
        "torch"
    }


def recipes() -> dict[str, list[str]]:
    """target -> the commands that it runs once set up, without what only make needs."""
    found: dict[str, list[str]] = {}
    for target, body in re.findall(
        r"^([a-z-]+):[^\n]*##[^\n]*\n((?:\t[^\n]*\n)*)", MAKEFILE, re.MULTILINE
    ):
        commands = re.findall(r"^\t\$\(BIN\)/(.*)$", body, re.MULTILINE)
        found[target] = [
            re.sub(r" \$\(\w+\)| --ignore=\S+", "", command).replace("python -m ", "")
            for command in commands
        ]
    return found


@pytest.mark.parametrize("target", ["setup", "run", "test", "lab", "notebooks", "docs", "bench"])
def test_readme_gives_each_target_as_plain_commands(target):
    readme = (ROOT / "notebooks/reference/setup.md").read_text()
    assert f"make {target}" in readme
    commands = (
        [f"pip install -c constraints.txt {INSTALL}"] if target == "setup" else recipes()[target]
    )
    assert commands
    missing = [command for command in commands if command not in readme.replace("python -m ", "")]
    assert not missing


def test_every_target_is_listed_by_help_and_declared_phony():
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert targets == phony == set(recipes())


def test_citation_names_the_paper_and_what_this_is():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert (citation["cff-version"], citation["title"], citation["type"]) == (
        "1.2.0",
        "dysigma",
        "software",
    )
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert paper["title"].startswith("Dy-Sigma: ")
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Ye", "Liu", "Qin"]
    assert "independent reconstruction of Dy-Sigma from the abstract" in citation["message"]


def test_ci_runs_what_the_reader_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert "make test" in script.read_text().splitlines()


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]),
    ids=lambda path: path.name,
)
def test_workflows_and_forms_are_yaml_and_run_targets_that_exist(path):
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    assert set(re.findall(r"run: make ([a-z-]+)", text)) <= set(recipes())
    for module, name in re.findall(r"from (dysigma[\w.]*) import (\w+)", text):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_contributing_names_files_and_targets_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= set(recipes())
    files = re.findall(r"`([\w/]+/[\w./]+\.\w+)`", text)
    missing = [
        name
        for name in files
        if not (ROOT / name).exists() and not (ROOT / "dysigma" / name).exists()
    ]
    assert files and [name for name in missing if "NN_" not in name] == []


def test_notebooks_and_records_show_no_machine_paths():
    files = [
        *ROOT.glob("notebooks/**/*.ipynb"),
        *ROOT.glob("data/**/*.json"),
        *ROOT.glob("figures/*.json"),
    ]
    pattern = re.compile(r"/(root|home|Users|work)/")
    found = [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text())]
    assert not found
