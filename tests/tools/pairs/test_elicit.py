"""Elicitation: the request, samples, shards and their merge, resuming, and where every sample ends. About 20 s."""

import functools
import json
import operator

import pytest

from spot_megatron.errors import PairError
from spot_megatron.files import write_rows
from tests.tools.pairs.support import oracle_server, rows, run, write_questions
from tools.elicit import arguments
from tools.pairs.elicit import Elicitation
from tools.pairs.questions import Question, QuestionSet, read_questions
from tools.pairs.sampling import Sampling, Shard, error_id


@pytest.fixture(scope="module")
def server():
    with oracle_server("--wrong-rate", "0.5") as url:
        yield url


def elicit(url: str, questions, output, *options, check=True):
    base = ("--questions", questions, "--output", output, "--base-url", url, "--model", "oracle", "--prompt-suffix", "")
    return run("elicit", *base, *options, check=check)


def outcome(folder) -> dict:
    """What a run found, less what depends on timing."""
    keys = ("id", "response", "verdict", "reason", "extracted", "prompt")
    return {
        name: [{key: row.get(key) for key in keys} for row in rows(folder / f"{name}.jsonl")]
        for name in ("correct", "errors", "undecided", "excluded")
    }


def test_the_request_holds_what_the_paper_sets():
    question = Question("q", "How much?", "1")
    body = Sampling("m", suffix="Box it.", token_ids=True).request(question, 0)
    assert body["messages"] == [{"role": "user", "content": "How much?\n\nBox it."}]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.8, 32768)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["return_token_ids"] is True
    assert body["seed"] != Sampling("m").request(question, 1)["seed"]
    hosted = Sampling("m", thinking="server", extra_body={"seed": None, "top_k": 20}).request(question, 0)
    assert "chat_template_kwargs" not in hosted
    assert "seed" not in hosted
    assert hosted["top_k"] == 20
    talk = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert Sampling("m", suffix="Box it.").request(Question("q", "u", "1", talk), 0)["messages"] == list(talk)


def test_every_sample_is_in_one_file_under_its_own_id(server, tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 40)
    result = elicit(server, tmp_path / "q.jsonl", tmp_path / "out", "--samples", "3")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = outcome(tmp_path / "out")
    ids = [row["id"] for table in found.values() for row in table]
    assert sorted(ids) == sorted(error_id((q.id, sample)) for q in questions for sample in range(3))
    assert summary["correct"] + summary["errors"] + sum(summary["excluded"].values()) == summary["samples"] == 120
    assert 20 < summary["errors"] < 100
    assert summary["accuracy"] == round(summary["correct"] / 120, 4)
    assert "errors" in result.stdout
    assert "sk-test" not in result.stdout + result.stderr
    for file in (tmp_path / "out").iterdir():
        assert b"sk-test" not in file.read_bytes()
    again = elicit(server, tmp_path / "q.jsonl", tmp_path / "out", "--samples", "4")
    assert again.returncode == 0
    assert len(rows(tmp_path / "out/responses.jsonl")) == 160
    assert outcome(tmp_path / "out")["errors"][: len(found["errors"])] == found["errors"]


def test_shards_merge_to_exactly_the_whole(server, tmp_path):
    write_questions(tmp_path / "q.jsonl", 60)
    elicit(server, tmp_path / "q.jsonl", tmp_path / "whole")
    for index in (2, 0, 1):
        elicit(server, tmp_path / "q.jsonl", tmp_path / "parts", "--shard", f"{index}/3")
    parts = json.loads((tmp_path / "parts/summary.shard-1-of-3.json").read_text())
    assert 5 < parts["samples"] < 40
    assert not (tmp_path / "parts/errors.jsonl").exists()
    for _ in range(2):  # merging twice changes nothing
        run("elicit", "--questions", tmp_path / "q.jsonl", "--output", tmp_path / "parts", "--merge")
        assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
        assert len(rows(tmp_path / "parts/responses.jsonl")) == 60
    settings = tmp_path / "parts/responses.shard-0-of-3.jsonl.settings.json"
    settings.write_text(settings.read_text().replace("0.7", "0.9"))
    result = run("elicit", "--questions", tmp_path / "q.jsonl", "--output", tmp_path / "other", "--merge",
                 *sorted((tmp_path / "parts").glob("responses.shard-*.jsonl")), check=False)  # fmt: skip
    assert (result.returncode, "other settings" in result.stderr) == (2, True)


