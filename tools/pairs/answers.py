"""Reading what the oracle wrote: the text between the marker lines, and whether it may become a chosen side."""

import re
from dataclasses import dataclass

from tools.pairs.grade import CORRECT, NO_ANSWER, TIMEOUT, UNDECIDED, Grader
from tools.pairs.jsonl import Row
from tools.pairs.prompts import MARKER_END, MARKER_START

# Wording that gives away that the text was corrected or that the answer was known. A phrase that the student's own
# text or the question already uses is no leak.
_LEAKS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:reference|provided|given|known|supplied|expected|official) (?:final )?(?:answer|solution|result)\b",
        r"\b(?:ground[- ]truth|answer key)\b",
        r"\b(?:correct|true|right) (?:final )?answer (?:is (?:given|known|stated|supposed)|was|should)\b",
        r"\bmatch(?:es|ing)? the (?:correct|expected|given|true|required) (?:answer|result|value)\b",
        r"\b(?:the|this|your|my) (?:original|previous|earlier|above|first) (?:solution|answer|attempt|response)\b",
        r"\bstudent'?s? (?:solution|answer|error|mistake|work)\b",
        r"\b(?:corrected|rectified|revised) (?:solution|answer|version|response|step)\b",
        r"\bhere(?:'s| is) the (?:corrected|edited|revised)\b",
        r"\b(?:the|an?|my) (?:error|mistake) (?:was|is|in|above|here|occurred|occurs)\b",
        r"\bI (?:made|found|fixed|corrected) (?:an?|the|my) (?:error|mistake)\b",
    )
)


@dataclass(frozen=True)
class Edit:
    """The oracle's text, or None with the reason why there is none."""

    text: str | None
    reason: str


def parse_edit(reply: str, finish_reason: str) -> Edit:
    """The text between the two marker lines, each of which must stand once, alone on its line, in order.

    Thinking up to the last `</think>` is left out first, so that marker lines rehearsed in it do not count. Reasons:
    cut_off, unfinished_thinking, missing_markers.
    """
    if finish_reason == "length":
        return Edit(None, "cut_off")
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


def find_leak(edited: str, *allowed: str) -> str | None:
    """The first phrase of `edited` that speaks of a correction or a known answer and is in no allowed text."""
    for pattern in _LEAKS:
        for match in pattern.finditer(edited):
            if not any(match[0].lower() in text.lower() for text in allowed):
                return match[0]
    return None


def judge_edit(error: Row, edited: str, grader: Grader) -> Row:
    """Whether an edited answer may become the chosen side: changed, right by the grader, and free of leaks."""
    if " ".join(edited.split()) == " ".join(error["response"].split()):
        return rejected("unchanged")
    verdict = grader.grade(edited, error["answer"])
    if verdict.verdict != CORRECT:
        reasons = {NO_ANSWER: "no_answer", TIMEOUT: "grading_timeout", UNDECIDED: "undecided"}
        reason = reasons.get(verdict.verdict, "wrong_answer")
        return {**rejected(reason, verdict.extracted or ""), "corrected": edited}
    leak = find_leak(edited, error["response"], error["question"])
    if leak is not None:
        return {**rejected("answer_leak", leak), "corrected": edited}
    return {"outcome": "verified", "corrected": edited, "extracted": verdict.extracted}


def rejected(reason: str, detail: str = "") -> Row:
    """What a rejected attempt adds to its record; the detail goes into the next attempt's hint."""
    return {"outcome": "rejected", "reason": reason, "detail": detail[:200]}
