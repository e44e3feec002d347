"""The house: imports go one way, Megatron stays at the edge, every recipe loads, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from spot_megatron.recipe import RECIPE_FOLDER, load_recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "spot_megatron"

# The floors of DESIGN, from the ground up: a module imports from its own floor or those below it.
FLOORS = [
    ["errors", "quiet", "files"],
    ["recipe", "hf", "objective", "report"],
    ["data", "parallel"],
    ["model"],
    ["weights"],
    ["train"],
    ["plan"],
]
MEGATRON = ("data/dataset", "parallel/", "model/", "weights/", "train/", "plan/dryrun")
LONGEST_FILE = 310


def modules() -> list[str]:
    return sorted(str(path.relative_to(SOURCE))[:-3] for path in SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room(module: str) -> str:
    """The folder of a module, or the module itself on the ground floor."""
    return module.split("/")[0]


def floor(module: str) -> int:
    found = [level for level, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert found, f"spot_megatron/{module}.py belongs to none of FLOORS"
    return found[0]


def targets(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    names = {name.removeprefix("spot_megatron.").replace(".", "/") for name in imports(SOURCE / f"{module}.py")}
    return {name for name in names if (SOURCE / f"{name}.py").exists() or (SOURCE / name / "__init__.py").exists()}


@pytest.mark.parametrize("module", [m for m in modules() if m != "__init__"])
def test_imports_go_down_only(module):
    assert not {name for name in imports(SOURCE / f"{module}.py") if name.split(".")[0] == "tools"}
    for target in targets(module):
        assert floor(target) <= floor(module), f"{module} imports {target}, which is on a higher floor"


def test_no_circle_between_folders():
    arrows = {(room(m), room(t)) for m in modules() if m != "__init__" for t in targets(m) if room(m) != room(t)}
    rooms = {name for arrow in arrows for name in arrow}
    while rooms:
        leaves = {name for name in rooms if not any(a == name and b in rooms for a, b in arrows)}
        assert leaves, f"these folders import each other in a circle: {sorted(rooms)}"
        rooms -= leaves


@pytest.mark.parametrize("module", modules())
def test_megatron_stays_at_the_edge(module):
    roots = {name.split(".")[0] for name in imports(SOURCE / f"{module}.py")}
    if roots & {"megatron", "transformer_engine"}:
        assert module.startswith(MEGATRON), f"{module} imports Megatron"


def test_the_data_half_needs_no_torch():
    code = "import sys, tools.pairs; sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for path in (ROOT / "tools" / "pairs").glob("*.py"):
        assert not {"torch", "megatron"} & {name.split(".")[0] for name in imports(path)}, path


def test_importing_the_recipe_is_quick_and_light():
    code = "import sys, spot_megatron.recipe; sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", sorted(RECIPE_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.output == f"runs/{path.stem}"


@pytest.mark.parametrize("folder", ["spot_megatron", "tools", "tests", "benchmarks"])
def test_files_stay_small(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: length for path, length in lengths.items() if length > LONGEST_FILE}
