"""Print the lowest versions that pyproject.toml allows, as constraints: `make lowest` installs and tests them.

Arguments replace lines: torch==2.13.0 where the lowest torch has no small build.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lowest(replaced: list[str]) -> dict[str, str]:
    """Lower bound of every requirement, extras included but docs."""
    extras = [lines for name, lines in PROJECT["optional-dependencies"].items() if name != "docs"]
    lines = [
        line
        for lines in (PROJECT["dependencies"], *extras)
        for line in lines
        if not line.startswith("dysigma")
    ]
    bounds = [re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)(?:,<[\d.]+)?", line) for line in lines]
    return dict(bound.groups() for bound in bounds) | dict(line.split("==") for line in replaced)


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in lowest(sys.argv[1:]).items()), sep="\n")
