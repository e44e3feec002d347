"""evaluation.html: accuracies with their intervals, the paper's table, and the questions whose answers flipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d
from bokeh.models.annotations import Span

from spot_megatron.report.charts import Chart, Key
from spot_megatron.report.html import render_page
from spot_megatron.report.plot import GRAY, PALETTE, new_figure
from tools.eval import statistics
from tools.eval.answers import Answers
from tools.eval.benchmarks import PAPER_ROWS
from tools.eval.other_results import OtherResults, read_results
from tools.pairs.conversation import transcript

NUM_FLIPS = 12  # shown each way
MOST_CHARACTERS = 6_000  # of a shown response
_NAMES = {"base": PALETTE[1], "model": PALETTE[0]}


@dataclass(frozen=True)
class Bar:
    """An accuracy, or a difference, in per cent with the 95 % interval."""

    name: str
    label: str
    color: str
    value: float
    interval: tuple[float, float] | None

    def text(self) -> str:
        spread = "" if self.interval is None else f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{self.value:.1f}{spread}"


@dataclass(frozen=True)
class Flip:
    """A question that one side answers more often than the other, with a sample of each side."""

    benchmark: str
    id: str
    prompt: str
    answer: str
    base: str
    model: str
    rates: tuple[float, float]


def page(found: dict[str, Any], model: Answers, base: Answers | None, results: Sequence[Path] = ()) -> str:
    others = [other for path in results for other in read_results(path)]
    charts = [accuracy_chart(found, others)]
    if base:
        charts.append(difference_chart(found))
    better, worse = flips(model, base) if base else ([], [])
    return render_page(
        Path(__file__).with_name("evaluation.html.j2"),
        charts,
        found=found,
        bars=charts,
        sides=[(name, found[name]) for name in ("base", "model") if found[name]],
        columns=(*statistics.GROUPS, "overall"),
        paper=PAPER_ROWS,
        better=better,
        worse=worse,
        several=any(repeats > 1 for repeats in model.plan.repeats.values()),
        others=others,
        titles={name: row["title"] for name, row in found["model"]["benchmarks"].items()},
        details=details(found),
    )


def accuracy_chart(found: dict[str, Any], others: Sequence[OtherResults] = ()) -> Chart:
    bars = []
    for name, row in found["model"]["benchmarks"].items():
        for side, color in _NAMES.items():
            score = found[side]["benchmarks"].get(name) if found[side] else None
            if score and score["accuracy"] is not None:
                bars.append(_bar(row["title"], side, color, score["accuracy"], score["interval"]))
        for number, other in enumerate(others, start=2):
            if name in other.scores:
                value, error = other.scores[name]
                interval = None if error is None else (value - 1.96 * error, value + 1.96 * error)
                bars.append(_bar(row["title"], other.label, PALETTE[number % len(PALETTE)], value, interval))
    return bar_chart("Accuracy in per cent, with 95 % intervals", bars, low=0.0)


def difference_chart(found: dict[str, Any]) -> Chart:
    bars = [
        _bar(
            found["model"]["benchmarks"][name]["title"], "model - base", PALETTE[2], row["difference"], row["interval"]
        )
        for name, row in found["differences"].items()
        if row
    ]
    return bar_chart("Trained minus base, paired by question, in points", bars)


def _bar(name: str, label: str, color: str, value: float, interval: Sequence[float] | None) -> Bar:
    scaled = None if interval is None else (100 * interval[0], 100 * interval[1])
    return Bar(name, label, color, 100 * value, scaled)


def bar_chart(title: str, bars: Sequence[Bar], low: float | None = None) -> Chart:
    """Horizontal bars, grouped by name, the first on top; a line spans each bar's interval."""
    if not bars:
        return Chart(title, note="nothing was answered")
    places: list[float] = []
    at = 0.0
    for number, bar in enumerate(bars):
        at -= 1.0 if number and bars[number - 1].name == bar.name else 1.6
        places.append(at)
    ends = [end for bar in bars for end in (bar.value, *(bar.interval or ()))]
    start = min(0.0, *ends) if low is None else low
    margin = 0.03 * (max(ends) - start) or 1.0
    x_range = Range1d(start=start - (margin if low is None else 0), end=max(0.0, *ends) + margin)
    height = 40 + round(18 * -at)
    plot = new_figure(title, x_range, Range1d(start=at - 0.9, end=-0.7), height=height, toolbar=False)
    middles = {
        name: sum(here := [y for y, bar in zip(places, bars, strict=True) if bar.name == name]) / len(here)
        for name in dict.fromkeys(bar.name for bar in bars)
    }
    plot.yaxis.ticker = FixedTicker(ticks=list(middles.values()))
    plot.yaxis.major_label_overrides = {middle: name for name, middle in middles.items()}
    plot.xgrid.visible, plot.ygrid.visible = True, False
    source = ColumnDataSource(
        {
            "y": places,
            "value": [bar.value for bar in bars],
            "color": [bar.color for bar in bars],
            "name": [f"{bar.name}, {bar.label}" for bar in bars],
            "text": [bar.text() for bar in bars],
        }
    )
    drawn = plot.hbar(
        y="y",
        right="value",
        left=0,
        height=0.8,
        fill_color="color",
        fill_alpha=0.55,
        line_color=None,
        source=source,
        name="bars",
    )
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[("", "@name"), ("", "@text")]))
    spans = [(y, *bar.interval) for y, bar in zip(places, bars, strict=True) if bar.interval]
    if spans:
        y, left, right = zip(*spans, strict=True)
        plot.segment(x0=left, x1=right, y0=y, y1=y, line_color=GRAY, line_width=2.5, name="intervals")
    plot.add_layout(Span(location=0, dimension="height", line_color=GRAY))
    keys = [Key(label, color, style="area") for label, color in dict.fromkeys((bar.label, bar.color) for bar in bars)]
    rows = [[bar.name, bar.label, bar.text()] for bar in bars]
    return Chart(title, plot, keys, columns=["benchmark", "model", "per cent"], rows=rows)


