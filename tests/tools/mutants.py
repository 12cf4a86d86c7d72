"""Change one operator or number of a module at a time and see whether the module's own tests notice.

    python tests/tools/mutants.py --each 40 --out data/runs/mutants/mutants.json

The formulas of the weightings stand in tables, which mutmut leaves whole: it changes undecorated functions alone. Here
mutants live in memory, a forked process each. They are drawn by a hash of their names, so an edit elsewhere leaves the
draw as it is. Called again, it keeps what was caught and tries the survivors once more. Each survivor needs its reason
in SAME.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
# The tests of a module are those of its room: tests/test_gradients.py for gradients.estimator.
MODULES = (
    "schedule.noise",
    "schedule.tables",
    "schedule.reading",
    "schedule.writing",
    "pareto",
    "gradients.estimator",
    "gradients.measure",
    "gradients.report",
    "gradients.statistics",
    "weightings.base",
    "weightings.formulas",
    "weightings.adaptive",
    "weightings.gramian",
    "weightings.dy_sigma",
)
PAIRS = (
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn),
    (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.Pow, ast.Mult),
    (ast.FloorDiv, ast.Mult), (ast.Mod, ast.Mult),
)  # fmt: skip
SWAP = {b: a for a, b in PAIRS if b is not ast.Mult} | dict(PAIRS) | {ast.Mult: ast.Div}
# Why no test can tell a mutant from the original.
CHECK = "a check of the code on itself: the two are made with one length a few lines above"
SAME: dict[str, str] = {
    "gradients.estimator.GramianAccumulator.add: strict=True → strict=False": CHECK,
}  # fmt: skip


def changed(node: ast.AST) -> ast.AST | None:
    """What stands in place of a node: another operator, another number, nothing returned; None for other nodes."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in SWAP:
            return ast.BinOp(left, SWAP[type(op)](), right)
        case ast.BoolOp(op, values):
            return ast.BoolOp(SWAP[type(op)](), values)
        case ast.Compare(left, [op, *ops], comparators):
            return ast.Compare(left, [SWAP[type(op)](), *ops], comparators)
        case ast.UnaryOp(_, operand):
            return operand
        case ast.Constant(bool(value)):
            return ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            return ast.Constant(value + 1)
        case ast.Return(ast.expr()):
            return ast.Return(ast.Constant(None))
    return None


def places(node: ast.AST, inside: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, function that makes the change in the tree) of every mutant; not in annotations and error messages."""
    for field, value in list(ast.iter_fields(node)):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.Raise | ast.JoinedStr | ast.Import
            ):
                continue
            if new := changed(child):
                ast.fix_missing_locations(ast.copy_location(new, child))

                def put(
                    it: Any, field: str = field, i: int = i, many: bool = isinstance(value, list)
                ) -> None:
                    if many:
                        getattr(node, field)[i] = it
                    else:
                        setattr(node, field, it)

                whole = not isinstance(child, ast.Constant | ast.UnaryOp)
                before = ast.unparse(child if whole else node)
                put(new)
                after = ast.unparse(new if whole else node)
                put(child)
                yield f"{inside}: {shown(before, after)}", lambda put=put, new=new: put(new)
            scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
            yield from places(child, f"{inside}.{child.name}" if scope else inside)


def shown(before: str, after: str) -> str:
    """Both on one line, cut to what differs and a little around it."""
    start, end = (
        next(
            (
                i
                for i, (a, b) in enumerate(zip(before[::step], after[::step], strict=False))
                if a != b
            ),
            0,
        )
        for step in (1, -1)
    )
    parts = (text[max(0, start - 40) : len(text) - max(0, end - 40)] for text in (before, after))
    return " → ".join(" ".join(part.split()) for part in parts)


def source_of(module: str) -> Path:
    """The file of a module of the package, as gradients.estimator."""
    return (ROOT / "dysigma").joinpath(*module.split(".")).with_suffix(".py")


def tests_of(module: str) -> Path:
    """The file of the tests of the module's room."""
    return ROOT / "tests" / f"test_{module.split('.')[0]}.py"


