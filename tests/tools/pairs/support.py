"""What the tests of the data half share: a local server as a process, questions of the tiny world, program runs."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from spot_megatron.files import Row, read_rows, write_rows
from tools.oracle.http_server import Faults, Service, serve
from tools.pairs.client import ChatClient
from tools.pairs.grade import Grader
from tools.pairs.limits import Backoff, Prices
from tools.pairs.oracle import Oracle
from tools.pairs.prompts import MARKER_END, MARKER_START
from tools.pairs.rectify import Rectification
from tools.tiny import skills

ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "recipes/assets/qwen3_tiny"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OPENAI_API_KEY": "sk-test-0123456789abcdef",
    "PYTHONPATH": str(ROOT),
}


@contextlib.contextmanager
def oracle_server(*options: str) -> Iterator[str]:
    """The address of a `tools.oracle_server` process on a free port."""
    command = [sys.executable, "-m", "tools.oracle_server", "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    try:
        yield json.loads(process.stdout.readline())["serving"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def program(name: str, *options: str | Path) -> list[str]:
    return [sys.executable, "-m", f"tools.{name}", *map(str, options)]


def run(name: str, *options: str | Path, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python -m tools.NAME` to its end; `check` asserts exit code 0."""
    result = subprocess.run(
        program(name, *options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert not check or result.returncode == 0, result.stderr[-2000:]
    return result


def write_questions(path: Path, count: int, seed: int = 5) -> list[skills.Question]:
    questions = skills.generate("products", count, seed)
    write_rows(path, ({"id": q.id, "question": q.question, "answer": q.answer} for q in questions))
    return questions


def rows(path: Path) -> list[Row]:
    return [row for _, row in read_rows(path)]


def an_error(identifier: str = "q1", **changes: object) -> Row:
    """A line of errors.jsonl from the tiny world."""
    row: Row = {"id": identifier, "question": "4*2, 7*9", "answer": "8,63"}
    row |= {"response": r"here 4*2=8. then 7*9=65. the answer is \boxed{8,65}.", "finish_reason": "stop"}
    return {**row, **changes}


RIGHT = r"here 4*2=8. then 7*9=63. the answer is \boxed{8,63}."
WRONG = r"here 4*2=8. then 7*9=64. the answer is \boxed{8,64}."


def marked(text: str) -> str:
    return f"<think>hm</think>{MARKER_START}\n{text}\n{MARKER_END}"


def rectify(
    output,
    errors,
    answerer,
    *,
    attempts=3,
    faults=None,
    prices=None,
    concurrency=8,
    max_failures=20,
    meter=None,
    choice=None,
    **run_options,
):
    """Rectify against an in-process server and return (the Rectification, its summary)."""

    async def main():
        server = await serve(Service(answerer, faults or Faults(0.0, 0)), "127.0.0.1", 0)
        oracle = Oracle("m", with_answer=run_options.pop("with_answer", False), max_tokens=100)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        grader = Grader()
        rectification = Rectification(output, errors, oracle, attempts, prices or Prices(), meter, choice)
        try:
            async with server, ChatClient([url], backoff=Backoff(0.01, 0.02), max_calls=4, timeout=5) as client:
                await rectification.run(client, grader, concurrency, max_failures, **run_options)
        finally:
            grader.close()
            summary = rectification.write_outputs()
            rectification.journal.close()
        return summary

    return asyncio.run(main())


def errors_of(count: int) -> dict:
    return {f"q{number}": an_error(f"q{number}") for number in range(count)}
