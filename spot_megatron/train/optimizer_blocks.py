"""The optimizer's state in blocks, by which it is stored.

Megatron's distributed optimizer gives each data-parallel rank a range of every parameter's flattened elements. A range
is cut into blocks, rectangles of the whole parameter: a part of a row, whole rows, a part of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from spot_megatron.train.optim import Policy
from spot_megatron.weights.checkpoint import model_state

BLOCK_ELEMENTS = 1 << 24  # most elements of a block


@dataclass(frozen=True, eq=False)
class Range:
    """The elements of one parameter whose optimizer state this rank holds."""

    part: DistributedOptimizer
    parameter: torch.nn.Parameter
    start: int  # in the flattened parameter of this tensor rank
    end: int

    def states(self) -> dict[str, Tensor]:
        """[end - start] of the main weights and each moment; views of the optimizer's own unless it compacts them."""
        tensors = self.part._get_main_param_and_optimizer_states(self.parameter)
        return {name: tensor.detach() for name, tensor in tensors.items() if name != "step"}


@dataclass(frozen=True, eq=False)
class Block:
    """A rectangle of a whole parameter's state: `sizes` at `offsets` in a tensor of size `whole`."""

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    held: Range
    state: str
    start: int  # in the range's state
    is_written: bool  # by this rank: of tensor ranks that hold the same parameter one writes
    is_padded: bool  # other splits may have other sizes of `whole`, with zeros at the end

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))

    def of(self, state: Tensor) -> Tensor:
        """The block of its range's state, as a view of `sizes`."""
        return state[self.start : self.start + math.prod(self.sizes)].view(self.sizes)


def blocks(policy: Policy) -> Iterator[Block]:
    """All blocks of this rank's optimizer states."""
    pieces = _pieces(policy)
    for part in policy.parts:
        for held in _ranges(part):
            for state in held.states():
                for piece, piece_start in pieces[id(held.parameter)]:
                    yield from _cut(held, state, piece, piece_start)


def _pieces(policy: Policy) -> dict[int, list[tuple[ShardedTensor, int]]]:
    """id of a parameter -> the whole tensors it belongs to, each with its first element's place in the parameter.

    A parameter is one piece, but for gate and up projections, which are one parameter of two pieces.
    """
    found: dict[int, list[tuple[ShardedTensor, int]]] = {}
    for item in nested_values(model_state(policy.bare)):
        if not isinstance(item, (ShardedTensor, ShardedTensorFactory)):
            continue
        parameter = item.data
        sharded = nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item]
        found[id(parameter)] = []
        for piece in sharded:
            assert piece.data.is_contiguous(), piece
            start = (piece.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            found[id(parameter)].append((piece, start))
    return found


def _ranges(part: DistributedOptimizer) -> Iterator[Range]:
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield Range(part, parameter, places["param"].start, places["param"].end)


def _cut(held: Range, state: str, piece: ShardedTensor, piece_start: int) -> Iterator[Block]:
    """The blocks of a range's overlap with a piece of its parameter."""
    assert len(piece.replica_id) == 3, piece  # (pipeline or expert, tensor, data)
    first, last = max(held.start, piece_start), min(held.end, piece_start + math.prod(piece.local_shape))
    place, prepended = first - held.start, piece.prepend_axis_num
    for offsets, sizes in rectangles(tuple(piece.local_shape), first - piece_start, last - piece_start):
        whole_offsets = [a + b for a, b in zip(piece.global_offset[prepended:], offsets, strict=True)]
        yield Block(
            name=f"optimizer.state.{state}.{piece.key}",
            whole=tuple(piece.global_shape),
            offsets=(*piece.global_offset[:prepended], *whole_offsets),
            sizes=(*[1] * prepended, *sizes),
            held=held,
            state=state,
            start=place,
            is_written=tuple(piece.replica_id[:2]) == (0, 0),
            is_padded=piece.allow_shape_mismatch,
        )
        place += math.prod(sizes)


def rectangles(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of rectangles that make up elements `start` to `end` of a flattened tensor, in their order."""
    if start >= end:
        return
    if len(shape) == 1:
        for begin in range(start, end, BLOCK_ELEMENTS):
            yield (begin,), (min(BLOCK_ELEMENTS, end - begin),)
        return
    row = math.prod(shape[1:])
    while start < end:
        index, inside = divmod(start, row)
        num_rows = min(end - start, BLOCK_ELEMENTS) // row if inside == 0 else 0
        if num_rows:  # whole rows
            yield (index, *[0] * (len(shape) - 1)), (num_rows, *shape[1:])
            start += num_rows * row
        else:  # a part of one row
            stop = min(end, (index + 1) * row)
            for offsets, sizes in rectangles(shape[1:], inside, stop - index * row):
                yield (index, *offsets), (1, *sizes)
            start = stop
