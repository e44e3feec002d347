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


class Watch:
    """Compares each step with the steps before it.

    loss_spike         the loss lies SPIKE standard deviations above the mean of the last WINDOW steps
    chosen_falls       over the last WINDOW steps the chosen reward falls below 0 while the margin grows: the objective
                       is met by making both responses less likely
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """`rows`: the metrics of the steps before, of a resumed run."""
        self._rows: deque[Mapping[str, Any]] = deque(rows, maxlen=WINDOW)
        self._falls = self._chosen_falls(list(self._rows))

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
