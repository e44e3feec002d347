"""The place of each row of the Hugging Face tensors in Megatron's merged matrix.

The same arrangement as weights.shards.merge, by row instead of by tensor, so that a conversion can copy byte ranges.
A vector counts as rows of one element. This module imports neither PyTorch nor Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.names import ParameterMapping, Sharding


@dataclass(frozen=True)
class RowRange:
    """`num_rows` rows of a mapping's tensor number `tensor`: their first row in it and in the merged matrix."""

    tensor: int
    tensor_row: int
    merged_row: int
    num_rows: int


def merged_rows(mapping: ParameterMapping, config: HFModelConfig) -> Iterator[RowRange]:
    """All rows of the merged matrix, in order."""
    start = 0
    if mapping.sharding is not Sharding.QKV:
        for tensor, shape in enumerate(mapping.shapes):
            yield RowRange(tensor, 0, start, shape[0])
            start += shape[0]
        return
    query_rows = config.num_heads // config.num_groups * config.head_dim
    for group in range(config.num_groups):
        for tensor, num_rows in enumerate((query_rows, config.head_dim, config.head_dim)):
            yield RowRange(tensor, group * num_rows, start, num_rows)
            start += num_rows


def merged_shape(mapping: ParameterMapping) -> tuple[int, ...]:
    """The shape of the whole Megatron parameter, before tensor parallelism and padding."""
    return (sum(shape[0] for shape in mapping.shapes), *mapping.shapes[0][1:])


def checkpoint_place(
    mapping: ParameterMapping, config: HFModelConfig, layer: int, expert: int
) -> tuple[str, tuple[int, ...]]:
    """Key and leading indices of a parameter in a distributed checkpoint.

    Megatron stacks the layers of a model under one key if all are alike, and experts always.
    """
    is_stacked = mapping.layers is not None and len({*config.moe_layers}) in (0, config.num_layers)
    prefix = "layers." if is_stacked else f"layers.{layer}."
    key = mapping.checkpoint_key.replace("layers.{layer}.", prefix)
    return key, (*((layer,) if is_stacked else ()), *((expert,) if mapping.num_experts else ()))


def stack_shape(mapping: ParameterMapping, config: HFModelConfig) -> tuple[int, ...]:
    """The leading dimensions that checkpoint_place indexes."""
    _, index = checkpoint_place(mapping, config, 0, 0)
    counts = [config.num_layers] if len(index) - bool(mapping.num_experts) else []
    return (*counts, *([mapping.num_experts] if mapping.num_experts else []))
