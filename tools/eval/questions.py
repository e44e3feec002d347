"""Questions and their graders. Needs no torch, so that a launcher can check the questions before hours of training."""

from pathlib import Path

from spot_megatron.errors import PairError
from spot_megatron.files import Row, read_rows, text_field
from tools.tiny import skills


def read_questions(path: Path) -> list[Row]:
    """Rows `{"question" or "prompt", "answer", "skill"}` of a JSONL file; a row without a skill counts under "all".

    Raises PairError naming file and line when the file is missing or empty, or a line is no JSON object with these.
    """
    rows = []
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        question = text_field(row, "question" if "question" in row else "prompt", where)
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise PairError(f"{where}: `answer` must be a text or a number; without it nothing can be graded.")
        skill = row.get("skill")
        if skill is not None and not isinstance(skill, str):
            raise PairError(
                f"{where}: `skill` is a {type(skill).__name__}; write the name of one group, or leave it out."
            )
        rows.append({"question": question, "answer": str(answer), "skill": skill or "all"})
    if not rows:
        raise PairError(f"{path}: holds no question. Write one {{id, question, answer}} object a line.")
    return rows


def grade_row(row: Row, response: str) -> bool:
    """Whether the response is right: a tiny skill's question by its own rules, any other by the pair tools' grader."""
    if _is_tiny(row):
        return skills.is_correct(row["question"], response)
    from tools.pairs.grade import grade  # its parser is needed for mathematics only

    return grade(response, row["answer"]).verdict == "correct"


def _is_tiny(row: Row) -> bool:
    """A skill's name alone says nothing: a user's own questions may be called "sum", too."""
    if row["skill"] not in skills.SKILLS:
        return False
    try:
        return skills.parse(row["question"]).skill == row["skill"]
    except ValueError:
        return False
