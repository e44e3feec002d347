"""Hostile responses in both report pages, opened in headless Chromium: their code does not run, their text is shown."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from spot_megatron.files import write_rows
from spot_megatron.report import write_report
from tests.report.runs import RECIPE, make_run
from tests.tools.pairs.support import ASSETS, RIGHT, an_error, run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs chromium")]

MARK = "document.documentElement.dataset.ran=1"
SHOWN = "the text of the answer is shown"
HOSTILE = (
    f"{SHOWN} </pre></td></script></title></style><script>{MARK}</script><img src=x onerror={MARK}>"
    f"<svg onload={MARK}></svg><iframe srcdoc='<script>parent.{MARK}</script>'></iframe>"
    f"<a href='javascript:{MARK}'>x</a>"
    f"<!-- ]]> --> \"' autofocus onfocus={MARK} {{{{ 7*7 }}}} ${{{MARK}}} \u202eltr\u2066\u2028\u0000\ufeff\u0085 "
)
LONG = "long " + "x" * 10_000_000


def dom(page: Path, folder: Path) -> str:
    """The page's document after its scripts have run."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=240, check=True)
    return done.stdout.decode("utf-8", errors="replace")


def attributes(document: str) -> str:
    """The root element's tag, where code that ran would have left its mark."""
    return document[document.index("<html") : document.index(">", document.index("<html"))]


def test_code_would_be_noticed(tmp_path):
    """The same texts in a page that escapes nothing."""
    (tmp_path / "page.html").write_text(f"<!doctype html><html><body>{HOSTILE}</body></html>", encoding="utf-8")
    assert "data-ran" in attributes(dom(tmp_path / "page.html", tmp_path))


def test_the_report_of_a_run(tmp_path):
    recipe = {**RECIPE, "name": HOSTILE, "model": {"hf": HOSTILE + LONG}}
    folder = make_run(tmp_path / "run", recipe=recipe)
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "packages": {HOSTILE: HOSTILE}}))
    (folder / "dropped.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    document = dom(write_report(folder), tmp_path)
    assert "data-ran" not in attributes(document)
    assert SHOWN in document
    assert "<canvas" in document or "bk-" in document or "<svg" in document, "the charts' own scripts did not run"


def test_the_report_of_the_data_half(tmp_path):
    changed = RIGHT.replace("here", HOSTILE + LONG[:200_000])
    rows = [
        an_error("q0", corrected=changed, question=HOSTILE, prompt=HOSTILE, response=changed.replace("63", "65")),
        an_error(HOSTILE, corrected=HOSTILE + RIGHT),
    ]
    write_rows(tmp_path / "rectified.jsonl", rows)
    report = tmp_path / "report.html"
    options = ["--rectified", tmp_path / "rectified.jsonl", "--tokenizer", ASSETS, "--output", tmp_path / "pairs.jsonl"]
    run("pairs", *options, "--report", report, "--gamma", "1")
    document = dom(report, tmp_path)
    assert "data-ran" not in attributes(document)
    assert SHOWN in document
