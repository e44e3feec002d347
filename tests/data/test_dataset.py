"""The pairs as a megatron.core dataset. Takes about 4 s, most of it the import of megatron.core."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.megatron_dataset import MegatronDataset
from torch.utils.data import default_collate

from spot_megatron.data.costs import CostModel, cost_model
from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.pack import build_pack, num_positions, num_targets, positions_and_products
from spot_megatron.data.records import TokenPair
from spot_megatron.data.sampler import BatchSampler
from spot_megatron.data.template import TokenizedPairs
from spot_megatron.hf.config import HFModelConfig
from tests.data.pairs import token_pair, token_pairs

PAIRS = [
    token_pair([5, 6], [1, 2], [1, 3], "a"),
    token_pair([5], [1, 2, 3], [1, 2], "b"),
    token_pair([7], [4], [2], "c"),
]


def build(pairs: list[TokenPair]) -> PreferencePairDataset:
    return PreferencePairDataset.build(TokenizedPairs(pairs, {}), seed=1, max_tokens=100, pad_id=9)


def test_it_is_a_megatron_dataset() -> None:
    dataset = build(PAIRS)
    assert isinstance(dataset, MegatronDataset)
    assert len(dataset) == 3
    assert dataset.pairs == PAIRS
    assert dataset.unique_identifiers["sequence_length"] == 100
    item = dataset[1]
    assert {key: value.tolist() for key, value in item.items()} == {
        "prompt_ids": [5],
        "chosen_ids": [1, 2, 3],
        "rejected_ids": [1, 2],
        "index": 1,
    }
    assert default_collate([item])["chosen_ids"].tolist() == [[1, 2, 3]]


def test_tokens_and_costs() -> None:
    dataset = build(PAIRS)
    for layout in ("shared", "separate"):
        assert dataset.num_positions(layout).tolist() == [num_positions(pair, layout) for pair in PAIRS]
        rows, products = np.array([positions_and_products(pair, layout) for pair in PAIRS]).T
        scored = np.array([num_targets(pair, layout) for pair in PAIRS])
        expected = rows + 0.5 * products + 0.25 * scored
        np.testing.assert_allclose(dataset.costs(layout, CostModel(product=0.5, scored=0.25)), expected)


def test_cost_model_counts_the_operations_of_a_model() -> None:
    """Qwen3-8B's shape; its layers hold 193M parameters each, 6.95B in all without the embeddings."""
    shape = HFModelConfig(
        family="qwen3", num_layers=36, hidden_size=4096, intermediate_size=12288, num_heads=32, num_groups=8,
        head_dim=128, vocab_size=151936, max_positions=40960, norm_eps=1e-6, rope_theta=1e6, tied=False,
        initializer_range=0.02, dtype="bfloat16",
    )  # fmt: skip
    model = cost_model(shape)
    row = 2 * 6.945e9
    assert model.product == pytest.approx(1.6 * 4 * 36 * 4096 / row, rel=1e-3)
    assert model.scored == pytest.approx(4 / 3 * 2 * 151936 * 4096 / row, rel=1e-3)
    experts = replace(shape, moe_layers=tuple(range(36)), num_experts=8, experts_per_token=2, expert_ffn_size=6144)
    assert cost_model(experts) == model  # two of eight half-width experts do the work of one dense layer


def test_packs_of_a_plan() -> None:
    dataset = build(PAIRS)
    packs = [dataset.pack(indices, "shared", 4) for indices in ([2, 0], [], [1])]
    assert [pack.pair_index.tolist() for pack in packs] == [[2, 0], [], [1]]
    for pack, indices in zip(packs, [[2, 0], [], [1]], strict=True):
        expected = build_pack([PAIRS[i] for i in indices], indices, "shared", 4, 9)
        for field in dataclasses.fields(pack):
            np.testing.assert_array_equal(getattr(pack, field.name), getattr(expected, field.name))


@given(st.lists(token_pairs(), min_size=1, max_size=10), st.integers(1, 4))
def test_an_epoch_packs_every_pair_once(pairs: list[TokenPair], dp_size: int) -> None:
    dataset = build(pairs)
    sampler = BatchSampler(
        dataset.num_positions("shared"),
        dataset.costs("shared", CostModel(0.01, 0.1)),
        batch_pairs=4,
        epochs=1,
        order="shuffled",
        seed=0,
        max_steps=None,
        dp_size=dp_size,
        tokens_per_microbatch=40,
        pairs_per_microbatch=None,
    )
    seen = [
        index
        for step in range(sampler.num_steps)
        for plan in sampler.plan(step)
        for indices in plan
        for index in dataset.pack(indices, "shared", 8).pair_index.tolist()
    ]
    assert sorted(seen) == list(range(len(pairs)))


def test_the_fingerprint_is_that_of_the_training_data() -> None:
    same = [dataclasses.replace(pair, source="elsewhere:9") for pair in PAIRS]
    assert build(same).fingerprint() == build(PAIRS).fingerprint()
    first = PAIRS[0]
    others = [
        PAIRS[:2],
        PAIRS[::-1],
        [dataclasses.replace(first, id="x"), *PAIRS[1:]],
        [token_pair([5, 6], [1, 2], [1, 4], "a"), *PAIRS[1:]],
        [token_pair([5], [6, 1, 2], [1, 3], "a"), *PAIRS[1:]],  # the same tokens, cut elsewhere
        [token_pair([5, 6], [1, 3], [1, 2], "a"), *PAIRS[1:]],  # sides changed over
    ]
    assert len({build(pairs).fingerprint() for pairs in [PAIRS, *others]}) == len(others) + 1
