"""The optimizer's state on disk: every rank writes and reads its own part, one block at a time.

Megatron's own checkpoints that another split can read gather all parameters' states on some or all ranks.
torch.distributed.checkpoint stores blocks (optimizer_blocks.py) by their place in the whole parameter, so nothing is
exchanged between ranks, a rank holds one block besides its state, and another split reads the blocks that overlap its
own ranges.

    optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight    a name in the checkpoint: state, parameter

Checkpoints of earlier versions have the same tensors under the same names, in other blocks, and are read as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spot_megatron.errors import CheckpointError
from spot_megatron.train.optim import Policy
from spot_megatron.train.optimizer_blocks import Block, Range, blocks
from spot_megatron.weights.checkpoint import one_line
from spot_megatron.weights.dist_metadata import check_metadata


def save_optimizer(policy: Policy, folder: Path) -> None:
    """Writes the optimizer's state into `folder`. Collective."""
    dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=_SavePlanner(list(blocks(policy))))


class OptimizerWrite:
    """save_optimizer in three parts, of which the second may run in a thread. The state is copied when it is made."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        """Plans as torch.distributed.checkpoint.save does. Collective."""
        self._planner, self._writer = _SavePlanner(list(blocks(policy))), dcp.FileSystemWriter(folder)
        rank = dist.get_rank()
        self._writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(plan, plans if rank == 0 else None)
        if rank == 0:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._writer.prepare_global_plan(plans)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, plans if rank == 0 else None)
        self._plan = self._planner.finish_plan(mine[0])
        self._planner.copy()

    def write(self) -> None:
        """Writes this rank's files."""
        self._results = self._writer.write_data(self._plan, self._planner).wait()
        del self._planner

    def finish(self) -> None:
        """Writes .metadata. Collective; after `write` on every rank."""
        results: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(self._results, results if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            self._writer.finish(self._metadata, results)


def load_optimizer(policy: Policy, folder: Path, num_updates: int) -> None:
    """Fills the optimizer from `folder`, whatever the split that wrote it. Collective.

    Raises:
        CheckpointError: the folder is damaged, or another model's.
    """
    check_metadata(folder)
    for part in policy.parts:
        _make_states(part)
    planner = _LoadPlanner(list(blocks(policy)), folder)
    try:
        dcp.load({}, storage_reader=dcp.FileSystemReader(folder), planner=planner)
    except CheckpointException as error:  # one reason a rank, often the same
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, CheckpointError):
            raise reason from None
        raise CheckpointError(f"{folder} is damaged: {one_line(reason)}; delete this checkpoint") from error
    planner.hand_over()
    for part in policy.parts:
        _set_step(part, num_updates)


