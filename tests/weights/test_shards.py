"""Layouts: written out by hand on small tensors, and there and back for random sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spot_megatron.hf.names import Sharding
from spot_megatron.weights.shards import (
    merge,
    merge_gate_up,
    merge_qkv,
    pad_vocab,
    split,
    split_qkv,
    tp_index,
    tp_join,
    trim_vocab,
)


def test_qkv_is_interleaved_by_query_group():
    # 4 query heads, 2 groups, head_dim 1: group 0 holds q0 q1 k0 v0, group 1 holds q2 q3 k1 v1.
    q, k, v = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    merged = merge_qkv(q, k, v, head_dim=1)
    assert merged.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert merge_qkv(q[:, None], k[:, None], v[:, None], head_dim=1).shape == (8, 1)
    for part, back in zip((q, k, v), split_qkv(merged, heads_per_group=2, head_dim=1), strict=True):
        assert torch.equal(part, back)


def test_each_rank_holds_its_gate_then_its_up():
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14)[:, None]
    shards = []
    for rank in range(2):
        part = tp_index((4, 1), Sharding.GATE_UP, rank, 2)
        shards.append(merge_gate_up(gate[part], up[part]))
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_vocabulary_is_padded_with_zero_rows_and_trimmed():
    rows = torch.ones(3, 2)
    padded = pad_vocab(rows, 5)
    assert padded.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert torch.equal(trim_vocab(padded, 3), rows)


def test_only_linears_with_split_input_are_cut_by_columns():
    whole = torch.arange(8.0).view(2, 4)
    assert whole[tp_index((2, 4), Sharding.COLUMNS, 1, 2)].tolist() == [[2, 3], [6, 7]]
    assert whole[tp_index((2, 4), Sharding.VOCAB, 1, 2)].tolist() == [[4, 5, 6, 7]]
    assert tp_index((2, 4), Sharding.REPLICATED, 1, 2) == ()
    with pytest.raises(AssertionError, match="does not divide"):
        tp_index((3, 4), Sharding.VOCAB, 0, 2)


@settings(max_examples=60, deadline=None)
@given(
    sharding=st.sampled_from([Sharding.REPLICATED, Sharding.COLUMNS, Sharding.QKV, Sharding.GATE_UP]),
    size=st.sampled_from([1, 2, 4]),
    heads_per_group=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    hidden=st.sampled_from([4, 8]),
    bias=st.booleans(),
)
def test_there_and_back(sharding, size, heads_per_group, head_dim, hidden, bias):
    """Slice for every rank, merge, split, join: the tensors that went in, bit for bit."""
    num_groups = 2 * size
    tail = () if bias and sharding is not Sharding.COLUMNS else (hidden,)
    rows = {Sharding.QKV: [num_groups * heads_per_group * head_dim, num_groups * head_dim, num_groups * head_dim]}
    lengths = rows.get(sharding, [4 * size, 4 * size] if sharding is Sharding.GATE_UP else [4 * size])
    wholes = [torch.randn(length, *tail) for length in lengths]
    parts_of_rank = []
    for rank in range(size):
        shard = merge([w[tp_index(w.shape, sharding, rank, size)] for w in wholes], sharding, head_dim)
        parts_of_rank.append(split(shard, sharding, heads_per_group, head_dim))
    for whole, parts in zip(wholes, zip(*parts_of_rank, strict=True), strict=True):
        assert torch.equal(tp_join(parts, sharding), whole)
