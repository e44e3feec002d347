"""Some splits of tests/train/test_parity.py with forked ranks: MUTANT_SPLITS names them. Not collected by itself."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.support import make_recipe, random_pairs, write_token_pairs
from tests.train.test_parity import BASE, COMPARED, SPLITS, TOLERANCE, load_all, metrics, reference_of
from tests.weights.models import make_folder

NAMES = os.environ.get("MUTANT_SPLITS", "one_rank").split()


def run_split(folder: Path, name: str) -> Path:
    num_ranks, changes = SPLITS[name]
    sections = {key: {**BASE.get(key, {}), **changes.get(key, {})} for key in BASE | changes}
    output = folder / name / "run"
    output.parent.mkdir()
    recipe = make_recipe(folder, **sections, output=str(output))
    (folder / f"{name}.yaml").write_text(recipe.dump())
    common = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if not child:
            _train(
                folder / f"{name}.yaml", common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            )
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * num_ranks
    return output


def _train(recipe: Path, environment: dict[str, str]) -> None:
    code = 1
    try:
        from spot_megatron.train.__main__ import main

        os.environ.update(environment)
        code = main([str(recipe)])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(22))
    make_folder(folder / "model", tied=False)
    return folder


@pytest.fixture(scope="module")
def one_rank(folder) -> Path:
    return run_split(folder, "one_rank")


def test_the_shift_follows_the_rewards(one_rank):
    rows = metrics(one_rank)
    shift = 0.0
    for row in rows:
        assert row["reward_shift"] == pytest.approx(shift, abs=1e-9)
        shift = 0.9 * shift + 0.1 * (row["reward_chosen"] + row["reward_rejected"]) / 2
    assert abs(shift) > 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "one_rank"])
def test_the_split_changes_nothing(folder, one_rank, name):
    run = run_split(folder, name)
    for row, want in zip(metrics(run), metrics(one_rank), strict=True):
        assert (row["pairs"], row["tokens"]) == (want["pairs"], want["tokens"])
        for key in [key for key in COMPARED if (key, row["step"]) != ("reward_accuracy", 1)]:
            assert row[key] == pytest.approx(want[key], abs=TOLERANCE, rel=TOLERANCE), json.dumps([row, want])
    reference = reference_of(one_rank)
    for pair, sums in reference_of(run).items():
        assert sums == pytest.approx(reference[pair], abs=1e-4), pair
    weights = load_all(run / "hf")
    for tensor, expected in load_all(one_rank / "hf").items():
        assert (weights[tensor] - expected).abs().max() <= TOLERANCE, tensor