@pytest.mark.parametrize("shard", ["3/3", "0/0", "-1/2", "1", "a/b"])
def test_an_impossible_shard_is_refused(capsys, shard):
    with pytest.raises(SystemExit) as exit_info:
        arguments().parse_args(["--questions", "q", "--output", "o", f"--shard={shard}"])
    assert exit_info.value.code == 2
    assert "is not a shard" in capsys.readouterr().err


def test_shards_share_out_every_question():
    ids = [f"q{number}" for number in range(1000)]
    parts = [[name for name in ids if Shard(index, 4).holds(name)] for index in range(4)]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == sorted(ids)
    assert all(200 < len(part) < 300 for part in parts)


def test_failures_and_missing_answers_are_excluded_with_reasons_and_retried(tmp_path):
    questions = tmp_path / "q.jsonl"
    write_questions(questions, 10)
    with oracle_server("--fixed-answer", "no box here") as url:
        elicit(url, questions, tmp_path / "out", "--samples", "1")
        assert outcome(tmp_path / "out")["excluded"][0]["reason"] == "no_box"
        elicit(url, questions, tmp_path / "out", "--errors-include", "no_box")
        assert len(outcome(tmp_path / "out")["errors"]) == 10
    options = ("--max-calls", "2", "--backoff-seconds", "0.01", "--concurrency", "2")
    with oracle_server("--fault-rate", "1", "--faults", "server_error") as url:
        result = elicit(url, questions, tmp_path / "down", *options, "--max-failures", "6", check=False)
    assert result.returncode == 1
    assert "6 requests in a row failed" in result.stderr
    summary = json.loads((tmp_path / "down/summary.json").read_text())
    assert summary["excluded"]["failed_http_500"] in (6, 7)  # the other request under way may end, too
    assert summary["excluded"]["failed_http_500"] + summary["pending"] == 10
    with oracle_server() as url:
        elicit(url, questions, tmp_path / "down")
    summary = json.loads((tmp_path / "down/summary.json").read_text())
    assert (summary["excluded"], summary["pending"]) == ({}, 0)
    assert summary["correct"] + summary["errors"] == 10


def write_refused(path, count, *others):
    """Questions that the rule oracle answers with 400."""
    refused = [{"id": f"r{number}", "question": f"not of this world {number}", "answer": 1} for number in range(count)]
    write_rows(path, [*refused, *others])


def test_a_server_that_refuses_everything_is_a_failure_that_poisons_nothing(server, tmp_path):
    write_refused(tmp_path / "q.jsonl", 8)
    result = elicit(server, tmp_path / "q.jsonl", tmp_path / "out", check=False)
    assert result.returncode == 1
    assert "all requests of this run (8) failed, the last one by http_400" in result.stderr
    assert "--thinking server" in result.stderr
    again = elicit(
        server, tmp_path / "q.jsonl", tmp_path / "out", "--max-failures", "3", "--concurrency", "1", check=False
    )
    assert (again.returncode, "the first 3 requests failed" in again.stderr) == (1, True)
    assert len(rows(tmp_path / "out/responses.jsonl")) == 8 + 3
    other = (
        "--thinking",
        "server",
        "--extra-body",
        '{"seed": null}',
    )  # the remedy's settings: nothing depends on the old
    with oracle_server("--fixed-answer", "no box here") as url:
        elicit(url, tmp_path / "q.jsonl", tmp_path / "out", *other)
        result = elicit(url, tmp_path / "q.jsonl", tmp_path / "out", check=False)
    assert (result.returncode, "begun with other settings" in result.stderr) == (2, True)
    found = outcome(tmp_path / "out")
    assert [len(found[name]) for name in ("correct", "errors", "excluded")] == [0, 0, 8]


