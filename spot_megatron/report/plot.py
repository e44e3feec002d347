"""Parts of the report's Bokeh figures: axes and tools, curves, and the values that are shown at the pointer.

Colours have a contrast of 4.1 on the light page and of 4.3 on the dark one, so that both take the same figure; axes and
grid follow the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CrosshairTool,
    HoverTool,
    LogTicker,
    PrintfTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

PALETTE = (
    "#3a7fcc", "#c4611c", "#208e5e", "#9c66c1", "#cf4f84", "#828126",
    "#148b8d", "#ab7035", "#6c7f91", "#977a16", "#7376c3",
)  # fmt: skip
GRAY, RED = "#7d858e", "#d0473c"

MAX_BUCKETS = 280  # of a drawn line: each keeps its lowest and its highest value


@dataclass(frozen=True)
class Curve:
    """Values over steps. NaN and infinities are gaps, marked at the lower edge."""

    label: str
    color: str
    steps: Sequence[int]
    values: Sequence[float]
    dashed: bool = False


def new_figure(
    title: str, x_range: Range1d, y_range: Range1d, *, log: bool = False, height: int = 210, toolbar: bool = True
) -> figure:
    plot = figure(
        name=title,
        x_range=x_range,
        y_range=y_range,
        y_axis_type="log" if log else "linear",
        height=height,
        sizing_mode="stretch_width",
        tools="box_zoom,pan,reset" if toolbar else "",
        toolbar_location="right" if toolbar else None,
        active_drag=None,  # a finger that moves over the figure scrolls the page
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_top=6,
        min_border_right=10,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xgrid.visible = False
    plot.axis.major_tick_line_color = plot.axis.minor_tick_line_color = None
    plot.yaxis.axis_line_color = None
    plot.axis.formatter = PrintfTickFormatter(format="%.10g")
    plot.yaxis.ticker = LogTicker(desired_num_ticks=5) if log else BasicTicker(desired_num_ticks=5)
    return plot


def draw_curve(plot: figure, curve: Curve, window: int, bottom: float) -> None:
    """A curve's line, its mean over `window` steps if that is not 0, dots for lone values, and marks for gaps."""
    steps, values = np.asarray(curve.steps), np.asarray(curve.values, dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    dash = [4, 3] if curve.dashed else "solid"
    kept = thin_out(values)
    style = {"line_alpha": 0.35, "line_width": 1} if window else {"line_width": 1.8}
    plot.line(steps[kept], values[kept], line_color=curve.color, line_dash=dash, name="curve", **style)
    if window:
        mean = moving_mean(values, window)
        places = np.unique(np.linspace(0, len(mean) - 1, 2 * MAX_BUCKETS).astype(int))
        plot.line(steps[places], mean[places], line_color=curve.color, line_dash=dash, line_width=2, name="mean")
    gaps = np.isnan(values)
    framed = np.concatenate([[True], gaps, [True]])
    lone = ~gaps & framed[:-2] & framed[2:]
    if lone.any():
        plot.scatter(steps[lone], values[lone], size=6, color=curve.color, name="lone")
    if gaps.any():
        at = steps[gaps][:: math.ceil(gaps.sum() / MAX_BUCKETS)]
        plot.scatter(at, np.full(len(at), bottom), marker="triangle", size=8, color=RED, name="gap")


def hover_steps(plot: figure, columns: Sequence[str], rows: Sequence[Sequence[str]], height: float) -> None:
    """Shows a row of the table while the pointer is above its step."""
    # Labels are in the columns and not in the tooltip's template, in which @ and $ have a meaning.
    data: dict[str, list[object]] = {"x": [int(row[0]) for row in rows], "y": [height] * len(rows)}
    for i, name in enumerate(columns[1:], start=1):
        data[f"text{i}"] = [f"{name} {row[i]}" if row[i] else "" for row in rows]
    source = ColumnDataSource(data)
    target = plot.line if len(rows) > 1 else plot.scatter
    tooltips = [("step", "@x"), *(("", f"@text{i}") for i in range(1, len(columns)))]
    hover = HoverTool(
        renderers=[target("x", "y", source=source, alpha=0, name="hover")],
        mode="vline",
        line_policy="nearest",
        attachment="horizontal",
        tooltips=tooltips,
        visible=False,
    )
    plot.add_tools(hover, CrosshairTool(dimensions="height", line_color=GRAY, visible=False))


def moving_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred means over `window` (odd) finite values, fewer at the ends; NaN where there is none."""
    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    ones = np.ones(window)
    half = window // 2
    sums = np.convolve(np.where(finite, array, 0.0), ones)[half : half + len(array)]
    counts = np.convolve(finite, ones)[half : half + len(array)]
    return np.divide(sums, counts, out=np.full(len(array), np.nan), where=counts > 0)


def thin_out(values: np.ndarray) -> np.ndarray:
    """Indices of the lowest and the highest value of each of MAX_BUCKETS stretches, and of all gaps: spikes stay."""
    if len(values) <= 2 * MAX_BUCKETS:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), MAX_BUCKETS):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            kept |= {finite[values[finite].argmin()], finite[values[finite].argmax()]}
        if len(finite) < len(stretch):
            kept.add(stretch[~np.isfinite(values[stretch])][0])
    return np.array(sorted(kept))
