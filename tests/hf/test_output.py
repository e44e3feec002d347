"""Writing Hugging Face folders: shards, index, the other files, and that a folder appears whole or not at all."""

import json
import os
import stat

import pytest
import torch
import transformers

from spot_megatron.errors import WeightError
from spot_megatron.hf import output as hf_output
from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.hf.index import INDEX_FILE
from spot_megatron.hf.output import (
    ShardWriter,
    add_older_keys,
    copy_other_files,
    finish_shards,
    partial_folder,
    publish,
    refuse_destination,
    start_partial,
)
from tests.weights.models import COMMON, FAMILIES

TENSORS = {f"t{number}": torch.full((10,), float(number)) for number in range(5)}  # 40 bytes each


def write(folder, shard_bytes, stages=1):
    for stage in range(stages):
        names = list(TENSORS)[stage::stages]
        writer = ShardWriter(folder, f"rank-{stage}", dict.fromkeys(names, ("F32", (10,))), shard_bytes)
        for name in reversed(names):
            writer.write(name, memoryview(TENSORS[name].numpy()).cast("B"))
        writer.close()
    finish_shards(folder, TENSORS)


@pytest.mark.parametrize(
    ("shard_bytes", "stages", "num_files"), [(1000, 1, 1), (80, 1, 3), (10, 1, 5), (80, 2, 3), (10, 2, 5)]
)
def test_shards_hold_everything_once(tmp_path, shard_bytes, stages, num_files):
    write(tmp_path, shard_bytes, stages)
    folder = HFFolder(tmp_path)
    assert folder.names() == sorted(TENSORS)
    assert all(same_bits(folder.read(name), tensor) for name, tensor in TENSORS.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    assert (tmp_path / INDEX_FILE).exists() == (num_files > 1)
    if num_files > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == 200
        assert set(index["weight_map"].values()) == {
            f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)
        }


def test_others_may_read_the_weights(tmp_path):
    write(tmp_path, 1000)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_rank_that_wrote_elsewhere_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, "rank-0", {"t0": ("F32", (10,))}, 1000)
    writer.write("t0", memoryview(TENSORS["t0"].numpy()).cast("B"))
    writer.close()
    with pytest.raises(WeightError, match=r"lacks 4 tensors, the first is t1.*shared file system"):
        finish_shards(tmp_path, TENSORS)


def test_other_files_are_copied_and_weights_are_not(tmp_path):
    source = tmp_path / "source"
    kept = {"config.json": b"{}\r\n", "sub/deep/x.bin": b"\x00\xff", "training_args.bin": b"1", ".gitattributes": b"*"}
    left = ["model.safetensors", INDEX_FILE, "pytorch_model.bin", "m.gguf", ".git/HEAD", ".cache/huggingface/x"]
    for name, content in {**kept, **dict.fromkeys(left, b"w")}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (tmp_path / "blob").write_bytes(b"as in the hub's cache")
    (source / "merges.txt").symlink_to(tmp_path / "blob")
    copy_other_files(source, tmp_path / "copy")
    found = {
        str(p.relative_to(tmp_path / "copy")): p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()
    }
    assert found == {**kept, "merges.txt": b"as in the hub's cache"}
    assert not (tmp_path / "copy" / "merges.txt").is_symlink()


def test_config_of_transformers_5_gets_the_keys_of_4(tmp_path):
    file = tmp_path / "config.json"
    scaling = {"rope_type": "llama3", "factor": 8.0}
    five = {"a": 1, "rope_parameters": {"rope_theta": 5e4, **scaling}, "num_local_experts": 4, "z": 2}
    file.write_text(json.dumps(five))
    add_older_keys(file)
    added = {"rope_theta": 5e4, "rope_scaling": scaling, "num_experts": 4}
    assert json.loads(file.read_text()) == {**five, **added}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e4},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "num_experts": 4},
        {"rope_theta": 5e4, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
    ],
)
def test_config_that_both_read_keeps_its_bytes(tmp_path, config):
    file = tmp_path / "config.json"
    content = json.dumps(config).encode() + b"\r\n\n"
    file.write_bytes(content)
    add_older_keys(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_reads_the_same_with_the_added_keys(tmp_path, family):
    name, options = FAMILIES[family]
    getattr(transformers, f"{name}Config")(**{**COMMON, **options}).save_pretrained(tmp_path)
    before = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_keys(tmp_path / "config.json")
    after = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: after[key] for key in before} == before
    assert after["rope_parameters"]["rope_theta"] == 5e4


def test_destinations_that_are_refused(tmp_path, monkeypatch):
    source, used, empty = tmp_path / "source", tmp_path / "used", tmp_path / "empty"
    for folder in (source, used, empty):
        folder.mkdir()
    (used / "thesis.tex").write_text("years of work")
    refuse_destination(empty, source)
    refuse_destination(tmp_path / "new" / "deep", source)
    refuse_destination(used, source, replace=True)
    for destination, word in [(used, "exists already"), (source / "out", "lies inside"), (source, "lies inside")]:
        with pytest.raises(WeightError, match=word):
            refuse_destination(destination, source)
    monkeypatch.setattr(type(empty), "is_mount", lambda self: True)
    with pytest.raises(WeightError, match="mount point"):
        refuse_destination(empty, source)


def test_publish_replaces_and_cleans_up(tmp_path):
    destination = tmp_path / "out"
    for content in ("first", "second"):
        (start_partial(destination) / "stale").write_text("from an interrupted attempt")
        (start_partial(destination) / "file").write_text(content)
        publish(destination)
        assert [path.name for path in destination.iterdir()] == ["file"]
        assert (destination / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_export_leaves_no_destination(tmp_path, monkeypatch):
    """If any call fails while writing, the destination is absent, or the earlier one is complete."""
    destination = tmp_path / "out"
    (start_partial(destination) / "file").write_text("earlier")
    publish(destination)
    (start_partial(destination) / "file").write_text("later")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_output.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish(destination)
    assert (destination / "file").read_text() == "earlier"
    assert partial_folder(destination).exists()
