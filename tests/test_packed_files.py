"""JSONL that is packed, and Parquet: the same rows as the plain file, and a cut file is never taken for a whole one."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from spot_megatron.data.records import read_pairs
from spot_megatron.errors import PairError
from spot_megatron.files import read_rows

ROWS = [{"id": str(n), "prompt": "2+2?", "chosen": "It is 4 é.", "rejected": f"It is {n}."} for n in range(3000)]
PLAIN = b"\xef\xbb\xbf" + b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in ROWS)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("name", PACKERS)
def test_packed_files_are_read(tmp_path: Path, name: str) -> None:
    pack: Callable[[bytes], bytes] = PACKERS[name]
    middle = len(PLAIN) // 2
    for file in (tmp_path / f"pairs.jsonl.{name}", tmp_path / "without_suffix"):
        file.write_bytes(pack(PLAIN[:middle]) + pack(PLAIN[middle:]))  # joined, as parallel packers write them
        assert list(read_rows(file)) == list(enumerate(ROWS, start=1))
    (record,) = read_pairs([file])[41:42]
    assert (record.id, record.source) == ("41", f"{file}:42")


@pytest.mark.parametrize("name", PACKERS)
def test_a_cut_packed_file_is_refused(tmp_path: Path, name: str) -> None:
    packed = PACKERS[name](PLAIN)
    file = tmp_path / "pairs"
    for length in (len(packed) // 2, len(packed) - 5):
        file.write_bytes(packed[:length])
        with pytest.raises(PairError, match=r"pairs: cannot be read .*write the file again"):
            list(read_rows(file))


def test_parquet_is_read_and_a_null_is_a_missing_key(tmp_path: Path) -> None:
    user = {"role": "user", "content": "2+2?", "name": None}
    rows = [
        {"prompt": [user], "chosen": "4", "rejected": "5", "system": None, "score": 1.5},
        {"prompt": [user | {"name": "ada"}], "chosen": "6", "rejected": "7", "system": "Be brief.", "score": None},
    ]
    file = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    first, second = read_pairs([file])
    assert (first.id, first.source, first.prompt, first.meta) == (
        "line-1", f"{file}:1", [{"role": "user", "content": "2+2?"}], {"score": 1.5},
    )  # fmt: skip
    assert second.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?", "name": "ada"},
    ]
    assert second.meta == {}
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PairError, match=r"pairs\.parquet: cannot be read as Parquet"):
        read_pairs([file])


def test_a_zip_archive_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "pairs.zip").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(PairError, match=r"unpack it with `unzip pairs\.zip`"):
        list(read_rows(tmp_path / "pairs.zip"))