def test_one_refused_request_of_many_is_asked_again_and_no_failure(server, tmp_path):
    write_refused(tmp_path / "q.jsonl", 1, {"id": "a", "question": "4*2, 7*9", "answer": "8,63"})
    for count in (2, 3):
        elicit(server, tmp_path / "q.jsonl", tmp_path / "out")
        assert [row["reason"] for row in rows(tmp_path / "out/excluded.jsonl")] == ["failed_http_400"]
        assert len(rows(tmp_path / "out/responses.jsonl")) == count
    write_refused(tmp_path / "q.jsonl", 3, {"id": "a", "question": "4*2, 7*9", "answer": "8,63"})
    result = elicit(server, tmp_path / "q.jsonl", tmp_path / "out", check=False)
    assert (result.returncode, "all requests of this run (2) failed" in result.stderr) == (1, True)


def test_changed_questions_and_settings_are_refused(server, tmp_path):
    questions = tmp_path / "q.jsonl"
    write_rows(questions, [{"id": "a", "question": "4*2, 7*9", "answer": "8,63"}])
    elicit(server, questions, tmp_path / "out")
    result = elicit(server, questions, tmp_path / "out", "--temperature", "1.0", check=False)
    assert (result.returncode, "temperature: 0.7 then, 1.0 now" in result.stderr) == (2, True)
    write_rows(questions, [{"id": "a", "question": "4*2, 7*8", "answer": "8,56"}])
    result = elicit(server, questions, tmp_path / "out", check=False)
    assert (result.returncode, "on file with another text" in result.stderr) == (2, True)
    write_rows(questions, [{"id": "b", "question": "4*2, 7*8", "answer": "8,56"}])
    elicit(server, questions, tmp_path / "out")
    assert json.loads((tmp_path / "out/summary.json").read_text())["records_outside_plan"] == 1


def test_a_wrong_answer_of_unknown_end_is_set_apart_before_an_oracle_is_paid(tmp_path):
    found = QuestionSet([Question(str(number), f"q{number}", "1") for number in range(5)])
    elicitation = Elicitation(tmp_path, found, Sampling("m"), 1)
    ends = [("content_filter", "wrong"), ("stop", "wrong"), ("unknown", "correct"), ("length", "wrong")]
    ends.append(("unknown", "wrong"))
    for number, (finish, verdict) in enumerate(ends):
        record = {"id": str(number), "sample": 0, "question": f"q{number}", "answer": "1", "response": "r"}
        elicitation.journal.append({**record, "finish_reason": finish, "verdict": verdict, "reason": "not_equal"})
    elicitation.journal.close()
    elicitation = Elicitation(tmp_path, found, Sampling("m"), 1)
    summary = elicitation.write_outputs(())
    elicitation.journal.close()
    assert (summary["correct"], summary["errors"]) == (1, 2)
    assert summary["excluded"] == {"content_filter": 1, "unknown_finish": 1}
    assert summary["accuracy"] == 0.25
    row = rows(tmp_path / "excluded.jsonl")[0]
    assert (row["reason"], row["finish_reason"], row["response"]) == ("content_filter", "content_filter", "r")
    assert [row["reason"] for row in rows(tmp_path / "errors.jsonl")] == ["not_equal"] * 2


def test_ids_that_would_collide_are_refused(tmp_path):
    table = [{"id": "a", "question": "x", "answer": 1}, {"id": "a#1", "question": "y", "answer": 1}]
    write_rows(tmp_path / "q.jsonl", table)
    found = read_questions(tmp_path / "q.jsonl")
    with pytest.raises(PairError, match="Rename that id"):
        Elicitation(tmp_path / "out", found, Sampling("m"), samples=2)
    Elicitation(tmp_path / "out", QuestionSet(found.questions), Sampling("m"), samples=1).journal.close()
