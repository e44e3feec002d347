"""Weighted mixing of pair files: counts, coverage over epochs, and no change without weights."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_megatron.data.mixture import epoch_pairs, mix_files
from spot_megatron.data.records import TokenPair
from spot_megatron.data.sampler import BatchSampler
from spot_megatron.errors import PairError
from tests.data.pairs import token_pair


def pairs_of(**counts: int) -> list[TokenPair]:
    """Pairs of files a, b, ..., as many as given, file by file."""
    numbered = [(file, line) for file, count in counts.items() for line in range(1, count + 1)]
    return [replace(token_pair([1], [2], [3]), id=f"{f}{n}", source=f"data/{f}:{n}") for f, n in numbered]


def sampler(pairs: list[TokenPair], weights: dict[Path, float] | None, **changes: object) -> BatchSampler:
    options: dict[str, object] = {
        "batch_pairs": 4, "epochs": 3, "order": "shuffled", "seed": 7, "max_steps": None, "dp_size": 2,
        "tokens_per_microbatch": 40, "pairs_per_microbatch": None,
    }  # fmt: skip
    shares = None if weights is None else mix_files(pairs, weights)
    sizes = np.full(len(pairs), 3)
    return BatchSampler(sizes, sizes.astype(float), shares=shares, **(options | changes))  # type: ignore[arg-type]


def shown(batches: BatchSampler) -> list[int]:
    plans = [batches.plan(step) for step in range(batches.num_steps)]
    return [index for plan in plans for rank in plan for members in rank for index in members]


A, B = Path("data/a"), Path("data/b")


def test_counts_of_an_epoch() -> None:
    pairs = pairs_of(a=6, b=10, c=3)
    shares = mix_files(pairs, {A: 2, B: 0.5})
    assert [(share.file, share.per_epoch) for share in shares] == [("data/a", 12), ("data/b", 5), ("data/c", 3)]
    counts = Counter(epoch_pairs(shares, seed=1, epoch=0).tolist())
    assert [counts[i] for i in range(6)] == [2] * 6
    assert sum(counts[i] for i in range(6, 16)) == 5
    assert [counts[i] for i in range(16, 19)] == [1] * 3


@given(st.integers(1, 12), st.floats(0.1, 3.5), st.integers(0, 5))
def test_no_pair_is_repeated_before_all_others_were_shown(count: int, weight: float, seed: int) -> None:
    pairs = pairs_of(a=count)
    if round(weight * count) == 0:
        return
    shares = mix_files(pairs, {A: weight})
    total: Counter[int] = Counter()
    for epoch in range(6):
        total.update(epoch_pairs(shares, seed, epoch).tolist())
        times = [total[i] for i in range(count)]
        assert max(times) - min(times) <= 1
        assert sum(times) == (epoch + 1) * round(weight * count)


def test_fractions_differ_from_epoch_to_epoch_and_by_seed() -> None:
    shares = mix_files(pairs_of(a=40), {A: 0.5})
    first, second = (epoch_pairs(shares, 1, epoch).tolist() for epoch in (0, 1))
    assert sorted(first + second) == list(range(40))
    assert epoch_pairs(shares, 2, 0).tolist() != first


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_batches_hold_every_pair_as_often_as_its_weight_says(order: str) -> None:
    pairs = pairs_of(a=6, b=10)
    batches = sampler(pairs, {A: 2, B: 0.5}, order=order, epochs=2)
    assert batches.num_steps == 2 * 5  # 12 + 5 pairs an epoch, 4 a batch
    counts = Counter(shown(batches))
    assert [counts[i] for i in range(16)] == [4] * 6 + [1] * 10
    again = sampler(pairs, {A: 2, B: 0.5}, order=order, epochs=2)  # a resume plans any step by itself
    for step in (7, 2, 9, 0):
        assert again.plan(step) == batches.plan(step)


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_equal_weights_change_nothing(order: str) -> None:
    pairs = pairs_of(a=6, b=5)
    plain, weighted = (sampler(pairs, weights, order=order) for weights in (None, {A: 1, B: 1.0}))
    assert [plain.plan(step) for step in range(plain.num_steps)] == [weighted.plan(s) for s in range(plain.num_steps)]


def test_a_weight_that_shows_no_pair() -> None:
    with pytest.raises(PairError, match=r"data/b: .* weight 0\.01, which shows none of its 10 pairs"):
        mix_files(pairs_of(a=6, b=10), {B: 0.01})
