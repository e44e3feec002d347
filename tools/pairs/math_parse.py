r"""Reads the outer form of a cleaned answer."""

import re

from tools.pairs.math_form import (
    NAME,
    SIMPLE_NAME,
    VARIABLE,
    Atom,
    Form,
    Grid,
    Named,
    Pool,
    Row,
    balanced,
    split,
    strip_lead,
)
from tools.pairs.math_intervals import RELATION, inequality, intersect, plain_intervals, special_set
from tools.pairs.math_text import number
from tools.pairs.math_units import split_unit

_NAMES_IN_BRACKETS = re.compile(rf"\\?[({{] ?{NAME}(?: ?, ?{NAME})+ ?\\?[)}}]")
_MEMBER = re.compile(rf"(?:{NAME}|\\?[({{] ?{NAME}(?: ?, ?{NAME})+ ?\\?[)}}])\s*\\in(?![a-zA-Z])\s*")
_BUILDER = re.compile(rf"\\\{{ ?(?P<name>{NAME}) ?(?:\\in ?\\mathbb ?\{{? ?R ?\}}? ?)?[|:] ?(?P<condition>.*)\\\}}")
_ENVIRONMENT = re.compile(
    r"\\begin ?\{ ?([pbB]?matrix|smallmatrix|array|cases|aligned) ?\}(.*)\\end ?\{ ?\1 ?\}", re.DOTALL
)
_COLUMNS = re.compile(r"\s*\{[lcr|@ ]*\}")


def parse(text: str) -> Form:
    """The form of a cleaned answer. Whatever is not understood is an Atom."""
    text = strip_lead(text.strip())
    member = _MEMBER.match(text)
    if member:
        return parse(text[member.end() :])
    quantity = split_unit(text)
    if quantity and number(quantity[0]) is not None:
        return Atom(text)
    text = plain_intervals(text)
    builder = _BUILDER.fullmatch(text)
    if builder:
        return parse(builder["condition"])
    special = special_set(text)
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
    interval = inequality(text)
    return interval if interval is not None else _single(text)


def _list(text: str, parts: list[str], separators: set[str]) -> Form:
    forms = [inequality(part) for part in parts]
    variables = {side for part in parts for side in map(str.strip, RELATION.split(part)) if VARIABLE.fullmatch(side)}
    if any(forms) and separators & {"and", ","} and len(variables) == 1:
        both = intersect(forms) if len(forms) == 2 else None
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
        if VARIABLE.fullmatch(before.partition("=")[0].strip()):
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
