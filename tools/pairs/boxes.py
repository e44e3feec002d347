r"""Where a response states its final answer: the content of its last \boxed{...} that holds one."""

import re
from typing import NamedTuple

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


class Box(NamedTuple):
    """Positions in the text: the command's first character, its content, and the end after the closing brace."""

    start: int
    content: tuple[int, int]
    end: int


def all_boxes(text: str) -> tuple[list[Box], list[int]]:
    r"""(every outermost box that closes, where each box starts that never closes).

    Boxes are \boxed{...}, \fbox{...} and \boxed 5. Escaped braces do not count, and a box inside a box belongs to the
    outer one. Linear in the length.
    """
    open_braces: list[tuple[int, int] | None] = []  # (start, start of the content) of an open box; None: other braces
    found: list[Box] = []
    for token in _TOKENS.finditer(text):
        kind = token[0]
        if kind == "{":
            open_braces.append(None)
        elif token["bare"]:
            found.append(Box(token.start(), token.span("bare"), token.end()))
        elif kind[-1] == "{" and len(kind) > 2:
            open_braces.append((token.start(), token.end()))
        elif kind == "}" and open_braces and (opened := open_braces.pop()):
            while found and found[-1].start > opened[0]:
                found.pop()
            found.append(Box(opened[0], (opened[1], token.start()), token.end()))
    return found, [opened[0] for opened in open_braces if opened]


def outside_boxes(text: str) -> str:
    """The text without its boxes; one that never closes, after all others, reaches to the end."""
    found, unclosed = all_boxes(text)
    kept, position = [], 0
    for box in found:
        kept.append(text[position : box.start])
        position = box.end
    kept.append(text[position : next((start for start in unclosed if start >= position), len(text))])
    return "".join(kept)


def final_boxes(text: str) -> tuple[list[str], str]:
    r"""(contents of the final boxes, oldest first, "") or ([], reason).

    These are the last box and those before it that only a comma, "and" or "or" separates from it. An empty box or a
    tick is passed over. Reasons: no_box, unclosed_box, empty_box.
    """
    text = text[-SEARCHED_TAIL:]
    if "box" not in text:
        return [], "no_box"
    closed, unclosed = all_boxes(text)
    found = [box for box in closed if not _NO_ANSWER.fullmatch(text, *box.content)]
    if not found:
        return [], "empty_box" if closed else "unclosed_box" if unclosed else "no_box"
    first = len(found) - 1
    while first > 0 and len(found) - first < 50:
        between = text[found[first - 1].end : found[first].start]
        if len(between) > 80 or not _WORD_BETWEEN.search(between) or not _BETWEEN.fullmatch(between):
            break
        first -= 1
    return [text[slice(*box.content)].strip() for box in found[first:]], ""
