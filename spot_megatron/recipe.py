"""Recipes: strict, typed YAML. A recipe may extend another and changes only what it names; --set changes one key.

An unknown key, a value of the wrong kind or a combination that cannot run is a RecipeError naming the file and the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spot_megatron.errors import RecipeError
from spot_megatron.files import did_you_mean

RECIPE_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    hf: str  # folder with config.json and safetensors, or hub id
    # The attention kernel on CUDA; auto takes the first of flash3, flash2, torch, flex, sdpa that is installed.
    attention: Literal["auto", "flash3", "flash2", "engine", "torch", "flex", "sdpa"] = "auto"


class Data(Section):
    pairs: str | list[str]
    format: Literal["auto", "spot", "trl", "visual_ai_spot", "token_ids"] = "auto"
    max_tokens: int = Field(8192, ge=2)  # prompt + longer response; longer pairs are dropped and counted
    enable_thinking: bool = False  # passed to the prompt's chat template
    order: Literal["shuffled", "file"] = "shuffled"
    layout: Literal["shared", "separate"] = "shared"
    tokens_per_microbatch: int = Field(8192, ge=1)
    pairs_per_microbatch: int | None = Field(None, ge=1)


class Shift(Section):
    kind: Literal["none", "ema", "cumulative", "cumulative_inclusive"] = "ema"
    decay: float = Field(0.9, ge=0, lt=1)


class Objective(Section):
    name: Literal["spot_bce", "spot_bco", "dpo", "reward_sft", "sft", "dft"] = "spot_bco"
    beta: float = Field(0.1, gt=0)
    shift: Shift = Shift()


class Train(Section):
    batch_pairs: int = Field(32, ge=1)
    epochs: int = Field(2, ge=1)
    max_steps: int | None = Field(None, ge=1)
    log_every_steps: int = Field(1, ge=1)  # of the progress line; metrics.jsonl has every step


class Optim(Section):
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    min_lr: float = Field(0.0, ge=0)
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad_norm: float = Field(1.0, ge=0)  # 0 switches clipping off


class Parallel(Section):
    tensor: int = Field(1, ge=1)
    sequence: bool = False
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int | None = Field(None, ge=2)
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    expert_tensor: int = Field(1, ge=1)
    timeout_minutes: float = Field(30, gt=0)  # a collective that waits longer is broken off, see train/heartbeat.py

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


class Precision(Section):
    dtype: Literal["fp32", "bf16"] = "bf16"
    fp8: Literal["none", "tensorwise", "blockwise"] = "none"
    grad_dtype: Literal["fp32", "bf16"] = "fp32"


class Memory(Section):
    recompute: Literal["none", "selective", "full"] = "none"
    # With recompute none: micro-batches of several pairs stay within this many tokens and keep their activations; only
    # a longer pair, alone in its micro-batch, is recomputed in full.
    recompute_above_tokens: int | None = Field(None, ge=1)
    master_weights: Literal["fp32", "remainders"] = "fp32"  # remainders: the low 16 bits, beside the bf16 weights
    moments: Literal["fp32", "bf16"] = "fp32"  # AdamW's


class Checkpoint(Section):
    every_steps: int = Field(50, ge=1)
    keep: int = Field(2, ge=1)
    resume: Literal["auto", "never"] = "auto"


class Logging(Section):
    tensorboard: bool = True
    wandb: bool = False


class Export(Section):
    hf: bool = True
    shard_gb: float = Field(5.0, gt=0)


class Evaluation(Section):
    """Questions that `make train` puts to the base and to the exported model; the other keys are tools.eval's flags."""

    questions: str | None = None  # JSONL of {"question", "answer", "skill"}
    samples: int = Field(1, ge=1)  # responses a question
    temperature: float = Field(0.7, ge=0)  # 0 takes the most likely token each time
    top_p: float = Field(0.8, gt=0, le=1)
    top_k: int = Field(20, ge=0)  # 0: no limit
    max_new_tokens: int = Field(128, ge=1)  # a longer response is cut, and graded as it stands
    batch_size: int = Field(128, ge=1)


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    output: str
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = Field(1234, ge=0)
    deterministic: bool = False
    model: Model
    data: Data
    objective: Objective = Objective()
    train: Train = Train()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    export: Export = Export()
    evaluation: Evaluation = Evaluation()

    @property
    def pair_files(self) -> list[Path]:
        files = [self.data.pairs] if isinstance(self.data.pairs, str) else self.data.pairs
        return [Path(file) for file in files]

    @property
    def has_compact_states(self) -> bool:
        """The optimizer keeps less than fp32 master weights and moments."""
        return self.memory.master_weights != "fp32" or self.memory.moments != "fp32"

    def dump(self) -> str:
        """The resolved recipe as YAML; loading it gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        name: a YAML file, or the name of one in recipes/.
        overrides: `key=value` with dotted keys; the value is read as YAML. Later ones win.

    Raises:
        RecipeError: naming the file and the key, with the remedy.
    """
    path = find_recipe(name)
    raw = _read_with_parents(path, ())
    for override in overrides:
        _apply_override(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from None
    _check_combinations(recipe, path)
    return recipe


def parallel_sizes(overrides: Sequence[str]) -> Parallel:
    """The sizes that `parallel.key=value` overrides name; all others are 1.

    Raises:
        RecipeError: another key, or a value that cannot be.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith("parallel."):
            raise RecipeError(f"--set {override!r}: only keys of parallel are read here, such as parallel.tensor=2")
        _apply_override(raw, override)
    try:
        return Parallel.model_validate(raw.get("parallel", {}))
    except ValidationError as error:
        raise RecipeError(_explain(error, Path("--set"), "parallel.")) from None


def find_recipe(name: str | Path) -> Path:
    for candidate in (Path(name), RECIPE_FOLDER / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))
    hint = did_you_mean(str(name), known) or "."
    raise RecipeError(f"there is no recipe {str(name)!r}{hint} Known recipes: {', '.join(known)}; or give a YAML file")


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(child.name for child in children)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    beside = path.parent / f"{parent}.yaml"
    base = _read_with_parents(beside if beside.is_file() else find_recipe(parent), (*children, path.resolve()))
    return _merge(base, raw)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, and reads 1e-6 as the number it is meant to be."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice (line {node.start_mark.line + 1} and after)")
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        if node.style is None and "e" in text.lower():
            try:
                return float(text)
            except ValueError:
                pass
        return text


_StrictLoader.add_constructor("tag:yaml.org,2002:str", _StrictLoader.construct_yaml_str)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both_maps = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: write key=value, for instance --set optim.lr=1e-6")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from None
    *sections, leaf = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {section} is a value, not a section")
    merges = isinstance(value, dict) and isinstance(target.get(leaf), dict)
    target[leaf] = _merge(target[leaf], value) if merges else value


def _explain(error: ValidationError, path: Path, prefix: str = "") -> str:
    lines = []
    for problem in error.errors():
        key = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{did_you_mean(key, _known_keys(), cutoff=0.4)}")
        elif problem["type"] == "missing":
            lines.append(f"key {key!r} is missing")
        else:
            lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return f"{path}: " + "; ".join(lines)


def _known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _check_combinations(recipe: Recipe, path: Path) -> None:
    """What needs only the recipe to be seen as impossible. The model's own limits are checked in model/config.py."""
    parallel, objective, precision = recipe.parallel, recipe.objective, recipe.precision
    shift = objective.shift.kind
    rules = {
        "parallel.sequence: sequence parallelism splits over the tensor ranks; set parallel.tensor to 2 or more": (
            parallel.sequence and parallel.tensor == 1
        ),
        "parallel.virtual_pipeline needs parallel.pipeline of 2 or more": (
            parallel.virtual_pipeline is not None and parallel.pipeline == 1
        ),
        f"objective.shift.kind={shift} moves only spot_bco; with {objective.name} set it to none": (
            shift != "none" and objective.name != "spot_bco"
        ),
        "objective.shift.decay is the ema's; leave it out with another kind": (
            shift != "ema" and "decay" in objective.shift.model_fields_set and objective.shift.decay != 0.9
        ),
        "objective.shift.kind=cumulative_inclusive moves within a micro-batch and needs parallel.pipeline=1": (
            shift == "cumulative_inclusive" and parallel.pipeline > 1
        ),
        "optim.min_lr must not exceed optim.lr": recipe.optim.min_lr > recipe.optim.lr,
        "optim.min_lr is where a falling schedule ends; with optim.schedule=constant leave it out": (
            recipe.optim.schedule == "constant" and recipe.optim.min_lr > 0
        ),
        "optim.betas must lie in [0, 1)": not all(0 <= beta < 1 for beta in recipe.optim.betas),
        "precision.fp8 quantises bf16 training; set precision.dtype to bf16": (
            precision.fp8 != "none" and precision.dtype != "bf16"
        ),
        "precision.grad_dtype=bf16 goes with precision.dtype=bf16": (
            precision.grad_dtype == "bf16" and precision.dtype == "fp32"
        ),
        "memory.recompute_above_tokens says which packs are recomputed; set memory.recompute to none": (
            recipe.memory.recompute_above_tokens is not None and recipe.memory.recompute != "none"
        ),
        "memory.recompute_above_tokens is not below data.tokens_per_microbatch, which no pack exceeds; leave it out": (
            (recipe.memory.recompute_above_tokens or 0) >= recipe.data.tokens_per_microbatch
        ),
        "memory.master_weights=remainders and memory.moments=bf16 go with precision.dtype=bf16": (
            precision.dtype == "fp32" and recipe.has_compact_states
        ),
        "precision.fp8: Megatron-Core does not combine it with memory.master_weights=remainders or "
        "memory.moments=bf16; set both to fp32": precision.fp8 != "none" and recipe.has_compact_states,
        "export.hf=false leaves evaluation.questions nothing to ask": (
            recipe.evaluation.questions is not None and not recipe.export.hf
        ),
    }
    broken = [rule for rule, fires in rules.items() if fires]
    if broken:
        raise RecipeError(f"{path}: " + "; ".join(broken))
