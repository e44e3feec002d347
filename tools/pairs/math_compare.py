"""Whether two final answers are the same: equal or different where that can be proved, unknown otherwise.

Collections are compared item by item, numbers exactly, units by their sizes. What is left, single expressions, goes to
`algebra`, which the worker process answers with math-verify.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import permutations

from tools.pairs import math_units
from tools.pairs.math_form import SIMPLE_NAME, Atom, Form, Grid, Named, Pool, Row, parse, split, strip_lead
from tools.pairs.math_text import DIFFERENT, EQUAL, UNKNOWN, Number, compare_numbers, number

Algebra = Callable[[str, str], str]  # (known, given) expressions -> equal, different, unknown

_LETTER = re.compile(
    r"(?:(?:option|choice|answer) ?:? ?)?(?:\( ?(?P<round>[A-J]) ?\)|(?P<closed>[A-J])(?: ?\)| ?\.| ?:)|(?P<plain>[A-J]))"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_FORMULA_COMMANDS = frozenset(
    "frac sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp cdot times div binom infty le ge"
    " lfloor rfloor lceil rceil alpha beta gamma delta theta lambda mu phi varphi omega rho sigma tau epsilon circ pmod"
    " begin end sum prod int overline gcd lcm max min partial".split()
)
_UNTRUSTED = re.compile(r"\.\.\.|\d \d|[^\x20-\x7e]|:|\\\\|&|\?|\\(?:overline|pmod|begin|end|int|partial)|#|\"|@|_ ?\{? ?[a-zA-Z]{3}")


def compare(gold: str, given: str, algebra: Algebra) -> str:
    """equal, different or unknown, of two cleaned answers."""
    if squeeze(gold) == squeeze(given):
        return EQUAL
    gold_form, form = parse(gold), parse(given)
    outcome = compare_forms(gold_form, form, algebra)
    if outcome == DIFFERENT and _other_reading_agrees(gold, given, gold_form, form):
        return UNKNOWN
    return outcome


def squeeze(text: str) -> str:
    """Without the spaces that mean nothing: "1 2" keeps its own."""
    return re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)


def _other_reading_agrees(gold: str, given: str, gold_form: Form, form: Form) -> bool:
    """Whether a comma may separate thousands on one side and items on the other: 1,234 or 1, 234; or be a decimal's."""
    if "," not in gold + given or isinstance(gold_form, Row) or isinstance(form, Row):
        return False
    if gold[:1] in "([" or given[:1] in "([":
        return False
    joined = [re.sub(r"(?<=\d) ?, ?(?=\d{3}(?!\d))", "", side) for side in (gold, given)]
    points = [number(re.sub(r"(?<=\d),(?=\d+$)", ".", side)) for side in (gold, given)]
    values = [number(side) for side in (gold, given)]
    for point, value in ((points[0], values[1]), (points[1], values[0])):
        if point and value and point.value == value.value:
            return True
    if squeeze(joined[0]) == squeeze(joined[1]):
        return True
    items = [sorted(filter(None, re.split(r" ?(?:[,;]|and|or) ?", side))) for side in (gold, given)]
    listed = [sorted(filter(None, re.split(r" ?(?:; ?|, |and|or) ?", joined_side))) for joined_side in joined]
    return items[0] == items[1] or listed[0] == listed[1]


def compare_forms(gold: Form, given: Form, algebra: Algebra) -> str:
    gold, given = _unwrap(gold), _unwrap(given)
    if isinstance(gold, Atom) and isinstance(given, Atom):
        return compare_atoms(gold.text, given.text, algebra)
    if isinstance(gold, Named) or isinstance(given, Named):
        return _compare_named(gold, given, algebra)
    if isinstance(gold, Row) and isinstance(given, Row):
        return _compare_rows(gold, given, algebra)
    if isinstance(gold, Grid) and isinstance(given, Grid):
        shapes = [[len(row) for row in grid.rows] for grid in (gold, given)]
        if shapes[0] != shapes[1]:
            return DIFFERENT if all(len(set(shape)) == 1 for shape in shapes) else UNKNOWN
        return _all_equal([cell for row in gold.rows for cell in row], [c for row in given.rows for c in row], algebra)
    if isinstance(gold, Grid) or isinstance(given, Grid):
        return UNKNOWN
    pools = [side for side in (gold, given) if isinstance(side, Pool)]
    row = next((side for side in (gold, given) if isinstance(side, Row)), None)
    if row and pools:
        return _compare_row_with_pool(row, pools[0], row is gold, algebra)
    if pools:
        return _compare_pools(_items(gold), _items(given), algebra)
    atom = gold if isinstance(gold, Atom) else given
    assert isinstance(atom, Atom)
    assert row is not None
    return DIFFERENT if not row.derived and _is_plain(atom) and all(map(_is_plain, row.items)) else UNKNOWN


