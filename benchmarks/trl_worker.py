"""Trains a job with TRL's own DPOTrainer. Runs in TRL's environment, not in this project's.

TRL receives token ids in file order, and the same objective and optimizer settings; forward pass, loss, loop and AdamW
are TRL's. Supports 0.20 and 1.x.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.cases import BETA, OPTIM
from benchmarks.worker import Stopwatch, read_job, write_result

OLD = trl.__version__.startswith("0.")


class Steps(TrainerCallback):
    """From the first forward pass of a step to the end of its update."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.start("step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.stop()


class ListeningTrainer(DPOTrainer):
    """DPOTrainer on ready token ids in file order; `micro_losses` holds the computed losses."""

    def __init__(self, watch: Stopwatch, **kwargs: Any) -> None:
        self.watch = watch
        self.micro_losses: list[float] = []
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> Any:  # 0.20 computes the reference here
        if not OLD:
            return super().get_train_dataloader()
        self.watch.start("reference")
        loader = super().get_train_dataloader()
        self.watch.stop()
        return loader

    def _precompute_ref_logps(self, *args: Any) -> Dataset:  # 1.x, from its __init__
        self.watch.start("reference")
        dataset = super()._precompute_ref_logps(*args)
        self.watch.stop()
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self.model.training:
            self.micro_losses.append(loss.item())
        return result


def dataset_of(path: str) -> Dataset:
    suffix = "_input_ids" if OLD else "_ids"
    pairs = [json.loads(line) for line in Path(path).read_text().splitlines()]
    columns = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{f"{name}{suffix}": pair[f"{name}_ids"] for name in columns} for pair in pairs])


def build(job: dict[str, Any], watch: Stopwatch, scratch: str) -> ListeningTrainer:
    longest: dict[str, Any] = {"max_length": None}
    if OLD:
        longest |= {"max_prompt_length": None, "max_completion_length": None, "padding_value": 0}
    args = DPOConfig(
        output_dir=scratch,
        loss_type="bco_pair",
        beta=BETA,
        per_device_train_batch_size=job["pairs_per_microbatch"],
        gradient_accumulation_steps=job["batch_pairs"] // job["pairs_per_microbatch"],
        max_steps=job["num_steps"],
        learning_rate=OPTIM["lr"],
        lr_scheduler_type="constant",
        adam_beta1=OPTIM["betas"][0],
        adam_beta2=OPTIM["betas"][1],
        adam_epsilon=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
        max_grad_norm=OPTIM["clip_grad_norm"],
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,  # the default of 0.20, and the faster choice
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **longest,
    )
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))  # never called: the trainer wants a tokenizer to exist
    return ListeningTrainer(
        watch,
        model=Qwen3ForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        if not OLD
        else Qwen3ForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32),
        args=args,
        train_dataset=dataset_of(job["pairs"]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?", eos_token="?"),
        callbacks=[Steps(watch)],
    )


def main() -> None:
    job = read_job()
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(job, watch, scratch)
        trainer.train()
    each = job["batch_pairs"] // job["pairs_per_microbatch"]
    losses = [sum(trainer.micro_losses[i * each : (i + 1) * each]) / each for i in range(job["num_steps"])]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    write_result(job, watch, losses, versions=versions, num_parameters=trainer.model.num_parameters())


if __name__ == "__main__":
    main()
