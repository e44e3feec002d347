"""Held-out pairs by a hash of the prompt: stable, and never one prompt on both sides."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from spot_megatron.data.holdout import hold_out, prompt_digest
from spot_megatron.data.records import Pair
from spot_megatron.errors import PairError
from tests.support import random_pairs


def pairs_of(prompts: list) -> list[Pair]:
    return [Pair(id=str(i), prompt=prompt, chosen="a", rejected="b") for i, prompt in enumerate(prompts)]


def held_out_ids(records, fraction: float) -> list[str]:
    return [record.id for record in hold_out(records, fraction)[1]]


def test_the_split_is_the_one_of_earlier_versions():
    """Golden: other ids here would change every run that holds out a fraction."""
    assert held_out_ids(pairs_of([f"question {i}" for i in range(20)]), 0.3) == ["5", "6", "10", "12", "16"]
    assert held_out_ids(random_pairs(20), 0.3) == ["pair-12", "pair-16", "pair-18", "pair-19"]


def test_all_pairs_of_a_prompt_are_on_one_side():
    records = pairs_of([f"question {i % 17}" for i in range(200)])
    training, held_out = hold_out(records, 0.4)
    assert {record.prompt for record in training}.isdisjoint(record.prompt for record in held_out)
    assert sorted(training + held_out, key=lambda record: int(record.id)) == records


def test_the_side_depends_on_the_prompt_alone():
    """Not on other pairs, order, ids or responses, nor on whether a prompt is a string or one user message."""
    prompts = [f"question {i}" for i in range(100)]
    records = pairs_of(prompts)
    chosen = {record.prompt for record in hold_out(records, 0.2)[1]}
    fewer = [dataclasses.replace(record, id="x" + record.id, chosen="other") for record in records[::-2]]
    assert {record.prompt for record in hold_out(fewer, 0.2)[1]} == chosen & {record.prompt for record in fewer}
    as_messages = pairs_of([[{"role": "user", "content": prompt}] for prompt in prompts])
    assert held_out_ids(as_messages, 0.2) == held_out_ids(records, 0.2)
    assert 10 <= len(chosen) <= 30


def test_a_larger_fraction_holds_out_all_of_a_smaller_one():
    records = pairs_of([f"question {i}" for i in range(300)])
    sets = [set(held_out_ids(records, fraction)) for fraction in (0.05, 0.1, 0.5, 0.9)]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_tools_and_tokens_are_part_of_the_prompt():
    plain, tool = pairs_of(["question"])[0], {"type": "function"}
    assert prompt_digest(plain) != prompt_digest(dataclasses.replace(plain, tools=[tool]))
    [pair] = random_pairs(1)
    other = dataclasses.replace(pair, prompt_ids=np.append(pair.prompt_ids, 0).astype(np.int32))
    assert prompt_digest(pair) != prompt_digest(other)
    wide = dataclasses.replace(pair, prompt_ids=pair.prompt_ids.astype(np.int64))
    assert prompt_digest(pair) == prompt_digest(wide)


@pytest.mark.parametrize(("fraction", "remedy"), [(1e-12, "held out; raise it"), (1 - 1e-12, "train on; lower it")])
def test_a_side_without_pairs_is_an_error(fraction, remedy):
    with pytest.raises(PairError, match=remedy):
        hold_out(pairs_of(["one", "two"]), fraction)
