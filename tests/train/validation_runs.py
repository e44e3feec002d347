"""Runs of a small model with validation, trained in this process, for test_validation.py and test_best.py."""

from __future__ import annotations

import json
from pathlib import Path

from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.parallel.groups import parallel_groups
from spot_megatron.recipe import Recipe
from spot_megatron.train import loop
from tests.support import make_recipe, random_pairs, save_random_hf, write_probe, write_token_pairs

BETA = 0.5


def make_world(folder: Path) -> Path:
    """A model, 12 pairs to train on, 7 to hold out, and a probe of their chosen sides."""
    save_random_hf(folder / "model")
    pairs = random_pairs(12)
    write_token_pairs(folder / "pairs.jsonl", pairs)
    write_probe(folder / "same.jsonl", pairs)
    held_out = random_pairs(7, seed=1)
    write_token_pairs(folder / "held_out.jsonl", held_out)
    write_probe(folder / "probe.jsonl", held_out)
    return folder


def recipe_of(folder: Path, name: str, validation: dict | None = None, **sections) -> Recipe:
    defaults = {
        "objective": {"name": "spot_bco", "beta": BETA},
        "train": {"batch_pairs": 4, "epochs": 2},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    sections = {key: {**defaults.get(key, {}), **sections.get(key, {})} for key in defaults | sections}
    return make_recipe(folder, output=str(folder / name), validation=validation or {}, **sections)


def held_out(folder: Path, **options) -> dict:
    return {"pairs": str(folder / "held_out.jsonl"), "probe": str(folder / "probe.jsonl"), "every_steps": 1, **options}


def train(recipe: Recipe) -> Path:
    with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:
        assert loop.run(recipe, topology) == 0
    return Path(recipe.output)


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    parsed = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in parsed]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = HFFolder(run / "hf"), HFFolder(other / "hf")
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert same_bits(ours.read(name), theirs.read(name)), name


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
