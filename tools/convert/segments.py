"""Where the rows of Hugging Face tensors stand in Megatron's merged matrix, as numbers: for files, not for tensors.

The same arrangement as layout.merge makes, told by row, so that files can be converted by copying ranges of bytes.
A vector counts as rows of one element. Neither PyTorch nor Megatron here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.names import Layout, Row


@dataclass(frozen=True)
class Segment:
    """`num_rows` rows of the row's part number `part`, and where they start in it and in the merged matrix."""

    part: int
    part_row: int
    merged_row: int
    num_rows: int


def segments(row: Row, config: HFModelConfig) -> Iterator[Segment]:
    """Every segment, in the order of the merged matrix."""
    if row.layout is not Layout.QKV:
        start = 0
        for part, shape in enumerate(row.shapes):
            yield Segment(part, 0, start, shape[0])
            start += shape[0]
        return
    query_rows = config.num_heads // config.num_groups * config.head_dim
    start = 0
    for group in range(config.num_groups):
        for part, num_rows in enumerate((query_rows, config.head_dim, config.head_dim)):
            yield Segment(part, group * num_rows, start, num_rows)
            start += num_rows


def merged_shape(row: Row) -> tuple[int, ...]:
    """The whole Megatron parameter, before tensor parallelism and padding."""
    return (sum(shape[0] for shape in row.shapes), *row.shapes[0][1:])


def checkpoint_place(row: Row, config: HFModelConfig, layer: int, expert: int) -> tuple[str, tuple[int, ...]]:
    """Key and leading indices of a parameter in a distributed checkpoint.

    Megatron stacks layers under one key if all are alike, and experts always.
    """
    is_stacked = row.layers is not None and len({*config.moe_layers}) in (0, config.num_layers)
    prefix = "layers." if is_stacked else f"layers.{layer}."
    key = row.checkpoint_key.replace("layers.{layer}.", prefix)
    return key, (*((layer,) if is_stacked else ()), *((expert,) if row.num_experts else ()))


def stack_shape(row: Row, config: HFModelConfig) -> tuple[int, ...]:
    """The leading dimensions that checkpoint_place indexes."""
    _, index = checkpoint_place(row, config, 0, 0)
    counts = [config.num_layers] if len(index) - bool(row.num_experts) else []
    return (*counts, *([row.num_experts] if row.num_experts else []))
