"""The page against the run's own files, hostile text, and runs that are not whole. About 5 s."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from spot_megatron.data.sampler import BatchSampler
from spot_megatron.errors import CheckpointError
from spot_megatron.report import facts, write_report
from spot_megatron.report.chart import MAX_BUCKETS, Curve, histogram, line_chart
from spot_megatron.report.run import Score, read_run
from spot_megatron.report.svg import BOTTOM, TOP, number, tick_labels

HOSTILE = "</pre></title><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7*7 }}"
RECIPE = {
    "name": "small",
    "output": "runs/small",
    "model": {"hf": "some/model"},
    "objective": {"name": "spot_bco", "beta": 0.1, "shift": {"kind": "ema", "decay": 0.9}},
    "train": {"batch_pairs": 4, "epochs": 3, "max_steps": None},
    "optim": {"lr": 1e-6, "clip_grad_norm": 1.0},
}


def row(step: int, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl, plausible and different at every step."""
    chosen, rejected = 0.3 * (step - 1), -0.21 * (step - 1)
    return {
        "step": step,
        "loss": 2 * math.log(2) * math.exp(-0.1 * (step - 1)),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": min(1.0, 0.25 * (step - 1)),
        "reward_shift": 0.01 * (step - 1),
        "grad_norm": 3.0 / step,
        "lr": 1e-7 * step,
        "pairs": 4,
        "tokens": 1000 + step,
        "unique_tokens": 700 + step,
        "seconds": 0.5 + 0.125 * step,
        **changes,
    }


