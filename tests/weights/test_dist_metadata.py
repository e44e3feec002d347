"""The .metadata file of a checkpoint: read without running it; damage and hostile content end in one message."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from spot_megatron.errors import CheckpointError
from spot_megatron.weights.dist_metadata import METADATA, check_metadata, read_metadata


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of PyTorch's own writer."""
    folder = tmp_path_factory.mktemp("saved")
    state = {"a": torch.randn(6, 4), "b": torch.zeros(3, dtype=torch.bfloat16), "step": torch.tensor(3), "text": "x"}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_same_places_as_pytorch_reads(folder):
    check_metadata(folder)
    found, expected = read_metadata(folder), FileSystemReader(folder).read_metadata()
    assert {key: (stored.kind, stored.shape) for key, stored in found.items()} == {
        "a": ("F32", (6, 4)),
        "b": ("BF16", (3,)),
    }
    places = {index.fqn: info for index, info in expected.storage_data.items()}
    for key, stored in found.items():
        (chunk,) = stored.chunks
        info = places[key]
        assert (chunk.file, chunk.offset, chunk.length) == (info.relative_path, info.offset, info.length)


class Command:
    def __reduce__(self):
        return os.system, ("touch ran",)


# A dotted name leaves the allowed module: torch.distributed.checkpoint.filesystem imports os.
DOTTED = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x09touch ran\x85R."


@pytest.mark.parametrize("content", [pickle.dumps(Command()), DOTTED])
def test_code_is_refused_by_name_and_not_run(folder, content, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"refers to \S+system, .*may run code"):
        check_metadata(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_metadata(folder)
    assert not (folder / "ran").exists()
    pickle.loads(content)  # the content does run where nothing checks it
    assert (folder / "ran").exists()


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/tmp/__0_0.distcp", "..", "", "a.distcp\0", "secrets.txt"])
def test_paths_outside_the_folder(folder, path):
    metadata = FileSystemReader(folder).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = path
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    for function in (check_metadata, read_metadata):
        if path == "a.distcp\0":
            continue
        with pytest.raises(CheckpointError, match=r"does not name a \.distcp file"):
            function(folder)


@pytest.mark.parametrize("content", [b"\x80\x05\x96" + b"\xff" * 5 + b"\0" * 3 + b".", b"\x80\x02}r\xff\xff\xff\x7f."])
def test_announced_sizes_are_not_allocated(folder, content):
    """A bytearray of 1 TB, and an entry far beyond the end of the unpickler's memo."""
    (folder / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        check_metadata(folder)


def test_flipped_bits_and_cuts_raise_nothing_else(folder):
    original, generator = (folder / METADATA).read_bytes(), random.Random(0)
    num_refused = 0
    for _ in range(1500):
        damaged = bytearray(original)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        cut = generator.choice([len(damaged), generator.randrange(len(damaged))])
        (folder / METADATA).write_bytes(damaged[:cut])
        for function in (check_metadata, read_metadata):
            with contextlib.suppress(CheckpointError):
                function(folder)
                num_refused -= 1
            num_refused += 1
    assert num_refused > 1500
