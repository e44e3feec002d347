"""The best step by validation.keep_best is exported, patience ends a run, and both survive a kill. About 60 s."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from spot_megatron.errors import CheckpointError
from spot_megatron.train.checkpoint import Checkpoints
from spot_megatron.train.metrics import MetricsLog
from spot_megatron.train.validation import Best
from tests import processes
from tests.train.validation_runs import assert_same_weights, held_out, make_world, recipe_of, rows, steps_of, train


class Crash(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("validation"))


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


def test_the_best_adapters_are_exported(folder):
    lora = {"rank": 4, "targets": ["attention", "mlp"]}
    both = {"export": {"hf": True, "adapter": True}, "lora": lora, "optim": {"lr": 0.05}}
    best = train(recipe_of(folder, "best_lora", held_out(folder, keep_best="loss"), **both))
    assert 0 < best_step(best) < 4
    until = train(recipe_of(folder, "until_best_lora", train={"max_steps": best_step(best)}, **both))
    assert_same_weights(best, until)
    name = "adapter/adapter_model.safetensors"
    assert (best / name).read_bytes() == (until / name).read_bytes()


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
    assert len(crashed) >= 5  # the state after the last step is exported, not saved
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


@pytest.fixture
def never_finished(monkeypatch):
    """Runs do not record that they are complete, so that the next start resumes them."""
    monkeypatch.setattr(Checkpoints, "mark_finished", lambda *args: None)


def test_a_missing_best_checkpoint_is_named(folder, never_finished):
    recipe = recipe_of(folder, "pruned", held_out(folder, keep_best="loss"), optim=FALLS)
    run = train(recipe)
    for file in sorted((run / "checkpoints" / f"step_{best_step(run):08d}").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (run / "checkpoints" / f"step_{best_step(run):08d}").rmdir()
    with pytest.raises(CheckpointError, match=r"step_\d+ is missing.*keep_best=null"):
        train(recipe)


def test_another_best_starts_anew(folder, capsys, never_finished):
    train(recipe_of(folder, "other_best", held_out(folder, keep_best="loss")))
    train(recipe_of(folder, "other_best", held_out(folder, keep_best="probe")))
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
