r"""The grader on a table of answer forms, and on other spellings of exact answers. About 20 s of CPU.

`data/grading_table.tsv` was written from mathematics, not from what the code returns: verdict, known answer, response.
"""

import random
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tools.pairs.spellings import WRAPPINGS, fraction_spellings, integer_spellings, radical_spellings
from tools.pairs.grade import Grader

VERDICTS = {
    "C": {"correct"},
    "W": {"wrong"},
    "N": {"no_answer"},
    "CU": {"correct", "undecided"},  # right, though it need not be provable
    "WU": {"wrong", "undecided"},
    "U": {"undecided"},  # the known answer may be a rounded one
}
TABLE = Path(__file__).parent / "data" / "grading_table.tsv"
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table() -> list[tuple[str, str, str]]:
    """(verdict's code, known answer, response) of every row; a response without a box is a box's content."""
    lines = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [
        (code, gold, response if "boxed" in response or code == "N" else rf"So the result is $\boxed{{{response}}}$.")
        for code, gold, response in lines
    ]


@pytest.fixture(scope="module")
def grader():
    grader = Grader()
    yield grader
    grader.close()


def test_the_table(grader):
    rows = table()
    assert len(rows) >= 400
    wrong = []
    for code, gold, response in rows:
        verdict = grader.grade(response, gold)
        if verdict.verdict not in VERDICTS[code] or verdict.reason == "parser_failed":
            wrong.append(f"{code}: {gold} | {response} | {verdict}")
    assert not wrong, "\n".join(wrong)


def test_undecided_is_not_the_answer_to_everything(grader):
    rows = [row for row in table() if row[0] in ("CU", "WU")]
    undecided = sum(grader.grade(response, gold).verdict == "undecided" for _, gold, response in rows)
    assert undecided <= 0.4 * len(rows)


# ---- other spellings of one value


def boxed(content: str) -> str:
    return rf"Therefore \boxed{{{content}}}"


def all_correct(grader: Grader, golds: list[str], spellings: list[str]) -> None:
    assert len(spellings) >= 15
    for gold in golds:
        for spelling in spellings:
            verdict = grader.grade(boxed(spelling), gold)
            assert verdict.verdict == "correct", (gold, spelling, verdict)


def none_correct(grader: Grader, gold: str, spellings: list[str]) -> None:
    for spelling in spellings:
        verdict = grader.grade(boxed(spelling), gold)
        assert verdict.verdict != "correct", (gold, spelling, verdict)


@SETTINGS
@given(value=st.integers(-(10**7), 10**7))
def test_integers(grader, value):
    spellings = integer_spellings(value)
    all_correct(grader, [str(value)], spellings)
    all_correct(grader, [str(value)], [wrapping.format(value) for wrapping in WRAPPINGS])
    none_correct(grader, str(value + 1), spellings)
    none_correct(grader, str(value * 10 or 1), spellings)
    none_correct(grader, str(-value or 1), spellings)


@SETTINGS
@given(value=st.fractions(-50, 50, max_denominator=60).filter(lambda value: value.denominator > 1))
def test_fractions(grader, value):
    spellings = fraction_spellings(value)
    all_correct(grader, [spellings[0], spellings[4]], spellings)
    all_correct(grader, [spellings[0]], [wrapping.format(spellings[0]) for wrapping in WRAPPINGS])
    for other in (value + Fraction(1, value.denominator), -value, 1 / value if abs(value) != 1 else value + 1):
        none_correct(grader, fraction_spellings(other)[0], spellings)


@settings(SETTINGS, max_examples=8)
@given(a=st.integers(2, 30), b=st.sampled_from([2, 3, 5, 6, 7, 10, 11, 13]))
def test_radicals(grader, a, b):
    spellings = radical_spellings(a, b)
    all_correct(grader, [spellings[0]], spellings)
    none_correct(grader, rf"{a + 1}\sqrt{{{b}}}", spellings)
    none_correct(grader, rf"{a}\sqrt{{{b + 15}}}", spellings)


@SETTINGS
@given(values=st.lists(st.integers(-99, 99), min_size=2, max_size=4, unique=True), seed=st.integers(0, 99))
def test_lists(grader, values, seed):
    shuffled = random.Random(seed).sample(values, len(values))
    texts = [str(value) for value in shuffled]
    unions = r" \cup ".join(rf"\{{{text}\}}" for text in texts)
    spellings = [
        ", ".join(texts),
        ",".join(texts),
        "; ".join(texts),
        r"\{" + ", ".join(texts) + r"\}",
        r"\left\{" + ",".join(texts) + r"\right\}",
        r"x \in \{" + ", ".join(texts) + r"\}",
        ", ".join(f"x = {text}" for text in texts),
        r" \text{ or } ".join(f"x = {text}" for text in texts),
        r" \text{ or } ".join(texts),
        " or ".join(texts),
        ", ".join(texts[:-1]) + r" \text{ and } " + texts[-1],
        ", ".join(texts[:-1]) + ", and " + texts[-1],
        "x = " + ", ".join(texts),
        ", ".join(f"x_{{{i}}} = {text}" for i, text in enumerate(texts)),
        r" \quad ".join(texts),
        unions,
        "$" + "$, $".join(texts) + "$",
    ]
    all_correct(grader, [", ".join(map(str, values))], spellings)
    all_correct(grader, [", ".join(map(str, values))], [", ".join(rf"{t}.0" for t in texts), *spellings])
    none_correct(grader, ", ".join(map(str, [*values[:-1], 200])), spellings)
    none_correct(grader, ", ".join(map(str, values[:-1])), spellings)
    none_correct(grader, ", ".join(map(str, [*values, 200])), spellings)


