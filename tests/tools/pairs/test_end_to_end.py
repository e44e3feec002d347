"""From questions to pairs through real HTTP, with faults, kills, and the tiny model as policy. About 40 s."""

import contextlib
import json
import math
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from spot_megatron.data.records import read_pairs
from tests.tools.pairs.support import ASSETS, ENVIRONMENT, ROOT, oracle_server, program, rows, run, write_questions
from tools.oracle.http_server import IDLE_CLOSE, REPLY_FAULTS

FAULTS = ("--fault-rate", "0.3", "--slow-seconds", "3")
PATIENCE = ("--timeout", "2", "--backoff-seconds", "0.1", "--concurrency", "48", "--max-calls", "20")


def elicit_options(url: str, folder: Path, questions: Path) -> tuple[str | Path, ...]:
    base = ("--questions", questions, "--output", folder / "elicit", "--prompt-suffix", "")
    return (*base, "--base-url", url, "--model", "oracle", *PATIENCE)


def rectify_options(url: str, folder: Path) -> tuple[str | Path, ...]:
    base = ("--errors", folder / "elicit/errors.jsonl", "--output", folder / "rectify", "--attempts", "8")
    return (*base, "--base-url", url, "--model", "oracle", *PATIENCE)


def run_and_kill(name: str, options: tuple, journal: Path, moments: list[int]) -> None:
    """SIGKILL the program when its journal holds so many records, each time anew, then let it end."""
    for moment in moments:
        process = subprocess.Popen(program(name, *options), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < moment:
            assert process.poll() is None, f"ended before record {moment}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
    run(name, *options)


def final_set(folder: Path) -> dict:
    """What was found, whatever way led there."""
    tables = {name: rows(folder / f"elicit/{name}.jsonl") for name in ("correct", "errors", "excluded")}
    found: dict = {name: [(row["id"], row["response"]) for row in table] for name, table in tables.items()}
    found["rectified"] = [(row["id"], row["corrected"]) for row in rows(folder / "rectify/rectified.jsonl")]
    found["rejected"] = [row["id"] for row in rows(folder / "rectify/rejected.jsonl")]
    return found


def test_a_thousand_questions_with_faults_and_kills_end_as_without(tmp_path):
    """Three calls in ten fail in one of eight ways, and each stage is killed five times."""
    num_questions, num_kills = 1000, 5
    questions = write_questions(tmp_path / "questions.jsonl", num_questions)
    clean, disturbed = tmp_path / "clean", tmp_path / "disturbed"
    with oracle_server("--latency-ms", "5") as url:
        run("elicit", *elicit_options(url, clean, tmp_path / "questions.jsonl"))
        run("rectify", *rectify_options(url, clean))
    rng = random.Random(7)
    with oracle_server("--latency-ms", "5", *FAULTS) as url:
        moments = sorted(rng.sample(range(1, num_questions - 60), num_kills))
        options = elicit_options(url, disturbed, tmp_path / "questions.jsonl")
        run_and_kill("elicit", options, disturbed / "elicit/responses.jsonl", moments)
        num_errors = len(rows(disturbed / "elicit/errors.jsonl"))
        moments = sorted(rng.sample(range(1, max(2, num_errors - 50)), min(num_kills, num_errors // 4)))
        run_and_kill("rectify", rectify_options(url, disturbed), disturbed / "rectify/journal.jsonl", moments)

    assert final_set(disturbed) == final_set(clean)
    found = final_set(disturbed)
    ids = [identifier for name in ("correct", "errors", "excluded") for identifier, _ in found[name]]
    assert sorted(ids) == sorted(question.id for question in questions)
    rectified = [identifier for identifier, _ in found["rectified"]]
    assert sorted(rectified + found["rejected"]) == sorted(identifier for identifier, _ in found["errors"])
    summary = json.loads((disturbed / "rectify/summary.json").read_text())
    attempts = summary["accepted_at_attempt"]
    assert sum(number for attempt, number in attempts.items() if int(attempt) > 1) > 0  # content faults did happen
    journal = rows(disturbed / "elicit/responses.jsonl")
    assert sum(record["calls"] for record in journal) > 1.1 * num_questions  # and so did the others
    keys = [(record["id"], record["sample"]) for record in journal]
    assert len(keys) == len(set(keys)) == num_questions


@contextlib.contextmanager
def restarting_server(port: int, away_seconds: float) -> Iterator[threading.Thread]:
    """A server on `port` that is killed after a second, and started again `away_seconds` later."""
    options = ("--latency-ms", "20", "--fault-rate", "0.2", "--faults", *REPLY_FAULTS, IDLE_CLOSE)

    def start() -> subprocess.Popen:
        command = program("oracle_server", "--port", str(port), *options)
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        return process

    def restart() -> None:
        time.sleep(1.0)
        processes[0].kill()
        processes[0].wait()
        time.sleep(away_seconds)
        processes.append(start())

    processes = [start()]
    thread = threading.Thread(target=restart)
    try:
        yield thread
    finally:
        if thread.ident:
            thread.join()
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def disturbed_run(folder: Path, num_questions: int, away_seconds: float, num_kills: int) -> dict:
    """Elicit from a server that refuses, thinks, says nothing, closes idle connections and restarts; the final set."""
    questions = write_questions(folder / "questions.jsonl", num_questions)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = elicit_options(f"http://127.0.0.1:{port}/v1", folder, folder / "questions.jsonl")
    options = (*options, "--concurrency", "16", "--max-calls", "4", "--timeout", "60")
    with restarting_server(port, away_seconds) as restart:
        if away_seconds:
            restart.start()
        moments = [num_questions * (number + 1) // (num_kills + 2) for number in range(num_kills)]
        run_and_kill("elicit", options, folder / "elicit/responses.jsonl", moments)
    found = {name: rows(folder / f"elicit/{name}.jsonl") for name in ("correct", "errors", "excluded")}
    ids = [row["id"] for table in found.values() for row in table]
    assert sorted(ids) == sorted(question.id for question in questions)  # every id once
    return {name: [(row["id"], row["reason"], row.get("response")) for row in table] for name, table in found.items()}


def test_a_server_as_servers_are_costs_no_question_and_changes_none(tmp_path):
    for name in ("calm", "restarted", "killed"):
        (tmp_path / name).mkdir()
    calm = disturbed_run(tmp_path / "calm", 300, 0.0, 0)
    reasons = Counter(reason for _, reason, _ in calm["excluded"])
    assert {"failed_http_403", "empty_content", "thought_anyway"} <= set(reasons)
    assert disturbed_run(tmp_path / "restarted", 300, 3.0, 0) == calm
    assert disturbed_run(tmp_path / "killed", 300, 2.0, 3) == calm


def test_the_tiny_models_whole_path(tmp_path):
    """Questions, sampled token ids, rectification, pairs, and a training run that starts from reward 0."""
    write_questions(tmp_path / "questions.jsonl", 60)
    with oracle_server("--policy", str(ASSETS)) as url:
        endpoint = ("--base-url", url, "--model", "tiny")
        options = ("--prompt-suffix", "", "--max-tokens", "128", "--token-ids")
        run("elicit", "--questions", tmp_path / "questions.jsonl", "--output", tmp_path / "e", *endpoint, *options)
        run("rectify", "--errors", tmp_path / "e/errors.jsonl", "--output", tmp_path / "r", *endpoint)
    report = ("--report", tmp_path / "report.html")
    output = ("--tokenizer", ASSETS, "--output", tmp_path / "pairs.jsonl")
    run("pairs", "--rectified", tmp_path / "r/rectified.jsonl", *output, *report)
    summary = json.loads((tmp_path / "pairs.summary.json").read_text())
    elicited = summary["upstream"]["upstream"]
    assert elicited["samples_with_token_ids"] == 60
    assert (tmp_path / "r" / elicited["folder"]).samefile(tmp_path / "e")
    assert 5 < elicited["errors"] < 55
    assert summary["upstream"]["rectified"] == elicited["errors"]
    pairs = read_pairs([tmp_path / "pairs.jsonl"])
    assert len(pairs) == summary["pairs"] > 0.8 * elicited["errors"]
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    for pair in pairs:
        assert pair.rejected_finish == "stop"
        assert pair.rejected_ids[-1] == end
        assert tokenizer.decode(pair.rejected_ids) == pair.rejected
        assert pair.prompt[0]["role"] == "user"
    assert (tmp_path / "report.html").stat().st_size > 5000
    settings = [f"data.pairs={tmp_path / 'pairs.jsonl'}", f"output={tmp_path / 'run'}", "train.max_steps=2"]
    settings += ["train.batch_pairs=4", "evaluation.questions=null"]
    command = [sys.executable, "-m", "spot_megatron.train", "qwen3_tiny_spot"]
    command += [part for setting in settings for part in ("--set", setting)]
    trained = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert trained.returncode == 0, trained.stderr[-2000:]
    steps = rows(tmp_path / "run/metrics.jsonl")
    assert [step["pairs"] for step in steps] == [4, 4]
    assert abs(steps[0]["loss"] - 2 * math.log(2)) < 1e-4


def test_a_signal_ends_a_run_in_order(tmp_path):
    write_questions(tmp_path / "questions.jsonl", 300)
    with oracle_server("--latency-ms", "100") as url:
        options = elicit_options(url, tmp_path, tmp_path / "questions.jsonl")
        process = subprocess.Popen(
            program("elicit", *options, "--concurrency", "4"), cwd=ROOT, env=ENVIRONMENT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        journal = tmp_path / "elicit/responses.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 75
        assert "Run again to continue" in errors
        assert "Traceback" not in errors
        summary = json.loads((tmp_path / "elicit/summary.json").read_text())
        assert summary["pending"] > 200
        assert re.search(rf"^pending +{summary['pending']}$", output, re.MULTILINE)
        run("elicit", *options)
    assert json.loads((tmp_path / "elicit/summary.json").read_text())["pending"] == 0


def test_the_data_half_imports_neither_torch_nor_megatron():
    modules = [f"tools.pairs.{path.stem}" for path in (ROOT / "tools/pairs").glob("*.py") if path.stem != "__main__"]
    modules += ["tools.elicit", "tools.grade", "tools.rectify", "tools.pairs.__main__"]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, *modules]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
