"""Whether two expressions are equal: math-verify's parser and comparison, and a numerical proof that they differ.

math-verify answers True or False, where False is also its answer to what it does not understand, and it rounds tiny
numbers to zero. Here two expressions are different only where their values differ at every point that is tried.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Eq

from tools.pairs.math_text import DIFFERENT, EQUAL, UNKNOWN, Number, compare_numbers, number

DIGITS = 60  # of the numerical comparison
_SAME = sympy.Float("1e-40", DIGITS)  # relative
_APART = sympy.Float("1e-12", DIGITS)
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
_CONVERSION = replace(ConversionConfig(), lowercase_symbols=False)
_FREE_NAMES = frozenset("CKck")  # constants of integration
_UNIT_LETTERS = frozenset("ACFJKLMNPRTVWdghklms")
# Values of the symbols: whole numbers, for what is about n; between 0 and 1; between 1 and 2; below 0.
_POINTS = tuple(
    tuple(sympy.Rational(top, bottom) for top in tops)
    for tops, bottom in (
        ((7, 11, 13, 17, 19, 23), 1),
        ((12, 5, 9, 6, 10, 8), 1),
        ((2, 7, 11, 3, 13, 5), 17),
        ((9, 14, 4, 8, 3, 15), 16),
        ((23, 31, 27, 35, 21, 37), 19),
        ((-8, -3, -11, -5, -13, -6), 7),
    )
)


def compare_expressions(gold: str, given: str) -> str:
    """equal, different or unknown, of two expressions or equations in LaTeX."""
    sides = _parse(gold), _parse(given)
    if sides[0] is None or sides[1] is None:
        return _verify(gold, given)
    if isinstance(sides[0], Eq) and isinstance(sides[1], Eq):
        outcome = _compare_equations(*sides)
    elif all(isinstance(side, sympy.Expr) for side in sides):
        outcome = _compare_values(*sides, number(gold), number(given))
    else:
        outcome = UNKNOWN
    return outcome if outcome != UNKNOWN else _verify(gold, given)


@lru_cache(maxsize=10_000)
def _parse(text: str) -> Any:
    try:
        parsed = latex2sympy(text, normalization_config=_NORMALIZATION, conversion_config=_CONVERSION)
    except Exception:  # the parser of arbitrary text raises whatever it likes
        return None
    if not isinstance(parsed, sympy.Basic):
        return None
    exact = {part: sympy.Rational(str(part)) for part in parsed.atoms(sympy.Float)}
    return parsed.xreplace({**exact, sympy.Symbol("i"): sympy.I, **_imaginary(parsed)})


def _imaginary(parsed: Any) -> dict[Any, Any]:
    return {symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"}


def _verify(gold: str, given: str) -> str:
    """math-verify's own word, which proves nothing where it is False."""
    config = (LatexExtractionConfig(boxed_match_priority=0),)
    sides = [parse(rf"\boxed{{{side}}}", extraction_config=config, parsing_timeout=None) for side in (gold, given)]
    if not sides[0] or not sides[1] or isinstance(sides[0][0], str) or isinstance(sides[1][0], str):
        return UNKNOWN
    if any(isinstance(side[0], sympy.Expr) and not side[0].free_symbols for side in sides):
        return UNKNOWN  # constants are compared to more digits here than there
    return EQUAL if verify(*sides, timeout_seconds=None) else UNKNOWN


def _readings(expression: Any) -> Iterator[Any]:
    r"""The readings of an ambiguous expression: \log to base 10 or e, roots of negative numbers principal or real."""
    yield expression
    natural = expression.replace(
        lambda part: part.func == sympy.log and len(part.args) == 2 and part.args[1] == 10,
        lambda part: sympy.log(part.args[0]),
    )
    if natural != expression:
        yield natural
    real = expression.replace(
        lambda part: part.is_Pow and part.exp.is_Rational and part.exp.q % 2 == 1 and part.exp.q > 1,
        lambda part: _real_power(part.base, part.exp),
    )
    if real != expression:
        yield real


