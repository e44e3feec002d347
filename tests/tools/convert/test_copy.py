"""The parts of a conversion, each against another implementation: casts, frames, merged rows, plans."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.folder import DTYPES
from spot_megatron.hf.names import weight_map
from spot_megatron.weights.shards import merge
from tests.hf.test_names import CONFIGS
from tools.convert.copy_plan import Block, Rows, Stripe, batches, cut_rows, row_ranges
from tools.convert.float_kinds import cast, has_nonfinite, widest
from tools.convert.merged_rows import merged_rows, merged_shape
from tools.convert.torch_frame import framed_bytes, make_frame, read_frame


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy()


def samples(kind):
    """Every 16-bit pattern; for float32, every upper half with lower halves around the ties."""
    halves = torch.arange(1 << 16, dtype=torch.int32)
    if kind != "F32":
        return halves.to(torch.int16).view(DTYPES[kind])
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    return torch.cat([(halves << 16) | low for low in lower]).view(torch.float32)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts_of_pytorch_for_every_value(source, target):
    values = samples(source)
    ours = torch.from_numpy(cast(raw(values), source, target)).view(DTYPES[target])
    theirs = values.to(DTYPES[target])
    assert torch.equal(ours.isnan(), theirs.isnan())
    is_number = ~theirs.isnan()
    assert np.array_equal(raw(ours[is_number]), raw(theirs[is_number]))


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_there_and_back_through_float32_keeps_every_bit(kind):
    values = raw(samples(kind))
    back = cast(cast(values, kind, "F32"), "F32", kind)
    if kind == "F16":  # the processor makes signalling NaN quiet
        numbers = ~samples(kind).isnan().numpy()
        assert np.array_equal(values.view(np.uint16)[numbers], back.view(np.uint16)[numbers])
    else:
        assert np.array_equal(values, back)


@pytest.mark.parametrize("kind", DTYPES)
def test_nan_and_infinity_are_found_at_any_position(kind):
    values = samples(kind)
    finite, others = values[values.isfinite()], values[~values.isfinite()]
    assert not has_nonfinite(raw(finite), kind)
    for pattern in [*others[others.isinf()], *others[:: max(1, len(others) // 50)]]:
        data = torch.zeros(300_000, dtype=DTYPES[kind])
        data[277_777] = pattern
        assert has_nonfinite(raw(data), kind)


def test_widest():
    assert [widest(k) for k in ({"BF16"}, {"BF16", "F32"}, {"BF16", "F16"})] == ["BF16", "F32", "F32"]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 1, 7, 9)])
def test_frames_are_those_of_torch_save(kind, shape):
    """torch.load reads ours, we read torch's, and both are sound zip archives."""
    tensor = torch.randn(shape).to(DTYPES[kind])
    data = raw(tensor).tobytes()
    frame = make_frame(kind, shape, len(data), zlib.crc32(data))
    ours = frame.head + data + frame.tail
    assert len(ours) == framed_bytes(kind, shape, len(data))
    loaded = torch.load(io.BytesIO(ours), weights_only=True)
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(loaded, tensor)
    assert zipfile.ZipFile(io.BytesIO(ours)).testzip() is None
    stream = io.BytesIO()
    torch.save(tensor, stream)
    theirs = stream.getvalue()
    with tempfile.TemporaryFile() as file:
        file.write(b"before" + theirs + ours)
        file.flush()
        for start, length in ((6, len(theirs)), (6 + len(theirs), len(ours))):
            found = read_frame(file.fileno(), start, length)
            assert (found.kind, found.shape) == (kind, shape)
            assert os.pread(file.fileno(), len(data), found.offset) == data


@pytest.mark.parametrize(
    "content", [torch.zeros(3, dtype=torch.int64), torch.zeros(4, 6).T, [1], print, torch.nn.Linear(1, 1)]
)
def test_other_content_is_refused_and_not_run(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    with tempfile.TemporaryFile() as file:
        file.write(stream.getvalue())
        file.flush()
        with pytest.raises(CheckpointError):
            read_frame(file.fileno(), 0, len(stream.getvalue()))


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_rows_arrange_as_merge_does(family):
    """Rows placed by number give the matrix that weights.shards.merge gives."""
    config = CONFIGS[family]
    for mapping in weight_map(config):
        parts = [torch.randn(shape) for shape in mapping.shapes]
        merged = torch.full(merged_shape(mapping), float("nan"))
        end = 0
        for rows in merged_rows(mapping, config):
            assert rows.merged_row == end
            end += rows.num_rows
            part = parts[rows.tensor][rows.tensor_row : rows.tensor_row + rows.num_rows]
            merged[rows.merged_row : end] = part
        assert torch.equal(merged, merge(parts, mapping.sharding, config.head_dim)), mapping.local


@settings(max_examples=50, deadline=None)
@given(num_rows=st.integers(1, 10**6), row_bytes=st.sampled_from([2, 256, 8192, 1 << 20]))
def test_runs_of_rows_are_whole_and_bounded(num_rows, row_bytes):
    runs = list(row_ranges(num_rows, row_bytes))
    assert runs[0][0] == 0
    assert runs[-1][1] == num_rows
    assert all(left[1] == right[0] for left, right in itertools.pairwise(runs))
    assert all(0 < (stop - start) * row_bytes <= 1 << 24 for start, stop in runs)


def test_cut_rows_and_batches_keep_order_and_bytes():
    rows = tuple(Rows(f"t{n}", "BF16", 3000, (Stripe(f"f{n}", 100, 4096),)) for n in range(5))
    assert [(r.name, r.num_rows, r.stripes[0].offset) for r in cut_rows(rows, 2999, 6001)] == [
        ("t0", 1, 100 + 2999 * 4096),
        ("t1", 3000, 100),
        ("t2", 1, 100),
    ]
    found = [r for batch in batches(Block("F32", rows)) for r in batch]
    assert sum(r.num_rows for r in found) == 15000
    assert all(sum(r.num_rows * r.row_bytes * 2 for r in b) <= 1 << 24 for b in batches(Block("F32", rows)))
    assert [r.name for r in found] == sorted(r.name for r in found)
