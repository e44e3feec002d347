"""Conversion of what is damaged, not finite or another model's, and onto a full disk."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spot_megatron.errors import CheckpointError, WeightError
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.side_files import save_side_files
from tools.convert import copy_files
from tools.convert.compare import differences
from tools.convert.convert import export_checkpoint, import_folder


def test_full_disk(large, tmp_path):
    """On a file system that is too small: refused before anything is written, and explained if it fills up later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        with pytest.raises(WeightError, match=r"GB are to be written, 0\.0\d GB are free"):
            import_folder(large, disk / "out")
        usage = shutil.disk_usage(disk)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copy_files.shutil, "disk_usage", lambda path: usage._replace(free=10**12))
            with pytest.raises(WeightError, match=r"is full .*No space left.*run the same command again"):
                import_folder(large, disk / "out")
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_warning_names_weights_that_are_not_finite_in_both_directions(sources, tmp_path):
    source = tmp_path / "nan"
    shutil.copytree(sources["qwen3_moe"], source)
    tensors = load_file(source / "model.safetensors")
    names = ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"]
    tensors[names[0]][3, 5] = float("nan")
    tensors[names[1]][3, 5] = float("-inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    expected = rf"NaN or infinity in the weights {names[0]}, {names[1]}$"
    with pytest.warns(UserWarning, match=expected):
        import_folder(source, tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match=expected):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert differences(source, tmp_path / "out") == []


def test_a_source_that_is_cut_short_meanwhile(large, tmp_path, monkeypatch):
    """The headers were sound; then a shard loses its end."""
    source = tmp_path / "source"
    shutil.copytree(large, source)
    run = copy_files._run

    def cut_first(*args):
        shard = max(source.glob("*.safetensors"))
        os.truncate(shard, shard.stat().st_size - 1000)
        return run(*args)

    monkeypatch.setattr(copy_files, "_run", cut_first)
    with pytest.raises(WeightError, match=r"safetensors ends at byte \d+: it was truncated"):
        import_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut(length):
    return lambda file: file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("metadata.json", Path.unlink, "metadata.json is missing"),
        (".metadata", cut(100), "damaged"),
        (".metadata", lambda file: file.write_bytes(b"cos\nsystem\n(S'false'\ntR."), "damaged"),
        ("__0_0.distcp", Path.unlink, "damaged or missing"),
        ("__0_0.distcp", cut(500), "damaged or missing"),
        ("__0_0.distcp", cut(-100), "damaged or missing"),
    ],
)
def test_damaged_checkpoints(sources, tmp_path, pattern, damage, message):
    """Found by the reader itself in a checkpoint without checksums, as Megatron-Core writes it."""
    import_folder(sources["qwen3"], tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / CHECKSUMS).unlink()
    damage(tmp_path / "checkpoint" / "model" / pattern)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_another_models_checkpoint(sources, tmp_path):
    import_folder(sources["qwen3"], tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / CHECKSUMS).unlink()
    for name in ("llama", "qwen3_moe"):
        side_files = tmp_path / "checkpoint" / "hf"
        shutil.rmtree(side_files)
        save_side_files(sources[name], tmp_path / "checkpoint")
        with pytest.raises(CheckpointError, match="another model"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)


def test_damage_of_any_file_of_a_checkpoint_is_named(sources, tmp_path):
    """Bits flipped and bytes cut in every file, at the same length where the file allows it."""
    checkpoint, generator = tmp_path / "checkpoint", random.Random(0)
    import_folder(sources["qwen3"], checkpoint)
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    assert {"model/.metadata", "model/metadata.json", "hf_dtypes.json", CHECKSUMS} <= {*map(str, names)}
    for name in names:
        original = (checkpoint / name).read_bytes()
        position = generator.randrange(len(original))
        flipped = bytes([original[position] ^ 1 << generator.randrange(8)])
        for damaged in (original[:position] + flipped + original[position + 1 :], original[:position]):
            (checkpoint / name).write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                export_checkpoint(checkpoint, tmp_path / "out", shard_gb=5)
            assert CHECKSUMS in str(caught.value)
            assert name.name in str(caught.value) or name.name == CHECKSUMS
        (checkpoint / name).write_bytes(original)
    export_checkpoint(checkpoint, tmp_path / "out", shard_gb=5)
    shard = tmp_path / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        import_folder(tmp_path / "out", tmp_path / "again")
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        HFFolder(tmp_path / "out").digest()
    assert not (tmp_path / "again").exists()
