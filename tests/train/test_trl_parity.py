"""Ten steps follow TRL 0.20.0's own DPOTrainer, with adapters its DPOTrainer on PEFT's model.

The golden files, and how they were made: tests/golden/trl/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spot_megatron.hf.folder import HFFolder
from tests import processes
from tests.support import make_recipe

GOLDEN = processes.ROOT / "tests/golden/trl"
TRL = json.loads((GOLDEN / "golden.json").read_text())
LORA = json.loads((GOLDEN / "golden_lora.json").read_text())
CASES = {case["name"]: case for golden in (TRL, LORA) for case in golden["cases"]}
OURS = {"bco": "spot_bco", "bce": "spot_bce", "dpo": "dpo"}


def adapters_of(case: dict) -> dict:
    """The recipe's section for a case: no adapters, or those of its PEFT folder."""
    if case.get("adapter") is None:
        return {}
    config = json.loads((GOLDEN / case["adapter"] / "adapter_config.json").read_text())
    return {"rank": config["r"], "alpha": config["lora_alpha"], "adapter": str(GOLDEN / case["adapter"])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The run folder of every golden case, shared layout, trained in one process."""
    folder = tmp_path_factory.mktemp("trl")
    jobs = []
    for name, case in CASES.items():
        objective = OURS[case["objective"]]
        inclusive = {"kind": "cumulative_inclusive"} if objective == "spot_bco" else {"kind": "none"}
        recipe = make_recipe(
            folder,
            lora=adapters_of(case),
            export={"adapter": case.get("adapter") is not None},
            output=str(folder / name),
            model={"hf": str(GOLDEN / case["model"])},
            data={
                "pairs": str(GOLDEN / "pairs.jsonl"),
                "order": "file",
                "pairs_per_microbatch": TRL["batch_pairs"] // case["accumulation"],
            },
            objective={
                "name": objective,
                "beta": case["beta"],
                "shift": inclusive,
                "sft_weight": case["sft_weight"],
                "label_smoothing": case["label_smoothing"],
            },
            train={"batch_pairs": TRL["batch_pairs"], "epochs": 1},
            optim={**TRL["optim"], "schedule": "constant", "warmup_fraction": 0.0},
        )
        (folder / f"{name}.yaml").write_text(recipe.dump())
        jobs.append(str(folder / f"{name}.yaml"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = [str(processes.ROOT / "tests/train/worker.py"), str(folder / "jobs.json")]
    assert processes.run(worker, folder / "log.txt") == 0, processes.output_of(folder / "log.txt")[-6000:]
    return {name: folder / name for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_steps(runs, name):
    rows = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
    steps = CASES[name]["steps"]
    assert len(rows) == len(steps) == 10
    for row, want in zip(rows, steps, strict=True):
        for key in ("loss", "reward_chosen", "reward_rejected", "reward_margin"):
            assert row[key] == pytest.approx(want[key], abs=1e-4), (row["step"], key)
        if CASES[name]["objective"] == "bco":
            assert row["reward_shift"] == pytest.approx(want["deltas"][-1], abs=1e-4), row["step"]
        if row["step"] > 1:  # at step 1 every reward is a tie
            assert row["reward_accuracy"] == want["reward_accuracy"]
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3), row["step"]
        assert row["lr"] == want["lr"]


@pytest.mark.parametrize("name", CASES)
def test_final_weights(runs, name):
    """A wrong weight-decay group moves a weight's norm by 1e-4, and the rewards hardly at all."""
    is_lora = bool(adapters_of(CASES[name]))
    exported = HFFolder(runs[name] / ("adapter" if is_lora else "hf"))
    assert not is_lora or exported.names() == sorted(CASES[name]["final_weights"])
    for tensor_name, want in CASES[name]["final_weights"].items():
        tensor = exported.read(tensor_name).double()
        assert tensor.norm().item() == pytest.approx(want["norm"], rel=1e-6), tensor_name
        flat = tensor.flatten()
        samples = flat[:: max(1, len(flat) // 16)][:16]
        torch.testing.assert_close(samples, torch.tensor(want["samples"], dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_reference_pass(runs, name):
    want = (LORA if adapters_of(CASES[name]) else TRL)["reference"][CASES[name]["model"]]
    rows = [json.loads(line) for line in (runs[name] / "reference.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(want)
    for row in rows:
        assert [row["logp_chosen"], row["logp_rejected"]] == pytest.approx(want[row["id"]], abs=1e-4)
