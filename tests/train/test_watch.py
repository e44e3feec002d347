"""Warnings about runs whose numbers are finite: they come when they should, once, and the same after a resume."""

from __future__ import annotations

import numpy as np
import pytest

from spot_megatron.train.watch import PROBE_FALL, WINDOW, Watch


def healthy(num_steps: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "loss": 1.4 - 0.01 * step + rng.normal(0, 0.02),
            "reward_chosen": 0.01 * step + rng.normal(0, 0.005),
            "reward_margin": 0.02 * step + rng.normal(0, 0.005),
        }
        for step in range(1, num_steps + 1)
    ]


def names(rows, watch=None) -> list[list[str]]:
    watch = watch or Watch()
    return [sorted(watch.look(row)) for row in rows]


def test_a_healthy_run_has_no_warning():
    assert not any(names(healthy(200)))


@pytest.mark.parametrize("step", [12, 60])
def test_a_spike(step):
    rows = healthy(80)
    rows[step]["loss"] += 0.5
    found = names(rows)
    assert found[step] == ["loss_spike"]
    assert sum(map(len, found)) == 1


def test_chosen_falls_while_the_margin_grows():
    rows = healthy(60)
    for row in rows:
        row["reward_chosen"] *= -1
    found = names(rows)
    assert sum(map(len, found)) == 1, "the warning comes when it begins, not at every step"
    assert found[15] == ["chosen_falls"]
    for row in rows:
        row["reward_margin"] *= -1  # both fall: no sign of an objective that is met
    assert not any(names(rows))


def test_a_resumed_run_warns_as_if_it_had_not_stopped():
    rows = healthy(60)
    rows[45]["loss"] += 0.5
    for row in rows:
        row["reward_chosen"] *= -1
    whole = names(rows)
    for stop in (3, 14, 15, 16, WINDOW, 44, 45, 46):
        assert names(rows[stop:], Watch(rows[:stop])) == whole[stop:], stop


def validations(*changes: float) -> list[dict]:
    return [{"step": step, "probe_change": change} for step, change in enumerate(changes)]


def test_a_probe_that_falls_while_the_margin_grows():
    """Once a run, beyond the threshold only, and not again after a resume."""
    watch = Watch(healthy(30))
    found = [watch.look_at_validation(row) for row in validations(0.0, -0.9 * PROBE_FALL, -1.1 * PROBE_FALL, -1.0)]
    assert [sorted(each) for each in found] == [[], [], ["probe_falls"], []]
    assert "lost 0.110 nats a token" in found[2]["probe_falls"]
    resumed = Watch(healthy(30), [{"step": 2, "probe_change": -1.0, "warnings": ["probe_falls"]}])
    assert not resumed.look_at_validation({"step": 3, "probe_change": -1.0})


@pytest.mark.parametrize("rows", [[], [{**row, "reward_margin": -0.01} for row in healthy(30)]])
def test_a_probe_that_falls_without_a_margin_is_no_forgetting(rows):
    assert not Watch(rows).look_at_validation({"step": 1, "probe_change": -1.0})


def test_a_validation_without_a_probe_has_no_warning():
    assert not Watch(healthy(30)).look_at_validation({"step": 1, "loss": 5.0})
