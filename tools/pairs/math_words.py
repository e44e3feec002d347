"""The words that the grader knows: units, commands of formulas, phrases that are answers."""

import re
from fractions import Fraction

# dimension: {unit: size}; every name of a unit, singular
SIZES: dict[str, dict[str, Fraction | int]] = {
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
    for dimension, sizes in SIZES.items()
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
SI = {
    prefix + name: (name, Fraction(size))
    for name in ("Hz", "J", "N", "Pa", "eV", "W", "V", "mol", "T", "K", "C", "F", "A", "erg", "cal", "AU", "pc")
    for prefix, size in _PREFIXES.items()
    if prefix == "" or name not in ("K", "C", "T", "F", "A")
}
# Words after a number that change its value or its meaning, so that it cannot be read without them.
MEANINGFUL = frozenset(
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
POWERS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}
BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
BASE_NAMES |= {"ten": 10, "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "hex": 16}

FORMULA_COMMANDS = frozenset(
    [
        "frac",
        "sqrt",
        "pi",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "ln",
        "log",
        "exp",
        "cdot",
        "times",
        "div",
        "binom",
        "infty",
        "le",
        "ge",
        "lfloor",
        "rfloor",
        "lceil",
        "rceil",
        "alpha",
        "beta",
        "gamma",
        "delta",
        "theta",
        "lambda",
        "mu",
        "phi",
        "varphi",
        "omega",
        "rho",
        "sigma",
        "tau",
        "epsilon",
        "circ",
        "pmod",
        "begin",
        "end",
        "sum",
        "prod",
        "int",
        "overline",
        "gcd",
        "lcm",
        "max",
        "min",
        "partial",
    ]
)

# Phrases that are answers. Those of one group exclude each other; "" is the group's name for what a number excludes.
PHRASES: dict[str, dict[str, str]] = {
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
NO_SOLUTION = re.compile(
    r"(?:there (?:is|are|exists?) )?no (?:such |real |integer |possible |valid |positive |finite )*"
    r"(?:solutions?|roots?|values?|integers?|numbers?|answer)(?: exists?)?(?: for x)?"
)
