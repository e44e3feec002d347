"""Replies in every shape that servers give them, and what elicitation makes of unusable ones. About 15 s."""

import asyncio
import json
import time

import pytest

from tests.tools.pairs.support import oracle_server, rows, run, write_questions
from tools.oracle.http_server import Answer, Faults, Service, serve
from tools.pairs.client import ChatClient
from tools.pairs.elicit import Elicitation
from tools.pairs.grade import Grader
from tools.pairs.pool import RunFailed
from tools.pairs.questions import Question, QuestionSet
from tools.pairs.replies import BadReply, Reply, read_reply
from tools.pairs.sampling import Sampling
from tools.pairs.unusable import UnusableStreak, unusable_reply

TEXT = {"type": "text", "text": "b"}


def body(message: object, finish: object = "stop", **others: object) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], **others}).encode()


def read(message: object, finish: object = "stop", **others: object) -> Reply:
    return read_reply(body(message, finish, **others))


@pytest.mark.parametrize(
    ("message", "text", "reasoning", "unusable"),
    [
        ({"content": "5"}, "5", "", None),
        ({"content": [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]}, "ab", "", None),
        ({"content": None}, "", "", "empty_content"),
        ({"content": " \n"}, " \n", "", "empty_content"),
        ({}, "", "", "empty_content"),
        ({"content": None, "reasoning_content": r"so \boxed{5}"}, "", r"so \boxed{5}", "empty_content"),
        ({"content": None, "refusal": "I cannot"}, "", "", "empty_content"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "", "", "empty_content"),
        ({"content": "5", "reasoning": "Okay, let me think."}, "5", "Okay, let me think.", "thought_anyway"),
        ({"content": "5", "reasoning": "", "reasoning_content": None}, "5", "", None),
        ({"content": "<think>\nhm\n</think>\n5"}, "<think>\nhm\n</think>\n5", "", "thought_anyway"),
        ({"content": "hm</think>5"}, "hm</think>5", "", "thought_anyway"),
        ({"content": [{"type": "thinking", "thinking": "a"}, TEXT]}, "b", "a", "thought_anyway"),
        ({"content": "5", "reasoning_details": [{"text": "hm"}]}, "5", "[{'text': 'hm'}]", "thought_anyway"),
        ({"content": "5", "thinking": "hm"}, "5", "hm", "thought_anyway"),
        *((dict(content=text), text, "", "thought_anyway") for text in (
            "<thinking>hm</thinking>5", "[THINK]hm[/THINK]5", "<|channel|>analysis<|message|>hm<|end|>5")),
        ({"content": "I think > 5, [think]"}, "I think > 5, [think]", "", None),
    ],
)  # fmt: skip
def test_contents(message, text, reasoning, unusable):
    reply = read(message)
    assert (reply.text, reply.reasoning) == (text, reasoning)
    verdict = unusable_reply(reply, "off")
    assert (verdict.reason if verdict else None) == unusable
    wanted = unusable_reply(reply, "on")
    assert (wanted.reason if wanted else None) == (unusable if unusable == "empty_content" else None)


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        *((name, "stop") for name in ("stop", "STOP", "eos", "eos_token", "end_turn")),
        *((name, "length") for name in ("length", "MAX_TOKENS", "max_tokens")),
        *((name, "content_filter") for name in ("content_filter", "SAFETY")),
        ("tool_calls", "tool_calls"),
        (None, "unknown"),
    ],
)
def test_finish_reasons(given, read_as):
    reply = read({"content": "x"}, given)
    assert reply.finish_reason == read_as
    assert (unusable_reply(reply, "off") is not None) == (read_as == "content_filter")


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}, (10, 12)),
        ({"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 310}, (10, 300)),  # hidden thinking
        ({"prompt_tokens": 10, "completion_tokens": 12}, (10, 12)),
        ({"prompt_tokens": 10, "total_tokens": 30}, (10, 20)),
        ({"prompt_tokens": -1, "completion_tokens": "12"}, (None, None)),
        ("many", (None, None)),
    ],
)
def test_hidden_thinking_is_counted(usage, counts):
    reply = read({"content": "x"}, usage=usage)
    assert (reply.prompt_tokens, reply.completion_tokens) == counts


def test_thinking_that_is_counted_but_not_shown():
    for count, reason in ((290, "thought_anyway"), (0, None), (None, None)):
        reply = read({"content": "x"}, usage={"completion_tokens_details": {"reasoning_tokens": count}})
        verdict = unusable_reply(reply, "off")
        assert (verdict.reason if verdict else None) == reason


def test_a_reply_that_calls_a_tool_has_not_stopped():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert read({"content": "x", "tool_calls": calls}).finish_reason == "tool_calls"
    assert read({"content": "x", "tool_calls": []}).finish_reason == "stop"


