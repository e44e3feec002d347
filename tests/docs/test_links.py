"""Links and anchors of every document, the site's navigation, and the site itself where Zensical is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documents import DOCUMENTS, FENCE, SPAN, name_of
from tests.processes import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SITE = ROOT / ".zensical.toml"


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path):
    for target in LINK.findall(SPAN.sub("", FENCE.sub("", path.read_text()))):
        if re.match(r"(https?|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)}: there is no {target}"
        assert linked.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(linked), f"{name_of(path)}: {target} has no such heading"


def test_the_navigation_has_every_page_once():
    pages = re.findall(r'= "([\w-]+\.md)"', SITE.read_text())
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason="`make docs` installs it")
    shutil.copy(SITE, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(tmp_path / SITE.name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference_sums" in (tmp_path / "build/site/flat-script/index.html").read_text(), (
        "the script is not included"
    )
