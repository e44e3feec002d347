"""The page of a run against the run's own files, and hostile text. About 8 s."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from spot_megatron.report import write_report
from spot_megatron.report.page import learning_charts
from spot_megatron.report.run import read_run
from tests.report.runs import HOSTILE, RECIPE, Page, add_validations, charts_of, drawn, lines, make_run, result, row


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page(run)


def test_headline_numbers_are_those_of_the_metrics(run, page):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens, unique, seconds = (sum(row[key] for row in rows) for key in ("tokens", "unique_tokens", "seconds"))
    cards = page.cards
    assert cards["steps"] == ("9 of 9", "11 pairs, 3 epochs planned")
    assert cards["final loss"][0] == f"{rows[-1]['loss']:.4g}"
    assert cards["final loss"][1].startswith("first 1.386; last 9 steps: mean ")
    assert float(cards["final loss"][1].split()[-1]) == pytest.approx(np.mean([row["loss"] for row in rows]), rel=1e-3)
    assert cards["reward margin"][0] == f"0 → {rows[-1]['reward_margin']:.4g}"
    assert cards["reward accuracy"][0] == f"0 → {rows[-1]['reward_accuracy']:.4g}"
    assert cards["saved by prefix sharing"][0] == f"{100 * (1 - unique / tokens):.1f}%"
    assert cards["saved by prefix sharing"][1] == f"{tokens:,} tokens, {unique:,} of them computed (unique)"
    assert cards["seconds"] == (f"{seconds:.4g}", "0:00:10; median step 1.125 s")
    assert cards["unique tokens/s"][0] == f"{unique / seconds:.4g}"
    assert f"{tokens / seconds:.4g} as separate" in cards["unique tokens/s"][1]


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        ("Loss", ["loss"]),
        ("Reward, chosen and rejected", ["reward_chosen", "reward_rejected"]),
        ("Reward margin", ["reward_margin"]),
        ("Reward accuracy", ["reward_accuracy"]),
        ("Reward shift δ", ["reward_shift"]),
        ("Gradient norm before clipping", ["grad_norm"]),
        ("Seconds a step", ["seconds"]),
    ],
)
def test_every_step_shows_its_values(page, title, keys):
    assert page.values(title) == [(step, [f"{row(step)[key]:.4g}" for key in keys]) for step in range(1, 10)]


def test_learning_rate_and_speed_per_step(page):
    assert [float(values[0]) for _, values in page.values("Learning rate")] == [row(s)["lr"] for s in range(1, 10)]
    rates = [float(values[0].replace(",", "")) for _, values in page.values("Unique tokens/s")]
    expected = [row(s)["unique_tokens"] / row(s)["seconds"] for s in range(1, 10)]
    assert rates == pytest.approx(expected, rel=1e-3)


def test_loss_at_the_reference_and_clip_are_drawn(run, page):
    assert "at the reference, 2 ln 2 <b>1.386</b>" in page.chart("Loss")
    assert "clip <b>1</b>" in page.chart("Gradient norm before clipping")
    charts = charts_of(run)
    for title, levels in (("Loss", [2 * math.log(2)]), ("Gradient norm before clipping", [1.0]), ("Reward margin", [])):
        assert lines(charts[title], "width") == levels
    assert ("good", "loss at step 1 is 1.386294, 2 ln 2 = 1.386294: the policy starts as its reference") in page.checks
    assert ("note", "the gradient was clipped to norm 1 in 2 of 9 steps") in page.checks
    assert lines(charts["Loss"], "height") == [3.5, 6.5]


def test_objectives_without_such_a_value_have_no_line(tmp_path):
    recipe = {**RECIPE, "objective": {"name": "sft"}, "optim": {"clip_grad_norm": 0.0}}
    page = Page(make_run(tmp_path / "run", recipe=recipe))
    assert not any(lines(chart, "width") for chart in charts_of(tmp_path / "run").values())
    assert not any("at step 1" in text or "clipped" in text for _, text in page.checks)


def test_hostile_text_stays_text(tmp_path):
    """In the recipe, the environment, the evaluation, the folders' names and the damaged files."""
    recipe = {**RECIPE, "name": HOSTILE, "model": {"hf": HOSTILE}, "evaluation": {"questions": HOSTILE}}
    recipe["objective"] = {"name": HOSTILE, "shift": {"kind": HOSTILE}}
    name = "a<b>&'\"<script>"
    run = make_run(tmp_path / name, recipe=recipe)
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    other = make_run(tmp_path / "other" / name, recipe={**recipe, HOSTILE: 1})
    for against in ([], [other]):
        (run / "evaluation.json").unlink(missing_ok=True)
        assert HOSTILE.split("&")[0] in Page(run, *against).all_text
        (run / "evaluation.json").write_text(json.dumps({"base": None, "model": result(**{HOSTILE: (1, 2)})}))
        page = Page(run, *against)
        tags = [tag for tag, _ in page.tags]
        assert set(tags).isdisjoint({"img", "iframe", "link", "object", "a"})
        assert tags.count("script") == len(allowed_scripts(page))
        assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)
        assert HOSTILE in page.all_text
    assert yaml.safe_load((run / "recipe.yaml").read_text())["name"] == HOSTILE


