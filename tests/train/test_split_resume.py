"""A run goes on at another parallel split, with its optimizer's state, to the same weights; experts included."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import processes
from tests.support import make_recipe, random_pairs, write_token_pairs
from tests.train.test_parity import BASE, TOLERANCE, load_all
from tests.weights.models import VOCAB_SIZE, make_folder

MODELS = {"dense": {"family": "qwen3", "tied": True}, "moe": {"family": "qwen3_moe_some", "tied": False}}
SPLITS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),  # one stage of the experts' model has none
    "ep2": (2, {"expert": 2}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "tp2_ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
}
CHANGES = [
    ("dense", "dp2", "one"),
    ("dense", "one", "dp2"),
    ("dense", "dp2", "pp2"),
    ("moe", "one", "ep2"),
    ("moe", "ep2", "one"),
    ("moe", "ep2", "tp2"),
    ("moe", "tp2", "tp2_ep2"),
    ("moe", "one", "pp4"),
    ("moe", "pp4", "one"),
]


def train(folder, runs):
    """Trains (label, model, split) runs, those of as many processes together."""
    jobs: dict[int, list[str]] = {}
    for label, model, split in runs:
        num_processes, parallel = SPLITS[split]
        sections = {**BASE, "parallel": parallel, "checkpoint": {"every_steps": 1, "keep": 9}}
        recipe = make_recipe(folder, **sections, model={"hf": str(folder / model)}, output=str(folder / label))
        (folder / f"{label}.yaml").write_text(recipe.dump())
        jobs.setdefault(num_processes, []).append(str(folder / f"{label}.yaml"))
    for num_processes, group in jobs.items():
        listing, log = folder / f"jobs_{runs[0][0]}_{num_processes}.json", folder / "log.txt"
        listing.write_text(json.dumps(group))
        code = processes.run([str(processes.ROOT / "tests/train/worker.py"), str(listing)], log, num_processes)
        assert code == 0, processes.output_of(log)[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(22, vocab_size=VOCAB_SIZE))
    for model, options in MODELS.items():
        make_folder(folder / model, **options)
    starts = {(model, "one") for model in MODELS} | {(model, before) for model, before, _ in CHANGES}
    train(folder, [(f"{model}_{split}", model, split) for model, split in sorted(starts)])
    for model, before, after in CHANGES:
        checkpoint = folder / f"{model}_{before}_to_{after}" / "checkpoints" / "step_00000001"
        shutil.copytree(folder / f"{model}_{before}" / "checkpoints" / "step_00000001", checkpoint)
    train(folder, [(f"{model}_{before}_to_{after}", model, after) for model, before, after in CHANGES])
    return folder


@pytest.mark.parametrize(("model", "before", "after"), CHANGES)
def test_same_weights_after_a_change_of_the_split(folder, model, before, after):
    run = folder / f"{model}_{before}_to_{after}"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    expected, found = load_all(folder / f"{model}_one" / "hf"), load_all(run / "hf")
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= TOLERANCE, name
