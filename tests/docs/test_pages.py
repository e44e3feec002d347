"""What the documents say of the repository: files, recipes, keys, line counts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
