"""What `pip install .` installs, and that every import is of something that is installed. About 10 s."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.processes import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later

# Imported only where they are installed; the image has the CUDA packages, an extra of pyproject.toml the others.
OPTIONAL = {"transformer_engine", "flash_attn", "flash_attn_interface", "wandb", "mlflow", "swanlab", "trackio"}
OURS = {"spot_megatron", "tools"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in the wheel, built from a copy, since setuptools writes into the source tree."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("spot_megatron", "tools", "tests", "recipes", "docs", "benchmarks", "docker"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(output), str(source)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = output.glob("*.whl")
    return zipfile.ZipFile(file).namelist()


def test_the_wheel_has_one_package(wheel):
    roots = {name.split("/")[0] for name in wheel}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"spot_megatron"}


def test_the_wheel_has_every_module_and_template(wheel):
    package = ROOT / "spot_megatron"
    wanted = {str(path.relative_to(ROOT)) for pattern in ("*.py", "*.j2") for path in package.rglob(pattern)}
    assert {name for name in wheel if name.startswith("spot_megatron/")} == wanted
    assert any(name.endswith(".j2") for name in wanted)


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_import_is_declared():
    """A package that is there only because another one needs it may be gone with that one's next version."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]
    distributions = packages_distributions()
    undeclared = set()
    for folder in sorted(OURS):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported(path) - OURS - OPTIONAL - set(sys.stdlib_module_names):
                if not declared & {normal(found) for found in distributions.get(name, [])}:
                    undeclared.add(f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare")
    assert not undeclared, "\n".join(sorted(undeclared))
