"""Grading a response by its item's grader."""

import re
from collections.abc import Callable

from tools.eval import connect4, ifeval
from tools.eval.questions import LETTERS, Item
from tools.pairs import math_text
from tools.pairs.grade import CORRECT, NO_ANSWER, UNDECIDED, WRONG, Grader, Verdict, extract

_LETTER = re.compile(rf"\(?([{LETTERS}])(?:\)?[.:]?$|[).:]\s)")


def grade_item(item: Item, response: str, finish_reason: str, grader: Grader, at_once: bool = False) -> Verdict | None:
    """The verdict on one response; with `at_once` None where it would take long."""
    if item.grader == "math":
        grade = grader.grade_at_once if at_once else grader.grade
        return grade(response, item.question.answer, finish_reason)
    return _GRADERS[item.grader](item, response, finish_reason)


def _letter(item: Item, response: str, finish_reason: str) -> Verdict:
    contents, reason = extract(response, finish_reason)
    if not contents:
        return Verdict(NO_ANSWER, None, reason)
    found = _LETTER.match(math_text.clean(contents[-1]).strip())
    if found is None or len(contents) > 1:
        return Verdict(UNDECIDED, ", ".join(contents), "not_one_letter")
    same = found[1] == item.question.answer
    return Verdict(CORRECT if same else WRONG, found[1], "same_letter" if same else "another_letter")


def _connect4(item: Item, response: str, finish_reason: str) -> Verdict:
    contents, reason = extract(response, finish_reason)
    return connect4.grade(item.key, contents) if contents else Verdict(NO_ANSWER, None, reason)


def _ifeval(item: Item, response: str, finish_reason: str) -> Verdict:
    """`extracted` holds a mark for each instruction: "+" followed, "~" only loosely, "-" not."""
    text = response.rpartition("</think>")[2].lstrip("\n") if "</think>" in response else response
    marks = ifeval.check(item.key, item.question.question, text)
    if finish_reason == "length" and set(marks) != {"+"}:
        return Verdict(WRONG, marks, "cut_off")
    return Verdict(CORRECT, marks, "followed") if set(marks) == {"+"} else Verdict(WRONG, marks, "not_followed")


def _tiny(item: Item, response: str, finish_reason: str) -> Verdict:
    from tools.tiny.skills import is_correct

    right = is_correct(item.question.question, response)
    return Verdict(CORRECT, None, "rule") if right else Verdict(WRONG, None, "rule")


_GRADERS: dict[str, Callable[[Item, str, str], Verdict]] = {
    "letter": _letter,
    "connect4": _connect4,
    "ifeval": _ifeval,
    "tiny": _tiny,
}
