"""Hugging Face -> Megatron -> Hugging Face in one process: same function, same bits, or an error that says why."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from spot_megatron.errors import WeightError
from spot_megatron.hf.checksums import CHECKSUMS, file_names, read_checksums, verify_checksums
from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.weights.export import export_hf
from spot_megatron.weights.load import load_hf
from tests.support import make_recipe, one_process
from tests.weights.models import (
    FAMILIES,
    LLAMA3_ROPE,
    OTHER_FILES,
    causal_pack,
    logits_of_megatron,
    logits_of_transformers,
    make_folder,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder: tied fp32 in one file, untied bf16 in shards, untied mixed in one file."""
    base = tmp_path_factory.mktemp("models")
    return {
        "tied": make_folder(base / "tied", tied=True),
        "untied": make_folder(base / "untied", tied=False, dtype="bf16", shard_size="20KB", seed=1),
        "mixed": make_folder(base / "mixed", tied=False, dtype="mixed", seed=2),
        **{family: make_folder(base / family, tied=False, family=family, seed=3) for family in FAMILIES},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    recipe = make_recipe(tmp_path_factory.mktemp("run"))
    with one_process(recipe):
        yield recipe


def load(folder, recipe):
    config = read_hf_config(folder)
    chunks = build_model(transformer_config(config, recipe, "cpu"), config)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("inf"))  # what load_hf leaves out would show
    load_hf(chunks, HFFolder(folder), config)
    return chunks, config


def assert_same_folder(copy, source):
    """Every tensor bit for bit, every other file byte for byte; config.json may have gained rope_theta."""
    left, right = HFFolder(copy), HFFolder(source)
    assert left.names() == right.names()
    assert [name for name in left.names() if not same_bits(left.read(name), right.read(name))] == []
    for name in [*OTHER_FILES, "generation_config.json"]:
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name
    config = json.loads((source / "config.json").read_text())
    added = {"rope_theta": 50000.0}
    if config["rope_parameters"]["rope_type"] == "llama3":
        added["rope_scaling"] = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    if "num_local_experts" in config:
        added["num_experts"] = config["num_local_experts"]
    assert json.loads((copy / "config.json").read_text()) == {**config, **added}
    assert read_checksums(copy, WeightError).keys() == {*file_names(copy)}
    verify_checksums(copy, WeightError)
    others = {path.name for path in copy.rglob("*") if not path.name.startswith(("model", CHECKSUMS))}
    assert others == {path.name for path in source.rglob("*") if not path.name.startswith("model")}


def test_tied_then_untied_in_one_process(folders, world, tmp_path):
    """Nothing of one model may stick to the next: each comes back whole, with the logits that transformers computes."""
    pack, sequences = causal_pack()
    for name in ("tied", "untied", "mixed", "tied"):
        chunks, config = load(folders[name], world)
        expected = logits_of_transformers(folders[name], sequences)
        for ours, theirs in zip(logits_of_megatron(chunks, pack, config), expected, strict=True):
            assert theirs.std() > 0.3
            assert (ours - theirs).abs().max() < 1e-4
        export_hf(chunks, folders[name], tmp_path / name, config, replace=True)
        assert_same_folder(tmp_path / name, folders[name])
        assert ("lm_head.weight" in HFFolder(tmp_path / name).names()) == (name != "tied")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(folders, world, tmp_path, family):
    """The logits of transformers, and every bit back."""
    pack, sequences = causal_pack()
    chunks, config = load(folders[family], world)
    for ours, theirs in zip(
        logits_of_megatron(chunks, pack, config), logits_of_transformers(folders[family], sequences), strict=True
    ):
        assert theirs.std() > 0.3
        assert (ours - theirs).abs().max() < 1e-4
    export_hf(chunks, folders[family], tmp_path / "out", config)
    assert_same_folder(tmp_path / "out", folders[family])