def _unwrap(form: Form) -> Form:
    while isinstance(form, Pool) and len(form.items) == 1:
        form = form.items[0]
    if isinstance(form, Grid) and len(form.rows) == 1 and len(form.rows[0]) == 1:
        form = form.rows[0][0]
    return form


def _items(form: Form) -> tuple[Form, ...]:
    return form.items if isinstance(form, Pool) else (form,)


def _is_plain(form: Form) -> bool:
    """A number, or a statement that there is none."""
    return isinstance(form, Atom) and (number(form.text) is not None or _existence(form.text) is not None)


def _existence(text: str) -> str | None:
    value = math_units.phrases(text).get("existence")
    return None if value == "infinitely many" else value


def _all_equal(gold: Sequence[Form], given: Sequence[Form], algebra: Algebra) -> str:
    outcomes = {compare_forms(a, b, algebra) for a, b in zip(gold, given, strict=True)}
    return DIFFERENT if DIFFERENT in outcomes else UNKNOWN if UNKNOWN in outcomes else EQUAL


def _compare_rows(gold: Row, given: Row, algebra: Algebra) -> str:
    """Tuples and intervals: the same items in the same order; of two items, the same brackets."""
    if len(gold.items) != len(given.items):
        return DIFFERENT
    items = _all_equal(gold.items, given.items, algebra)
    if items == EQUAL and not _same_ends(gold, given):
        return DIFFERENT if len(gold.items) == 2 else UNKNOWN
    return items


def _same_ends(gold: Row, given: Row) -> bool:
    """An infinite end is open however it is written."""
    ends = ((gold.left, given.left, gold.items[0]), (gold.right, given.right, gold.items[-1]))
    return all(a == b or (isinstance(item, Atom) and r"\infty" in item.text) for a, b, item in ends)


def _compare_row_with_pool(row: Row, pool: Pool, row_is_gold: bool, algebra: Algebra) -> str:
    """A bare list may be a tuple without its brackets; whether a tuple may be a list depends on the question."""
    if row.derived or any(isinstance(item, Row) for item in pool.items):
        return _compare_pools((row,), pool.items, algebra) if row_is_gold else _compare_pools(pool.items, (row,), algebra)
    if len(row.items) != len(pool.items):
        return DIFFERENT if all(map(_is_plain, (*row.items, *pool.items))) else UNKNOWN
    sides = (row.items, pool.items) if row_is_gold else (pool.items, row.items)
    if pool.is_list:
        in_order = _all_equal(*sides, algebra)
        if in_order == EQUAL:
            return EQUAL
        if row_is_gold:
            return in_order
    return UNKNOWN if _compare_pools(*sides, algebra) != DIFFERENT else DIFFERENT


def _compare_named(gold: Form, given: Form, algebra: Algebra) -> str:
    if isinstance(gold, Named) and isinstance(given, Named):
        if sorted(gold.names) == sorted(given.names):
            values = dict(zip(given.names, given.items, strict=True))
            return _all_equal(gold.items, [values[name] for name in gold.names], algebra)
        return UNKNOWN
    named = gold if isinstance(gold, Named) else given
    other = given if isinstance(gold, Named) else gold
    assert isinstance(named, Named)
    if isinstance(other, Row):
        ordered = [item for _, item in sorted(zip(named.names, named.items, strict=True), key=lambda pair: pair[0])]
        if len(ordered) != len(other.items) or other.derived:
            return UNKNOWN
        for order in (ordered, list(named.items)):
            sides = (order, other.items) if named is gold else (other.items, order)
            if _all_equal(*sides, algebra) == EQUAL:
                return EQUAL
        outcome = _compare_pools(named.items, other.items, algebra)
        return DIFFERENT if outcome == DIFFERENT else UNKNOWN
    outcome = _compare_pools(*((_items(other), named.items) if named is given else (named.items, _items(other))), algebra)
    return outcome if named is given or outcome == DIFFERENT else UNKNOWN


