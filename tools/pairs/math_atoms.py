"""Whether two single answers are the same: phrases, choices, equations, numbers with units, ratios, expressions.

What is left goes to `algebra`, which the worker process answers with math-verify.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from tools.pairs import math_units
from tools.pairs.math_form import SIMPLE_NAME, SUM_OF_NAMES, strip_lead
from tools.pairs.math_text import DIFFERENT, EQUAL, UNKNOWN, Number, compare_numbers, number, squeeze
from tools.pairs.math_words import FORMULA_COMMANDS

Algebra = Callable[[str, str], str]  # (known, given) expressions -> equal, different, unknown

_LETTER = re.compile(
    r"(?:(?:option|choice|answer) ?:? ?)?"
    r"(?:\( ?(?P<round>[A-J]) ?\)|(?P<closed>[A-J])(?: ?\)| ?\.| ?:)|(?P<plain>[A-J]))"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_UNTRUSTED = re.compile(
    r"\.\.\.|\d \d|[^\x20-\x7e]|:|\\\\|&|\?|\\(?:overline|pmod|begin|end|int|partial)|#|\"|@|_ ?\{? ?[a-zA-Z]{3}"
)
_SHORT_WORD = re.compile(r"(?<![\\a-zA-Z])(?:in|of|by|at|is|if|no|on|as|an|it|so|we|be|do|am|pm)(?![a-zA-Z])")


def compare_atoms(gold: str, given: str, algebra: Algebra, parsed: Algebra) -> str:
    """Two single answers; `parsed` compares what may be a collection, the right sides of equations."""
    if squeeze(gold) == squeeze(given):
        return EQUAL
    outcome = (
        _compare_phrases(gold, given)
        or _compare_letters(gold, given)
        or _compare_equations(gold, given, algebra, parsed)
        or _compare_quantities(gold, given)
        or _compare_spellings(gold, given)
    )
    return outcome or _compare_expressions(gold, given, algebra)


def _compare_phrases(gold: str, given: str) -> str | None:
    known, found = math_units.phrases(gold), math_units.phrases(given)
    if known and found:
        shared = known.keys() & found.keys()
        if any(known[group] == found[group] for group in shared):
            return EQUAL
        sure = shared - {"existence"} or (
            shared and "infinity" in known["existence"] and "infinity" in found["existence"]
        )
        return DIFFERENT if sure else UNKNOWN
    if known or found:
        exists = math_units.existence(gold) or math_units.existence(given)
        phrase, other = (gold, given) if known else (given, gold)
        value = number(other)
        if exists and value:
            in_words = exists == "none" and phrase[:1] != "\\"
            return UNKNOWN if in_words and value.value == 0 else DIFFERENT  # how many? none
        return UNKNOWN if not exists or _WORD.search(other) else None
    return None


def _compare_letters(gold: str, given: str) -> str | None:
    """B, (B), B. 12; a choice's own value is not known here."""
    letter = _LETTER.fullmatch(gold)
    if (
        letter is None
        or letter["rest"].strip()
        or not (letter["round"] or letter["plain"] or letter["closed"]).isupper()
    ):
        return None
    name = letter["round"] or letter["closed"] or letter["plain"]
    found = _LETTER.fullmatch(given)
    if found is None or (found["plain"] and found["rest"].strip()):
        return UNKNOWN
    given_name = found["round"] or found["closed"] or found["plain"]
    if given_name.upper() != name:
        return DIFFERENT if given_name.isupper() else UNKNOWN
    return EQUAL


def _compare_equations(gold: str, given: str, algebra: Algebra, parsed: Algebra) -> str | None:
    """x = 5 against 5, y = 2x + 1 against 2x + 1; two equations with the same left side."""
    (gold_name, gold_value), (given_name, given_value) = _split_equation(gold), _split_equation(given)
    names = (gold_name, given_name)
    if names == (None, None):
        return None
    simple = [name is None or SIMPLE_NAME.fullmatch(name) is not None for name in names]
    if None not in names and not all(simple):
        return algebra(gold, given)
    outcome = parsed(gold_value, given_value)
    if names[0] is None and not all(simple):
        left = str(names[1])
        trusted = SUM_OF_NAMES.fullmatch(left) or (
            not re.search(r"(?<![\\a-z])[a-z]", left) and algebra(left, given_value) == EQUAL
        )
        return outcome if trusted else UNKNOWN
    same_name = None in names or squeeze(str(names[0])) == squeeze(str(names[1]))
    return outcome if same_name and all(simple) else UNKNOWN


def _split_equation(text: str) -> tuple[str | None, str]:
    """(left side, right side) of an equation or a chain of them, (None, text) of anything else."""
    flat = re.sub(r"\{[^{}]*=[^{}]*\}", lambda found: found[0].replace("=", "\x03"), text)  # \sum_{k=1}
    sides = [side.strip().replace("\x03", "=") for side in flat.split("=")]
    if len(sides) < 2 or not all(sides) or re.search(r"[<>]|\\(?:le|ge|ne|begin)(?![a-zA-Z])", text):
        return None, text
    if len(sides) == 2 and SIMPLE_NAME.fullmatch(sides[1]) and not SIMPLE_NAME.fullmatch(sides[0]):
        return sides[1], sides[0]
    return sides[0], sides[-1]


def _compare_quantities(gold: str, given: str) -> str | None:
    """Numbers, with or without units."""
    known, found = math_units.split_unit(gold), math_units.split_unit(given)
    if known is None or found is None:
        return None
    (gold_text, gold_unit), (text, unit) = known, found
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


def _with_units(gold: Number, gold_unit: math_units.Unit, given: Number, unit: math_units.Unit, as_written: str) -> str:
    if gold_unit.dimension and unit.dimension:
        if gold_unit.dimension != unit.dimension:
            return UNKNOWN if {gold_unit.dimension, unit.dimension} & {"radian", "count", "calendar"} else DIFFERENT
        if gold_unit.dimension == "temperature":
            return as_written if gold_unit.words == unit.words else UNKNOWN
        return compare_numbers(_scaled(gold, gold_unit.size), _scaled(given, unit.size))
    return as_written if gold_unit.words == unit.words else UNKNOWN


def _scaled(value: Number, size: Fraction) -> Number:
    return Number(value.value * size, None if value.place is None else value.place * size, value.percent)


def _compare_spellings(gold: str, given: str) -> str | None:
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
        whole = any(value and value.value.denominator == 1 for value in (number(gold), number(given)))
        return UNKNOWN if whole or math_units.is_clock(gold) or math_units.is_clock(given) else EQUAL
    return DIFFERENT if gold_terms and terms else UNKNOWN


def _compare_expressions(gold: str, given: str, algebra: Algebra) -> str:
    """By algebra, without units; the outcome counts as proof only where both are formulas throughout."""
    known, found = math_units.split_unit(gold), math_units.split_unit(given)
    if known is None or found is None:
        return UNKNOWN
    (gold_text, gold_unit), (text, unit) = known, found
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
    gold: str,
    gold_unit: math_units.Unit | None,
    given: str,
    unit: math_units.Unit | None,
    outcome: str,
    algebra: Algebra,
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
    r"""\sin 30^\circ is \sin(30\pi/180); elsewhere a degree sign is a unit, which is left out."""
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", text)
    return re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?", r"(\\frac{\1 \\pi}{180})", text)


def is_formula(text: str) -> bool:
    """Whether every sign is one that the parser of formulas reads as it is meant."""
    if _SHORT_WORD.search(text):
        return False
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    return not (_WORD.search(text) or _UNTRUSTED.search(text) or commands - FORMULA_COMMANDS)
