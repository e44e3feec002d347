"""Batch mode against the local server: the same results, one submission each, collected after a kill. About 20 s."""

import asyncio
import json
import subprocess
import time

import pytest

from tests.tools.pairs.support import ENVIRONMENT, ROOT, oracle_server, program, rows, run, write_questions
from tests.tools.pairs.test_servers import error, scripted_server
from tools.pairs.batch import BatchClient
from tools.pairs.endpoint import ApiKey, EndpointError

BATCH = ("--batch", "40", "--poll-seconds", "0.2", "--model", "oracle")


def elicit(url, folder, *options):
    base = ("--questions", folder.parent / "q.jsonl", "--output", folder, "--base-url", url, "--prompt-suffix", "")
    run("elicit", *base, "--model", "oracle", *options)
    names = ("correct", "errors", "excluded")
    return {
        name: [(row["id"], row["reason"], row.get("response")) for row in rows(folder / f"{name}.jsonl")]
        for name in names
    }


def test_batches_give_what_single_calls_give(tmp_path):
    write_questions(tmp_path / "q.jsonl", 100)
    faults = ("--fault-rate", "0.3", "--faults", "forbidden", "thinking", "null_content")
    with oracle_server(*faults) as url:
        single = elicit(url, tmp_path / "single")
        assert elicit(url, tmp_path / "batch", *BATCH) == single
        submitted = rows(tmp_path / "batch/batches.jsonl")
        assert [len(row["requests"]) for row in submitted if "requests" in row] == [40, 40, 20]
        assert sum("failed" in row for row in submitted) == sum("403" in reason for _, reason, _ in single["excluded"])
        options = ("--base-url", url, "--output", tmp_path / "r", *BATCH)
        run("rectify", "--errors", tmp_path / "batch/errors.jsonl", *options)
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["rectified"] + summary["rejected"].get("failed_http_403", 0) > 0.5 * summary["errors"]


def test_failures_join_a_later_batch(tmp_path):
    write_questions(tmp_path / "q.jsonl", 30)
    with oracle_server("--fault-rate", "0.4", "--faults", "server_error") as url:
        first = elicit(url, tmp_path / "out", *BATCH)
        assert 3 < len(first["excluded"]) < 27
        for _ in range(6):
            last = elicit(url, tmp_path / "out", *BATCH)
    assert last["excluded"] == []
    assert len(last["correct"]) + len(last["errors"]) == 30


def test_a_killed_run_collects_its_batch_and_pays_once(tmp_path):
    write_questions(tmp_path / "q.jsonl", 30)
    base = ("--questions", tmp_path / "q.jsonl", "--output", tmp_path / "out", "--prompt-suffix", "")
    with oracle_server() as url:
        options = (*base, "--base-url", url, *BATCH, "--poll-seconds", "60")
        process = subprocess.Popen(program("elicit", *options), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        state, deadline = tmp_path / "out/batches.jsonl", time.monotonic() + 60
        while not state.exists() or b'"batch"' not in state.read_bytes():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()  # as a rule before an answer is on file; the batch may also have been collected already
        elicit(url, tmp_path / "out", *BATCH)
    assert len(rows(tmp_path / "out/responses.jsonl")) == 30
    assert sum("requests" in row for row in rows(state)) == 1


def test_a_server_without_batches_is_named(tmp_path):

    async def use(url, bodies):
        async with BatchClient(url, ApiKey("NONE"), tmp_path, 5, 0.1, 1.0) as client:
            with pytest.raises(EndpointError, match="Leave --batch out"):
                await asyncio.wait_for(client.complete({"model": "m", "messages": []}), 20)

    scripted_server([error(404)], use)
