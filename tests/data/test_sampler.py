"""Plans of global batches. Takes about 5 s."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spot_megatron.data.sampler import BatchSampler, deal
from spot_megatron.errors import PairError


def sampler(tokens: list[int] | np.ndarray, costs: np.ndarray | None = None, **changes: Any) -> BatchSampler:
    options: dict[str, Any] = {
        "batch_pairs": 8,
        "epochs": 2,
        "order": "shuffled",
        "seed": 1,
        "max_steps": None,
        "dp_size": 1,
        "tokens_per_microbatch": 100,
        "pairs_per_microbatch": None,
    }
    tokens = np.asarray(tokens)
    return BatchSampler(tokens, tokens.astype(float) if costs is None else costs, **(options | changes))


def flat(plan: list[list[list[int]]]) -> list[int]:
    return [pair for rank in plan for microbatch in rank for pair in microbatch]


options = st.fixed_dictionaries(
    {
        "batch_pairs": st.integers(1, 12),
        "epochs": st.integers(1, 3),
        "order": st.sampled_from(["shuffled", "file"]),
        "seed": st.integers(0, 2**40),
        "dp_size": st.integers(1, 5),
        "tokens_per_microbatch": st.integers(40, 120),
        "pairs_per_microbatch": st.none() | st.integers(1, 4),
        "shared_tokens": st.none() | st.integers(5, 120),
        "microbatch_multiple": st.integers(1, 3),
    }
)
token_counts = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(token_counts, options)
def test_every_pair_once_an_epoch_within_the_budget(tokens: list[int], arguments: dict[str, Any]) -> None:
    batches = sampler(tokens, **arguments)
    steps_per_epoch = -(-len(tokens) // arguments["batch_pairs"])
    assert batches.num_steps == steps_per_epoch * arguments["epochs"]
    seen: list[int] = []
    for step in range(batches.num_steps):
        plan = batches.plan(step)
        assert len(plan) == arguments["dp_size"]
        counts = {len(rank) for rank in plan}
        assert len(counts) == 1, "every rank has as many micro-batches"
        assert counts.pop() % arguments["microbatch_multiple"] == 0
        for rank in plan:
            for microbatch in rank:
                assert sum(tokens[pair] for pair in microbatch) <= arguments["tokens_per_microbatch"]
                assert len(microbatch) <= (arguments["pairs_per_microbatch"] or len(tokens))
                if len(microbatch) > 1:
                    assert sum(tokens[pair] for pair in microbatch) <= (arguments["shared_tokens"] or 10**6)
            if arguments["order"] == "shuffled" or arguments["pairs_per_microbatch"] is None:
                fewest_empty = max(0, len(rank) - sum(map(len, rank)))
                assert sum(not microbatch for microbatch in rank) == fewest_empty
        assert sorted(flat(plan)) == sorted(batches.batch(step))
        seen += flat(plan)
        if (step + 1) % steps_per_epoch == 0:
            assert sorted(seen) == list(range(len(tokens)))
            seen = []


@given(token_counts, options)
def test_a_plan_depends_on_arguments_and_step_only(tokens: list[int], arguments: dict[str, Any]) -> None:
    forwards, backwards = sampler(tokens, **arguments), sampler(tokens, **arguments)
    steps = range(forwards.num_steps)
    assert [forwards.plan(step) for step in steps] == [backwards.plan(step) for step in reversed(steps)][::-1]


@given(token_counts, options)
def test_the_batch_does_not_depend_on_the_parallel_layout(tokens: list[int], arguments: dict[str, Any]) -> None:
    one_rank = sampler(tokens, **(arguments | {"dp_size": 1, "pairs_per_microbatch": 1, "microbatch_multiple": 1}))
    batches = sampler(tokens, **arguments)
    for step in range(batches.num_steps):
        assert batches.batch(step) == one_rank.batch(step)


def test_epochs_and_seeds_have_permutations_of_their_own() -> None:
    batches, other = sampler([1] * 40, batch_pairs=40), sampler([1] * 40, batch_pairs=40, seed=2)
    orders = [batches.batch(0), batches.batch(1), other.batch(0), list(range(40))]
    assert len({tuple(order) for order in orders}) == 4


def test_the_shuffle_is_frozen() -> None:
    """A run resumed under another numpy must go on with the same batches."""
    assert sampler([1] * 10, batch_pairs=10, seed=1234).batch(0) == [2, 9, 8, 1, 7, 0, 4, 3, 5, 6]


def test_max_steps_ends_early_only() -> None:
    assert sampler([1] * 16, max_steps=3).num_steps == 3
    assert sampler([1] * 16, max_steps=9).num_steps == 4


def test_the_last_batch_of_an_epoch_has_what_is_left() -> None:
    assert [len(sampler([1] * 11).batch(step)) for step in range(4)] == [8, 3, 8, 3]


def test_file_order_fills_microbatches_exactly() -> None:
    batches = sampler([1] * 20, batch_pairs=8, order="file", pairs_per_microbatch=2)
    assert batches.plan(0) == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    assert batches.plan(2) == [[[16, 17], [18, 19]]]
    assert batches.plan(3) == batches.plan(0), "the second epoch has the same order"
    two_ranks = sampler([1] * 20, batch_pairs=8, order="file", pairs_per_microbatch=2, dp_size=2)
    assert two_ranks.plan(0) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    # Exactness comes before evenness: micro-batches are not split to fill a rank.
    three_ranks = sampler([1] * 20, batch_pairs=8, order="file", pairs_per_microbatch=2, dp_size=3)
    assert three_ranks.plan(0) == [[[0, 1], [2, 3]], [[4, 5], []], [[6, 7], []]]


def test_file_order_without_a_bound_on_pairs() -> None:
    assert sampler([10] * 8, order="file").plan(0) == [[list(range(8))]]
    assert sampler([30] * 8, order="file").plan(0) == [[[0, 1, 2], [3, 4, 5], [6, 7]]]
    assert sampler([10] * 8, order="file", dp_size=2).plan(0) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert sampler([10] * 8, order="file", dp_size=2, microbatch_multiple=2).plan(0) == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]


@pytest.mark.parametrize(
    ("tokens", "filled"),
    [
        ([60, 60, 10, 10, 10, 10], [80, 80]),  # first fit would give 100 and 60
        ([50, 40, 30, 30, 30, 20], [100, 100]),  # first fit would need a third
        ([60, 60, 60, 10], [60, 60, 70]),
        ([60, 60, 60, 50, 50, 40, 40, 40], [100, 100, 100, 100]),
    ],
)
def test_microbatches_are_few_and_even(tokens: list[int], filled: list[int]) -> None:
    (rank,) = sampler(tokens).plan(0)
    assert sorted(sum(tokens[pair] for pair in members) for members in rank) == filled


def test_a_bound_on_pairs_keeps_the_microbatches_few() -> None:
    """One long pair would balance three short ones, but the rank of these would need three micro-batches."""
    plan = sampler([90, 10, 10, 10], batch_pairs=4, dp_size=2, pairs_per_microbatch=1).plan(0)
    assert [[len(microbatch) for microbatch in rank] for rank in plan] == [[1, 1], [1, 1]]


def test_pairs_that_share_a_microbatch_stay_within_their_own_bound() -> None:
    """A long pair is alone; the others share as far as the smaller bound allows."""
    plan = sampler([90, 20, 20, 20, 20, 60], batch_pairs=6, shared_tokens=50).plan(0)[0]
    assert sorted(sorted(np.array([90, 20, 20, 20, 20, 60])[pairs].tolist()) for pairs in plan) == [
        [20, 20],
        [20, 20],
        [60],
        [90],
    ]


def test_a_pair_above_the_budget_is_named_with_the_remedy() -> None:
    with pytest.raises(PairError, match=r"pair b takes 101 tokens.*tokens_per_microbatch=100; set it to at least 101"):
        sampler([5, 101], ids=["a", "b"])
    with pytest.raises(PairError, match="number 1 takes 101"):
        sampler([5, 101])


def test_no_pair_left() -> None:
    with pytest.raises(PairError, match=r"every pair .* was dropped"):
        sampler([])


@given(st.lists(st.floats(1, 100), max_size=30), st.integers(1, 6), st.integers(1, 8))
@example([100.0, 1.0, 1.0, 1.0], 2, 1)
def test_deal_keeps_every_pair_and_the_bound(weights: list[float], num_bins: int, spare: int) -> None:
    most_pairs = -(-len(weights) // num_bins) + spare - 1
    bins = deal(list(range(100, 100 + len(weights))), np.array(weights), num_bins, most_pairs)
    assert len(bins) == num_bins
    assert sorted(pair for members in bins for pair in members) == list(range(100, 100 + len(weights)))
    assert all(len(members) <= most_pairs for members in bins)
    assert sum(not members for members in bins) == max(0, num_bins - len(weights))


LENGTHS = {  # response tokens, lognormal: (mean of the logarithm, sigma)
    "1000 tokens, sigma 0.4": (6.9, 0.4),
    "1000 tokens, sigma 0.6": (6.9, 0.6),
    "1500 tokens, sigma 0.5": (7.3, 0.5),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("batch_pairs", [32, 64])
def test_the_slowest_of_eight_ranks_has_little_more_than_its_share(name: str, batch_pairs: int) -> None:
    """Time lost to imbalance: sum over steps of the slowest rank's cost / sum of the mean cost."""
    rng = np.random.default_rng(0)
    responses = np.clip(rng.lognormal(*LENGTHS[name], size=4000), 50, 7000).astype(int)
    tokens = 200 + (1.6 * responses).astype(int)  # of the shared layout
    costs = tokens + responses.astype(float) ** 2 / (6 * 4096)
    batches = sampler(
        tokens, costs, batch_pairs=batch_pairs, dp_size=8, epochs=1, tokens_per_microbatch=int(tokens.max())
    )
    start = time.process_time()
    plans = [batches.plan(step) for step in range(batches.num_steps)]
    seconds = time.process_time() - start
    by_rank = np.array([[sum(costs[pair] for m in rank for pair in m) for rank in plan] for plan in plans])
    lost = by_rank.max(1).sum() / by_rank.mean(1).sum()
    least = np.maximum(by_rank.mean(1), [costs[batches.batch(step)].max() for step in range(batches.num_steps)])
    bound = least.sum() / by_rank.mean(1).sum()
    print(f"{name}, {batch_pairs} pairs: slowest / mean {lost:.4f}, cannot be below {bound:.4f}, {seconds:.2f} s")
    assert lost <= 1.06
    assert lost <= bound * 1.01, "what remains is a pair longer than a rank's share"
    assert seconds < 10
