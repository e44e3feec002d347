"""The schema of a recipe: keys, types, limits, defaults and descriptions. Combinations are checked in rules.py.

Descriptions are printed by `make recipe-help` and are the text of the recipe reference in docs/. Limits (ge, gt, lt)
are printed from the field itself, so a description does not repeat them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from spot_megatron.recipe.execution import Memory, Parallel, Precision
from spot_megatron.recipe.section import Section


class Model(Section):
    """The policy; its initial weights are also the reference."""

    hf: str = Field(description="Folder with config.json and safetensors files, or a Hugging Face hub id.")
    attention: Literal["auto", "flash3", "flash2", "engine", "torch", "flex", "sdpa"] = Field(
        "auto",
        description="Attention kernel on CUDA. auto takes the first of flash3, flash2, torch, flex, sdpa that is "
        "installed; engine is Transformer Engine's. On CPU it must be auto.",
    )


class Lora(Section):
    """Low-rank adapters beside frozen weights. The export is the merged model; export.adapter adds a PEFT folder."""

    rank: int | None = Field(None, ge=1, description="Rank of every adapter. null: all weights are trained.")
    alpha: float = Field(32, gt=0, description="Adapters' outputs are scaled by alpha / rank.")
    targets: list[
        Literal["attention", "mlp", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ] = Field(
        ["attention", "mlp"],
        min_length=1,
        description="Modules with adapters: attention (its four projections), mlp (its three, of experts too), or "
        "projections by name. The router, norms and embeddings have none.",
    )
    adapter: str | None = Field(
        None,
        description="PEFT folder whose adapters are trained further, with the same rank, alpha and targets; the "
        "reference is the model with them. null: A is random, B is 0.",
    )


class Data(Section):
    """Preference pairs and how they are packed into micro-batches."""

    pairs: str | list[str] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        description="Pair file, list of pair files, or {file: weight}, relative to the current folder. An epoch holds "
        "weight x the pairs of a file: 2 shows each pair twice, 0.5 half of them, the other half in the next epoch."
    )
    format: Literal["auto", "spot", "trl", "visual_ai_spot", "token_ids"] = Field(
        "auto", description="Format of the pair files. auto detects it from the keys of the first line."
    )
    max_tokens: int = Field(
        8192,
        ge=2,
        description="Limit in tokens of a pair's prompt plus its longer response; longer pairs are dropped, counted.",
    )
    enable_thinking: bool = Field(False, description="Passed to the chat template that renders the prompt.")
    order: Literal["shuffled", "file"] = Field(
        "shuffled", description="shuffled draws a new permutation every epoch; file keeps the order of the files."
    )
    layout: Literal["shared", "separate"] = Field(
        "shared",
        description="shared computes the prompt and the responses' common prefix once a pair; separate computes two "
        "full sequences. Loss and gradients are equal.",
    )
    tokens_per_microbatch: int = Field(
        8192, ge=1, description="Token budget of one packed micro-batch on one data-parallel rank, without padding."
    )
    pairs_per_microbatch: int | None = Field(
        None, ge=1, description="Upper bound on the pairs of a micro-batch, besides the token budget. null: no bound."
    )


class Shift(Section):
    """The reward shift delta of spot_bco."""

    kind: Literal["none", "ema", "cumulative", "cumulative_inclusive"] = Field(
        "ema",
        description="Average over steps of (mean chosen + mean rejected reward) / 2: none (delta is 0), ema, "
        "cumulative (all earlier steps), or cumulative_inclusive (all micro-batches so far, the current one included, "
        "as in TRL 0.20's bco_pair).",
    )
    decay: float = Field(0.9, ge=0, lt=1, description="Weight of the old delta in each update. Only for kind ema.")


class Objective(Section):
    """The loss."""

    name: Literal["spot_bce", "spot_bco", "dpo", "reward_sft", "sft", "dft"] = Field(
        "spot_bco", description="The loss function; its formula is in objective/losses.py."
    )
    beta: float = Field(
        0.1, gt=0, description="Scale of the implicit reward, beta * (policy - reference log-probability in nats)."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Adds this times the loss of `sft` (mean token NLL of the chosen side) to the objective."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that chosen and rejected are swapped. Only for dpo and spot_bce."
    )
    shift: Shift = Shift()


class Train(Section):
    """Length of the run."""

    batch_pairs: int = Field(32, ge=1, description="Pairs in a global batch, that is, in one optimizer step.")
    epochs: int = Field(2, ge=1, description="Passes over the pairs.")
    max_steps: int | None = Field(
        None, ge=1, description="Ends the run after this many optimizer steps. null: after the last epoch."
    )
    log_every_steps: int = Field(
        1, ge=1, description="Steps between progress lines. metrics.jsonl always holds every step."
    )


class Optim(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Learning rate after the warm-up: constant, or falling to min_lr at the last step."
    )
    warmup_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of all steps over which the learning rate rises linearly to its peak."
    )
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a linear or cosine schedule.")
    betas: list[float] = Field(
        [0.9, 0.95], min_length=2, max_length=2, description="Decay rates of AdamW's two moments, each in [0, 1)."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator of AdamW's update.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay of matrices; norms and biases are not decayed."
    )
    clip_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to at most this global L2 norm. 0 disables clipping."
    )


class Validation(Section):
    """Held-out pairs and texts to keep, measured before the first update and while training. No effect on updates."""

    pairs: str | list[str] | None = Field(
        None, description="File or files of held-out pairs, in the format of data.pairs. null: none."
    )
    fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of data.pairs that is held out instead, by a hash of the prompt: all pairs of a prompt are "
        "on one side, and a prompt is on the same side in every run. 0: none.",
    )
    probe: str | None = Field(
        None,
        description='JSONL of {"prompt", "response"}: texts that the model should keep; their mean log-probability a '
        "token is compared with the initial model's. null: none.",
    )
    every_steps: int = Field(50, ge=1, description="Steps between validations; the last step is validated too.")
    keep_best: Literal["loss", "reward_accuracy", "reward_margin", "probe"] | None = Field(
        None,
        description="Keeps the checkpoint of the validation with the lowest loss, or the highest reward accuracy, "
        "reward margin or probe_change, besides those of checkpoint.keep, and exports it. null: the last step is "
        "exported.",
    )
    patience: int | None = Field(
        None, ge=1, description="Ends the run after this many validations in a row without a better one. null: never."
    )

    @property
    def pair_files(self) -> list[Path]:
        return [Path(file) for file in ([self.pairs] if isinstance(self.pairs, str) else self.pairs or [])]

    @property
    def holds_out_pairs(self) -> bool:
        return bool(self.pair_files) or self.fraction > 0


class Checkpoint(Section):
    """Checkpoints of the run, in output/checkpoints."""

    every_steps: int | None = Field(
        50,
        ge=1,
        description="Steps between checkpoints; a stop by a signal is saved too. null: only a stop by a signal. "
        "The last step is exported instead, or saved if nothing is exported.",
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept.")
    background: bool = Field(
        False,
        alias="async",
        description="A thread writes the checkpoint while training continues; an update waits only until weights and "
        "optimizer state are copied to host memory, which must have room for them.",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto resumes from the newest checkpoint in output; never renames an earlier run's folder."
    )


class Logging(Section):
    """Loggers besides metrics.jsonl and report.html."""

    tensorboard: bool = Field(True, description="Writes TensorBoard events to output/tensorboard.")
    wandb: bool = Field(
        False, description="Logs to Weights & Biases; needs the wandb package. Offline with WANDB_MODE=offline."
    )
    mlflow: bool = Field(
        False, description="Logs to MLflow; needs the mlflow package. To MLFLOW_TRACKING_URI, else output/mlflow."
    )
    swanlab: bool = Field(
        False, description="Logs to SwanLab; needs the swanlab package. Offline with SWANLAB_MODE=offline."
    )
    trackio: bool = Field(False, description="Logs to Trackio, in TRACKIO_DIR; needs the trackio package.")


class Export(Section):
    """The result as a Hugging Face folder, in output/hf."""

    hf: bool = Field(True, description="Exports the trained model after the last step.")
    dtype: Literal["source", "fp32", "bf16"] = Field(
        "source", description="Type of the exported weights. source: as in model.hf."
    )
    push_to_hub: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9._-]+/)?[A-Za-z0-9._-]+$",
        description="Repository of the Hugging Face hub, made private, that the result is uploaded to with a model "
        "card; needs HF_TOKEN. null: no upload.",
    )
    shard_gb: float = Field(5.0, gt=0, description="Upper bound on the size of a safetensors file, in 10^9 bytes.")
    adapter: bool = Field(False, description="With lora: also writes the adapters as a PEFT folder, output/adapter.")

    @property
    def has_result(self) -> bool:
        """Whether the last state is exported, so that no checkpoint of it is needed."""
        return self.hf or self.adapter


class Evaluation(Section):
    """Questions for the base and the exported model after `make train`; the other keys are tools.eval's options."""

    questions: str | None = Field(
        None, description='JSONL of {"question", "answer", "skill"}. null: no evaluation after training.'
    )
    samples: int = Field(1, ge=1, description="Responses sampled for each question.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature. 0: greedy decoding.")
    top_p: float = Field(0.8, gt=0, le=1, description="Nucleus sampling: share of the probability mass that is kept.")
    top_k: int = Field(20, ge=0, description="Number of most likely tokens that are kept. 0: no limit.")
    max_new_tokens: int = Field(
        128, ge=1, description="Limit of a response in tokens. A response cut there is graded as it is."
    )
    batch_size: int = Field(128, ge=1, description="Responses generated at once.")


