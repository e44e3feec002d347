"""Pairs for the tests of this folder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from spot_megatron.data.records import Pair, TokenPair
from spot_megatron.data.template import TokenizedPairs, tokenize_pairs


def token_pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], id: str = "p") -> TokenPair:
    prompt_ids, chosen_ids, rejected_ids = (np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
    return TokenPair(id, prompt_ids, chosen_ids, rejected_ids, source="pairs.jsonl:1")


def token_pairs(max_length: int = 6) -> st.SearchStrategy[TokenPair]:
    """Short pairs over three tokens, so that responses often share a prefix or are one of each other."""
    ids = st.lists(st.integers(1, 3), min_size=1, max_size=max_length)
    sides = st.tuples(ids, ids).filter(lambda both: both[0] != both[1])
    return st.builds(lambda prompt, both: token_pair(prompt, *both), ids, sides)


def long_pairs(num_pairs: int, rng: np.random.Generator) -> list[TokenPair]:
    """Pairs of about 5,000 tokens (two sequences), a third of each response shared."""
    pairs = []
    for number in range(num_pairs):
        prompt, shared, chosen, rejected = (
            rng.integers(0, 150_000, size, dtype=np.int32) for size in (200, 800, 1500, 1500)
        )
        sides = np.concatenate([shared, chosen]), np.concatenate([shared, rejected])
        pairs.append(TokenPair(str(number), prompt, *sides, source=f"pairs.jsonl:{number + 1}"))
    return pairs


def pair(**changes: Any) -> Pair:
    fields: dict[str, Any] = {"id": "a", "prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}
    return Pair(**(fields | {"source": "pairs.jsonl:1"} | changes))


def tokenize(tokenizer: PreTrainedTokenizerBase | None, *records: Any, **changes: Any) -> TokenizedPairs:
    options: dict[str, Any] = {"max_tokens": 1000, "enable_thinking": False}
    return tokenize_pairs(records, tokenizer, **(options | changes))
