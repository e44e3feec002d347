"""Rectification: attempts and hints, and a person as oracle. About 10 s."""

import json

import pytest

from spot_megatron.errors import PairError
from spot_megatron.files import write_rows
from tests.tools.pairs.support import (
    ASSETS,
    RIGHT,
    WRONG,
    an_error,
    errors_of,
    marked,
    oracle_server,
    rectify,
    rows,
    run,
)
from tools.oracle.http_server import Answer, RefusedRequest
from tools.pairs.answers import EditMeter
from tools.pairs.grade import Grader
from tools.pairs.human import export_errors, import_edits
from tools.pairs.limits import Prices
from tools.pairs.measures import load_tokenizer
from tools.pairs.oracle import ErrorFile, Oracle
from tools.pairs.rectify import Rectification


def test_every_attempt_is_told_what_was_wrong_before(tmp_path):
    replies = ["no markers", marked(WRONG), marked(f"The reference answer is 8,63. {RIGHT}"), marked(RIGHT)]
    prompts = []

    def answer(request, fault):
        prompts.append(request["messages"][0]["content"])
        return Answer(replies[len(prompts) - 1], prompt_tokens=1000, completion_tokens=10)

    summary = rectify(tmp_path, errors_of(1), answer, attempts=4, prices=Prices(1.0, 10.0))
    assert summary["accepted_at_attempt"] == {"4": 1}
    assert [prompt.count("- attempt ") for prompt in prompts] == [0, 1, 2, 3]
    assert "8,64" in prompts[2]
    assert "reference answer" in prompts[3]
    row = rows(tmp_path / "rectified.jsonl")[0]
    assert (row["corrected"], row["corrected_extracted"], row["id"]) == (RIGHT, "8,63", "q0")
    assert [attempt["reason"] for attempt in row["rejected_attempts"]] == [
        "missing_markers",
        "wrong_answer",
        "answer_leak",
    ]
    assert summary["cost_usd"] == pytest.approx(4 * (1000 + 100) / 1e6)
    assert (summary["prompt_tokens"], summary["http_calls"]) == (4000, 4)


def test_every_id_ends_in_one_file_with_its_reason(tmp_path):
    def answer(request, fault):
        prompt = request["messages"][0]["content"]
        if "refuse me" in prompt:
            raise RefusedRequest("no")
        return Answer(marked(RIGHT if "fine" in prompt else WRONG))

    errors = {
        "a": an_error("a", response="fine"),
        "b": an_error("b", response="refuse me"),
        "c": an_error("c"),
        "d": an_error("d", response=RIGHT + " fine"),
        "e": an_error("e", response="fine", finish_reason="content_filter"),
    }
    summary = rectify(tmp_path, errors, answer, attempts=2)
    assert {row["id"] for row in rows(tmp_path / "rectified.jsonl")} == {"a", "d"}
    rejected = {row["id"]: row["reason"] for row in rows(tmp_path / "rejected.jsonl")}
    assert rejected == {"b": "failed_http_400", "c": "wrong_answer", "e": "unknown_finish"}
    assert summary["rejected"] == {"failed_http_400": 1, "wrong_answer": 1, "unknown_finish": 1}
    assert summary["http_calls"] == 5  # none for what could never become a pair


def test_edits_that_change_too_much_are_tried_again_and_the_target_counts_usable_ones(tmp_path):
    far = r"Let us begin anew: four times two makes eight; seven nines are 63. Hence \boxed{8,63}."
    prompts = []

    def answer(request, fault):
        prompts.append(request["messages"][0]["content"])
        return Answer(marked(RIGHT if "previous_edit" in prompts[-1] else far))

    meter = EditMeter(load_tokenizer(str(ASSETS)), 0.6)
    summary = rectify(tmp_path, errors_of(6), answer, target=2, meter=meter, concurrency=1)
    assert (summary["rectified"], summary["stopped"], len(prompts)) == (2, "target_reached", 4)
    assert far in prompts[1]
    row = rows(tmp_path / "rectified.jsonl")[0]
    assert [attempt["reason"] for attempt in row["rejected_attempts"]] == ["change_ratio"]
    assert 0 < row["change_ratio"] < 0.6
    assert row["shared_prefix_tokens"] > 5


