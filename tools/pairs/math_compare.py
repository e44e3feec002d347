"""Whether two final answers are the same: equal or different where that can be proved, unknown otherwise.

Collections are compared item by item here, single answers in math_atoms.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import permutations

from tools.pairs import math_units
from tools.pairs.math_atoms import Algebra, compare_atoms
from tools.pairs.math_form import Atom, Form, Grid, Named, Pool, Row
from tools.pairs.math_parse import parse
from tools.pairs.math_text import DIFFERENT, EQUAL, UNKNOWN, continental, number, squeeze


def compare(gold: str, given: str, algebra: Algebra) -> str:
    """equal, different or unknown, of two cleaned answers."""
    if squeeze(gold) == squeeze(given):
        return EQUAL
    gold_form, form = parse(gold), parse(given)
    outcome = compare_forms(gold_form, form, algebra)
    if outcome == DIFFERENT and _other_reading_agrees(gold, given, gold_form, form):
        return UNKNOWN
    return outcome


def _other_reading_agrees(gold: str, given: str, gold_form: Form, form: Form) -> bool:
    """Whether a comma may separate thousands on one side and items on the other: 1,234 or 1, 234; or be a decimal's."""
    if "," not in gold + given or isinstance(gold_form, Row) or isinstance(form, Row):
        return False
    if gold[:1] in "([" or given[:1] in "([":
        return False
    joined = [re.sub(r"(?<=\d) ?, ?(?=\d{3}(?!\d))", "", side) for side in (gold, given)]
    points = [continental(side) for side in (gold, given)]
    values = [number(side) for side in (gold, given)]
    for point, value in ((points[0], values[1]), (points[1], values[0])):
        if point and value and point.value == value.value:
            return True
    if squeeze(joined[0]) == squeeze(joined[1]):
        return True
    items = [sorted(filter(None, re.split(r" ?(?:[,;]|and|or) ?", side))) for side in (gold, given)]
    listed = [sorted(filter(None, re.split(r" ?(?:; ?|, |and|or) ?", joined_side))) for joined_side in joined]
    return items[0] == items[1] or listed[0] == listed[1]


def _compare_parsed(gold: str, given: str, algebra: Algebra) -> str:
    return compare_forms(parse(gold), parse(given), algebra)


def compare_forms(gold: Form, given: Form, algebra: Algebra) -> str:
    gold, given = _unwrap(gold), _unwrap(given)
    if isinstance(gold, Atom) and isinstance(given, Atom):
        return compare_atoms(gold.text, given.text, algebra, partial(_compare_parsed, algebra=algebra))
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
    return isinstance(form, Atom) and (number(form.text) is not None or math_units.existence(form.text) is not None)


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
        return (
            _compare_pools((row,), pool.items, algebra) if row_is_gold else _compare_pools(pool.items, (row,), algebra)
        )
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
            known, found = (order, other.items) if named is gold else (other.items, order)
            if _all_equal(known, found, algebra) == EQUAL:
                return EQUAL
        outcome = _compare_pools(named.items, other.items, algebra)
        return DIFFERENT if outcome == DIFFERENT else UNKNOWN
    outcome = _compare_pools(
        *((_items(other), named.items) if named is given else (named.items, _items(other))), algebra
    )
    return outcome if named is given or outcome == DIFFERENT else UNKNOWN


def _compare_pools(gold: Sequence[Form], given: Sequence[Form], algebra: Algebra) -> str:
    """Sets and bare lists: items in any order. An item that differs from every one on the other side proves it."""
    if len(gold) * len(given) > 400:
        return UNKNOWN
    table = [[compare_forms(a, b, algebra) for b in given] for a in gold]
    columns = list(zip(*table, strict=True))
    if any(set(line) == {DIFFERENT} for line in (*table, *columns)):
        return DIFFERENT
    if len(gold) == len(given) and _matching(table):
        return EQUAL
    covered = all(EQUAL in line for line in (*table, *columns))
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
        return any(all(table[i][j] == EQUAL for i, j in enumerate(order)) for order in permutations(range(len(table))))
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
