"""Change one thing at a time in the code of a package, and see whether the unit tests notice.

    python scripts/mutants.py server/stepwell_server/core               a hundred mutants, always the same ones
    python scripts/mutants.py PACKAGE --json before.json                write the results to a file
    python scripts/mutants.py PACKAGE --replay before.json              try the mutants of that file again

A mutant is one small defect: another comparison, operator or number, a negated condition, a missing statement. Mutants
are made only inside functions, where a unit test runs the line. Each mutant runs in a fork of one pytest session that
has collected all tests, so nothing is imported twice. The fork replaces the code of the function, then runs the tests
that reach the line, until one fails; of a parametrized test three cases. A mutant that no test notices survives.

First all tests run once without a mutant, in forks too. That shows which test reaches which line, and which tests fail
anyway and so cannot notice anything. The result is kept in out/mutants/ while no code changes.

A replay finds each mutant by the shapes of its function's statements: their syntax trees without names, texts, comments
and annotations. So words may change in between, and functions may move to another module.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import gc
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import coverage
import pytest

KEPT = Path("out/mutants")
#: A mutant times out if one test takes so long. In a run without a mutant each test has ten times as long.
TIMEOUT_S = 60
#: A mutant may allocate without end.
MEMORY_BYTES = 4 << 30
#: A function is the one of an earlier run if it has at least this share of its statements.
ENOUGH = 0.5
#: What a fork's exit code says. A mutant is invalid if its code cannot replace the function's.
KILLED, SURVIVED, TIMED_OUT, INVALID, GONE = "killed", "survived", "timed out", "invalid", "gone"
CODES = {0: SURVIVED, 1: KILLED, 2: INVALID, -signal.SIGALRM: TIMED_OUT}
OTHERS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.Break: (ast.Continue,),
    ast.Continue: (ast.Break,),
}


class Function(NamedTuple):
    """A function that no other function contains, with the shapes of its statements."""

    path: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    module: ast.Module
    shapes: list[str]

    def likeness(self, row: dict[str, Any]) -> float:
        """Share of statements in common with the function of an earlier mutant, and more for an equal name."""
        mine, others = Counter(self.shapes), Counter(row["shapes"])
        share = sum((mine & others).values()) / sum((mine | others).values())
        same_name = self.name.rpartition(".")[2] == row["function"].rpartition(".")[2]
        return share + 0.2 * same_name + 0.1 * (self.path == row["path"]) if share >= ENOUGH else 0


class Mutant(NamedTuple):
    """One change: what a file of results has of it, and what makes it in the tree."""

    function: Function
    row: dict[str, Any]
    apply: Callable[[], None]

    def code(self) -> types.CodeType:
        """The code of the changed function. It changes the tree, so call it once, in a fork."""
        self.apply()
        function = self.function.node
        first = min(node.lineno for node in [function, *function.decorator_list])
        codes = [
            compile(
                ast.fix_missing_locations(self.function.module),
                str(Path(self.function.path).resolve()),
                "exec",
                dont_inherit=True,
            )
        ]
        for code in codes:
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        return next(c for c in codes if (c.co_qualname, c.co_firstlineno) == (self.function.name, first))


def shape(node: ast.AST) -> str:
    """A node without names, texts and annotations, and without the statements in it."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return "text"
    parts = [type(node).__name__]
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if field in {"annotation", "returns", "decorator_list", "ctx", "kind", "type_comment"}:
            continue
        if not any(isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case) for child in children):
            parts += [
                shape(child)
                if isinstance(child, ast.AST)
                else "name"
                if isinstance(child, str)
                else repr(child)
                for child in children
            ]
    return f"({' '.join(parts)})"


def short(node: ast.AST) -> str:
    """A number for a shape."""
    return f"{zlib.crc32(shape(node).encode()):08x}"


