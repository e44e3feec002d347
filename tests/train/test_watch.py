"""Warnings about runs whose numbers are finite: a loss that jumps, chosen responses that become less likely."""

from __future__ import annotations

import numpy as np

from spot_megatron.train.watch import FEWEST, WINDOW, Watch


def steps(count: int, chosen_slope: float = 0.01, rejected_slope: float = -0.02) -> list[dict[str, float]]:
    """Metrics with some noise, from equal rewards on."""
    noise = np.random.default_rng(0).normal(0, 0.01, (count, 3))
    chosen, rejected = chosen_slope * np.arange(count) + noise[:, 0], rejected_slope * np.arange(count) + noise[:, 1]
    return [
        {"loss": 1.0 + e, "reward_chosen": c, "reward_rejected": r, "reward_margin": c - r}
        for c, r, e in zip(chosen.tolist(), rejected.tolist(), noise[:, 2].tolist(), strict=True)
    ]


def test_an_ordinary_run_has_no_warning():
    watch = Watch()
    assert [found for row in steps(3 * WINDOW) if (found := watch.look(row))] == []


def test_a_loss_that_jumps_is_named():
    rows = steps(WINDOW)
    assert "loss 9.0000" in Watch(rows).look(rows[-1] | {"loss": 9.0})["loss_spike"]
    assert not Watch(rows).look(rows[-1] | {"loss": 1.03})
    assert not Watch(rows[: FEWEST - 1]).look(rows[-1] | {"loss": 9.0}), "too few steps to compare with"


def test_chosen_rewards_that_fall_are_named_once():
    watch = Watch()
    found = [watch.look(row) for row in steps(2 * WINDOW, chosen_slope=-0.05, rejected_slope=-0.2)]
    assert [list(names) for names in found if names] == [["chosen_falls"]]


def test_a_resumed_run_does_not_repeat_a_warning():
    rows = steps(2 * WINDOW, chosen_slope=-0.05, rejected_slope=-0.2)
    resumed = Watch(rows[:WINDOW])
    assert [found for row in rows[WINDOW:] if (found := resumed.look(row))] == []
