"""Token ids of preference pairs -> packs: positions, attention, and which position predicts which target.

A pair shares its prompt and its response up to the first edit. The shared layout computes that prefix once:

    P = prompt + shared response      C = rest of the chosen response      R = rest of the rejected response

    positions of a pack    [ P1 C1 | P2 C2 | ... | R1 | R2 | ... | pad ]
                             `---- call 1 ----'    `---- call 2 ----'

Call 1 is plain causal attention over every [Pi Ci]. In call 2 the queries are Ri, and keys and values are [Pi Ri],
gathered, under a causal mask aligned to the bottom right. The position ids of both suffixes continue those of P, and R
does not attend to C, so every token has the same context as in a sequence of its own: loss and gradients equal those of
two sequences. The separate layout [ P1 C1 | P1 R1 | P2 C2 | ... | pad ] is the plain form of the same pack, without
call 2.

The last position of P predicts the first token of C *and* the first token of R. One shifted label a position cannot
express that, so the head gathers `head_position`, in which that position occurs twice, and scores `head_target`. Prompt
tokens are never targets.

A pair without rejected tokens is a single sequence [ P C ] in the shared layout: a text of a probe.

Shapes: T positions of a pack with padding, S scored targets, B pairs, Q sequences of call 1, R sequences of call 2,
K gathered keys of call 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spot_megatron.data.records import TokenPair
from spot_megatron.objective.segments import NUM_SEGMENTS

Layout = Literal["shared", "separate"]


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch of complete pairs (shapes: see the module).

    Every position belongs to exactly one sequence of one call; num_main + num_suffix == T. Padding is a separate causal
    sequence at the end of the last call (call 2 if it has sequences, else call 1). It attends only to itself and is
    never scored. No sequence is empty; without call 2, cu_suffix_q and cu_suffix_k are [0].
    """

    input_ids: np.ndarray  # [T] int64
    position_ids: np.ndarray  # [T] int64, index in the pair's own two sequences; padding counts from 0
    cu_main: np.ndarray  # [Q+1] int32, call 1: sequence q is positions cu_main[q] to cu_main[q+1]
    cu_suffix_q: np.ndarray  # [R+1] int32, call 2: queries of sequence r are num_main + cu_suffix_q[r] to [r+1]
    cu_suffix_k: np.ndarray  # [R+1] int32, call 2: its keys are suffix_k_position[cu_suffix_k[r] to [r+1]]
    suffix_k_position: np.ndarray  # [K] int64, positions of the keys, each at most once
    num_main: int  # positions of call 1, the first of the pack
    num_suffix: int  # positions of call 2, the rest
    head_position: np.ndarray  # [S] int64, the position whose output predicts the target
    head_target: np.ndarray  # [S] int64, token id
    head_segment: np.ndarray  # [S] int64, NUM_SEGMENTS * pair + SHARED, CHOSEN or REJECTED (objective/segments.py)
    pair_index: np.ndarray  # [B] int64, index in the dataset
    num_chosen: np.ndarray  # [B] int64, scored tokens of the chosen response, shared ones included
    num_rejected: np.ndarray  # [B] int64, scored tokens of the rejected response, shared ones included
    num_tokens: int  # tokens of the separate layout, without padding
    num_unique_tokens: int  # tokens of this layout, without padding

    @property
    def num_scored(self) -> int:
        """Response tokens of both sides of all pairs."""
        return int(self.num_chosen.sum() + self.num_rejected.sum())


def num_shared_tokens(pair: TokenPair) -> int:
    """Length of the common prefix of both responses, in tokens."""
    length = min(len(pair.chosen_ids), len(pair.rejected_ids))
    differs = pair.chosen_ids[:length] != pair.rejected_ids[:length]
    return int(differs.argmax()) if differs.any() else length


def num_positions(pair: TokenPair, layout: Layout) -> int:
    """Positions of the pair in a pack, without padding."""
    return positions_and_products(pair, layout)[0]


def positions_and_products(pair: TokenPair, layout: Layout) -> tuple[int, int]:
    """(positions of the pair in a pack, key-query products of its causal attention): its work in the layers."""
    num_prompt, num_chosen, num_rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    if layout == "separate":
        prefix, main, suffix = 0, num_prompt + num_chosen, num_prompt + num_rejected
    else:
        num_shared = num_shared_tokens(pair)
        prefix, main, suffix = num_prompt + num_shared, num_prompt + num_chosen, num_rejected - num_shared
    return main + suffix, main * (main + 1) // 2 + suffix * prefix + suffix * (suffix + 1) // 2


def num_targets(pair: TokenPair, layout: Layout) -> int:
    """Scored targets of the pair: its work in the LM head."""
    num_shared = num_shared_tokens(pair) if layout == "shared" else 0
    return len(pair.chosen_ids) + len(pair.rejected_ids) - num_shared


