"""The pack against the definition of two plain sequences. Takes about 6 s.

`visibility` reads the two attention calls of a pack as a dense matrix, without knowing how the pack was built; every
check then compares what a row sees, or what the head scores, with the pair's own two sequences.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_megatron.data.pack import (
    Layout,
    Pack,
    build_pack,
    num_positions,
    num_shared_tokens,
    num_targets,
    positions_and_products,
)
from spot_megatron.data.records import TokenPair
from tests.data.pairs import long_pairs, token_pair, token_pairs

LAYOUTS: tuple[Layout, ...] = ("shared", "separate")
PAD = 0  # no pair holds it

packs_of = st.tuples(
    st.lists(token_pairs(), max_size=4), st.sampled_from(LAYOUTS), st.integers(1, 9)
)  # pairs, layout, multiple_of


def visibility(pack: Pack) -> np.ndarray:
    """[T, T] bool: row i attends to row j, from the arguments of the two varlen calls."""
    num_rows = len(pack.input_ids)
    sees = np.zeros((num_rows, num_rows), dtype=bool)
    queried = np.zeros(num_rows, dtype=int)
    calls = [(0, pack.cu_main, pack.cu_main, np.arange(pack.num_main))]
    calls.append((pack.num_main, pack.cu_suffix_q, pack.cu_suffix_k, pack.suffix_k_position))
    for first_row, cu_q, cu_k, key_rows in calls:
        assert cu_q[0] == cu_k[0] == 0
        assert len(cu_q) == len(cu_k)
        assert cu_k[-1] == len(key_rows)
        for sequence in range(len(cu_q) - 1):
            queries = first_row + np.arange(cu_q[sequence], cu_q[sequence + 1])
            keys = key_rows[cu_k[sequence] : cu_k[sequence + 1]]
            assert len(queries) > 0
            assert len(keys) >= len(queries)
            # Bottom right: the last query sees every key.
            sees[np.ix_(queries, keys)] = np.tri(len(queries), len(keys), len(keys) - len(queries), dtype=bool)
            queried[queries] += 1
    assert (queried == 1).all(), "every row is a query of exactly one call"
    return sees


def num_common(first: list[int], second: list[int]) -> int:
    length = 0
    while first[: length + 1] == second[: length + 1] and length < min(len(first), len(second)):
        length += 1
    return length


def defined_rows(pairs: list[TokenPair], layout: Layout, num_rows: int) -> list[tuple[int, str, int, int]]:
    """(pair, part, position, token) of every row, from the documented order; parts are P, C, R and pad."""
    rows: list[tuple[int, str, int, int]] = []

    def add(number: int, part: str, first: int, ids: np.ndarray) -> None:
        rows.extend((number, part, first + offset, token) for offset, token in enumerate(ids.tolist()))

    if layout == "separate":
        for number, pair in enumerate(pairs):
            add(2 * number, "P", 0, np.concatenate([pair.prompt_ids, pair.chosen_ids]))
            add(2 * number + 1, "P", 0, np.concatenate([pair.prompt_ids, pair.rejected_ids]))
    else:
        common = [num_common(pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) for pair in pairs]
        for number, (pair, n) in enumerate(zip(pairs, common, strict=True)):
            add(number, "P", 0, np.concatenate([pair.prompt_ids, pair.chosen_ids[:n]]))
            add(number, "C", len(pair.prompt_ids) + n, pair.chosen_ids[n:])
        for number, (pair, n) in enumerate(zip(pairs, common, strict=True)):
            add(number, "R", len(pair.prompt_ids) + n, pair.rejected_ids[n:])
    add(-1, "pad", 0, np.full(num_rows - len(rows), PAD))
    return rows


def scored(pack: Pack) -> list[Counter]:
    """Per segment: how often each (context tokens, target) is scored."""
    sees = visibility(pack)
    found: list[Counter] = [Counter() for _ in range(3 * len(pack.pair_index))]
    for row, target, segment in zip(pack.head_position, pack.head_target, pack.head_segment, strict=True):
        context = np.flatnonzero(sees[row])
        context = context[np.argsort(pack.position_ids[context], kind="stable")]
        assert (pack.position_ids[context] == np.arange(len(context))).all(), "positions run as in a plain sequence"
        scored_token = (*pack.input_ids[context].tolist(), -1, int(target))
        found[segment][scored_token] += 1
    return found


def plain(prompt: np.ndarray, response: np.ndarray) -> Counter:
    ids = [*prompt.tolist(), *response.tolist()]
    return Counter((*ids[:end], -1, ids[end]) for end in range(len(prompt), len(ids)))


def check_scoring(pack: Pack, pairs: list[TokenPair]) -> None:
    found = scored(pack)
    for number, pair in enumerate(pairs):
        shared, chosen, rejected = found[3 * number : 3 * number + 3]
        assert shared + chosen == plain(pair.prompt_ids, pair.chosen_ids)
        assert shared + rejected == plain(pair.prompt_ids, pair.rejected_ids)


@given(packs_of)
def test_rows_see_what_the_definition_says(arguments: tuple[list[TokenPair], Layout, int]) -> None:
    pairs, layout, multiple_of = arguments
    pack = build_pack(pairs, range(len(pairs)), layout, multiple_of, PAD)
    rows = defined_rows(pairs, layout, len(pack.input_ids))

    assert pack.input_ids.tolist() == [token for _, _, _, token in rows]
    assert pack.position_ids.tolist() == [position for _, _, position, _ in rows]
    sees = visibility(pack)
    for i, (pair, part, position, _) in enumerate(rows):
        for j, (other, other_part, other_position, _) in enumerate(rows):
            from_prefix = other_part == "P" and part in ("C", "R")
            expected = pair == other and (from_prefix or part == other_part) and other_position <= position
            assert sees[i, j] == expected, (i, j, rows[i], rows[j])


@given(packs_of)
def test_every_target_is_scored_in_the_context_of_its_own_sequence(
    arguments: tuple[list[TokenPair], Layout, int],
) -> None:
    pairs, layout, multiple_of = arguments
    pack = build_pack(pairs, range(len(pairs)), layout, multiple_of, PAD)
    check_scoring(pack, pairs)


@given(packs_of)
def test_counts_and_types(arguments: tuple[list[TokenPair], Layout, int]) -> None:
    pairs, layout, multiple_of = arguments
    indices = [7 * number + 3 for number in range(len(pairs))]
    pack = build_pack(pairs, indices, layout, multiple_of, PAD)
    num_rows = len(pack.input_ids)
    num_padding = num_rows - pack.num_unique_tokens

    assert num_rows % multiple_of == 0
    assert num_padding < multiple_of if pairs else num_rows == multiple_of
    assert (pack.input_ids == PAD).sum() == num_padding
    assert pack.num_unique_tokens == sum(num_positions(pair, layout) for pair in pairs)
    assert pack.num_tokens == sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert pack.num_main == pack.cu_main[-1]
    assert pack.num_main + pack.num_suffix == num_rows
    assert pack.num_suffix == pack.cu_suffix_q[-1]
    assert len(set(pack.suffix_k_position.tolist())) == len(pack.suffix_k_position)
    assert pack.pair_index.tolist() == indices
    assert pack.num_chosen.tolist() == [len(pair.chosen_ids) for pair in pairs]
    assert pack.num_rejected.tolist() == [len(pair.rejected_ids) for pair in pairs]
    if layout == "separate":
        assert pack.num_suffix == 0
        assert not (pack.head_segment % 3 == 0).any()
    int64 = (
        pack.input_ids,
        pack.position_ids,
        pack.suffix_k_position,
        pack.head_position,
        pack.head_target,
        pack.head_segment,
    )
    assert {array.dtype for array in (*int64, pack.pair_index, pack.num_chosen, pack.num_rejected)} == {np.dtype("i8")}
    assert {array.dtype for array in (pack.cu_main, pack.cu_suffix_q, pack.cu_suffix_k)} == {np.dtype("i4")}


@given(token_pairs(), st.sampled_from(LAYOUTS))
def test_work_counts_rows_visible_keys_and_targets(pair: TokenPair, layout: Layout) -> None:
    pack = build_pack([pair], [0], layout, 1, PAD)
    assert positions_and_products(pair, layout) == (len(pack.input_ids), visibility(pack).sum())
    assert num_targets(pair, layout) == len(pack.head_position)


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1], [2], 0),
        ([1, 2, 3], [1, 4, 3], 1),
    ],
)
def test_shared_response_ends_at_the_first_edit(chosen: list[int], rejected: list[int], shared: int) -> None:
    assert num_shared_tokens(token_pair([9], chosen, rejected)) == shared


def test_a_side_that_starts_the_other_has_no_suffix() -> None:
    pairs = [token_pair([5], [1, 2], [1, 2, 3]), token_pair([5], [1, 2, 3], [1, 2])]
    pack = build_pack(pairs, [0, 1], "shared", 1, PAD)
    assert pack.input_ids.tolist() == [5, 1, 2, 5, 1, 2, 3, 3]
    assert pack.cu_suffix_q.tolist() == [0, 1]
    assert pack.suffix_k_position.tolist() == [0, 1, 2, 7]
    # The second pair alone needs no second call, so its padding is in the first.
    pack = build_pack(pairs[1:], [1], "shared", 8, PAD)
    assert (pack.num_main, pack.num_suffix) == (8, 0)
    assert pack.cu_main.tolist() == [0, 4, 8]


def test_the_branch_row_is_scored_twice() -> None:
    pack = build_pack([token_pair([5, 6], [1, 2], [1, 3])], [0], "shared", 1, PAD)
    # rows: 5 6 1 | 2 | 3; row 2 (the shared 1) predicts both 2 and 3
    assert pack.head_position.tolist() == [1, 2, 2]
    assert pack.head_target.tolist() == [1, 2, 3]
    assert pack.head_segment.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pack: {
            "head_position": np.array([1, 2, 3, 4, 5])
        },  # the row before R in the buffer predicts R's first token
        lambda pack: {"position_ids": np.arange(len(pack.input_ids))},  # positions by row
        lambda pack: {"suffix_k_position": np.arange(pack.cu_suffix_k[-1])},  # R sees C
    ],
)
def test_the_check_of_scoring_finds_known_mistakes(wrong: Callable[[Pack], dict[str, Any]]) -> None:
    pair = token_pair([5, 6], [1, 2, 2], [1, 3, 3])
    pack = build_pack([pair], [0], "shared", 1, PAD)
    assert pack.head_position.tolist() == [1, 2, 3, 2, 5]
    check_scoring(pack, [pair])
    with pytest.raises(AssertionError):
        check_scoring(dataclasses.replace(pack, **wrong(pack)), [pair])


def test_packs_of_four_thousand_long_pairs_take_seconds() -> None:
    """20 million tokens; about 0.5 s of one core. A loop over tokens would take far longer than the limit."""
    pairs = long_pairs(4000, np.random.default_rng(0))
    start = time.process_time()
    num_rows = 0
    for first in range(0, len(pairs), 2):
        indices = [first, first + 1]
        num_rows += len(build_pack(pairs[first : first + 2], indices, "shared", 8, PAD).input_ids)
    assert num_rows == 4000 * 4000
    assert time.process_time() - start < 5
