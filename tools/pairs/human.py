"""The human oracle: wrong answers as one text file for any editor, read back and graded like any oracle's."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spot_megatron.errors import PairError
from spot_megatron.files import Row, write_text
from tools.pairs.answers import judge_edit
from tools.pairs.attempts import Attempts
from tools.pairs.conversation import shown_problem
from tools.pairs.grade import Grader
from tools.pairs.oracle import HUMAN
from tools.pairs.prompts import MARKER_END, MARKER_START

HEADING = "##### error "
_RESERVED = (HEADING.strip(), MARKER_START, MARKER_END, "\\")  # a body line that begins so gets a backslash in front

_INTRODUCTION = f"""\
Edit each solution between its two marker lines so that it becomes right, changing as little as possible, and save.
A solution must hold its final answer in \\boxed{{...}}. Leave the lines that begin with "{HEADING.strip()}" and the
marker lines as they are. Untouched solutions are left open for later. A line of a solution that must begin with a
marker or a backslash has one more backslash in front of it.
Then run: python -m tools.rectify --errors ... --output ... --import-human THIS_FILE
"""


@dataclass(frozen=True)
class HumanEdit:
    """One section of the file: the error's id, the text between the markers, and its line for messages."""

    id: str
    text: str
    line: int


def export_errors(path: Path, errors: Iterable[Row], with_answer: bool) -> int:
    """Write the editable file and return the number of its sections."""
    sections = [_INTRODUCTION]
    for error in errors:
        answer = f"\nKnown answer: {_escape(error['answer'])}\n" if with_answer else ""
        sections.append(
            f"{HEADING}{error['id']}\n\n{_escape(shown_problem(error))}\n{answer}\n"
            f"{MARKER_START}\n{_escape(error['response'])}\n{MARKER_END}\n"
        )
    write_text(path, "\n".join(sections))
    return len(sections) - 1


def read_edits(path: Path) -> Iterator[HumanEdit]:
    """The edited texts. Raises PairError naming the line where a heading or a marker is missing or out of place."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PairError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    identifier: str | None = None
    body: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        mark = line.rstrip("\r")
        if mark.startswith(HEADING) or mark in (MARKER_START, MARKER_END):
            expected = _expected(identifier, body)
            if not mark.startswith(expected):
                raise PairError(
                    f"{path}:{number}: found {mark!r} where {expected!r} must come next. Put that line back."
                )
        if mark.startswith(HEADING):
            identifier = mark[len(HEADING) :]
        elif mark == MARKER_START:
            body = []
        elif mark == MARKER_END:
            assert identifier is not None
            assert body is not None
            yield HumanEdit(identifier, "\n".join(body), number)
            identifier = body = None
        elif body is not None:
            body.append(line[1:] if line.startswith("\\") and line[1:].startswith(_RESERVED) else line)
    if identifier is not None:
        raise PairError(
            f"{path}: ends before {_expected(identifier, body)!r} of error {identifier!r}. Put that line back."
        )


def _expected(identifier: str | None, body: list[str] | None) -> str:
    return HEADING if identifier is None else MARKER_START if body is None else MARKER_END


def _escape(text: str) -> str:
    return "\n".join("\\" + line if line.startswith(_RESERVED) else line for line in text.split("\n"))


def import_edits(path: Path, attempts: Attempts, grader: Grader) -> tuple[dict[str, int], dict[str, str]]:
    """Grade and record the edits of a file; returns how many were verified, rejected, unchanged or already settled,
    and the reason of every rejected one by its id.

    An unchanged text does not count as an attempt. Raises PairError for an id that is not among the errors.
    """
    counts = {"verified": 0, "rejected": 0, "unchanged": 0, "already_rectified": 0}
    rejected: dict[str, str] = {}
    edits = list(read_edits(path))  # a broken file raises before anything of it is recorded
    for edit in edits:
        if edit.id not in attempts.errors:
            raise PairError(
                f"{path}:{edit.line}: the errors file has no error {edit.id!r}. Use the file that it came from."
            )
    for edit in edits:
        error = attempts.errors[edit.id]
        if attempts.progress[edit.id].verified_at is not None:
            counts["already_rectified"] += 1
        elif _same_text(edit.text, error["response"]):
            counts["unchanged"] += 1
        else:
            judged = judge_edit(error, edit.text, grader, attempts.meter)
            attempts.record({**attempts.attempt_record(edit.id, HUMAN), **judged})
            counts[judged["outcome"]] += 1
            if judged["outcome"] == "rejected":
                rejected[edit.id] = f"{judged['reason']} {judged['detail']}".strip()
    return counts, rejected


def _same_text(edited: str, original: str) -> bool:
    """Equal up to the line ends that an editor may have changed."""
    return edited.replace("\r\n", "\n").strip() == original.replace("\r\n", "\n").strip()
