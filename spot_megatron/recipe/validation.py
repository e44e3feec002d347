"""The recipe's section about validation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from spot_megatron.recipe.section import Section


class Validation(Section):
    """Held-out pairs and texts to keep, measured before the first update and while training. No effect on updates."""

    pairs: str | list[str] | None = Field(
        None, description="File or files of held-out pairs, in the format of data.pairs. null: none."
    )
    fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of data.pairs that is held out instead, by a hash of the prompt: all pairs of a prompt are "
        "on one side, and a prompt is on the same side in every run. 0: none.",
    )
    probe: str | None = Field(
        None,
        description='JSONL of {"prompt", "response"}: texts that the model should keep; their mean log-probability a '
        "token is compared with the initial model's. null: none.",
    )
    every_steps: int = Field(50, ge=1, description="Steps between validations; the last step is validated too.")
    keep_best: Literal["loss", "reward_accuracy", "reward_margin", "probe"] | None = Field(
        None,
        description="Keeps the checkpoint of the validation with the lowest loss, or the highest reward accuracy, "
        "reward margin or probe_change, besides those of checkpoint.keep, and exports it. null: the last step is "
        "exported.",
    )
    patience: int | None = Field(
        None, ge=1, description="Ends the run after this many validations in a row without a better one. null: never."
    )

    @property
    def pair_files(self) -> list[Path]:
        return [Path(file) for file in ([self.pairs] if isinstance(self.pairs, str) else self.pairs or [])]

    @property
    def holds_out_pairs(self) -> bool:
        return bool(self.pair_files) or self.fraction > 0
