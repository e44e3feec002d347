"""Parity where test_parity.py is blind: middle and uneven stages, ranks without pairs, weight decay, bf16, and updates
in proportion to the gradient, which show an error that AdamW normalises away. See test_parity.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import random_pairs, write_token_pairs
from tests.train.test_parity import COMPARED, MOE_SPLITS, SPLITS, TOLERANCE, load_all, metrics, train_all
from tests.weights.models import make_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # one fixture trains everything

MODELS: dict[str, dict[str, Any]] = {
    "untied": {"tied": False},
    "tied": {"tied": True},
    "moe": {"tied": False, "family": "qwen3_moe_some"},
    "qwen2": {"tied": False, "family": "qwen2"},
    "tied5": {"tied": True, "num_hidden_layers": 5},
    "moe5": {"tied": False, "family": "qwen3_moe_some", "num_hidden_layers": 5},
}
ALL_SPLITS = {
    **SPLITS,
    **MOE_SPLITS,
    "dp4": (4, {}),
    "pp3": (3, {"parallel": {"pipeline": 3}, "data": {"pairs_per_microbatch": 2}}),
    "etp2_alone": (2, {"parallel": {"tensor": 1, "expert_tensor": 2}}),
    "ep4": (4, {"parallel": {"expert": 4}}),
    "tp4_etp2": (4, {"parallel": {"tensor": 4, "sequence": True, "expert_tensor": 2}}),
    "ep4_tp2": (4, {"parallel": {"expert": 4, "tensor": 2, "sequence": True}}),
    "ep2_cp2_vpp2": (
        4,
        {
            "parallel": {"expert": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2},
            "data": {"pairs_per_microbatch": 2},
        },
    ),
}
# name -> what differs from BASE; each has a run on one rank of its own to be compared with
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few": {"train": {"batch_pairs": 2, "max_steps": 3}},  # ranks without any pair
    "decay": {"optim": {"weight_decay": 1.0, "lr": 1e-2}},
    "proportional": {"optim": {"lr": 10.0, "eps": 1e4, "clip_grad_norm": 0.0, "weight_decay": 0.0}},
    "bf16": {"precision": {"dtype": "bf16"}, "train": {"max_steps": 1}},
}
CASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("untied", "few"): ("dp4", "vpp2_dp2", "cp2_dp2"),
    ("tied", "plain"): ("pp4", "vpp2", "vpp2_dp2", "tp2_sp", "cp2"),
    ("moe", "plain"): ("pp4", "vpp2", "cp2", "dp2", "tp4_etp2", "ep4_tp2", "ep2_cp2_vpp2"),
    ("moe", "few"): ("ep4",),
    ("qwen2", "plain"): ("tp2_sp", "pp2", "dp2"),
    ("tied5", "plain"): ("pp2", "pp3"),
    ("moe5", "plain"): ("pp2", "pp3"),
    ("untied", "decay"): ("tp2_dp2",),
    ("tied", "decay"): ("pp2_dp2",),
    ("moe", "decay"): ("ep2_tp2",),
    ("untied", "proportional"): ("tp2_sp", "pp4", "cp2_dp2"),
    ("tied", "proportional"): ("tp2_pp2", "pp2_dp2"),
    ("moe", "proportional"): ("ep2_tp2", "etp2", "ep2_pp2"),
    ("untied", "bf16"): ("tp2_sp",),
    ("tied", "bf16"): ("pp2_dp2",),
    ("moe", "bf16"): ("ep2_tp2",),
}
LABELS = [(model, variant, split) for (model, variant), splits in CASES.items() for split in splits]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity_more")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(22))
    for model, options in MODELS.items():
        make_folder(folder / model, **options)
    jobs = {}
    for (model, variant), splits in CASES.items():
        for split in ("one_rank", *splits):
            num_processes, changes = ALL_SPLITS[split]
            both = VARIANTS[variant]
            merged = {key: {**both.get(key, {}), **changes.get(key, {})} for key in both | changes}
            jobs[f"{model}-{variant}-{split}"] = (model, num_processes, merged)
    return train_all(folder, jobs)


@pytest.mark.parametrize(("model", "variant", "split"), LABELS)
def test_the_split_changes_nothing(runs, model, variant, split):
    base, run = runs[f"{model}-{variant}-one_rank"], runs[f"{model}-{variant}-{split}"]
    tolerance = 5e-3 if variant == "bf16" else TOLERANCE
    rows, wanted = metrics(run), metrics(base)
    assert len(rows) == len(wanted) > 0
    for row, want in zip(rows, wanted, strict=True):
        assert (row["pairs"], row["tokens"]) == (want["pairs"], want["tokens"])
        keys = ["grad_norm"] if variant == "bf16" else [key for key in COMPARED if key != "reward_accuracy"]
        for key in keys:
            assert row[key] == pytest.approx(want[key], abs=TOLERANCE, rel=tolerance), (row["step"], key)
    if variant == "bf16":
        return
    before, expected, found = load_all(base.parent.parent / model), load_all(base / "hf"), load_all(run / "hf")
    for name, tensor in expected.items():
        largest = (tensor - before[name]).abs().max()
        if variant == "proportional":  # per tensor, relative to its largest change
            assert largest > 0, name
            assert (found[name] - tensor).abs().max() <= 5e-3 * largest, name
        else:
            assert (found[name] - tensor).abs().max() <= TOLERANCE, name
