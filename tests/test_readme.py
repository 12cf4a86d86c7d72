"""The README's Python runs exactly as printed, and its table of weightings is the package's."""

import re
from pathlib import Path

import dysigma

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_python_block_runs_as_printed():
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, namespace)
    assert namespace["loss"].isfinite()


def test_every_weighting_is_named():
    for name in dysigma.WEIGHTINGS:
        assert f"`{name}`" in README, name


def test_links_and_pictures_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (root / target).exists(), target
