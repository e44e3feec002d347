"""Three steps give the same numbers and the same weights however the work is split (invariants 1, 2 and 3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.support import make_recipe, random_pairs, write_probe, write_token_pairs
from tests.weights.models import make_folder

pytestmark = pytest.mark.timeout(900)  # one fixture trains everything

TOLERANCE = 1e-5
COMPARED = ("loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "reward_shift", "grad_norm")
BASE = {
    "objective": {"name": "spot_bco", "beta": 0.5},
    "train": {"batch_pairs": 8, "epochs": 1},
    "optim": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0, "eps": 1e-4},
    "data": {"tokens_per_microbatch": 4096},
}

# name -> (processes, changed sections)
SPLITS: dict[str, tuple[int, dict]] = {
    "one_rank": (1, {}),
    "four_microbatches": (1, {"data": {"pairs_per_microbatch": 2}}),
    "unpacked": (1, {"data": {"pairs_per_microbatch": 1}}),
    "small_budget": (1, {"data": {"tokens_per_microbatch": 90}}),
    "separate": (1, {"data": {"layout": "separate"}}),
    "separate_unpacked": (1, {"data": {"layout": "separate", "pairs_per_microbatch": 1}}),
    "full_recompute": (1, {"memory": {"recompute": "full"}}),
    "long_packs_recomputed": (1, {"memory": {"recompute_above_tokens": 60}}),
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2_sp": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2": (2, {"parallel": {"pipeline": 2}, "data": {"pairs_per_microbatch": 2}}),
    "pp2_one_microbatch": (2, {"parallel": {"pipeline": 2}}),
    "vpp2": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "data": {"pairs_per_microbatch": 2}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "cp2_separate_unpacked": (
        2,
        {"parallel": {"context": 2}, "data": {"layout": "separate", "pairs_per_microbatch": 1}},
    ),
    "dp2": (2, {}),
    "dp2_separate_unpacked": (2, {"data": {"layout": "separate", "pairs_per_microbatch": 1}}),
    "tp2_pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}, "data": {"pairs_per_microbatch": 2}}),
    "tp2_sp_pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}),
    "tp2_dp2": (4, {"parallel": {"tensor": 2}}),
    "cp2_dp2": (4, {"parallel": {"context": 2}}),
    "cp2_pp2": (4, {"parallel": {"context": 2, "pipeline": 2}, "data": {"pairs_per_microbatch": 2}}),
    "cp2_tp2_sp": (4, {"parallel": {"context": 2, "tensor": 2, "sequence": True}}),
    "pp2_dp2": (
        4,
        {
            "parallel": {"pipeline": 2},
            "data": {"pairs_per_microbatch": 2},
            "memory": {"recompute_above_tokens": 40},
        },
    ),
    "vpp2_dp2": (4, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "data": {"pairs_per_microbatch": 2}}),
    "pp4": (4, {"parallel": {"pipeline": 4}, "data": {"pairs_per_microbatch": 2}}),  # stages that are not an end
}
# The same on other models: which splits to try, and how the model folder is made (tests/weights/models.py).
MOE_SPLITS: dict[str, tuple[int, dict]] = {
    "separate_unpacked": SPLITS["separate_unpacked"],
    "full_recompute": SPLITS["full_recompute"],
    "tp2_sp": SPLITS["tp2_sp"],
    "ep2": (2, {"parallel": {"expert": 2}}),
    "ep2_uneven_pairs": (2, {"parallel": {"expert": 2}, "data": {"pairs_per_microbatch": 1}}),
    "pp2": SPLITS["pp2"],
    "ep2_tp2": (4, {"parallel": {"expert": 2, "tensor": 2, "sequence": True}}),
    "etp2": (2, {"parallel": {"tensor": 2, "sequence": True, "expert_tensor": 2}}),
    "ep2_etp2": (4, {"parallel": {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}}),
    "etp2_pp2": (
        4,
        {
            "parallel": {"tensor": 2, "sequence": True, "expert_tensor": 2, "pipeline": 2},
            "data": {"pairs_per_microbatch": 2},
        },
    ),
    "ep2_pp2": (4, {"parallel": {"expert": 2, "pipeline": 2}, "data": {"pairs_per_microbatch": 2}}),
    "ep2_cp2": (4, {"parallel": {"expert": 2, "context": 2}}),
}
MODELS: dict[str, tuple[dict, dict[str, tuple[int, dict]]]] = {
    "untied": ({"tied": False}, SPLITS),
    "tied": ({"tied": True}, {name: SPLITS[name] for name in ("one_rank", "dp2", "tp2", "pp2", "tp2_pp2", "pp2_dp2")}),
    "qwen2": ({"tied": False, "family": "qwen2"}, {name: SPLITS[name] for name in ("one_rank", "tp2")}),
    "llama": ({"tied": True, "family": "llama"}, {name: SPLITS[name] for name in ("one_rank", "tp2")}),
    "moe": ({"tied": False, "family": "qwen3_moe_some"}, {"one_rank": SPLITS["one_rank"], **MOE_SPLITS}),
}


JOBS_TOGETHER = 8  # in one group of processes, which has 240 s, seconds for each job on a busy machine


def train_all(folder: Path, jobs: dict[str, tuple[str, int, dict]]) -> dict[str, Path]:
    """Trains label -> (model folder's name, processes, changed sections) and returns the run folders.

    With validation on 5 pairs, an odd number for 2 or 4 ranks, and on a single text, which one rank has.
    """
    held_out = random_pairs(6, seed=1)
    write_token_pairs(folder / "held_out.jsonl", held_out[:5])
    write_probe(folder / "probe.jsonl", held_out[5:])
    groups: dict[int, list[str]] = {}
    for label, (model, num_processes, changes) in jobs.items():
        sections = {key: {**BASE.get(key, {}), **changes.get(key, {})} for key in BASE | changes}
        sections["validation"] = {
            "pairs": str(folder / "held_out.jsonl"), "probe": str(folder / "probe.jsonl"), "every_steps": 2
        }  # fmt: skip
        run = str(folder / label / "run")
        recipe = make_recipe(folder, **sections, model={"hf": str(folder / model)}, output=run)
        (folder / f"{label}.yaml").write_text(recipe.dump())
        groups.setdefault(num_processes, []).append(str(folder / f"{label}.yaml"))
    for num_processes, group in groups.items():
        for start in range(0, len(group), JOBS_TOGETHER):
            listing, log = folder / f"jobs_{num_processes}_{start}.json", folder / f"log_{num_processes}_{start}.txt"
            listing.write_text(json.dumps(group[start : start + JOBS_TOGETHER]))
            code = processes.run([str(processes.ROOT / "tests/train/worker.py"), str(listing)], log, num_processes)
            assert code == 0, processes.output_of(log)[-6000:]
    return {label: folder / label / "run" for label in jobs}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The run folder of every split of every model."""
    folder = tmp_path_factory.mktemp("parity")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(22))  # the last batch has 6
    jobs = {}
    for model, (options, splits) in MODELS.items():
        make_folder(folder / model, **options)
        jobs |= {f"{model}-{name}": (model, *split) for name, split in splits.items()}
    return train_all(folder, jobs)


