"""A run is repeated to the bit from its folder, and a difference names its step, its tensors and its cause. ~60 s."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs
from tools import reproduce


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    save_random_hf(folder / "model")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(8))
    recipe = make_recipe(folder, train={"batch_pairs": 4, "epochs": 1}, optim={"lr": 1e-3})
    (folder / "recipe.yaml").write_text(recipe.dump())
    log = folder / "log.txt"
    assert processes.run(["-m", "spot_megatron.train", str(folder / "recipe.yaml")], log) == 0, processes.output_of(log)
    return folder / "run"


def test_the_same(run, capsys):
    assert reproduce.main([str(run)]) == 0
    assert "metrics and weights are the same, bit for bit" in capsys.readouterr().out


def test_other_pairs_are_named(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(8, seed=1))
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace(str(run.parent / "pairs.jsonl"), str(tmp_path / "pairs.jsonl")))
    environment = json.loads((copy / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (copy / "environment.json").write_text(json.dumps(environment))
    assert reproduce.main([str(copy), "--output", str(tmp_path / "again")]) == 1
    output = capsys.readouterr().out
    for words in ("metrics.jsonl: step 1: ", "model.layers.0", "digest of the pairs: ", "torch: 1.0 then, "):
        assert words in output, output


def test_an_unfinished_run_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    assert reproduce.main([str(tmp_path / "run")]) == 2
    assert "hf/config.json is missing" in capsys.readouterr().err