def _compare_pools(gold: Sequence[Form], given: Sequence[Form], algebra: Algebra) -> str:
    """Sets and bare lists: items in any order. An item that differs from every one on the other side proves it."""
    if len(gold) * len(given) > 400:
        return UNKNOWN
    table = [[compare_forms(a, b, algebra) for b in given] for a in gold]
    if any(set(line) == {DIFFERENT} for line in table) or any(set(line) == {DIFFERENT} for line in zip(*table)):
        return DIFFERENT
    if len(gold) == len(given) and _matching(table):
        return EQUAL
    covered = all(EQUAL in line for line in table) and all(EQUAL in line for line in zip(*table))
    repeats = any(
        compare_forms(a, b, algebra) == EQUAL
        for side in (gold, given)
        for index, a in enumerate(side)
        for b in side[:index]
    )
    if covered and len(gold) != len(given) and not repeats:
        return EQUAL
    return UNKNOWN


def _matching(table: list[list[str]]) -> bool:
    """Whether every line can have an equal column of its own."""
    if len(table) <= 4:
        return any(
            all(table[i][j] == EQUAL for i, j in enumerate(order)) for order in permutations(range(len(table)))
        )
    taken: dict[int, int] = {}  # column: line

    def place(line: int, seen: set[int]) -> bool:
        for column, outcome in enumerate(table[line]):
            if outcome == EQUAL and column not in seen:
                seen.add(column)
                if column not in taken or place(taken[column], seen):
                    taken[column] = line
                    return True
        return False

    return all(place(line, set()) for line in range(len(table)))


def compare_atoms(gold: str, given: str, algebra: Algebra) -> str:
    """Two single answers: phrases, choices, numbers with units, ratios, numbers of other bases, expressions."""
    if squeeze(gold) == squeeze(given):
        return EQUAL
    for decide in (_compare_phrases, _compare_letters, _compare_equations, _compare_quantities, _compare_spellings):
        outcome = decide(gold, given, algebra)
        if outcome is not None:
            return outcome
    return _compare_expressions(gold, given, algebra)


def _compare_phrases(gold: str, given: str, _: Algebra) -> str | None:
    known, found = math_units.phrases(gold), math_units.phrases(given)
    if known and found:
        shared = known.keys() & found.keys()
        if any(known[group] == found[group] for group in shared):
            return EQUAL
        sure = shared - {"existence"} or (shared and "infinity" in known["existence"] and "infinity" in found["existence"])
        return DIFFERENT if sure else UNKNOWN
    if known or found:
        exists = _existence(gold) or _existence(given)
        value = number(given if known else gold)
        return DIFFERENT if exists and value else UNKNOWN if not exists or _WORD.search(given if known else gold) else None
    return None


def _compare_letters(gold: str, given: str, _: Algebra) -> str | None:
    """B, (B), B. 12; a choice's own value is not known here."""
    letter = _LETTER.fullmatch(gold)
    if letter is None or letter["rest"].strip() or not (letter["round"] or letter["plain"] or letter["closed"]).isupper():
        return None
    name = letter["round"] or letter["closed"] or letter["plain"]
    found = _LETTER.fullmatch(given)
    if found is None or (found["plain"] and found["rest"].strip()):
        return UNKNOWN
    given_name = found["round"] or found["closed"] or found["plain"]
    if given_name.upper() != name:
        return DIFFERENT if given_name.isupper() else UNKNOWN
    return EQUAL