def parse(module: str) -> tuple[ast.Module, dict[str, Callable[[], None]]]:
    """(syntax tree, mutants by name; one that occurs again gets its number)."""
    tree = ast.parse(source_of(module).read_text())
    found: dict[str, Callable[[], None]] = {}
    seen: Counter[str] = Counter()
    for name, change in places(tree, module):
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} #{seen[name]}"] = change
    return tree, found


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package from a tree, and leaves the others to the usual finders."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self.name = f"dysigma.{module}"
        self.path = source_of(module)
        self.tree = tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module: Any) -> None:
        module.__file__ = str(self.path)
        exec(compile(self.tree, module.__file__, "exec"), module.__dict__)


class Ordered:
    """A plugin of pytest: quick tests first, by the times in a file, which it writes when there is none."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, json.loads(path.read_text()) if path.exists() else None
        self.times: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: (self.known or {}).get(item.nodeid, 0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.times[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if self.known is None:
            self.path.write_text(json.dumps(self.times))


def run(module: str, name: str | None, times: Path, seconds: int) -> str:
    """The module's tests on one mutant, or on the original: caught, survived, broken (no import) or too long."""
    pid = os.fork()
    if not pid:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        resource.setrlimit(
            resource.RLIMIT_CPU, (seconds, seconds)
        )  # of the processor: a busy machine changes nothing
        tree, found = parse(module)
        if name:
            found[name]()
        sys.meta_path.insert(0, Mutated(module, tree))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", str(tests_of(module))]
        os._exit(pytest.main(options, plugins=[Ordered(times)]))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return "too long" if -code in (signal.SIGKILL, signal.SIGXCPU) else "broken"
    return {0: "survived", 1: "caught"}.get(code, "broken")


def finished(record: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The record with its sums, and with a reason, or none yet, for each survivor."""
    outcomes = {
        name: out
        for module in record["modules"].values()
        for name, out in module["outcomes"].items()
    }
    left = {name: SAME.get(name, "") for name, outcome in outcomes.items() if outcome == "survived"}
    sums = {
        "seed": args.seed,
        "mutants": len(outcomes),
        "caught": len(outcomes) - len(left),
        "survived": len(left),
    }
    command = f"python tests/tools/mutants.py --each {args.each} --seed {args.seed}"
    return {"command": command} | record | sums | {"survivors": left}


def trial(module: str, record: dict[str, Any], args: argparse.Namespace, times: Path) -> None:
    """Try the drawn mutants of one module; the record is written after each."""
    found, before = parse(module)[1], os.times().children_user
    if run(module, None, times, 600) != "survived":
        raise SystemExit(f"{tests_of(module)} fails without a mutant")
    limit = 20 + 5 * int(os.times().children_user - before)
    drawn = sorted(found, key=lambda name: hashlib.sha256(f"{args.seed} {name}".encode()).digest())[
        : args.each
    ]
    known = record["modules"].get(module, {}).get("outcomes", {})
    outcomes = {name: known[name] for name in drawn if known.get(name, "survived") != "survived"}
    for name in tqdm([name for name in drawn if name not in outcomes], desc=module, unit="mutant"):
        outcomes[name] = run(module, name, times, limit)
        counts = {"possible": len(found), "tried": len(outcomes)} | Counter(outcomes.values())
        record["modules"][module] = counts | {
            "outcomes": {name: outcomes[name] for name in drawn if name in outcomes}
        }
        record |= finished(record, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=40, help="mutants of each module (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON record to write, or to go on with"
    )
    args = parser.parse_args()
    # What takes long to import and holds nothing of the package; every fork begins with it.
    for name in (
        "diffusers.models.unets.unet_2d",
        "hypothesis",
        "scipy.optimize",
        "scipy.stats",
        "torchjd.aggregation",
    ):
        importlib.import_module(name)
    record = json.loads(args.out.read_text()) if args.out.exists() else {"modules": {}}
    with tempfile.TemporaryDirectory() as folder:
        for module in MODULES:
            trial(module, record, args, Path(folder) / module)
    print(*(f"{key}: {value}" for key, value in record.items() if key != "modules"), sep="\n")
    return int("" in record["survivors"].values())


if __name__ == "__main__":
    sys.exit(main())