def functions(folder: str) -> Iterator[Function]:
    """The functions of all modules in a folder, without those inside others."""
    for path in sorted(Path(folder).rglob("*.py")):
        module = ast.parse(path.read_text())
        within: list[tuple[str, ast.AST]] = [("", module)]
        for prefix, node in within:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
                within += [(inner, child) for child in ast.iter_child_nodes(node)]
                continue
            shapes = [
                short(found)
                for found in ast.walk(node)
                if isinstance(found, ast.stmt)
                and not (isinstance(found, ast.Expr) and isinstance(found.value, ast.Constant))
            ]
            yield Function(str(path), prefix + node.name, node, module, shapes)


def evaluated(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.AST, str, int, ast.AST, ast.stmt]]:
    """What a function evaluates when it runs: owner, field and index of each node, the node, and its statement."""
    for field, value in ast.iter_fields(node):
        if field not in {"annotation", "returns", "decorator_list"}:
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST) and not isinstance(child, ast.arguments | ast.JoinedStr):
                    inner = child if isinstance(child, ast.stmt) else statement
                    yield node, field, index, child, inner
                    yield from evaluated(child, inner)


def replacements(owner: ast.AST, field: str, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What stands for a node in its mutants, and what each of these mutants is called."""
    for at, old in enumerate(getattr(node, "ops", [getattr(node, "op", node)])):
        for new in OTHERS.get(type(old), ()):
            changed = copy.copy(node)
            if isinstance(changed, ast.Compare):
                changed.ops = [*changed.ops[:at], cast(ast.cmpop, new()), *changed.ops[at + 1 :]]
            elif isinstance(changed, ast.BoolOp | ast.BinOp | ast.AugAssign):
                vars(changed)["op"] = new()
            elif isinstance(node, ast.Break | ast.Continue):
                changed = new()
            else:
                continue  # the operator itself, which is changed with its owner
            yield f"{type(old).__name__} to {new.__name__}", changed
    match node:
        case ast.UnaryOp(op=ast.Not()):
            yield "no not", node.operand
        case ast.Constant(value=bool()):
            yield "other truth", ast.Constant(not node.value)
        case ast.Constant(value=int() | float() as number):
            yield "next number", ast.Constant(number + 1)
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield "return None", ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield "no statement", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "no statement", ast.Pass()
    plain = isinstance(node, ast.expr) and not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp)
    if field == "test" and isinstance(owner, ast.If | ast.While | ast.IfExp) and plain:
        yield "negated", ast.UnaryOp(ast.Not(), cast(ast.expr, node))


def mutants(function: Function) -> Iterator[Mutant]:
    """All mutants of a function. Operator, shape and place among equal ones identify each."""
    places: Counter[tuple[str, str]] = Counter()
    for owner, field, index, node, statement in evaluated(function.node, function.node):
        for operator, new in replacements(owner, field, node):
            key = operator, short(statement)
            row = {
                "path": function.path,
                "function": function.name,
                "operator": operator,
                "shape": key[1],
                "place": places[key],
                "line": getattr(node, "lineno", statement.lineno),
                "statement_line": statement.lineno,
                "before": ast.unparse(node),
                "after": ast.unparse(ast.fix_missing_locations(copy.deepcopy(new))),
                "shapes": function.shapes,
            }
            yield Mutant(function, row, functools.partial(put, owner, field, index, new))
            places[key] += 1


def put(owner: ast.AST, field: str, index: int, new: ast.AST) -> None:
    """Put a node in the place of another."""
    if isinstance(getattr(owner, field), list):
        getattr(owner, field)[index] = new
    else:
        setattr(owner, field, new)


class Session:
    """A plugin of pytest that runs mutants in place of the tests it has collected."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.items: list[pytest.Item] = []
        self.contexts = coverage.CoverageData(no_disk=True)
        self.lines: dict[Path, dict[int, list[str]]] = {}

    def pytest_sessionstart(self) -> None:
        """Choose how tests with random examples fail."""
        import hypothesis  # pytest warns if it is imported before

        # a test that fails need not search for the smallest example
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", hypothesis.settings.default, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep which tests fail."""
        self.failed += [report.nodeid] if report.failed else []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try all mutants."""
        if session.testsfailed:
            raise session.Interrupted("not all tests could be collected")
        self.items = session.items
        self._read_contexts()
        planned = self._replayed() if self.options.replay else self._sampled()
        # what reaches them is looked up here, as a fork cannot read the data
        tried = [mutant for _, mutant in planned if mutant]
        codes = self._in_forks(
            [functools.partial(self._try, mutant, self._tests_of(mutant)) for mutant in tried]
        )
        for row, mutant in planned:
            # a crash is noticed, too
            status = CODES.get(next(codes), KILLED) if mutant else GONE
            self.results.append({**row, "status": status})
        return True

    def _read_contexts(self) -> None:
        """Which test reaches which line, from a run of all tests without a mutant, or from the file of an earlier run."""
        top, tests = (Path(name).parts[0] for name in (self.options.package, self.options.tests))
        digest = hashlib.sha256()
        for path in sorted(found for folder in {top, tests} for found in Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
        kept, failed = (KEPT / f"{kind}-{digest.hexdigest()[:12]}" for kind in ("reached", "failed"))
        measure = functools.partial(
            coverage.Coverage, str(kept), config_file=False, include=[f"{Path(top).resolve()}/*"]
        )
        if not kept.exists():
            KEPT.mkdir(parents=True, exist_ok=True)
            failed.write_text("")
            print(f"\nRunning {len(self.items)} tests without a mutant")
            workers = range(self.options.workers)
            works = [
                functools.partial(self._record, at, measure(data_suffix=str(at)), failed) for at in workers
            ]
            if any(self._in_forks(works)):
                raise RuntimeError("a run without a mutant ended early")
            measure().combine()
        self.contexts = measure().get_data()
        self.contexts.read()
        left_out = set(failed.read_text().splitlines())
        print(*(f"\nfails without a mutant, so it is left out: {test}" for test in left_out))
        self.items = [item for item in self.items if item.nodeid not in left_out]

    def _record(self, at: int, measured: coverage.Coverage, failed: Path) -> int:
        """Run the tests of some files, and write down which lines each of them reaches."""
        files = sorted({item.path for item in self.items})[at :: self.options.workers]
        measured.start()
        self._run(
            [item for item in self.items if item.path in files], 10 * TIMEOUT_S, measured.switch_context
        )
        measured.stop()
        measured.save()
        with failed.open("a") as file:
            file.writelines(f"{test}\n" for test in self.failed)
        return 0

    def _run(self, items: Sequence[pytest.Item], timeout_s: int, before: Callable[[str], object]) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for item, following in itertools.zip_longest(items, items[1:]):
            before(item.nodeid)
            signal.alarm(timeout_s)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _sampled(self) -> list[tuple[dict[str, Any], Mutant | None]]:
        """Some of the mutants on lines that tests reach."""
        found = [mutant for function in functions(self.options.package) for mutant in mutants(function)]
        reached = [mutant for mutant in found if self._tests_of(mutant)]
        print(f"\n{len(found)} mutants can be made, {len(reached)} where a test reaches the line")
        random.seed(self.options.seed)
        chosen = random.sample(reached, min(self.options.count, len(reached)))
        return [(mutant.row, mutant) for mutant in chosen]

    def _replayed(self) -> list[tuple[dict[str, Any], Mutant | None]]:
        """The mutants of an earlier run, None for each whose code is no longer there."""
        known, planned = list(functions(Path(self.options.package).parts[0])), []
        for row in json.loads(Path(self.options.replay).read_text()):
            best = max(known, key=lambda function: function.likeness(row))
            keys = ("operator", "shape", "place")
            like = [found for found in mutants(best) if all(found.row[key] == row[key] for key in keys)]
            mutant = like[0] if like and best.likeness(row) else None
            before = {key: row[key] for key in ("path", "function", "line", "status")}
            planned.append(({**(mutant.row if mutant else row), "was": before}, mutant))
        return planned

    def _tests_of(self, mutant: Mutant) -> list[pytest.Item]:
        """The tests that reach its line, those of its module first; of a parametrized one some cases."""
        path = Path(mutant.function.path)
        if path not in self.lines:
            self.lines[path] = self.contexts.contexts_by_lineno(str(path.resolve()))
        lines = self.lines[path]
        names = set(lines.get(mutant.row["line"]) or lines.get(mutant.row["statement_line"]) or ())
        cases: dict[str, list[pytest.Item]] = {}
        for item in self.items if names else ():
            if item.nodeid in names:
                cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        chosen = [
            item
            for found in cases.values()
            for item in found[:: max(1, -(-len(found) // self.options.cases))]
        ]
        return sorted(
            chosen, key=lambda item: (path.stem not in item.path.stem, path.parent.name not in item.path.stem)
        )

    def _try(self, mutant: Mutant, tests: Sequence[pytest.Item]) -> int:
        """Put the mutant in place of its function, and run the tests that reach it until one fails."""
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        code = mutant.code()
        gc.unfreeze()
        for found in gc.get_objects():
            if isinstance(found, types.FunctionType):
                old = found.__code__
                where = old.co_filename, old.co_qualname, old.co_firstlineno
                if where == (code.co_filename, code.co_qualname, code.co_firstlineno):
                    found.__code__ = code
        self._run(tests, TIMEOUT_S, lambda _: self.failed and os._exit(1))
        return 1 if self.failed else 0

    def _in_forks(self, works: Sequence[Callable[[], int]]) -> Iterator[int]:
        """The exit codes of works, some of which run at a time."""
        codes: dict[int, int] = {}
        running: dict[int, int] = {}
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            try:
                for at, work in [*enumerate(works), *[(0, None)] * self.options.workers]:
                    while len(running) == self.options.workers or (running and not work):
                        pid, status = os.wait()
                        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                        end_group(pid)
                        print(".", end="", flush=True)
                    if work:
                        running[fork(work, Path(folder) / str(at))] = at
            finally:
                for pid in running:
                    end_group(pid)
        return iter([codes[at] for at in range(len(works))])


def fork(work: Callable[[], int], folder: Path) -> int:
    """Work in a process group and a folder of its own, without output."""
    if pid := os.fork():
        return pid
    code = 2
    try:
        os.setpgid(0, 0)
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        folder.mkdir()
        os.environ |= dict.fromkeys(("TMPDIR", "PYTEST_DEBUG_TEMPROOT", "XDG_DATA_HOME"), str(folder))
        tempfile.tempdir = str(folder)
        code = work()
    finally:
        os._exit(code)


def end_group(pid: int) -> None:
    """End a fork, and what its tests have started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """The survivors, the counts and the score, as text."""
    counts = Counter(row["status"] for row in results)
    lines = [
        f"survived: {row['path']}:{row['line']} in {row['function']}\n  - {row['before']}\n  + {row['after']}"
        for row in results
        if row["status"] == SURVIVED
    ]
    killed = counts[KILLED] + counts[TIMED_OUT]
    tried = killed + counts[SURVIVED]
    lines.append(
        ", ".join(f"{counts[status]} {status}" for status in (KILLED, SURVIVED, TIMED_OUT, INVALID, GONE))
    )
    return "\n".join([*lines, f"score: {killed} of {tried} killed, {killed / max(1, tried):.1%}"])


def main() -> int:
    """Try mutants, and print what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", help="folder of the code to change")
    parser.add_argument("--count", type=int, default=100, help="how many mutants (100)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (1)")
    parser.add_argument("--cases", type=int, default=3, help="how many cases of a parametrized test (3)")
    parser.add_argument("--replay", help="try the mutants of this file, which --json wrote")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--tests", default="tests/unit", help="folder of the tests (tests/unit)")
    parser.add_argument("--workers", type=int, default=2, help="how many mutants at a time (2)")
    options = parser.parse_args()
    os.environ.setdefault(
        "GRPC_VERBOSITY", "NONE"
    )  # or tests/conftest.py starts gRPC, whose threads no fork has
    session = Session(options)
    own = ["-q", "--capture=sys", "--timeout=0", "-pno:cacheprovider", "-pno:xdist"]
    code = pytest.main([options.tests, *own], plugins=[session])
    print(f"\n{summary(session.results)}")
    if options.json:
        Path(options.json).write_text(json.dumps(session.results, indent=1) + "\n")
    return 0 if session.results else int(code) or 1


if __name__ == "__main__":
    sys.exit(main())
