"""LoRA in one process: what is trained, saved, exported and read again; PEFT itself is the judge of its folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.recipe import Lora
from spot_megatron.train.__main__ import main
from spot_megatron.train.optim import make_trainable
from spot_megatron.weights.adapters import attach_adapters
from spot_megatron.weights.export import export_hf
from spot_megatron.weights.load import load_hf
from spot_megatron.weights.peft import CONFIG, WEIGHTS, AdapterFolder, adapter_shapes
from tests import processes
from tests.support import make_recipe, one_process, random_pairs, write_token_pairs
from tests.weights.models import VOCAB_SIZE, logits_of_transformers, make_folder

LORA = {"rank": 4, "alpha": 8}
IDS = torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1))


def write_run(folder: Path, name: str, **sections) -> Path:
    """The recipe file of a run of 4 steps that saves every 2."""
    options = {
        "model": {"hf": str(folder / "dense")},
        "train": {"batch_pairs": 2, "epochs": 1},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "lora": LORA,
        "export": {"adapter": True},
    }
    recipe = make_recipe(folder, **{**options, "output": str(folder / name), **sections})
    (folder / f"{name}.yaml").write_text(recipe.dump())
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, pairs, and finished runs: dense; moe; experts, whose adapters are on experts alone."""
    folder = tmp_path_factory.mktemp("lora")
    make_folder(folder / "dense", tied=True)
    make_folder(folder / "moe", tied=False, family="qwen3_moe")
    write_token_pairs(folder / "pairs.jsonl", random_pairs(8, vocab_size=VOCAB_SIZE))
    assert main([str(write_run(folder, "dense_run"))]) == 0
    moe = {"hf": str(folder / "moe")}
    assert main([str(write_run(folder, "moe_run", model=moe))]) == 0
    assert main([str(write_run(folder, "experts_run", model=moe, lora={**LORA, "targets": ["mlp"]}))]) == 0
    return folder


def logits_of_peft(base: Path, adapter: Path) -> torch.Tensor:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS[None]).logits[0]


@pytest.mark.parametrize("name", ["dense", "moe", "experts"])
def test_peft_and_the_merged_model_agree(folder, name):
    base, run = folder / ("dense" if name == "dense" else "moe"), folder / f"{name}_run"
    (before,) = logits_of_transformers(base, [IDS])
    (merged,) = logits_of_transformers(run / "hf", [IDS])
    assert (merged - before).abs().max() > 1e-2
    assert (logits_of_peft(base, run / "adapter") - merged).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_checkpoint_holds_adapters_only(folder, name):
    run = folder / f"{name}_run"
    shapes = adapter_shapes(Lora(**LORA), read_hf_config(folder / name))
    checkpoint = run / "checkpoints" / "step_00000002"
    stored = FileSystemReader(checkpoint / "model").read_metadata().state_dict_metadata
    tensors = {f"base_model.model.{key}.weight": tuple(item.size) for key, item in stored.items() if "lora" in key}
    assert tensors == shapes
    assert not [key for key in stored if "weight" in key]
    states = FileSystemReader(checkpoint / "optimizer").read_metadata().state_dict_metadata
    assert len(states) == 3 * len(shapes)
    assert sum(item.size.numel() for item in states.values()) == 3 * sum(a * b for a, b in shapes.values())


def test_only_adapters_have_gradients_and_optimizer_states(folder):
    recipe = make_recipe(folder, model={"hf": str(folder / "dense")}, lora=LORA)
    hf = read_hf_config(folder / "dense")
    with one_process(recipe):
        chunks = build_model(transformer_config(hf, recipe, "cpu"), hf)
        load_hf(chunks, HFFolder(folder / "dense"), hf)
        attach_adapters(chunks, hf, recipe.lora, recipe.seed)
        policy = make_trainable(chunks, recipe)
        trained = {name for name, parameter in chunks[0].named_parameters() if hasattr(parameter, "main_grad")}
        assert trained == {name for name, _ in chunks[0].named_parameters() if ".adapters." in name}
        num_trained = sum(a * b for a, b in adapter_shapes(recipe.lora, hf).values())
        assert sum(parameter.numel() for part in policy.parts for parameter in part.get_parameters()) == num_trained
        assert sum(buffer.numel_unpadded for buffer in policy.wrapped[0].buffers) == num_trained


def test_merging_adapters_that_add_nothing_keeps_every_bit(folder, tmp_path):
    """-0.0 as well, which 0.0 added to it is not."""
    source = make_folder(tmp_path / "model", tied=False, dtype="bf16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, :8] = -0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = make_recipe(folder, model={"hf": str(source)}, lora=LORA, precision={"dtype": "bf16"})
    hf = read_hf_config(source)
    with one_process(recipe):
        chunks = build_model(transformer_config(hf, recipe, "cpu"), hf)
        load_hf(chunks, HFFolder(source), hf)
        attach_adapters(chunks, hf, recipe.lora, recipe.seed)
        export_hf(chunks, source, tmp_path / "hf", hf)
    before, after = HFFolder(source), HFFolder(tmp_path / "hf")
    assert before.names() == after.names()
    assert all(same_bits(before.read(name), after.read(name)) for name in before.names())


def test_a_checkpoint_is_converted_to_the_folder_that_the_run_exports(folder, tmp_path, capsys):
    from tools.convert.__main__ import main as convert

    moe = {"hf": str(folder / "moe")}
    assert main([str(write_run(folder, "not_exported", model=moe, export={"hf": False}))]) == 0
    capsys.readouterr()
    checkpoint = folder / "not_exported" / "checkpoints" / "step_00000004"
    assert convert(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "adapter")]) == 0
    assert "128 tensors" in capsys.readouterr().out
    for name in (CONFIG, WEIGHTS):
        ours, theirs = tmp_path / "adapter" / name, folder / "moe_run" / "adapter" / name
        if name == CONFIG:
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        else:
            left, right = load_file(ours), load_file(theirs)
            assert left.keys() == right.keys()
            assert all(same_bits(left[key], right[key]) for key in right)


