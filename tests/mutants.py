"""Whether the tests notice: small changes to what decides and computes, each against the tests of its file.

    python -m tests.mutants                       the sample; goes on where an interrupted run stopped
    python -m tests.mutants settle ledger         of these files alone
    python -m tests.mutants --show 1f2e3d4c       what one of them changes

The changes are cosmic-ray's, and two of our own: a statement that does nothing, a return of None. They are made in
copies of the tree. Left alone is what no test should have to notice: annotations, decorators, docstrings, assertions,
log lines, texts of messages. Which changes are tried depends on the lines themselves and on SEED, so an edit elsewhere
in a file leaves the sample of its other lines as it was.

What is killed or runs out of time is not tried again until its file changes, what survives when any test has changed.
``mutated`` says which tests are asked about which file; docs/testing.md names the survivors that change nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from parso.python.tree import ExprStmt, Name
from parso.tree import search_ancestor

from tests.mutated import TESTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / ".mutants.jsonl"
NAMED_IN = ROOT / "docs" / "testing.md"
COPIED = ("p2p_diloco", "tests", "peers", "docs", "benchmarks", "pyproject.toml", "README.md", "Makefile")

SEED = 0
A_FILE = 17
LEAST_KILLED = 0.90
MOST_NAMED = 0.05
PATIENCE = 5
"""Times as long as the tests of the file take without a change, and SPARE_S more: then the time is out."""
SPARE_S = 30.0
LONGEST_S = 600.0
"""For the tests of a file without a change."""
MEMORY_BYTES = 8 << 30
"""A loop that never ends may take no more."""

IMPORTED_ONCE = ("torch", "transformers", "hivemind", "pydantic", "hypothesis.strategies", "cryptography")
PYTEST = (
    *("-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", "tmp", "--hypothesis-profile", "brief"),
    *("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"),
)
OPERATORS = (
    *("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("NumberReplacer", "ExceptionReplacer", "ZeroIterationForLoop"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *("ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert"),
    *(
        f"ReplaceComparisonOperator_{pair}"
        for pair in ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt")
    ),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("GtE_Lt", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Mod_FloorDiv", "Pow_Mul", "LShift_RShift", "RShift_LShift")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr")),
)


class RemoveStatement:
    """Instead of a call, an assignment to an attribute or an item, an augmented assignment or a raise: nothing. Not in
    ``__init__``: an attribute that is never there ends every test."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        function = search_ancestor(node, "funcdef")
        if node.type == "simple_stmt" and (function is None or function.name.value != "__init__"):
            first = node.children[0]
            assigned = first.children[0] if isinstance(first, ExprStmt) else None
            augmented = assigned is not None and first.children[1].type == "operator" and first.children[1] != "="
            kept = assigned is not None and assigned.type in ("atom_expr", "power")
            if augmented or kept or first.type in ("atom_expr", "power", "raise_stmt"):
                yield first.start_pos, first.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0]
        node.children[0] = Name("pass", first.start_pos, prefix=first.get_first_leaf().prefix)
        return node


class ReturnNone:
    """Not instead of False: who asks cannot tell."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "return_stmt" and node.children[1] not in ("None", "False"):
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1] = parso.parse(" None").children[0]
        return node


@cache
def operators() -> dict[str, Any]:
    theirs = {name: get_operator(f"core/{name}")() for name in OPERATORS}
    return {**theirs, "RemoveStatement": RemoveStatement(), "ReturnNone": ReturnNone()}


# -- the sample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str
    """Eight hexadecimal digits: of the file's name, the line, and what is done to it."""
    path: str
    source: str

    @property
    def digest(self) -> str:
        return digest(self.path, self.source)

    def diff(self) -> str:
        lines = difflib.unified_diff(
            (ROOT / self.path).read_text().splitlines(), self.source.splitlines(), n=0, lineterm=""
        )
        return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def digest(*texts: str) -> str:
    return blake2b("\0".join(texts).encode(), digest_size=16).hexdigest()