class Recipe(Section):
    """One training run. In a file, `extends` may name another recipe, whose values apply where this one has none."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run, in logs and reports.")
    output: str = Field(description="Run folder, relative to the current folder.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto uses CUDA where a GPU is visible.")
    seed: int = Field(1234, ge=0, description="Seed of the order of the pairs and of each step's random state.")
    deterministic: bool = Field(
        False, description="Deterministic kernels only: repeated runs on one machine give equal bits. Slower."
    )
    model: Model
    lora: Lora = Lora()
    data: Data
    objective: Objective = Objective()
    train: Train = Train()
    optim: Optim = Optim()
    validation: Validation = Validation()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    export: Export = Export()
    evaluation: Evaluation = Evaluation()

    @property
    def pair_files(self) -> list[Path]:
        return [Path(file) for file in ([self.data.pairs] if isinstance(self.data.pairs, str) else self.data.pairs)]

    @property
    def pair_weights(self) -> dict[Path, float]:
        """Weights of the pair files that have one."""
        pairs = self.data.pairs
        return {Path(file): weight for file, weight in pairs.items()} if isinstance(pairs, dict) else {}

    @property
    def has_compact_states(self) -> bool:
        """The optimizer keeps less than fp32 master weights and moments."""
        return self.memory.master_weights != "fp32" or self.memory.moments != "fp32"

    def dump(self) -> str:
        """The resolved recipe as YAML; loading it gives the same recipe."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(data, sort_keys=False)
