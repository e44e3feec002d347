"""`python -m tools.report`: what it prints and how it fails. About 1 s."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.runs import make_run
from tools.report import main

ROOT = Path(__file__).parents[2]


def test_prints_the_path_of_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "tools.report", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{run}/report.html\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_against_several(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b", "c")]
    assert main([runs[0], "--against", *runs[1:]]) == 0
    assert "a against b, c" in Path(capsys.readouterr().out.strip()).read_text()


def test_a_wrong_folder_exits_with_2_and_no_traceback(tmp_path, capsys):
    run = str(make_run(tmp_path / "run"))
    assert main([str(tmp_path)]) == 2
    assert main([run, "--against", str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 2
    assert len(printed.err.splitlines()) == 2
    with pytest.raises(SystemExit) as unknown:
        main([run, "--unknown"])
    assert unknown.value.code == 2