def _real_power(base: Any, exponent: Any) -> Any:
    if not base.is_number or not base.is_negative:
        return sympy.Pow(base, exponent, evaluate=False)
    return (-1) ** exponent.p * (-base) ** exponent


def _compare_values(gold: Any, given: Any, gold_number: Number | None, number_given: Number | None) -> str:
    outcomes = [_compare_reading(a, b, gold_number, number_given) for a in _readings(gold) for b in _readings(given)]
    return EQUAL if EQUAL in outcomes else DIFFERENT if set(outcomes) == {DIFFERENT} else UNKNOWN


def _compare_reading(gold: Any, given: Any, gold_number: Number | None, number_given: Number | None) -> str:
    if gold == given:
        return EQUAL
    gold_names, names = ({symbol.name for symbol in side.free_symbols} for side in (gold, given))
    if not gold_names and not names:
        return _compare_constants(gold, given, gold_number, number_given)
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    if len(symbols) > len(_POINTS[0]):
        return UNKNOWN
    near, far = 0, 0
    for point in _POINTS:
        values = [_value(side.subs(dict(zip(symbols, point, strict=False)))) for side in (gold, given)]
        if values[0] is None or values[1] is None:
            continue
        distance = _distance(*values)
        near += bool(distance < _SAME)
        far += bool(distance > _APART)
    if near + far < 4 or (near and far):
        return UNKNOWN
    if near:
        return EQUAL
    return DIFFERENT if _names_are_meant(gold_names, names) else UNKNOWN


def _names_are_meant(gold: set[str], given: set[str]) -> bool:
    """Whether other names mean another answer: not where one may stand for another, a constant or a unit."""
    missing, added = gold - given, given - gold
    if missing and added:
        return False
    return not (missing | added) & (_FREE_NAMES | (set() if given else _FREE_NAMES)) and not added & _UNIT_LETTERS


def _compare_constants(gold: Any, given: Any, gold_number: Number | None, number_given: Number | None) -> str:
    """Exactly, or as decimals where one side is a decimal."""
    values = _value(gold), _value(given)
    if values[0] is None or values[1] is None:
        return UNKNOWN
    written = (gold_number, number_given)
    if any(side is not None and side.place is not None for side in written):
        if not all(value.is_real for value in values):
            return DIFFERENT
        numbers = [side or _exact(value) for side, value in zip(written, values, strict=True)]
        return compare_numbers(*numbers)
    return EQUAL if _distance(*values) < _SAME else DIFFERENT


def _exact(value: Any) -> Number:
    rational = sympy.Rational(value)
    return Number(Fraction(int(rational.p), int(rational.q)))


def _value(expression: Any) -> Any:
    """The expression's value as a number of DIGITS digits, or None."""
    try:
        value = expression.doit().evalf(DIGITS)
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo) or not value.is_finite:
        return None
    real, imaginary = value.as_real_imag()
    parts = [sympy.Float(part, DIGITS) if part.is_Float or part.is_Rational else None for part in (real, imaginary)]
    if parts[0] is None or parts[1] is None:
        return None
    return parts[0] if abs(parts[1]) <= _SAME * abs(parts[0]) else parts[0] + sympy.I * parts[1]


def _distance(gold: Any, given: Any) -> Any:
    """Relative to the larger value; of a zero against anything else 1."""
    largest = max(abs(gold).evalf(DIGITS), abs(given).evalf(DIGITS))
    return abs(gold - given).evalf(DIGITS) / largest if largest else sympy.Float(0)


def _compare_equations(gold: Any, given: Any) -> str:
    """Polynomial equations are the same when one is a multiple of the other."""
    sides = [sympy.expand(side.lhs - side.rhs) for side in (gold, given)]
    if not all(side.is_polynomial() for side in sides):
        return UNKNOWN
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    if not symbols or 0 in sides:
        return UNKNOWN
    quotient = sympy.cancel(sides[0] / sides[1])
    if quotient.is_number:
        return EQUAL
    same_names = gold.free_symbols == given.free_symbols
    lines = all(sympy.Poly(side, *symbols).total_degree() == 1 for side in sides)
    return DIFFERENT if same_names and lines else UNKNOWN
