"""Reading what the oracle wrote: the text between the marker lines, and whether it may become a chosen side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from spot_megatron.files import Row
from tools.pairs.boxes import outside_boxes
from tools.pairs.conversation import shown_problem
from tools.pairs.grade import CORRECT, NO_ANSWER, TIMEOUT, UNDECIDED, Grader, extract
from tools.pairs.leaks import find_leak
from tools.pairs.measures import PolicyTokenizer, measure
from tools.pairs.prompts import MARKER_END, MARKER_START

_CLOSING = re.compile(r"(?:Therefore|So|Thus|Hence),? the (?:final )?answer is:?[\s$.]*", re.IGNORECASE)
_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"
_STATED = re.compile(
    rf"(?:=|\b(?:is|are|equals|gives|get|makes)\b)[\s$]*({_NUMBER})(?![,.]?\d|[\w^*+/(\\])", re.IGNORECASE
)


@dataclass(frozen=True)
class Edit:
    """The oracle's text, or None with the reason why there is none."""

    text: str | None
    reason: str


def parse_edit(reply: str, finish_reason: str) -> Edit:
    """The text between the two marker lines, each of which must stand once, alone on its line, in order.

    Thinking up to the last `</think>` is left out first, so that marker lines rehearsed in it do not count. Reasons:
    cut_off, content_filter, empty_content, unfinished_thinking, missing_markers.
    """
    if finish_reason in ("length", "content_filter"):
        return Edit(None, "cut_off" if finish_reason == "length" else finish_reason)
    if not reply.strip():
        return Edit(None, "empty_content")
    _, closed, text = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        return Edit(None, "unfinished_thinking")
    lines = text.replace("\r\n", "\n").split("\n")
    starts = [index for index, line in enumerate(lines) if line.strip() == MARKER_START]
    ends = [index for index, line in enumerate(lines) if line.strip() == MARKER_END]
    if len(starts) != 1 or len(ends) != 1 or ends[0] <= starts[0]:
        return Edit(None, "missing_markers")
    edited = "\n".join(lines[starts[0] + 1 : ends[0]]).strip("\r\n")
    return Edit(edited, "") if edited.strip() else Edit(None, "missing_markers")


def _reasoning(text: str) -> str:
    """The text without boxes and the sentence that only announces one; white space as one space."""
    return " ".join(_CLOSING.sub(" ", outside_boxes(text)).split()).rstrip(" $.")


def is_answer_only(edited: str, original: str) -> bool:
    """Whether only the boxed answer was changed, and not the reasoning that led to it."""
    return _reasoning(edited) == _reasoning(original)


def contradiction(text: str) -> str | None:
    """The last number that the text states as a result, where its box holds another number; else None."""
    boxes, _ = extract(text)
    stated = _STATED.findall(_reasoning(text))
    if len(boxes) != 1 or not stated or not re.fullmatch(_NUMBER, boxed := boxes[0].strip(" $")):
        return None
    return stated[-1] if _value(stated[-1]) != _value(boxed) else None


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def judge_edit(error: Row, edited: str, grader: Grader, meter: EditMeter | None = None) -> Row:
    """Whether an edited answer may become the chosen side: changed, right by the grader, free of leaks, and small."""
    if " ".join(edited.split()) == " ".join(error["response"].split()):
        return rejected("unchanged")
    verdict = grader.grade(edited, error["answer"])
    if verdict.verdict != CORRECT:
        reasons = {NO_ANSWER: "no_answer", TIMEOUT: "grading_timeout", UNDECIDED: "undecided"}
        reason = reasons.get(verdict.verdict, "wrong_answer")
        return {**rejected(reason, verdict.extracted or ""), "corrected": edited}
    if is_answer_only(edited, error["response"]):
        return {**rejected("answer_only_edit", verdict.extracted or ""), "corrected": edited}
    leak = find_leak(edited, error["response"], shown_problem(error))
    if leak is not None:
        return {**rejected("answer_leak", leak), "corrected": edited}
    measured = meter.judge(error["response"], edited) if meter else {}
    if "reason" in measured:
        return {**rejected(measured["reason"], measured["detail"]), "corrected": edited}
    return {"outcome": "verified", "corrected": edited, "extracted": verdict.extracted, **measured}


@dataclass(frozen=True)
class EditMeter:
    """Measures edits in the policy's tokens, so that one that the filter would drop is tried again."""

    tokenizer: PolicyTokenizer
    gamma: float

    def judge(self, original: str, edited: str) -> Row:
        """The change ratio and the shared prefix, or the reason and detail of a rejection."""
        rejected, chosen = self.tokenizer.encode([original, edited])
        measures = measure(0, chosen, rejected)
        if measures.change_ratio > self.gamma:
            return {"reason": "change_ratio", "detail": f"{measures.change_ratio:.2f}; at most {self.gamma:g}"}
        ratio = round(measures.change_ratio, 4)
        return {"change_ratio": ratio, "shared_prefix_tokens": measures.shared_prefix_tokens}


def rejected(reason: str, detail: str = "") -> Row:
    """The fields that a rejected attempt adds to its record; the detail goes into the next attempt's hint."""
    return {"outcome": "rejected", "reason": reason, "detail": detail[:200]}