LABELS = [f"{model}-{name}" for model, (_, splits) in MODELS.items() for name in splits]


def base_of(label: str) -> str:
    return f"{label.split('-')[0]}-one_rank"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("label", LABELS)
def test_metrics_do_not_depend_on_the_split(runs, label):
    expected = metrics(runs[base_of(label)])
    rows = metrics(runs[label])
    assert [row["pairs"] for row in rows] == [row["pairs"] for row in expected] == [8, 8, 6]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected]
    for row, want in zip(rows, expected, strict=True):
        # At step 1 policy and reference are the same, so rounding alone decides which of a pair's rewards is larger.
        for key in [key for key in COMPARED if (key, row["step"]) != ("reward_accuracy", 1)]:
            assert row[key] == pytest.approx(want[key], abs=TOLERANCE, rel=TOLERANCE), (label, row["step"], key)


def validations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("label", LABELS)
def test_validation_does_not_depend_on_the_split(runs, label):
    expected, rows = validations(runs[base_of(label)]), validations(runs[label])
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [0, 2, 3]
    assert abs(expected[2]["probe_change"]) > 100 * TOLERANCE
    for row, want in zip(rows, expected, strict=True):
        assert row.keys() == want.keys()
        # Before the first update rounding alone decides which of a pair's rewards is larger.
        assert row.get("warnings") == want.get("warnings")
        for key in [key for key in want if key != "warnings" and (key, row["step"]) != ("reward_accuracy", 0)]:
            assert row[key] == pytest.approx(want[key], abs=TOLERANCE, rel=TOLERANCE), (label, row["step"], key)


def reference_of(run: Path) -> dict[str, tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "reference.jsonl").read_text().splitlines()]
    return {row["id"]: (row["logp_chosen"], row["logp_rejected"]) for row in rows}


@pytest.mark.parametrize("label", LABELS)
def test_the_reference_does_not_depend_on_the_split(runs, label):
    """The file, which rank 0 writes: the last stage has the sums."""
    expected = reference_of(runs[base_of(label)])
    found = reference_of(runs[label])
    assert found.keys() == expected.keys()
    for pair, sums in expected.items():
        assert found[pair] == pytest.approx(sums, abs=1e-4), pair


@pytest.mark.parametrize("label", LABELS)
def test_weights_do_not_depend_on_the_split(runs, label):
    expected = load_all(runs[base_of(label)] / "hf")
    weights = load_all(runs[label] / "hf")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() <= TOLERANCE, name


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_the_steps_moved_the_weights(runs):
    """The comparison above means something: three steps changed the weights by far more than the tolerance."""
    run = runs["untied-one_rank"]
    before, after = load_all(run.parent.parent / "untied"), load_all(run / "hf")
    assert max((after[name] - before[name]).abs().max() for name in before) > 100 * TOLERANCE


def test_step_zero_is_the_reference(runs):
    for label in LABELS:
        first = metrics(runs[label])[0]
        assert first["loss"] == pytest.approx(1.3862943611, abs=1e-5), label
        assert abs(first["reward_chosen"]) < 1e-5, label
        assert abs(first["reward_rejected"]) < 1e-5, label


def test_shared_layout_computes_fewer_tokens(runs):
    shared, separate = metrics(runs["untied-one_rank"])[0], metrics(runs["untied-separate"])[0]
    assert shared["tokens"] == separate["tokens"] == separate["unique_tokens"]
    assert shared["unique_tokens"] < 0.8 * shared["tokens"]
