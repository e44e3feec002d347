"""Recipes: strictness, inheritance, overrides, and that nothing configured is ignored."""

from __future__ import annotations

import pytest

from spot_megatron.errors import RecipeError
from spot_megatron.recipe import Recipe, find_recipe, load_recipe


def write(folder, name, text):
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


BASE = "name: base\noutput: runs/base\nmodel: {hf: m}\ndata: {pairs: p.jsonl}\n"


def test_a_child_changes_only_what_it_names(tmp_path):
    write(tmp_path, "base", BASE + "optim: {lr: 1e-5, eps: 1e-7}\n")
    child = load_recipe(write(tmp_path, "child", "extends: base\nname: child\noptim: {lr: 2.0e-5}\n"))
    assert (child.name, child.output) == ("child", "runs/base")
    assert (child.optim.lr, child.optim.eps) == (2e-5, 1e-7)


def test_overrides_win_in_order(tmp_path):
    path = write(tmp_path, "base", BASE)
    recipe = load_recipe(path, ["optim.lr=3e-6", "optim.lr=4e-6", "data.pairs=[a.jsonl, b.jsonl]", "train={epochs: 7}"])
    assert recipe.optim.lr == 4e-6
    assert recipe.data.pairs == ["a.jsonl", "b.jsonl"]
    assert recipe.train.epochs == 7
    assert recipe.train.batch_pairs == 32


def test_the_dump_is_the_recipe(tmp_path):
    recipe = load_recipe("qwen3_8b_spot", ["optim.lr=1.5e-6"])
    assert load_recipe(write(tmp_path, "again", recipe.dump())) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "optim: {lrr: 1}\n", ["optim.lrr", "optim.lr", "bad.yaml"]),
        (BASE + "trian: {epochs: 1}\n", ["trian", "train"]),
        (BASE + "optim: {lr: [1]}\n", ["optim.lr"]),
        (BASE + "train: {epochs: 2.5}\n", ["train.epochs", "2.5"]),
        (BASE + "name: twice\n", ["name", "twice"]),
        (BASE + "extends: bad\n", ["extends itself"]),
        (BASE + "extends: nothing_here\n", ["nothing_here"]),
        ("- a\n- list\n", ["mapping"]),
        ("a: [\n", ["not YAML"]),
        ("name: x\noutput: y\nmodel: {hf: m}\n", ["data", "missing"]),
        (BASE + "optim: {min_lr: 1.0}\n", ["min_lr"]),
        (BASE + "optim: {betas: [0.9, 1.0]}\n", ["betas"]),
        (BASE + "optim: {schedule: constant, min_lr: 1.0e-7}\n", ["min_lr", "constant"]),
        (BASE + "parallel: {virtual_pipeline: 2}\n", ["virtual_pipeline", "pipeline"]),
        (BASE + "precision: {dtype: fp32, fp8: blockwise}\n", ["fp8", "bf16"]),
        (BASE + "precision: {dtype: fp32, grad_dtype: bf16}\n", ["grad_dtype"]),
        (BASE + "objective: {shift: {kind: none, decay: 0.5}}\n", ["decay"]),
        (BASE + "objective: {name: spot_bce}\n", ["shift", "spot_bco"]),
        (BASE + "objective: {shift: {kind: cumulative_inclusive}}\nparallel: {pipeline: 2}\n", ["pipeline"]),
        (BASE + "memory: {recompute: full, recompute_above_tokens: 9}\n", ["recompute_above_tokens", "none"]),
        (BASE + "memory: {recompute_above_tokens: 8192}\n", ["recompute_above_tokens", "tokens_per_microbatch"]),
        (BASE + "precision: {dtype: fp32}\nmemory: {moments: bf16}\n", ["moments", "bf16"]),
        (BASE + "precision: {fp8: tensorwise}\nmemory: {master_weights: remainders}\n", ["fp8", "master_weights"]),
        (BASE + "optim: {lr: .inf}\n", ["optim.lr", "finite"]),
        (BASE + "optim: {betas: [0.9, .nan]}\n", ["optim.betas", "finite"]),
        (BASE + "evaluation: {max_new_tokens: 0}\n", ["evaluation.max_new_tokens"]),
        (BASE + "evaluation: {questions: q.jsonl}\nexport: {hf: false}\n", ["evaluation", "export"]),
    ],
)
def test_mistakes_name_the_place(tmp_path, text, words):
    path = write(tmp_path, "bad", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("override", ["optim.lr", "=3", "name.deeper=1", "optim.lr={"])
def test_malformed_overrides(tmp_path, override):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(write(tmp_path, "base", BASE), [override])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean qwen3_tiny_spot"):
        find_recipe("qwen3_tiny_spt")


def test_documented_keys_are_the_schema():
    """The contract with users: sections and keys of the first release."""
    sections = {
        name: sorted(field.annotation.model_fields) for name, field in Recipe.model_fields.items() if _is_section(field)
    }
    assert sections["data"] == sorted(
        [
            "pairs",
            "format",
            "max_tokens",
            "enable_thinking",
            "order",
            "layout",
            "tokens_per_microbatch",
            "pairs_per_microbatch",
        ]
    )
    assert sections["objective"] == ["beta", "name", "shift"]
    assert sections["train"] == ["batch_pairs", "epochs", "log_every_steps", "max_steps"]
    assert sections["optim"] == sorted(
        ["lr", "schedule", "warmup_fraction", "min_lr", "betas", "eps", "weight_decay", "clip_grad_norm"]
    )
    assert sections["parallel"] == sorted(
        ["tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "timeout_minutes"]
    )
    assert sections["precision"] == ["dtype", "fp8", "grad_dtype"]
    assert sections["checkpoint"] == ["every_steps", "keep", "resume"]
    assert sections["evaluation"] == sorted(
        ["questions", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size"]
    )
    assert sections["logging"] == ["tensorboard", "wandb"]
    assert sections["export"] == ["hf", "shard_gb"]


def _is_section(field):
    return isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