def test_a_second_run_continues_and_may_tell_the_answer(tmp_path):
    told = []

    def answer(request, fault):
        told.append("<final_answer>\n8,63\n" in request["messages"][0]["content"])
        return Answer(marked(RIGHT if told[-1] else WRONG))

    assert rectify(tmp_path, errors_of(3), answer, attempts=1)["rejected"] == {"wrong_answer": 3}
    assert rectify(tmp_path, errors_of(3), answer, attempts=1)["rejected"] == {"wrong_answer": 3}
    assert len(told) == 3
    summary = rectify(tmp_path, errors_of(3), answer, attempts=2, with_answer=True)
    assert (summary["rectified"], len(told)) == (3, 6)
    assert all(row["with_answer"] and row["attempt"] == 2 for row in rows(tmp_path / "rectified.jsonl"))


def test_a_changed_errors_file_is_not_mixed_in(tmp_path):
    rectify(tmp_path, errors_of(1), lambda request, fault: Answer(marked(RIGHT)))
    with pytest.raises(PairError, match="another response"):
        rectify(tmp_path, {"q0": an_error("q0", response="other")}, lambda request, fault: Answer(marked(RIGHT)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "question": "q", "answer": "1"}, "`response` is missing"),
        ({"question": "q", "answer": "1", "response": "r"}, "`id` is missing"),
        ({"id": "q0", "question": "q", "answer": "1", "response": "r"}, "occurs twice"),
    ],
)
def test_broken_error_rows_are_named(tmp_path, row, message):
    path = tmp_path / "errors.jsonl"
    write_rows(path, [an_error("q0"), row])
    with pytest.raises(PairError, match=message) as caught:
        ErrorFile(path)
    assert ":2: " in str(caught.value)


def test_a_person_can_be_the_oracle(tmp_path):
    errors = errors_of(3)
    path = tmp_path / "edit.md"
    grader = Grader()
    rectification = Rectification(tmp_path, errors, Oracle("human"), 3, Prices())
    open_errors = [{**errors[name], "id": name} for name in rectification.open_errors()]
    assert export_errors(path, open_errors, with_answer=True) == 3
    text = path.read_text()
    assert text.count("Known answer: 8,63") == 3
    first, second, third = text.split("##### error ")[1:]
    text = "##### error ".join(["", first.replace("65", "63"), second.replace("65", "64"), third])
    path.write_text(text)
    counts, rejected = import_edits(path, rectification, grader)
    assert rejected == {"q1": "wrong_answer 8,64"}
    assert counts == {"verified": 1, "rejected": 1, "unchanged": 1, "already_rectified": 0}
    assert import_edits(path, rectification, grader)[0]["already_rectified"] == 1
    summary = rectification.write_outputs()
    rectification.journal.close()
    assert (summary["rectified"], summary["rejected"]) == (1, {"wrong_answer": 1, "not_attempted": 1})
    row = rows(tmp_path / "rectified.jsonl")[0]
    assert (row["id"], row["oracle"], row["prompt_version"]) == ("q0", "human", None)
    path.write_text(text.replace("q1", "q9"))
    with pytest.raises(PairError, match="no error 'q9'"):
        import_edits(path, Rectification(tmp_path, errors, Oracle("human"), 3, Prices()), grader)
    grader.close()


def test_the_program_exports_imports_and_refuses_wrong_use(tmp_path):
    errors, output, edit = tmp_path / "errors.jsonl", tmp_path / "out", tmp_path / "edit.md"
    number = {"id": 7, "question": "6*7", "answer": 42, "response": r"It is 41: \boxed{41}"}
    write_rows(errors, [an_error(), number])
    base = ("--errors", errors, "--output", output)
    assert "2 errors to edit" in run("rectify", *base, "--export-human", edit).stdout
    edit.write_text(edit.read_text().replace("65", "63").replace("41", "42"))
    assert "verified" in run("rectify", *base, "--import-human", edit).stdout
    assert [row["corrected"] for row in rows(output / "rectified.jsonl")] == [RIGHT, r"It is 42: \boxed{42}"]

    for options, message in (
        ((*base, "--base-url", "http://127.0.0.1:1/v1", "--model", "m", "--budget-usd", "1"), "--price-prompt"),
        (base, "--base-url and --model are needed"),
        (("--errors", tmp_path / "none", "--output", output), "no such file"),
    ):
        result = run("rectify", *options, check=False)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_the_policy_can_be_its_own_oracle(tmp_path):
    """Nothing is special about it: the same address and model for both stages."""
    errors = tmp_path / "errors.jsonl"
    write_rows(errors, [an_error(f"q{number}") for number in range(5)])
    with oracle_server() as url:
        run("rectify", "--errors", errors, "--output", tmp_path / "out", "--base-url", url, "--model", "oracle")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["rectified"] == 5
    assert {row["oracle"] for row in rows(tmp_path / "out/rectified.jsonl")} == {"oracle"}