@pytest.fixture
def interrupted(folder, tmp_path) -> Path:
    """The dense run as it was after step 2."""
    for name in ("dense", "pairs.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "dense_run", tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    state = tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json"
    assert json.loads(state.read_text())["step"] == 2
    return tmp_path


def continue_with(interrupted: Path, folder: Path, **sections) -> Path:
    sections = {"model": {"hf": str(folder / "dense")}, "data": {"pairs": str(folder / "pairs.jsonl")}, **sections}
    return write_run(interrupted, "run", **sections)


def test_a_resumed_run_has_the_same_bits(folder, interrupted, capsys):
    assert main([str(continue_with(interrupted, folder))]) == 0
    assert "steps 2 to 4 of 4" in capsys.readouterr().out
    for result in ("adapter", "hf"):
        ours, theirs = HFFolder(interrupted / "run" / result), HFFolder(folder / "dense_run" / result)
        assert all(same_bits(ours.read(name), theirs.read(name)) for name in theirs.names()), result


def test_a_run_continues_at_another_split(folder, interrupted):
    recipe = continue_with(interrupted, folder, parallel={"tensor": 2, "sequence": True})
    log = interrupted / "log.txt"
    assert processes.run(["-m", "spot_megatron.train", str(recipe)], log, 2) == 0, processes.output_of(log)[-6000:]
    assert "steps 2 to 4 of 4" in processes.output_of(log)
    ours, theirs = load_file(interrupted / "run/adapter" / WEIGHTS), load_file(folder / "dense_run/adapter" / WEIGHTS)
    start = FileSystemReader(interrupted / "run/checkpoints/step_00000002/model").read_metadata().state_dict_metadata
    assert len(ours) == len([key for key in start if "lora" in key])
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in theirs)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": None}, ["lora: was {", "is off (all weights are trained)"]),
        ({"rank": 2, "alpha": 8}, ["lora: was {'rank': 4", "is {'rank': 2"]),
        ({**LORA, "targets": ["mlp"]}, ["lora: was", "'targets': ['mlp']"]),
    ],
)
def test_a_run_with_other_adapters_is_not_continued(folder, interrupted, capsys, lora, words):
    assert main([str(continue_with(interrupted, folder, lora=lora, export={"adapter": False}))]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in [*words, "checkpoint.resume=never"]), error


def test_a_run_of_all_weights_is_not_continued_with_adapters(folder, tmp_path, capsys):
    sections = {"model": {"hf": str(folder / "dense")}, "data": {"pairs": str(folder / "pairs.jsonl")}}
    assert main([str(write_run(tmp_path, "run", **sections, lora={}, export={}))]) == 0
    assert main([str(write_run(tmp_path, "run", **sections))]) == 2
    assert "lora: was off (all weights are trained), is {'rank': 4" in capsys.readouterr().err


@pytest.fixture(scope="module")
def peft_folder(folder) -> Path:
    """Adapters on queries and values that PEFT made and saved, no B of them zero."""
    import peft
    import transformers

    torch.manual_seed(5)
    config = peft.LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(folder / "from_peft")
    return folder / "from_peft"


def test_training_starts_from_a_folder_of_peft(folder, peft_folder):
    """The reference is the model with these adapters; without a step that moves them they come out as they went in."""
    lora = {"rank": 6, "alpha": 3, "targets": ["q_proj", "v_proj"], "adapter": str(peft_folder)}
    optim = {"lr": 1e-30, "weight_decay": 0.0}
    assert main([str(write_run(folder, "started", lora=lora, optim=optim))]) == 0
    before, after = load_file(peft_folder / WEIGHTS), load_file(folder / "started/adapter" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (merged,) = logits_of_transformers(folder / "started/hf", [IDS])
    assert (logits_of_peft(folder / "dense", peft_folder) - merged).abs().max() < 1e-4
    assert abs(json.loads((folder / "started/metrics.jsonl").read_text().splitlines()[0])["reward_chosen"]) < 1e-4
    digests = {line.name for line in (folder / "reference_cache").iterdir()}
    assert len(digests) == 3  # of dense, moe, and dense with these adapters


@pytest.mark.parametrize(
    ("lora", "config", "words"),
    [
        ({"rank": 4}, {}, ["r 6", "set lora.rank=6 and lora.alpha=3"]),
        ({"targets": ["attention"]}, {}, ["k_proj", "missing", "Set lora.targets"]),
        ({"targets": ["q_proj"]}, {}, ["v_proj", "expected none"]),
        ({}, {"use_dora": True}, ["use_dora True", "merge_and_unload"]),
        ({}, {"peft_type": "IA3"}, ["peft_type IA3"]),
        ({}, {"r": None}, ["r None"]),
    ],
)
def test_adapters_that_do_not_fit_are_refused(folder, peft_folder, tmp_path, lora, config, words):
    shutil.copytree(peft_folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    options = {"rank": 6, "alpha": 3, "targets": ["q_proj", "v_proj"], "adapter": str(tmp_path / "adapter"), **lora}
    with pytest.raises(WeightError) as error:
        AdapterFolder(Lora(**options), read_hf_config(folder / "dense"))
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_adapter_is_named(folder, capsys):
    lora = {**LORA, "adapter": str(folder / "nothing")}
    assert main([str(write_run(folder, "missing", lora=lora))]) == 2
    assert "lora.adapter" in capsys.readouterr().err
