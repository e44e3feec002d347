"""SHA256SUMS: written as sha256sum reads it; damage of any file is found and named."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from spot_megatron.errors import CheckpointError, WeightError
from spot_megatron.hf.checksums import (
    CHECKSUMS,
    file_names,
    read_checksums,
    sums_of,
    verify_checksums,
    verify_weights,
    write_checksums,
)

FILES = {
    "model/.metadata": b"pickle",
    "model/metadata.json": b"{}",
    "model/__0_0.distcp": bytes(range(256)),
    "optimizer/metadata.json": b"{}",
    "hf/tokenizer.model": b"\x00\xff",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00001.safetensors": b"weights",
    "config.json": b"{}",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(content)
    write_checksums(tmp_path / "f", sums_of(tmp_path / "f", file_names(tmp_path / "f")))
    return tmp_path / "f"


def flip(file, position, bit=0):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def verify(folder):
    verify_checksums(folder, CheckpointError)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_accepts_the_file(folder):
    assert (
        subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=folder, capture_output=True).returncode == 0
    )


def test_ranks_share_the_files(folder):
    verify(folder)
    flip(folder / "config.json", 0)
    found = []
    for rank in range(3):
        try:
            verify_checksums(folder, CheckpointError, rank=rank, world_size=3)
        except CheckpointError:
            found.append(rank)
    assert len(found) == 1


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(folder, name):
    original = (folder / name).read_bytes()
    for damaged in (original[:-1], b"", original + b"\0", bytes([original[0] ^ 128]) + original[1:]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
            verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        verify(folder)


def test_an_added_file_is_named(folder):
    (folder / "model" / "__1_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is not in SHA256SUMS"):
        verify(folder)


def test_every_flipped_bit_and_every_cut_of_the_checksums_is_found(folder):
    sums = folder / CHECKSUMS
    original = sums.read_bytes()
    for position in range(len(original)):
        for bit in (0, 5, 7):
            # "  " and " *" are the two separators of sha256sum.
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            sums.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify(folder)
        sums.write_bytes(original[:position])
        with pytest.raises(CheckpointError):
            verify(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ".."])
def test_names_outside_the_folder(folder, name):
    (folder / CHECKSUMS).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="a path inside the folder"):
        read_checksums(folder, CheckpointError)


def test_a_folder_without_checksums_passes(folder):
    (folder / CHECKSUMS).unlink()
    verify(folder)
    verify_weights(folder)


def test_only_the_weights_of_a_model_folder_must_match(folder):
    (folder / "config.json").write_text('{"edited": true}')
    (folder / "chat_template.jinja").write_text("new")
    verify_weights(folder)
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        flip(folder / name, 3)
        with pytest.raises(WeightError, match=rf"{name} is damaged"):
            verify_weights(folder)
        flip(folder / name, 3)
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(WeightError, match="is missing"):
        verify_weights(folder)