def make_run(folder: Path, num_steps: int = 9, recipe: dict[str, Any] | None = None, **rows: dict[str, Any]) -> Path:
    """A run of 11 pairs in batches of 4 over 3 epochs: 9 steps. `rows`: s3={"loss": ...} changes step 3."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row(step, **rows.get(f"s{step}", {}))) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    pairs = [{"id": str(i), "logp_chosen": -10.0 - i, "logp_rejected": -12.0 + i} for i in range(11)]
    (folder / "reference.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def result(**skills: tuple[int, int]) -> dict[str, Any]:
    """What tools.eval tells of one model."""
    scores = {
        name: {"correct": correct, "total": total, "accuracy": correct / total, "cut": 0}
        for name, (correct, total) in skills.items()
    }
    return {"model": "folder", "seconds": 1.0, "skills": scores}


class Page(HTMLParser):
    """A written page as a browser takes it: its elements, and the text of those that a test asks for."""

    def __init__(self, folder: Path, *against: Path) -> None:
        super().__init__()
        self.html = write_report(folder, against).read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def all_text(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def cards(self) -> dict[str, tuple[str, str]]:
        found = re.findall(r'<dt>(.*?)</dt><dd><div class="value">(.*?)</div><small>(.*?)</small>', self.html)
        return {name: (value, note) for name, value, note in found}

    @property
    def checks(self) -> list[tuple[str, str]]:
        return re.findall(r'<li class="(\w+)">(.*?)</li>', self.html)

    def chart(self, title: str) -> str:
        return next(part for part in self.html.split("<figure>") if f"<h3>{title}</h3>" in part)

    def strips(self, title: str) -> list[tuple[int, list[str]]]:
        found = re.findall(r">step (\d+)((?:<tspan.*?</tspan>)*)</text>", self.chart(title))
        return [(int(step), re.findall(r">(.*?)</tspan>", values)) for step, values in found]


def warnings_of(page: Page) -> str:
    return "\n".join(text for level, text in page.checks if level == "warn")


def test_headline_numbers_are_those_of_the_metrics(tmp_path):
    page = Page(make_run(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
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
def test_every_step_shows_its_values(tmp_path, title, keys):
    strips = Page(make_run(tmp_path / "run")).strips(title)
    assert strips == [(step, [f"{row(step)[key]:.4g}" for key in keys]) for step in range(1, 10)]


def test_learning_rate_and_speed_per_step(tmp_path):
    page = Page(make_run(tmp_path / "run"))
    assert [float(values[0]) for _, values in page.strips("Learning rate")] == [row(s)["lr"] for s in range(1, 10)]
    rates = [float(values[0].replace(",", "")) for _, values in page.strips("Unique tokens/s")]
    expected = [row(s)["unique_tokens"] / row(s)["seconds"] for s in range(1, 10)]
    assert rates == pytest.approx(expected, rel=1e-3)


def points(chart_svg: str, css: str) -> list[list[tuple[float, float]]]:
    """The drawn pieces of a curve."""
    path = re.search(rf'<path class="line {css}" d="(.*?)"', chart_svg)
    assert path
    pieces = [piece for piece in path[1].split("M") if piece]
    return [[tuple(map(float, point.split())) for point in piece.split("L")] for piece in pieces]


def test_a_curve_is_drawn_where_its_values_are():
    chart = line_chart("t", [Curve("a", 0, [1, 2, 3, 5], [0.0, 1.0, 0.25, 0.5])], low=0, high=1)
    (piece,) = points(chart.svg, "c0")
    y = [y for _, y in piece]
    assert y == pytest.approx([BOTTOM - (BOTTOM - TOP) * value for value in (0, 1, 0.25, 0.5)], abs=0.06)
    x = [x for x, _ in piece]
    assert [(at - x[0]) / (x[-1] - x[0]) for at in x] == pytest.approx([0, 0.25, 0.5, 1], abs=1e-3)


def test_curves_that_span_decades_get_a_logarithmic_axis():
    chart = line_chart("t", [Curve("a", 0, [1, 2, 3], [1.0, 0.1, 0.01])], log_if_wide=True)
    (piece,) = points(chart.svg, "c0")
    assert piece[1][1] - piece[0][1] == pytest.approx(piece[2][1] - piece[1][1], abs=0.11)
    assert "logarithmic" in chart.note
    narrow = line_chart("t", [Curve("a", 0, [1, 2, 3], [1.0, 0.1, 0.0])], log_if_wide=True)
    assert "logarithmic" not in narrow.note


def test_loss_at_the_reference_and_clip_are_drawn(tmp_path):
    page = Page(make_run(tmp_path / "run"))
    assert "at the reference, 2 ln 2 <b>1.386</b>" in page.chart("Loss")
    assert "clip <b>1</b>" in page.chart("Gradient norm before clipping")
    for title, num_levels in (("Loss", 1), ("Gradient norm before clipping", 1), ("Reward margin", 0)):
        assert page.chart(title).count('<path class="level"') == num_levels
    assert ("good", "loss at step 1 is 1.386294, 2 ln 2 = 1.386294: the policy starts as its reference") in page.checks
    assert ("note", "the gradient was clipped to norm 1 in 2 of 9 steps") in page.checks
    assert page.chart("Loss").count('<path class="epoch"') == 2  # after steps 3 and 6


def test_objectives_without_such_a_value_have_no_line(tmp_path):
    recipe = {**RECIPE, "objective": {"name": "sft"}, "optim": {"clip_grad_norm": 0.0}}
    page = Page(make_run(tmp_path / "run", recipe=recipe))
    assert '<path class="level"' not in page.html
    assert not any("at step 1" in text or "clipped" in text for _, text in page.checks)


@pytest.mark.parametrize(
    ("epochs", "batch_pairs", "max_steps"), [(3, 4, None), (2, 11, None), (1, 64, None), (5, 3, 7), (2, 4, 100)]
)
def test_planned_steps_are_the_samplers(tmp_path, epochs, batch_pairs, max_steps):
    train = {"batch_pairs": batch_pairs, "epochs": epochs, "max_steps": max_steps}
    run = read_run(make_run(tmp_path / "run", recipe={**RECIPE, "train": train}))
    ones = np.ones(11, dtype=np.int64)
    sampler = BatchSampler(
        ones, ones, order="file", seed=0, dp_size=1, tokens_per_microbatch=100, pairs_per_microbatch=None, **train
    )
    assert run.planned_steps == sampler.num_steps
    assert run.steps_per_epoch == sampler.steps_per_epoch


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
        tags = {tag for tag, _ in page.tags}
        assert tags.isdisjoint({"script", "img", "iframe", "link", "object", "a"})
        assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)
        assert HOSTILE in page.all_text
    assert yaml.safe_load((run / "recipe.yaml").read_text())["name"] == HOSTILE


def test_page_asks_the_network_for_nothing(tmp_path):
    page = Page(make_run(tmp_path / "run"))
    assert not any({"src", "href", "xlink:href", "srcset"} & set(attributes) for _, attributes in page.tags)
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert "http" not in page.html.replace('http-equiv="Content-Security-Policy"', "")
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in page.tags
    ]


def test_a_killed_run_says_how_far_it_came(tmp_path):
    run = make_run(tmp_path / "run", num_steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')
    page = Page(run)
    assert "step 5 of 9: stopped early, or still running" in warnings_of(page)
    assert "metrics.jsonl: 1 of 6 lines left out" in page.all_text
    assert "first: line 6" in page.all_text
    assert page.cards["steps"][0] == "5 of 9"
    assert len(page.strips("Loss")) == 5


def test_a_single_step_is_a_dot(tmp_path):
    page = Page(make_run(tmp_path / "run", num_steps=1))
    assert page.html.count("<circle") == 10  # nine charts, one of them with two curves
    assert page.cards["final loss"] == ("1.386", "first 1.386; last 1 step: mean 1.386")


def test_rows_that_are_not_finite_are_gaps_and_are_told(tmp_path):
    changes = {"s4": {"loss": math.nan}, "s5": {"loss": math.inf, "grad_norm": None}, "s7": {"seconds": "x"}}
    page = Page(make_run(tmp_path / "run", **changes))
    assert "loss is missing or not finite in 2 steps (first: step 4)" in warnings_of(page)
    assert "grad_norm is missing or not finite in 1 step (first: step 5)" in warnings_of(page)
    assert "seconds is missing or not finite in 1 step (first: step 7)" in warnings_of(page)
    loss = page.chart("Loss")
    assert [len(piece) for piece in points(loss, "c0")] == [3, 4]
    assert loss.count('class="gap"') == 2
    assert "2 values not finite" in loss
    assert dict(page.strips("Loss"))[4] == ["NaN"]
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


def test_damaged_files_are_told(tmp_path):
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


def test_losing_the_chosen_responses_is_a_warning(tmp_path):
    sinking = {f"s{step}": {"reward_chosen": -0.5} for step in range(2, 10)}
    assert "less likely to give the chosen responses" in warnings_of(Page(make_run(tmp_path / "a", **sinking)))
    assert warnings_of(Page(make_run(tmp_path / "b"))) == ""


def test_a_loss_that_does_not_start_at_the_reference_is_a_warning(tmp_path):
    page = Page(make_run(tmp_path / "run", s1={"loss": 1.2}))
    assert "loss at step 1 is 1.200000, not 2 ln 2 = 1.386294" in warnings_of(page)


def test_held_out_table(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation = {"base": result(sums=(60, 100), words=(100, 100)), "model": result(sums=(76, 100), words=(99, 100))}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = Page(run)
    assert page.cards["held-out accuracy"] == ("80.0 → 87.5%", "base → trained, 175/200")
    rows = [re.sub(r"<[^>]+>", " ", line).split() for line in re.findall(r"<tr.*?</tr>", page.html)]
    assert ["sums", "60.0", "60/100", "76.0", "76/100", "+16.0", "+3.1", "to", "+28.2"] in rows
    assert ["words", "100.0", "100/100", "99.0", "99/100", "-1.0", "-5.4", "to", "+2.8"] in rows
    assert rows[3][:6] == ["all", "2", "80.0", "160/200", "87.5", "175/200"]
    assert "<b>+16.0</b>" in page.html
    assert "<b>-1.0</b>" not in page.html  # its interval holds 0


def test_held_out_table_without_a_base(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps({"base": None, "model": result(sums=(3, 4))}))
    page = Page(run)
    assert page.cards["held-out accuracy"] == ("75.0%", "3/4")
    assert re.search(r"<td>sums</td><td>-</td><td>75.0<small>3/4</small></td>", page.html)


def test_interval_of_a_difference_is_newcombes():
    """His example (a) of 1998: 56/70 and 48/80 differ by 0.2, 0.0524 to 0.3339."""
    assert difference(48, 80, 56, 70) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference(5, 9, 5, 9)[0] == pytest.approx(-difference(5, 9, 5, 9)[1])


def difference(correct1: int, total1: int, correct2: int, total2: int) -> tuple[float, float]:
    return facts.difference_interval(Score(correct1, total1), Score(correct2, total2))


def test_dropped_pairs_are_shown_with_their_reasons(tmp_path):
    run = make_run(tmp_path / "run")
    assert "pairs dropped" not in Page(run).cards  # a run of 0.1
    (run / "dropped.json").write_text("{}")
    assert Page(run).cards["pairs dropped"] == ("0 of 11", "all pairs in the files are trained on")
    (run / "dropped.json").write_text(json.dumps({"no_change": ["a"], "too_long<": ["b", "c", "d"]}))
    assert Page(run).cards["pairs dropped"] == ("4 of 15", "3 too_long&lt;, 1 no_change")
    (run / "reference.jsonl").unlink()
    assert Page(run).cards["pairs dropped"][0] == "4"
    for damaged in ("[1]", '{"a": 1}', "{"):
        (run / "dropped.json").write_text(damaged)
        page = Page(run)
        assert "pairs dropped" not in page.cards
        assert any(level == "note" and "dropped.json" in text for level, text in page.checks)


def test_reference_distribution(tmp_path):
    page = Page(make_run(tmp_path / "run"))
    chart = page.chart("Pairs by log-probability, in nats")
    assert "chosen, median <b>-15</b>" in chart
    assert "rejected, median <b>-7</b>" in chart
    assert "chosen is the likelier response in 9.1% of the pairs" in page.html


def test_histogram_counts_every_value():
    values = [0.0, 0.1, 0.1, 0.9, 1.0]
    svg = histogram("t", [("a", 0, values)], num_bins=10).svg
    tops = re.findall(r"L([\d.]+) ([\d.]+)", re.search(r'class="area c0" d="(.*?)"', svg)[1])[:-1]
    heights = [round((BOTTOM - float(y)) / (BOTTOM - TOP - 4) * 2) for _, y in tops[::2]]  # the tallest holds 2
    assert heights == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert histogram("t", [("a", 0, [math.nan])]).svg == ""
    assert "<path" in histogram("t", [("a", 0, [3.0, 3.0])]).svg


def test_against_draws_both_on_the_same_axes(tmp_path):
    faster = {**RECIPE, "optim": {"lr": 5e-6, "clip_grad_norm": 1.0}, "objective": {**RECIPE["objective"], "beta": 1}}
    mine = make_run(tmp_path / "mine")
    other = make_run(tmp_path / "other", num_steps=12, recipe=faster, s12={"reward_margin": 40.0})
    page = Page(mine, other)
    margin = page.chart("Reward margin")
    assert "mine <b>4.08</b>" in margin
    assert "other <b>40</b>" in margin
    assert points(margin, "c0")[0] == points(margin, "c1")[0][:9]  # the same values at the same places
    assert dict(page.strips("Reward margin"))[9] == ["4.08", "4.08"]
    assert dict(page.strips("Reward margin"))[12] == ["40"]
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
    assert len(page.strips("Loss")) == 9


def test_a_folder_that_is_no_run(tmp_path):
    run = make_run(tmp_path / "runs" / "mine")
    for folder in (tmp_path / "nowhere", tmp_path, run / "metrics.jsonl"):
        with pytest.raises(CheckpointError, match=r"is no run.*make train"):
            write_report(folder)
    with pytest.raises(CheckpointError, match=r"Runs inside it: .*mine"):
        write_report(tmp_path / "runs")
    with pytest.raises(CheckpointError, match="nowhere is no run"):
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


def test_long_runs_stay_quick_small_and_keep_their_spikes(tmp_path):
    run = make_run(tmp_path / "run", num_steps=10_000, s7777={"grad_norm": 5000.0})
    start = time.process_time()
    path = write_report(run)
    assert time.process_time() - start < 2
    assert path.stat().st_size < 1_500_000
    noisy = [math.sin(step) for step in range(10_000)]  # 0 on average
    noisy[7777] = 9.0
    chart = line_chart("t", [Curve("a", 0, range(10_000), noisy)], smooth=True)
    (raw,) = points(chart.svg, "c0 raw")
    assert len(raw) <= 2 * MAX_BUCKETS + 2
    assert min(y for _, y in raw) == pytest.approx(TOP + (BOTTOM - TOP) * 0.05 / 1.1, abs=0.06)  # the spike is the top
    (mean,) = points(chart.svg, "c0")
    middle = TOP + (BOTTOM - TOP) * (9.0 + 0.5) / 11.0
    assert [y for _, y in mean] == pytest.approx([middle] * len(mean), abs=1.0)  # and the mean has none
    assert "thick: mean over 335 steps" in chart.note


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


@pytest.mark.parametrize("ticks", [[1.3858, 1.386, 1.3862], [5e3, 1e4], [1e-6, 2e-6], [1_000_100.0, 1_000_200.0]])
def test_ticks_are_told_apart(ticks):
    assert len(set(tick_labels(ticks))) == len(ticks)


def test_needs_neither_torch_nor_megatron(tmp_path):
    make_run(tmp_path / "run")
    program = (
        "import sys; from pathlib import Path; from spot_megatron.report import write_report\n"
        "assert 'jinja2' not in sys.modules\n"
        "write_report(Path(sys.argv[1]))\n"
        "print({'torch', 'megatron', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"
