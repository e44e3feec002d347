r"""Sets of reals: inequalities, intervals in either notation, and what a set leaves out, all as intervals."""

import re
from itertools import pairwise

from tools.pairs.math_form import INFINITY, VARIABLE, Atom, Form, Pool, Row, split
from tools.pairs.math_text import number

_REALS = re.compile(r"\\mathbb ?\{? ?R ?\}?|\\R|(?:all )?reals?(?: numbers?)?|all real (?:values|x)", re.IGNORECASE)
_WITHOUT = re.compile(r"(?:\\mathbb ?\{? ?R ?\}?) ?(?:\\setminus|\\backslash|-|\\) ?\\\{(?P<items>[^{}]*)\\\}")
RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]")
_FRENCH = re.compile(
    r"(?P<left>^|\\cup ?|\\in ?)(?P<open>[\[\]])(?P<body>[^\[\]()]*,[^\[\]()]*)(?P<close>[\[\]])(?=$| ?\\cup)"
)


def special_set(text: str) -> Form | None:
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


def inequality(text: str) -> Form | None:
    r"""The interval of a < x \le b, x > 3, 3 < x; the union of x \ne 3."""
    signs = [found[0] for found in RELATION.finditer(text)]
    sides = [side.strip() for side in RELATION.split(text)]
    if not signs or len(signs) > 2 or not all(sides) or "=" in text:
        return None
    if signs[0] in (">", r"\ge"):
        flipped = {">": "<", r"\ge": r"\le"}
        if any(sign not in flipped for sign in signs):
            return None
        signs, sides = [flipped[sign] for sign in reversed(signs)], sides[::-1]
    if signs == [r"\ne"]:
        return _all_but([sides[1]]) if VARIABLE.fullmatch(sides[0]) else None
    if any(sign not in ("<", r"\le") for sign in signs):
        return None
    if len(signs) == 2:
        if not VARIABLE.fullmatch(sides[1]):
            return None
        return _interval("(" if signs[0] == "<" else "[", sides[0], sides[2], ")" if signs[1] == "<" else "]")
    if VARIABLE.fullmatch(sides[0]):
        return _interval("(", "-" + INFINITY, sides[1], ")" if signs[0] == "<" else "]")
    if VARIABLE.fullmatch(sides[1]):
        return _interval("(" if signs[0] == "<" else "[", sides[0], INFINITY, ")")
    return None


def intersect(forms: list[Form | None]) -> Form | None:
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


def plain_intervals(text: str) -> str:
    """The text with ]0,1[ written as (0,1)."""
    return _FRENCH.sub(_turn_french, text)


def _turn_french(found: re.Match[str]) -> str:
    left = "(" if found["open"] == "]" else "["
    return f"{found['left']}{left}{found['body']}{')' if found['close'] == '[' else ']'}"
