"""What the documents say of the repository: files, recipes, keys, line counts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.documents import DOCUMENTS, HISTORY, name_of, spans
from tests.processes import ROOT

README_LINES = 130
OURS = re.compile(r"(?:spot_megatron|tools|tests|recipes|docs|docker|benchmarks|\.github|\.ci)/[\w./-]*")


def test_the_recipe_reference_is_current():
    command = [sys.executable, "-m", "spot_megatron.recipe", "--markdown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    page = ROOT / "docs/recipe-reference.md"
    assert page.read_text() == done.stdout, "python -m spot_megatron.recipe --markdown > docs/recipe-reference.md"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in HISTORY], ids=name_of)
def test_named_files_exist(path: Path):
    for span in spans(path):
        if OURS.fullmatch(span):
            near = (path.parent / span, ROOT / span)
            assert any(place.exists() for place in near), f"{name_of(path)} names {span}, which does not exist"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in HISTORY], ids=name_of)
def test_named_recipes_exist(path: Path):
    names = {span for span in spans(path) if re.fullmatch(r"(?:qwen3|llama3p1)_\w*(?:spot|dpo|sft|dft|plus)\w*", span)}
    assert names <= {recipe.stem for recipe in (ROOT / "recipes").glob("*.yaml")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_lines_by_folder_add_up():
    if not (ROOT / ".git").exists():
        pytest.skip("counts lines of commits, and this is no clone")
    done = subprocess.run(["docs/lines.sh", "HEAD", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [re.findall(r"[^| ]+", line) for line in done.stdout.splitlines()[2:]]
    *folders, (last, before, after) = [(row[0].strip("`"), int(row[1]), int(row[2])) for row in rows]
    assert last == "all"
    assert {"spot_megatron/train", "tools/pairs", "tools/*.py"} <= {name for name, _, _ in folders}
    assert before == after == sum(lines for _, lines, _ in folders) > 10_000


@pytest.mark.parametrize(
    "path", [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"], ids=name_of
)
def test_configuration_files_can_be_read(path: Path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_ci_and_hooks_run_what_the_makefile_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    makefile = (ROOT / "Makefile").read_text()
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repository["repo"] == "local", "hooks must not download"
        for hook in repository["hooks"]:
            program = hook["entry"].removeprefix(".venv/bin/python ").removesuffix(" --force-exclude")
            assert f"$(PY) {program}" in makefile, f"make check does not run {program}"


def test_the_citation_is_of_this_version():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version[1]
