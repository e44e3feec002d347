"""Where rectification stops: target, budget, signals, refusals, a server that is gone. About 15 s."""

import asyncio
import json
import os
import signal
import time

import pytest

from spot_megatron.files import write_rows
from tests.tools.pairs.support import RIGHT, WRONG, an_error, errors_of, marked, rectify, rows, run
from tools.oracle.http_server import Answer, Faults, RefusedRequest
from tools.pairs.client import most_tokens
from tools.pairs.limits import Prices
from tools.pairs.oracle import Oracle
from tools.pairs.pool import Interrupted, RunFailed, run_pool


def test_the_target_stops_the_run_and_a_later_one_goes_on(tmp_path):
    calls = []

    def answer(request, fault):
        calls.append(1)
        return Answer(marked(RIGHT))

    summary = rectify(tmp_path, errors_of(30), answer, target=5, concurrency=16)
    assert (summary["rectified"], len(calls)) == (5, 5)
    assert summary["rejected"] == {"not_attempted_target_reached": 25}
    assert rectify(tmp_path, errors_of(30), answer, target=10, concurrency=16)["rectified"] == len(calls) == 10
    assert rectify(tmp_path, errors_of(30), answer, target=10, concurrency=16)["rectified"] == len(calls) == 10


def test_failures_on_the_way_to_the_target_are_made_up_for(tmp_path):
    calls = []

    def answer(request, fault):
        calls.append(1)
        return Answer(marked(RIGHT if len(calls) % 3 == 0 else WRONG))

    summary = rectify(tmp_path, errors_of(40), answer, target=7, concurrency=16, attempts=1)
    assert (summary["rectified"], summary["stopped"]) == (7, "target_reached")
    assert len(calls) <= 3 * 7
    few = rectify(tmp_path / "few", errors_of(9), answer, target=7, concurrency=16, attempts=1)
    assert (few["rectified"], few["stopped"], sum(few["rejected"].values())) == (3, "finished", 6)


@pytest.mark.parametrize("faulty", [False, True])
def test_the_budget_is_kept_to_the_cent_and_survives_restarts(tmp_path, faulty):
    """Lost answers count with the most that they can have cost."""

    def answer(request, fault):
        return Answer(marked(RIGHT), prompt_tokens=500, completion_tokens=100)

    prices = Prices(prompt=1.0, completion=100.0)
    for limit in (0.1, 0.25):
        faults = Faults(0.4, 1, ("truncated_json", "server_error")) if faulty else None
        summary = rectify(
            tmp_path, errors_of(60), answer, prices=prices, faults=faults, budget_usd=limit, concurrency=16
        )
        assert 0.75 * limit < summary["cost_usd"] <= limit
        assert summary["stopped"] == "budget_spent"
        assert summary["rectified"] + sum(summary["rejected"].values()) == 60
    assert rectify(tmp_path, errors_of(60), answer, prices=prices, budget_usd=9.0)["rectified"] == 60


@pytest.mark.parametrize(
    ("extra_body", "most"),
    [
        ({}, 100),
        ({"max_completion_tokens": 700}, 700),
        ({"max_tokens": None, "max_completion_tokens": 700}, 700),
        ({"max_tokens": 30}, 30),
    ],
)
def test_the_budgets_bound_is_that_of_the_request_as_sent(extra_body, most):
    oracle = Oracle("m", max_tokens=100, extra_body={**extra_body, "tools": ["x" * 5000]})
    oracle.check_bounded()
    prompt, written = most_tokens(oracle.request(an_error(), []))
    assert written == most
    assert prompt > 5000


