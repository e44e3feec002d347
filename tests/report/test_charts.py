"""Figures and tables of the charts. About 2 s."""

from __future__ import annotations

import math

import pytest
from bokeh.models import GlyphRenderer, HoverTool, LinearScale, LogScale

from spot_megatron.report.charts import MAX_ROWS, Group, Level, histogram, line_chart, stacked_bar
from spot_megatron.report.numbers import number
from spot_megatron.report.plot import MAX_BUCKETS, PALETTE, Curve, moving_mean
from tests.report.runs import drawn, lines

BLUE = PALETTE[0]


def test_a_curve_is_drawn_where_its_values_are():
    chart = line_chart("t", [Curve("a", BLUE, [1, 2, 3, 5], [0.0, 1.0, 0.25, 0.5])], low=0, high=1)
    assert drawn(chart) == [[(1, 0.0), (2, 1.0), (3, 0.25), (5, 0.5)]]
    assert (chart.figure.x_range.start, chart.figure.x_range.end) == (1, 5)
    assert chart.figure.y_range.start == 0 and 1 <= chart.figure.y_range.end < 1.05
    assert chart.columns == ["step", "a"]
    assert chart.rows == [["1", "0"], ["2", "1"], ["3", "0.25"], ["5", "0.5"]]


def test_the_pointer_shows_the_rows_of_the_table():
    """A label that Bokeh would take for a template is shown as it is."""
    curves = [Curve("@x{safe}<b>", BLUE, [1, 2], [0.5, 1.5]), Curve("b", BLUE, [2, 3], [2.5, 3.5])]
    (hover,) = line_chart("t", curves).figure.select(HoverTool)
    (glyphs,) = hover.renderers
    data = glyphs.data_source.data
    assert data["x"] == [1, 2, 3]
    assert data["text1"] == ["@x{safe}<b> 0.5", "@x{safe}<b> 1.5", ""]
    assert data["text2"] == ["", "b 2.5", "b 3.5"]
    assert hover.tooltips == [("step", "@x"), ("", "@text1"), ("", "@text2")]


def test_curves_that_span_decades_get_a_logarithmic_axis():
    chart = line_chart("t", [Curve("a", BLUE, [1, 2, 3], [1.0, 0.1, 0.01])], log_if_wide=True)
    assert isinstance(chart.figure.y_scale, LogScale)
    assert "logarithmic" in chart.note
    narrow = line_chart("t", [Curve("a", BLUE, [1, 2, 3], [1.0, 0.1, 0.0])], log_if_wide=True)
    assert isinstance(narrow.figure.y_scale, LinearScale)
    assert "logarithmic" not in narrow.note


def test_histogram_counts_every_value():
    chart = histogram("t", [Group("a", BLUE, [0.0, 0.1, 0.1, 0.9, 1.0, math.inf])], num_bins=10)
    (bars,) = chart.figure.select(GlyphRenderer)
    assert list(bars.data_source.data["top"]) == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert chart.rows == [["0 to 0.1", "1"], ["0.1 to 0.2", "2"], ["0.9 to 1", "2"]]
    assert [(key.label, key.value) for key in chart.keys] == [("a, median", "0.1"), ("a: values not finite", "1")]
    assert lines(chart, "height") == [0.1]
    assert histogram("t", [Group("a", BLUE, [math.nan])]).figure is None
    assert histogram("t", [Group("a", BLUE, [3.0, 3.0])]).rows == [["3 to 3.028", "2"]]


def test_a_histogram_over_a_given_range_marks_its_level():
    chart = histogram("t", [Group("a", BLUE, [0.25])], low=0.0, high=1.0, num_bins=2, levels=[Level(0.6, "limit")])
    assert (chart.figure.x_range.start, chart.figure.x_range.end) == (0, 1)
    assert lines(chart, "height") == [0.25, 0.6]
    assert chart.rows == [["0 to 0.5", "1"]]


def test_parts_of_a_bar_follow_each_other():
    chart = stacked_bar("t", [("a", 1.0, "1 s"), ("b", 2.0, "2 s")], scale=4.0, mark=3.5)
    data = chart.figure.select_one({"name": "parts"}).data_source.data
    assert (list(data["left"]), list(data["right"])) == ([0, 1], [1, 3])
    assert (chart.figure.x_range.start, chart.figure.x_range.end) == (0, 4)
    assert lines(chart, "height") == [3.5]
    assert chart.rows == [["a", "1 s"], ["b", "2 s"]]
    assert [(key.label, key.value) for key in chart.keys] == [("a", "1 s"), ("b", "2 s")]


def test_long_curves_keep_their_spikes():
    noisy = [math.sin(step) for step in range(10_000)]  # 0 on average
    noisy[7777] = 9.0
    chart = line_chart("t", [Curve("a", BLUE, range(10_000), noisy)], smooth=True)
    (raw,) = drawn(chart)
    assert len(raw) <= 2 * MAX_BUCKETS + 2
    assert (7777, 9.0) in raw
    (mean,) = drawn(chart, "mean")
    assert len(mean) <= 2 * MAX_BUCKETS
    assert [value for _, value in mean] == pytest.approx([0.0] * len(mean), abs=0.05)  # and the mean has no spike
    assert "thick: mean over 335 steps" in chart.note
    assert len(chart.rows) <= MAX_ROWS + 1
    assert (chart.rows[0][0], chart.rows[-1][0]) == ("0", "9999")


def test_moving_mean_leaves_out_what_is_not_finite():
    mean = moving_mean([1.0, math.nan, 3.0, math.inf, math.nan, math.nan, 5.0], 3)
    assert mean.tolist()[:4] == [1.0, 2.0, 3.0, 3.0]
    assert math.isnan(mean[4])
    assert mean.tolist()[5:] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.00123449, "0.001234"),
        (1.55e-7, "1.55e-7"),
        (-3e-5, "-3e-5"),
        (1234567.8, "1,234,568"),
        (-13.5349, "-13.53"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
    ],
)
def test_number(value, text):
    assert number(value) == text