def _compare_equations(gold: str, given: str, algebra: Algebra) -> str | None:
    """x = 5 against 5, y = 2x + 1 against 2x + 1; two equations with the same left side."""
    names, values = zip(_split_equation(gold), _split_equation(given), strict=True)
    if names == (None, None):
        return None
    simple = [name is None or SIMPLE_NAME.fullmatch(name) is not None for name in names]
    if None not in names and not all(simple):
        outcome = algebra(gold, given)
        return outcome
    outcome = compare_forms(parse(values[0]), parse(values[1]), algebra)
    same_name = None in names or squeeze(str(names[0])) == squeeze(str(names[1]))
    return outcome if same_name and all(simple) else UNKNOWN


def _split_equation(text: str) -> tuple[str | None, str]:
    """(left side, right side) of an equation or a chain of them, (None, text) of anything else."""
    sides = [side.strip() for side in text.split("=")]
    if len(sides) < 2 or not all(sides) or re.search(r"[<>]|\\(?:le|ge|ne|begin)(?![a-zA-Z])", text):
        return None, text
    if len(sides) == 2 and SIMPLE_NAME.fullmatch(sides[1]) and not SIMPLE_NAME.fullmatch(sides[0]):
        return sides[1], sides[0]
    return sides[0], sides[-1]


def _compare_quantities(gold: str, given: str, _: Algebra) -> str | None:
    """Numbers, with or without units."""
    sides = math_units.split_unit(gold), math_units.split_unit(given)
    if sides[0] is None or sides[1] is None:
        return None
    (gold_text, gold_unit), (text, unit) = sides
    value, gold_value = number(text), number(gold_text)
    if value is None or gold_value is None:
        return None
    outcome = compare_numbers(gold_value, value)
    if gold_unit and unit:
        return _with_units(gold_value, gold_unit, value, unit, outcome)
    only = gold_unit or unit
    if only is None:
        return outcome
    if only.dimension == "count":
        sizes = [side.size if side else Fraction(1) for side in (gold_unit, unit)]
        return compare_numbers(_scaled(gold_value, sizes[0]), _scaled(value, sizes[1]))
    if outcome != DIFFERENT:
        return outcome
    sides_values = (value.value, gold_value.value) if gold_unit else (gold_value.value, value.value)
    return UNKNOWN if only.dimension and math_units.may_convert(only, *sides_values) else DIFFERENT


def _with_units(
    gold: Number, gold_unit: math_units.Unit, given: Number, unit: math_units.Unit, as_written: str
) -> str:
    if gold_unit.dimension and unit.dimension:
        if gold_unit.dimension != unit.dimension:
            return UNKNOWN if {gold_unit.dimension, unit.dimension} & {"radian", "count", "calendar"} else DIFFERENT
        if gold_unit.dimension == "temperature":
            return as_written if gold_unit.words == unit.words else UNKNOWN
        return compare_numbers(_scaled(gold, gold_unit.size), _scaled(given, unit.size))
    return as_written if gold_unit.words == unit.words else UNKNOWN


def _scaled(value: Number, size: Fraction) -> Number:
    return Number(value.value * size, None if value.place is None else value.place * size, value.percent, value.loose)


def _compare_spellings(gold: str, given: str, _: Algebra) -> str | None:
    """Numbers of other bases, ratios, times of day, and plain text."""
    based = math_units.based(gold), math_units.based(given)
    if based[0] or based[1]:
        return _compare_bases(gold, given, *based)
    ratios = math_units.ratio(gold), math_units.ratio(given)
    if ratios[0] or ratios[1]:
        return _compare_ratios(gold, given, *ratios)
    if _WORD.search(gold) or _WORD.search(given):
        plain = [_plain_words(side) for side in (gold, given)]
        if plain[0] == plain[1]:
            return EQUAL
        values = [math_units.split_unit(side) for side in (gold, given)]
        units = [side[1] for side in values if side]
        return None if len(units) == 2 and not any(_WORD.search(side[0]) for side in values if side) else UNKNOWN
    return None


