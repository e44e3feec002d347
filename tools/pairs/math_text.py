"""Final answers as text: one spelling for what looks the same on paper, and the exact value of a plain number."""

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

_LETTERS = r"(?<![\\a-zA-Z])"
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"),
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/"},
        **{"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "π": r"\pi ", "∅": r"\emptyset ", "∈": r"\in "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "≈": "=", "ℝ": r"\mathbb{R}"},
        **{"⩽": r"\le ", "⩾": r"\ge ", "°": r"^\circ ", "√": r"\sqrt ", "θ": r"\theta ", "α": r"\alpha "},
        **{"β": r"\beta ", "∠": r"\angle ", "→": r"\to ", "￥": "¥", "，": ",", "；": ";", "：": ":", "。": "."},
    }
)
_COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    **{"varnothing": r"\emptyset", "leq": r"\le", "geq": r"\ge", "neq": r"\ne", "lbrace": r"\{", "rbrace": r"\}"},
    **{
        "leqslant": r"\le",
        "geqslant": r"\ge",
        "degree": r"^\circ ",
        "lt": "<",
        "gt": ">",
        "simeq": "=",
        "lvert": "|",
        "rvert": "|",
    },
    **{"lor": " or ", "vee": " or ", "colon": ":", "imath": "i", "percent": "%"},
    **dict.fromkeys(("displaystyle", "textstyle", "limits", "left", "right", "bf", "rm", "it", "sf", "tt"), " "),
    **dict.fromkeys(("boldmath", "Large", "large", "normalsize", "bigl", "bigr", "Bigl", "Bigr", "big", "Big"), " "),
    **dict.fromkeys(("biggl", "biggr", "bigg", "Biggl", "Biggr", "Bigg", "thinspace", "smallskip"), " "),
    **{"ldots": "...", "dots": "...", "cdots": "...", "approx": "=", "langle": "(", "rangle": ")", "wedge": " and "},
    **{"land": " and ", "mid": "|", "therefore": " ", "implies": " ", "backslash": r"\setminus"},
}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|emph|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox"
    r"|boldsymbol|bm|operatorname\*?|underline|boxed|fbox|framebox|mathop|ensuremath|textcolor\s*\{[^{}]*\}"
    r"|color\s*\{[^{}]*\}(?=\s*\{))\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
_DEEP_FONT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|boldsymbol|bm|underline|boxed)(?![a-zA-Z])\s*(?=\{)")
_COLOR = re.compile(r"\\(?:color|textcolor)\s*\{[^{}]*\}")
_FUNCTIONS = re.compile(
    _LETTERS + r"(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|gcd|lcm|infty)"
    r"(?![a-zA-Z])"
)
_ROOT_CALL = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_GROUPING = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|,\\!|,\\,|'|\{\}|~)(?=\d{3}(?!\d))")
_QUAD = re.compile(r"\\q?quad(?![a-zA-Z])\s*")
_SPACING = re.compile(r"\\[,;:! >]|~|\\(?:[hv]space|phantom)\*?\s*\{[^{}]*\}")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+ ]*)(?:"
    rf"(?:(?P<whole>\d+) ?)?\\frac ?(?:\{{ ?(?P<top>-?{_DIGITS}) ?\}} ?\{{ ?(?P<bottom>-?{_DIGITS}) ?\}}"
    r"|(?P<top1>\d) ?(?P<bottom1>\d)|\{ ?(?P<top2>-?\d+) ?\} ?(?P<bottom2>\d)|(?P<top3>\d) ?\{ ?(?P<bottom3>\d+) ?\})"
    rf"|(?P<mixed>\d+) (?P<top4>\d+)/(?P<bottom4>\d+)"
    rf"|\(?(?P<left>{_DIGITS})\)? ?/ ?\(?(?P<right>-?{_DIGITS})\)?"
    rf"|(?P<decimal>{_DIGITS}?\.\d+|{_DIGITS}\.?)(?:\\overline ?\{{(?P<repeated>\d+)\}}|\\bar ?\{{?(?P<bar>\d)\}}?)?"
    r"(?: ?(?:[eE]|(?:\\times|\\cdot|x|\*) ?10 ?\^) ?\{? ?(?P<exponent>[-+]? ?\d{1,3}) ?\}?)?"
    r")(?P<percent> ?\\?%| ?(?:percent|per cent))?"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>-?) ?10 ?\^ ?(?:\{ ?(?P<braced>[-+]?\d{1,3}) ?\}|(?P<bare>[-+]?\d{1,3}))")
_SIGNS = re.compile(r"[-+]")


@dataclass(frozen=True)
class Number:
    """An exact value; `place` is the value of one unit in the last written decimal place, None of an exact spelling."""

    value: Fraction
    place: Fraction | None = None
    percent: bool = False
    product: Fraction | None = None  # of a mixed number that may be meant as a product: 2\frac{1}{3}


