"""The scripts for Slurm. Without Slurm the nodes' script runs as it is, and the job's beside stand-in commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs
from tools.slurm import main

NUM_STEPS = 3000


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe of 3000 steps, which nobody waits for."""
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(24))
    sections = {"train": {"batch_pairs": 4, "epochs": 500}, "checkpoint": {"every_steps": 10000}}
    (tmp_path / "r.yaml").write_text(make_recipe(tmp_path, **sections).dump())
    return tmp_path / "r.yaml"


def write(recipe: Path, *options: str) -> Path:
    assert main([str(recipe), "--nodes", "2", "--gpus", "1", *options]) == 0
    folder = recipe.parent / "run" / "slurm"
    for script in ("job.sh", "node.sh"):
        assert subprocess.run(["bash", "-n", str(folder / script)], check=False).returncode == 0
    return folder


def test_options_reach_the_scripts(recipe, capsys):
    folder = write(
        recipe,
        *(
            "--time",
            "02:00:00",
            "--grace",
            "300",
            "--sbatch=--partition=h800 --account=me",
            "--interconnect",
            "ethernet",
        ),
        *("--interface", "eth1", "--image", "/images/spot.sqsh", "--set", "device=auto", "optim.lr=2e-6"),
    )
    job, node = (folder / "job.sh").read_text(), (folder / "node.sh").read_text()
    for directive in ("--nodes=2", "--gpus-per-node=1", "--time=02:00:00", "--signal=B:USR1@300", "--requeue"):
        assert f"\n#SBATCH {directive}\n" in job
    assert "\n#SBATCH --partition=h800\n#SBATCH --account=me\n" in job
    assert "--container-image=/images/spot.sqsh" in job
    assert "\nexport NCCL_IB_DISABLE=1\n" in node
    assert "\nexport NCCL_SOCKET_IFNAME=eth1 GLOO_SOCKET_IFNAME=eth1\n" in node
    assert f"exec python3 -m tools.launch {recipe} --nodes 2 --processes 1 --set device=auto optim.lr=2e-6\n" in node
    assert "not submitted" in capsys.readouterr().out


def test_what_cannot_run_is_refused(recipe, capsys):
    assert main([str(recipe), "--nodes", "3", "--gpus", "1", "--set", "parallel.tensor=2"]) == 2
    assert "change NODES or GPUS" in capsys.readouterr().err
    assert main([str(recipe), "--nodes", "2", "--set", "checkpoint.resume=never"]) == 2
    assert "restart the training from step 0" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("option", ["--nodes", "--gpus", "--grace"])
def test_counts_below_one_are_refused(recipe, option, capsys):
    with pytest.raises(SystemExit) as refused:
        main([str(recipe), "--nodes", "2", option, "0"])
    assert refused.value.code == 2
    assert f"argument {option}: must be at least 1" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()


def test_submitting_where_there_is_no_slurm_is_told(recipe, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(recipe.parent))
    assert main([str(recipe), "--nodes", "2", "--gpus", "1", "--submit"]) == 2
    assert "sbatch is not installed" in capsys.readouterr().err


def test_the_nodes_train_and_save_on_usr1(recipe):
    """As Slurm does it: SIGUSR1 to every process of the job. The agents ignore it, the training processes save."""
    script, port = write(recipe) / "node.sh", str(processes.free_port())
    run, logs = recipe.parent / "run", [recipe.parent / f"node_{rank}.txt" for rank in range(2)]
    started = [
        processes.started(
            ["-c", f"import os; os.execv('/bin/bash', ['bash', {str(script)!r}])"],
            logs[rank],
            {"SLURM_PROCID": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]
    with started[0] as first, started[1] as second:
        processes.wait_for((run / "metrics.jsonl").exists, "the first steps", 120, *logs)
        for agent in (first, second):
            for process in (psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)):
                process.send_signal(signal.SIGUSR1)
        codes = [first.wait(120), second.wait(120)]
    assert codes == [75, 75], "".join(map(processes.output_of, logs))
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < NUM_STEPS
    assert json.loads((run / "checkpoints" / f"step_{done:08d}" / "state.json").read_text())["step"] == done
    assert {path.parts[-5] for path in run.glob("logs/*/*/attempt_0/0/stdout.log")} == {"node_0", "node_1"}


def test_the_warning_before_the_first_step_ends_the_run(recipe):
    """While it sets up there is nothing to save, and the warning must not be lost."""
    log = recipe.parent / "early.txt"
    with processes.started(["-m", "spot_megatron.train", str(recipe)], log, {}) as process:
        processes.wait_for(lambda: catches_usr1(process.pid), "a handler", 60, log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 75, processes.output_of(log)
    assert "stopped at once by a signal" in processes.output_of(log)
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()


def catches_usr1(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_job_passes_the_warning_on_and_queues_again(recipe, code, requeued):
    """srun, scancel and scontrol are stand-ins; the job's own shell is the real one."""
    folder, commands = write(recipe), recipe.parent / "bin"
    commands.mkdir()
    stand_ins = {
        "srun": f"echo $$ > {commands}/pid; trap 'kill $s; exit {code}' USR1; sleep 60 & s=$!; wait; exit 3",
        "scancel": f'[ "$*" = "--signal=USR1 7" ] && sleep 0.3 && kill -USR1 $(cat {commands}/pid)',
        "scontrol": f'echo "$*" >> {commands}/asked; echo 127.0.0.1',
    }
    for name, body in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    log = recipe.parent / "job.txt"
    shell = ["-c", f"import os; os.execv('/bin/bash', ['bash', {str(folder / 'job.sh')!r}])"]
    with processes.started(shell, log, environment) as job:
        processes.wait_for((commands / "pid").exists, "srun", 30, log)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == code, processes.output_of(log)
    assert ("requeue 7" in (commands / "asked").read_text()) == requeued
    assert "saving" in processes.output_of(log)