def build_pack(
    pairs: Sequence[TokenPair], indices: Sequence[int], layout: Layout, multiple_of: int, pad_id: int
) -> Pack:
    """Packs `pairs`, whose indices in the dataset are `indices`, in this order.

    T is padded to a multiple of `multiple_of`. Without pairs the pack is `multiple_of` positions of padding and nothing
    is scored: every rank needs the same number of micro-batches, including ranks with fewer pairs.
    """
    assert len(pairs) == len(indices), f"{len(pairs)} pairs, {len(indices)} indices"
    assert multiple_of >= 1
    assert layout in ("shared", "separate")

    # Tokens of each pair [B]; `own` is R, the rejected tokens that are not shared (all of them in the separate layout).
    prompt, chosen, rejected = _count_tokens(pairs)
    shared = np.array([num_shared_tokens(pair) if layout == "shared" else 0 for pair in pairs], dtype=np.int64)
    prefix, own = prompt + shared, rejected - shared

    # Positions of each pair [B]: of the first chosen token, of R's first token, and of the one that predicts R's first
    # token. Of each sequence: its length, by call, and its first position id.
    if layout == "shared":
        has_own = own > 0
        main, queries, keys = prompt + chosen, own[has_own], (prefix + own)[has_own]
        chosen_row, own_row = _starts(main) + prompt, main.sum() + _starts(own)
        branch_row = chosen_row + shared - 1
        key_rows = _ranges(_interleave(chosen_row - prompt, own_row), _interleave(prefix * has_own, own))
        tokens = [ids for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids)]
        tokens += [pair.rejected_ids[n:] for pair, n in zip(pairs, shared, strict=True)]
        first_position = np.concatenate([np.zeros_like(main), prefix[has_own]])
    else:
        main = _interleave(prompt + chosen, prompt + rejected)
        queries = keys = key_rows = np.zeros(0, dtype=np.int64)
        chosen_row, own_row = _starts(main).reshape(-1, 2).T + prompt
        branch_row = own_row - 1
        tokens = [ids for p in pairs for ids in (p.prompt_ids, p.chosen_ids, p.prompt_ids, p.rejected_ids)]
        first_position = np.zeros_like(main)

    num_rows = int(main.sum() + queries.sum())
    num_padding = -num_rows % multiple_of if pairs else multiple_of
    if num_padding:
        tokens.append(np.full(num_padding, pad_id))
        first_position = np.append(first_position, 0)
        if len(queries):
            queries, keys = np.append(queries, num_padding), np.append(keys, num_padding)
            key_rows = np.append(key_rows, np.arange(num_rows, num_rows + num_padding))
        else:
            main = np.append(main, num_padding)

    return Pack(
        input_ids=np.concatenate(tokens, dtype=np.int64),
        position_ids=_ranges(first_position, np.concatenate([main, queries])),
        cu_main=_cumulative(main),
        cu_suffix_q=_cumulative(queries),
        cu_suffix_k=_cumulative(keys),
        suffix_k_position=key_rows,
        num_main=int(main.sum()),
        num_suffix=int(queries.sum()),
        head_position=_ranges(
            np.stack([chosen_row - 1, branch_row, own_row], axis=1).ravel(),
            np.stack([chosen, np.minimum(own, 1), np.maximum(own - 1, 0)], axis=1).ravel(),
        ),
        head_target=_concatenate(
            [ids for pair, n in zip(pairs, shared, strict=True) for ids in (pair.chosen_ids, pair.rejected_ids[n:])]
        ),
        head_segment=np.repeat(
            np.arange(NUM_SEGMENTS * len(pairs)), np.stack([shared, chosen - shared, own], axis=1).ravel()
        ),
        pair_index=np.array(indices, dtype=np.int64),
        num_chosen=chosen,
        num_rejected=rejected,
        num_tokens=int((2 * prompt + chosen + rejected).sum()),
        num_unique_tokens=num_rows,
    )


def _count_tokens(pairs: Sequence[TokenPair]) -> np.ndarray:
    """[3, B] int64: tokens of each pair's prompt, chosen and rejected response; only the last may be empty."""
    counts = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    assert all(min(count[:2]) > 0 for count in counts), "a pair has an empty prompt or chosen response"
    return np.array(counts, dtype=np.int64).reshape(-1, 3).T


def _concatenate(ids: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(ids, dtype=np.int64) if ids else np.zeros(0, dtype=np.int64)


def _interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).ravel()


def _starts(lengths: np.ndarray) -> np.ndarray:
    """The start of each of consecutive sequences."""
    return np.cumsum(lengths) - lengths


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)], dtype=np.int32, casting="same_kind")


def _ranges(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of the ranges first, first + 1, ..., first + length - 1."""
    return np.repeat(firsts - _starts(lengths), lengths) + np.arange(lengths.sum())