def sample(path: str) -> list[Mutant]:
    """The A_FILE changes of one file with the smallest digests, of those that change what runs."""
    source = (ROOT / path).read_text()
    lines, tree = source.splitlines(), get_ast(source)
    candidates: list[tuple[str, str, int]] = []
    for operator_name, operator in operators().items():
        seen = Counter[str]()
        positions = (position for node in ast_nodes(tree) for position in operator.mutation_positions(node))
        for occurrence, ((row, _), _) in enumerate(positions):
            line = lines[row - 1].strip()
            name = digest(str(SEED), Path(path).stem, operator_name, line, str(seen[line]))[:8]
            seen[line] += 1
            candidates.append((name, operator_name, occurrence))
    mutants: list[Mutant] = []
    known = {what_runs(source)}
    for name, operator_name, occurrence in sorted(candidates):
        try:
            mutated = mutate_code(source, operators()[operator_name], occurrence)
            runs = what_runs(mutated)
        except (SyntaxError, AttributeError):  # cosmic-ray's ExceptionReplacer knows no dotted names
            continue
        if runs not in known:
            known.add(runs)
            mutants.append(Mutant(name=name, path=path, source=mutated))
        if len(mutants) == A_FILE:
            break
    return mutants


def what_runs(source: str) -> str:
    """The program without what no test should have to notice."""
    return ast.dump(WhatRuns().visit(ast.parse(source)))


PAIRS = ((ast.Is, ast.IsNot), (ast.Eq, ast.NotEq), (ast.Lt, ast.GtE), (ast.LtE, ast.Gt), (ast.In, ast.NotIn))
OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {**dict(PAIRS), **{right: left for left, right in PAIRS}}


class WhatRuns(ast.NodeTransformer):
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Nearly all are messages; the few that name files are left alone with them."""
        return ast.Constant("")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """``not a is b`` is ``a is not b``, and ``not not a`` is ``a``: the same mutant."""
        self.generic_visit(node)
        inner = node.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
            return inner.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.Compare) and len(inner.ops) == 1:
            return ast.Compare(inner.left, [OPPOSITE[type(inner.ops[0])]()], inner.comparators)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        """``*`` and ``/`` among the parameters decide nothing."""
        node.args, node.posonlyargs, node.kwonlyargs = [*node.posonlyargs, *node.args, *node.kwonlyargs], [], []
        node.defaults, node.kw_defaults = [*node.defaults, *(one for one in node.kw_defaults if one)], []
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Pass()

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns, node.decorator_list = None, []
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns, node.decorator_list = None, []
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value
        logs = isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("log.", "logger."))
        return ast.Pass() if logs else self.generic_visit(node)


# -- one mutant against its tests ------------------------------------------------------------------------------------


def begin(folder: str) -> None:
    """In a worker: its own copy of the tree, and what takes seconds to import; every try is a fork of it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    copy = Path(folder) / str(os.getpid())
    shutil.copytree(Path(folder) / "tree", copy)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry) != ROOT)]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this file's own package is that of ROOT, and pytest wants the copy's
    for name in IMPORTED_ONCE:
        importlib.import_module(name)


def copy_tree(target: Path) -> None:
    """So that who goes on writing meanwhile changes nothing here, and is not changed."""
    target.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)


def attempt(path: str, source: str) -> str:
    """What becomes of a file with this ``source``: "killed", "survived" or "time-out"."""
    return outcome_of(path, source, patience_s(path))


@cache
def patience_s(path: str) -> float:
    """How long the tests of a file may take. ValueError when they fail as it is."""
    began_s = time.monotonic()
    outcome = outcome_of(path, Path(path).read_text(), LONGEST_S)
    if outcome != "survived":
        raise ValueError(f"{path}: its tests fail as it is ({outcome})\n{Path('output').read_text()[-2000:]}")
    return PATIENCE * (time.monotonic() - began_s) + SPARE_S


