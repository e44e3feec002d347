"""Targets that are more than one command. Python is a stand-in: its arguments are what is looked at. About 2 s."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def python(tmp_path) -> Path:
    """Writes down what it is asked to do. As the server it stays, or ends with the exit code in the file `refused`."""
    script = tmp_path / "python"
    script.write_text(f"""#!/bin/bash
echo "$*" >> {tmp_path}/asked
if [[ "$*" == *oracle_server* ]]; then
  if [ -e {tmp_path}/refused ]; then echo "error: taken" >&2; exit 2; fi
  echo $$ > {tmp_path}/pid; echo '{{"serving": "url"}}'; exec sleep 60
fi
""")
    script.chmod(0o755)
    return script


def make(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "READY=", f"PY={python}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def asked(python: Path) -> list[str]:
    return python.with_name("asked").read_text().splitlines()


def test_data_demo_prints_its_plain_commands(python, tmp_path):
    done = make(python, "data-demo", f"OUT={tmp_path / 'out'}", "PORT=7000")
    assert done.returncode == 0, done.stderr
    programs = ["tools.oracle_server", "tools.elicit", "tools.rectify", "tools.pairs", "tools.launch"]
    assert [line.split()[1] for line in asked(python)] == programs
    printed = [line for line in done.stdout.splitlines() if line.startswith(f"+ {python} -m tools.")]
    assert [line.replace(" ''", " ").split("python ", 1)[1] for line in printed] == asked(python)
    assert "--base-url http://127.0.0.1:7000/v1 " in printed[1]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text())), "the server outlives the demo"


def test_data_demo_stops_where_its_server_cannot_start(python, tmp_path):
    """Something else listens on the port: it must not be asked instead."""
    (tmp_path / "refused").touch()
    done = make(python, "data-demo", f"OUT={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "error: taken" in done.stderr
    assert [line.split()[1] for line in asked(python)] == ["tools.oracle_server"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "MODEL=m", "ARGS=--max-new-tokens 4096"], ["--model m", "--max-new-tokens 4096"]),
        (["study", "SET=optim.lr=1e-4"], ["tools.study", "--set optim.lr=1e-4"]),
    ],
)
def test_options_reach_the_command(python, arguments, words):
    done = make(python, *arguments)
    assert done.returncode == 0, done.stderr
    (command,) = asked(python)
    assert all(word in command for word in words), command
    assert command in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["elicit", "QUESTIONS=/a b/q.jsonl", "BASE_URL=u1 u2", "MODEL=m", "OUT=/c d"],
         "-m tools.elicit --questions /a b/q.jsonl --base-url u1 u2 --model m --output /c d/elicit"),
        (["rectify", "OUT=/c d", "ARGS=--import-human x.md"],
         "-m tools.rectify --errors /c d/elicit/errors.jsonl --output /c d/rectify --import-human x.md"),
        (["pairs", "TOKENIZER=/t t"], "--tokenizer /t t --output data/run/pairs.jsonl"),
    ],
)  # fmt: skip
def test_the_data_half_takes_paths_with_spaces_and_a_person(python, arguments, words):
    done = make(python, *arguments)
    assert done.returncode == 0, done.stderr
    assert words in " ".join(asked(python)[0].split())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["elicit", "QUESTIONS=q"], "BASE_URL"), (["rectify"], "BASE_URL"), (["pairs"], "TOKENIZER")],
)
def test_a_missing_variable_is_one_line_with_its_name(python, arguments, name):
    done = make(python, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"{name} is not set" in done.stderr
