"""`make train`'s launcher: what signals, wrong questions and wrong numbers do to it. About 30 s."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs
from tools import launch
from tools.eval.__main__ import parser as eval_parser

ASSETS = Path(__file__).parents[2] / "recipes/assets/qwen3_tiny"
QUESTION = {"id": "a", "question": "4*2, 7*9", "answer": "8,63", "skill": "products"}

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
    return ["-c", f"import sys; from tools.training_process import run_alone; sys.exit(run_alone(['-c', {child!r}]))"]


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


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_launcher_leaves_no_process_behind(tmp_path, num_processes):
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(24))
    sections = {"train": {"batch_pairs": 4, "epochs": 500}, "checkpoint": {"every_steps": 10000}}
    (tmp_path / "r.yaml").write_text(make_recipe(tmp_path, **sections).dump())
    log = tmp_path / "log.txt"
    command = ["-m", "tools.launch", str(tmp_path / "r.yaml"), "--processes", str(num_processes)]
    with processes.started(command, log, {}) as process:
        processes.wait_for((tmp_path / "run" / "metrics.jsonl").exists, "the first steps", 120, log)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= num_processes
        process.kill()
        assert not psutil.wait_procs(family, timeout=30)[1]


def test_a_refused_start_prints_the_error_alone(tmp_path):
    """Under torchrun every process meets the same mistake, which is printed once and followed by nothing."""
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(24))
    (tmp_path / "r.yaml").write_text(make_recipe(tmp_path, parallel={"tensor": 2, "pipeline": 2}).dump())
    log = tmp_path / "log.txt"
    command = ["-m", "spot_megatron.train", str(tmp_path / "r.yaml")]
    code = "import sys; from tools.training_process import run_under_torchrun as r; "
    code += f"sys.exit(r(['--nproc-per-node', '3', '--standalone', *{command!r}]))"
    assert processes.run(["-c", code], log, timeout=120) == 2
    printed = processes.output_of(log)
    assert "3 processes cannot hold models of 4 ranks" in printed
    assert "stopped" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": {"pairs": "none.jsonl"}}, ["none.jsonl", "cannot be read"]),
        ({"parallel": {"tensor": 8}}, ["1 processes cannot hold models of 8 ranks"]),
        ({"parallel": {"pipeline": 2}}, ["1 processes cannot hold models of 2 ranks"]),
        ({"model": {"hf": "missing/model"}, "precision": {"dtype": "bf16"}, "device": "auto"}, ["no GPU was found"]),
    ],
)
def test_mistakes_are_reported_before_processes_start(tmp_path, capsys, monkeypatch, changed, words):
    save_random_hf(tmp_path / "model")
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(4))
    (tmp_path / "r.yaml").write_text(make_recipe(tmp_path, **changed).dump())
    for name in ("run_alone", "run_under_torchrun"):
        monkeypatch.setattr(launch, name, lambda command: pytest.fail("a process was started"))
    assert launch.main([str(tmp_path / "r.yaml"), "--processes", "1"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list[str]:
    """Arguments of a run whose training is done at once: its result is the base."""

    def train(command: list[str]) -> int:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "hf").symlink_to(ASSETS)
        (tmp_path / "run" / "recipe.yaml").write_text("name: x\n")
        return 0

    monkeypatch.setattr(launch, "run_alone", train)
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n")
    overrides = [f"output={tmp_path / 'run'}", f"evaluation.questions={tmp_path / 'q.jsonl'}"]
    return ["qwen3_tiny_spot", "--processes", "1", "--set", *overrides]


def test_the_questions_are_asked_as_the_recipe_says(trained, tmp_path, capsys):
    assert launch.main([*trained, "evaluation.max_new_tokens=5", "evaluation.samples=3"]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for side in ("base", "model"):
        assert result[side]["skills"]["products"] == {
            "correct": 0,
            "total": 3,
            "accuracy": 0.0,
            "undecided": 0,
            "cut": 3,
        }
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("+ python -m tools.eval "))
    flags = eval_parser().parse_args(shlex.split(printed)[4:])
    assert (flags.base, flags.samples, flags.max_new_tokens, flags.temperature) == (
        "recipes/assets/qwen3_tiny", 3, 5, 0.7
    )  # fmt: skip
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        (None, ["q.jsonl", "cannot be read"]),
        ('{"question": "2+3?"}\n', ["q.jsonl:1", "answer"]),
        ('{"question": "2+3?", "answer": "5", "skill": ["sum"]}\n', ["q.jsonl:1", "skill"]),
    ],
)
def test_wrong_questions_are_told_before_the_training(trained, tmp_path, capsys, questions, words):
    (tmp_path / "q.jsonl").unlink()
    if questions:
        (tmp_path / "q.jsonl").write_text(questions)
    assert launch.main(trained) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_model_without_tokenizer_is_told_before_the_training(trained, tmp_path, capsys):
    save_random_hf(tmp_path / "model")
    assert launch.main([*trained, f"model.hf={tmp_path / 'model'}"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_base_may_be_a_hub_id(trained, monkeypatch, tmp_path):
    monkeypatch.setattr("spot_megatron.hf.hub.resolve_model", {"owner/name": ASSETS}.__getitem__)
    assert launch.main([*trained, "model.hf=owner/name", "evaluation.max_new_tokens=1"]) == 0
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_what_stops_the_evaluation_is_told_without_a_traceback(trained, monkeypatch, capsys):
    assert launch.main([*trained, "model.hf=nowhere"]) == 2
    assert "the folder nowhere does not exist" in capsys.readouterr().err
    monkeypatch.setattr(launch, "evaluate", lambda recipe: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(launch, "run_alone", lambda command: 0)
    assert launch.main(trained) == 75
    assert "run the same command to continue" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--nodes", "0"], ["--processes", "0"], ["--nodes", "-1"]])
def test_counts_below_one_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as refused:
        launch.main(["qwen3_tiny_spot", *flags])
    assert refused.value.code == 2
    assert f"argument {flags[0]}: must be at least 1" in capsys.readouterr().err
