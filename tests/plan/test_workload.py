"""The plan's packs are the training's packs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.template import TokenizedPairs
from spot_megatron.errors import PairError, RecipeError
from spot_megatron.parallel.groups import parallel_groups
from spot_megatron.parallel.split import Split
from spot_megatron.plan.estimate import make_planner
from spot_megatron.plan.hardware import find_gpu
from spot_megatron.plan.workload import (
    POSITIONS,
    PRODUCTS,
    SCORED,
    Assumptions,
    Workload,
    assumed_pairs,
    pairs_of_files,
    plan_steps,
)
from spot_megatron.recipe import load_recipe
from spot_megatron.train import batches
from spot_megatron.train.loop import run
from spot_megatron.train.packing import pack_multiple
from tests.support import SHAPE, make_recipe, one_process, random_pairs, write_token_pairs

GPU = find_gpu("h800")
SMALL = SHAPE


def test_a_real_run_computes_the_planned_tokens(tmp_path):
    """The embedded recipe on this CPU: steps, pairs, tokens and unique tokens, exactly."""
    changes = [f"output={tmp_path / 'run'}", "train.max_steps=3", "export.hf=false", "evaluation.questions=null"]
    recipe = load_recipe("qwen3_tiny_spot", [*changes, "logging.tensorboard=false"])
    planned = make_planner(recipe, GPU).estimate(recipe, 1)
    with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:
        assert run(recipe, topology) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert planned.load.num_steps == len(rows) == 3
    assert planned.load.num_tokens == sum(row["tokens"] for row in rows)
    assert planned.load.num_unique_tokens == sum(row["unique_tokens"] for row in rows)
    assert [step[..., POSITIONS].sum() for step in planned.load.steps] == [row["unique_tokens"] for row in rows]


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_packs_are_those_of_training(tmp_path, layout, order):
    """Every step's micro-batches, pack by pack, against the packs that training lays out."""
    data = {"layout": layout, "order": order, "tokens_per_microbatch": 200, "pairs_per_microbatch": 3}
    recipe = make_recipe(tmp_path, data=data, train={"batch_pairs": 7, "epochs": 2})
    pairs = random_pairs(24)
    dataset = PreferencePairDataset.build(TokenizedPairs(pairs, {}), seed=recipe.seed, max_tokens=512, pad_id=0)
    with one_process(recipe) as topology:
        sampler = batches.training_batches(recipe, dataset, SHAPE, topology)
    load = plan_steps(recipe, Split(recipe.parallel, 1), Workload(pairs, "", {}), SMALL, most_steps=99)
    assert load.num_steps == sampler.num_steps == len(load.steps)
    for step, planned in enumerate(load.steps):
        packs = [dataset.pack(members, layout, 1) for members in sampler.plan(step)[0]]
        assert planned.shape == (1, len(packs), 3)
        assert planned[0, :, POSITIONS].tolist() == [len(pack.input_ids) for pack in packs]
        assert planned[0, :, SCORED].tolist() == [len(pack.head_position) for pack in packs]
        products = [_products(pack.cu_main) + _products(pack.cu_suffix_q, pack.cu_suffix_k) for pack in packs]
        assert planned[0, :, PRODUCTS].tolist() == [max(n, 0) for n in products]
    uses = np.concatenate([sampler.batch(step) for step in range(sampler.num_steps)])
    separate = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in (pairs[i] for i in uses))
    assert load.num_tokens == separate
    assert load.padding == 0


def _products(cu_q: np.ndarray, cu_k: np.ndarray | None = None) -> int:
    """Key-query products of causal attention aligned at the end."""
    queries = np.diff(cu_q).astype(int)
    keys = queries if cu_k is None else np.diff(cu_k).astype(int)
    return int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())


@pytest.mark.parametrize("fp8", ["none", "tensorwise", "blockwise"])
@pytest.mark.parametrize("parallel", [{}, {"context": 2}, {"tensor": 2}, {"tensor": 2, "sequence": True}])
def test_padding_is_that_of_training(tmp_path, fp8, parallel):
    recipe = make_recipe(tmp_path, precision={"dtype": "bf16", "fp8": fp8}, parallel=parallel)
    split = Split(recipe.parallel, 8)
    load = plan_steps(recipe, split, Workload(random_pairs(16), "", {}), SMALL)
    assert all((step[..., POSITIONS] % pack_multiple(recipe) == 0).all() for step in load.steps)
    assert 0 <= load.padding < 1


def test_assumed_pairs_are_as_assumed(tmp_path):
    recipe = make_recipe(tmp_path, data={"max_tokens": 100_000, "tokens_per_microbatch": 200_000})
    workload = assumed_pairs(Assumptions.parse(["pairs=3000", "response=800", "shared=0.6", "prompt=50"]), recipe)
    lengths = np.array([len(pair.chosen_ids) for pair in workload.pairs])
    assert len(workload.pairs) == 3000
    assert not workload.dropped
    assert lengths.mean() == pytest.approx(800, rel=0.05)
    assert lengths.std() / lengths.mean() == pytest.approx(0.6, rel=0.1)
    shared = 2 * lengths.sum() - (workload.counts["shared"][:, SCORED]).sum()
    assert shared / lengths.sum() == pytest.approx(0.6, rel=0.05)


def test_assumed_pairs_count_what_training_refuses(tmp_path):
    recipe = make_recipe(tmp_path, data={"max_tokens": 1000, "tokens_per_microbatch": 1200})
    workload = assumed_pairs(Assumptions(response=600), recipe)
    assert len(workload.pairs) + sum(workload.dropped.values()) == 4000
    assert set(workload.dropped) == {"too_long", "over_tokens_per_microbatch"}
    assert workload.counts["shared"][:, POSITIONS].max() <= 1200


@pytest.mark.parametrize("item", ["tokens=3", "response", "response=x", "shared=1", "cv=0"])
def test_wrong_assumptions(item):
    with pytest.raises(RecipeError, match="--assume"):
        Assumptions.parse([item])


def test_pairs_without_a_tokenizer_are_told_by_characters(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"id": "a", "prompt": "p" * 30, "chosen": "same " * 60 + "right", "rejected": "same " * 60 + "no"})
    )
    recipe = make_recipe(tmp_path, model={"hf": "Qwen/Qwen3-8B"})
    workload = pairs_of_files(recipe, [tmp_path / "pairs.jsonl"])
    (pair,) = workload.pairs
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (10, 103, 102)
    assert "characters a token" in workload.source


def test_a_pair_over_the_budget_stops_the_plan_as_it_stops_training(tmp_path):
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(8))
    recipe = make_recipe(tmp_path, data={"tokens_per_microbatch": 12}, model={"hf": "Qwen/Qwen3-8B"})
    with pytest.raises(PairError, match="set it to at least"):
        make_planner(recipe, GPU).estimate(recipe, 8)
