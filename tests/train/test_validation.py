"""Validation measures what training would, changes no bit of a run, and its best step survives a kill."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from spot_megatron.errors import CheckpointError, PairError
from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.parallel.groups import parallel_groups
from spot_megatron.recipe import Recipe
from spot_megatron.train import loop
from spot_megatron.train.checkpoint import Checkpoints
from spot_megatron.train.metrics import MetricsLog
from spot_megatron.train.validation import Best
from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_probe, write_token_pairs

BETA = 0.5
LIGHT = {"rel": 1e-5, "abs": 1e-6}  # fp32, another packing


class Crash(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, 12 pairs to train on, 7 to hold out, and a probe of their chosen sides."""
    folder = tmp_path_factory.mktemp("validation")
    save_random_hf(folder / "model")
    pairs = random_pairs(12)
    write_token_pairs(folder / "pairs.jsonl", pairs)
    write_probe(folder / "same.jsonl", pairs)
    held_out = random_pairs(7, seed=1)
    write_token_pairs(folder / "held_out.jsonl", held_out)
    write_probe(folder / "probe.jsonl", held_out)
    return folder


def recipe_of(folder: Path, name: str, validation: dict | None = None, **sections) -> Recipe:
    defaults = {
        "objective": {"name": "spot_bco", "beta": BETA},
        "train": {"batch_pairs": 4, "epochs": 2},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    sections = {key: {**defaults.get(key, {}), **sections.get(key, {})} for key in defaults | sections}
    return make_recipe(folder, output=str(folder / name), validation=validation or {}, **sections)


def held_out(folder: Path, **options) -> dict:
    return {"pairs": str(folder / "held_out.jsonl"), "probe": str(folder / "probe.jsonl"), "every_steps": 1, **options}


def train(recipe: Recipe) -> Path:
    with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:
        assert loop.run(recipe, topology) == 0
    return Path(recipe.output)


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    parsed = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in parsed]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = HFFolder(run / "hf"), HFFolder(other / "hf")
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert same_bits(ours.read(name), theirs.read(name)), name


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


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
    for name, validation in (("on", held_out(folder)), ("off", None)):
        recipe = recipe_of(folder, f"{label}_{name}", validation, parallel=parallel, data={"pairs_per_microbatch": 2})
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


# ---- the best step


FALLS = {"lr": 0.003}  # too high: the loss of held-out pairs rises after the first steps


@pytest.fixture(scope="module")
def best(folder) -> Path:
    return train(recipe_of(folder, "best", held_out(folder, keep_best="loss"), optim=FALLS))


def best_step(run: Path) -> int:
    return min(rows(run, "validation.jsonl")[1:], key=lambda row: row["loss"])["step"]


def test_the_best_step_is_kept_and_exported(folder, best):
    step = best_step(best)
    assert 0 < step < 4, "the best step must not be among the newest for this test to mean something"
    assert steps_of(best) == sorted({step, *steps_of(best)[-2:]})
    until = train(recipe_of(folder, "until_best", optim=FALLS, train={"max_steps": step}))
    assert_same_weights(best, until)
    last = train(recipe_of(folder, "last", held_out(folder), optim=FALLS))
    assert rows(last, "validation.jsonl") == rows(best, "validation.jsonl")
    with pytest.raises(AssertionError):
        assert_same_weights(best, last)


def test_patience_ends_the_run(folder, best, capsys):
    recipe = recipe_of(folder, "patience", held_out(folder, keep_best="loss", patience=2), optim=FALLS)
    run = train(recipe)
    assert len(rows(run)) == best_step(best) + 2 < len(rows(best))
    assert rows(run, "validation.jsonl") == rows(best, "validation.jsonl")[: best_step(best) + 3]
    assert_same_weights(run, best)
    assert "validation.patience" in capsys.readouterr().out
    train(recipe)  # again: it has ended
    assert len(rows(run)) == best_step(best) + 2
    assert_same_weights(run, best)


