"""dysigma train"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from .common import _pairs


def _add_train(commands: Any) -> None:
    from ..training.config import TrainConfig

    parser = commands.add_parser(
        "train",
        help="train a diffusion model into a run folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a diffusion model with a loss weighting. The run folder gets config.json, metrics.jsonl,\n"
        "summary.json, checkpoint/, samples.png, and pipeline/, which opens with DDPMPipeline.from_pretrained.",
        epilog="examples:\n"
        "  dysigma train --out runs/first                                       a minute on a CPU\n"
        "  dysigma train --weighting dy-sigma --weighting-params kappa=0.5 --out runs/second\n"
        "  dysigma train --data cifar10 --model compact --images 20000000 --batch-size 512 --out runs/gpu\n"
        "  dysigma train --resume --out runs/gpu                                go on where it stopped",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="run folder to write (must be new or empty)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --out, as configured",
    )
    parser.add_argument(
        "--config", type=Path, help="JSON or TOML file with options as below; flags win over it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("configuration")
    for f in dataclasses.fields(TrainConfig):
        default = f.default if f.default is not dataclasses.MISSING else None
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if default is not None and not isinstance(default, bool):
            text += f" (default: {default})"
        if "bool" in str(f.type):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif f.name.endswith("_params"):
            group.add_argument(flag, nargs="+", action="extend", metavar="NAME=VALUE", help=text)
        else:
            kind = int if "int" in str(f.type) else float if "float" in str(f.type) else str
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from ..runs.files import read_config
    from ..runs.folder import load_run
    from ..training.config import TrainConfig
    from ..training.loop import train

    given = {
        k: v
        for k, v in vars(args).items()
        if k in TrainConfig.__dataclass_fields__ and v is not None
    }
    given |= {
        name: _pairs(given[name])
        for name in ("weighting_params", "sampler_params")
        if name in given
    }
    base = read_config(args.config) if args.config else {}
    if args.resume and not args.config and (args.out / "config.json").exists():
        base = read_config(args.out / "config.json")
    whole = (
        args.resume
        and (args.out / "pipeline").exists()
        and load_run(args.out).summary.get("status") == "done"
    )
    run = train(
        TrainConfig.from_dict(base | given), args.out, resume=args.resume, progress=not args.quiet
    )
    if os.environ.get("RANK", "0") == "0":  # of torchrun; the process group has ended
        state = (
            "finished already (it cannot be extended; train longer in another --out)"
            if whole
            else "done"
        )
        loss, judges = (run.summary[name] for name in ("validation_loss", "validation_images"))
        print(
            f"{state}: {run.summary['images']:,} images, EMA loss {loss:.4f} on {judges} test images, {run.path}"
        )
