"""Stop anywhere: killed at random or stopped by a signal, the same command ends in the same bits (invariant 7)."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.hf.index import HFIndex
from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs

NUM_STEPS = 12


def write_run(folder: Path, name: str, **checkpoint) -> tuple[list[str], Path]:
    """The command of a run of 12 steps that saves every 3, and its run folder."""
    recipe = make_recipe(
        folder,
        output=str(folder / name),
        objective={"name": "spot_bco", "beta": 0.5},
        train={"batch_pairs": 4, "epochs": 2},
        optim={"lr": 1e-3},
        checkpoint={"every_steps": 3, "keep": 2} | checkpoint,
        data={"order": "shuffled"},
    )
    (folder / f"{name}.yaml").write_text(recipe.dump())
    return ["-m", "spot_megatron.train", str(folder / f"{name}.yaml")], folder / name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_random_hf(folder / "model")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(24))
    command, run = write_run(folder, "undisturbed")
    assert processes.run(command, folder / "log.txt") == 0, processes.output_of(folder / "log.txt")
    return run


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without the only thing that may differ."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    parsed = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in parsed]


def assert_same_end(run: Path, undisturbed: Path) -> None:
    assert rows(run) == rows(undisturbed)
    assert len(rows(run)) == NUM_STEPS
    ours, theirs = HFFolder(run / "hf"), HFFolder(undisturbed / "hf")
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert same_bits(ours.read(name), theirs.read(name)), name
    assert not list((run / "checkpoints").glob(".partial*"))


def test_killed_at_random_moments(undisturbed):
    folder = undisturbed.parent
    command, run = write_run(folder, "killed")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for target in (rng.randrange(1, 6), rng.randrange(6, NUM_STEPS)):
        process = processes.start(command, folder / "killed.txt")
        deadline = time.monotonic() + 120
        while len(rows_even_if_half_written(run)) < target and process.poll() is None:
            assert time.monotonic() < deadline, processes.output_of(folder / "killed.txt")
            time.sleep(0.005)
        time.sleep(rng.random() * 0.5)  # in a step, or while a checkpoint is being written
        processes.kill_all(process)
    assert processes.run(command, folder / "killed.txt") == 0, processes.output_of(folder / "killed.txt")
    assert_same_end(run, undisturbed)


def rows_even_if_half_written(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("checkpoint", [{"async": True}, {"every_steps": None}], ids=["async", "only then"])
def test_stopped_by_a_signal(undisturbed, checkpoint, request):
    folder = undisturbed.parent
    command, run = write_run(folder, request.node.callspec.id.replace(" ", "_"), **checkpoint)
    process = processes.start(command, folder / "stopped.txt")
    try:
        while not rows_even_if_half_written(run) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, processes.output_of(folder / "stopped.txt")
    finally:
        processes.kill_all(process)
    assert 0 < len(rows(run)) < NUM_STEPS
    assert not (run / "hf").exists()
    assert processes.run(command, folder / "stopped.txt") == 0, processes.output_of(folder / "stopped.txt")
    assert_same_end(run, undisturbed)


def test_a_finished_run_is_not_trained_again(undisturbed):
    command, run = write_run(undisturbed.parent, "undisturbed")
    log, before = undisturbed.parent / "again.txt", stamps(run)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000006", "step_00000009"]
    assert processes.run(command, log) == 0
    assert "holds a finished run of this recipe: nothing is left to do" in processes.output_of(log)
    assert {path: stamp for path, stamp in stamps(run).items() if "heartbeat" not in path.parts} == before


def test_a_finished_run_that_is_to_have_another_result_continues(undisturbed):
    run, log = undisturbed.with_name("other_result"), undisturbed.parent / "other_result.txt"
    shutil.copytree(undisturbed, run)
    command, _ = write_run(undisturbed.parent, "undisturbed")
    assert processes.run([*command, "--set", f"output={run}", "export.dtype=bf16"], log) == 0
    assert "has other results than this recipe" in processes.output_of(log)
    assert rows(run) == rows(undisturbed)
    assert set(HFIndex(run / "hf").kinds().values()) == {"BF16"}


def stamps(run: Path) -> dict[Path, int]:
    files = (path for path in run.rglob("*") if path.is_file() and "heartbeat" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in files}


def test_another_recipe_is_refused_and_an_old_run_set_aside(undisturbed):
    folder = undisturbed.parent
    command, run = write_run(folder, "undisturbed")
    log, recipe = folder / "refused.txt", (run / "recipe.yaml").read_text()
    assert processes.run([*command, "--set", "optim.lr=1e-4"], log) == 2
    assert "optim: was" in processes.output_of(log)
    assert "checkpoint.resume=never" in processes.output_of(log)
    assert rows(run) == rows(undisturbed)
    assert (run / "recipe.yaml").read_text() == recipe


def test_resumes_at_another_split(undisturbed):
    """A run saved on one rank goes on at TP2 x DP2: optimizer, delta and sampler included."""
    folder = undisturbed.parent
    command, run = write_run(folder, "moved")
    log = folder / "moved.txt"
    process = processes.start(command, log)
    while not (run / "checkpoints" / "step_00000006").exists() and process.poll() is None:
        time.sleep(0.005)
    processes.kill_all(process)
    done = len(rows_even_if_half_written(run))
    assert 6 <= done < NUM_STEPS, f"too fast to be interrupted: {done}"
    assert processes.run([*command, "--set", "parallel.tensor=2"], log, num_processes=4) == 0, processes.output_of(log)
    for row, want in zip(rows(run), rows(undisturbed), strict=True):
        for key in ("loss", "reward_margin", "reward_shift", "grad_norm"):
            assert row[key] == pytest.approx(want[key], abs=1e-4, rel=1e-4), (row["step"], key)
