r"""The outer form of a cleaned answer: a list, a tuple, an interval, a matrix, named values, or one expression."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Union

from tools.pairs.math_text import number
from tools.pairs.math_units import split_unit

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
_NAME = (
    r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|rho|sigma|tau|ell))(?:_\{? ?\w+ ?\}?)?'*"
)
_VARIABLE = re.compile(_NAME)
SIMPLE_NAME = re.compile(
    rf"(?:{_NAME}|[a-zA-Z]{{1,3}} ?\([^()=]*\)|\|?(?:\\overline ?\{{ ?)?[A-Z]{{2,4}}(?: ?\}})?\|?"
    rf"|\\angle ?[A-Z]{{1,3}}|\| ?{_NAME} ?\||\\(?:sin|cos|tan) ?{_NAME}|\\(?:sin|cos|tan) ?\( ?{_NAME} ?\)"
    r"|[a-zA-Z]{3,}(?: [a-zA-Z]+)*)"
)
# The left side of m + n = 204, where the known answer is 204
SUM_OF_NAMES = re.compile(rf"{_NAME}(?: ?[-+*/]? ?{_NAME})+|\\frac ?\{{ ?{_NAME} ?\}} ?\{{ ?{_NAME} ?\}}")
_NAMES_IN_BRACKETS = re.compile(rf"\\?[({{] ?{_NAME}(?: ?, ?{_NAME})+ ?\\?[)}}]")
_MEMBER = re.compile(rf"(?:{_NAME}|\\?[({{] ?{_NAME}(?: ?, ?{_NAME})+ ?\\?[)}}])\s*\\in(?![a-zA-Z])\s*")
_BUILDER = re.compile(rf"\\\{{ ?(?P<name>{_NAME}) ?(?:\\in ?\\mathbb ?\{{? ?R ?\}}? ?)?[|:] ?(?P<condition>.*)\\\}}")
_REALS = re.compile(r"\\mathbb ?\{? ?R ?\}?|\\R|(?:all )?reals?(?: numbers?)?|all real (?:values|x)", re.IGNORECASE)
_WITHOUT = re.compile(r"(?:\\mathbb ?\{? ?R ?\}?) ?(?:\\setminus|\\backslash|-|\\) ?\\\{(?P<items>[^{}]*)\\\}")
_ENVIRONMENT = re.compile(
    r"\\begin ?\{ ?([pbB]?matrix|smallmatrix|array|cases|aligned) ?\}(.*)\\end ?\{ ?\1 ?\}", re.DOTALL
)
_COLUMNS = re.compile(r"\s*\{[lcr|@ ]*\}")
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_TOKEN = re.compile(r"\\begin|\\end|\\cup(?![a-zA-Z])|\\[a-zA-Z]+|\\.|[()\[\]{},;]|\band\b|\bor\b")
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]")
_FRENCH = re.compile(
    r"(?P<left>^|\\cup ?|\\in ?)(?P<open>[\[\]])(?P<body>[^\[\]()]*,[^\[\]()]*)(?P<close>[\[\]])(?=$| ?\\cup)"
)
_SPACED_COMMA = re.compile(r", ")


def parse(text: str) -> Form:
    """The form of a cleaned answer. Whatever is not understood is an Atom."""
    text = strip_lead(text.strip())
    member = _MEMBER.match(text)
    if member:
        return parse(text[member.end() :])
    quantity = split_unit(text)
    if quantity and number(quantity[0]) is not None:
        return Atom(text)
    text = _FRENCH.sub(_turn_french, text)
    builder = _BUILDER.fullmatch(text)
    if builder:
        return parse(builder["condition"])
    special = _special_set(text)
    if special is not None:
        return special
    parts, separators = split(text)
    if len(parts) > 1:
        return _list(text, parts, separators)
    left, _, right = text.partition("=")
    if right and "=" not in right:
        value = parse(right)
        if SIMPLE_NAME.fullmatch(left.strip()) and not isinstance(value, Atom):
            return value
        if _NAMES_IN_BRACKETS.fullmatch(left.strip()) and isinstance(value, Row | Pool):
            return value
    inequality = _inequality(text)
    return inequality if inequality is not None else _single(text)


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


def _list(text: str, parts: list[str], separators: set[str]) -> Form:
    forms = [_inequality(part) for part in parts]
    variables = {side for part in parts for side in map(str.strip, _RELATION.split(part)) if _VARIABLE.fullmatch(side)}
    if any(forms) and separators & {"and", ","} and len(variables) == 1:
        both = _intersect(forms) if len(forms) == 2 else None
        if both or "and" in separators:
            return both or Atom(text)
    names = [_name_of(part) for part in parts]
    if all(names) and len(set(names)) == len(names):
        return Named(tuple(map(str, names)), tuple(parse(part.partition("=")[2]) for part in parts))
    if names[0] and all(name in (None, names[0]) for name in names):
        parts = [part.partition("=")[2].strip() if name else part for part, name in zip(parts, names, strict=True)]
    items: list[Form] = []
    for part in parts:
        form = parse(part)
        items += form.items if isinstance(form, Pool) and not form.is_list else [form]
    if len(items) == 1:
        return items[0]
    return Pool(tuple(items), is_list=r"\cup" not in separators)


def _name_of(part: str) -> str | None:
    """The name of "x = 5"; the subscripts of x_1 = 2, x_2 = 3 count solutions, so they are left out."""
    name, sign, value = part.partition("=")
    if not sign or "=" in value or not SIMPLE_NAME.fullmatch(name.strip()):
        return None
    return re.sub(r"_\{? ?\d+ ?\}?$", "", name.strip())


def _single(text: str) -> Form:
    environment = _ENVIRONMENT.fullmatch(text)
    if environment:
        return _environment(text, environment[1], environment[2])
    for left, rights in (("(", (")", "]")), ("[", (")", "]")), (r"\{", (r"\}",))):
        right = next((end for end in rights if text.endswith(end)), None)
        if text.startswith(left) and right and len(text) > len(left) + len(right):
            inner = text[len(left) : len(text) - len(right)]
            if balanced(inner):
                return _bracketed(text, left, inner, right)
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        before, _, after = text.partition(r"\pm")
        if _VARIABLE.fullmatch(before.partition("=")[0].strip()):
            before = before.partition("=")[2]
        return Pool((parse(f"{before}+{after}"), parse(f"{before}-{after}")))
    return Atom(text)


def _bracketed(text: str, left: str, inner: str, right: str) -> Form:
    parts, separators = split(inner)
    if not parts or separators - {",", ";"}:
        return Atom(text)
    if left == r"\{":
        if number(inner.strip()) is not None and "," in inner:  # in braces a comma separates
            parts = inner.split(",")
        return Pool(tuple(parse(part) for part in parts))
    if len(parts) == 1:
        matrix = _ENVIRONMENT.fullmatch(inner.strip())
        inner_form = parse(inner)
        return inner_form if matrix or not isinstance(inner_form, Atom) or left == "[" else Atom(inner.strip())
    return Row(left, tuple(parse(part) for part in parts), right)


def _environment(text: str, kind: str, body: str) -> Form:
    body = _COLUMNS.sub("", body, count=1) if kind == "array" else body
    rows = [row.strip() for row in body.split(r"\\") if row.strip() not in ("", r"\hline")]
    if kind in ("cases", "aligned"):
        return Atom(text) if "&" in body.replace("&=", "=") else parse(", ".join(row.replace("&", "") for row in rows))
    return Grid(tuple(tuple(parse(cell) for cell in row.split("&")) for row in rows))


def _special_set(text: str) -> Form | None:
    if _REALS.fullmatch(text):
        return _interval("(", "-" + INFINITY, INFINITY, ")")
    without = _WITHOUT.fullmatch(text)
    if without:
        return _all_but(split(without["items"])[0])
    return None


def _all_but(points: list[str]) -> Form | None:
    values = [number(point) for point in points]
    if len(points) > 1:
        if not all(values):
            return None
        points = [point for _, point in sorted(zip([v.value for v in values if v], points, strict=True))]
    ends = ["-" + INFINITY, *points, INFINITY]
    return Pool(tuple(_interval("(", low, high, ")") for low, high in pairwise(ends)))


def _interval(left: str, low: str, high: str, right: str) -> Row:
    return Row(left, (Atom(low.strip()), Atom(high.strip())), right, derived=True)


def _inequality(text: str) -> Form | None:
    r"""The interval of a < x \le b, x > 3, 3 < x; the union of x \ne 3."""
    signs = [found[0] for found in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if not signs or len(signs) > 2 or not all(sides) or "=" in text:
        return None
    if signs[0] in (">", r"\ge"):
        flipped = {">": "<", r"\ge": r"\le"}
        if any(sign not in flipped for sign in signs):
            return None
        signs, sides = [flipped[sign] for sign in reversed(signs)], sides[::-1]
    if signs == [r"\ne"]:
        return _all_but([sides[1]]) if _VARIABLE.fullmatch(sides[0]) else None
    if any(sign not in ("<", r"\le") for sign in signs):
        return None
    if len(signs) == 2:
        if not _VARIABLE.fullmatch(sides[1]):
            return None
        return _interval("(" if signs[0] == "<" else "[", sides[0], sides[2], ")" if signs[1] == "<" else "]")
    if _VARIABLE.fullmatch(sides[0]):
        return _interval("(", "-" + INFINITY, sides[1], ")" if signs[0] == "<" else "]")
    if _VARIABLE.fullmatch(sides[1]):
        return _interval("(" if signs[0] == "<" else "[", sides[0], INFINITY, ")")
    return None


def _intersect(forms: list[Form | None]) -> Form | None:
    """x > 1 and x < 5: one ray to the right and one to the left."""
    rays = [form for form in forms if isinstance(form, Row)]
    up = [ray for ray in rays if ray.items[1] == Atom(INFINITY)]
    down = [ray for ray in rays if ray.items[0] == Atom("-" + INFINITY)]
    if len(up) != 1 or len(down) != 1 or len(rays) != len(forms):
        return None
    low, high = (number(form.text) if isinstance(form, Atom) else None for form in (up[0].items[0], down[0].items[1]))
    if low and high and low.value > high.value:  # "x < 1, x > 2" means either
        return None
    return Row(up[0].left, (up[0].items[0], down[0].items[1]), down[0].right, derived=True)


def _turn_french(found: re.Match[str]) -> str:
    """]0,1[ is (0,1)."""
    left = "(" if found["open"] == "]" else "["
    return f"{found['left']}{left}{found['body']}{')' if found['close'] == '[' else ']'}"


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
