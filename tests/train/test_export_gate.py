"""What rounding to the exported data type loses is measured, at the exported folder itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spot_megatron.report.facts import checks
from spot_megatron.report.run import read_run
from spot_megatron.train.__main__ import main
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs

PAIRS = random_pairs(8)
BETA = 0.5


@pytest.fixture
def folder(tmp_path) -> Path:
    """A bf16 model folder, which training in fp32 changes by less than bf16 holds."""
    save_random_hf(tmp_path / "model", dtype="bfloat16")
    write_token_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path


def train(folder: Path, dtype: str) -> dict:
    """export.json of a run."""
    recipe = make_recipe(
        folder,
        objective={"name": "spot_bce", "beta": BETA, "shift": {"kind": "none"}},
        train={"batch_pairs": 4, "epochs": 2},
        optim={"lr": 1e-4},
        export={"dtype": dtype},
    )
    (folder / "recipe.yaml").write_text(recipe.dump())
    assert main([str(folder / "recipe.yaml")]) == 0
    return json.loads((folder / "run" / "export.json").read_text())


def margin_by_transformers(folder: Path) -> float:
    """The mean margin of all pairs, from the exported folder and reference.jsonl."""
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "hf", dtype=torch.float32)
    rows = [json.loads(line) for line in (folder / "run" / "reference.jsonl").read_text().splitlines()]
    margins = []
    for pair, row in zip(PAIRS, rows, strict=True):
        sides = []
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sides.append(logp[-len(response) :].double().sum().item())
        margins.append(BETA * (sides[0] - row["logp_chosen"] - sides[1] + row["logp_rejected"]))
    return sum(margins) / len(margins)


def test_a_margin_lost_by_rounding_is_a_warning(folder, capsys):
    found = train(folder, "source")
    before, after = found["trained"]["reward_margin"], found["exported"]["reward_margin"]
    assert 0 < after < 0.9 * before
    assert after == pytest.approx(margin_by_transformers(folder), abs=1e-4)
    assert "WARNING export_rounding: rounding to the export's data type has lost" in capsys.readouterr().out
    (check,) = (check for check in checks(read_run(folder / "run")) if "exported folder" in check.text)
    assert check.level == "warn"


def test_fp32_holds_what_was_trained(folder, capsys):
    found = train(folder, "fp32")
    assert found["exported"] == found["trained"]
    assert found["pairs"] == len(PAIRS)
    assert found["trained"]["reward_margin"] == pytest.approx(margin_by_transformers(folder), abs=1e-4)
    assert json.loads((folder / "run" / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert "WARNING export_rounding" not in capsys.readouterr().out
    (check,) = (check for check in checks(read_run(folder / "run")) if "exported folder" in check.text)
    assert check.level == "good"
