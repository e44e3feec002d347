"""Named warnings about a run whose numbers are finite and still look wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

WINDOW = 20  # steps that the present one is compared with
FEWEST = 8  # steps before which nothing is compared
KEYS = ("loss", "reward_chosen", "reward_margin")  # of a row; all that is looked at
SPIKE = 6.0  # standard deviations above the window's mean
# Nats a token: a kept text of 100 tokens is then e^10 times less likely than to the initial model. Rounding in bf16
# moves the mean over a probe of 1,000 tokens by less than 0.001.
PROBE_FALL = 0.1


class Watch:
    """Compares each step with the steps before it.

    loss_spike         the loss lies SPIKE standard deviations above the mean of the last WINDOW steps
    chosen_falls       over the last WINDOW steps the chosen reward falls below 0 while the margin grows: the objective
                       is met by making both responses less likely
    probe_falls        in a validation the texts to keep have lost more than PROBE_FALL nats a token since the start,
                       while the mean margin of the last steps is above 0: the objective is met at their expense
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = (), validations: Iterable[Mapping[str, Any]] = ()) -> None:
        """`rows` and `validations`: those of the steps before, of a resumed run."""
        self._rows: deque[Mapping[str, Any]] = deque(rows, maxlen=WINDOW)
        self._falls = self._chosen_falls(list(self._rows))
        self._probe_fell = any("probe_falls" in row.get("warnings", ()) for row in validations)

    def look(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Name -> text of every warning about the step `row`, a row of metrics.jsonl."""
        found: dict[str, str] = {}
        if len(self._rows) >= FEWEST:
            losses = np.array([before["loss"] for before in self._rows])
            mean, deviation = losses.mean(), max(losses.std(), 1e-3 * abs(losses.mean()))
            score = (row["loss"] - mean) / deviation if deviation else 0.0
            if score > SPIKE:
                found["loss_spike"] = (
                    f"loss {row['loss']:.4f} is {score:.0f} standard deviations above the mean {mean:.4f} of the last "
                    f"{len(losses)} steps; if it recurs, lower optim.lr or optim.clip_grad_norm"
                )
        self._rows.append(row)
        falls = self._chosen_falls(list(self._rows))
        if falls and not self._falls:
            found["chosen_falls"] = (
                f"the chosen reward fell to {row['reward_chosen']:+.3f} while the margin grew to "
                f"{row['reward_margin']:+.3f}: chosen responses become less likely; lower optim.lr, or compare "
                "objective.name=spot_bce or reward_sft"
            )
        self._falls = falls
        return found

    def look_at_validation(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Name -> text of every warning about a validation, a row of validation.jsonl. Each is given once a run."""
        change = row.get("probe_change", 0.0)
        margin = np.mean([before["reward_margin"] for before in self._rows]) if self._rows else 0.0
        if self._probe_fell or change >= -PROBE_FALL or margin <= 0:
            return {}
        self._probe_fell = True
        return {
            "probe_falls": f"the texts of validation.probe have lost {-change:.3f} nats a token since the start, while "
            f"the margin grew to {margin:+.3f}: the model forgets what it should keep; lower optim.lr or train.epochs, "
            "or export an earlier step with validation.keep_best"
        }

    @staticmethod
    def _chosen_falls(rows: list[Mapping[str, Any]]) -> bool:
        """Whether both trends hold between the first and the second half of the window, beyond their noise."""
        if len(rows) < 2 * FEWEST:
            return False
        half = len(rows) // 2
        chosen, margin = (np.array([row[key] for row in rows]) for key in ("reward_chosen", "reward_margin"))

        def rise(values: np.ndarray) -> float:
            before, after = values[:half], values[half:]
            error = np.sqrt(before.var() / len(before) + after.var() / len(after))
            return float((after.mean() - before.mean()) / max(error, 1e-12))

        return chosen[half:].mean() < 0 and rise(chosen) < -2 and rise(margin) > 2
