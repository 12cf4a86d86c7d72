"""dysigma audit"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import Commands, add_command, prepare_figure, read_pairs
from .schedules import add_sampler, add_schedule, read_schedule


def add(commands: Commands) -> None:
    """Add the command and its options."""
    from ..auditing import LEVELS
    from ..schedule import PREDICTION_TYPES

    parser = add_command(
        commands,
        "audit",
        run,
        help="which weighting is this, really? compare a loss weight with what it claims to be",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Call a function with noise levels and compare the weights that it returns with a named\n"
        "weighting, up to a factor. Exit code 0: it agrees; 1: it does not; 2: bad input.",
        epilog="examples:\n"
        "  dysigma audit my_trainer:loss_weight --target v_prediction --claims min-snr --params gamma=5\n"
        "  dysigma audit my_trainer:loss_weight --target epsilon --scheduler path/to/pipeline --json\n"
        "  dysigma audit const-flow --target flow_prediction --timestep-sampler logit-normal",
    )
    parser.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="takes a tensor of levels, returns weights on the target's error; or a weighting's name",
    )
    parser.add_argument("--target", required=True, metavar="|".join(PREDICTION_TYPES))
    parser.add_argument("--claims", metavar="NAME", help="the weighting that it claims to be")
    parser.add_argument(
        "--params", nargs="+", default=[], metavar="NAME=VALUE", help="of the claim, as gamma=5"
    )
    add_schedule(parser)
    add_sampler(parser)
    parser.add_argument(
        "--as",
        dest="as_",
        default="snr",
        choices=LEVELS,
        help="what the function takes (default: snr); sigma is SNR^-1/2, on a flow the share of noise",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="figure to write")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..auditing import audit
    from ..auditing.report import weights_of
    from ..checks import find_named
    from ..samplers import make_sampler
    from ..weightings import WEIGHTINGS

    if args.figure:
        prepare_figure(args.figure)
    schedule = read_schedule(args, args.target)
    function = args.function
    if function not in WEIGHTINGS:
        function = find_named(function, WEIGHTINGS, "weight function")
    sampler = None
    if args.timestep_sampler:
        # "weight" and "sqrt-weight" draw by the weights that are under audit.
        weights = weights_of(function, schedule, args.target, args.as_)
        sampler = make_sampler(
            args.timestep_sampler,
            schedule,
            weighting=weights,
            **read_pairs(args.sampler_params),
        )
    found = audit(
        function, schedule, args.target, args.claims, read_pairs(args.params), args.as_, sampler
    )
    if args.figure:
        from ..plots import audit_figure

        audit_figure(found).savefig(args.figure, dpi=110)
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
    return 0 if found.agrees else 1
