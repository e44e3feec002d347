"""Every documented command exists, takes the options it is given and, where that takes seconds, runs. About 60 s."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spot_megatron.data.records import read_pairs, read_probe
from spot_megatron.recipe import load_recipe
from tests.docs.documents import DOCUMENTS, Command, all_commands, blocks, name_of
from tests.processes import ROOT
from tools.pairs.questions import read_questions

COMMANDS = all_commands()
# Programs of others, whose options are not checked.
FOREIGN = {"export", "git", "vllm", "pre-commit", "pip", "npm", "sbatch"}
FOREIGN_MODULES = {"pip", "venv", "zipfile", "zensical", "ruff", "mypy", "sglang.launch_server"}
TAKE_A_RECIPE = {"spot_megatron.train", "tools.launch", "tools.plan", "tools.dryrun", "tools.slurm"}
# Take seconds and need no input; the others are too long for each run of the tests, or need an endpoint or a GPU.
QUICK = {"help", "doctor", "recipe-help", "plan", "slurm"}
QUICK_PROGRAMS = {("python", "-m", "tools.plan"), ("python", "-m", "tools.grade")}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def make(words: tuple[str, ...], *options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    fixed = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), f"PY={sys.executable}", "READY="]
    return subprocess.run(
        [*fixed, *options, *words[1:]],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@functools.lru_cache
def printed(words: tuple[str, ...]) -> str:
    """What `make -n` prints: the lines that it would run, or an error."""
    done = make(words, "-n")
    return done.stdout.replace("\\\n", " ") + done.stderr


@functools.lru_cache
def help_of(module: str, *subcommand: str) -> str:
    command = [sys.executable, "-m", module, *subcommand, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_targets(words: tuple[str, ...]) -> None:
    """The targets exist, no variable is without effect, and the programs behind them are called rightly."""
    targets = [word for word in words[1:] if "=" not in word]
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and set(targets) <= set(phony[1].split())
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            others = tuple(other for other in words if other != word)
            changed = printed(others), printed((*others, f"{name}=changed"))
            assert set(changed) != {printed(words)}, f"make {targets} does not read {name}"
    if targets == ["data-demo"]:  # a script of its own: tests/tools/test_makefile.py
        return
    if targets == list(words[1:]) and "is not set" in printed(words):  # the target's name in a text, not a command
        return
    assert make(words, "-n").returncode == 0, printed(words)
    for line in printed(words).splitlines():
        if line.startswith(sys.executable):
            check_python(tuple(shlex.split(line)))


def check_python(words: tuple[str, ...]) -> None:
    if words[1:3] == ("-W", "ignore"):
        words = (words[0], *words[3:])
    if words[1] == "-m":
        check_module(words[2], words[3:])
    else:
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"


def check_module(module: str, arguments: tuple[str, ...]) -> None:
    """The module exists and its help names every option; a recipe and its changed keys are valid."""
    if module == "pytest":
        check_pytest(arguments)
    if module == "pytest" or module in FOREIGN_MODULES:
        return
    file = ROOT / module.replace(".", "/")
    assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), f"there is no program {module}"
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    subcommand = arguments[:1] if module == "tools.convert" else ()
    for option in options:
        pattern = rf"(?<![\w-]){re.escape(option)}(?![\w-])"
        assert re.search(pattern, help_of(module, *subcommand)), f"{module} has no option {option}"
    if module in TAKE_A_RECIPE and arguments and not re.search(r"\.yaml$|^[A-Z]+$|^-", arguments[0]):
        load_recipe(arguments[0], overrides(arguments))


def overrides(arguments: tuple[str, ...]) -> list[str]:
    """The words after --set, up to the next option."""
    if "--set" not in arguments:
        return []
    rest = arguments[arguments.index("--set") + 1 :]
    end = next((index for index, word in enumerate(rest) if word.startswith("--")), len(rest))
    return list(rest[:end])


def check_pytest(arguments: tuple[str, ...]) -> None:
    for word in arguments:
        if word.startswith("tests"):
            assert (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_is_right(command: Command):
    words = tuple(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), command.words))  # OMP_NUM_THREADS=1
    if words[0] == "make":
        check_targets(words)
    elif words[0] in ("python", "python3", ".venv/bin/python"):
        check_python(words)
    elif words[0] == "torchrun":
        check_module(words[words.index("-m") + 1], words[words.index("-m") + 2 :])
    elif words[0] == "pytest":
        check_pytest(words[1:])
    elif words[0] == "docs/lines.sh":
        assert (ROOT / words[0]).is_file()
    else:
        assert words[0] in FOREIGN, f"{command}: how is this command checked? Add it to this test"


def runs_here(command: Command) -> bool:
    """True for a quick command without a placeholder such as F or RECIPE= in it."""
    words = command.words
    values = [word.partition("=")[2] if "=" in word else word for word in words]
    if any(re.fullmatch(r"[A-Z]*\d?", value) for value in values):
        return False
    return words[1] in QUICK if words[0] == "make" else words[:3] in QUICK_PROGRAMS


@pytest.mark.parametrize("command", [command for command in COMMANDS if runs_here(command)], ids=str)
def test_a_quick_command_runs(command: Command, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "answers.jsonl").write_text('{"id": "a", "response": "\\\\boxed{2}", "answer": "2"}\n')
    words = command.words
    if words[0] == "make":
        done = make(words, cwd=tmp_path)
    else:
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_examples_of_data_and_code_can_be_read(path: Path, tmp_path):
    for text in blocks(path, "json"):
        rows = [json.loads(line) for line in text.splitlines()]
        (tmp_path / "rows.jsonl").write_text(text)
        if "chosen" in rows[0]:
            assert read_pairs([tmp_path / "rows.jsonl"])
        elif "question" in rows[0]:
            assert read_questions(tmp_path / "rows.jsonl").questions
        elif "response" in rows[0]:
            assert read_probe(tmp_path / "rows.jsonl")
        else:
            raise AssertionError(f"{path}: which program reads {rows[0]}?")
    for text in blocks(path, "yaml"):
        (tmp_path / "recipe.yaml").write_text(text)
        load_recipe(tmp_path / "recipe.yaml")
    for text in blocks(path, "python"):
        if not text.startswith("--8<--"):
            compile(text, str(path), "exec")


def test_the_example_objective_has_the_value_that_its_page_names():
    import torch

    (text,) = blocks(ROOT / "docs/add-an-objective.md", "python")
    names: dict[str, object] = {"Tensor": torch.Tensor}
    exec(text, names)
    assert names["ipo"](torch.zeros(2), torch.zeros(2)).tolist() == [0.25, 0.25]  # type: ignore[operator]
