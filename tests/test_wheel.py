"""What pip installs is the package: wheel and sdist are built, and the wheel works alone, far from the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.relative_to(ROOT)
    for path in (ROOT / "dysigma").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
}
# What the extras and a developer bring: a user of the package alone has none of it.
ABSENT = [
    "accelerate",
    "IPython",
    "ipykernel",
    "jupytext",
    "nbclient",
    "nbformat",
    "moocore",
    "torchjd",
    "pytest",
]


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built without a network from a copy: a build leaves files beside its sources."""
    wanted = 77  # of build-system.requires
    if int(importlib.metadata.version("setuptools").split(".")[0]) < wanted:
        pytest.skip(
            f"the build backend, setuptools {wanted} or newer, is not installed, and tests download nothing"
        )
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dysigma", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"
    names = [
        run("-c", code.format(kind), out, cwd=source).stdout.split()[-1]
        for kind in ("wheel", "sdist")
    ]
    return [out / name for name in names]


def test_wheel_and_sdist_hold_the_package_and_no_more(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as file:
        names = {Path(name) for name in file.namelist()}
        (metadata,) = (file.read(str(name)).decode() for name in names if name.name == "METADATA")
    assert {path for path in names if path.parts[0] == "dysigma"} == FILES
    assert {path.parts[0] for path in names} == {
        "dysigma",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    assert "License-Expression: MIT" in metadata and "Requires-Python: >=3.11" in metadata
    bare = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert not [
        line for line in bare if any(name.lower() in line.lower() for name in [*ABSENT, "jupyter"])
    ]
    with tarfile.open(sdist) as file:
        inside = {Path(*Path(item.name).parts[1:]) for item in file if item.isfile()}
    assert {path for path in inside if path.parts[:1] == ("dysigma",)} == FILES
    assert {Path("README.md"), Path("LICENSE"), Path("pyproject.toml")} <= inside
    assert not [
        path for path in inside if "tests" in path.parts
    ]  # they need the rest of the repository


TRAIN = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2:])  # so that importing them fails
from dysigma.cli import main
import dysigma
assert dysigma.__file__.startswith(sys.argv[1]), dysigma.__file__
options = "--model micro --image-size 8 --train-images 64 --batch-size 16 --images 64 --num-timesteps 50 --device cpu"
options += " --validation-images 4 --validation-timesteps 5 --quiet --weighting dy-sigma --out run"
assert main(["train", *options.split()]) == 0
assert main("sample run --num-images 2 --steps 2".split()) == 0
"""


@pytest.mark.slow
def test_the_installed_wheel_trains_outside_the_checkout(built, tmp_path):
    target, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = (
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
    )
    run(*pip, "--target", target, built[0])
    assert (target / "dysigma" / "py.typed").exists() and (target / "bin" / "dysigma").exists()
    env = os.environ | {"PYTHONPATH": str(target)}
    done = run("-c", TRAIN, target, *ABSENT, cwd=work, env=env)
    assert (work / "run" / "pipeline" / "model_index.json").exists()
    assert "accelerate" not in done.stderr
    version = run(target / "bin" / "dysigma", "--version", cwd=work, env=env).stdout
    assert version == f"dysigma {importlib.metadata.version('dysigma')}\n"