@SETTINGS
@given(low=st.integers(-50, 50), width=st.integers(1, 50), left=st.booleans(), right=st.booleans())
def test_intervals(grader, low, width, left, right):
    """`left` and `right`: whether the end belongs to the interval."""
    high = low + width
    opening, closing = "[" if left else "(", "]" if right else ")"
    below, above = (r"\le" if left else "<"), (r"\le" if right else "<")
    more, less = (r"\ge" if left else ">"), (r"\ge" if right else ">")
    spellings = [
        f"{opening}{low},{high}{closing}",
        f"{opening}{low}, {high}{closing}",
        rf"\left{opening}{low}, {high}\right{closing}",
        rf"x \in {opening}{low}, {high}{closing}",
        f"{low} {below} x {above} {high}",
        f"{high} {less} x {more} {low}",
        f"{low} {below} t {above} {high}",
        f"{low}{below.replace(chr(92) + 'le', '≤')}x{above.replace(chr(92) + 'le', '≤')}{high}",
        f"{low} {below.replace('le', 'leq')} x {above.replace('le', 'leq')} {high}",
        f"{low} {below.replace(chr(92) + 'le', '<=')} x {above.replace(chr(92) + 'le', '<=')} {high}",
        rf"x {more} {low} \text{{ and }} x {above} {high}",
        rf"\{{x \mid {low} {below} x {above} {high}\}}",
        rf"\{{x : {low} {below} x {above} {high}\}}",
        f"{opening}{low}.0, {high}.0{closing}",
        f"${opening}{low}, {high}{closing}$",
        rf"\text{{The answer is }} {opening}{low}, {high}{closing}",
    ]
    all_correct(grader, [spellings[0], spellings[4]], spellings)
    none_correct(grader, f"{'(' if left else '['}{low},{high}{closing}", spellings)
    none_correct(grader, f"{opening}{low},{high}{')' if right else ']'}", spellings)
    none_correct(grader, f"{opening}{low},{high + 1}{closing}", spellings)
    none_correct(grader, f"{low} {below} x", spellings)


@SETTINGS
@given(mantissa=st.integers(1001, 9999).filter(lambda value: value % 10), exponent=st.integers(-30, 30))
def test_tiny_and_huge_numbers(grader, mantissa, exponent):
    text, digits = f"{mantissa / 1000}", str(mantissa)
    spellings = [
        rf"{text}\times 10^{{{exponent}}}",
        rf"{text} \cdot 10^{{{exponent}}}",
        f"{text}e{exponent}",
        f"{text}E{exponent}",
        rf"{digits}\times 10^{{{exponent - 3}}}",
        rf"{text}×10^{{{exponent}}}",
        rf"{text} x 10^{{{exponent}}}",
        rf"{text}*10^{{{exponent}}}",
        f"{text}×10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")),
        rf"{text}\times10^{{{exponent}}}\text{{ m}}",
        rf"{text}\times 10^{{{exponent}}}.",
        rf"$ {text}\times 10^{{{exponent}}} $",
        rf"x = {text}\times 10^{{{exponent}}}",
        rf"\approx {text}\times 10^{{{exponent}}}",
        rf"\mathbf{{{text}}}\times 10^{{{exponent}}}",
    ]
    all_correct(grader, [spellings[0], spellings[2]], spellings)
    none_correct(grader, rf"{text}\times 10^{{{exponent + 1}}}", spellings)
    none_correct(grader, rf"{(mantissa + 1) / 1000}\times 10^{{{exponent}}}", spellings)
    none_correct(grader, "0", spellings)


@pytest.mark.parametrize("letter", "ABCD")
def test_choices(grader, letter):
    spellings = [
        letter,
        f"({letter})",
        rf"\text{{{letter}}}",
        rf"\text{{({letter})}}",
        rf"\textbf{{({letter})}}",
        rf"\mathbf{{{letter}}}",
        rf"\mathrm{{{letter}}}",
        f"{letter}.",
        f"{letter})",
        rf"\textbf{{({letter})}}\ 12",
        rf"\text{{{letter}. }}12",
        rf"\text{{{letter}) 12 eV}}",
        rf"\text{{Option {letter}}}",
        rf"\text{{Answer: {letter}}}",
        rf"\text{{The answer is {letter}}}",
        f"${letter}$",
    ]
    all_correct(grader, [letter, f"({letter})"], spellings)
    for other in set("ABCD") - {letter}:
        for spelling in spellings:
            assert grader.grade(boxed(spelling), other).verdict == "wrong"
