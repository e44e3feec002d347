"""Recipes: strictness, inheritance, overrides, and that nothing configured is ignored."""

from __future__ import annotations

import itertools
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from spot_megatron.errors import RecipeError
from spot_megatron.hf.names import TARGETS
from spot_megatron.recipe import RECIPE_FOLDER, Lora, Recipe, find_recipe, load_recipe
from spot_megatron.recipe.__main__ import as_markdown, as_text, sections


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


def test_weights_of_pair_files(tmp_path):
    write(tmp_path, "base", BASE.replace("{pairs: p.jsonl}", "{pairs: {a.jsonl: 2, b.jsonl: 0.5}}"))
    recipe = load_recipe(tmp_path / "base.yaml")
    assert recipe.pair_files == [Path("a.jsonl"), Path("b.jsonl")]
    assert recipe.pair_weights == {Path("a.jsonl"): 2.0, Path("b.jsonl"): 0.5}
    assert load_recipe(write(tmp_path, "again", recipe.dump())) == recipe
    # Another recipe's files and --set's replace them, other keys of data are kept.
    child = write(tmp_path, "child", "extends: base\nname: child\ndata: {pairs: {c.jsonl: 3}, max_tokens: 9}\n")
    assert load_recipe(child).data.pairs == {"c.jsonl": 3.0}
    changed = load_recipe(tmp_path / "base.yaml", ["data.pairs={c.jsonl: 3}", "data={max_tokens: 9}"])
    assert (changed.data.pairs, changed.data.max_tokens) == ({"c.jsonl": 3.0}, 9)
    assert load_recipe(write(tmp_path, "plain", BASE)).pair_weights == {}
    for wrong in ("0", "-1", "x", ".inf"):
        with pytest.raises(RecipeError, match=r"data\.pairs"):
            load_recipe(tmp_path / "base.yaml", [f"data.pairs={{a.jsonl: {wrong}}}"])


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
        (BASE + "optim: {schedule: constant, min_lr: 1.0e-7}\n", ["min_lr", "cosine"]),
        (BASE + "parallel: {virtual_pipeline: 2}\n", ["virtual_pipeline", "pipeline"]),
        (BASE + "precision: {dtype: fp32, fp8: blockwise}\n", ["fp8", "bf16"]),
        (BASE + "precision: {dtype: fp32, grad_dtype: bf16}\n", ["grad_dtype"]),
        (BASE + "objective: {shift: {kind: none, decay: 0.5}}\n", ["decay"]),
        (BASE + "objective: {name: spot_bce}\n", ["shift", "spot_bco"]),
        (BASE + "export: {dtype: fp32}\n", ["export.dtype=fp32", "precision.dtype=fp32"]),
        (BASE + "objective: {label_smoothing: 0.1}\n", ["label_smoothing", "dpo or spot_bce"]),
        (BASE + "objective: {shift: {kind: cumulative_inclusive}}\nparallel: {pipeline: 2}\n", ["pipeline"]),
        (BASE + "memory: {recompute: full, recompute_above_tokens: 9}\n", ["recompute_above_tokens", "none"]),
        (BASE + "memory: {recompute_above_tokens: 8192}\n", ["recompute_above_tokens", "tokens_per_microbatch"]),
        (BASE + "precision: {dtype: fp32}\nmemory: {moments: bf16}\n", ["moments", "bf16"]),
        (BASE + "precision: {fp8: tensorwise}\nmemory: {master_weights: remainders}\n", ["fp8", "master_weights"]),
        (BASE + "validation: {pairs: a, fraction: 0.1}\n", ["validation.pairs and validation.fraction", "only one"]),
        (BASE + "validation: {pairs: []}\n", ["validation.pairs names no file"]),
        (BASE + "validation: {fraction: 1.0}\n", ["validation.fraction"]),
        (BASE + "validation: {probe: a, keep_best: loss}\n", ["keep_best=loss requires validation.pairs"]),
        (BASE + "validation: {pairs: a, keep_best: probe}\n", ["keep_best=probe requires validation.probe"]),
        (BASE + "validation: {pairs: a, patience: 2}\n", ["validation.patience requires validation.keep_best"]),
        (BASE + "validation: {every_steps: 5}\n", ["validation.every_steps requires"]),
        (BASE + "lora: {rank: 0}\n", ["lora.rank", "greater than or equal to 1"]),
        (BASE + "lora: {rank: 8, targets: [router]}\n", ["lora.targets.0", "'attention', 'mlp'"]),
        (BASE + "lora: {rank: 8, targets: []}\n", ["lora.targets"]),
        (BASE + "lora: {adapter: a}\n", ["lora.adapter require lora.rank"]),
        (BASE + "lora: {alpha: 64}\n", ["lora.alpha", "require lora.rank"]),
        (BASE + "export: {adapter: true}\n", ["export.adapter=true requires lora.rank"]),
        (BASE + "lora: {rank: 8}\nprecision: {fp8: tensorwise}\n", ["precision.fp8=tensorwise", "lora.rank"]),
        (BASE + "optim: {lr: .inf}\n", ["optim.lr", "finite"]),
        (BASE + "optim: {betas: [0.9, .nan]}\n", ["optim.betas", "finite"]),
        (BASE + "evaluation: {max_new_tokens: 0}\n", ["evaluation.max_new_tokens"]),
        (
            BASE + "evaluation: {questions: q.jsonl}\nexport: {hf: false}\n",
            ["evaluation.questions requires export.hf=true"],
        ),
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
    with pytest.raises(RecipeError, match=r"did you mean qwen3_tiny_spot\? Known recipes: llama3p1_8b_spot, "):
        find_recipe("qwen3_tiny_spt")


