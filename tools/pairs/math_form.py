r"""The forms of an answer and the signs that part it: a list, a tuple, an interval, a matrix, named values."""

import re
from dataclasses import dataclass
from typing import Union

Form = Union["Atom", "Row", "Pool", "Grid", "Named"]
INFINITY = r"\infty"


@dataclass(frozen=True)
class Atom:
    """One expression, number or phrase."""

    text: str


@dataclass(frozen=True)
class Row:
    """Items whose order counts, between brackets: a tuple, a point, an interval. `derived`: from an inequality."""

    left: str
    items: tuple[Form, ...]
    right: str
    derived: bool = False


@dataclass(frozen=True)
class Pool:
    """Items in any order: a bare list, a set or a union."""

    items: tuple[Form, ...]
    is_list: bool = False  # without braces or a union sign


@dataclass(frozen=True)
class Grid:
    """A matrix."""

    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True)
class Named:
    """x = 2, y = 3: values by name, in the written order."""

    names: tuple[str, ...]
    items: tuple[Form, ...]


_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally)\b,? )?(?:[a-zA-Z]+ ){0,8}?"
    r"(?:is|are|equals|be)(?: (?:about|approximately|exactly|equal to))?(?:\s*:|\b(?! not\b))\s*(?=\S)"
    r"|(?:the )?(?:final )?(?:answers?|solutions?|roots?|result)\s*[:=]\s*"
    r"|(?!(?i:option|choice|answer) [a-zA-Z]\b)"
    r"(?:[a-zA-Z]{3,}(?: [a-zA-Z]+){0,4}\s*:|[a-zA-Z]{4,}(?: [a-zA-Z]+){0,4}\s*=)\s*"
    r"|(?:about|approximately|approx\.?|exactly)\s+|=\s*"
)
NAME = (
    r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|rho|sigma|tau|ell))(?:_\{? ?\w+ ?\}?)?'*"
)
VARIABLE = re.compile(NAME)
SIMPLE_NAME = re.compile(
    rf"(?:{NAME}|[a-zA-Z]{{1,3}} ?\([^()=]*\)|\|?(?:\\overline ?\{{ ?)?[A-Z]{{2,4}}(?: ?\}})?\|?"
    rf"|\\angle ?[A-Z]{{1,3}}|\| ?{NAME} ?\||\\(?:sin|cos|tan) ?{NAME}|\\(?:sin|cos|tan) ?\( ?{NAME} ?\)"
    r"|[a-zA-Z]{3,}(?: [a-zA-Z]+)*)"
)
# The left side of m + n = 204, where the known answer is 204
SUM_OF_NAMES = re.compile(rf"{NAME}(?: ?[-+*/]? ?{NAME})+|\\frac ?\{{ ?{NAME} ?\}} ?\{{ ?{NAME} ?\}}")
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_TOKEN = re.compile(r"\\begin|\\end|\\cup(?![a-zA-Z])|\\[a-zA-Z]+|\\.|[()\[\]{},;]|\band\b|\bor\b")
_SPACED_COMMA = re.compile(r", ")


def strip_lead(text: str) -> str:
    """Without the words before the answer proper: "the answer is 5"."""
    found = _LEAD.match(text)
    return text[found.end() :].strip() if found else text


def split(text: str) -> tuple[list[str], set[str]]:
    """(the parts between top-level separators, the separators): commas, semicolons, and, or, unions.

    Where a comma with a space after it separates, one without is part of a number.
    """
    depth, start = 0, 0
    parts: list[str] = []
    separators: set[str] = set()
    spaced = _SPACED_COMMA.search(text) is not None
    for token in _TOKEN.finditer(text):
        kind = token[0]
        if kind in _OPENING or kind == r"\begin":
            depth += 1
        elif kind in _CLOSING or kind == r"\end":
            depth -= 1
        elif depth == 0 and (kind in (",", ";", "and", "or", r"\cup")):
            inside = (
                spaced and kind == "," and re.match(r",\d{3}(?!\d)", text[token.start() :]) and start < token.start()
            )
            if inside and text[token.start() - 1].isdigit():
                continue
            parts.append(text[start : token.start()].strip())
            separators.add(kind)
            start = token.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part], separators


def balanced(inner: str) -> bool:
    """Whether every bracket of the text closes inside it."""
    depth = 0
    for token in re.finditer(r"\\.|[()\[\]{}]", inner):
        if token[0] in _OPENING:
            depth += 1
        elif token[0] in _CLOSING:
            depth -= 1
            if depth < 0:
                return False
    return depth == 0
