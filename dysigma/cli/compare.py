"""dysigma compare: finished runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, add_command, check_writable, write_record


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "compare",
        run,
        help="finished runs against the first: losses, ELBO, images to its loss; paired by seed, with intervals",
        description="Runs that differ in the seed alone are one row, an arm. The first is the baseline. Columns: loss, "
        "of the last validation; ratio, of that loss to the baseline's, geometric mean over timesteps; bits, difference "
        "of the ELBO's diffusion term in bits/dim; reached, in how many seeds the row reaches the loss at which the "
        "baseline ends; reach, after how many images; speedup, how many times fewer images that is; fluctuation of "
        "weights; mean losses of the two halves of the timesteps, whether no other row is lower in both, and in which "
        "share of seeds.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="two run folders or more, the baseline first",
    )
    parser.add_argument("--out", type=Path, help="folder for compare.json and compare.png")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..lab.compare import compare, draw
    from ..runs.folder import load_run
    from ..runs.provenance import provenance

    if args.out:
        check_writable(args.out)
    result = compare([load_run(path) for path in args.runs])
    seeds = ", ".join(map(str, result.seeds))
    intervals = "one seed, so no intervals"
    if len(result.seeds) > 1:
        intervals = "95 % intervals over paired seeds"
    print(f"against {result.table.index[0]}; seeds {seeds}: {intervals}")
    left_out = len(args.runs) - len(result.seeds) * len(result.table)
    print(f"left out: {left_out} runs of seeds that not all arms have\n" if left_out else "")
    print(result)
    if args.out:
        record = {
            **result.to_dict(),
            "runs": [path.resolve().name for path in args.runs],
            "provenance": provenance(),
        }
        write_record(args.out, "compare", record, draw(result))
