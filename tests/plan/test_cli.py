"""`python -m tools.plan` as a user meets it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from spot_megatron.plan.hardware import GIB
from spot_megatron.plan.text import MEMORY_NAMES
from tests.support import random_pairs, write_token_pairs
from tools.plan import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path) -> str:
    """The headline model, so that it fits on 8 GPUs only with full recompute."""
    sections = {
        "name": "eight_billion",
        "output": "out",
        "model": {"hf": "Qwen/Qwen3-8B"},
        "data": {"pairs": "nowhere.jsonl", "max_tokens": 8192, "tokens_per_microbatch": 8192},
        "memory": {"recompute": "full"},
    }
    path = tmp_path / "eight_billion.yaml"
    path.write_text(json.dumps(sections))
    return str(path)


def test_one_screen(capsys, recipe):
    assert main([recipe, "--gpus", "8"]) == 0
    screen = capsys.readouterr().out
    assert screen.count("\n") <= 50
    for words in ("8.19 billion", "fits", "gradients", "Time:", "GPU-hours", "kWh", "MFU", "Assumed:"):
        assert words in screen


def test_what_does_not_fit_says_what_would(capsys, recipe):
    assert main([recipe, "--gpus", "8", "--set", "memory.recompute=none", "--best"]) == 1
    screen = capsys.readouterr().out
    assert "DOES NOT FIT" in screen
    assert "--set" in screen.split("cheapest changes that make it fit")[1].split("Time, if it fitted")[0]
    assert "Fastest configurations that fit" in screen


def test_json_and_a_page(capsys, tmp_path, recipe):
    page = tmp_path / "plan.html"
    assert main([recipe, "--json", "--best", "--figure", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["memory"]["total"] == pytest.approx(sum(found["memory"]["parts"].values()))
    assert found["seconds"]["total"] == pytest.approx(sum(found["seconds"]["parts"].values()))
    assert found["step_seconds"]["total"] == pytest.approx(sum(found["step_seconds"]["parts"].values()))
    assert len(found["best_layouts"]) == 5
    html = unescape(page.read_text())
    assert html.count('class="plot"') == 2 + 1 + 5
    assert "default-src 'none'" in html
    assert "://" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert len(html) < 1_600_000
    for name, size in found["memory"]["parts"].items():
        assert f"{MEMORY_NAMES[name]} <b>{size / GIB:.1f} GiB</b>" in html


def test_own_pairs(capsys, tmp_path, recipe):
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(40))
    assert main([recipe, "--pairs", str(tmp_path / "pairs.jsonl")]) == 0
    screen = capsys.readouterr().out
    assert "40 used" in screen
    assert "assumed" not in screen.split("Assumed:")[0]


def test_a_missing_pair_file_is_named(capsys, tmp_path, recipe):
    assert main([recipe]) == 0
    assert "! data.pairs: nowhere.jsonl does not exist" in capsys.readouterr().out
    assert main([recipe, "--assume", "response=1500"]) == 0
    assert "nowhere.jsonl" not in capsys.readouterr().out
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(40))
    both = f"data.pairs=[{tmp_path / 'pairs.jsonl'}, nowhere.jsonl]"
    assert main([recipe, "--set", both]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen3_9b_spot"], "qwen3_8b_spot"),
        (["RECIPE", "--gpu", "h900"], "h800"),
        (["RECIPE", "--gpus", "6", "--set", "parallel.tensor=4"], "multiple of 4"),
        (["RECIPE", "--set", "model.hf=Qwen/Qwen9-8B"], "config.json"),
        (["RECIPE", "--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["RECIPE", "--assume", "length=3"], "response"),
        (["RECIPE", "--figure", "nowhere/plan.html"], "--figure"),
    ],
)
def test_mistakes_end_with_code_2(capsys, recipe, arguments, words):
    assert main([recipe if word == "RECIPE" else word for word in arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_needs_neither_torch_nor_megatron_and_two_seconds(recipe):
    """On a laptop: processor time, as the wall clock depends on the machine's load."""
    code = (
        f"import sys; from tools.plan import main; main([{recipe!r}]);"
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.stdout.splitlines()[-1] == "[]"
    assert after.ru_utime - before.ru_utime < 2.0
