"""Ways to write one exact value."""

from fractions import Fraction

WRAPPINGS = (
    "{}",
    "${}$",
    r"\({}\)",
    "{{{}}}",
    "{}.",
    "x = {}",
    r"x={}\\",
    r"\mathbf{{{}}}",
    r"\boldsymbol{{{}}}",
    r"\color{{red}}{{{}}}",
    r"\displaystyle {}",
    r"\text{{The answer is }} {}",
    r"\;{}\;",
    r"{}\text{{ units}}",
    r"\boxed{{{}}}",
    "({})",
    r"\left({}\right)",
    r"\{{{}\}}",
)


def integer_spellings(value: int) -> list[str]:
    sign, size = ("-" if value < 0 else ""), abs(value)
    grouped = f"{size:,}"
    return [
        f"{sign}{size}",
        f"{sign}{size}.0",
        f"{sign}{grouped}",
        sign + grouped.replace(",", "{,}"),
        sign + grouped.replace(",", r"\,"),
        sign + grouped.replace(",", r",\!"),
        sign + grouped.replace(",", " "),
        rf"{sign}\frac{{{2 * size}}}{{2}}",
        f"{sign}{3 * size}/3",
        f"{sign}{size}e0",
        rf"{sign}{size}\times 10^{{0}}",
        ("−" if value < 0 else "") + str(size),
        (r"\text{-}" if value < 0 else "") + str(size),
        rf"{sign}\sqrt{{{size * size}}}",
        f"{value + 7} - 7",
        rf"{sign}{size} \cdot 1",
    ]


def fraction_spellings(value: Fraction) -> list[str]:
    sign, top, bottom = ("-" if value < 0 else ""), abs(value.numerator), value.denominator
    return [
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{top}}}{{{bottom}}}",
        rf"{sign}\tfrac{{{top}}}{{{bottom}}}",
        rf"\frac{{{sign}{top}}}{{{bottom}}}",
        f"{sign}{top}/{bottom}",
        f"{sign}{top} / {bottom}",
        f"{sign}({top})/({bottom})",
        rf"{sign}\frac{{{3 * top}}}{{{3 * bottom}}}",
        rf"{sign}{top} \cdot \frac{{1}}{{{bottom}}}",
        rf"{sign}\frac{{1}}{{{bottom}}} \cdot {top}",
        rf"{sign}{top}\div {bottom}",
        rf"{sign}{top} \cdot {bottom}^{{-1}}",
        rf"\frac{{{value.numerator + bottom}}}{{{bottom}}} - 1",
        rf"{sign}\frac{{\sqrt{{{top * top}}}}}{{{bottom}}}",
        rf"{sign}{top}⁄{bottom}",
    ]


def radical_spellings(a: int, b: int) -> list[str]:
    r"""a\sqrt{b}."""
    return [
        rf"{a}\sqrt{{{b}}}",
        rf"{a} \sqrt {{{b}}}",
        rf"\sqrt{{{a * a * b}}}",
        rf"{a}\cdot\sqrt{{{b}}}",
        rf"{a} \times \sqrt{{{b}}}",
        rf"\sqrt{{{b}}}\cdot {a}",
        f"{a}sqrt({b})",
        f"{a}*sqrt({b})" if a != 1 else f"sqrt({b})",
        rf"{a}\cdot {b}^{{1/2}}",
        rf"{a}\cdot {b}^{{\frac{{1}}{{2}}}}",
        rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}",
        rf"\frac{{{2 * a}\sqrt{{{b}}}}}{{2}}",
        rf"{a}√{b}" if b < 10 else rf"{a}\sqrt{{{b}}}",
        rf"{2 * a}\sqrt{{{b}}} - {a}\sqrt{{{b}}}",
        rf"\frac{{{a}\sqrt{{{b}}}}}{{1}}",
    ]
