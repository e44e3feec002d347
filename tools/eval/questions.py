"""Questions and their graders. Needs no torch, so that a launcher can check the questions before hours of training."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from spot_megatron.errors import PairError
from spot_megatron.files import Row, read_rows
from tools.pairs.grade import CORRECT, WRONG, grade
from tools.pairs.questions import parse_question

# A row's `grader` names how its responses are graded: (question, response) -> whether it is right. Without one, its
# answer is compared as mathematics.
GRADERS = {"tiny": "tools.tiny.skills:is_correct"}


def read_questions(path: Path) -> list[Row]:
    """Rows `{"question", "answer", "skill", "grader"}` of a JSONL file, read as the pair tools read them.

    A row without a skill counts under "all". Raises PairError naming file and line when the file is missing or empty,
    or a line holds no question with an answer that a response can match.
    """
    rows = []
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        question = parse_question(row, where)
        if question.context or question.tools or len(question.messages or ()) > 1:
            raise PairError(f"{where}: several turns or tools; the evaluation asks single questions only.")
        skill, grader = (_name(row, key, where) for key in ("skill", "grader"))
        if grader is not None and grader not in GRADERS:
            raise PairError(f"{where}: `grader` is {grader!r}; known are {', '.join(GRADERS)}, or leave it out.")
        rows.append(
            {"question": question.question, "answer": question.answer, "skill": skill or "all", "grader": grader}
        )
    if not rows:
        raise PairError(f"{path}: holds no question. Write one {{id, question, answer}} object a line.")
    return rows


def _name(row: Row, key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise PairError(f"{where}: `{key}` is a {type(value).__name__}; write one name, or leave it out.")
    return value


def grade_row(row: Row, response: str) -> str:
    """The verdict: correct, wrong, no_answer, timeout or undecided."""
    if row.get("grader") is None:
        return grade(response, row["answer"]).verdict
    module, _, name = GRADERS[row["grader"]].partition(":")
    is_correct: Callable[[str, str], bool] = getattr(import_module(module), name)
    return CORRECT if is_correct(row["question"], response) else WRONG
