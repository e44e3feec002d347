"""Runs TRL 0.20.0's own DPOTrainer on the inputs of make_inputs.py and writes golden.json.

With --lora: adapters, golden_lora.json. See README.md.

TRL computes everything. RecordingTrainer only hands it token ids in file order and listens; afterwards every recorded
micro-batch is held against the formula in `plain_losses`, so that a misreading of TRL fails here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from make_adapter import load_model, trained, write_adapter
from make_inputs import write_inputs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import RunningMoments

HERE = Path(__file__).parent
BATCH_PAIRS = 4
NUM_STEPS = 10
LR = 1e-3
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.01, 1.0
NUM_SAMPLES = 16  # elements kept of every final weight
PACKAGES = ["trl", "transformers", "torch", "accelerate", "datasets", "safetensors", "tokenizers", "peft"]


@dataclass(frozen=True)
class Case:
    """One training run. `objective` is bco (TRL's bco_pair), bce (the same with delta held at 0) or dpo (sigmoid)."""

    name: str
    objective: str
    beta: float
    model: str = "untied"
    accumulation: int = 1
    adapter: str | None = None  # PEFT folder whose adapters alone are trained
    label_smoothing: float = 0.0
    sft_weight: float = 0.0  # TRL's rpo_alpha, a mean over a micro-batch's tokens, ours over pairs: accumulate


CASES = [
    Case("bco", "bco", beta=0.1),
    Case("bco_accum2", "bco", beta=0.5, accumulation=2),
    Case("bco_tied", "bco", beta=0.3, model="tied"),
    Case("bce", "bce", beta=0.5),
    Case("dpo", "dpo", beta=0.1),
    Case("dpo_small_beta", "dpo", beta=0.03),  # gradient norms on both sides of the clip
    Case("dpo_smooth", "dpo", beta=0.1, label_smoothing=0.1),
    Case("dpo_sft", "dpo", beta=0.1, accumulation=4, label_smoothing=0.05, sft_weight=0.5),
    Case("bce_sft", "bce", beta=0.5, accumulation=4, sft_weight=0.2),
]
LORA_CASES = [
    Case("lora_bco", "bco", beta=0.5, adapter="adapter"),
    Case("lora_dpo", "dpo", beta=0.1, adapter="adapter"),
]


class HeldAtZero(RunningMoments):
    """A running mean that stays 0, which makes bco_pair delta-free."""

    def update(self, xs: torch.Tensor) -> tuple[float, float]:
        return 0.0, 0.0


class RecordingTrainer(DPOTrainer):
    """DPOTrainer on ready token ids in file order. `micro_batches` and `steps` hold what it computed and logged."""

    def __init__(self, **kwargs: Any) -> None:
        self.micro_batches: list[dict[str, Any]] = []
        self.steps: list[dict[str, float]] = []
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def dpo_loss(
        self,
        chosen_logps: torch.Tensor,
        rejected_logps: torch.Tensor,
        ref_chosen_logps: torch.Tensor,
        ref_rejected_logps: torch.Tensor,
        loss_type: str = "sigmoid",
        model_output: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        losses, chosen, rejected = super().dpo_loss(*logps, loss_type, model_output)
        nll = float(model_output["nll_loss"]) if self.args.rpo_alpha is not None else 0.0
        record = {
            "losses": losses.tolist(),
            "sft": (self.args.rpo_alpha or 0.0) * nll,  # TRL adds it to the losses after this method
            "rewards_chosen": chosen.tolist(),
            "rewards_rejected": rejected.tolist(),
            "delta": float(self.running.mean) if loss_type == "bco_pair" else None,
            "logps": torch.stack(logps).detach().double(),
        }
        self.micro_batches.append(record)
        return losses, chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # adds TRL's own reward means to `logs`
        if "loss" in logs:
            self.steps.append(dict(logs))


def plain_losses(case: Case, logps: torch.Tensor, means: list[float]) -> tuple[torch.Tensor, float | None]:
    """The objective as README.md writes it, in fp64.

    Args:
        logps: [4, B] policy chosen, policy rejected, reference chosen, reference rejected
        means: mean reward of every earlier micro-batch; this one's is appended

    Returns:
        losses [B] and the delta used
    """
    chosen, rejected = case.beta * (logps[:2] - logps[2:])
    softplus = torch.nn.functional.softplus
    if case.objective == "dpo":
        smoothing = case.label_smoothing
        return (1 - smoothing) * softplus(rejected - chosen) + smoothing * softplus(chosen - rejected), None
    means.append(torch.cat([chosen, rejected]).mean().item())
    delta = sum(means) / len(means) if case.objective == "bco" else 0.0
    return softplus(delta - chosen) + softplus(rejected - delta), delta


def build_trainer(case: Case, folder: Path, pairs: list[dict[str, Any]], scratch: str) -> RecordingTrainer:
    columns = ("prompt", "chosen", "rejected")
    dataset = Dataset.from_list([{f"{name}_input_ids": pair[f"{name}_ids"] for name in columns} for pair in pairs])
    args = DPOConfig(
        output_dir=scratch,
        loss_type="sigmoid" if case.objective == "dpo" else "bco_pair",
        beta=case.beta,
        label_smoothing=case.label_smoothing,
        rpo_alpha=case.sft_weight or None,
        per_device_train_batch_size=BATCH_PAIRS // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        max_steps=NUM_STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        precompute_ref_log_probs=True,
        padding_value=0,
        bf16=False,  # DPOConfig's default is True
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RecordingTrainer(
        model=load_model(folder / case.model, folder / case.adapter if case.adapter else None),
        args=args,
        train_dataset=dataset,
        # never called: the trainer wants one to exist
        processing_class=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?"))),
    )
    if case.objective == "bce":
        trainer.running = HeldAtZero(trainer.accelerator)
    return trainer


def check_micro_batches(case: Case, micro_batches: list[dict[str, Any]]) -> None:
    """TRL's losses, rewards and delta are those of `plain_losses`, up to fp32 rounding."""
    means: list[float] = []
    for record in micro_batches:
        losses, delta = plain_losses(case, record["logps"], means)
        torch.testing.assert_close(torch.tensor(record["losses"]).double(), losses, rtol=1e-5, atol=1e-6)
        assert (record["delta"] is None) == (delta is None)
        assert delta is None or abs(record["delta"] - delta) < 1e-6, (record["delta"], delta)


def step_records(case: Case, trainer: RecordingTrainer) -> list[dict[str, Any]]:
    """One object per optimizer step: means over its pairs, measured before its update."""
    records = []
    for i, logged in enumerate(trainer.steps):
        parts = trainer.micro_batches[i * case.accumulation : (i + 1) * case.accumulation]
        losses = [loss + part["sft"] for part in parts for loss in part["losses"]]
        loss = sum(losses) / len(losses)
        assert len(losses) == BATCH_PAIRS
        assert abs(loss - logged["loss"]) < 1e-4, "transformers logs the same loss, to four digits"
        records.append(
            {
                "step": i + 1,
                "loss": loss,
                "reward_chosen": logged["rewards/chosen"],
                "reward_rejected": logged["rewards/rejected"],
                "reward_margin": logged["rewards/margins"],
                "reward_accuracy": logged["rewards/accuracies"],
                "deltas": None if case.objective == "dpo" else [part["delta"] for part in parts],
                "grad_norm": logged["grad_norm"],
                "lr": logged["learning_rate"],
                "pair_rewards_chosen": [reward for part in parts for reward in part["rewards_chosen"]],
                "pair_rewards_rejected": [reward for part in parts for reward in part["rewards_rejected"]],
            }
        )
    return records


def weight_records(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Per tensor: norm after training, norm of its change, and NUM_SAMPLES elements evenly spaced in its flat order."""
    records = {}
    for name, weight in trained(model).items():
        flat = weight.detach().double().flatten()
        samples = flat[:: flat.numel() // NUM_SAMPLES][:NUM_SAMPLES]
        change = (flat - before[name].double().flatten()).norm()
        records[name] = {"norm": flat.norm().item(), "change": change.item(), "samples": samples.tolist()}
    return records


def run_case(case: Case, folder: Path, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Trains one case.

    Returns:
        `case` (its record in golden.json), `reference` (per pair id: the two summed log-probs) and `decayed` (the
        names of the weights in the optimizer's group with weight decay)
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(case, folder, pairs, scratch)
        before = {name: weight.detach().clone() for name, weight in trained(trainer.model).items()}
        trainer.train()
    assert len(trainer.steps) == NUM_STEPS
    check_micro_batches(case, trainer.micro_batches)
    names = {id(weight): name for name, weight in trained(trainer.model).items()}
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizer.param_groups}
    assert set(groups) == {WEIGHT_DECAY, 0.0}
    data = trainer.train_dataset
    references = zip(data["ref_chosen_logps"], data["ref_rejected_logps"], strict=True)
    steps = step_records(case, trainer)
    return {
        "case": {**asdict(case), "steps": steps, "final_weights": weight_records(trainer.model, before)},
        "reference": {pair["id"]: list(sums) for pair, sums in zip(pairs, references, strict=True)},
        "decayed": [names[id(weight)] for weight in groups[WEIGHT_DECAY]],
    }


def rounded(value: Any) -> Any:
    """Floats to nine significant digits, which hold an fp32 number exactly."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def height(value: Any) -> int:
    """How deep containers are nested in `value`: 0 for a number, 1 for a list of numbers."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(height, items), default=0)


def to_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each step and weight: what is nested no deeper than a record of lists stays on one line."""
    if height(value) <= 2:
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        lines = [f"{deeper}{json.dumps(key)}: {to_json(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + to_json(item, deeper) for item in value) + f"\n{indent}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", action="store_true", help="make the models and pairs again first")
    parser.add_argument("--lora", action="store_true", help="the cases with adapters, into golden_lora.json")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.inputs:
        write_inputs(HERE)
        write_adapter(HERE)
    pairs = [json.loads(line) for line in (HERE / "pairs.jsonl").read_text().splitlines()]
    golden: dict[str, Any] = {
        "versions": {name: version(name) for name in PACKAGES},
        "batch_pairs": BATCH_PAIRS,
        "optim": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY, "clip_grad_norm": CLIP},
        "decayed_weights": {},
        "reference": {},
        "cases": [],
    }
    for case in LORA_CASES if arguments.lora else CASES:
        result = run_case(case, HERE, pairs)
        golden["cases"].append(result["case"])
        first = golden["reference"].setdefault(case.model, result["reference"])
        for pair_id, sums in result["reference"].items():  # another micro-batch size may move the last bits
            torch.testing.assert_close(torch.tensor(sums), torch.tensor(first[pair_id]), rtol=1e-6, atol=0)
        assert golden["decayed_weights"].setdefault(case.model, result["decayed"]) == result["decayed"]
    (arguments.output or HERE / f"golden{'_lora' * arguments.lora}.json").write_text(to_json(rounded(golden)) + "\n")


if __name__ == "__main__":
    main()
