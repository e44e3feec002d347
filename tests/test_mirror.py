"""Tests mirror the tree: each module has its test file, is imported by a test, or has a line in tested_in.txt."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.processes import ROOT

TABLE = ROOT / "tests/tested_in.txt"
MODULES = sorted(
    path.relative_to(ROOT)
    for package in ("spot_megatron", "tools")
    for path in (ROOT / package).rglob("*.py")
    if path.stem != "__init__"
)


def table() -> dict[Path, Path]:
    lines = [line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    assert [line[0] for line in lines] == sorted({line[0] for line in lines}), "sort the lines, one a module"
    return {Path(module): Path(test) for module, test in lines}


def own_test(module: Path) -> Path:
    """spot_megatron/data/pack.py -> tests/data/test_pack.py, tools/plan.py -> tests/tools/test_plan.py."""
    inside = module.relative_to("spot_megatron") if module.parts[0] == "spot_megatron" else module
    return Path("tests") / inside.with_name(f"test_{inside.name}")


@cache
def imported_by_tests() -> set[str]:
    """Dotted names of modules, and of what is imported from them."""
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_is_tested_somewhere(module: Path):
    found = (ROOT / own_test(module)).exists() or ".".join(module.with_suffix("").parts) in imported_by_tests()
    assert found or module in table(), f"write {own_test(module)}, or name the test of {module} in tests/tested_in.txt"


def test_the_table_is_current():
    for module, test in table().items():
        assert module in MODULES, f"tests/tested_in.txt: there is no {module}"
        assert (ROOT / test).exists(), f"tests/tested_in.txt: there is no {test}"
