"""No number that is not finite is applied, saved or exported, on any rank of any split (invariant 10)."""

from __future__ import annotations

import json

import pytest

from tests import processes
from tests.support import make_recipe, random_pairs, save_random_hf, write_token_pairs

FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
NORM = "decoder.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finite")
    save_random_hf(folder / "model")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(12))
    return folder


def train(folder, name, num_processes, parallel, **case):
    """(every rank's result, the run folder) of three steps that each save, with a fault planted in the second."""
    recipe = make_recipe(
        folder,
        output=str(folder / name / "run"),
        train={"batch_pairs": 4, "epochs": 1},
        optim={"lr": 1e-3},
        checkpoint={"every_steps": 1, "keep": 9},
        parallel=parallel,
    )
    file = folder / f"{name}.yaml"
    file.write_text(recipe.dump())
    (folder / f"{name}.json").write_text(json.dumps({"recipe": str(file), "step": 2, **case}))
    log = folder / f"{name}.txt"
    code = processes.run(
        [str(processes.ROOT / "tests/train/plant_worker.py"), str(folder / f"{name}.json")], log, num_processes
    )
    assert code == 0, processes.output_of(log)[-4000:]
    results = [json.loads((folder / f"{name}.yaml.rank_{rank}.json").read_text()) for rank in range(num_processes)]
    return results, folder / name / "run"


@pytest.mark.parametrize(
    ("name", "num_processes", "parallel", "rank", "parameter", "value", "shown"),
    [
        ("one", 1, {}, 0, NORM, "nan", NORM),
        ("dp2", 2, {}, 1, FC1, "inf", FC1),
        ("tp2", 2, {"tensor": 2, "sequence": True}, 1, FC1, "nan", FC1),
        ("pp2", 2, {"pipeline": 2}, 1, FC1, "-inf", FC1.replace("layers.1", "layers.3")),
    ],
)
def test_a_gradient_is_checked_before_the_update(folder, name, num_processes, parallel, rank, parameter, value, shown):
    results, run = train(
        folder, name, num_processes, parallel, rank=rank, parameter=parameter, value=value, where="gradient"
    )
    for result in results:
        assert result["message"].startswith("TrainingError: step 2: the loss is "), result
        assert f"first parameter {shown}, rank" in result["message"]
        assert "pairs pair-" in result["message"]
        assert result["untouched"], "weights, optimizer state or reward shift changed"
        assert result["steps"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
    assert not (run / "hf").exists()


def test_bad_weights_are_not_saved(folder):
    results, run = train(folder, "weights", 2, {}, rank=1, parameter=FC1, value="nan", where="weight")
    for result in results:
        assert result["message"].startswith(f"TrainingError: step 2: the weights are not finite; first parameter {FC1}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
    assert not (run / "hf").exists()


def test_without_a_fault_it_finishes(folder):
    """The worker's own hooks do not cause what the tests above find."""
    results, run = train(folder, "sound", 2, {}, rank=9, parameter=FC1, value="nan", where="gradient")
    assert [result["code"] for result in results] == [0, 0]
    assert not any(result["untouched"] for result in results)
    assert (run / "hf").exists()
