"""The reward shift d of SPoT-BCO: a moving average of (mean r+ + mean r-) / 2, kept as state.

| kind | d after batches with means m_1 ... m_k | used for batch k |
|---|---|---|
| none | 0 | 0 |
| ema | decay d + (1 - decay) m_k, from 0 | before m_k enters |
| cumulative | (m_1 + ... + m_k) / k | before m_k enters |
| cumulative_inclusive | the same, over micro-batches | after m_k enters, as TRL 0.20's bco_pair does |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RewardShift:
    """`value` applies to the next batch, in units of the reward. One object per run, equal on every rank."""

    kind: str
    decay: float
    value: float = 0.0
    num_updates: int = 0

    def update(self, mean_reward: float) -> None:
        """Adds (mean r+ + mean r-) / 2 of a global batch, or of a micro-batch if inclusive."""
        self.num_updates += 1
        if self.kind == "ema":
            self.value = self.decay * self.value + (1 - self.decay) * mean_reward
        elif self.kind in ("cumulative", "cumulative_inclusive"):
            self.value += (mean_reward - self.value) / self.num_updates

    @property
    def moves_inside_batch(self) -> bool:
        return self.kind == "cumulative_inclusive"

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.value, self.num_updates = float(state["value"]), int(state["num_updates"])