def outcome_of(path: str, source: str, patience_s: float) -> str:
    file, compiled = Path(path), Path(cache_from_source(path))
    original = file.read_text()
    compiled.unlink(missing_ok=True)  # its time stamp may be that of the next change
    file.write_text(source)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(TESTS[path],))
    process.start()
    assert process.pid is not None
    try:
        process.join(patience_s)
        return {0: "survived", None: "time-out"}.get(process.exitcode, "killed")
    finally:
        with contextlib.suppress(ProcessLookupError):  # the tests' own processes, too
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        file.write_text(original)
        compiled.unlink(missing_ok=True)


def run_tests(tests: Sequence[str]) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    with Path("output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    code = pytest.main([*PYTEST, *tests])
    sys.stdout.flush()
    os._exit(code)


# -- the command -----------------------------------------------------------------------------------------------------


def try_all(mutants: Sequence[Mutant], jobs: int, tests: str) -> None:
    """Write what becomes of each to RESULTS, one line each, as it is known."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="p2p-diloco-") as folder,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=begin, initargs=(folder,)) as pool,
        RESULTS.open("a") as results,
    ):
        copy_tree(Path(folder) / "tree")
        running = {pool.submit(attempt, mutant.path, mutant.source): mutant for mutant in mutants}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                mutant, outcome = running[future], future.result()
                line = {"name": mutant.name, "digest": mutant.digest, "tests": tests, "outcome": outcome}
                print(json.dumps(line), file=results, flush=True)
                print(f"{done} of {len(mutants)}: {mutant.name} {mutant.path} {outcome}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def known_outcomes(tests: str) -> dict[str, str]:
    """Digest -> outcome, of those that need not be tried again."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    results = [json.loads(line) for line in lines]
    return {one["digest"]: one["outcome"] for one in results if one["outcome"] != "survived" or one["tests"] == tests}


def report(mutants: Sequence[Mutant], outcomes: dict[str, str]) -> bool:
    """Print the score and what was not noticed. Whether that is good enough."""
    named_in = NAMED_IN.read_text() if NAMED_IN.exists() else ""
    by_outcome: dict[str, list[Mutant]] = {"killed": [], "survived": [], "time-out": []}
    for mutant in mutants:
        by_outcome[outcomes[mutant.digest]].append(mutant)
    killed, survived = by_outcome["killed"], by_outcome["survived"]
    named = [mutant for mutant in survived if mutant.name in named_in]
    for title, chosen in (
        ("survived", [mutant for mutant in survived if mutant not in named]),
        ("survived, and change nothing (docs/testing.md)", named),
        ("ran out of time, and count as neither", by_outcome["time-out"]),
    ):
        print(f"\n{len(chosen)} {title}")
        for mutant in chosen:
            print(f"{mutant.name} {mutant.path}\n{mutant.diff()}")
    counted = max(len(killed) + len(survived), 1)
    print(
        f"\n{len(killed)} of {counted} killed, {len(killed) / counted:.1%}; {len(named)} change nothing, "
        f"{len(named) / counted:.1%}; {len(survived) - len(named)} to look at; {len(by_outcome['time-out'])} time-outs"
    )
    return len(killed) >= LEAST_KILLED * counted and len(named) <= MOST_NAMED * counted and len(named) == len(survived)


def main() -> int:
    parser = argparse.ArgumentParser(description="Small changes to what decides and computes: do the tests notice?")
    parser.add_argument("modules", nargs="*", help="of these alone: settle ledger ...")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--show", metavar="NAME", help="what one of them changes")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    paths = [path for path in TESTS if not options.modules or Path(path).stem in options.modules]
    mutants = [mutant for path in paths for mutant in sample(path)]
    if options.show:
        print(*(f"{m.path}\n{m.diff()}" for m in mutants if m.name == options.show), sep="\n")
        return 0
    tests = digest(*(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))))
    known = known_outcomes(tests)
    try:
        try_all([mutant for mutant in mutants if mutant.digest not in known], options.jobs, tests)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return int(not report(mutants, known_outcomes(tests)))


if __name__ == "__main__":
    sys.exit(main())