def flips(model: Answers, base: Answers) -> tuple[list[Flip], list[Flip]]:
    """(questions that the trained model answers more often, those that it answers less often), largest change first."""
    changed: list[tuple[float, Flip]] = []
    for asked in model.plan.benchmarks:
        before, after = (statistics.by_question(answers, asked) for answers in (base, model))
        for identifier in after:
            if identifier not in before:
                continue
            rates = tuple(statistics.fmean(mark.right for mark in found[identifier]) for found in (before, after))
            if rates[0] != rates[1]:
                flip = _flip(
                    f"{asked.benchmark.name}/{identifier}", asked.benchmark.title, model, base, (rates[0], rates[1])
                )
                changed.append((rates[1] - rates[0], flip))
    changed.sort(key=lambda found: -abs(found[0]))
    better, worse = ([flip for change, flip in changed if change * sign > 0] for sign in (1, -1))
    return better, worse


def _flip(key: str, title: str, model: Answers, base: Answers, rates: tuple[float, float]) -> Flip:
    _, item = model.questions[key]
    gained = rates[1] > rates[0]
    texts = [_example(answers, key, right) for answers, right in ((base, not gained), (model, gained))]
    prompt = transcript(model.prompts[key], item.question.tools)
    return Flip(title, item.question.id, prompt, item.question.answer, texts[0], texts[1], rates)


def _example(answers: Answers, key: str, right: bool) -> str:
    """The first answer to the question that is right, or that is not."""
    repeats = answers.plan.repeats[key.partition("/")[0]]
    marks = ((sample, answers.marks.get((key, sample))) for sample in range(repeats))
    sample = next(sample for sample, mark in marks if mark and not mark.missing and mark.right == right)
    text = answers.response((key, sample))
    return (
        text
        if len(text) <= MOST_CHARACTERS
        else f"{text[: MOST_CHARACTERS // 2]}\n[...]\n{text[-MOST_CHARACTERS // 2 :]}"
    )


def details(found: dict[str, Any]) -> list[list[str]]:
    """A row of the page's second table for each benchmark and side."""
    rows = []
    for name, row in found["model"]["benchmarks"].items():
        for side in ("base", "model"):
            score = found[side]["benchmarks"].get(name) if found[side] else None
            if not score or score["accuracy"] is None:
                continue
            error = score["standard_error"]
            last = max(score.get("pass_at", {"0": 0}), key=int)
            rows.append(
                [
                    row["title"],
                    side,
                    f"{score['questions']} × {score['repeats']}",
                    f"{100 * score['accuracy']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"),
                    f"{100 * score['pass_at'][last]:.1f} ({last})" if "pass_at" in score else "-",
                    f"{100 * score['majority_at'][last]:.1f} ({last})" if "majority_at" in score else "-",
                    *(f"{100 * score[share]:.1f}" for share in ("undecided", "no_answer", "cut")),
                    str(sum(score["missing"].values())),
                    f"{score['tokens']:,.0f}",
                ]
            )
    return rows
