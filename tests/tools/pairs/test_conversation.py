"""Whole prompts: nothing that shapes one is dropped on the way from a question to a pair. About 5 s."""

import asyncio
import json

import pytest

from spot_megatron.data.records import read_pairs
from spot_megatron.errors import PairError
from spot_megatron.files import write_rows
from tests.tools.pairs.support import ASSETS, RIGHT, an_error, rows, run
from tools.oracle.http_server import Answer, Faults, Service, serve
from tools.pairs.client import ChatClient
from tools.pairs.elicit import Elicitation
from tools.pairs.grade import shared_grader
from tools.pairs.oracle import ErrorFile, Oracle
from tools.pairs.questions import read_questions
from tools.pairs.sampling import Sampling

CALL = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": "{}"}}
TALK = [
    {"role": "system", "content": "You are a tutor."},
    {"role": "user", "content": "How many apples are there?", "name": "eve"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "count", "content": "17"},
    {"role": "user", "content": [{"type": "text", "text": "Now double it."}]},
]
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}]
SHOWN = ("You are a tutor.", "How many apples", "eve", '"count"', "17", "Now double it.")


def question(path, **row):
    write_rows(path / "q.jsonl", [{"answer": "34", **row}])
    return read_questions(path / "q.jsonl").questions[0]


def test_messages_and_tools_are_sent_unchanged(tmp_path):
    body = Sampling("m", suffix="Box it.").request(question(tmp_path, prompt=TALK, tools=TOOLS), 0)
    assert body["messages"] == TALK
    assert body["tools"] == TOOLS
    body = Sampling("m").request(question(tmp_path, question="q", tools=json.dumps(TOOLS)), 0)
    assert body["tools"] == TOOLS


def test_columns_become_turns_of_the_prompt(tmp_path):
    asked = question(tmp_path, question="q", system="s", history=[["a", "b"]])
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "q\n\nBox it.")]
    body = Sampling("m", suffix="Box it.").request(asked, 0)
    assert [(turn["role"], turn["content"]) for turn in body["messages"]] == turns
    asked = question(tmp_path, prompt=[{"role": "user", "content": "q"}], system="s")
    assert [turn["content"] for turn in Sampling("m", suffix="x").request(asked, 0)["messages"]] == ["s", "q"]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "q", "images": ["a.png"]}, "`images`"),
        ({"question": "q", "chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs`"),
        ({"question": "q", "system": 3}, "`system`"),
        ({"question": "q", "history": [["a"]]}, "`history`"),
        ({"question": "q", "history": "a"}, "`history`"),
        ({"question": "q", "tools": "no json"}, "`tools`"),
        ({"prompt": TALK, "system": "s"}, "`system`"),
        ({"prompt": TALK, "history": [["a", "b"]]}, "`history`"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"prompt": [{"role": "user", "content": None}]}, "message 0"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}] * 2}]}, "message 0 holds 2 parts"),
        ({"prompt": TALK[:3]}, "'assistant'"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(tmp_path, row, names):
    with pytest.raises(PairError, match=names) as caught:
        question(tmp_path, **row)
    assert "q.jsonl:1" in str(caught.value)
    error = an_error(**row)
    if "prompt" not in row:
        write_rows(tmp_path / "errors.jsonl", [error])
        with pytest.raises(PairError, match=names):
            ErrorFile(tmp_path / "errors.jsonl")


def test_two_conversations_with_one_last_turn_are_two_questions(tmp_path):
    def ids(*prompts):
        write_rows(tmp_path / "q.jsonl", [{"prompt": prompt, "answer": 1} for prompt in prompts])
        found = read_questions(tmp_path / "q.jsonl")
        return [asked.id for asked in found.questions], found.dropped

    other = [{**TALK[0], "content": "You are a pirate."}, *TALK[1:]]
    (first, second), dropped = ids(TALK, other, TALK)
    assert first != second
    assert dropped == {"duplicate": 1}
    assert ids("q")[0] == ids([{"role": "user", "content": "q"}])[0] == ["q-8e35c2cd3bf6641b"]


def test_a_changed_conversation_is_not_mixed_into_a_journal(tmp_path):
    def elicitation(system):
        write_rows(tmp_path / "q.jsonl", [{"id": "a", "question": "q", "answer": 1, "system": system}])
        return Elicitation(tmp_path / "out", read_questions(tmp_path / "q.jsonl"), Sampling("m"), 1)

    async def ask(stage):
        server = await serve(Service(lambda *_: Answer(r"\boxed{2}"), Faults(0.0, 0)), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server, ChatClient([url]) as client:
            await stage.run(client, shared_grader(), 1, 1)

    stage = elicitation("s")
    asyncio.run(ask(stage))
    stage.write_outputs(())
    stage.journal.close()
    assert rows(tmp_path / "out/errors.jsonl")[0]["prompt"][0] == {"role": "system", "content": "s"}
    elicitation("s").journal.close()
    with pytest.raises(PairError, match="another text"):
        elicitation("t")


def test_the_oracle_sees_every_turn_and_the_pair_keeps_them(tmp_path):
    errors = tmp_path / "errors.jsonl"
    write_rows(errors, [an_error("a", prompt=TALK, tools=TOOLS), an_error("b", system="s", history=[["x", "y"]])])
    found = ErrorFile(errors)
    shown = [Oracle("m").request(error, [])["messages"][0]["content"] for error in found.values()]
    assert all(text in shown[0] for text in SHOWN)
    assert "[system]\ns\n\n[user]\nx\n\n[assistant]\ny\n\n[user]\n4*2, 7*9\n</problem>" in shown[1]
    rectified = tmp_path / "rectified.jsonl"
    write_rows(rectified, [{**error, "id": name, "corrected": RIGHT} for name, error in found.items()])
    report = ("--report", tmp_path / "report.html")
    run("pairs", "--rectified", rectified, "--tokenizer", ASSETS, "--output", tmp_path / "pairs.jsonl", *report)
    table = rows(tmp_path / "pairs.jsonl")
    assert (table[0]["prompt"], table[0]["tools"]) == (TALK, TOOLS)
    assert [turn["content"] for turn in table[1]["prompt"]] == ["s", "x", "y", "4*2, 7*9"]
    assert table[1]["chosen"] == [{"role": "assistant", "content": RIGHT}]
    write_rows(tmp_path / "one.jsonl", table[1:])
    (pair,) = read_pairs([tmp_path / "one.jsonl"])
    assert (pair.id, pair.chosen, len(pair.prompt)) == ("b", RIGHT, 4)
    assert 0 < pair.meta["change_ratio"] < 0.6