def clean(answer: str) -> str:
    """One spelling for what looks the same on paper: ASCII signs; no fonts, colours, delimiters or outer braces."""
    answer = answer if answer.isascii() else _to_ascii(answer)
    answer = answer.replace(r"\$", "\x01").replace("$", " ").replace("\x01", r"\$").replace(r"\%", "%")
    answer = re.sub(r"\\[()]|(?<!\\)\\[\[\]]", " ", answer).replace("**", " ") if _is_delimited(answer) else answer
    answer = answer.replace("**", " ") if answer.count("**") == 2 and answer.startswith("**") else answer
    answer = re.sub(r"\\\\\s*\[[^\[\]]*\]", r"\\\\", answer)  # row spacing
    answer = _GROUPING.sub(",", answer)
    answer = _SPACING.sub(lambda found: " " if found[0] != r"\!" else "", answer.replace(r"\\", "\x02"))
    answer = answer.replace("{,}", ",").replace("{:}", ":")
    for _ in range(8):
        unwrapped = _FONT.sub(lambda found: f" {found[1]} ", answer)
        if unwrapped == answer:
            break
        answer = unwrapped
    answer = _DEEP_FONT.sub("", _COLOR.sub(" ", answer)).replace("{-}", "-")
    answer = _QUAD.sub(lambda found: " " if _continues(found.string[found.end() :]) else " ; ", answer)
    answer = _COMMAND.sub(lambda found: _COMMANDS.get(found[1], found[0]), answer)
    answer = answer.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    answer = re.sub(r"(?<=\d)[eE]([-+]?\d{1,3})(?![\w.])", r" \\times 10^{\1}", answer)
    answer = _FUNCTIONS.sub(r"\\\1", answer)
    answer = _ROOT_CALL.sub(r"\\sqrt{\1}", answer)
    answer = re.sub(r"_ ?\{ ?(\w) ?\}(?!\w)", r"_\1", answer)
    answer = re.sub(r"\\log ?_ ?(\w+)", r"\\log_{\1}", answer)
    answer = re.sub(r"\s+", " ", answer.replace("\x02", r"\\")).strip()
    return _trim(answer)


def _continues(rest: str) -> bool:
    r"""Whether what follows a \quad belongs to the item before it: a unit or a remark, the end."""
    return not rest.strip() or re.match(r"[a-zA-Z]{2,}|[,;.)]|\(\\?[a-zA-Z]{2}", rest) is not None


def _is_delimited(answer: str) -> bool:
    return answer.lstrip().startswith((r"\(", r"\[")) and answer.rstrip().rstrip(".").endswith((r"\)", r"\]"))


def _to_ascii(answer: str) -> str:
    """Superscripts, subscripts and vulgar fractions keep their position: 10⁵ is 10^{5}, never 105."""
    pieces: list[str] = []
    kind = ""
    for char in answer.translate(_CHARACTERS):
        tag, _, rest = unicodedata.decomposition(char).partition("> ")
        position = {"<super": "^", "<sub": "_"}.get(tag, "")
        if position != kind:
            pieces.append("}" if kind else "")
            pieces.append(position + "{" if position else "")
            kind = position
        text = "".join(chr(int(code, 16)) for code in rest.split()) if tag.startswith("<") else char
        if tag == "<fraction" and "⁄" in text:
            top, _, bottom = text.partition("⁄")
            text = rf"\frac{{{top}}}{{{bottom or 1}}}"
        pieces.append(unicodedata.normalize("NFKC", text).translate(_CHARACTERS))
    return "".join(pieces) + ("}" if kind else "")


def _trim(answer: str) -> str:
    """Without outer braces and closing punctuation."""
    before = None
    while before != answer:
        before = answer
        answer = (answer.rstrip() if answer.endswith("...") else answer.rstrip(" .,;:?")).lstrip(" ,;:")
        while answer.endswith("\\\\"):
            answer = answer[:-2].rstrip()
        depth = _outer_braces(answer)
        answer = answer[depth : len(answer) - depth].strip()
    return answer


def _outer_braces(answer: str) -> int:
    """How many pairs of braces wrap the whole answer ("{{5}}": 2). Linear."""
    opening = len(answer) - len(answer.lstrip("{"))
    closing = len(answer) - len(answer.rstrip("}"))
    closing -= answer[: len(answer) - closing].endswith("\\")  # "\}" closes a set
    depth = lowest = opening
    escaped = False
    for char in answer[opening : len(answer) - closing]:
        depth += 0 if escaped else {"{": 1, "}": -1}.get(char, 0)
        escaped = char == "\\" and not escaped
        lowest = min(lowest, depth)
    return max(0, min(lowest, closing))


