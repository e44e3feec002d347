"""Warnings about runs whose numbers are finite: they come when they should, once, and the same after a resume."""

from __future__ import annotations

import numpy as np
import pytest

from spot_megatron.train.watch import WINDOW, Watch


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