def test_page_asks_the_network_for_nothing(page):
    assert not any({"src", "href", "xlink:href", "srcset"} & set(attributes) for _, attributes in page.tags)
    markup = re.sub(r"<script>.*?</script>", "", page.html, flags=re.DOTALL)
    assert "url(" not in markup
    assert "@import" not in markup
    assert "http" not in markup.replace('http-equiv="Content-Security-Policy"', "")
    assert policy(page)["default-src"] == ["'none'"]
    assert policy(page).keys() == {"default-src", "img-src", "style-src", "script-src"}
    assert policy(page)["img-src"] == ["data:"]
    assert len(allowed_scripts(page)) == 3


def policy(page: Page) -> dict[str, list[str]]:
    """The page's content security policy: sources by directive."""
    (text,) = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    return {words[0]: words[1:] for words in map(str.split, text.split(";"))}


def allowed_scripts(page: Page) -> list[str]:
    """The page's scripts, each of which its policy must name, and no other."""
    scripts = re.findall(r"<script>(.*?)</script>", page.html, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy(page)["script-src"] == [f"'sha256-{digest}'" for digest in digests]
    return scripts


def test_every_chart_is_drawn_by_the_page(page):
    places = [attributes["data-root-id"] for tag, attributes in page.tags if "data-root-id" in attributes]
    assert len(set(places)) == 11 == page.html.count("<details")
    assert all(place in allowed_scripts(page)[-1] for place in places)


def test_charts_over_steps_zoom_together(tmp_path):
    page = Page(make_run(tmp_path / "a"), make_run(tmp_path / "b", num_steps=12))
    starts = re.findall(r'"start":1.0,"end":12.0\b', allowed_scripts(page)[-1])
    assert len(starts) == 1  # one horizontal range for nine charts


def test_reference_distribution(page):
    chart = page.chart("Pairs by log-probability, in nats")
    assert "chosen, median <b>-15</b>" in chart
    assert "rejected, median <b>-7</b>" in chart
    assert "chosen is the likelier response in 9.1% of the pairs" in page.html


def test_against_draws_both_on_the_same_axes(tmp_path):
    faster = {**RECIPE, "optim": {"lr": 5e-6, "clip_grad_norm": 1.0}, "objective": {**RECIPE["objective"], "beta": 1}}
    mine = make_run(tmp_path / "mine")
    other = make_run(tmp_path / "other", num_steps=12, recipe=faster, s12={"reward_margin": 40.0})
    page = Page(mine, other)
    margin = page.chart("Reward margin")
    assert "mine <b>4.08</b>" in margin
    assert "other <b>40</b>" in margin
    curves = drawn(charts_of(mine, other)["Reward margin"])
    assert curves[0] == curves[1][:9]  # the same values at the same places
    assert dict(page.values("Reward margin"))[9] == ["4.08", "4.08"]
    assert dict(page.values("Reward margin"))[12] == ["", "40"]
    rows = [re.sub(r"<[^>]+>", " ", line).split() for line in re.findall(r"<tr>.*?</tr>", page.html)]
    assert ["optim.lr", "1e-06", "5e-06"] in rows
    assert ["objective.beta", "0.1", "1"] in rows
    assert not any(cells and cells[0] == "train.epochs" for cells in rows)
    assert "mine against other" in page.all_text
    assert not (other / "report.html").exists()


def test_against_a_run_without_steps_and_one_of_the_same_name(tmp_path):
    mine, empty = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", num_steps=0)
    page = Page(mine, empty)
    assert f"{empty}: no step was finished" in page.all_text
    assert f"{mine} against {empty}" in page.all_text
    assert len(page.values("Loss")) == 9


def test_long_runs_stay_quick_and_small(tmp_path):
    run = make_run(tmp_path / "run", num_steps=10_000, s7777={"grad_norm": 5000.0})
    start = time.process_time()
    path = write_report(run)
    assert time.process_time() - start < 2
    assert path.stat().st_size < 2_000_000  # 1.27 MB of it are BokehJS


def test_needs_neither_torch_nor_megatron(tmp_path):
    make_run(tmp_path / "run")
    program = (
        "import sys; from pathlib import Path; from spot_megatron.report import write_report\n"
        "assert not {'jinja2', 'bokeh'} & set(sys.modules)\n"
        "write_report(Path(sys.argv[1]))\n"
        "print({'torch', 'megatron', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


def test_validation_is_drawn_beside_training(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    add_validations(run)
    charts = {chart.title.split(":")[0]: chart for chart in learning_charts([read_run(run)], ["run"])}
    assert charts["Loss"].columns == ["step", "last", "validation"]
    assert next(row for row in charts["Loss"].rows if row[2]) == ["0", "", "1.5"]
    assert charts["Reward margin"].columns[-1] == charts["Reward accuracy"].columns[-1] == "validation"
    assert [row[1] for row in charts["Probe"].rows] == ["0", "-0.01", "-0.2"]
    both = {chart.title: chart for chart in learning_charts([read_run(other), read_run(run)], ["other", "run"])}
    assert both["Loss"].columns == ["step", "other", "run", "run, validation"]
    assert "Probe" not in {chart.title.split(":")[0] for chart in learning_charts([read_run(other)], ["other"])}
