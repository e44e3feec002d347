"""The dry run: every recipe's ranks are built; faults of the weight map, of a layout or of the fit are found."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from megatron.core.parallel_state import RankGenerator

from spot_megatron.errors import WeightError
from spot_megatron.hf.names import Sharding, weight_map
from spot_megatron.parallel.split import Split
from spot_megatron.plan import dryrun
from spot_megatron.plan.dryrun import Holdings, dry_run, places
from spot_megatron.plan.memory import checkpoint_bytes
from spot_megatron.plan.models import PUBLISHED, PUBLISHED_PARAMETERS, planned_model
from spot_megatron.plan.trained import adapters_of_rank, num_trained, parameters_of_rank
from spot_megatron.recipe import RECIPE_FOLDER, Parallel, load_recipe
from tests.processes import output_of, run
from tests.support import SHAPE, make_recipe, save_random_hf
from tools import dryrun as tool

RECIPES = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))
LARGE = "235b"
EXPERTS = replace(
    SHAPE, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_ffn_size=32, moe_layers=(0, 2, 3)
)


def smallest_job(parallel: Parallel) -> int:
    """The fewest ranks that hold the model and its experts."""
    return math.lcm(parallel.model_ranks, parallel.expert * parallel.expert_tensor * parallel.pipeline)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if LARGE in name else ()) for name in RECIPES]
)
def test_every_recipe_builds_and_agrees_with_the_plan(name):
    recipe = load_recipe(name)
    num_ranks = 2 * smallest_job(recipe.parallel)
    job = dry_run(recipe, planned_model(recipe.model.hf), num_ranks)

    shape = planned_model(recipe.model.hf)
    assert job.num_parameters == shape.num_parameters
    assert sum(rank.num_ranks for rank in job.ranks) == num_ranks
    split = Split(recipe.parallel, num_ranks)
    for rank in job.ranks:
        assert (rank.num_dense, rank.num_expert) == parameters_of_rank(shape, split, rank.place.pipeline)
        assert rank.num_adapter == sum(adapters_of_rank(shape, split, recipe.lora, rank.place.pipeline))
    chunks = [part for rank in job.ranks for part in rank.layers]
    assert {layer for part in chunks for layer in part} == set(range(shape.num_layers))


@pytest.mark.parametrize("targets", [["attention"], ["mlp"], ["q_proj", "up_proj", "down_proj"]])
def test_adapters_of_every_rank_agree_with_the_plan(tmp_path, targets):
    shape = replace(EXPERTS, moe_layers=(0, 1, 2, 3))
    parallel = {"expert": 2, "tensor": 4, "sequence": True, "expert_tensor": 2, "pipeline": 2}
    recipe = local_recipe(tmp_path, shape, parallel=parallel, lora={"rank": 4, "targets": targets})
    found = [rank.num_adapter for rank in dry_run(recipe, shape, 16).ranks]
    wanted = sum(adapters_of_rank(shape, Split(recipe.parallel, 16), recipe.lora, 0))
    assert found == [wanted] * len(found)
    whole = dry_run(recipe.model_copy(update={"parallel": Parallel()}), shape, 1).ranks
    assert [rank.num_adapter for rank in whole] == [num_trained(shape, recipe.lora)]


def test_adapters_that_the_ranks_do_not_hold_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(dryrun.Adapters, "add", lambda *_: None)
    recipe = local_recipe(tmp_path, SHAPE, lora={"rank": 4})
    with pytest.raises(WeightError, match=r"lora_A.weight: the ranks hold None elements of "):
        dry_run(recipe, SHAPE, 1)


def test_the_table_of_published_totals_is_that_of_the_shapes():
    assert {name: shape.num_parameters for name, shape in PUBLISHED.items()} == PUBLISHED_PARAMETERS


@pytest.mark.parametrize(
    ("shape", "parallel", "num_ranks", "num_built"),
    [
        (SHAPE, {}, 3, 1),
        (SHAPE, {"tensor": 2, "sequence": True}, 4, 2),
        (SHAPE, {"context": 2}, 4, 1),
        (replace(SHAPE, num_layers=5), {"pipeline": 3}, 3, 3),  # 2, 2 and 1 layers
        (SHAPE, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}, 8, 4),
        (replace(SHAPE, tied=True), {"pipeline": 2, "tensor": 4}, 8, 8),
        (replace(SHAPE, family="qwen2"), {"tensor": 4}, 4, 4),
        (replace(SHAPE, family="llama", rope_factor=8.0), {"pipeline": 4}, 4, 4),
        (EXPERTS, {"expert": 4}, 8, 4),
        (EXPERTS, {"expert": 2, "tensor": 4, "sequence": True, "expert_tensor": 2, "pipeline": 2}, 16, 8),
        (EXPERTS, {"expert": 2, "tensor": 2, "sequence": True, "context": 2}, 8, 2),
    ],
)  # fmt: skip
def test_every_layout_holds_the_model_once(tmp_path, shape, parallel, num_ranks, num_built):
    recipe = local_recipe(tmp_path, shape, parallel=parallel)
    job = dry_run(recipe, shape, num_ranks)
    assert job.num_parameters == shape.num_parameters
    assert len(job.ranks) == num_built
    assert len({(rank.num_dense, rank.num_expert) for rank in job.of_stage(0)}) == 1


def local_recipe(folder, shape, **sections):
    """A recipe whose model folder has no weights."""
    (folder / "model").mkdir()
    return make_recipe(folder, **sections)


@pytest.mark.parametrize(
    "parallel",
    [Parallel(tensor=4, pipeline=2, context=2, expert=4), Parallel(tensor=4, sequence=True, expert=2, expert_tensor=2)],
)
def test_places_are_megatrons(parallel):
    num_ranks, p = 32, parallel
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=p.tensor, ep=1, dp=num_ranks // p.model_ranks, pp=p.pipeline, cp=p.context, order=order)
    of_experts = num_ranks // (p.expert * p.expert_tensor * p.pipeline)
    experts = RankGenerator(tp=p.expert_tensor, ep=p.expert, dp=of_experts, pp=p.pipeline, cp=1, order=order)

    def index(generator, token):
        return {rank: group.index(rank) for group in generator.get_ranks(token) for rank in group}

    found = {rank: place for place, ranks in places(parallel, num_ranks).items() for rank in ranks}
    assert {rank: place.pipeline for rank, place in found.items()} == index(dense, "pp")
    assert {rank: place.tensor for rank, place in found.items()} == index(dense, "tp")
    assert {rank: place.expert for rank, place in found.items()} == index(experts, "ep")
    assert {rank: place.expert_tensor for rank, place in found.items()} == index(experts, "tp")


def test_a_map_that_loads_another_shape_is_found(tmp_path, monkeypatch):
    def wrong(config):
        return tuple(
            replace(mapping, sharding=Sharding.COLUMNS) if mapping.sharding is Sharding.VOCAB else mapping
            for mapping in weight_map(config)
        )

    monkeypatch.setattr(dryrun, "weight_map", wrong)
    recipe = local_recipe(tmp_path, SHAPE, parallel={"tensor": 2})
    with pytest.raises(WeightError, match=r"word_embeddings.*has the shape \(64, 48\).*loads \(101, 24\)"):
        dry_run(recipe, SHAPE, 2)


def test_a_part_that_no_rank_holds_is_found(tmp_path, monkeypatch):
    all_places = dict(places(Parallel(expert=2, pipeline=2), 4))
    (lost,) = [place for place in all_places if place.expert == 1 and place.pipeline == 0]
    del all_places[lost]
    monkeypatch.setattr(dryrun, "places", lambda parallel, num_ranks: all_places)
    recipe = local_recipe(tmp_path, EXPERTS, parallel={"expert": 2, "pipeline": 2})
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.experts\.2\.gate_proj.*do not make it whole"):
        dry_run(recipe, EXPERTS, 4)


def test_layers_that_two_stages_hold_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(dryrun, "layer_offset", lambda chunk: 0)  # as a stage that takes itself for the first
    recipe = local_recipe(tmp_path, SHAPE, parallel={"pipeline": 2})
    with pytest.raises(WeightError, match=r"model\.layers\.0\.\S+ \(0, 0, \d+\) is held twice"):
        dry_run(recipe, SHAPE, 2)


def test_a_tensor_split_unevenly_is_found():
    holdings = Holdings(SHAPE)
    for name, shape in holdings.shapes.items():
        holdings.holders[name] = {(0, 0, shape[0]): (0, 0, 0, name)}
    assert holdings.check() == SHAPE.num_parameters
    holdings.holders["model.norm.weight"] = {(0, 0, 20): (0, 0, 0, "a"), (0, 16, 48): (1, 0, 0, "a")}
    with pytest.raises(WeightError, match=r"model\.norm\.weight"):
        holdings.check()


def test_the_folder_s_weight_files_are_compared(tmp_path):
    save_random_hf(tmp_path / "model")
    recipe = make_recipe(tmp_path)
    shape = planned_model(recipe.model.hf)
    assert dry_run(recipe, shape, 1).compared == "as in the folder's weight files"
    with pytest.raises(WeightError, match=r"config\.json gives"):
        dry_run(recipe, replace(shape, intermediate_size=shape.intermediate_size * 2), 1)


def test_a_total_that_is_not_the_published_one_is_found():
    recipe = load_recipe("qwen3_0p6b_spot")
    with pytest.raises(WeightError, match=r"published are 596,049,920"):
        dry_run(recipe, replace(planned_model(recipe.model.hf), tied=False), 1)


def test_the_size_of_a_checkpoint_is_the_one_that_training_writes(tmp_path):
    """fp32 on the CPU, so that the optimizer's copy of the weights counts; a few kB of indices come on top."""
    sections = [f"output={tmp_path / 'run'}", "train.max_steps=1", "logging.tensorboard=false", "export.hf=false"]
    sections += ["evaluation.questions=null"]
    log = tmp_path / "log"
    code = run(["-m", "spot_megatron.train", "qwen3_tiny_spot", "--set", *sections], log, timeout=120)
    assert code == 0, output_of(log)
    recipe = load_recipe("qwen3_tiny_spot")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    size = sum(file.stat().st_size for part in ("model", "optimizer") for file in (saved / part).iterdir())
    expected = checkpoint_bytes(planned_model(recipe.model.hf).num_parameters, recipe.precision)
    assert 1.0 <= size / expected < 1.06