def test_a_budget_refuses_requests_without_a_bound(tmp_path):
    write_rows(tmp_path / "errors.jsonl", [an_error()])
    base = ("--errors", tmp_path / "errors.jsonl", "--output", tmp_path / "out", "--model", "m")
    base = (*base, "--base-url", "http://127.0.0.1:1/v1", "--budget-usd", "1")
    base = (*base, "--price-prompt", "1", "--price-completion", "1", "--extra-body")
    for body, message in (
        ('{"max_tokens": null}', "takes max_tokens away"),
        ('{"max_tokens": "many"}', "whole number above 0"),
        ('{"n": 4}', "must not set 'n'"),
        ('{"stream": true}', "must not set 'stream'"),
    ):
        result = run("rectify", *base, body, check=False)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_what_an_interrupted_call_may_have_cost_is_on_file(tmp_path):
    """Two of three calls hang; SIGINT comes once the first is on file."""
    calls = []

    async def never():
        await asyncio.sleep(60)

    def answer(request, fault):
        calls.append(1)
        if len(calls) == 1:
            return Answer(marked(RIGHT), prompt_tokens=0, completion_tokens=10)
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
        return asyncio.ensure_future(never())

    prices = Prices(prompt=0.0, completion=1000.0)  # ten cents a call at most
    with pytest.raises(Interrupted):
        rectify(tmp_path, errors_of(5), answer, prices=prices, budget_usd=9.0, concurrency=1, drain_seconds=0.2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cost_usd"] == pytest.approx(0.01 + 0.1)
    assert summary["stopped"] == "interrupted"
    assert summary["rejected"] == {"failed_interrupted": 1, "not_attempted_interrupted": 3}
    again = rectify(tmp_path, errors_of(5), lambda *_: Answer(marked(RIGHT)), prices=prices, budget_usd=0.1)
    assert (again["stopped"], again["cost_usd"]) == ("budget_spent", pytest.approx(0.11))


def test_refusals_alone_are_a_failure_and_another_oracle_is_asked(tmp_path):
    def refuse(request, fault):
        raise RefusedRequest("no")

    for _ in range(2):  # fewer than --max-failures, and more
        with pytest.raises(RunFailed, match=r"all requests of this run \(10\) failed"):
            rectify(tmp_path, errors_of(10), refuse)
    with pytest.raises(RunFailed, match="the first 5 requests failed"):
        rectify(tmp_path, errors_of(10), refuse, max_failures=5, concurrency=1)
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] == "requests_failed"
    assert rectify(tmp_path, errors_of(10), lambda *_: Answer(marked(RIGHT)))["rectified"] == 10


def test_quick_refusals_do_not_stop_a_run_whose_answers_are_slow(tmp_path):
    async def slow():
        await asyncio.sleep(0.5)
        return Answer(marked(RIGHT))

    def answer(request, fault):
        if "too long" in request["messages"][0]["content"]:
            raise RefusedRequest("too long")
        return asyncio.ensure_future(slow())

    errors = errors_of(2) | {f"x{number}": an_error(f"x{number}", response="too long") for number in range(10)}
    for _ in range(2):  # the second time only what was refused before is refused again
        summary = rectify(tmp_path, errors, answer, max_failures=5, concurrency=12)
        assert (summary["rectified"], summary["rejected"]) == (2, {"failed_http_400": 10})


def test_a_server_that_is_gone_stops_the_run_without_losing_work(tmp_path):
    served = []

    def answer(request, fault):
        served.append(1)
        return Answer(marked(RIGHT))

    class Dying(Faults):
        def draw(self, body):
            return "server_error" if len(served) >= 10 else None

    with pytest.raises(RunFailed, match="5 requests in a row failed"):
        rectify(tmp_path, errors_of(60), answer, faults=Dying(0.0, 0), concurrency=2, max_failures=5)
    assert len(rows(tmp_path / "rectified.jsonl")) == 10
    rejected = rows(tmp_path / "rejected.jsonl")
    assert len(rejected) == 50
    assert {row["reason"] for row in rejected} == {"failed_http_500", "not_attempted_requests_failed"}
    assert rectify(tmp_path, errors_of(60), answer)["rectified"] == 60


def test_after_a_failing_request_those_under_way_end_and_no_further_one_begins():
    begun, ended = [], []

    async def handle(item):
        begun.append(item)
        await asyncio.sleep(0.05 if item == 0 else 0.4)
        if item == 0:
            raise RunFailed("enough")
        ended.append(item)

    async def main():
        with pytest.raises(RunFailed, match="enough"):
            await run_pool(iter(range(9)), handle, 4, lambda: None, stop_retrying=lambda: ended.append("told"))

    asyncio.run(main())
    assert (begun, ended) == ([0, 1, 2, 3], ["told", 1, 2, 3])


def test_a_second_signal_cancels_what_the_first_one_left_to_end():
    cancelled = []

    async def handle(item):
        for wait in (0.1, 0.3):
            asyncio.get_running_loop().call_later(wait, os.kill, os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(item)

    started = time.monotonic()
    with pytest.raises(Interrupted):
        asyncio.run(run_pool(iter(range(2)), handle, 1, lambda: None))
    assert cancelled == [0]
    assert 0.3 < time.monotonic() - started < 5
