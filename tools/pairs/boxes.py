r"""Where a response states its final answer: the content of its last \boxed{...} that holds one."""

import re

SEARCHED_TAIL = 200_000  # characters; a final answer is at the end, and a bound keeps hostile texts cheap

_TOKENS = re.compile(
    r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z])))|(?:\\\\)+|\\.|[{}]", re.DOTALL
)
_NO_ANSWER = re.compile(
    r"(?:\\(?:text|mathrm|textbf|bf)\s*\{?|[\s$.{}]|\\checkmark|\\(?:black)?square|\\Box|\\quad"
    r"|\\[,;:! ]|[✓✔☑✅■□∎]|Q\.?E\.?D\.?)*",
    re.IGNORECASE,
)
# What may separate two boxes that together give one list: \boxed{2} and $x = \boxed{3}$
_BETWEEN = re.compile(r"(?:[\s$,;]|\\[()\[\],;:! ]|\\quad|\\text\s*\{|\}|\band\b|\bor\b|&|[a-zA-Z](?:_\{?\w\}?)?\s*=)*")
_WORD_BETWEEN = re.compile(r"[,;&]|\b(?:and|or)\b")


def find_boxes(text: str) -> tuple[list[tuple[int, int]], str]:
    r"""(start and end of the content of every outermost box that holds an answer, why there is none or "").

    Boxes are \boxed{...}, \fbox{...} and \boxed 5. Escaped braces do not count, a box inside a box belongs to the outer
    one, and an empty box or a tick is passed over. Reasons: no_box, unclosed_box, empty_box. Linear in the length.
    """
    open_braces: list[int | None] = []  # where the content of an open box starts; None for any other brace
    found: list[tuple[int, int]] = []
    reason = "no_box"
    for token in _TOKENS.finditer(text):
        kind = token[0]
        span: tuple[int, int] | None = None
        if kind == "{":
            open_braces.append(None)
        elif kind == "}":
            start = open_braces.pop() if open_braces else None
            span = None if start is None else (start, token.start())
        elif token["bare"]:
            span = token.span("bare")
        elif kind[-1] == "{" and len(kind) > 2:
            reason = "unclosed_box" if reason == "no_box" else reason
            open_braces.append(token.end())
        if span:
            if _NO_ANSWER.fullmatch(text, *span):
                reason = "empty_box"
                continue
            while found and found[-1][0] > span[0]:
                found.pop()
            found.append(span)
    return found, reason


def final_boxes(text: str) -> tuple[list[str], str]:
    r"""(contents of the final boxes, oldest first, "") or ([], reason).

    These are the last box and those before it that only a comma, "and" or "or" separates from it.
    """
    text = text[-SEARCHED_TAIL:]
    if "box" not in text:
        return [], "no_box"
    spans, reason = find_boxes(text)
    if not spans:
        return [], reason
    first = len(spans) - 1
    while first > 0 and len(spans) - first < 50:
        end = spans[first - 1][1]
        between = re.sub(r"^\}|\\(?:boxed|fbox|framebox)\s*\{?$", "", text[end : spans[first][0]])
        if len(between) > 80 or not _WORD_BETWEEN.search(between) or not _BETWEEN.fullmatch(between):
            break
        first -= 1
    return [text[start:end].strip() for start, end in spans[first:]], ""