@pytest.mark.parametrize(
    ("payload", "reason", "words"),
    [
        ({"error": {"message": "slow down", "code": 429}}, "http_429", "slow down (429)"),
        ({"error": {"message": "slow down", "type": "rate_limit_error"}}, "http_429", "slow down (rate_limit_error)"),
        ({"error": {"message": "pay", "code": "insufficient_quota"}}, "http_402", "pay (insufficient_quota)"),
        ({"error": "broken"}, "http_500", "broken"),
        ({"object": "error", "message": "too long", "code": 400}, "http_400", "too long (400)"),
        ({"choices": [{"error": {"message": "upstream", "code": 502}}]}, "http_502", "upstream (502)"),
        ({"choices": [{"message": {"content": {"a": 1}}}]}, "bad_body", "neither text nor"),
        ({"choices": [{"message": {"content": [{"type": "image_url"}]}}]}, "bad_body", "neither text nor"),
        ({"choices": []}, "empty_choices", "without choices"),
        ([], "empty_choices", "without choices"),
    ],
)
def test_bodies_that_are_no_completion(payload, reason, words):
    with pytest.raises(BadReply) as caught:
        read_reply(json.dumps(payload).encode())
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_a_run_whose_replies_are_all_unusable_stops():
    streak = UnusableStreak(3)
    streak.note("thought_anyway")
    streak.note("empty_content")
    with pytest.raises(RunFailed, match=r"first 3 replies cannot be used: 2 held thinking.*--extra-body"):
        streak.note("thought_anyway")
    few = UnusableStreak(3)
    few.note("empty_content")
    with pytest.raises(RunFailed, match="first 1 replies"):
        few.finish()
    mixed = UnusableStreak(2)
    mixed.note_usable()
    for _ in range(3):
        mixed.note("thought_anyway")
    mixed.finish()
    UnusableStreak(2).finish()


class SlowGrader(Grader):
    def grade_at_once(self, *_):
        return None

    def grade(self, *arguments):
        time.sleep(1.0)
        return super().grade(*arguments)


def test_a_reply_is_usable_before_it_is_graded(tmp_path):
    """Unusable replies need no grading; on a busy machine all of them may be on file before the first verdict."""
    found = QuestionSet([Question(str(number), "q", "1") for number in range(6)])
    stage = Elicitation(tmp_path, found, Sampling("m"), 1)
    replies = [Answer(r"\boxed{1}"), *(Answer("1", reasoning="Let me see.") for _ in range(5))]

    async def ask():
        server = await serve(Service(lambda *_: replies.pop(0), Faults(0.0, 0)), "127.0.0.1", 0)
        async with server, ChatClient([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"]) as client:
            await stage.run(client, SlowGrader(), concurrency=2, max_failures=4)

    asyncio.run(ask())
    summary = stage.write_outputs(())
    stage.journal.close()
    assert (summary["correct"], summary["excluded"]) == (1, {"thought_anyway": 5})


ELICIT = ("--model", "oracle", "--prompt-suffix", "")


def test_thinking_and_null_contents_are_set_apart_and_never_become_errors(tmp_path):
    write_questions(tmp_path / "q.jsonl", 60)
    base = ("--questions", tmp_path / "q.jsonl", "--output", tmp_path / "out", *ELICIT)
    with oracle_server("--fault-rate", "0.4", "--faults", "thinking", "null_content", "--wrong-rate", "1") as url:
        run("elicit", *base, "--base-url", url)
        run("elicit", *base, "--base-url", url)  # nothing is asked again
    assert len(rows(tmp_path / "out/responses.jsonl")) == 60
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    reasons = summary["excluded"]
    assert min(reasons["thought_anyway"], reasons["empty_content"]) > 3
    assert summary["errors"] + sum(reasons.values()) == 60
    assert all(row["response"] for row in rows(tmp_path / "out/errors.jsonl"))


def test_a_server_that_always_thinks_stops_the_run_and_other_settings_continue_it(tmp_path):
    write_questions(tmp_path / "q.jsonl", 40)
    base = ("--questions", tmp_path / "q.jsonl", "--output", tmp_path / "out", "--max-failures", "5", *ELICIT)
    with oracle_server("--fault-rate", "1", "--faults", "thinking") as url:
        result = run("elicit", *base, "--base-url", url, "--concurrency", "4", check=False)
    assert result.returncode == 1
    assert "--thinking server" in result.stderr
    assert 5 <= len(rows(tmp_path / "out/responses.jsonl")) <= 9
    with oracle_server() as url:
        run("elicit", *base, "--base-url", url, "--thinking", "server")
    assert len(rows(tmp_path / "out/responses.jsonl")) == 40
    assert json.loads((tmp_path / "out/summary.json").read_text())["excluded"] == {}
