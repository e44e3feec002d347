"""Runs that were killed, are damaged or have no finite values. About 5 s."""

from __future__ import annotations

import json
import math

import pytest

from spot_megatron.errors import CheckpointError
from spot_megatron.report import write_report
from tests.report.runs import Page, charts_of, drawn, make_run, row, warnings_of


def test_a_killed_run_says_how_far_it_came(tmp_path):
    run = make_run(tmp_path / "run", num_steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')
    page = Page(run)
    assert "step 5 of 9: stopped early, or still running" in warnings_of(page)
    assert "metrics.jsonl: 1 of 6 lines left out" in page.all_text
    assert "first: line 6" in page.all_text
    assert page.cards["steps"][0] == "5 of 9"
    assert len(page.values("Loss")) == 5


def test_rows_that_are_not_finite_are_gaps_and_are_reported(tmp_path):
    changes = {"s4": {"loss": math.nan}, "s5": {"loss": math.inf, "grad_norm": None}, "s7": {"seconds": "x"}}
    page = Page(make_run(tmp_path / "run", **changes))
    assert "loss is missing or not finite in 2 steps (first: step 4)" in warnings_of(page)
    assert "grad_norm is missing or not finite in 1 step (first: step 5)" in warnings_of(page)
    assert "seconds is missing or not finite in 1 step (first: step 7)" in warnings_of(page)
    loss = charts_of(tmp_path / "run")["Loss"]
    assert [step for step, value in drawn(loss)[0] if math.isnan(value)] == [4, 5]
    assert [step for step, _ in drawn(loss, "gap")[0]] == [4, 5]
    assert "2 values not finite" in page.chart("Loss")
    assert dict(page.values("Loss"))[4] == ["NaN"]
    assert page.cards["seconds"][0] == f"{sum(row(step)['seconds'] for step in range(1, 10) if step != 7):.4g}"


def test_nothing_but_nan(tmp_path):
    page = Page(make_run(tmp_path / "run", num_steps=2, s1={"loss": math.nan}, s2={"loss": math.nan}))
    assert "no finite value to draw" in page.chart("Loss")
    assert page.cards["final loss"][0] == "NaN"


@pytest.mark.parametrize("missing", ["recipe.yaml", "environment.json", "reference.jsonl", "metrics.jsonl"])
def test_a_missing_file_is_named_and_the_rest_is_shown(tmp_path, missing):
    run = make_run(tmp_path / "run")
    (run / missing).unlink()
    page = Page(run)
    assert ("note", f"{missing} is missing") in page.checks
    assert ("final loss" in page.cards) == (missing != "metrics.jsonl")
    assert ("3.11" in page.all_text) == (missing != "environment.json")


def test_a_run_killed_before_its_first_step(tmp_path):
    page = Page(make_run(tmp_path / "run", num_steps=0))
    assert warnings_of(page) == "no step was finished"
    assert page.html.count("no step to draw") == 9
    assert "Pairs by log-probability" in page.html


def test_damaged_files_are_reported(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("name: [")
    (run / "environment.json").write_text("{")
    (run / "evaluation.json").write_text('{"model": {"skills": {"x": 3}}}')
    (run / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "one"}\n' + b"".join(json.dumps(row(s)).encode() + b"\n" for s in (1, 2, 2))
    )
    text = Page(run).all_text
    assert "recipe.yaml is not YAML" in text
    assert "environment.json is not JSON" in text
    assert "evaluation.json has not the shape" in text
    assert "metrics.jsonl: 2 of 6 lines left out" in text
    assert "metrics.jsonl: 2 rows have no whole step number or one that comes again" in text


def test_a_folder_that_is_no_run(tmp_path):
    run = make_run(tmp_path / "runs" / "mine")
    for folder in (tmp_path / "nowhere", tmp_path, run / "metrics.jsonl"):
        with pytest.raises(CheckpointError, match=r"is not a run.*make train"):
            write_report(folder)
    with pytest.raises(CheckpointError, match=r"Runs inside it: .*mine"):
        write_report(tmp_path / "runs")
    with pytest.raises(CheckpointError, match="nowhere is not a run"):
        write_report(run, [tmp_path / "nowhere"])
    with pytest.raises(CheckpointError, match="at most 5"):
        write_report(run, [run] * 6)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report.html").mkdir()
    before = sorted(run.iterdir())
    with pytest.raises(CheckpointError, match=r"report\.html cannot be written"):
        write_report(run)
    assert sorted(run.iterdir()) == before


def test_a_single_step_is_a_dot(tmp_path):
    page = Page(make_run(tmp_path / "run", num_steps=1))
    assert (
        sum(len(drawn(chart, "lone")) for chart in charts_of(tmp_path / "run").values() if "step" in chart.columns)
        == 10
    )
    assert page.html.count('class="plot"') == 11  # nine over steps, one of them with two curves, and two histograms
    assert page.cards["final loss"] == ("1.386", "first 1.386; last 1 step: mean 1.386")