@pytest.mark.parametrize("place", ["before_validation", "after_validation", "before_save", "after_save"])
def test_a_crash_at_any_step_resumes_to_the_same_end(folder, best, monkeypatch, place):
    """The run crashes once at every step, before and after what it writes there."""
    options = held_out(folder, keep_best="loss")
    recipe = recipe_of(folder, f"crash_{place}", options, optim=FALLS, checkpoint={"every_steps": 1})
    owner, name = (MetricsLog, "write_validation") if "validation" in place else (Checkpoints, "save")
    write, crashed = getattr(owner, name), set()

    def crash_once(self, *args, **kwargs):
        step = args[0] if name == "save" else args[0]["step"]
        first = step not in crashed
        crashed.add(step)
        if first and "before" in place:
            raise Crash
        result = write(self, *args, **kwargs)
        if first:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, crash_once)
    for _ in range(8):
        try:
            run = train(recipe)
            break
        except Crash:
            continue
    assert len(crashed) >= 6
    assert rows(run, "validation.jsonl") == rows(best, "validation.jsonl")
    assert_same_weights(run, best)


def test_killed_and_resumed_with_keep_best_and_patience(folder, best):
    recipe = recipe_of(folder, "killed", held_out(folder, keep_best="loss", patience=3), optim=FALLS)
    file, log, run = folder / "killed.yaml", folder / "killed.txt", folder / "killed"
    file.write_text(recipe.dump())
    process = processes.start(["-m", "spot_megatron.train", str(file)], log)
    written = run / "validation.jsonl"
    while process.poll() is None and not (written.exists() and written.read_text().count("\n") > best_step(best) + 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    processes.kill_all(process)
    assert processes.run(["-m", "spot_megatron.train", str(file)], log) == 0, processes.output_of(log)
    assert rows(run, "validation.jsonl") == rows(best, "validation.jsonl")[: best_step(best) + 4]
    assert_same_weights(run, best)


def test_a_missing_best_checkpoint_is_named(folder):
    recipe = recipe_of(folder, "pruned", held_out(folder, keep_best="loss"), optim=FALLS)
    run = train(recipe)
    for file in sorted((run / "checkpoints" / f"step_{best_step(run):08d}").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (run / "checkpoints" / f"step_{best_step(run):08d}").rmdir()
    with pytest.raises(CheckpointError, match=r"step_\d+ is missing.*keep_best=null"):
        train(recipe)


def test_another_best_starts_anew(folder, capsys):
    train(recipe_of(folder, "other_best", held_out(folder, keep_best="loss"), train={"epochs": 1}))
    train(recipe_of(folder, "other_best", held_out(folder, keep_best="probe"), train={"epochs": 1}))
    assert "starts anew" in capsys.readouterr().out


def test_best_by_every_key():
    table = [
        {"step": 0, "loss": 0.0, "reward_accuracy": 1.0, "reward_margin": 9.0, "probe_change": 0.0},
        {"step": 5, "loss": 0.9, "reward_accuracy": 0.5, "reward_margin": 1.0, "probe_change": -0.2},
        {"step": 10, "loss": 0.4, "reward_accuracy": 0.7, "reward_margin": 2.0, "probe_change": -0.3},
        {"step": 15, "loss": 0.5, "reward_accuracy": 0.7, "reward_margin": 3.0, "probe_change": -0.1},
    ]
    for key, step, found in [
        ("loss", 10, [0, 1, 1, 0]),
        ("reward_accuracy", 10, [0, 1, 1, 0]),  # an equal one is not better
        ("reward_margin", 15, [0, 1, 1, 1]),
        ("probe", 15, [0, 1, 0, 1]),
    ]:
        best = Best(key, patience=1, data="")
        assert [best.look(row) for row in table] == [bool(is_best) for is_best in found], key
        assert best.step == step
        assert best.out_of_patience == (step == 10)
        again = Best(key, patience=1, data="")
        assert again.load_state_dict(json.loads(json.dumps(best.state_dict())))
        assert again == best
        assert not Best(key, 1, data="other").load_state_dict(best.state_dict())


# ---- mistakes


def test_a_validation_that_is_not_finite_stops_the_run(folder, monkeypatch):
    from spot_megatron.errors import TrainingError
    from spot_megatron.train import validation

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
