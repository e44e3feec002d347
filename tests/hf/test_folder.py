"""Reading Hugging Face folders: what is there, and every way in which a folder can be broken."""

import contextlib
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from spot_megatron.errors import WeightError
from spot_megatron.hf.folder import HFFolder, same_bits
from spot_megatron.hf.index import INDEX_FILE, SINGLE_FILE

A, B = torch.arange(12.0).view(3, 4), torch.ones(2, dtype=torch.bfloat16)


@pytest.fixture
def single(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_header(file, change):
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_is_there(layout, request):
    folder = HFFolder(request.getfixturevalue(layout))
    assert folder.names() == ["a", "b"]
    assert folder.shape("a") == (3, 4)
    assert folder.kinds() == {"a": "F32", "b": "BF16"}
    assert folder.dtype("b") == torch.bfloat16
    assert same_bits(folder.read("a"), A)
    assert same_bits(folder.read("b"), B)


def test_reads_a_part_and_cuts_at_the_end(single):
    folder = HFFolder(single)
    assert torch.equal(folder.read("a", (slice(1, 2),)), A[1:2])
    assert torch.equal(folder.read("a", (slice(None), slice(1, 3))), A[:, 1:3])
    assert torch.equal(folder.read("a", (slice(2, 9),)), A[2:])
    assert folder.read("a", (slice(5, 9),)).shape == (0, 4)


def test_one_file_needs_no_special_name(tmp_path):
    save_file({"a": A}, tmp_path / "weights.safetensors")
    assert HFFolder(tmp_path).names() == ["a"]


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_other_weights_beside_the_models_are_not_read(layout, request):
    folder = request.getfixturevalue(layout)
    save_file({"z": A}, folder / "consolidated.safetensors")
    assert HFFolder(folder).names() == ["a", "b"]


def refused(folder, *words):
    with pytest.raises(WeightError) as caught:
        HFFolder(folder)
    for word in words:
        assert word in str(caught.value)


def test_missing_shard(sharded):
    (sharded / "two.safetensors").unlink()
    refused(sharded, "two.safetensors", "missing")


def test_truncated_file(single):
    file = single / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-3])
    refused(single, SINGLE_FILE, "cut short")


def test_empty_file(single):
    (single / SINGLE_FILE).write_bytes(b"")
    refused(single, SINGLE_FILE, "cut short")


def test_bytes_after_the_end(single):
    with (single / SINGLE_FILE).open("ab") as stream:
        stream.write(b"more")
    refused(single, SINGLE_FILE, "damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[3, 5]),
        lambda header: header["a"].update(dtype="BF16"),
        lambda header: header["b"].update(data_offsets=[0, 4]),
        lambda header: header.pop("a"),
    ],
)
def test_header_that_lies(single, change):
    edit_header(single / SINGLE_FILE, change)
    refused(single, SINGLE_FILE, "damaged")


def entry(first, last, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe{}",
        b"[" * 10**5,
        b"[]",
        b'{"a": 1, "a": 2}',
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": entry(0, 4, shape=[-1])},
        {"a": entry(0, 8, shape=[-1, -2])},
        {"a": entry(0, 4, shape=[1.0])},
        {"a": entry(0, 4, shape=[True])},
        {"a": entry(0, 4, shape="1")},
        {"a": entry(0, 4, shape=[1] * 9)},
        {"a": entry(0, 10**30, shape=[10**30])},
        {"a": entry(0, 2**65, shape=[2**63])},
        {"a": entry(-4, 0)},
        {"a": entry(4, 0)},
        {"a": entry(4, 8)},
        {"a": entry(0, 4), "b": entry(0, 4)},
        {"a": entry(0, 4), "b": entry(2, 6)},
        {"a": entry(0, 8, shape=[2]), "b": entry(4, 8)},
        {"a\x1b[2J": entry(0, 4)},
        {"a" * 10**6: entry(0, 4)},
    ],
)
def test_hostile_headers(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(WeightError) as caught:
        HFFolder(tmp_path)
    message = str(caught.value)
    assert f"{SINGLE_FILE} is damaged" in message
    assert message.isprintable()
    assert len(message) < 1500


@pytest.mark.parametrize("length", [9, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_not_read(tmp_path, length):
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", length) + b"{}      ")
    refused(tmp_path, SINGLE_FILE, "damaged", str(length))


def test_every_flipped_bit_of_a_header_is_refused_or_harmless(single):
    """A tensor's name may change (the check against config.json finds that); its bytes never come from elsewhere."""
    file = single / SINGLE_FILE
    original = file.read_bytes()
    for position in range(8 + int.from_bytes(original[:8], "little")):
        for bit in range(8):
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with contextlib.suppress(WeightError):
                found = HFFolder(single)
                assert sorted(span.num_bytes for span in found.spans.values()) == [4, 48]


def test_index_that_names_a_missing_tensor(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    refused(sharded, "c is in two.safetensors", "does not hold it")


def test_index_that_names_the_wrong_file(sharded):
    write_index(sharded, {"a": "two.safetensors", "b": "one.safetensors"})
    refused(sharded, "does not hold it")


def test_tensor_in_two_files(sharded):
    save_file({"a": A, "b": B}, sharded / "two.safetensors")
    refused(sharded, "a is in two files", "one.safetensors", "two.safetensors")


def test_shards_without_index(sharded):
    (sharded / INDEX_FILE).unlink()
    refused(sharded, "2 safetensors files but no", INDEX_FILE)


def test_two_models_in_one_folder(sharded):
    save_file({"a": A, "b": B}, sharded / SINGLE_FILE)
    refused(sharded, "two models in one folder")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 10**5,
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        *(
            json.dumps({"weight_map": {"a": name}})
            for name in (
                "../x.safetensors",
                "/x.safetensors",
                "..",
                "",
                "one",
                "x\0.safetensors",
                "\x1b[2J.safetensors",
            )
        ),
    ],
)
def test_damaged_index(sharded, text):
    (sharded / INDEX_FILE).write_text(text)
    refused(sharded, INDEX_FILE, "damaged")


def test_git_lfs_pointer(single):
    (single / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refused(single, "git lfs pull")


def test_bin_weights_only(tmp_path):
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, ".bin", "save_pretrained")


def test_no_weights_and_no_folder(tmp_path):
    refused(tmp_path, "holds no weights")
    refused(tmp_path / "absent", "is not a folder")


def test_quantised_tensor(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / SINGLE_FILE)
    refused(tmp_path, "a has the data type 'I8'", "Dequantize")


def test_same_bits():
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert same_bits(torch.zeros(()), torch.zeros(()))
