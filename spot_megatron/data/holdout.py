"""Held-out pairs: a share of the pairs, by a hash of the prompt."""

import hashlib
import json
from collections.abc import Sequence

from spot_megatron.data.records import Pair, TokenPair
from spot_megatron.errors import PairError

Record = Pair | TokenPair


def prompt_digest(record: Record) -> bytes:
    """SHA-256 of the prompt as it is written in the file, before any template: its messages and tools, or its ids."""
    if isinstance(record, TokenPair):
        return hashlib.sha256(record.prompt_ids.astype("<i4").tobytes()).digest()
    prompt = [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt
    content = [prompt, record.tools] if record.tools else [prompt]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).digest()


def hold_out(records: Sequence[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records in order. Held out are those whose prompt's digest is below `fraction` of its range.

    All records of a prompt are on one side. A prompt is on the same side whatever else the files hold, and a larger
    fraction holds out all that a smaller one does.

    Raises:
        PairError: a side is left without a pair.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        position = int.from_bytes(prompt_digest(record)[:8], "big") / 2**64
        sides[position < fraction].append(record)
    if not all(sides):
        side, remedy = ("held out", "raise") if sides[0] else ("left to train on", "lower")
        raise PairError(
            f"validation.fraction={fraction:g}: none of the {len(records)} pairs of data.pairs is {side}; {remedy} it, "
            "or give held-out pairs of their own with validation.pairs"
        )
    return sides