def test_the_exported_folder_loads_in_transformers(folders, world, tmp_path):
    chunks, config = load(folders["untied"], world)
    export_hf(chunks, folders["untied"], tmp_path / "out", config, shard_gb=3e-5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    _, sequences = causal_pack()
    copies = zip(*(logits_of_transformers(f, sequences) for f in (tmp_path / "out", folders["untied"])), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in copies)


def test_export_casts_to_the_types_asked_for(folders, world, tmp_path):
    chunks, config = load(folders["mixed"], world)
    kinds = dict.fromkeys(HFFolder(folders["mixed"]).names(), "BF16")
    export_hf(chunks, folders["mixed"], tmp_path / "out", config, kinds=kinds)
    assert HFFolder(tmp_path / "out").kinds() == kinds


def test_export_refuses_to_overwrite(folders, world, tmp_path):
    chunks, config = load(folders["tied"], world)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    with pytest.raises(WeightError, match="exists already"):
        export_hf(chunks, folders["tied"], tmp_path / "out", config)
    assert (tmp_path / "out" / "notes.txt").read_text() == "keep me"


@pytest.fixture
def broken(folders, tmp_path):
    """A function: copy of a model with its tensors changed by `change(tensors)`."""

    def make(name, change):
        copy = tmp_path / "broken"
        shutil.copytree(folders[name], copy)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def refused(folder, recipe, *words):
    with pytest.raises(WeightError) as caught:
        load(folder, recipe)
    for word in words:
        assert word in str(caught.value)


def test_missing_tensor(broken, world):
    folder = broken("mixed", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, world, "lacks 1 tensor(s): model.layers.2.mlp.up_proj.weight", str(folder))


def test_untied_model_without_head(broken, world):
    refused(broken("mixed", lambda tensors: tensors.pop("lm_head.weight")), world, "lacks", "lm_head.weight")


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "score"])
def test_unknown_tensor(broken, world, name):
    refused(broken("mixed", lambda tensors: tensors.update({name: torch.ones(3)})), world, "holds unknown", name)


def test_wrong_shape_names_tensor_file_and_both_shapes(broken, world):
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = broken("mixed", lambda tensors: tensors.update({name: tensors[name][:16].clone()}))
    refused(folder, world, name, "model.safetensors", "(16, 64)", "(64, 64)")


def test_vocabulary_that_config_json_does_not_know(broken, world):
    name = "model.embed_tokens.weight"
    folder = broken("tied", lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)}))
    refused(folder, world, name, "(202, 64)", "(101, 64)")


def test_rotary_frequencies_of_old_folders_are_ignored(broken, world):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(broken("mixed", lambda tensors: tensors.update({name: torch.ones(8)})), world)


def test_head_in_a_tied_folder_must_be_the_embedding(broken, world):
    embedding = "model.embed_tokens.weight"
    folder = broken("tied", lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    load(folder, world)
    shutil.rmtree(folder)
    folder = broken("tied", lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1e-7}))
    refused(folder, world, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")


def test_a_warning_names_weights_that_are_not_finite(broken, world):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = float("nan")
        tensors["model.norm.weight"][0] = float("inf")

    with pytest.warns(UserWarning, match="NaN") as caught:
        load(broken("mixed", spoil), world)
    (message,) = {str(warning.message) for warning in caught if "NaN" in str(warning.message)}
    assert set(re.findall(r"model\.\S*weight", message)) == {
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "down_proj"), (float("-inf"), "q_proj"), (3e5, "k_proj")])
def test_weights_that_are_not_finite_are_not_exported(folders, world, tmp_path, value, name):
    """3e5 is finite in float32, and infinite in the float16 of the source."""
    chunks, config = load(folders["untied"], world)
    names = HFFolder(folders["untied"]).names()
    linear = "mlp.linear_fc2" if name == "down_proj" else "self_attention.linear_qkv"
    rows = {"q_proj": 0, "k_proj": 2 * config.head_dim, "down_proj": 0}
    chunks[0].get_parameter(f"decoder.layers.2.{linear}.weight").data[rows[name], 5] = value
    kinds = dict.fromkeys(names, "F16")
    with pytest.raises(WeightError, match=rf"1 tensors hold NaN or infinity.*layers\.2\.\w+\.{name}"):
        export_hf(chunks, folders["untied"], tmp_path / "out", config, kinds=kinds)
    assert list(tmp_path.iterdir()) == []


def test_sound_weights_warn_of_nothing(folders, world):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NaN")
        load(folders["mixed"], world)


def test_digest_follows_weights_and_config(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["untied"], copy)
    digest = HFFolder(folders["untied"]).digest()
    assert HFFolder(copy).digest() == digest
    (copy / "LICENSE").write_text("other terms")
    assert HFFolder(copy).digest() == digest
    shard = max(copy.glob("*.safetensors"))
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert HFFolder(copy).digest() != digest
    shard.write_bytes(sound)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert HFFolder(copy).digest() != digest