def test_without_the_repository_a_path_works_and_a_name_says_why_not(tmp_path, monkeypatch):
    """As after `pip install .`: the package lies in site-packages, recipes/ does not."""
    path = write(tmp_path, "base", BASE)
    child = write(tmp_path, "child", "extends: base\nname: child\n")
    monkeypatch.setattr("spot_megatron.recipe.load.RECIPE_FOLDER", tmp_path / "recipes")
    assert load_recipe(path).name == "base"
    assert load_recipe(child).name == "child"
    with pytest.raises(RecipeError, match=r"named recipes are part of the repository.*path of a YAML file"):
        load_recipe("qwen3_tiny_spot")


def test_an_unreadable_recipe(tmp_path, monkeypatch):
    path = write(tmp_path, "base", BASE)
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(RecipeError, match=r"base\.yaml cannot be read: denied"):
        load_recipe(path)


def test_documented_keys_are_the_schema():
    """The contract with users: sections and keys of the first release."""
    sections = {
        name: sorted(key.alias or own for own, key in field.annotation.model_fields.items())
        for name, field in Recipe.model_fields.items()
        if _is_section(field)
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
    assert sections["objective"] == ["beta", "label_smoothing", "name", "sft_weight", "shift"]
    assert sections["train"] == ["batch_pairs", "epochs", "log_every_steps", "max_steps"]
    assert sections["optim"] == sorted(
        ["lr", "schedule", "warmup_fraction", "min_lr", "betas", "eps", "weight_decay", "clip_grad_norm"]
    )
    assert sections["parallel"] == sorted(
        ["tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "timeout_minutes"]
    )
    assert sections["validation"] == sorted(["pairs", "fraction", "probe", "every_steps", "keep_best", "patience"])
    assert sections["precision"] == ["dtype", "fp8", "grad_dtype"]
    assert sections["checkpoint"] == ["async", "every_steps", "keep", "resume"]
    assert sections["evaluation"] == sorted(
        ["questions", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size"]
    )
    assert sections["logging"] == ["mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    assert sections["export"] == ["adapter", "dtype", "hf", "push_to_hub", "shard_gb"]


def _is_section(field):
    return isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")


# The recipe reference


def test_every_key_has_a_description_type_and_default():
    keys = [key for _, _, keys in sections() for key in keys]
    assert len(keys) > 50
    for key in keys:
        assert len(key.description) > 10 and key.description.endswith("."), key
    by_name = {key.name: key for key in keys}
    assert by_name["optim.warmup_fraction"].type == "float, >= 0, < 1"
    assert by_name["optim.warmup_fraction"].default == "0.05"
    assert by_name["data.pairs_per_microbatch"].type == "int or null, >= 1"
    assert by_name["data.pairs"].type == "str or list of str or mapping of str to float, > 0"
    assert by_name["optim.betas"].type == "list of float"
    assert by_name["model.hf"].default == "required"
    assert by_name["precision.dtype"].type == "one of fp32, bf16"
    best = "one of loss, reward_accuracy, reward_margin, probe or null"
    assert by_name["validation.keep_best"].type == best


def test_the_reference_holds_every_key_of_every_recipe():
    """Read back from the printed page, so that a key lost in printing is noticed."""
    printed = {line.split("`")[1] for line in as_markdown().splitlines() if line.startswith("| `")}

    def leaves(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and prefix + name != "data.pairs":
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    for path in RECIPE_FOLDER.glob("*.yaml"):
        assert set(leaves(load_recipe(path).model_dump(by_alias=True))) == printed
    assert all(f"  {key}: " in as_text() for key in printed)


def test_recipe_help_prints_one_section():
    command = [sys.executable, "-m", "spot_megatron.recipe", "objective"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "objective.beta: 0.1   (float, > 0)" in printed
    assert "objective.shift.decay" in printed
    assert "optim.lr" not in printed


def test_every_target_of_adapters_can_be_named():
    (items,) = typing.get_args(Lora.model_fields["targets"].annotation)
    assert set(typing.get_args(items)) == {*TARGETS, *itertools.chain(*TARGETS.values())}
