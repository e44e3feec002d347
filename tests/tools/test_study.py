"""The study: what it trains, what it takes from earlier runs, what it refuses. The training is a stand-in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spot_megatron.recipe import load_recipe
from tests.report.runs import make_run, result
from tools import launch
from tools.study import RECIPES, check_comparable, main


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list[str]:
    """The names of the recipes that were trained; the working folder holds two of them and their runs."""
    monkeypatch.chdir(tmp_path)
    common = "model: {hf: m}\ndata: {pairs: p}\nevaluation: {questions: q}\n"
    for name in ("a", "b"):
        Path(f"{name}.yaml").write_text(f"name: {name}\noutput: runs/{name}\n{common}")
    started: list[str] = []

    def train(arguments: list[str]) -> int:
        recipe = load_recipe(arguments[0], arguments[2:])
        started.append(recipe.name)
        run = make_run(Path(recipe.output))
        (run / "recipe.yaml").write_text(recipe.dump())
        (run / "evaluation.json").write_text(json.dumps({"base": result(x=(1, 4)), "model": result(x=(3, 4))}))
        return 0

    monkeypatch.setattr(launch, "main", train)
    return started


def study(*arguments: str) -> int:
    return main(["--recipes", "a.yaml", "b.yaml", *arguments])


def test_complete_runs_are_not_repeated(trained, capsys):
    assert study() == study() == 0
    assert trained == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "75.0" in line] == [["a", "75.0"], ["b", "75.0"]] * 2


def test_an_earlier_result_is_not_shown_as_a_changed_recipe_s(trained, tmp_path, capsys):
    assert study() == 0
    capsys.readouterr()
    assert study("--set", "optim.lr=0.5") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "runs/a holds the result of another recipe: its optim.lr is 1e-06, not 0.5." in printed.err
    assert "Move the folder away" in printed.err
    assert trained == ["a", "b"]
    Path("runs").rename("before")
    assert study("--set", "optim.lr=0.5") == 0
    assert trained == ["a", "b", "a", "b"]


def test_a_result_from_before_the_last_start_is_made_anew(trained):
    """A start writes recipe.yaml, also one that is then refused; the result stands for an earlier one."""
    assert study() == 0
    os.utime("runs/b/evaluation.json", (0, 0))
    assert study() == 0
    assert trained == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["evaluation.questions=null"], ["a", "evaluation.questions"]),
        (["output=one"], ["output", "one"]),
        (["name=one"], ["name", "one"]),
        (["optim.lrr=1"], ["optim.lr"]),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(trained, capsys, change, words):
    assert study("--set", *change) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    Path("b.yaml").write_text("extends: a\nname: b\noutput: runs/b\nmodel: {hf: other}\n")
    assert study() == 2
    assert "b and a differ in model" in capsys.readouterr().err
    assert trained == []


def test_a_training_that_fails_ends_the_study(trained, monkeypatch):
    monkeypatch.setattr(launch, "main", lambda arguments: 75)
    assert study() == 75


def test_the_shipped_recipes_can_be_compared():
    check_comparable([load_recipe(f"qwen3_tiny_{name}") for name in RECIPES])
