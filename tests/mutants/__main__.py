"""`python -m tests.mutants [--only WORD] [--output FILE]`: plants faults in a copy of the sources, one at a time.

Each of them must fail the tests that the catalogue names for it; before that all those tests must pass. A fault that
passes is a survivor: its line in the table explains why, or the exit code is 1. Packages are imported once and every
fault runs in a forked process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("spot_megatron", "tools", "tests", "recipes", "benchmarks", "docker", "pyproject.toml")
OURS = ("spot_megatron", "tools", "tests", "benchmarks")
SECONDS = 900
KILLED, SURVIVED, BROKEN, TIMEOUT = "killed", "survived", "broken", "killed (time-out)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", help="faults whose area or file contains this word")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or options.only in f"{m.area} {m.path}"]
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary:
        tree = copy_tree(Path(temporary) / "tree")
        import_packages(tree)
        log = Path(temporary) / "log.txt"
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            verdict = run_tests(tree, tests, log)
            if verdict != SURVIVED:
                print(f"without a fault {tests} does not pass:\n{log.read_text()[-3000:]}")
                return 1
            print(f"passes: {tests}", flush=True)
        rows = []
        for number, mutant in enumerate(chosen, start=1):
            start = time.monotonic()
            verdict = plant(tree, mutant, log)
            rows.append((mutant, verdict))
            print(f"{number}/{len(chosen)} {verdict} in {time.monotonic() - start:.0f} s: {label(mutant)}", flush=True)
            if verdict == BROKEN:
                print(log.read_text()[-2000:])
    text = table(rows)
    print(text)
    if options.output:
        options.output.write_text(f"# Planted faults\n\n{datetime.date.today()}, `python -m tests.mutants`\n\n{text}")
    return int(any(verdict in (SURVIVED, BROKEN) and not mutant.equivalent for mutant, verdict in rows))


def copy_tree(tree: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def import_packages(tree: Path) -> None:
    """Imports every module of other packages that the sources import, so that forked processes need not."""
    warnings.filterwarnings("ignore")
    found = {"_pytest.main", "hypothesis", "pytest_timeout", "transformers.models.qwen3.modeling_qwen3"}
    for folder in ("spot_megatron", "tools/pairs", "tests/train", "tests/weights"):
        for path in (tree / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module)
    for name in sorted(found):
        if name.split(".")[0] not in OURS:
            with contextlib.suppress(Exception):  # optional packages; a test that needs one imports it itself
                importlib.import_module(name)


def plant(tree: Path, mutant: Mutant, log: Path) -> str:
    file = tree / mutant.path
    source = file.read_text()
    if source.count(mutant.old) != 1:
        log.write_text(f"{mutant.path} holds {mutant.old!r} {source.count(mutant.old)} times, not once")
        return BROKEN
    file.write_text(source.replace(mutant.old, mutant.new))
    try:
        ast.parse(file.read_text())
        return run_tests(tree, mutant.tests, log)
    finally:
        file.write_text(source)


def run_tests(tree: Path, tests: str, log: Path) -> str:
    """Runs a selection of the catalogue in a forked process on the copied tree."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _pytest(tree, tests, log)
    deadline = time.monotonic() + SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return {0: SURVIVED, 1: KILLED}.get(code, BROKEN)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return TIMEOUT
        time.sleep(0.05)


def _pytest(tree: Path, tests: str, log: Path) -> None:
    code = 3
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.chdir(tree)
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
        selection, _, splits = tests.partition("split ")
        ids = selection.split()
        if splits:
            os.environ["MUTANT_SPLITS"] = splits
            ids.append("tests/mutants/splits.py")
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout", str(SECONDS), *ids]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def label(mutant: Mutant) -> str:
    def short(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|") or "(deleted)"

    return f"{mutant.path}: `{short(mutant.old)}` -> `{short(mutant.new)}`"


def table(rows: list[tuple[Mutant, str]]) -> str:
    lines = ["| area | fault | result |", "|---|---|---|"]
    for mutant, verdict in rows:
        lines.append(
            f"| {mutant.area} | {label(mutant)} | {verdict}{f': {mutant.equivalent}' * bool(mutant.equivalent)} |"
        )
    killed = sum(verdict in (KILLED, TIMEOUT) for _, verdict in rows)
    return "\n".join([*lines, "", f"{len(rows)} planted, {killed} killed, {len(rows) - killed} survived.", ""])


if __name__ == "__main__":
    sys.exit(main())
