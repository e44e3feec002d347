"""What surrounds a value in an answer: units, counting words, number bases; and phrases that are answers."""

import re
from dataclasses import dataclass
from fractions import Fraction

from tools.pairs.math_text import Number, number

# dimension: {unit: size}; every name of a unit, singular
_SIZES: dict[str, dict[str, Fraction | int]] = {
    "length": {
        **{"mm millimeter millimetre": Fraction(1, 1000), "cm centimeter centimetre": Fraction(1, 100)},
        **{"m meter metre": 1, "km kilometer kilometre": 1000, "in inch inche": Fraction(254, 10000)},
        **{"ft foot feet": Fraction(3048, 10000), "yd yard": Fraction(9144, 10000), "mi mile": Fraction(1609344, 1000)},
        **{"nm nanometer nanometre": Fraction(1, 10**9)},
    },
    "mass": {
        **{"mg milligram": Fraction(1, 1000), "g gram": 1, "kg kilogram": 1000, "ton tonne": 10**6},
        **{"oz ounce": Fraction(28349523125, 10**9), "lb pound": Fraction(45359237, 10**5)},
    },
    "time": {
        **{"ms millisecond": Fraction(1, 1000), "s sec second": 1, "min minute": 60, "h hr hour": 3600},
        **{"day": 86400, "week": 604800},
    },
    "calendar": {"month": 1, "yr year": 12, "decade": 120, "century centurie": 1200},
    "volume": {"ml milliliter millilitre": Fraction(1, 1000), "l liter litre": 1},
    "money": {"cent": Fraction(1, 100), "$ dollar usd buck": 1},
    "euro": {"€ euro eur": 1},
    "sterling": {"£ gbp": 1},
    "yen": {"¥ yen yuan": 1},
    "angle": {"degree deg ^\\circ": 1},
    "radian": {"rad radian": 1},
    "temperature": {"celsius ^\\circc": 1, "fahrenheit ^\\circf": 1, "kelvin": 1},
    "count": {
        **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12},
        **{"dozen": 12, "pair": 2, "score": 20, "gros": 144},
    },
}
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, sizes in _SIZES.items()
    for names, size in sizes.items()
    for name in names.split()
}
_PREFIXES: dict[str, Fraction | int] = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "m": Fraction(1, 10**3),
    "n": Fraction(1, 10**9),
}
_SI = {
    prefix + name: (name, Fraction(size))
    for name in ("Hz", "J", "N", "Pa", "eV", "W", "V", "mol", "T", "K", "C", "F", "A", "erg", "cal", "AU", "pc")
    for prefix, size in _PREFIXES.items()
    if prefix == "" or name not in ("K", "C", "T", "F", "A")
}
# Words after a number that change its value or its meaning, so that it cannot be read without them.
_MEANINGFUL = frozenset(
    [
        "or",
        "and",
        "more",
        "less",
        "than",
        "least",
        "most",
        "plus",
        "minus",
        "times",
        "mod",
        "modulo",
        "squared",
        "cubed",
        "factorial",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "base",
        "percent",
        "to",
        "not",
        "except",
        "if",
        "when",
        "where",
        "for",
        "over",
        "divided",
        "by",
        "multiplied",
        "power",
        "root",
        "prime",
        "north",
        "south",
        "east",
        "west",
        "above",
        "below",
        "up",
        "down",
        "dozen",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "pair",
        "pairs",
        "score",
        "gross",
        "remainder",
        "negative",
        "positive",
        "am",
        "pm",
    ]
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}
_TAIL = re.compile(
    r"(?P<value>.*?(?:[\d)}!.]|\\pi))(?P<gap>[ -]*)(?P<words>(?:\^ ?\{? ?\\circ ?\}? ?[CF]?|[a-zA-Z€£¥$]"
    r"[a-zA-Z€£¥$ .'/-]*?)(?: ?\^ ?\{? ?(?P<power>-?[23]) ?\}?)?)\.?"
)
_ORDINAL = re.compile(r"(?P<value>\d+) ?(?:\^ ?\{? ?)?(?:st|nd|rd|th)\b ?\}?(?P<rest>.*)")
_BASE = re.compile(r"(?P<digits>-?\d[0-9A-Z ]*)_ ?\{? ?(?:(?P<base>\d{1,2})|(?P<word>[a-z]+)) ?\}?")
_BASE_WORDS = re.compile(r"(?P<digits>-?\d[0-9A-Z]*),?(?: in)? base ?-?(?P<base>\d{1,2}|[a-z]+)")
_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_BASE_NAMES |= {"ten": 10, "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "hex": 16}


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
    if first and first.dimension == "count" and not set(listed[1:]) & _MEANINGFUL:  # "2 dozen eggs"
        return found["value"].strip(), first
    if set(listed) & _MEANINGFUL or len(listed) > 6:
        return None
    if any(len(word.strip(".")) >= 3 for word in listed) or "/" in words:
        return found["value"].strip(), Unit(" ".join(word.rstrip("s.") for word in listed) + (found["power"] or ""))
    if number(found["value"]) and found["gap"] and not set(words) <= set("abnpqtuvxyz"):  # a unit unknown here, perhaps
        return None
    return text, None


def _known(words: str, power: int = 1) -> Unit | None:
    if words in _SI:
        return Unit(words, _SI[words][0] + (str(power) if power != 1 else ""), _SI[words][1] ** power)
    names = [name.rstrip(".") for name in words.lower().split()]
    for word in (names[0], names[-1]) if len(names) == 2 else ():
        if word in _POWERS and power == 1:
            names.remove(word)
            power = _POWERS[word]
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
    sizes = {Fraction(size) ** power for size in _SIZES.get(dimension, {}).values()}
    return any(unit.size / size == ratio or size / unit.size == ratio for size in sizes) or dimension == "temperature"


def based(text: str) -> tuple[str, int, int] | None:
    """(digits, base, value) of 1010_2 or "1010 base 2"."""
    found = _BASE.fullmatch(text) or _BASE_WORDS.fullmatch(text)
    if found is None:
        return None
    groups = found.groupdict()
    name = groups.get("word") or groups["base"]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
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


# Phrases that are answers. Those of one group exclude each other; "" is the group's name for what a number excludes.
_PHRASES: dict[str, dict[str, str]] = {
    "existence": {
        "none": r"no|none|\\emptyset|\\\{ ?\\\}|(?:the )?empty set|there (?:is|are) (?:no|none)|nothing|impossible",
        "undefined": r"(?:it |the limit |limit )?(?:does not exist|doesn't exist|dne|d\.n\.e|undefined|is undefined"
        r"|not defined|is not defined)",
        "infinity": r"[+]?(?:positive )?(?:\\infty|infinity|inf|\\to ?\\infty)",
        "-infinity": r"(?:-|negative |minus )(?: ?\\infty|infinity)",
        "infinitely many": r"infinitely many(?: solutions| values| numbers| integers)?|infinite(?: solutions)?",
    },
    "truth": {"yes": r"yes|true|correct", "no": r"no|false|incorrect"},
    "parity": {"even": r"even(?: numbers?| integers?)?", "odd": r"odd(?: numbers?| integers?)?"},
    "symmetry": {"even": r"even functions?", "odd": r"odd functions?", "neither": r"neither(?: even nor odd)?"},
    "trend": {"up": r"increasing|increases", "down": r"decreasing|decreases"},
    "convergence": {"yes": r"converges|convergent", "no": r"diverges|divergent"},
    "rationality": {"yes": r"rational", "no": r"irrational"},
    "turn": {"left": r"counter-?clockwise|anti-?clockwise", "right": r"clockwise"},
    "side": {"left": r"left", "right": r"right"},
    "day": {
        day: rf"{day}(?:day)?" for day in ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    },
    "month": {
        month: month
        for month in [
            "january",
            "february",
            "march",
            "april",
            "june",
            "july",
            "august",
            "september",
            "october",
            "november",
            "december",
            "may",
        ]
    },
    "direction": {
        name: name for name in ["north", "south", "east", "west", "northeast", "northwest", "southeast", "southwest"]
    },
}
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are|exists?) )?no (?:such |real |integer |possible |valid |positive |finite )*"
    r"(?:solutions?|roots?|values?|integers?|numbers?|answer)(?: exists?)?(?: for x)?"
)
_COMPILED = [
    (group, value, re.compile(pattern)) for group, values in _PHRASES.items() for value, pattern in values.items()
]


def phrases(text: str) -> dict[str, str]:
    """{group: value} of a phrase that is an answer, for example {"parity": "odd"}; empty of anything else."""
    plain = " ".join(text.lower().strip(" .!").split())
    found = {group: value for group, value, pattern in _COMPILED if pattern.fullmatch(plain)}
    if _NO_SOLUTION.fullmatch(plain):
        found["existence"] = "none"
    return found


def existence(text: str) -> str | None:
    """none, undefined, infinity or -infinity: what excludes a number. None of anything else."""
    value = phrases(text).get("existence")
    return None if value == "infinitely many" else value