def number(answer: str) -> Number | None:
    r"""The value of a plain number: 1,234 / -0.5 / 3/4 / 2\frac{1}{3} / 0.\overline{3} / 1.5e6 / 10^5 / 50%."""
    if len(answer) > 300:
        return None
    answer = answer.strip()
    power = _POWER_OF_TEN.fullmatch(answer)
    if power and len((power["bare"] or "0").lstrip("+-")) == len(power["bare"] or "0"):
        value = Fraction(10) ** int(power["braced"] or power["bare"])
        return Number(-value if power["sign"] else value)
    found = _NUMBER.fullmatch(answer)
    if found is None:
        return None
    sign = -1 if len([1 for char in _SIGNS.findall(found["sign"]) if char == "-"]) % 2 else 1
    percent = found["percent"] is not None
    if found["decimal"] is not None:
        plain = _decimal(found["decimal"], found["repeated"] or found["bar"], found["exponent"])
        return plain and replace(plain, value=sign * plain.value, percent=percent)
    tops = (found[name] for name in ("top", "top1", "top2", "top3", "top4", "left"))
    bottoms = (found[name] for name in ("bottom", "bottom1", "bottom2", "bottom3", "bottom4", "right"))
    top, bottom = (_whole(next(part for part in parts if part is not None)) for parts in (tops, bottoms))
    whole = int(found["whole"] or found["mixed"] or 0)
    if bottom == 0 or (whole and (top < 0 or bottom < 0)):
        return None
    product = sign * whole * Fraction(top, bottom) if found["whole"] else None
    return Number(sign * (whole + Fraction(top, bottom)), None, percent, product)


def continental(answer: str) -> Number | None:
    """The value where a comma may mark the decimals and points the thousands: 1.234,5 and 1.234."""
    found = re.fullmatch(r"(-?(?:\d{1,3}(?:\.\d{3})+|\d+))(?:,(\d+))?", answer)
    if found is None or not ("." in answer or "," in answer):
        return None
    return number(found[1].replace(".", "") + ("." + found[2] if found[2] else ""))


def _whole(digits: str) -> int:
    return int(re.sub(r"[, ]", "", digits))


def _decimal(text: str, repeated: str | None, exponent: str | None) -> Number | None:
    digits = re.sub(r"[, ]", "", text).rstrip(".")
    if repeated and "." not in text:
        return None
    scale = Fraction(10) ** int((exponent or "0").replace(" ", ""))
    places = len(digits.partition(".")[2])
    value = Fraction(digits or "0")
    if repeated:
        value += Fraction(int(repeated), 10**places * (10 ** len(repeated) - 1))
    exact = repeated or not places
    return Number(value * scale, None if exact else Fraction(1, 10**places) * scale)


EQUAL, DIFFERENT, UNKNOWN = "equal", "different", "unknown"
TOLERANCE = Fraction(1, 10**6)  # relative, of a decimal against another number; math-verify's own six places


def compare_numbers(gold: Number, given: Number) -> str:
    """equal, different or unknown, exactly where both are exact; zero equals only zero; 50% equals 50 as well as 0.5.

    A decimal equals what it approximates to its last place and to TOLERANCE. Where the known answer is a decimal, it
    may have been rounded: a number that rounds to it, or that it rounds to, is unknown.
    """
    if gold.percent == given.percent:
        return _compare_values(gold, given)
    percent, plain = (gold, given) if gold.percent else (given, gold)
    as_written = _compare_values(replace(plain, percent=True), percent)
    if as_written == EQUAL:
        return EQUAL
    place = None if percent.place is None else percent.place / 100
    as_ratio = _compare_values(plain, Number(percent.value / 100, place))
    if as_ratio == EQUAL and plain.value.denominator == 1 and abs(plain.value) > 1:
        return UNKNOWN if abs(plain.value) < 10 else DIFFERENT  # 200% for 2, perhaps; nobody writes 20 as 2000%
    return as_ratio if as_ratio != DIFFERENT else as_written


def _compare_values(gold: Number, given: Number) -> str:
    if gold.value == given.value:
        return EQUAL
    places = [side.place for side in (gold, given) if side.place is not None]
    if not places or 0 in (gold.value, given.value) or (len(places) == 2 and places[0] == places[1]):
        return UNKNOWN if gold.value == given.product or given.value == gold.product else DIFFERENT
    difference, place = abs(gold.value - given.value), max(places)
    if difference <= TOLERANCE * abs(gold.value):
        exact = gold.value if gold.place is None else given.value
        if len(places) == 1:  # what a decimal could spell exactly is not approximated by another one
            return EQUAL if difference <= place and (exact / place).denominator > 1 else UNKNOWN
        return EQUAL if difference < place else UNKNOWN
    if gold.place is not None and 2 * difference <= place:
        return UNKNOWN
    return DIFFERENT


def squeeze(text: str) -> str:
    """Without the spaces that mean nothing: "1 2" keeps its own."""
    return re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)
