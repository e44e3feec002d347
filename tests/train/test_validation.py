"""Validation measures what training would, and changes no bit of a run. About 50 s."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spot_megatron.errors import PairError, TrainingError
from spot_megatron.train import validation
from tests import processes
from tests.support import random_pairs
from tests.train.validation_runs import BETA, assert_same_weights, held_out, make_world, recipe_of, rows, train

LIGHT = {"rel": 1e-5, "abs": 1e-6}  # fp32, another packing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("validation"))


# ---- what is measured


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        ("spot_bco", "ema", "shared"),
        ("spot_bco", "cumulative", "separate"),
        ("dpo", "none", "shared"),
        ("sft", "none", "separate"),
        ("dft", "none", "shared"),
    ],
)
def test_validation_on_the_training_pairs_is_the_next_step(folder, name, kind, layout):
    """With all pairs in one batch, the step after a validation measures the same pairs with the same weights."""
    recipe = recipe_of(
        folder,
        f"oracle_{name}_{kind}",
        {"pairs": str(folder / "pairs.jsonl"), "probe": str(folder / "same.jsonl"), "every_steps": 1},
        objective={"name": name, "beta": BETA, "shift": {"kind": kind}},
        train={"batch_pairs": 12, "epochs": 4},
        data={"layout": layout},
    )
    run = train(recipe)
    validations, steps = rows(run, "validation.jsonl"), rows(run)
    assert [row["step"] for row in validations] == [0, 1, 2, 3, 4]
    assert kind == "none" or steps[-1]["reward_shift"] != 0
    num_tokens = sum(len(pair.chosen_ids) for pair in random_pairs(12))
    for row, step in zip(validations, steps, strict=False):
        for key in ("loss", "reward_chosen", "reward_rejected", "reward_margin", "pairs"):
            assert row[key] == pytest.approx(step[key], **LIGHT), (row["step"], key)
        if row["step"]:  # before it, rounding decides
            assert row["reward_accuracy"] == step["reward_accuracy"]
        change = step["reward_chosen"] / BETA * 12 / num_tokens
        assert row["probe_change"] == pytest.approx(change, **LIGHT), row["step"]
    logp = sum(row["logp_chosen"] for row in rows(run, "reference.jsonl"))
    assert validations[0]["probe_logp"] == pytest.approx(logp / num_tokens, **LIGHT)
    assert set(validations[0]) == {
        "step", "loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "pairs", "probe_logp",
        "probe_change",
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    return train(recipe_of(folder, "plain"))


def test_validation_changes_no_bit(folder, plain):
    validated = train(recipe_of(folder, "validated", held_out(folder)))
    assert rows(validated) == rows(plain)
    assert_same_weights(validated, plain)
    assert not (plain / "validation.jsonl").exists()


def test_validation_changes_no_bit_where_the_shift_moves_inside_a_batch(folder):
    shift = {"name": "spot_bco", "beta": BETA, "shift": {"kind": "cumulative_inclusive"}}
    data = {"pairs_per_microbatch": 2}
    without = train(recipe_of(folder, "inclusive", objective=shift, data=data))
    validated = train(recipe_of(folder, "inclusive_validated", held_out(folder), objective=shift, data=data))
    assert rows(validated) == rows(without)
    assert_same_weights(validated, without)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}])
def test_validation_changes_no_bit_of_several_ranks(folder, parallel):
    """Among them ranks whose updated weights are still on their way when a validation begins."""
    count, label = (2 if parallel else 1) * 2, "_".join(parallel) or "data"
    runs = []
    for name, options in (("on", held_out(folder)), ("off", None)):
        recipe = recipe_of(folder, f"{label}_{name}", options, parallel=parallel, data={"pairs_per_microbatch": 2})
        file = folder / f"{label}_{name}.yaml"
        file.write_text(recipe.dump())
        log = folder / f"{label}_{name}.txt"
        assert processes.run(["-m", "spot_megatron.train", str(file)], log, count) == 0, processes.output_of(log)
        runs.append(Path(recipe.output))
    assert rows(runs[0]) == rows(runs[1])
    assert_same_weights(*runs)
    assert [row["step"] for row in rows(runs[0], "validation.jsonl")] == [0, 1, 2, 3, 4, 5, 6]


def test_a_fraction_trains_on_the_rest(folder):
    run = train(recipe_of(folder, "fraction", {"fraction": 0.4, "every_steps": 4}, train={"epochs": 1}))
    trained = {row["id"] for row in rows(run, "reference.jsonl")}
    [first, *_] = rows(run, "validation.jsonl")
    assert 0 < first["pairs"] == 12 - len(trained)
    assert sum(row["pairs"] for row in rows(run)) == len(trained)


# ---- mistakes


def test_a_validation_that_is_not_finite_stops_the_run(folder, monkeypatch):
    broken = lambda *args: np.full(args[1], np.nan)  # noqa: E731
    monkeypatch.setattr(validation, "forward_pass", broken)
    with pytest.raises(TrainingError, match=r"validation after step 0.*pair-0"):
        train(recipe_of(folder, "not_finite", held_out(folder)))


def test_held_out_prompts_that_are_trained_on_are_counted(folder, capsys):
    train(recipe_of(folder, "overlap", {"pairs": str(folder / "pairs.jsonl")}, train={"max_steps": 1}))
    assert "the prompts of 12 of 12 pairs of validation.pairs" in capsys.readouterr().out


def test_a_fraction_that_leaves_a_side_empty(folder):
    with pytest.raises(PairError, match=r"validation\.fraction=1e-09: none .* is held out; raise it"):
        train(recipe_of(folder, "empty", {"fraction": 1e-9}))
