"""Grading a folder of an older grader again, and where undecided answers end. About 10 s."""

import json

import pytest

from spot_megatron.errors import PairError
from spot_megatron.files import write_rows
from tests.tools.pairs.support import rows, run
from tools.pairs.elicit import Elicitation
from tools.pairs.grade import GRADER_VERSION
from tools.pairs.questions import Question, QuestionSet
from tools.pairs.regrade import questions_on_file
from tools.pairs.sampling import Sampling

TALK = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "which numbers?"})
QUESTIONS = [
    Question("list", "roots?", "2, 3"),
    Question("rounded", "diagonal?", "1.41"),
    Question("talk", "which numbers?", "x>3", TALK),
    Question("wrong", "sum?", "5"),
    Question("unboxed", "sum?", "6"),
]
RESPONSES = {
    "list": r"\boxed{x=2 \text{ or } x=3}",
    "rounded": r"\boxed{\sqrt{2}}",
    "talk": r"\boxed{(3,\infty)}",
    "wrong": r"\boxed{6}",
    "unboxed": "it is 6",
}


def old_folder(folder, ids=tuple(RESPONSES)) -> Elicitation:
    """What an earlier grader left that called everything wrong."""
    elicitation = Elicitation(folder, QuestionSet(list(QUESTIONS), 7), Sampling("m", suffix="Box it."), 1)
    for question in QUESTIONS:
        if question.id in ids:
            record = {"id": question.id, "sample": 0, "question": question.question, "answer": question.answer}
            graded = {"finish_reason": "stop", "verdict": "wrong", "extracted": None, "reason": "another_list"}
            elicitation.journal.append({**record, "response": RESPONSES[question.id], **graded})
    elicitation.journal.close()
    again = Elicitation(folder, QuestionSet(list(QUESTIONS), 7), Sampling("m", suffix="Box it."), 1)
    again.write_outputs(())
    again.journal.close()
    return again


def test_regrade_moves_every_sample_where_it_belongs_and_sends_nothing(tmp_path):
    old_folder(tmp_path)
    assert len(rows(tmp_path / "errors.jsonl")) == 5
    assert json.loads((tmp_path / "summary.json").read_text())["grader_versions"] == {"1": 5}
    prompts = {row["id"]: row["prompt"] for row in rows(tmp_path / "errors.jsonl")}
    result = run("elicit", "--regrade", "--output", tmp_path)
    found = {name: rows(tmp_path / f"{name}.jsonl") for name in ("correct", "errors", "undecided", "excluded")}
    ids = {name: [row["id"] for row in table] for name, table in found.items()}
    assert ids == {"correct": ["list", "talk"], "errors": ["wrong"], "undecided": ["rounded"], "excluded": ["unboxed"]}
    assert {row["id"]: row["prompt"] for table in found.values() for row in table} == prompts
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["undecided"], summary["excluded"], summary["question_rows"]) == (1, {"no_box": 1}, 7)
    assert summary["grader_versions"] == {str(GRADER_VERSION): 5}
    assert "wrong -> correct" in result.stdout
    before = (tmp_path / "responses.jsonl").read_bytes()
    run("elicit", "--regrade", "--output", tmp_path)
    assert (tmp_path / "responses.jsonl").read_bytes() == before


def test_undecided_is_neither_an_error_nor_a_success(tmp_path):
    old_folder(tmp_path)
    run("elicit", "--regrade", "--output", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"] == round(2 / 4, 4)  # of list, talk, wrong, unboxed


def test_an_unfinished_run_needs_its_questions(tmp_path):
    old_folder(tmp_path / "out", ids=("list", "wrong"))
    with pytest.raises(PairError, match="Name its question file"):
        questions_on_file(tmp_path / "out")
    table = [{"id": q.id, "prompt": list(q.messages or ()) or q.question, "answer": q.answer} for q in QUESTIONS]
    write_rows(tmp_path / "q.jsonl", table)
    run("elicit", "--regrade", "--output", tmp_path / "out", "--questions", tmp_path / "q.jsonl")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["correct"], summary["errors"], summary["pending"]) == (1, 1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "holds no responses.jsonl"),
        (("--merge",), "works on a whole folder"),
        (("--shard", "0/2"), "works on a whole"),
    ],
)
def test_what_cannot_be_graded_again_is_refused(tmp_path, options, message):
    result = run("elicit", "--regrade", "--output", tmp_path, *options, check=False)
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    result = run("elicit", "--output", tmp_path, check=False)
    assert (result.returncode, "--questions is missing" in result.stderr) == (2, True), result.stderr
