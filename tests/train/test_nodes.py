"""Many nodes, as two torchrun agents on this machine: one is lost and comes back, and a hang becomes a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from spot_megatron.hf.folder import HFFolder, same_bits
from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs

NUM_STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    save_random_hf(folder / "model")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(24))
    return folder


def write_run(folder: Path, name: str, timeout_minutes: float = 2) -> Path:
    """A recipe of 30 steps that saves every 3, for two data-parallel ranks. Returns its run folder."""
    recipe = make_recipe(
        folder,
        output=str(folder / name),
        objective={"name": "spot_bco", "beta": 0.5},
        train={"batch_pairs": 4, "epochs": 5},
        optim={"lr": 1e-3},
        checkpoint={"every_steps": 3, "keep": 2},
        parallel={"timeout_minutes": timeout_minutes},
    )
    (folder / f"{name}.yaml").write_text(recipe.dump())
    return folder / name


@contextmanager
def started_node(run: Path, rank: int, port: int) -> Iterator[tuple[subprocess.Popen, Path]]:
    log = run.with_name(f"{run.name}.{rank}.txt")
    command = ["-m", "tools.launch", f"{run}.yaml", "--nodes", "2", "--processes", "1"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(rank)}
    with processes.started(command, log, address) as process:
        yield process, log


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without the only thing that may differ; a half-written last line is left out."""
    if not (run / "metrics.jsonl").exists():
        return []
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_comes_back(folder):
    """SIGKILL to one node's agent: its training process ends with it, and the node started anew joins the other."""
    undisturbed = write_run(folder, "undisturbed")
    log = folder / "undisturbed.txt"
    command = ["-m", "spot_megatron.train", f"{undisturbed}.yaml"]
    assert processes.run(command, log, num_processes=2) == 0, processes.output_of(log)

    run, port = write_run(folder, "disturbed"), processes.free_port()
    with started_node(run, 0, port) as (first, first_log):
        with started_node(run, 1, port) as (second, second_log):
            processes.wait_for((run / "checkpoints" / "step_00000006").exists, "step 6", 120, first_log, second_log)
            workers = psutil.Process(second.pid).children(recursive=True)
            assert workers
            os.kill(second.pid, signal.SIGKILL)
            _, alive = psutil.wait_procs(workers, timeout=20)
            assert not alive, f"trains on without its agent: {alive}"
        assert 6 <= len(rows(run)) < NUM_STEPS, "too fast to be interrupted"
        assert first.poll() is None
        with started_node(run, 1, port) as (second, second_log):
            for process, log in ((first, first_log), (second, second_log)):
                assert process.wait(180) == 0, processes.output_of(log)
    assert "steps 0 to" in processes.output_of(first_log) + processes.output_of(second_log)
    assert rows(run) == rows(undisturbed)
    assert len(rows(run)) == NUM_STEPS
    ours, theirs = HFFolder(run / "hf"), HFFolder(undisturbed / "hf")
    assert ours.names() == theirs.names()
    assert all(same_bits(ours.read(name), theirs.read(name)) for name in theirs.names())
    assert len(list((run / "logs").glob("node_*/*/attempt_*/0/stdout.log"))) >= 3


def test_a_stopped_rank_is_reported(folder):
    """SIGSTOP to one of two ranks: the other tells who is missing and since which step, then the collective fails."""
    run, port = write_run(folder, "stuck", timeout_minutes=0.1), str(processes.free_port())
    command = ["-m", "spot_megatron.train", f"{run}.yaml"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / "stuck_0.txt", folder / "stuck_1.txt"]
    with (
        processes.started(command, logs[0], {"RANK": "0", **shared}) as first,
        processes.started(command, logs[1], {"RANK": "1", **shared}) as second,
    ):
        processes.wait_for(lambda: len(rows(run)) >= 3, "step 3", 120, *logs)
        second.send_signal(signal.SIGSTOP)
        assert first.wait(60) == 1, processes.output_of(logs[0])
    output = processes.output_of(logs[0])
    report = (run / "heartbeat" / "stuck.txt").read_text()
    assert report in output
    assert "STUCK" in report
    assert "rank 1 is stopped or gone" in report
    for rank in range(2):
        beat = json.loads((run / "heartbeat" / f"rank_{rank}").read_text())
        assert f"rank {rank:<4} step {beat['step']:<6} " in report
    assert f" {beat['doing']}, begun" in report  # of the stopped rank; the other one has failed since
    assert json.loads((run / "heartbeat" / "rank_0").read_text())["doing"].startswith("failed: ")
    assert "loop.py" in (run / "heartbeat" / "rank_0.stack").read_text()
    assert not (run / "heartbeat" / "rank_1.stack").exists()
    assert "timed out" in output.lower()


def test_a_refused_recipe_is_not_started_again(folder):
    run, port = write_run(folder, "refused"), processes.free_port()
    (folder / "refused.yaml").write_text((folder / "refused.yaml").read_text().replace("pairs.jsonl", "absent.jsonl"))
    with started_node(run, 0, port) as (first, log), started_node(run, 1, port) as (second, _):
        assert {first.wait(120), second.wait(120)} == {2}, processes.output_of(log)
    output = processes.output_of(log) + processes.output_of(run.with_name("refused.1.txt"))
    assert output.count("absent.jsonl") >= 1
    assert not list((run / "logs").glob("node_*/*/attempt_1"))