def _plain_words(text: str) -> str:
    text = re.sub(r"(\d) ?\^?\{? ?(?:st|nd|rd|th)\b ?\}?", r"\1", text.lower())
    return " ".join(word for word in re.findall(r"[a-z]+|[^\sa-z]", text) if word not in ("the", "a", "an", ".", ","))


_Based = tuple[str, int, int] | None


def _compare_bases(gold: str, given: str, gold_based: _Based, based: _Based) -> str:
    if gold_based and based:
        if gold_based[1] == based[1]:
            return EQUAL if gold_based[2] == based[2] else DIFFERENT
        return UNKNOWN if gold_based[2] == based[2] else DIFFERENT
    known = gold_based or based
    assert known is not None
    plain = strip_lead(given if gold_based else gold).replace(" ", "")
    if plain.lstrip("0") == known[0].lstrip("0"):
        return EQUAL
    value = number(plain)
    return UNKNOWN if value is None or value.value == known[2] or not known[0].isdigit() else DIFFERENT


def _compare_ratios(
    gold: str, given: str, gold_terms: tuple[Number, ...] | None, terms: tuple[Number, ...] | None
) -> str | None:
    sides = []
    for text, side in ((gold, gold_terms), (given, terms)):
        value = number(text)
        if side is None and value is not None:
            side = (Number(Fraction(value.value.numerator)), Number(Fraction(value.value.denominator)))
        if side is None:
            return UNKNOWN
        sides.append([term.value for term in side])
    if len(sides[0]) != len(sides[1]):
        return UNKNOWN
    if all(a * sides[1][0] == b * sides[0][0] for a, b in zip(sides[0], sides[1], strict=True)):
        return UNKNOWN if math_units.is_clock(gold) or math_units.is_clock(given) else EQUAL
    return DIFFERENT if gold_terms and terms else UNKNOWN


def _compare_expressions(gold: str, given: str, algebra: Algebra) -> str:
    """By algebra, without units; the outcome counts as proof only where both are formulas throughout."""
    sides = math_units.split_unit(gold), math_units.split_unit(given)
    if sides[0] is None or sides[1] is None:
        return UNKNOWN
    (gold_text, gold_unit), (text, unit) = sides
    if not is_formula(gold_text) or not is_formula(text):
        return UNKNOWN
    outcome = algebra(radians(gold_text), radians(text))
    dimensions = {side.dimension for side in (gold_unit, unit) if side}
    if "angle" in dimensions or (r"\pi" in gold_text) != (r"\pi" in text):
        return _compare_angles(gold_text, gold_unit, text, unit, outcome, algebra)
    if gold_unit and unit and gold_unit != unit:
        if gold_unit.dimension != unit.dimension or not unit.dimension:
            return UNKNOWN
        factor = unit.size / gold_unit.size
        return algebra(gold_text, rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({text})")
    if (gold_unit is None) != (unit is None) and outcome == DIFFERENT:
        return UNKNOWN
    return outcome


def _compare_angles(
    gold: str, gold_unit: math_units.Unit | None, given: str, unit: math_units.Unit | None, outcome: str, algebra: Algebra
) -> str:
    """45 degrees and \\pi/4; without a unit it is not known whether 45 means degrees."""
    if outcome == EQUAL:
        return EQUAL
    degrees = [side is not None and side.dimension == "angle" for side in (gold_unit, unit)]
    if degrees[0] == degrees[1] is True:
        return outcome
    for index in (0, 1):
        sides = [gold, given]
        if r"\pi" not in sides[index]:
            sides[index] = rf"({sides[index]}) \cdot \frac{{\pi}}{{180}}"
            if algebra(*sides) == EQUAL:
                return EQUAL if degrees[index] else UNKNOWN
    return UNKNOWN if any(degrees) else outcome


def radians(text: str) -> str:
    r"""\sin 30^\circ is \sin(30\pi/180)."""
    return re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?", r"(\\frac{\1 \\pi}{180})", text)


def is_formula(text: str) -> bool:
    """Whether every sign is one that the parser of formulas reads as it is meant."""
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    return not (_WORD.search(text) or _UNTRUSTED.search(text) or commands - _FORMULA_COMMANDS)


__all__ = ["compare", "compare_forms", "is_formula", "split"]
