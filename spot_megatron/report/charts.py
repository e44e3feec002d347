"""Charts of the report pages: curves over steps, histograms, stacked bars. Each has a table of its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, Range1d
from bokeh.models.annotations import Span
from bokeh.plotting import figure

from spot_megatron.report.numbers import number
from spot_megatron.report.plot import GRAY, PALETTE, RED, Curve, draw_curve, hover_steps, new_figure

MAX_ROWS = 240  # of a table of steps
SMOOTH_FROM = 100  # steps from which noisy curves get a moving mean
MAX_WINDOW = 501  # steps of it


@dataclass(frozen=True)
class Level:
    """A labelled line at one value."""

    value: float
    label: str


@dataclass(frozen=True)
class Group:
    """Values of one colour in a histogram."""

    label: str
    color: str
    values: Sequence[float]


@dataclass(frozen=True)
class Key:
    """A legend entry. `style`: solid, dashed, level or area."""

    label: str
    color: str
    value: str = ""
    style: str = "solid"


@dataclass(frozen=True)
class Chart:
    """A titled figure, its legend, and its values as a table. `figure` is None if there is nothing to draw."""

    title: str
    figure: figure | None = None
    keys: list[Key] = field(default_factory=list)
    note: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    levels: Sequence[Level] = (),
    low: float | None = None,
    high: float | None = None,
    log_if_wide: bool = False,
    smooth: bool = False,
    epoch_ends: Sequence[float] = (),
    note: str = "",
) -> Chart:
    """Curves over optimizer steps.

    `low` and `high` fix the axis if they are given; `log_if_wide` takes a logarithmic axis if all values are positive
    and span more than a factor of 20; `epoch_ends` are drawn as vertical lines.
    """
    finite = [value for curve in curves for value in curve.values if math.isfinite(value)]
    steps = sorted({step for curve in curves for step in curve.steps})
    if not finite:
        return Chart(title, note="no finite value to draw" if steps else "no step to draw")
    bottom, top, log = _value_range([*finite, *(level.value for level in levels)], low, high, log_if_wide)
    margin = 0.5 if len(steps) == 1 else 0.0
    x_range = Range1d(start=steps[0] - margin, end=steps[-1] + margin, bounds="auto")
    plot = new_figure(title, x_range, Range1d(start=bottom, end=top), log=log)
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=6, min_interval=1)

    for end in epoch_ends:
        plot.add_layout(Span(location=end, dimension="height", line_color=GRAY, line_dash=[1, 4]))
    for level in levels:
        plot.add_layout(Span(location=level.value, dimension="width", line_color=GRAY, line_dash=[6, 4]))
    windows = [_window(curve) if smooth else 0 for curve in curves]
    for curve, window in zip(curves, windows, strict=True):
        draw_curve(plot, curve, window, bottom)
    columns, rows = _step_table(curves, steps)
    hover_steps(plot, columns, rows, finite[0])

    num_gaps = sum(not math.isfinite(value) for curve in curves for value in curve.values)
    sizes = " or ".join(str(size) for size in sorted(set(windows) - {0}))
    remarks = [
        note,
        "logarithmic axis" if log else "",
        f"thick: mean over {sizes} steps" if sizes else "",
        f"{num_gaps} values not finite, marked at the lower edge" if num_gaps else "",
    ]
    keys = [
        Key(curve.label, curve.color, number(curve.values[-1]), "dashed" if curve.dashed else "solid")
        for curve in curves
        if curve.values
    ]
    keys += [Key(level.label, GRAY, number(level.value), "level") for level in levels]
    return Chart(title, plot, keys, "; ".join(filter(None, remarks)), columns, rows)


def histogram(
    title: str,
    groups: Sequence[Group],
    *,
    low: float | None = None,
    high: float | None = None,
    num_bins: int = 36,
    levels: Sequence[Level] = (),
    note: str = "",
) -> Chart:
    """How often values occur; the legend and a dashed line show each group's median, `levels` are drawn upright.

    The axis spans all values, or `low` to `high`.
    """
    samples = [np.asarray([value for value in group.values if math.isfinite(value)]) for group in groups]
    present = [values for values in samples if len(values)]
    if not present:
        return Chart(title, note="no finite value to draw")
    low = float(min(values.min() for values in present)) if low is None else low
    high = float(max(values.max() for values in present)) if high is None else high
    if low >= high:
        low, high = low - 0.5, low + 0.5
    counts = [np.histogram(values, num_bins, (low, high))[0] for values in samples]
    edges = np.linspace(low, high, num_bins + 1)
    x_range, y_range = Range1d(start=low, end=high, bounds="auto"), Range1d(start=0, end=1.05 * max(map(max, counts)))
    plot = new_figure(title, x_range, y_range)
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=5, min_interval=1)

    keys = []
    for group, values, bins in zip(groups, samples, counts, strict=True):
        # The label is a column and not part of the tooltip's template, in which @ and $ have a meaning.
        label = [group.label] * num_bins
        bars = ColumnDataSource(
            {"left": edges[:-1], "right": edges[1:], "top": bins, "range": _bin_names(edges), "group": label}
        )
        glyphs = plot.quad(
            source=bars, left="left", right="right", top="top", bottom=0,
            fill_color=group.color, fill_alpha=0.3, line_color=group.color, line_width=0.8,
        )  # fmt: skip
        plot.add_tools(
            HoverTool(
                renderers=[glyphs], tooltips=[("", "@group"), ("values", "@range"), ("count", "@top")], visible=False
            )
        )
        if len(values):
            middle = float(np.median(values))
            plot.add_layout(Span(location=middle, dimension="height", line_color=group.color, line_dash=[4, 3]))
            keys.append(Key(f"{group.label}, median", group.color, number(middle), "area"))
        if lost := len(group.values) - len(values):
            keys.append(Key(f"{group.label}: values not finite", group.color, str(lost), "area"))
    for level in levels:
        plot.add_layout(Span(location=level.value, dimension="height", line_color=RED, line_width=2))
        keys.append(Key(level.label, RED, number(level.value)))
    rows = [
        [name, *(str(bins[i]) for bins in counts)]
        for i, name in enumerate(_bin_names(edges))
        if any(bins[i] for bins in counts)
    ]
    return Chart(title, plot, keys, note, ["values", *(group.label for group in groups)], rows)


def stacked_bar(
    title: str,
    parts: Sequence[tuple[str, float, str]],
    *,
    scale: float,
    mark: float | None = None,
    note: str = "",
    columns: tuple[str, str] = ("part", "size"),
) -> Chart:
    """One horizontal bar of (name, size, size as text), on an axis from 0 to `scale`; `mark` is drawn across it."""
    ends = np.cumsum([size for _, size, _ in parts])
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(parts))]
    plot = new_figure(title, Range1d(start=0, end=scale), Range1d(start=0, end=1), height=24, toolbar=False)
    plot.xaxis.visible = plot.yaxis.visible = plot.grid.visible = False
    plot.min_border = plot.min_border_top = plot.min_border_right = 0
    plot.quad(left=0, right=scale, bottom=0, top=1, fill_color=GRAY, fill_alpha=0.12, line_color=None)
    source = ColumnDataSource(
        {
            "left": ends - [size for _, size, _ in parts],
            "right": ends,
            "color": colors,
            "name": [name for name, _, _ in parts],
            "text": [text for _, _, text in parts],
        }
    )
    bars = plot.quad(
        source=source, left="left", right="right", bottom=0, top=1, fill_color="color", line_color=None, name="parts"
    )
    plot.add_tools(HoverTool(renderers=[bars], tooltips=[("", "@name"), ("", "@text")]))
    if mark is not None:
        plot.add_layout(Span(location=mark, dimension="height", line_color=RED, line_width=2, line_dash=[4, 3]))
    keys = [Key(name, color, text, "area") for (name, _, text), color in zip(parts, colors, strict=True)]
    return Chart(title, plot, keys, note, list(columns), [[name, text] for name, _, text in parts])


def link_steps(charts: Sequence[Chart]) -> None:
    """Gives charts over steps one horizontal range, so that they zoom together."""
    plots = [chart.figure for chart in charts if chart.figure is not None]
    if plots:
        ranges = [plot.x_range for plot in plots if isinstance(plot.x_range, Range1d)]
        start, end = min(each.start for each in ranges), max(each.end for each in ranges)
        shared = Range1d(start=start, end=end, bounds="auto")
        for plot in plots:
            plot.x_range = shared


def _step_table(curves: Sequence[Curve], steps: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of every step's values, or of MAX_ROWS steps of a longer run."""
    every = math.ceil(len(steps) / MAX_ROWS)
    shown = [*steps[:-1][::every], steps[-1]]
    found = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    rows = [[str(step), *(number(values[step]) if step in values else "" for values in found)] for step in shown]
    return ["step", *(curve.label for curve in curves)], rows


def _value_range(
    values: Sequence[float], low: float | None, high: float | None, log_if_wide: bool
) -> tuple[float, float, bool]:
    """Start and end of the vertical axis, and whether it is logarithmic."""
    least, most = min(values), max(values)
    if log_if_wide and least > 0 and most / least > 20:
        return least / 1.15, most * 1.15, True
    pad = 0.05 * (most - least) or 0.1 * abs(most) or 0.5
    start = least - pad if low is None else min(low, least)
    end = most + pad if high is None else max(high, most) + 0.02 * (high - start)
    return start, end if end > start else start + 1, False


def _window(curve: Curve) -> int:
    """Steps of the moving mean, an odd number; 0 for a curve that is short enough to be drawn alone."""
    return min(MAX_WINDOW, 2 * round(len(curve.steps) / 60) + 1) if len(curve.steps) >= SMOOTH_FROM else 0


def _bin_names(edges: np.ndarray) -> list[str]:
    return [f"{number(start)} to {number(end)}" for start, end in pairwise(edges)]
