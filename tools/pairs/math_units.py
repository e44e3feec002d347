"""Surroundings of a value in an answer: units, counting words, number bases; and phrases that are answers."""

import re
from dataclasses import dataclass
from fractions import Fraction

from tools.pairs.math_text import Number, number
from tools.pairs.math_words import BASE_NAMES, MEANINGFUL, NO_SOLUTION, PHRASES, POWERS, SI, SIZES, UNITS

_TAIL = re.compile(
    r"(?P<value>.*?(?:[\d)}!.]|\\pi))(?P<gap>[ -]*)(?P<words>(?:\^ ?\{? ?\\circ ?\}? ?[CF]?|[a-zA-Z€£¥$]"
    r"[a-zA-Z€£¥$ .'/-]*?)(?: ?\^ ?\{? ?(?P<power>-?[23]) ?\}?)?)\.?"
)
_ORDINAL = re.compile(r"(?P<value>\d+) ?(?:\^ ?\{? ?)?(?:st|nd|rd|th)\b ?\}?(?P<rest>.*)")
_BASE = re.compile(r"(?P<digits>-?\d[0-9A-Z ]*)_ ?\{? ?(?:(?P<base>\d{1,2})|(?P<word>[a-z]+)) ?\}?")
_BASE_WORDS = re.compile(r"(?P<digits>-?\d[0-9A-Z]*),?(?: in)? base ?-?(?P<base>\d{1,2}|[a-z]+)")


@dataclass(frozen=True)
class Unit:
    """`dimension` with its power, and the size of one unit in it; "" of words that are no known unit."""

    words: str
    dimension: str = ""
    size: Fraction = Fraction(1)


def split_unit(text: str) -> tuple[str, Unit | None] | None:
    """(the value's text, its unit or None); None where words change what the value means."""
    text = text.replace(r"\$", "$")
    if text[:1] in "$€£¥" and text[:1]:
        inner = split_unit(text[1:].strip())
        if inner is None or (inner[1] and inner[1].dimension not in ("", "money", "count")):
            return None
        if inner[1] and inner[1].dimension == "count":
            return inner  # "$5 million": the currency's name adds nothing
        return inner[0], _known(text[0])
    if re.match(r"-[$]", text):
        inner = split_unit(text[1:].strip())
        return inner and ("-" + inner[0], inner[1])
    ordinal = _ORDINAL.fullmatch(text)
    if ordinal:
        text = ordinal["value"] + ordinal["rest"]
    found = _TAIL.fullmatch(text)
    if found is None:
        return text, None
    if found["words"].startswith("^") and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", found["value"]):
        return text, None
    words = " ".join(found["words"].partition(" ^")[0].partition("^{")[0].partition("^2")[0].partition("^3")[0].split())
    if found["words"].startswith("^"):
        words = re.sub(r"[{} ]", "", found["words"])
    power = int(found["power"] or 1)
    unit = _known(words, power)
    if unit and (len(words) > 1 or found["gap"] or not words.isalpha()):
        return found["value"].strip(), unit
    listed = words.lower().replace("-", " ").split()
    first = _known(listed[0]) if listed else None
    if first and first.dimension == "count" and not set(listed[1:]) & MEANINGFUL:  # "2 dozen eggs"
        return found["value"].strip(), first
    if set(listed) & MEANINGFUL or len(listed) > 6:
        return None
    if any(len(word.strip(".")) >= 3 for word in listed) or "/" in words:
        return found["value"].strip(), Unit(" ".join(word.rstrip("s.") for word in listed) + (found["power"] or ""))
    if number(found["value"]) and found["gap"] and not set(words) <= set("abnpqtuvxyz"):  # a unit unknown here, perhaps
        return None
    return text, None


def _known(words: str, power: int = 1) -> Unit | None:
    if words in SI:
        return Unit(words, SI[words][0] + (str(power) if power != 1 else ""), SI[words][1] ** power)
    names = [name.rstrip(".") for name in words.lower().split()]
    for word in (names[0], names[-1]) if len(names) == 2 else ():
        if word in POWERS and power == 1:
            names.remove(word)
            power = POWERS[word]
            break
    if len(names) == 2 and names[0] == "degrees":
        names = names[1:]
    if len(names) != 1:
        return None
    entry = UNITS.get(names[0]) or UNITS.get(names[0].removesuffix("s"))
    if entry is None:
        return None
    return Unit(names[0], entry[0] + (str(power) if power != 1 else ""), entry[1] ** power)


def may_convert(unit: Unit, gold: Fraction, given: Fraction) -> bool:
    """Whether a value in this unit could be the other one in another unit of the same dimension."""
    dimension = unit.dimension.rstrip("23-")
    power = int(unit.dimension[len(dimension) :] or 1)
    ratio = abs(gold / given) if given else Fraction(0)
    sizes = {Fraction(size) ** power for size in SIZES.get(dimension, {}).values()}
    return any(unit.size / size == ratio or size / unit.size == ratio for size in sizes) or dimension == "temperature"


def based(text: str) -> tuple[str, int, int] | None:
    """(digits, base, value) of 1010_2 or "1010 base 2"."""
    found = _BASE.fullmatch(text) or _BASE_WORDS.fullmatch(text)
    if found is None:
        return None
    groups = found.groupdict()
    name = groups.get("word") or groups["base"]
    base = int(name) if name.isdigit() else BASE_NAMES.get(name, 0)
    digits = found["digits"].replace(" ", "")
    try:
        return digits, base, int(digits, base) if 2 <= base <= 36 else 1 // 0
    except (ValueError, ZeroDivisionError):
        return None


def ratio(text: str) -> tuple[Number, ...] | None:
    """The terms of 3:4, "3 to 4" or 1:2:3."""
    terms = re.split(r" ?: ?| to ", text)
    values = [number(term) for term in terms]
    return tuple(value for value in values if value) if len(terms) > 1 and all(values) else None


def is_clock(text: str) -> bool:
    """Whether the text may be a time of day: 10:30."""
    return re.fullmatch(r"(?:[01]?\d|2[0-4]):[0-5]\d", text) is not None


_COMPILED = [
    (group, value, re.compile(pattern)) for group, values in PHRASES.items() for value, pattern in values.items()
]


def phrases(text: str) -> dict[str, str]:
    """{group: value} of a phrase that is an answer, for example {"parity": "odd"}; empty of anything else."""
    plain = " ".join(text.lower().strip(" .!").split())
    found = {group: value for group, value, pattern in _COMPILED if pattern.fullmatch(plain)}
    if NO_SOLUTION.fullmatch(plain):
        found["existence"] = "none"
    return found


def existence(text: str) -> str | None:
    """none, undefined, infinity or -infinity: what excludes a number. None of anything else."""
    value = phrases(text).get("existence")
    return None if value == "infinitely many" else value