def test_the_tool_prints_a_table_and_json(capsys):
    assert tool.main(["qwen3_tiny_spot", "--gpus", "2", "--set", "parallel.tensor=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("qwen3_tiny_spot on 2 H800: tensor 2\n")
    assert "368,256 parameters in 35 tensors, as in the folder's weight files" in printed
    assert "557, recipes/assets/qwen3_tiny/pairs.jsonl" in printed
    assert printed.rstrip().splitlines()[-1].startswith("fits: ")
    assert tool.main(["qwen3_tiny_spot", "--gpus", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] is True
    assert facts["packs"]["data_ranks"] == 2
    assert facts["stages"][0]["parameters"] > facts["num_parameters"] == 368_256  # padding
    assert facts["checkpoint"] == 16 * 368_256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["qwen3_tiny_spot", "--gpus", "3", "--set", "parallel.tensor=2"],
            "3 processes cannot.*parallel.tensor 2",
        ),
        (["qwen3_tiny_spot", "--gpus", "4", "--set", "parallel.tensor=4"], "parallel.tensor=4 .* does not divide"),
        (["qwen3_tiny_spot", "--gpus", "4", "--set", "parallel.pipeline=4"], "parallel.pipeline: 3 layers"),
        (["qwen3_tiny_spot", "--gpus", "1", "--set", "data.tokens_per_microbatch=64"], "data.tokens_per_microbatch"),
        (["qwen3_8b_spot", "--gpus", "1", "--set", "model.hf=Qwen/Qwen4"], "model.hf: Qwen/Qwen4 .*config.json"),
        (["qwen3_8b_spot", "--gpus", "1", "--pairs", "none.jsonl"], "none.jsonl"),
        (["qwen3_8b_spot", "--gpus", "1", "--gpu", "h900"], "h900.*h800"),
    ],
)
def test_what_cannot_be_exits_with_2_and_names_the_key(capsys, arguments, message):
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_too_little_memory_exits_with_2_and_a_change_that_fits(capsys):
    assert tool.main(["qwen3_8b_spot", "--gpus", "4"]) == 2
    printed = capsys.readouterr()
    assert "does not fit: " in printed.out
    remedy = printed.err.split("--set ")[1].split(" (")[0].split()
    assert tool.main(["qwen3_8b_spot", "--gpus", "4", "--set", *remedy]) == 0


@pytest.mark.slow
def test_235b_on_512_ranks_takes_less_than_two_minutes_and_8_gb(tmp_path):
    log = tmp_path / "log"
    assert run(["-m", "tools.dryrun", "qwen3_235b_a22b_spot", "--gpus", "512", "--json"], log, timeout=240) == 0
    facts = json.loads(output_of(log))
    assert facts["num_parameters"] == 235_093_634_560
    assert facts["seconds"] < 120
    assert facts["peak_memory"] < 8e9
