"""Wording that gives away that a text was corrected, or that its answer was known."""

import re

# Wording that gives away that the text was corrected or that the answer was known. A phrase that the student's own
# text or the question already uses is not a leak.
_LEAKS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:reference|provided|given|known|supplied|expected|official|true) (?:final )?answer\b",
        r"\b(?:reference|official) (?:solution|result)\b",
        r"\b(?:ground[- ]truth|answer key)\b",
        r"\b(?:correct|right) (?:final )?answer (?:is (?:given|known|stated|supposed)|was|should)\b",
        r"\bmatch(?:es|ing)? the (?:correct|expected|given|true|required) (?:answer|result|value)\b",
        r"\b(?:reach|get|obtain|arrive at) the (?:correct|expected|given|known|required) (?:answer|result)\b",
        r"\b(?:we|I) know (?:that )?the (?:final |correct |right )?(?:answer|result) (?:is|must|should|has|will)\b",
        r"\bthe (?:answer|result) is (?:known|given|supposed|said) to be\b",
        r"\b(?:the|this|your|my) (?:original|previous|earlier) (?:answer|attempt|response|version)\b",
        r"\b(?:in|of) (?:the|your|my) (?:original|previous|earlier) solution\b",
        r"\b(?:your|my) (?:first|above) (?:solution|answer|attempt|response)\b",
        r"\bthe (?:first|above) (?:attempt|response)\b",
        r"\bstudent'?s? (?:solution|answer|error|mistake|work)\b",
        r"\b(?:corrected|rectified|revised) (?:solution|answer|version|response|step|calculation|result)\b",
        r"\bhere(?:'s| is) the (?:corrected|edited|revised)\b",
        r"\b(?:the|a|my) mistake (?:was|is|in|above|here|occurred|occurs)\b",
        r"\b(?:the|an|my) error (?:was|above|here|occurred|occurs)\b",
        r"\berror in (?:my|the|this) (?:step|solution|calculation|work)\b",
        r"\bI (?:made|found|fixed|corrected) (?:an?|the|my) (?:error|mistake)\b",
        r"\bI (?:was wrong|mis(?:calculated|counted|read|took|applied))\b",
        r"\b(?:wait|oops|sorry|hold on|hmm)\b[,.!:; ]+no\b",
        r"\b(?:wait|oops|sorry|hold on|hmm)\b[,.!:; ]+(?:that|this|it|I)\b[^.\n]{0,40}"
        r"\b(?:wrong|incorrect|mistake|not right)\b",
        r"\b(?:that|this) was (?:wrong|incorrect|a mistake|an error|not right)\b",
        r"\blet me (?:correct|fix|redo|re-do|revise)\b",
        r"\binstead of the (?:wrong|incorrect|earlier|previous|original)\b",
    )
)


def find_leak(edited: str, *allowed: str) -> str | None:
    """The first phrase of `edited` that speaks of a correction or a known answer and is in no allowed text."""
    for pattern in _LEAKS:
        for match in pattern.finditer(edited):
            if not any(match[0].lower() in text.lower() for text in allowed):
                return match[0]
    return None
