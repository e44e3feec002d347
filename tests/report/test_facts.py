"""Headline, checks and held-out accuracy of a run. About 3 s."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from spot_megatron.data.sampler import BatchSampler
from spot_megatron.report import facts
from spot_megatron.report.run import Score, read_run
from tests.report.runs import RECIPE, Page, add_validations, make_run, result, warnings_of


def test_named_warnings_are_shown_with_their_first_step(tmp_path):
    run = make_run(tmp_path / "run", s4={"warnings": ["loss_spike"]}, s6={"warnings": ["loss_spike", "chosen_falls"]})
    shown = warnings_of(Page(run))
    assert "loss_spike in 2 steps (first: step 4): the loss was far above" in shown
    assert "chosen_falls in 1 step (first: step 6): " in shown
    assert "loss_spike" not in warnings_of(Page(make_run(tmp_path / "calm")))


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
    assert re.search(r'<th scope="row">sums</th><td>-</td><td>75.0<small>3/4</small></td>', page.html)


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


def test_validation_is_among_the_facts(tmp_path):
    run = make_run(tmp_path)
    before = {fact.name for fact in facts.headline(read_run(run))}
    add_validations(run, keep_best="loss")
    found = {fact.name: fact.value for fact in facts.headline(read_run(run))}
    assert set(found) - before == {"validation loss", "probe", "best step"}
    assert (found["validation loss"], found["probe"], found["best step"]) == ("1.5 → 0.75", "-0.2", "4")
    assert any("probe_falls in 1 step (first: step 8)" in check.text for check in facts.checks(read_run(run)))


@pytest.mark.parametrize(
    ("keep_best", "patience", "ended"),
    [("loss", 1, True), ("loss", 2, False), ("loss", None, False), ("reward_margin", 1, True), (None, None, False)],
)
def test_a_run_without_patience_left_is_not_called_unfinished(tmp_path, keep_best, patience, ended):
    run = make_run(tmp_path, num_steps=8)  # of 9
    add_validations(run, keep_best=keep_best, patience=patience)
    [progress] = [check for check in facts.checks(read_run(run)) if "step 8 of 9" in check.text]
    assert (progress.level, "patience" in progress.text) == (("good", True) if ended else ("warn", False))


def test_the_best_probe_is_the_highest(tmp_path):
    run = make_run(tmp_path)
    add_validations(run, keep_best="probe")
    assert read_run(run).best_step == 4  # the one before the first update does not take part