class _SavePlanner(dcp_planner.SavePlanner):
    def __init__(self, held: Sequence[Block]) -> None:
        self._blocks = {(block.name, block.offsets): block for block in held if block.is_written}
        self._copies: dict[Block, Tensor] = {}
        self._states: dict[str, Tensor] = {}  # of the range that was asked for last
        self._range: Range | None = None

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> dcp_planner.SavePlan:
        items = []
        for block in self._blocks.values():
            properties = TensorProperties.create_from_tensor(self._tensor(block))
            data = dcp_planner.TensorWriteData(block.chunk, properties, torch.Size(block.whole))
            index = MetadataIndex(block.name, block.chunk.offsets)
            items.append(dcp_planner.WriteItem(index, dcp_planner.WriteItemType.SHARD, tensor_data=data))
        return dcp_planner.SavePlan(items)

    def create_global_plan(self, all_plans: list[dcp_planner.SavePlan]) -> tuple[list[dcp_planner.SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            written = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            assert written == math.prod(tensor.size), f"{name}: {written} elements written, {tensor.size} wanted"
        return plans, metadata

    def finish_plan(self, new_plan: dcp_planner.SavePlan) -> dcp_planner.SavePlan:
        return new_plan

    def resolve_data(self, write_item: dcp_planner.WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        return self._tensor(self._blocks[write_item.index.fqn, tuple(write_item.index.offset)])

    def copy(self) -> None:
        """Copies all blocks to host memory, so that the optimizer may go on."""
        self._copies = {block: self._tensor(block).to("cpu", copy=True) for block in self._blocks.values()}

    def _tensor(self, block: Block) -> Tensor:
        if block in self._copies:
            return self._copies[block]
        if self._range is not block.held:
            self._range, self._states = block.held, block.held.states()
        return block.of(self._states[block.state])


class _LoadPlanner(dcp_planner.LoadPlanner):
    """Reads into the optimizer's own tensors; compacted ones, which give out copies, get theirs from `hand_over`."""

    def __init__(self, wanted: Sequence[Block], folder: Path) -> None:
        self._folder = folder
        self._blocks = {(block.name, block.offsets): block for block in wanted}
        self._states: dict[Range, dict[str, Tensor]] = {}
        for block in wanted:
            if block.held not in self._states:
                states = block.held.states()
                copies = _is_compact(block.held.part)
                self._states[block.held] = {k: v.cpu() for k, v in states.items()} if copies else states

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        # Experts of earlier versions' checkpoints have names that begin with chained_1.
        self._stored = {re.sub(r"^chained_\d+\.", "", name): name for name in metadata.state_dict_metadata}
        self._metadata = metadata

    def create_local_plan(self) -> dcp_planner.LoadPlan:
        wanted: dict[str, list[Block]] = {}
        for block in self._blocks.values():
            wanted.setdefault(block.name, []).append(block)
        items = []
        for name, of_name in wanted.items():
            stored = self._metadata.state_dict_metadata.get(self._stored.get(name, ""))
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"{self._folder} holds another model's optimizer: it lacks {name}")
            if tuple(stored.size) != of_name[0].whole and not of_name[0].is_padded:
                raise CheckpointError(
                    f"{self._folder} holds another model's optimizer: {name} is {tuple(stored.size)}, "
                    f"{of_name[0].whole} is wanted"
                )
            items += create_read_items_for_chunk_list(self._stored[name], stored, [block.chunk for block in of_name])
        return dcp_planner.LoadPlan(items)

    def create_global_plan(self, global_plan: list[dcp_planner.LoadPlan]) -> list[dcp_planner.LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: dcp_planner.LoadPlan) -> dcp_planner.LoadPlan:
        return central_plan

    def load_bytes(self, read_item: dcp_planner.ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item} is not a tensor")

    def resolve_tensor(self, read_item: dcp_planner.ReadItem) -> Tensor:
        name = re.sub(r"^chained_\d+\.", "", read_item.dest_index.fqn)
        assert read_item.dest_index.offset is not None
        block = self._blocks[name, tuple(read_item.dest_index.offset)]
        tensor = block.of(self._states[block.held][block.state])
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def commit_tensor(self, read_item: dcp_planner.ReadItem, tensor: Tensor) -> None:
        """Nothing to do: resolve_tensor returned a view of the destination."""

    def hand_over(self) -> None:
        """Gives compacting optimizers what was read for them."""
        for held, states in self._states.items():
            if _is_compact(held.part):
                device = held.parameter.device
                held.part._set_main_param_and_optimizer_states(
                    held.parameter, {name: state.to(device) for name, state in states.items()}
                )


def _is_compact(part: DistributedOptimizer) -> bool:
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def _make_states(part: DistributedOptimizer) -> None:
    """Gives an optimizer that has not made a step the states that its first step would make."""
    inner = part.optimizer
    if isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            for param in group["params"]:
                zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[param] = {"step": torch.zeros((), dtype=torch.float32, device=param.device), **zeros}
    else:  # Transformer Engine's
        part.load_state_dict(part.state_dict())


def _set_step(part: DistributedOptimizer, num_updates: int) -> None:
    """torch.optim.AdamW counts by parameter, Transformer Engine's by group."""
    for state in part.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = torch.full_like(state["step"], num_updates)
    for group in part.optimizer.param_groups:
        if not isinstance(part.optimizer, torch.optim.AdamW):
            group["step"] = num_updates
