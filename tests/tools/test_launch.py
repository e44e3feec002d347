"""`make train`'s launcher: what signals, wrong questions and wrong numbers do to it. About 30 s."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs

# Saves on the first stop signal, which takes a moment; a second one ends it at once, as in train/stop.py.
STAND_IN = """
import signal, sys, time
got = []
def stop(number, frame):
    got.append(number)
    signal.signal(number, signal.SIG_DFL)
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), stop)
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(2)
print("saved on", signal.Signals(got[0]).name, flush=True)
sys.exit(75)
"""


def launcher(child: str) -> list[str]:
    """A program that runs this one as the launcher runs the training."""
    return ["-c", f"import sys; from tools.launch import _run; sys.exit(_run([sys.executable, '-c', {child!r}]))"]


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (signal.SIGINT, "SIGINT"),
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGUSR1, "SIGUSR1"),
        (signal.SIGHUP, "SIGTERM"),
    ],
)
def test_a_stop_signal_reaches_the_training_once(tmp_path, sent, received):
    """To the launcher's whole group, as a terminal sends Ctrl-C, and again to it alone, as `timeout` does."""
    log = tmp_path / "log.txt"
    with processes.started(launcher(STAND_IN), log, {}) as process:
        processes.wait_for(lambda: "\nready" in processes.output_of(log), "the stand-in", 60, log)
        os.killpg(process.pid, sent)
        time.sleep(0.1)
        process.send_signal(sent)
        assert process.wait(30) == 75, processes.output_of(log)
    assert f"\nsaved on {received}" in processes.output_of(log)
    assert "Traceback" not in processes.output_of(log)


def test_an_ignored_signal_stays_ignored(tmp_path):
    """tools/slurm.py and nohup have the launcher ignore what is meant for others."""
    log = tmp_path / "log.txt"
    ignoring = launcher("print('ready', flush=True); import time; time.sleep(1); print('whole')")
    ignoring[1] = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + ignoring[1]
    with processes.started(ignoring, log, {}) as process:
        processes.wait_for(lambda: "\nready" in processes.output_of(log), "the child", 60, log)
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0, processes.output_of(log)
    assert "\nwhole" in processes.output_of(log)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 75), ("SIGKILL", 1)])
def test_a_training_ended_by_a_signal_is_told(tmp_path, name, code):
    """Before it listens a stop signal ends it: 75, since the same command goes on. SIGKILL is a failure."""
    child = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.{name})"
    assert processes.run(launcher(child), tmp_path / "log.txt") == code
    assert f"the training process was ended by {name}" in processes.output_of(tmp_path / "log.txt")


def test_other_exit_codes_are_the_training_s(tmp_path):
    assert processes.run(launcher("import sys; sys.exit(2)"), tmp_path / "log.txt") == 2


def test_a_real_training_saves_on_an_interrupt_of_the_launcher(tmp_path):
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(24))
    sections = {"train": {"batch_pairs": 4, "epochs": 500}, "checkpoint": {"every_steps": 10000}}
    (tmp_path / "r.yaml").write_text(make_recipe(tmp_path, **sections).dump())
    run, log = tmp_path / "run", tmp_path / "log.txt"
    with processes.started(["-m", "tools.launch", str(tmp_path / "r.yaml"), "--processes", "1"], log, {}) as process:
        processes.wait_for((run / "metrics.jsonl").exists, "the first steps", 120, log)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 75, processes.output_of(log)
        assert not psutil.wait_procs(family, timeout=10)[1]
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert (run / "checkpoints" / f"step_{done:08d}" / "state.json").exists()
    assert "Traceback" not in processes.output_of(log)
